"""Robustness of maps: closed forms for simple methods, literal replicas, captum and Quantus on the same neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import quantus
import torch
from captum.metrics import sensitivity_max
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, SumModel, bound, images, made

from xcli.metrics.robustness import (
    AverageSensitivity,
    AverageStability,
    LocalLipschitz,
    MaxSensitivity,
    RelativeInputStability,
    RelativeOutputStability,
    RelativeRepresentationStability,
)
from xcli.registry import build_metric

QUIET = {"disable_warnings": True, "return_aggregate": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # Quantus computes in float32
RELATIVE = [RelativeInputStability, RelativeOutputStability, RelativeRepresentationStability]
ALL = [AverageStability, MaxSensitivity, AverageSensitivity, LocalLipschitz, *RELATIVE]


def gradient(score, x):
    return score.gradients(x).grads[0].sum(1)


def identity(score, x):
    return x[score.image].sum(1)


def found(metric, net, x, method=gradient, target=None, image=None):
    score = bound(net, x, [0] * len(x) if target is None else target, image)
    return metric.measure(map=method(score, x), x=x, score=score, method=method).values


def noise(metric, net, x, image=None):
    """What the metric adds to each image, (samples, B, C, H, W)."""
    score = bound(net, x, [0] * len(x if image is None else image), image)
    return torch.stack([metric.added(score, x, sample) for sample in range(metric.samples)])


def lengths(values):
    return values.flatten(2).square().sum(2).sqrt()  # (samples, B)


class Linear(nn.Module):
    """Logits that are weighted sums of the pixels."""

    def __init__(self, weights):
        super().__init__()
        self.head = nn.Linear(weights[0].numel(), len(weights)).double()
        self.head.weight.data, self.head.bias.data = (
            weights.flatten(1).clone(),
            torch.arange(len(weights)).double(),
        )

    def forward(self, x):
        return self.head(x.flatten(1))


class Bowl(nn.Module):
    """Half the weighted sum of squares: the gradient is weights * x."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x):
        return (self.weights * x.square() / 2).flatten(1).sum(1, keepdim=True)


# --- closed forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ALL)
def test_the_gradient_of_a_linear_network_never_moves(metric):
    x = images(2, 3, 4, 5)
    options = {"layer": "head"} if metric is RelativeRepresentationStability else {}
    got = found(metric(samples=3, same_class=False, **options), Linear(images(2, 3, 4, 5, seed=1)), x)
    assert got.tolist() == [0, 0]


@pytest.mark.parametrize("factor", [1.0, -3.0])
def test_the_lipschitz_constant_of_a_scaled_image(factor):
    x = images(2, 1, 4, 5)
    got = found(LocalLipschitz(samples=4), SumModel(), x, lambda score, x: factor * identity(score, x))
    assert_close(got, torch.full((2,), abs(factor), dtype=torch.float64))


def test_the_lipschitz_constant_of_a_quadratic_gradient():
    x, weights = images(2, 1, 4, 5), images(1, 4, 5, seed=1).abs()
    metric = LocalLipschitz(samples=6)
    added = noise(metric, SumModel(), x)
    got = found(metric, Bowl(weights), x)
    assert_close(got, (lengths(weights * added) / lengths(added)).amax(0))
    assert (got <= weights.max()).all()
    assert_close(found(metric, Bowl(torch.tensor(2.5).double()), x), torch.full((2,), 2.5).double())


def test_scaled_maps_have_the_lipschitz_constant_of_the_shape():
    x = images(2, 1, 4, 5)
    metric = LocalLipschitz(samples=3, scaled=True)
    added = noise(metric, SumModel(), x)

    def scaled(x):
        return x / x.abs().amax((-1, -2, -3), keepdim=True)

    expected = (lengths(scaled(x + added) - scaled(x)) / lengths(added)).amax(0)
    assert_close(found(metric, SumModel(), x, lambda score, x: 7e3 * identity(score, x)), expected)


