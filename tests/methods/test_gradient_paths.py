"""Integrated gradients and blur-ig against captum, zennit, closed forms, theorems with their rates, and plain loops."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients as Captum
from pixels import NETWORKS, TARGETS, case
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, Weighted, bound, images, made
from zennit.attribution import IntegratedGradients as Zennit

from xcli.baselines import blurred
from xcli.demo import nets
from xcli.demo.scenes import scene
from xcli.errors import ConfigError
from xcli.methods.gradient.paths import BlurIG, IntegratedGradients, gaussians, quadrature
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
RULES = ("midpoint", "left", "right", "trapezoid", "gauss-legendre")
PEERS = {
    "left": "riemann_left",
    "right": "riemann_right",
    "midpoint": "riemann_middle",
    "gauss-legendre": "gausslegendre",
}
"""What captum calls the rules whose weights sum to 1."""
PATHS = [
    {"name": "integrated-gradients"},
    {"name": "blur-ig", "sigma": 1.0},
    {"name": "blur-ig", "sigma": 1.0, "root": True},
]


def near(found, expected, share):
    """Equal up to a share of the largest number."""
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(found, expected, rtol=0, atol=share * peak)


def slope(net, pixels, target):
    """The gradient of one logit at each of some pictures (M, C, H, W)."""
    pixels = pixels.detach().requires_grad_()
    return torch.autograd.grad(net(pixels)[:, target].sum(), pixels)[0]


def logits(net, x, target, image):
    return net(x[torch.tensor(image)])[torch.arange(len(image)), target].detach()


class Passes:
    """What a network is given while the block runs: ``inputs``, one tensor a pass."""

    def __init__(self, net):
        self.net, self.inputs = net, []

    def __enter__(self):
        self.handle = self.net.register_forward_pre_hook(
            lambda _net, given: self.inputs.append(given[0].detach())
        )
        return self

    def __exit__(self, *_error):
        self.handle.remove()

    @property
    def sizes(self):
        return [len(given) for given in self.inputs]


# ---- quadrature ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 8, 50])
@pytest.mark.parametrize("rule", RULES)
def test_the_weights_of_a_rule_sum_to_one_and_its_places_lie_in_the_unit_interval(rule, steps):
    places, weights = quadrature(rule, steps)
    assert places.shape == weights.shape == (steps,)
    assert places.dtype == weights.dtype == torch.float64
    assert_close(weights.sum().item(), 1.0, rtol=0, atol=1e-14)
    assert 0 <= places.min() <= places.max() <= 1
    assert (places.diff() > 0).all()


@pytest.mark.parametrize(
    ("rule", "places", "weights"),
    [
        ("left", [0, 0.25, 0.5, 0.75], [0.25] * 4),
        ("right", [0.25, 0.5, 0.75, 1], [0.25] * 4),
        ("midpoint", [0.125, 0.375, 0.625, 0.875], [0.25] * 4),
        ("trapezoid", [0, 1 / 3, 2 / 3, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        ("gauss-legendre", [0.5 - 15**0.5 / 10, 0.5, 0.5 + 15**0.5 / 10], [5 / 18, 8 / 18, 5 / 18]),
    ],
)
def test_places_and_weights_of_few_steps(rule, places, weights):
    found = quadrature(rule, len(places))
    assert_close(found[0], torch.tensor(places, dtype=torch.float64), rtol=0, atol=1e-15)
    assert_close(found[1], torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("rule", "degree"), [("midpoint", 1), ("trapezoid", 1), ("gauss-legendre", 9)])
def test_polynomials_up_to_the_degree_of_a_rule_are_integrated_exactly_and_the_next_is_not(rule, degree):
    places, weights = quadrature(rule, 5)
    errors = [abs(float((weights * places**power).sum()) - 1 / (power + 1)) for power in range(degree + 2)]
    assert max(errors[:-1]) < 1e-15
    assert errors[-1] > 1e-7


# ---- other packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_raw_maps_equal_captum_and_zennit_on_every_network(name):
    net, x, own = case(name).net, case(name).x[:1], [0, 0]
    found = IntegratedGradients(steps=2, rule="right").attribute(bound(net, x, TARGETS[:2], own), x).map
    expected = Captum(net).attribute(x[own], target=TARGETS[:2], n_steps=2, method="riemann_right")
    near(found, expected.detach(), 1e-9)
    wanted = torch.eye(10, dtype=torch.float64)[TARGETS[:2]]
    near(found, Zennit(net, n_iter=2)(x[own], wanted)[1].detach(), 1e-9)


@pytest.mark.parametrize("steps", [2, 4, 7])
@pytest.mark.parametrize("rule", PEERS)
@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_every_rule_equals_captum_with_its_delta(kind, rule, steps):
    """captum keeps its weights, and of the Riemann sums its places, in single precision."""
    net, x = made(kind), images(3, 3, 16, 16)
    found = IntegratedGradients(steps=steps, rule=rule).attribute(bound(net, x, **ROWS), x)
    expected, delta = Captum(net).attribute(
        x[ROWS["image"]],
        target=ROWS["target"],
        n_steps=steps,
        method=PEERS[rule],
        return_convergence_delta=True,
    )
    near(found.map, expected.detach(), 1e-6)
    assert_close(found.extras["delta"], delta.detach(), rtol=1e-5, atol=1e-8)


def test_captums_trapezoid_has_weights_that_sum_to_one_less_the_nth():
    """On a linear model its map is 3/4 of the difference that it has to share, with 4 steps; ours is all of it."""
    x, weight = images(2, 3, 4, 5), images(2, 4, 5, seed=3)
    net = Weighted(weight)
    difference = x * weight[[1, 0]][:, None]
    ours = IntegratedGradients(steps=4, rule="trapezoid").attribute(bound(net, x, [1, 0]), x).map
    theirs = Captum(net).attribute(x, target=[1, 0], n_steps=4, method="riemann_trapezoid").detach()
    assert_close(ours, difference, **EXACT)
    assert_close(theirs, difference * 0.75, **EXACT)

    net, x = made(Residual), images(2, 3, 8, 6)
    ours = IntegratedGradients(steps=5, rule="trapezoid").attribute(bound(net, x, [1, 0]), x).map
    theirs = Captum(net).attribute(x, target=[1, 0], n_steps=5, method="riemann_trapezoid").detach()
    near(theirs, ours * 0.8, 1e-7)


def test_the_trapezoid_is_xpliques_mean_of_neighbours():
    net, x, steps = made(Residual), images(2, 3, 8, 6), 6
    method = build({"name": "integrated-gradients", "preset": "xplique", "steps": steps})
    found = method.explain(bound(net, x, [2, 1]), x).map
    for row, target in enumerate((2, 1)):
        grads = [slope(net, x[row : row + 1] * alpha, target)[0] for alpha in np.linspace(0, 1, steps)]
        between = sum((one + other) / 2 for one, other in pairwise(grads)) / (steps - 1)
        assert_close(found[row], (x[row] * between).mean(0), **EXACT)


def test_presets_are_what_the_packages_do_when_left_alone():
    net, x = made(Residual), images(2, 3, 8, 6)
    score, wanted = bound(net, x, [2, 1]), torch.eye(4, dtype=torch.float64)[[2, 1]]
    captum, zennit, xplique, published = (
        build({"name": "integrated-gradients", "preset": name})
        for name in ("captum", "zennit", "xplique", "published")
    )
    near(captum.explain(score, x).map, Captum(net).attribute(x, target=[2, 1]).detach(), 1e-6)
    near(zennit.explain(score, x).map, Zennit(net)(x, wanted)[1].detach(), 1e-6)
    near(
        published.attribute(score, x).map,
        Captum(net).attribute(x, target=[2, 1], method="riemann_right").detach(),
        1e-6,
    )
    assert (xplique.steps, xplique.rule, xplique.reduce) == (50, "trapezoid", "mean")


# ---- where the straight line begins ------------------------------------------------------------------------------

SUBSTRATES = {
    "constant": lambda x: torch.full_like(x, 0.7),
    "mean": lambda x: x.mean((2, 3), keepdim=True).expand(x.shape),
    "minimum": lambda x: torch.stack([torch.full_like(one, float(one.min())) for one in x]),
    "blur": lambda x: blurred(x, 5, 2.0),
    "uniform": None,
    "gaussian": None,
    "negative": lambda x: -x,
    "imputation": None,
}
"""The picture with every pixel removed; None where it is random."""


@pytest.mark.parametrize("substrate", SUBSTRATES)
def test_the_straight_line_begins_at_the_emptied_picture_and_captum_agrees(substrate):
    net, x = made(Residual), images(3, 3, 8, 6) + 0.3
    method = IntegratedGradients(
        substrate=substrate, value=0.7, kernel=5, sigma=2.0, steps=3, rule="trapezoid"
    )
    score = bound(net, x, **ROWS)
    removed = torch.ones(3, 8, 6, dtype=torch.bool)
    start = method.remover(score, x)(torch.arange(3), removed)
    if (form := SUBSTRATES[substrate]) is not None:
        assert_close(start, form(x), **EXACT)
    with Passes(net) as passes:
        found = method.attribute(score, x)
    for image in range(3):
        line = torch.stack([start[image] + place * (x[image] - start[image]) for place in (0, 0.5, 1)])
        assert_close(passes.inputs[0][3 * image : 3 * image + 3], line, **EXACT)

    method = replace(method, rule="gauss-legendre")
    found = method.attribute(score, x)
    own = ROWS["image"]
    expected, delta = Captum(net).attribute(
        x[own], baselines=start[own], target=ROWS["target"], n_steps=3, return_convergence_delta=True
    )
    near(found.map, expected.detach(), 1e-6)
    assert_close(found.extras["delta"], delta.detach(), rtol=1e-5, atol=1e-8)


# ---- axioms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("right", 1), ("midpoint", 2), ("trapezoid", 2)])
def test_completeness_converges_in_the_order_of_the_rule(path, rule, order):
    net, x = made(Tokens), images(3, 3, 16, 16)
    score, more = bound(net, x, **ROWS), rule == "trapezoid"
    errors = [
        build({**path, "rule": rule, "steps": steps + more}).attribute(score, x).extras["delta"].abs()
        for steps in (64, 128)
    ]
    assert errors[1].min() > 1e-10  # rounding has no part in them
    rates = torch.log2(errors[0] / errors[1])
    assert_close(rates, torch.full_like(rates, order), rtol=0, atol=0.25)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_completeness_converges_faster_than_any_power_by_gauss_legendre(path):
    net, x = made(Tokens), images(3, 3, 16, 16)
    score, straight = bound(net, x, **ROWS), path["name"] == "integrated-gradients"
    errors = torch.stack(
        [
            build({**path, "rule": "gauss-legendre", "steps": steps})
            .attribute(score, x)
            .extras["delta"]
            .abs()
            for steps in ((2, 4, 8) if straight else (4, 16, 64))
        ]
    ).amax(1)
    rates = torch.log2(errors[:-1] / errors[1:])
    assert rates[0] > 2
    assert rates[1] > rates[0] + 4
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("scale", ["logit", "probability", "log-probability"])
def test_the_map_shares_the_difference_in_whatever_is_explained(scale):
    net, x = made(Tokens), images(3, 3, 16, 16)
    number = {
        "logit": lambda out: out,
        "probability": lambda out: out.softmax(1),
        "log-probability": lambda out: out.log_softmax(1),
    }[scale]
    found = IntegratedGradients(steps=16, rule="gauss-legendre").attribute(
        bound(net, x, **ROWS).scaled(scale), x
    )
    row, target = torch.arange(4), torch.tensor(ROWS["target"])
    ends = [
        number(net(pixels)).detach()[row, target]
        for pixels in (x[ROWS["image"]], torch.zeros(4, 3, 16, 16).double())
    ]
    assert_close(found.map.sum((1, 2, 3)), ends[0] - ends[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_delta_is_the_sum_less_the_difference_between_the_ends(path, rule):
    net, x = made(Residual), images(3, 3, 8, 6)
    found = build({**path, "rule": rule, "steps": 3}).attribute(bound(net, x, **ROWS), x)
    dim = gaussian_filter(x.numpy(), (0, 0, 1, 1), mode="constant", truncate=9)
    start = torch.zeros_like(x) if path["name"] == "integrated-gradients" else torch.from_numpy(dim)
    gap = logits(net, x, **ROWS) - logits(net, start, **ROWS)
    assert found.extras["delta"].abs().min() > 1e-7
    assert_close(found.extras["delta"], found.map.sum((1, 2, 3)) - gap, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_a_linear_model_is_shared_exactly_whatever_the_rule(rule):
    x, weight = images(2, 3, 4, 5), images(3, 4, 5, seed=3)
    method = IntegratedGradients(rule=rule, steps=2 if rule == "trapezoid" else 1, value=-0.4)
    found = method.attribute(bound(Weighted(weight), x, [2, 0, 1], [0, 0, 1]), x)
    assert_close(found.map, (x[[0, 0, 1]] + 0.4) * weight[[2, 0, 1]][:, None], **EXACT)
    assert_close(found.extras["delta"], torch.zeros(3, dtype=torch.float64), **EXACT)


class Quadratic(nn.Module):
    """x' Q x / 2 + b' x of all numbers x of a picture, with Q symmetric."""

    def __init__(self, size: int) -> None:
        super().__init__()
        mixed = images(size, size, seed=5)
        self.q, self.b = mixed + mixed.T, images(size, seed=6)

    def forward(self, x):
        flat = x.flatten(1)
        return ((flat @ self.q * flat).sum(1) / 2 + flat @ self.b)[:, None]


@pytest.mark.parametrize(
    ("rule", "steps", "mean"),
    [
        ("midpoint", 1, 1 / 2),
        ("midpoint", 4, 1 / 2),
        ("trapezoid", 2, 1 / 2),
        ("trapezoid", 5, 1 / 2),
        ("gauss-legendre", 1, 1 / 2),
        ("left", 1, 0),
        ("left", 4, 3 / 8),
        ("right", 1, 1),
        ("right", 4, 5 / 8),
    ],
)
def test_a_quadratic_model_has_the_gradient_at_the_mean_place_of_the_rule(rule, steps, mean):
    """So rules of order 2 are exact with as few steps as they take."""
    x, net = images(2, 3, 3, 2), Quadratic(18)
    found = IntegratedGradients(rule=rule, steps=steps, substrate="minimum").attribute(
        bound(net, x, [0, 0]), x
    )
    way = x - x.amin((1, 2, 3), keepdim=True)
    place = x - (1 - mean) * way
    expected = way * (place.flatten(1) @ net.q + net.b).view_as(x)
    assert_close(found.map, expected, **EXACT)
    if mean == 1 / 2:
        assert_close(found.extras["delta"], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-11)
    else:
        assert found.extras["delta"].abs().min() > 0.1


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_pixel_that_stays_as_it_is_gets_nothing(path):
    """Where the picture equals the baseline; and an image without light has no blurred version."""
    net, x = made(Residual), images(2, 3, 8, 6)
    x[0, :, 2:5] = 0
    x[1] = 0
    found = build({**path, "steps": 4}).attribute(bound(net, x, [1, 2, 3], [0, 0, 1]), x)
    assert (found.map[2] == 0).all()
    assert (found.map[:2] != 0).any()
    if path["name"] == "integrated-gradients":
        assert (found.map[:2, :, 2:5] == 0).all()
        assert (found.map[:2, :, :2] != 0).all()


class Seen(nn.Module):
    """A smooth score of some of the pixels; twice the same function, written in two ways."""

    def __init__(self, weight, merged) -> None:
        super().__init__()
        self.weight, self.merged = weight, merged

    def forward(self, x):
        flat = x.flatten(1)
        if self.merged:
            return ((flat @ (self.weight + self.weight.flip(0))).tanh() * 3)[:, None]
        inner = flat @ torch.stack([self.weight, self.weight.flip(0)], 1)
        inner = inner @ torch.ones(2, 1, dtype=x.dtype)
        return 3 * (2 * (2 * inner).sigmoid() - 1)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_map_belongs_to_the_function_and_not_to_how_it_is_written(path):
    x, weight = images(2, 3, 4, 5), images(60, seed=8) / 9
    weight[[0, 7, 59, 52]] = 0
    method = build({**path, "steps": 5})
    found = [method.attribute(bound(Seen(weight, merged), x, [0, 0]), x).map for merged in (True, False)]
    assert_close(found[0], found[1], **EXACT)
    assert (found[0].flatten(1)[:, [0, 7, 59, 52]] == 0).all()  # the score does not depend on them
    assert (found[0] != 0).sum() == 2 * 56


def test_numbers_that_count_alike_and_are_alike_share_alike():
    x = images(1, 3, 4, 5)
    x[0, :, 3] = x[0, :, 0]
    weight = images(3, 4, 5, seed=8)
    weight[:, 3] = weight[:, 0]
    net = nn.Sequential(nn.Flatten(), nn.Linear(60, 1, dtype=torch.float64), nn.Tanh())
    net[1].weight.data = weight.reshape(1, 60) / 9
    found = IntegratedGradients(steps=5).attribute(bound(net, x, [0]), x).map
    assert_close(found[:, :, 3], found[:, :, 0], **EXACT)
    assert found[:, :, 0].abs().min() > 0


# ---- passes and batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize(
    ("path", "starts"),
    [
        ({"name": "integrated-gradients"}, 1),
        ({"name": "integrated-gradients", "substrate": "mean"}, 2),
        (PATHS[1], 2),
    ],
    ids=str,
)
def test_the_rows_of_an_image_share_its_passes_and_an_image_without_rows_costs_none(
    path, starts, micro_batch
):
    """And where all paths begin at the same picture, one pass there serves all of them."""
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    method = build({**path, "steps": 5})
    score = bound(net, x, [0, 1, 2, 4], [0, 0, 0, 2], micro_batch=micro_batch)
    with Passes(net) as passes:
        method.attribute(score, x)
    assert sum(passes.sizes) == 2 * (5 + 1) + starts
    assert max(passes.sizes) <= micro_batch


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_micro_batches_and_company_do_not_change_the_map(path):
    net, x = made(Residual), images(3, 3, 8, 6)
    method = build({**path, "steps": 5, **({"substrate": "gaussian"} if len(path) == 1 else {})})
    whole = method.attribute(bound(net, x, **ROWS), x)
    for micro_batch in (1, 3, 7):
        found = method.attribute(bound(net, x, **ROWS, micro_batch=micro_batch), x)
        assert_close(found.map, whole.map, **EXACT)
        assert_close(found.extras["delta"], whole.extras["delta"], rtol=0, atol=1e-13)
    alone = replace(bound(net, x[2:], [2]), keys=["image-2"])
    assert_close(method.attribute(alone, x[2:]).map, whole.map[3:], **EXACT)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_single_precision_gives_the_same_to_its_own_precision(path):
    net, x = made(Tokens), images(3, 3, 16, 16)
    method = build({**path, "steps": 8})
    expected = method.attribute(bound(net, x, **ROWS), x).map
    half = deepcopy(net).float()
    found = method.attribute(bound(half, x.float(), **ROWS), x.float()).map
    assert found.dtype == torch.float32
    near(found.double(), expected, 1e-5)


# ---- derivatives of the map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, {"name": "integrated-gradients", "substrate": "blur"}], ids=str)
def test_maps_can_be_differentiated_by_pixels_and_weights(path):
    net, x = made(Tokens), images(2, 3, 16, 16).requires_grad_()
    method = build({**path, "steps": 3})
    score = replace(bound(net, x.detach(), [0, 1, 2], [0, 0, 1]), create_graph=True)
    weights = list(net.parameters())
    steps = [images(*one.shape, seed=5 + i) for i, one in enumerate((x, *weights))]

    def loss(score, pixels):
        return method.attribute(score, pixels).map.square().mean()

    grads = torch.autograd.grad(loss(score, x), (x, *weights), materialize_grads=True)
    by_pixels, by_weights = (
        sum((grad * step).sum() for grad, step in list(zip(grads, steps))[part])
        for part in (slice(1), slice(1, None))
    )
    ends, others = [], []
    for sign in (1, -1):
        ends.append(loss(score, x.detach() + sign * 1e-6 * steps[0]).detach())
        other = deepcopy(net)
        for weight, step in zip(other.parameters(), steps[1:]):
            weight.data += sign * 1e-6 * step
        others.append(loss(score.using(other), x.detach()).detach())
    assert by_pixels.abs() > 0
    assert by_weights.abs() > 0
    assert_close(by_pixels, (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-12)
    assert_close(by_weights, (others[0] - others[1]) / 2e-6, rtol=1e-6, atol=1e-12)


# ---- blur-ig -----------------------------------------------------------------------------------------------------


def seen_through(x, sigma, truncate=9.0):
    """Pictures (..., H, W) through a Gaussian, by scipy."""
    wide = (0,) * (x.ndim - 2) + (sigma, sigma)
    return torch.from_numpy(gaussian_filter(x.numpy(), wide, mode="constant", truncate=truncate))


def literal(net, x, target, sigma, steps, root):
    """The definition for one image (C, H, W), in a loop from the blurred end, by midpoints and differences."""
    total, h = torch.zeros_like(x), 1e-5
    for step in range(steps):
        left = 1 - (step + 0.5) / steps
        s = sigma * (left**0.5 if root else left)
        width = sigma**2 / steps / (2 * s) if root else sigma / steps
        by_s = (seen_through(x, s + h) - seen_through(x, s - h)) / (2 * h)
        total -= slope(net, seen_through(x, s)[None], target)[0] * by_s * width
    return total


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("sigma", [0.8, 3.0, 20.0])
def test_blur_ig_in_a_loop_with_scipys_gaussian(sigma, root):
    net, x = made(Residual), images(3, 3, 7, 10)
    found = BlurIG(sigma=sigma, steps=6, rule="midpoint", root=root).attribute(bound(net, x, **ROWS), x).map
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        near(found[row], literal(net, x[image], target, sigma, 6, root), 1e-7)


@pytest.mark.parametrize("name", ["shapes-cnn", "mobilenet_v3_small"])
def test_blur_ig_in_a_loop_on_a_large_network(name):
    one = case(name)
    x = one.x[:1]
    found = BlurIG(sigma=4.0, steps=2, rule="midpoint").attribute(bound(one.net, x, [1]), x).map
    near(found[0], literal(one.net, x[0], 1, 4.0, 2, False), 1e-6)


def authors(net, x, target, top, steps, root=False, step=0.01, truncate=4.0):
    """What the authors' code does with one image (C, H, W): widths from 0 up, each with the gradient at its sharp end,
    a forward difference by ``step``, and a Gaussian of ``truncate`` deviations."""
    widths = [(top * i / steps) ** 0.5 if root else top * i / steps for i in range(steps + 1)]
    total = torch.zeros_like(x)
    for width, wider in pairwise(widths):
        here = seen_through(x, width, truncate) if width else x
        by_width = (seen_through(x, width + step, truncate) - here) / step
        total += (wider - width) * slope(net, here[None], target)[0] * by_width
    return -total


def test_the_original_is_the_authors_sum_but_for_their_differences_and_cut():
    """Two in a hundred at most, nearly all by their difference of 0.01; the midpoint rule gives quite another map."""
    net, x = made(Residual), images(1, 3, 24, 20)
    score = bound(net, x, [1, 3], [0, 0])
    original = build({"name": "blur-ig", "preset": "original"})
    assert (original.sigma, original.steps, original.rule) == (50.0, 100, "right")
    found, midpoint = (one.attribute(score, x).map for one in (original, BlurIG(rule="midpoint")))
    for row, target in enumerate((1, 3)):
        near(found[row], authors(net, x[0], target, 50.0, 100), 2e-2)
        fine = authors(net, x[0], target, 50.0, 100, step=1e-6, truncate=9.0)
        near(found[row], fine, 2e-6)
        assert (midpoint[row] - fine).abs().max() > 0.2 * fine.abs().max()


def test_the_authors_root_spacing_blurs_by_the_root_of_sigma_alone():
    """Their `max_sigma` 9 with `sqrt` is a blur of 3 pixels; ours is as wide as `sigma` says."""
    net, x = made(Tokens), images(1, 3, 16, 16)
    score = bound(net, x, [1])
    theirs = authors(net, x[0], 1, 9.0, 150, root=True)
    near(BlurIG(sigma=3.0, root=True, steps=150, rule="midpoint").attribute(score, x).map[0], theirs, 0.06)
    value, three, nine = (net(seen_through(x, s) if s else x)[0, 1].item() for s in (0, 3.0, 9.0))
    assert_close(theirs.sum().item(), value - three, rtol=0.02, atol=0)
    assert abs(theirs.sum() - (value - nine)) > 0.15 * abs(value - nine)


def test_a_linear_model_shares_what_the_blur_takes_from_each_pixel():
    x, weight = images(2, 3, 8, 6), images(2, 8, 6, seed=3)
    method = BlurIG(sigma=2.0, rule="gauss-legendre", steps=60)
    found = method.attribute(bound(Weighted(weight), x, [1, 0]), x).map
    assert_close(found, (x - seen_through(x, 2.0)) * weight[[1, 0]][:, None], rtol=0, atol=1e-7)


@pytest.mark.parametrize("root", [False, True])
def test_the_derivative_along_the_path_is_that_of_its_points(root):
    x, h = images(2, 3, 7, 10), 1e-6
    path = BlurIG(sigma=4.0, root=root).path(bound(made(Residual), x, [0, 0]), x)
    image, place = torch.tensor([0, 0, 1, 1]), torch.tensor([0.01, 0.4, 0.7, 0.97], dtype=torch.float64)
    ahead, behind = (path.at(image, place + sign * h)[0] for sign in (1, -1))
    assert_close(path.at(image, place)[1], (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("root", [False, True])
def test_the_blur_falls_evenly_or_with_the_root_its_square_does(root):
    x = images(1, 3, 7, 10)
    path = BlurIG(sigma=4.0, root=root).path(bound(made(Residual), x, [0]), x)
    place = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    widths = [4.0, 12**0.5, 8**0.5, 2.0, 0.0] if root else [4.0, 3.0, 2.0, 1.0, 0.0]
    found = path.at(torch.zeros(5, dtype=torch.long), place)[0]
    for point, width in zip(found, widths):
        assert_close(point, seen_through(x[0], width) if width else x[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_sharp_end_of_the_root_spacing_is_finite_and_adds_nothing(dtype):
    """At t = 1 the derivative of the root is infinite, and that of the blur zero."""
    net, x = made(Residual).to(dtype), images(2, 3, 8, 6).to(dtype)
    score = bound(net, x, [1, 2])
    at_end = BlurIG(sigma=5.0, root=True, rule="right", steps=1).attribute(score, x)
    assert (at_end.map == 0).all()
    few = [
        BlurIG(sigma=5.0, root=True, rule=rule, steps=4).attribute(score, x)
        for rule in ("right", "trapezoid")
    ]
    assert all(one.map.isfinite().all() and (one.map != 0).any() for one in few)


def test_a_line_through_a_gaussian_keeps_its_sum_away_from_the_border():
    (weight, by), (flat, _) = (
        gaussians(torch.tensor([s], dtype=torch.float64), 41, images(1)) for s in (2.0, 1e-5)
    )
    weight, by, place = weight[0, 0], by[0, 0], torch.arange(41) - 20
    assert_close(weight[20].sum().item(), 1.0, rtol=0, atol=1e-12)
    assert_close((weight[20] * place**2).sum().item(), 4.0, rtol=1e-9, atol=0)  # its variance
    assert_close(by[20].sum().item(), 0.0, rtol=0, atol=1e-12)
    assert_close((by[20] * place**2).sum().item(), 4.0, rtol=1e-9, atol=0)  # d sigma^2 / d sigma
    assert_close(weight[0].sum().item(), (1 + weight[20, 20].item()) / 2, rtol=0, atol=1e-12)
    assert torch.equal(flat[0, 0], torch.eye(41, dtype=torch.float64))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 7.0, 50.0])
def test_the_gaussian_is_not_cut_off_however_short_the_line(sigma):
    line = images(1, 9).numpy()
    weight, by = gaussians(torch.tensor([sigma], dtype=torch.float64), 9, images(1))

    def scipy(width):
        return gaussian_filter1d(line[0], width, mode="constant", truncate=9.0)

    assert_close(weight[0, 0].numpy() @ line[0], scipy(sigma), rtol=1e-10, atol=1e-14)
    slow = (scipy(sigma + 1e-5) - scipy(sigma - 1e-5)) / 2e-5
    assert_close(by[0, 0].numpy() @ line[0], slow, rtol=1e-5, atol=1e-8)
    if sigma >= 7:
        assert_close(weight[0, 0, 0, 0].item(), 1 / (sigma * (2 * np.pi) ** 0.5), rtol=1e-12, atol=0)


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["integrated-gradients", "blur-ig"])
def test_the_trapezoid_takes_two_steps(name):
    with pytest.raises(ConfigError, match=f"{name}: the trapezoid rule takes both ends, so at least 2 steps"):
        build({"name": name, "rule": "trapezoid", "steps": 1})
    assert build({"name": name, "rule": "trapezoid", "steps": 2}).steps == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "integrated-gradients", "steps": 0},
        {"name": "integrated-gradients", "rule": "simpson"},
        {"name": "integrated-gradients", "substrate": "black"},
        {"name": "blur-ig", "sigma": 0.0},
        {"name": "blur-ig", "root": 3},
        {"name": "blur-ig", "value": 0.0},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=list(wrong)[1]):
        build(wrong)


@pytest.mark.soak
def test_blur_ig_is_nearly_complete_by_default():
    """Most of the score changes in the first pixels of blur, where even places lie too far apart."""
    drawn = [scene(np.random.default_rng((7, i)), objects=1, size=64).image for i in range(4)]
    x = (torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    net = nets.load("shapes-cnn").double().eval()
    score = bound(net, x, net(x).argmax(1).tolist())
    gap = score(x) - BlurIG().outset(score, x)
    default, even = (
        (method.attribute(score, x).extras["delta"].abs() / gap.abs()).mean()
        for method in (BlurIG(), BlurIG(rule="midpoint"))
    )
    assert default < 0.1
    assert even > 1.5 * default
