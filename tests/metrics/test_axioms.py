"""Completeness, non-sensitivity, input invariance: methods that satisfy the axiom and methods that do not; Quantus."""

from __future__ import annotations

import numpy as np
import pytest
import quantus
import torch
from quantus.helpers.model.pytorch_model import PyTorchModel
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, SumModel, Tokens, bound, images, made

from xcli.metrics.axioms import Completeness, InputInvariance, NonSensitivity, compensated
from xcli.registry import build_metric

QUIET = {"disable_warnings": True, "return_aggregate": False}


def linear(weights, labels=1):
    """A network whose logits are weighted sums of the pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weights[0].numel(), labels)).double().eval()
    net[1].weight.data = weights.flatten(1).clone()
    net[1].bias.data = torch.arange(1, labels + 1).double()
    return net


class Squares(nn.Module):
    """The sum of the squares of all pixels as the only logit."""

    def forward(self, x):
        return x.square().flatten(1).sum(1, keepdim=True)


def gradient(score, x):
    return score.gradients(x).grads[0].sum(1)


def gradient_times_input(score, x):
    return (score.gradients(x).grads[0] * x[score.image]).sum(1)


# --- completeness --------------------------------------------------------------------------------------------


def complete(metric, net, x, map, target=None, image=None):
    return metric.measure(
        map=map, x=x, score=bound(net, x, [0] * len(x) if target is None else target, image)
    ).values


def test_gradient_times_input_of_a_linear_network_is_complete():
    x, net = images(2, 3, 4, 5), linear(images(3, 3, 4, 5, seed=1), labels=3)
    target, image = [2, 0, 1], [0, 0, 1]
    map = gradient_times_input(bound(net, x, target, image), x)
    assert_close(complete(Completeness(), net, x, map, target, image), torch.zeros(3).double())
    owed = map.sum((1, 2)).abs()
    assert_close(complete(Completeness(), net, x, 3 * map, target, image), 2 * owed)
    assert_close(
        complete(Completeness(relative=True), net, x, 3 * map, target, image), torch.full((3,), 2.0).double()
    )


def test_the_baseline_is_that_of_the_method():
    x, weights = images(2, 1, 4, 5), images(1, 1, 4, 5, seed=1)
    net, map = linear(weights), (weights * x)[:, 0]
    other = Completeness(value=0.5)
    assert_close(complete(other, net, x, map), (0.5 * weights.sum()).abs().expand(2))
    assert_close(complete(other, net, x, (weights * (x - 0.5))[:, 0]), torch.zeros(2).double())
    lowest = x - x.amin((1, 2, 3), keepdim=True)
    preset = build_metric({"name": "completeness", "preset": "quantus"})
    assert_close(complete(preset, net, x, (weights * lowest)[:, 0]), torch.zeros(2).double())


def test_what_is_complete_for_a_quadratic_score():
    x = images(2, 1, 4, 5)
    assert_close(complete(Completeness(), Squares(), x, x[:, 0].square()), torch.zeros(2).double())
    total = x.square().sum((1, 2, 3))
    assert_close(
        complete(Completeness(), Squares(), x, gradient_times_input(bound(Squares(), x, [0, 0]), x)), total
    )
    watched = total.sigmoid() - 0.5
    got = complete(Completeness(score="probability"), Squares(), x, 0 * x[:, 0])
    assert_close(got, watched)


def test_nothing_is_a_share_of_nothing():
    x = images(2, 1, 4, 5)
    x[0] = 0
    got = complete(Completeness(relative=True), Squares(), x, x[:, 0])
    assert got.isnan().tolist() == [True, False]


def test_quantus_says_yes_where_the_error_is_zero():
    x = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]], [[[1.0, 2.0], [0.0, 8.0]]]])
    map = (x - x.amin((1, 2, 3), keepdim=True))[:, 0]
    map[1, 0, 0] += 1
    got = complete(build_metric({"name": "completeness", "preset": "quantus"}), SumModel(), x, map)
    given = {"x_batch": x.numpy(), "y_batch": np.zeros(2, int), "a_batch": map[:, None].numpy()}
    net = SumModel().eval()
    theirs = quantus.Completeness(**QUIET, normalise=False)(model=net, channel_first=True, **given)
    assert got.tolist() == [0, 1]
    assert [bool(same) for same in theirs] == [True, False]
    default = quantus.Completeness(**QUIET)(model=net, channel_first=True, **given)
    assert not any(default)  # it divides the map by its largest value, and not the score


# --- non-sensitivity -----------------------------------------------------------------------------------------


def sensitive(metric, net, x, map, target=None, image=None):
    return metric.measure(
        map=map, x=x, score=bound(net, x, [0] * len(x) if target is None else target, image)
    ).values


def test_pixels_that_do_not_matter_are_to_be_zero():
    weights = images(2, 1, 4, 5, seed=1)
    weights[0, 0, :2], weights[1, 0, 1, 3:] = 0, 0
    x, net = images(2, 1, 4, 5), linear(weights, labels=2)
    metric = NonSensitivity(grid=None, score="logit")
    image, target = [0, 0, 1], [0, 1, 0]
    map = weights[target, 0].clone()
    assert sensitive(metric, net, x, map, target, image).tolist() == [0, 0, 0]
    map[0, 0, :3], map[1, 3], map[2] = 1.0, 0.0, 0.0  # 3 too many; 5 missing; all missing
    assert sensitive(metric, net, x, map, target, image).tolist() == [3, 5, 10]


def test_a_cell_is_zero_where_all_its_pixels_are():
    weights = torch.zeros(1, 1, 4, 6, dtype=torch.float64)
    weights[0, 0, 0, 5] = 1e-3
    x, net, metric = images(1, 1, 4, 6), linear(weights), NonSensitivity(grid=2, score="logit", epsilon=1e-6)
    right = torch.zeros(1, 4, 6, dtype=torch.float64)
    right[0, 1, 3] = -7.0  # another pixel of the same cell
    right[0, 2:, :3] = 0.9 * 7e-6  # each below what counts as zero, together above it
    assert sensitive(metric, net, x, right).tolist() == [0]
    assert sensitive(metric, net, x, right.flip(1)).tolist() == [2]
    assert sensitive(metric, net, x, torch.ones(1, 4, 6)).tolist() == [3]
    assert sensitive(metric, net, x, torch.zeros(1, 4, 6)).tolist() == [1]


def test_what_is_negligible_is_measured_by_the_largest():
    x, net = images(1, 1, 4, 5), linear(torch.zeros(1, 1, 4, 5).double())
    map = torch.full((1, 4, 5), 1e-9, dtype=torch.float64)
    assert sensitive(NonSensitivity(grid=None), net, x, map).tolist() == [20]
    map[0, 0, 0] = 1.0
    assert sensitive(NonSensitivity(grid=None), net, x, map).tolist() == [1]


def test_a_constant_hides_pixels_that_show_it_already():
    x, weights = images(1, 1, 4, 5), torch.ones(1, 1, 4, 5, dtype=torch.float64)
    x[0, 0, :2] = 0
    assert sensitive(
        NonSensitivity(grid=None, score="logit"), linear(weights), x, weights[:, 0]
    ).tolist() == [0]
    constant = NonSensitivity(grid=None, score="logit", substrate="constant")
    assert sensitive(constant, linear(weights), x, weights[:, 0]).tolist() == [10]


def test_a_map_that_is_not_finite_has_no_value():
    x, map = images(2, 1, 4, 5), images(2, 4, 5)
    map[1, 0, 0] = torch.inf
    assert sensitive(NonSensitivity(), linear(x), x, map).isnan().tolist() == [False, True]


def colourless():
    """Three images of one colour, a network blind to some pixels, and maps with some zeros."""
    weights = images(3, 1, 6, 5, seed=1)
    weights[:, :, :2], weights[1, 0, 4] = 0, 0
    x, map = images(3, 1, 6, 5), images(3, 6, 5, seed=2)
    map[0, 1:4], map[1], map[2, :2] = 0, 1e-7 * map[1], 0
    map[1, 5] = 1.0
    return linear(weights, labels=3).float(), x.float(), map.float()


def test_non_sensitivity_equals_quantus():
    net, x, map = colourless()
    metric = build_metric({"name": "non-sensitivity", "preset": "quantus"})
    got = sensitive(metric, net, x, map, [0, 1, 2])
    expected = []
    for i in range(3):  # one by one, as it divides a batch by the largest of all
        given = {
            "x_batch": x[i : i + 1].numpy(),
            "y_batch": np.array([i]),
            "a_batch": map[i : i + 1, None].numpy(),
        }
        expected += quantus.NonSensitivity(**QUIET)(model=net, channel_first=True, softmax=True, **given)
    assert got.tolist() == expected
    assert len(set(expected)) == 3


def test_quantus_fails_for_several_features_a_step():
    net, x, map = colourless()
    given = {"x_batch": x.numpy(), "y_batch": np.array([0, 1, 2]), "a_batch": map[:, None].numpy()}
    with pytest.raises(ValueError, match="broadcast"):
        quantus.NonSensitivity(**QUIET, features_in_step=5)(model=net, channel_first=True, **given)


# --- input invariance ----------------------------------------------------------------------------------------


def invariant(net, x, method, target=None, image=None, **how):
    score = bound(net, x, [0] * len(x) if target is None else target, image)
    metric = InputInvariance(**how)
    return metric.measure(map=method(score, x), x=x, score=score, method=method, module=net).values


class Normalised(nn.Module):
    """A network with its own preprocessing, and no bias in its first layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = (x - torch.tensor([0.1, 0.2, 0.3]).to(x).view(3, 1, 1)) / 0.25
        return self.head(self.first(x).tanh().mean((2, 3)))