def test_sensitivity_of_the_image_itself_is_the_length_of_the_noise():
    x = images(2, 1, 4, 5)
    added = noise(MaxSensitivity(), SumModel(), x)
    assert len(added) == 50
    assert_close(found(MaxSensitivity(), SumModel(), x, identity), lengths(added).amax(0))
    assert_close(found(AverageSensitivity(), SumModel(), x, identity), lengths(added).mean(0))
    own = x.flatten(1).norm(dim=1)
    assert_close(found(MaxSensitivity(relative=True), SumModel(), x, identity), lengths(added).amax(0) / own)
    assert_close(
        found(AverageSensitivity(relative=True), SumModel(), x, identity), lengths(added).mean(0) / own
    )


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_average_stability_of_the_image_itself(distance):
    x = images(2, 1, 4, 5) + 3
    metric = AverageStability(distance=distance)
    added = noise(metric, SumModel(), x).flatten(2)
    assert added.shape[0] == 20
    expected = added.norm(dim=2, p={"l1": 1, "l2": 2}[distance]).mean(0)
    assert_close(found(metric, SumModel(), x, identity), expected)


@pytest.mark.parametrize("change", ["pixel", "length"])
def test_a_map_that_changes_as_much_as_the_image_has_relative_input_stability_one(change):
    x = images(2, 1, 4, 5) + 5
    metric = RelativeInputStability(samples=3, change=change)
    assert_close(found(metric, SumModel(), x, lambda s, x: -4 * identity(s, x)), torch.ones(2).double())


def test_relative_output_stability_of_a_sum():
    x = images(2, 1, 4, 5) + 5
    added = noise(RelativeOutputStability(samples=3), SumModel(), x)
    total = added.flatten(2).sum(2).abs()
    got = found(RelativeOutputStability(samples=3), SumModel(), x, identity)
    assert_close(got, (lengths(added / x) / total).amax(0))
    got = found(RelativeOutputStability(samples=3, change="length"), SumModel(), x, identity)
    own = x.flatten(1)
    assert_close(got, (lengths(added) / own.norm(dim=1) / (total / own.sum(1).abs())).amax(0))


def test_small_denominators_count_as_epsilon():
    x = images(1, 1, 4, 5) + 5
    metric = RelativeInputStability(samples=2, epsilon=100.0)
    added = noise(metric, SumModel(), x)
    assert_close(found(metric, SumModel(), x, identity), (lengths(added / x) / 100).amax(0))
    x[0, 0, 1, 2] = 0
    metric = RelativeOutputStability(samples=2, epsilon=1e-3)
    divisor = torch.where(x == 0, 1e-3, x)
    expected = (lengths(added / divisor) / added.flatten(2).sum(2).abs()).amax(0)
    assert_close(found(metric, SumModel(), x, identity), expected)


@pytest.mark.parametrize("metric", [LocalLipschitz, *RELATIVE])
def test_a_row_is_compared_with_its_own_image(metric):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    x[1] *= 100
    options = {"layer": "features.0"} if metric is RelativeRepresentationStability else {}
    metric = metric(samples=2, same_class=False, **options)
    together = found(metric, net, x, target=[3, 0, 3, 1], image=[0, 1, 1, 1])
    alone = [found(metric, net, x, target=[target] * 2)[1] for target in (0, 3, 1)]
    assert_close(together[1:], torch.stack(alone))


# --- neighbours ----------------------------------------------------------------------------------------------


def test_noise_has_the_law_it_says():
    x = images(2, 3, 40, 40)
    uniform = noise(MaxSensitivity(samples=4, radius=0.3, centre=1.0), SumModel(), x)
    assert 0.7 <= uniform.min() < 0.701
    assert 1.299 < uniform.max() <= 1.3
    assert abs(uniform.mean() - 1) < 0.005
    normal = noise(MaxSensitivity(samples=4, noise="normal", radius=0.3, centre=1.0), SumModel(), x)
    assert abs(normal.mean() - 1) < 0.01
    assert abs(normal.std() - 0.3) < 0.01
    brighter = noise(build_metric({"name": "average-stability", "preset": "xplique"}), SumModel(), x)
    assert 0 <= brighter.min() < 0.001
    assert 0.099 < brighter.max() <= 0.1
    quantus_bounds = noise(
        build_metric({"name": "relative-input-stability", "preset": "quantus"}), SumModel(), x
    )
    assert 0.0199 < quantus_bounds.min() < 0.021
    assert 0.199 < quantus_bounds.max() < 0.2001


