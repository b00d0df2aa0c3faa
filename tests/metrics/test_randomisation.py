"""Randomised networks: answers known beforehand, the layers written out by hand, and Quantus."""

from __future__ import annotations

import itertools
from copy import deepcopy

import numpy as np
import pytest
import quantus
import torch
from contract import snapshot
from scipy.stats import entropy, spearmanr
from skimage.metrics import structural_similarity
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, SumModel, Tokens, bound, images, made

from xcli.demo import nets
from xcli.metrics import randomisation
from xcli.metrics.randomisation import (
    EfficientMPRT,
    ParameterRandomisation,
    RandomLogit,
    SmoothMPRT,
    another,
    histogram_entropy,
    layers_of,
    noisy,
    seed_of,
)
from xcli.registry import build_metric

ORDERS = ["top-down", "bottom-up", "independent"]
TARGETS = [0, 1, 2, 3]


class Linear(nn.Module):
    """Logits linear in the pixels: the map of a class is its row of weights."""

    def __init__(self, labels: int = 4, pixels: int = 24 * 24) -> None:
        super().__init__()
        self.head = nn.Linear(pixels, labels)

    def forward(self, x):
        return self.head(x.flatten(1))


class Normed(nn.Module):
    """Batch norm that has seen data."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3))
        self.head = nn.Linear(8, 5)
        norm = self.features[1]
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 2)

    def forward(self, x):
        return self.head(self.features(x).relu().mean((2, 3)))


def gradient(score, x):
    return score.gradients(x).grads[0].sum(1)


def blind(score, x):
    """A method that looks at the image alone."""
    return x[score.image].sum(1)


def found(metric, net, x, targets=TARGETS, method=gradient, image=None):
    score = bound(net, x, targets, image)
    offers = {"map": method(score, x), "x": x, "score": score, "method": method, "module": net}
    return metric.measure(**{name: offers[name] for name in metric.consumes})


def alike(maps, others):
    """Spearman by scipy, row by row."""
    values = [spearmanr(a.ravel(), b.ravel())[0] for a, b in zip(maps.numpy(), others.numpy(), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def reset(net, *names):
    """A copy in which these layers start again, from the seeds that are ours."""
    net = deepcopy(net)
    for name in names:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(0, name))
            net.get_submodule(name).reset_parameters()
    return net


# --- known answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["spearman", "ssim", "hog"])
def test_a_method_that_ignores_the_weights_stays_as_it_is(how, order):
    x = images(4, 3, 48, 48)
    for metric in (
        ParameterRandomisation(similarity=how, order=order),
        SmoothMPRT(similarity=how, order=order, samples=3),
    ):
        got = found(metric, made(PooledLinear), x, method=blind)
        assert_close(got.curve, torch.ones(4, 3, dtype=torch.float64))
        assert_close(got.values, torch.ones(4, dtype=torch.float64))
    assert found(EfficientMPRT(), made(PooledLinear), x, method=blind).values.tolist() == [0] * 4
    assert_close(found(RandomLogit(similarity=how), made(PooledLinear), x, method=blind).values, got.values)


def test_a_linear_network_that_is_drawn_anew_has_maps_that_are_drawn_anew():
    net, x = made(Linear), images(4, 1, 24, 24)
    got = found(ParameterRandomisation(), net, x)
    fresh = reset(net, "head").head.weight.detach().view(4, 24, 24)
    assert_close(got.values, alike(net.head.weight.detach().view(4, 24, 24), fresh))
    assert got.fraction.tolist() == [1]
    assert (got.values.abs() < 4 / 24).all()  # four standard errors of 576 pixels


def test_the_seed_of_the_run_decides():
    net, x = made(Linear), images(4, 1, 24, 24)
    one, other = (
        ParameterRandomisation().redrawn(bound(net, x, TARGETS), net),
        ParameterRandomisation().redrawn(
            type(s := bound(net, x, TARGETS))(net, s.rows, s.layers, seed=1, keys=s.keys), net
        ),
    )
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("order", ORDERS)
def test_layers_go_one_after_the_other(order):
    net, x = made(PooledLinear), images(4, 3, 16, 16)
    names = ["head", "features.2", "features.0"][:: -1 if order == "bottom-up" else 1]
    maps = gradient(bound(net, x, TARGETS), x)
    got = found(ParameterRandomisation(order=order), net, x)
    for step, name in enumerate(names):
        changed = [name] if order == "independent" else names[: step + 1]
        other = gradient(bound(reset(net, *changed), x, TARGETS), x)
        assert_close(got.curve[:, step], alike(maps, other))
    assert_close(got.values, got.curve.mean(1))
    assert_close(got.fraction, torch.tensor([1 / 3, 2 / 3, 1], dtype=torch.float64))


def test_steps_take_blocks_of_layers_and_do_not_change_what_is_drawn():
    net, x = made(Tokens), images(4, 3, 16, 16)
    single = found(ParameterRandomisation(steps=None), net, x)
    assert_close(single.fraction, torch.arange(1, 9, dtype=torch.float64) / 8)
    three = found(ParameterRandomisation(steps=3), net, x)
    assert_close(three.fraction, torch.tensor([2, 5, 8], dtype=torch.float64) / 8)
    assert_close(three.curve, single.curve[:, [1, 4, 7]])
    part = found(ParameterRandomisation(steps=2, until=0.5), net, x)
    assert_close(part.fraction, torch.tensor([2, 4], dtype=torch.float64) / 8)
    assert_close(part.curve, single.curve[:, [1, 3]])
    least = found(ParameterRandomisation(until=0.01), net, x)
    assert_close(least.curve, single.curve[:, :1])
    upward = found(ParameterRandomisation(steps=1, order="bottom-up"), net, x)
    assert_close(upward.curve, single.curve[:, -1:])


def test_absolute_values_forget_the_sign():
    net, x = made(Linear), images(4, 1, 24, 24)
    maps, fresh = (own.head.weight.detach().view(4, 24, 24) for own in (net, reset(net, "head")))
    got = found(ParameterRandomisation(absolute=True), net, x)
    assert_close(got.values, alike(maps.abs(), fresh.abs()))


def test_a_dead_network_has_no_similarity_and_its_step_is_left_out():
    net, x = made(PooledLinear), images(4, 3, 16, 16)

    def dying(score, x):
        lost = not torch.equal(score.module.features[2].weight, net.features[2].weight)
        return torch.zeros_like(x[:, 0]) if lost else gradient(score, x)

    got = found(ParameterRandomisation(), net, x, method=dying)
    assert got.curve.isnan().tolist() == [[False, True, True]] * 4
    assert_close(got.values, got.curve[:, 0])
    flat = found(ParameterRandomisation(), net, x, method=lambda score, x: torch.zeros_like(x[:, 0]))
    assert flat.values.isnan().all()


def test_a_network_without_weights_has_nothing_to_lose():
    got = found(ParameterRandomisation(), SumModel(), images(2, 1, 4, 4), [0, 0], method=blind)
    assert got.curve.shape == (2, 0)
    assert got.values.isnan().all()


# --- layers and their weights --------------------------------------------------------------------------------


def test_layers_are_in_the_order_in_which_they_run():
    net, x = made(Tokens), images(1, 3, 16, 16)
    assert layers_of(bound(net, x, [0]), net) == [
        [""],  # the class token and the places: before the first layer within the network
        ["patches"],
        ["norm1"],
        ["attention", "attention.out_proj"],  # the projection is never called by itself
        ["norm2"],
        ["mlp.0"],
        ["mlp.2"],
        ["head"],
    ]


def test_layers_of_a_residual_network():
    net = nets.load("shapes-cnn").double().eval()
    layers = layers_of(bound(net, images(1, 3, 64, 64), [0]), net)
    assert all(len(layer) == 1 for layer in layers)
    assert layers[:2] == [["stem.0"], ["stem.1"]]
    assert layers[-1] == ["head"]
    assert len(layers) == sum(1 for part in net.modules() if [*part.parameters(recurse=False)])


def test_layers_are_not_in_the_order_in_which_they_are_written():
    net = made(Residual)  # its ``twice`` runs once more after ``last``
    layers = layers_of(bound(net, images(1, 3, 16, 16), [0]), net)
    assert layers == [["stem"], ["block.0"], ["block.2"], ["last"], ["twice"], ["head"]]


def redrawn(net, x, **options):
    return ParameterRandomisation(**options).redrawn(bound(net, x, [0]), net)


@pytest.mark.parametrize("kind", [Normed, Tokens])
@pytest.mark.parametrize("weights", ["initial", "shuffled", "uniform"])
def test_no_parameter_stays_as_it_was(kind, weights):
    net, x = made(kind), images(1, 3, 16, 16)
    other = redrawn(net, x, weights=weights)
    for (name, old), new in zip(net.named_parameters(), other.parameters(), strict=True):
        started = bool((old == old.flatten()[0]).all())  # the ones and zeros of norms and attention
        assert not torch.equal(old, new) or (started and weights != "uniform"), name
        if weights == "shuffled":
            assert torch.equal(old.flatten().sort()[0], new.flatten().sort()[0])
        if weights == "uniform":
            assert ((new >= 0) & (new < 1)).all()


def test_a_class_token_has_no_start_and_is_shuffled():
    net, x = made(Tokens), images(1, 3, 16, 16)
    token, new = net.token.flatten(), redrawn(net, x).token.flatten()
    assert not torch.equal(token, new)
    assert torch.equal(token.sort()[0], new.sort()[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("apply", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_a_reset_does_not_reach_are_shuffled(apply):
    net, x = made(PooledLinear).requires_grad_(False), images(1, 3, 16, 16)
    apply(net.features[2])
    net.requires_grad_(False)(x)
    other = redrawn(net, x)
    for name, old in net.features[2].named_parameters():
        assert not torch.equal(other.features[2].get_parameter(name), old), name
    assert [name for layer in layers_of(bound(net, x, [0]), net) for name in layer][1].startswith(
        "features.2"
    )


def test_running_statistics_stay_unless_they_are_to_go():
    net, x = made(Normed), images(1, 3, 16, 16)
    norm, kept, lost = (one.features[1] for one in (net, redrawn(net, x), redrawn(net, x, statistics=True)))
    assert torch.equal(kept.running_mean, norm.running_mean)
    assert torch.equal(kept.running_var, norm.running_var)
    assert kept.weight.tolist() == lost.weight.tolist() == [1] * 6
    assert lost.running_mean.tolist() == [0] * 6
    assert lost.running_var.tolist() == [1] * 6
    uniform = redrawn(net, x, weights="uniform", statistics=True).features[1]
    assert ((uniform.running_var >= 0) & (uniform.running_var < 1)).all()
    assert redrawn(net, x, weights="uniform").features[1].running_var.tolist() == norm.running_var.tolist()


def test_independent_steps_bring_back_what_they_took():
    net, x = made(Normed), images(4, 3, 16, 16)
    options = {"statistics": True, "steps": None, "order": "independent"}
    got = found(ParameterRandomisation(**options), net, x)
    maps = gradient(bound(net, x, TARGETS), x)
    for step, name in enumerate(["head", "features.3", "features.1", "features.0"]):
        assert_close(got.curve[:, step], alike(maps, gradient(bound(reset(net, name), x, TARGETS), x)))


@pytest.mark.parametrize(
    "metric", [ParameterRandomisation(), SmoothMPRT(samples=2), EfficientMPRT(), RandomLogit()]
)
def test_the_network_and_the_global_generator_are_left_alone(metric):
    net, x = made(Normed).requires_grad_(False), images(4, 3, 16, 16)
    before = snapshot(net)
    with torch.random.fork_rng():
        torch.rand(1)  # no state in which a reset would leave it
        state = torch.get_rng_state()
        found(metric, net, x)
        assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(net) == before


def test_single_precision_stays_single():
    net, x = made(PooledLinear).float(), images(4, 3, 16, 16).float()
    for metric in (ParameterRandomisation(), SmoothMPRT(samples=2), EfficientMPRT(), RandomLogit()):
        assert found(metric, net, x).values.dtype == torch.float32


# --- noise ---------------------------------------------------------------------------------------------------


def test_noise_has_the_deviation_asked_for_and_belongs_to_the_image():
    x = images(3, 3, 64, 64)
    x[1] *= 10
    score = bound(made(PooledLinear), x, [0, 1, 2], image=[0, 0, 2])
    added = noisy(score, x, 0.1, 0) - x
    spans = x.amax((1, 2, 3)) - x.amin((1, 2, 3))
    assert_close(
        added.std((1, 2, 3)) / spans, torch.tensor([0.1, 0, 0.1], dtype=torch.float64), rtol=0, atol=2e-3
    )
    assert not torch.equal(noisy(score, x, 0.1, 1) - x, added)
    alone = bound(made(PooledLinear), x, [2], image=[0])
    assert torch.equal(noisy(alone, x, 0.1, 0)[0], (x + added)[0])


def test_a_linear_network_has_no_noise_to_average():
    net, x = made(Linear), images(4, 1, 24, 24)
    assert_close(found(SmoothMPRT(samples=4), net, x).curve, found(ParameterRandomisation(), net, x).curve)


def test_a_smoothed_map_is_the_mean_over_noisy_images():
    net, x = made(PooledLinear), images(4, 3, 16, 16)
    score, other = bound(net, x, TARGETS), bound(reset(net, "features.0"), x, TARGETS)
    inputs = [noisy(score, x, 0.3, sample) for sample in range(3)]
    maps, changed = (sum(gradient(own, one) for one in inputs) for own in (score, other))
    got = found(SmoothMPRT(samples=3, noise=0.3), net, x)
    assert_close(got.curve[:, 0], alike(maps, changed))
    maps, changed = (sum(gradient(own, one) for one in [*inputs[:2], x]) for own in (score, other))
    got = found(SmoothMPRT(samples=3, noise=0.3, clean=True), net, x)
    assert_close(got.curve[:, 0], alike(maps, changed))


# --- complexity ----------------------------------------------------------------------------------------------


def test_the_entropy_of_a_histogram_is_that_of_numpy():
    maps = torch.cat([images(4, 9, 12), images(4, 9, 12).round(), images(1, 9, 12) * 0])
    for bins in (2, 10, 100):
        expected = [entropy(np.histogram(one, bins=bins)[0]) for one in maps.numpy()]
        assert_close(histogram_entropy(maps, bins), torch.tensor(expected, dtype=torch.float64))
    assert histogram_entropy(torch.tensor([[[1.0, torch.nan]]]), 5).isnan().all()


def test_the_rise_in_complexity_by_hand():
    net, x = made(Linear), torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    before = torch.tensor([[[0.0, 0], [1, 1]], [[5.0, 5], [5, 5]]]).double()  # one bit, and flat
    after = torch.tensor([[0.0, 1], [2, 3]]).double().expand(2, 2, 2)  # two bits

    def method(score, x):
        return before if score.module is net else after

    got = found(EfficientMPRT(), net := made(lambda: Linear(pixels=4)), x, [0, 1], method)
    assert_close(got.values, torch.tensor([1, torch.nan]).double(), equal_nan=True)


# --- another class -------------------------------------------------------------------------------------------


def test_the_map_of_another_class_of_a_linear_network():
    net, x = made(Linear), images(4, 1, 24, 24)
    score = bound(net, x, TARGETS)
    rows = net.head.weight.detach().view(4, 24, 24).numpy()
    expected = []
    for row, target in enumerate(TARGETS):
        a, b = rows[target], rows[another(score, row, target, 4)]
        span = max(a.max(), b.max()) - min(a.min(), b.min())
        expected.append(
            structural_similarity(a, b, data_range=span, gaussian_weights=True, use_sample_covariance=False)
        )
    xplique = found(build_metric({"name": "random-logit", "preset": "xplique"}), net, x)
    assert_close(xplique.values, torch.tensor(expected, dtype=torch.float64))


def test_the_other_class_is_any_but_the_own():
    x = torch.zeros(300, 1, 4, 4, dtype=torch.float64)
    score = bound(SumModel(), x, [0] * 300)
    drawn = np.array([another(score, row, 2, 5) for row in range(300)])
    count = np.bincount(drawn, minlength=5)
    assert count[2] == 0
    assert (count[[0, 1, 3, 4]] > 50).all()  # 75 expected
    assert [another(score, row, 0, 2) for row in range(5)] == [1] * 5
    assert len({another(score, 0, target, 1000) for target in range(5)}) > 3, "rows of an image differ"


def test_a_single_logit_has_no_other_class():
    assert found(RandomLogit(), SumModel(), images(2, 1, 8, 8), [0, 0], blind).values.isnan().all()


# --- Xplique -------------------------------------------------------------------------------------------------


def test_the_preset_replaces_the_last_quarter_of_layers_by_uniform_weights():
    net, x = made(Tokens), images(4, 3, 16, 16)
    other = deepcopy(net)
    for name in ("head", "mlp.2"):  # two of eight
        draw, part = torch.Generator().manual_seed(seed_of(0, name)), other.get_submodule(name)
        for tensor in (part.weight, part.bias):
            tensor.data = torch.rand(tensor.shape, generator=draw).double()
    got = found(build_metric({"name": "parameter-randomisation", "preset": "xplique"}), net, x)
    maps, changed = (gradient(bound(own, x, TARGETS), x) for own in (net, other))
    assert_close(got.values, alike(maps, changed))
    assert got.fraction.tolist() == [0.25]


# --- Quantus -------------------------------------------------------------------------------------------------


def explained(model, inputs, targets, **_):
    x = torch.as_tensor(inputs).float().requires_grad_()
    score = model(x)[torch.arange(len(x)), torch.as_tensor(targets)].sum()
    return torch.autograd.grad(score, x)[0].sum(1, keepdim=True).numpy()


def peer(metric, net, x, **how):
    with torch.random.fork_rng():
        return metric(
            model=net,
            x_batch=x.numpy(),
            y_batch=np.array(TARGETS),
            a_batch=None,
            explain_func=explained,
            device="cpu",
            channel_first=True,
            **how,
        )


@pytest.fixture
def seeded(monkeypatch):
    """Every layer draws from 43, as theirs do."""
    monkeypatch.setattr(randomisation, "seed_of", lambda seed, layer: 43)


@pytest.fixture
def single():
    return made(Normed).float(), images(4, 3, 20, 20).float()


@pytest.mark.parametrize("order", ORDERS)
def test_the_preset_equals_quantus(seeded, single, order):
    theirs = peer(quantus.MPRT(layer_order=order.replace("-", "_"), disable_warnings=True), *single)
    names = ["features.0", "features.1", "features.3", "head"][:: 1 if order == "bottom-up" else -1]
    expected = torch.tensor([theirs[name] for name in names]).T
    ours = found(
        build_metric({"name": "parameter-randomisation", "preset": "quantus", "order": order}), *single
    )
    assert_close(ours.curve, expected.float(), rtol=0, atol=2e-6)


def test_quantus_counts_the_untouched_network_in_its_mean(seeded, single):
    theirs = peer(quantus.MPRT(return_average_correlation=True, disable_warnings=True), *single)
    ours = found(build_metric({"name": "parameter-randomisation", "preset": "quantus"}), *single)
    assert_close(torch.tensor(theirs).float(), (1 + 4 * ours.values) / 5, rtol=0, atol=2e-6)


def test_quantus_draws_the_same_weights_for_layers_of_one_shape():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    wrapped = quantus.helpers.model.pytorch_model.PyTorchModel(net, softmax=False)
    with torch.random.fork_rng():
        *_, (_, theirs) = wrapped.get_random_layer_generator(order="top_down", seed=42)
    assert torch.equal(theirs[0].weight, theirs[2].weight)
    ours = ParameterRandomisation().redrawn(bound(net, torch.zeros(1, 4), [0]), net)
    assert not torch.equal(ours[0].weight, ours[2].weight)


def test_the_smooth_preset_equals_quantus_once_its_noise_is_ours(seeded, single, monkeypatch):
    net, x = single
    score = bound(net, x, TARGETS)
    fields = itertools.cycle(
        [torch.stack([torch.randn(x.shape[1:], generator=score.generator(row, f"smooth-mprt {n}"))
                      for row in range(4)]).numpy() for n in range(2)]
    )  # fmt: skip
    monkeypatch.setattr(np.random, "randn", lambda *shape: next(fields))
    monkeypatch.setattr(quantus, "explain", explained)  # it ignores the function that it is given
    theirs = peer(quantus.SmoothMPRT(nr_samples=3, disable_warnings=True), net, x)
    expected = torch.tensor([theirs[name] for name in ("features.0", "features.1", "features.3", "head")]).T
    ours = found(build_metric({"name": "smooth-mprt", "preset": "quantus", "samples": 3}), net, x)
    assert_close(ours.curve, expected.float(), rtol=0, atol=1e-5)


def test_the_efficient_preset_equals_quantus(seeded, single):
    theirs = peer(quantus.EfficientMPRT(disable_warnings=True), *single)
    ours = found(build_metric({"name": "efficient-mprt", "preset": "quantus"}), *single)
    assert_close(ours.values, torch.tensor(theirs).float(), rtol=0, atol=1e-5)


def test_random_logit_equals_quantus_on_the_same_classes(single, monkeypatch):
    net, x = single
    score = bound(net, x, TARGETS)
    other = [another(score, row, target, 5) for row, target in enumerate(TARGETS)]
    place = np.array([o - (o > t) for o, t in zip(other, TARGETS)])
    monkeypatch.setattr(np.random, "randint", lambda *_: place)
    theirs = [  # one at a time: it divides by the largest value of the whole batch
        quantus.RandomLogit(num_classes=5, disable_warnings=True) for _ in TARGETS
    ]
    metric = build_metric({"name": "random-logit", "preset": "quantus"})
    ours = found(metric, net, x).values
    for row, one in enumerate(theirs):
        monkeypatch.setattr(np.random, "randint", lambda *_, row=row: place[row : row + 1])
        alone = one(
            model=net, x_batch=x[row : row + 1].numpy(), y_batch=np.array(TARGETS[row : row + 1]), a_batch=None,
            explain_func=explained, device="cpu", channel_first=True,
        )  # fmt: skip
        assert float(ours[row]) == pytest.approx(alone[0], abs=1e-5)