class Skipping(nn.Module):
    """A network in which not only the first layer sees the pixels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return (self.first(x).relu() + x.square()).mean((2, 3))


class Reflected(nn.Sequential):
    def __init__(self):
        first = nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect")
        super().__init__(first, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


class Same(nn.Sequential):
    def __init__(self):
        first = nn.Conv2d(3, 4, (3, 4), padding="same", dilation=2)
        super().__init__(first, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))


class Dense(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 16 * 16, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("shift", [-1.0, 0.3])
@pytest.mark.parametrize("kind", [PooledLinear, Normalised, Reflected, Same, Dense, Tokens])
def test_the_second_network_is_the_same_function_of_the_shifted_image(kind, shift):
    net, x = made(kind), images(2, 3, 16, 16)
    other = compensated(bound(net, x, [0, 1]), net, x[:1], shift)
    assert_close(other(x + shift), net(x))
    assert (other(x) - net(x)).abs().min() > 1e-6
    assert sum(len(part._forward_pre_hooks) for part in net.modules()) == 0
    assert sum(len(part._forward_hooks) for part in net.modules()) == 0


def test_the_bias_takes_the_shift():
    net, x = made(PooledLinear), images(1, 3, 16, 16)
    first = net.features[0]
    before = first.bias.clone()
    other = compensated(bound(net, x, [0]), net, x, -1.5)
    assert_close(other.features[0].bias, before + 1.5 * first.weight.sum((1, 2, 3)))
    assert_close(first.bias, before)
    bare = made(Normalised)
    other = compensated(bound(bare, x, [0]), bare, x, -1.5)
    assert_close(other.first.bias.data, 1.5 / 0.25 * bare.first.weight.data.sum((1, 2, 3)))
    assert bare.first.bias is None


@pytest.mark.parametrize("kind", [PooledLinear, Normalised, Reflected, Same, Dense, Tokens])
def test_the_gradient_is_invariant(kind):
    x = images(2, 3, 16, 16)
    got = invariant(made(kind), x, gradient, [0, 1, 2], [0, 0, 1])
    assert (got < 1e-10).all()


@pytest.mark.parametrize("shift", [-1.0, 0.3])
def test_gradient_times_input_is_not(shift):
    x, weights = images(2, 1, 4, 5), images(1, 1, 4, 5, seed=1)
    expected = abs(shift) * weights.norm() / (weights * x).flatten(1).norm(dim=1)
    assert_close(invariant(linear(weights), x, gradient_times_input, shift=shift), expected)


def test_a_network_that_cannot_be_compensated_has_no_value():
    x = images(2, 3, 16, 16)
    assert invariant(made(Skipping), x, gradient).isnan().all()
    assert invariant(SumModel(), x, gradient).isnan().all()  # no layer at all


def test_a_map_of_zeros_is_as_long_as_nothing():
    got = invariant(made(PooledLinear), images(2, 3, 16, 16), lambda score, x: 0 * x[:, 0])
    assert got.isnan().all()


def test_the_second_network_of_quantus_is_another_function():
    net, x = made(PooledLinear).features[:1].float().eval(), images(2, 3, 16, 16).float()
    other = PyTorchModel(net).add_mean_shift_to_first_layer(-1, x[:1].shape)
    error = (other(x - 1) - net(x)).abs()
    assert error.max() > 0.1
    unpadded = nn.Sequential(nn.Conv2d(3, 6, 3)).eval()
    other = PyTorchModel(unpadded).add_mean_shift_to_first_layer(-1, x[:1].shape)
    assert_close(other(x - 1), unpadded(x), rtol=1e-4, atol=1e-4)