def test_rows_of_an_image_share_its_neighbours_and_every_neighbour_is_new():
    x = images(3, 1, 4, 5)
    added = noise(MaxSensitivity(samples=3), SumModel(), x)
    assert len(added.flatten(2).flatten(0, 1).unique(dim=0)) == 9
    again = noise(RelativeInputStability(samples=3), SumModel(), x, image=[0, 0, 1, 2, 2, 2])
    assert_close(again, added)
    without = noise(MaxSensitivity(samples=3), SumModel(), x, image=[0, 2])
    assert_close(without[:, [0, 2]], added[:, [0, 2]])
    assert (without[:, 1] == 0).all()


def test_nothing_of_the_neighbours_is_kept():
    x, net = images(2, 3, 8, 6), made(PooledLinear)
    score, seen = bound(net, x, [0, 1]), []

    def curious(score, x):
        seen.append(score.clean(x))
        return gradient(score, x)

    AverageStability(samples=3).measure(map=gradient(score, x), x=x, score=score, method=curious)
    assert len(seen) == 3
    assert list(score.memo) == [(x, "logits")]


def test_neighbours_of_another_class_are_left_out():
    x = images(2, 1, 2, 2)
    x -= x.mean((1, 2, 3), keepdim=True) + 0.01  # just below the threshold
    metric = MaxSensitivity(samples=12, same_class=True)
    added = noise(metric, SumModel(), x)
    same = (x + added).flatten(2).sum(2) <= 0
    assert same.any(0).all()
    assert not same.all(0).any()
    moved = torch.where(same, lengths(added), 0.0)
    assert_close(found(metric, SumModel(), x, identity), moved.amax(0))
    got = found(AverageSensitivity(samples=12, same_class=True), SumModel(), x, identity)
    assert_close(got, moved.sum(0) / same.sum(0))
    assert not torch.allclose(got, lengths(added).mean(0))


def test_the_predicted_class_counts_and_not_that_of_the_row():
    x, net = images(1, 3, 4, 5), Linear(images(3, 3, 4, 5, seed=1))
    metric = MaxSensitivity(samples=12, radius=1.0, same_class=True)
    added = noise(metric, net, x)
    same = net(x + added[:, 0]).argmax(1) == net(x).argmax(1)
    assert 0 < same.sum() < 12
    got = found(metric, net, x, identity, target=[0, 1, 2], image=[0, 0, 0])
    expected = added[:, 0].sum(1).flatten(1).norm(dim=1)[same].max()
    assert_close(got, expected.expand(3))


@pytest.mark.parametrize("metric", [AverageStability, *RELATIVE])
def test_without_a_neighbour_of_the_same_class_there_is_no_value(metric):
    x = images(2, 3, 8, 6)
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    net[0].weight.data.fill_(1.0)
    options = {"layer": "0"} if metric is RelativeRepresentationStability else {}
    assert found(metric(samples=2, centre=-50.0, **options), net, x.abs(), identity).isnan().all()
    assert found(metric(samples=2, **options), net, x.abs() + 1, identity).isfinite().all()


@pytest.mark.parametrize("change", ["pixel", "length"])
@pytest.mark.parametrize("metric", RELATIVE)
def test_a_map_of_zeros_has_no_relative_change(metric, change):
    x, net = images(2, 3, 8, 6), made(PooledLinear)
    options = {"layer": "features.0"} if metric is RelativeRepresentationStability else {}
    half = found(
        metric(samples=2, change=change, **options),
        net,
        x,
        lambda s, x: x.sum(1) * torch.tensor([[[0.0]], [[1]]]),
    )
    assert half.isnan().tolist() == [True, False]


def test_a_map_of_zeros_has_no_length_to_compare_with():
    x, net = images(2, 3, 8, 6), made(PooledLinear)
    for metric in (MaxSensitivity(relative=True, samples=2), LocalLipschitz(scaled=True, samples=2)):
        assert found(metric, net, x, lambda s, x: 0 * x.sum(1)).isnan().all()
    assert found(MaxSensitivity(samples=2), net, x, lambda s, x: 0 * x.sum(1)).tolist() == [0, 0]


# --- other implementations -----------------------------------------------------------------------------------


def method_of(net, targets):
    """Gradient times input of the targets' logits, as other packages call it."""

    def explain(x, rows):
        x = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(net(x).gather(1, targets[rows][:, None]).sum(), x)
        return (grad * x).sum(1).detach()

    return explain


def case(dtype=torch.float64):
    net, x = made(PooledLinear).to(dtype), images(3, 3, 8, 6).to(dtype)
    targets = torch.tensor([1, 4, 2])
    explain = method_of(net, targets)
    return net, x, targets, lambda score, x: explain(x, torch.arange(3)), explain


def test_max_sensitivity_equals_captum():
    net, x, targets, method, explain = case()
    metric = build_metric({"name": "max-sensitivity", "preset": "captum"})
    assert (metric.samples, metric.radius) == (10, 0.02)
    near = (x + noise(metric, net, x)).transpose(0, 1).flatten(0, 1)  # image by image

    def explained(inputs):
        if isinstance(inputs, tuple):
            return (explain(inputs[0], torch.arange(3)),)
        return explain(inputs, torch.arange(3).repeat_interleave(10))

    expected = sensitivity_max(explained, x, perturb_func=lambda inputs: near, n_perturb_samples=10)
    assert expected.min() > 0
    assert_close(found(metric, net, x, method, targets.tolist()), expected)


def test_captum_gives_an_absolute_number_where_the_relative_one_is_not_defined():
    x = images(1, 1, 4, 5)
    still = x.clone()

    def moves(inputs):
        return inputs - still if isinstance(inputs, torch.Tensor) else inputs[0] - still

    assert sensitivity_max(moves, x, perturb_func=lambda inputs: inputs + 1, n_perturb_samples=1).item() > 4
    got = found(MaxSensitivity(relative=True), SumModel(), x, lambda s, x: (x - still).sum(1))
    assert got.isnan().all()


def peer(metric, net, x, targets, explain):
    """What Quantus makes of it, with the metric's own neighbours given to it one after the other."""

    def explain_func(model, inputs, targets, **_):
        return explain(torch.as_tensor(np.asarray(inputs)), torch.arange(3))[:, None].numpy()

    own = explain(x, torch.arange(3))[:, None].numpy()
    given = {"x_batch": x.numpy(), "y_batch": targets.numpy(), "a_batch": own, "explain_func": explain_func}
    values = metric(model=net, channel_first=True, softmax=False, **given)
    return torch.tensor(np.array(values), dtype=torch.float32)


def perturbing(metric, net, x):
    near = iter((x + noise(metric, net, x)).flatten(2).numpy())
    return {"nr_samples": metric.samples, "perturb_func": lambda arr, **_: next(near)}


@pytest.mark.parametrize(
    ("name", "theirs", "how"),
    [
        ("max-sensitivity", quantus.MaxSensitivity, {}),
        ("average-sensitivity", quantus.AvgSensitivity, {}),
        ("local-lipschitz", quantus.LocalLipschitzEstimate, {"normalise": False}),
        ("relative-input-stability", quantus.RelativeInputStability, {}),
        ("relative-output-stability", quantus.RelativeOutputStability, {}),
        (
            "relative-representation-stability",
            quantus.RelativeRepresentationStability,
            {"layer_names": ["head"]},
        ),
    ],
)
def test_quantus_on_the_same_neighbours(name, theirs, how):
    net, x, targets, method, explain = case(torch.float32)
    options = {"name": name, "preset": "quantus", "samples": 4}
    options |= {"layer": "head"} if how.get("layer_names") else {}
    options |= {"scaled": False} if how.get("normalise") is False else {}
    metric = build_metric(options)
    expected = peer(theirs(**QUIET, **how, **perturbing(metric, net, x)), net, x, targets, explain)
    assert expected.isfinite().all()
    assert expected.min() > 1e-4
    assert_close(found(metric, net, x, method, targets.tolist()), expected, **CLOSE)


def test_quantus_scales_maps_by_the_largest_of_the_batch():
    net, x, targets, method, explain = case(torch.float32)
    metric = build_metric({"name": "local-lipschitz", "preset": "quantus", "samples": 3})
    theirs = quantus.LocalLipschitzEstimate(**QUIET, **perturbing(metric, net, x))
    got, whole = found(metric, net, x, method, targets.tolist()), peer(theirs, net, x, targets, explain)
    largest = explain(x, torch.arange(3)).abs().amax((1, 2)).argmax()
    assert not torch.isclose(got, whole, rtol=0.1).all()
    assert torch.isclose(got[largest], whole[largest], rtol=0.1)  # alone it would be the same


def test_quantus_gives_up_a_row_for_one_neighbour_of_another_class():
    _, x, targets, _, explain = case(torch.float32)
    net = Linear(images(3, 3, 8, 6, seed=1)).float().eval()
    metric = RelativeInputStability(samples=12, radius=1.0)
    before, after = net(x).argmax(1), net((x + noise(metric, net, x)).flatten(0, 1)).argmax(1).view(12, 3)
    same = after == before
    assert same.any(0).all()
    assert same.all(0).tolist() == [True, False, True]

    theirs = quantus.RelativeInputStability(**QUIET, **perturbing(metric, net, x))
    assert peer(theirs, net, x, targets, explain).isnan().tolist() == [False, True, False]
    assert found(metric, net, x, lambda s, x: explain(x, torch.arange(3)), targets.tolist()).isfinite().all()


def test_average_stability_of_xplique():
    net, x, targets, method, explain = case()
    metric = build_metric({"name": "average-stability", "preset": "xplique"})
    masks = noise(metric, net, x)
    expected = []
    for i in range(3):
        near = x[i] + masks[:, i]
        rows = torch.full((20,), i)
        distances = [
            ((a - b) ** 2).sum().sqrt() for a in explain(near, rows) for b in explain(x[i : i + 1], rows[:1])
        ]
        expected.append(torch.stack(distances).mean())
    assert_close(found(metric, net, x, method, targets.tolist()), torch.stack(expected))


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_stability_of_openxai(kind):
    net, x, targets, method, explain = case()
    layer = {"layer": "features.0"} if kind is RelativeRepresentationStability else {}
    metric = build_metric({"name": kind.name, "preset": "openxai", "samples": 5, **layer})
    seen = {
        RelativeInputStability: lambda x: x,
        RelativeOutputStability: net,
        RelativeRepresentationStability: lambda x: net.features[0](x),
    }[kind]

    def change(a, b):
        return ((a - b).norm() / a.norm()).item()

    expected = []
    for i in range(3):
        own, row = x[i : i + 1], torch.tensor([i])
        ratios = []
        for added in noise(metric, net, x):
            near = own + added[i]
            if net(near).argmax() == net(own).argmax():
                ratios.append(change(explain(own, row), explain(near, row)) / change(seen(own), seen(near)))
        expected.append(max(ratios))
    got = found(metric, net, x, method, targets.tolist())
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def representation_stability(metric, net, x, method, seen):
    """The formula, neighbour by neighbour, with ``seen`` (N, D) as the representation."""
    expected = torch.zeros(len(x), dtype=x.dtype)
    for added in noise(metric, net, x):
        near = x + added
        moved = ((method(None, x) - method(None, near)) / method(None, x)).flatten(1).norm(dim=1)
        before, after = seen(x), seen(near)
        divisor = torch.where(before == 0, metric.epsilon, before)
        same = net(near).argmax(1) == net(x).argmax(1)
        ratio = moved / ((before - after) / divisor).norm(dim=1)
        expected = torch.where(same & (ratio > expected), ratio, expected)
    return expected.detach()


def test_several_layers_are_one_representation():
    net, x, targets, method, _ = case()
    metric = RelativeRepresentationStability(samples=3, layer=("features.0", "head"))
    expected = representation_stability(
        metric, net, x, method, lambda x: torch.cat([net.features[0](x).flatten(1), net(x)], 1)
    )
    assert_close(found(metric, net, x, method, targets.tolist()), expected)


def test_quantus_reads_a_layer_after_its_output_was_overwritten():
    net, x, targets, method, explain = case(torch.float32)
    metric = RelativeRepresentationStability(samples=3, layer="features.0")
    theirs = quantus.RelativeRepresentationStability(
        **QUIET, layer_names=["features.0"], **perturbing(metric, net, x)
    )
    rectified = representation_stability(
        metric, net, x, method, lambda x: net.features[0](x).relu().flatten(1)
    )
    assert_close(peer(theirs, net, x, targets, explain), rectified, **CLOSE)  # by the ReLU in place behind it
    expected = representation_stability(metric, net, x, method, lambda x: net.features[0](x).flatten(1))
    assert_close(found(metric, net, x, method, targets.tolist()), expected, **CLOSE)
    assert (rectified < 0.1 * expected).all()
