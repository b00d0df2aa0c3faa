"""deeplift and deeplift-shap: the sum of a map, literal replicas of each rule, theorems, and captum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import DeepLift, DeepLiftShap
from pixels import TARGETS, case, unshared
from torch import Tensor, nn
from torch.testing import assert_close
from toys import Tokens, bound, images, made

from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.methods.gradient.paths import IntegratedGradients
from xcli.methods.propagation.deeplift import DeepLIFT, DeepLIFTSHAP
from xcli.methods.propagation.multipliers import Multipliers, Paired, differences
from xcli.registry import build

pytestmark = pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")

EXACT = {"rtol": 1e-10, "atol": 1e-13}
RULES = ("rescale", "reveal-cancel", "mixed")
GRADIENT = build({"name": "saliency", "preset": "signed"})
FOLDER = "a/folder"


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to ``tolerance`` of the largest value, which is not zero."""
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(found, expected, rtol=0, atol=tolerance * peak)


def apart(found: Tensor, other: Tensor, share: float = 0.02) -> None:
    """Another map, by more than ``share`` of the largest value."""
    assert (found - other).abs().max() > share * other.abs().max()


def between(
    net: nn.Module, x: Tensor, start: Tensor, target: list[int], rule: str = "rescale", **more
) -> Tensor:
    """The map from ``start``, (1, ...) or (B, ...), to ``x``."""
    return DeepLIFT(rule=rule).compared(bound(net, x, target, **more), x, start)[0]


def multipliers(net: nn.Module, x: Tensor, start: Tensor, target: list[int], rule: str = "rescale") -> Tensor:
    """What arrives at the pixels."""
    paired = Paired(net, Multipliers(rule), start)
    return bound(net, x, target).using(paired).reading(differences).gradients(x).grads[0]


class Does(nn.Module):
    """A network written as a function of its parts."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def seeded(build_net: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network in float64, with batch norms that have seen data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build_net().double().eval().requires_grad_(False)
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2)
                part.weight.normal_(0, 1)
                part.bias.normal_(0, 0.3)
    return net


def small(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    """Convolutions, batch norm, an activation everywhere, pooling, two linear layers; for images of 10 x 8."""
    return seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), act(), nn.MaxPool2d(2)),
            *(nn.Conv2d(5, 6, 3, bias=False), act(), nn.Flatten()),
            *(nn.Linear(36, 7), act(), nn.Linear(7, 4)),
        )
    )


X, START, CLASSES = images(3, 3, 10, 8), images(1, 3, 10, 8, seed=5), [1, 3, 0]


# ---- the sum of a map --------------------------------------------------------------------------------------------


@cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms have the statistics of its own images, so that it answers to them."""
    if name == "shapes-cnn":
        return case(name).net, case(name).x
    if name == "small":
        return small(), X
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, num_classes=10).double()
    if name == "vgg11_bn":
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Linear(512, 10).double()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        net.train()(images(8, 3, 32, 32, seed=3))
    return net.eval().requires_grad_(False), images(3, 3, 32, 32)


BIG = ("vgg11_bn", "resnet18", "densenet121", "mobilenet_v3_small")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name",
    [
        "small",
        "shapes-cnn",
        *(pytest.param(name, marks=pytest.mark.soak) for name in BIG),
    ],
)
def test_a_map_sums_to_the_difference_in_score(name, rule):
    net, x = network(name)
    for options in ({}, {"value": 0.7}, {"substrate": "blur"}):
        method, score = DeepLIFT(rule=rule, **options), bound(net, x, TARGETS if x.shape[3] > 8 else CLASSES)
        found, start = method.attribute(score, x), method.whole(score, x)
        with torch.no_grad():
            target = score.rows.target
            gap = (net(x) - net(start))[torch.arange(3), target]
        assert gap.abs().min() > 1e-4
        assert_close(found.map.sum((1, 2, 3)), gap, rtol=1e-10, atol=1e-10)
        assert found.extras["delta"].abs().max() < 1e-10
        apart(found.map, GRADIENT.attribute(score, x) * (x - start))


def test_the_gate_of_squeeze_and_excitation_and_hard_swish_are_exact_in_the_fast_tests_too():
    net = seeded(
        lambda: nn.Sequential(
            torchvision.ops.Conv2dNormActivation(3, 8, activation_layer=nn.Hardswish),
            torchvision.ops.SqueezeExcitation(8, 4, scale_activation=nn.Hardsigmoid),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )
    )
    for rule in RULES:
        found = DeepLIFT(rule=rule, value=0.4).attribute(bound(net, 3 * X, CLASSES), 3 * X)
        gap = (net(3 * X) - net(torch.full_like(X, 0.4)))[torch.arange(3), torch.tensor(CLASSES)]
        assert_close(found.map.sum((1, 2, 3)), gap, **EXACT)


def test_in_other_units_delta_says_what_the_last_step_costs():
    net, score = small(), bound(small(), X, CLASSES)
    for scale, number in (
        ("probability", lambda z: z.softmax(1)),
        ("log-probability", lambda z: z.log_softmax(1)),
    ):
        found = DeepLIFT().attribute(score.scaled(scale), X)
        gap = (number(net(X)) - number(net(torch.zeros_like(X))))[torch.arange(3), torch.tensor(CLASSES)]
        assert_close(found.extras["delta"], found.map.sum((1, 2, 3)) - gap, **EXACT)
        assert found.extras["delta"].abs().max() > 1e-4
    slope = torch.autograd.functional.jacobian(lambda z: z.softmax(1)[0, 1], net(X[:1]))[0]
    parts = [between(net, X[:1], torch.zeros_like(X[:1]), [label]) for label in range(4)]
    expected = sum(weight * part for weight, part in zip(slope, parts, strict=True))
    close(DeepLIFT().attribute(score.scaled("probability"), X).map[:1], expected)


def test_a_contrast_is_exact_where_the_runner_up_is_the_same_class_at_both_ends():
    net, score, cases = small(), bound(small(), X, CLASSES).scaled("contrast"), set()
    for start in (X + 1e-2 * START, START.expand_as(X), -3 * X, 5 * X.flip(0)):
        found, gap = DeepLIFT().compared(score, X, start)
        exact = (found.sum((1, 2, 3)) - gap).abs() < 1e-10
        rivals = [net(x).scatter(1, torch.tensor(CLASSES)[:, None], -torch.inf).argmax(1) for x in (X, start)]
        assert (exact == (rivals[0] == rivals[1])).all()
        cases |= set(exact.tolist())
    assert cases == {True, False}


# ---- captum ------------------------------------------------------------------------------------------------------


class Copy(nn.Module):
    """captum's hooks on one tensor undo each other: an activation and the pooling behind it need one each."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def peer(net: nn.Module) -> nn.Module:
    """A copy that captum can work on."""
    net = unshared(deepcopy(net))
    for part in list(net.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.MaxPool2d):
                setattr(part, name, nn.Sequential(Copy(), child))
    return net


def captum(net: nn.Module, x: Tensor, start: Tensor, target: list[int]) -> Tensor:
    return DeepLift(peer(net)).attribute(x, baselines=start, target=torch.tensor(target)).detach()


@pytest.mark.parametrize("act", [nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus])
def test_a_map_equals_captum(act):
    net = small(act)
    close(between(net, X, START, CLASSES), captum(net, X, START, CLASSES), 1e-8)
    starts = X.roll(1, 0) / 2
    close(between(net, X, starts, CLASSES), captum(net, X, starts, CLASSES), 1e-8)


def without_overlap(name: str) -> nn.Module:
    """captum loses what windows that overlap send to one entry."""
    net = deepcopy(case(name).net)
    if name == "resnet18":
        net.maxpool = nn.MaxPool2d(2)
    if name == "densenet121":
        net.features.pool0 = nn.MaxPool2d(2)
    return net


@pytest.mark.parametrize("value", [0.0, 0.7])
@pytest.mark.parametrize(
    "name",
    [
        "shapes-cnn",
        "vgg11",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("resnet18", "densenet121")),
    ],
)
def test_networks_equal_captum(name, value):
    net, x = without_overlap(name), case(name).x
    found = build({"name": "deeplift", "preset": "captum", "value": value}).explain(bound(net, x, TARGETS), x)
    close(found.map, captum(net, x, torch.full_like(x, value), TARGETS), 1e-8)


def test_the_mean_over_pictures_equals_captum():
    net, pictures = small(), images(5, 3, 10, 8, seed=9)
    score = replace(bound(net, X, CLASSES), pictures={FOLDER: pictures})
    found = build({"name": "deeplift-shap", "preset": "captum", "baselines": FOLDER}).explain(score, X)
    expected = DeepLiftShap(peer(net)).attribute(X, baselines=pictures, target=torch.tensor(CLASSES))
    close(found.map, expected.detach(), 1e-8)
    gap = (net(X) - net(pictures).mean(0))[torch.arange(3), torch.tensor(CLASSES)]
    assert_close(found.map.sum((1, 2, 3)), gap, **EXACT)
    assert found.extras["delta"].abs().max() < 1e-12


# ---- literal replicas --------------------------------------------------------------------------------------------


def matrix(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """The weights of an affine layer, an output a row."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(layer, zero)
    return found.flatten(0, layer(zero).ndim - 1).flatten(1)


def literal(
    layers: Sequence[nn.Module],
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    target: int,
    revealing: Sequence[int],
) -> Tensor:
    """The map of one image through affine ``layers`` with f between them, contribution by contribution, as section 3
    of the paper has it; ``revealing`` says which of the layers reveal."""
    affine, ins, refs = [], [x], [start]
    for i, layer in enumerate(layers):
        affine.append(matrix(layer, ins[-1].shape[1:]))
        for kept in (ins, refs):
            out = layer(kept[-1])
            kept.append(out if i == len(layers) - 1 else f(out))
    m = torch.zeros(affine[-1].shape[0], dtype=torch.float64)
    m[target] = 1
    plus, minus = m, m  # multipliers of what adds to and what takes from the output of the layer
    for i in reversed(range(len(layers))):
        weight, way = affine[i], (ins[i] - refs[i]).flatten()
        m = torch.zeros(weight.shape[1], dtype=torch.float64)
        for j in range(weight.shape[0]):
            for k in range(weight.shape[1]):
                added = weight[j, k] * way[k]
                own = plus[j] if added > 0 else minus[j] if added < 0 else (plus[j] + minus[j]) / 2
                m[k] += weight[j, k] * own
        if i == 0:
            break
        before, below = affine[i - 1], (ins[i - 1] - refs[i - 1]).flatten()
        y0, y = layers[i - 1](refs[i - 1]).flatten(), layers[i - 1](ins[i - 1]).flatten()
        parts = before * below
        up, down = parts.clamp(min=0).sum(1), parts.clamp(max=0).sum(1)
        if i - 1 in revealing:
            by_up = (f(y0 + up) - f(y0) + f(y0 + up + down) - f(y0 + down)) / 2
            by_down = (f(y0 + down) - f(y0) + f(y0 + up + down) - f(y0 + up)) / 2
            plus, minus = m * by_up / up, m * by_down / down
        else:
            plus = minus = m * (f(y) - f(y0)) / (y - y0)
    return (m * way).view_as(x)


@pytest.mark.parametrize("f", [torch.relu, torch.tanh, F.softplus])
@pytest.mark.parametrize("rule", RULES)
def test_a_map_equals_one_computed_contribution_by_contribution(rule, f):
    net = seeded(
        lambda: Does(
            lambda self, x: self.four(f(self.three(f(self.two(f(self.one(x))))))),
            one=nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3)),
            two=nn.Conv2d(3, 4, 2, bias=False),
            three=nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Dropout()),
            four=nn.Linear(5, 3),
        )
    )
    x, start = images(2, 2, 5, 6), images(1, 2, 5, 6, seed=4)
    revealing = {"rescale": (), "reveal-cancel": (0, 1, 2), "mixed": (2,)}[rule]
    found = between(net, x, start, [2, 0], rule)
    for i, target in enumerate([2, 0]):
        layers = (net.one, net.two, net.three, net.four)
        close(found[i : i + 1], literal(layers, f, x[i : i + 1], start, target, revealing), 1e-9)


class Least(nn.Module):
    """min(i1, i2) as i1 - ReLU(i1 - i2), by layers or by operators: the paper's example."""

    def __init__(self, by_layers: bool) -> None:
        super().__init__()
        self.by_layers = by_layers
        self.first, self.last = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.first.weight.data = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
        self.last.weight.data = torch.tensor([[1.0, -1.0]])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.by_layers:
            return self.last(self.first(x).relu())
        one, two = x[:, :1], x[:, 1:]
        return one - (one - two).relu()


@pytest.mark.parametrize("by_layers", [True, False])
def test_the_least_of_two_numbers_is_shared_by_both_where_what_cancels_is_revealed(by_layers):
    net = Least(by_layers).double().requires_grad_(False)
    x, zero = torch.tensor([[5.0, 3.0], [3.0, 5.0]]).double()[:, None, None], torch.zeros(1, 1, 1, 2).double()
    revealed, rescaled = (
        between(net, x, zero, [0, 0], rule).flatten(1) for rule in ("reveal-cancel", "rescale")
    )
    assert_close(revealed, torch.full((2, 2), 1.5).double())
    assert_close(rescaled, torch.tensor([[0.0, 3.0], [3.0, 0.0]]).double())


def test_a_residual_sum_reveals_what_its_two_summands_cancel():
    net = seeded(lambda: Does(skip, conv=nn.Conv2d(3, 3, 3, padding=1), head=nn.Linear(3, 4)))
    x, start = X[:1], START
    u, v = net.conv(x) - net.conv(start), x - start
    y0 = net.conv(start) + start
    up, down = u.clamp(min=0) + v.clamp(min=0), u.clamp(max=0) + v.clamp(max=0)
    plus = ((y0 + up).relu() - y0.relu() + (y0 + u + v).relu() - (y0 + down).relu()) / 2 / up
    minus = ((y0 + down).relu() - y0.relu() + (y0 + u + v).relu() - (y0 + up).relu()) / 2 / down
    m = (net.head.weight[1] / 80)[None, :, None, None]
    sent = [torch.where(way > 0, plus, minus).nan_to_num() * m for way in (u, v)]
    expected = (F.conv_transpose2d(sent[0], net.conv.weight, padding=1) + sent[1]) * v
    close(between(net, x, start, [1], "reveal-cancel"), expected)
    apart(between(net, x, start, [1], "rescale"), expected)


def skip(self: nn.Module, x: Tensor) -> Tensor:
    out = self.conv(x)
    out += x
    return self.head(out.relu().mean((2, 3)))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "two by two": lambda x: F.max_pool2d(x, 2),
    "overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "dilated": lambda x: torch.max_pool2d(x, (2, 3), (1, 2), (1, 1), (2, 1)),
    "ceiling": lambda x: F.max_pool2d(x, kernel_size=3, ceil_mode=True),
    "with places": lambda x: F.max_pool2d(x, 3, 1, return_indices=True)[0],
    "adaptive": nn.AdaptiveMaxPool2d((3, 4)),
    "adaptive, with places": lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True)[0],
    "along a line": lambda x: F.max_pool1d(x.flatten(0, 1), 3, 2).unflatten(0, x.shape[:2]),
    "in three dimensions": lambda x: F.max_pool3d(x, 2),
    "aten": lambda x: torch.ops.aten.max_pool2d_with_indices.default(x, [3, 3], [2, 2])[0],
    "aten, adaptive": lambda x: torch.ops.aten.adaptive_max_pool2d.default(x, [2, 3])[0],
    "whole map": lambda x: x.amax((2, 3)),
    "along one axis": lambda x: x.max(3).values,
    "flat": lambda x: x.flatten(1).max(1, keepdim=True)[0],
}


@pytest.mark.parametrize("kind", POOLS)
def test_of_a_maximum_the_entry_that_is_the_largest_on_either_picture_has_all(kind):
    pool = POOLS[kind]
    head = images(*pool(X[:1])[0].shape, seed=7) if kind != "along a line" else images(3, 10, 3, seed=7)
    net = Does(lambda self, x: (pool(x) * head).flatten(1).sum(1, keepdim=True))
    starts = images(3, 3, 10, 8, seed=6)
    found = between(net, X, starts, [0, 0, 0])
    for i in range(3):
        tops = torch.autograd.functional.jacobian(pool, X[i : i + 1]).flatten(-4)
        olds = torch.autograd.functional.jacobian(pool, starts[i : i + 1]).flatten(-4)
        x, start, expected = X[i].flatten(), starts[i].flatten(), torch.zeros(240, dtype=torch.float64)
        for top, old, weight in zip(tops.flatten(0, -2), olds.flatten(0, -2), head.flatten(), strict=True):
            p, q = int(top.argmax()), int(old.argmax())
            t, t0 = x[p], start[q]
            expected[p if t > t0 else q] += weight * (t - t0)
        close(found[i].flatten(), expected)


def test_the_larger_of_two_things_has_all():
    net = seeded(lambda: Does(larger, one=nn.Conv2d(3, 4, 1), two=nn.Conv2d(3, 4, 1)))
    a, b = net.one(X), net.two(X)
    a0, b0 = net.one(START), net.two(START)
    t, t0 = torch.maximum(a, b), torch.maximum(a0, b0)
    first = torch.where(t > t0, a > b, a0 > b0)
    of_a, of_b = (torch.where(own, (t - t0) / way, 0) for own, way in ((first, a - a0), (~first, b - b0)))
    target = F.one_hot(torch.tensor(CLASSES), 4).double()[:, :, None, None] / 80
    weights = (part.weight[:, :, 0, 0] for part in (net.one, net.two))
    sent = sum(
        torch.einsum("nkhw,kc->nchw", own * target, w) for own, w in zip((of_a, of_b), weights, strict=True)
    )
    close(between(net, X, START, CLASSES), sent * (X - START))


def larger(self: nn.Module, x: Tensor) -> Tensor:
    return torch.maximum(self.one(x), self.two(x)).mean((2, 3))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda a, b: a * b,
    "in place": lambda a, b: a.clone().mul_(b),
    "spread out": lambda a, b: a.mean((2, 3), keepdim=True) * b,
    "matrices": lambda a, b: a @ b.mT,
    "einsum": lambda a, b: torch.einsum("nkhw,nlhw->nkl", a, b),
}


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_a_product_has_the_mean_over_both_orders_of_changing_its_factors(kind, square):
    times, one = PRODUCTS[kind], seeded(lambda: nn.Conv2d(3, 4, 1))
    two = one if square else seeded(lambda: nn.Conv2d(3, 4, 1), seed=1)
    net = Does(
        lambda self, x: times(self.one(x), self.two(x)).flatten(1).sum(1, keepdim=True), one=one, two=two
    )
    found, x = between(net, X, START, [0, 0, 0]), X.clone().requires_grad_()
    old = START.expand_as(X)
    orders = [(two(old), one(X)), (two(X), one(old))]  # what the other factor is while this one changes
    shares = sum((times(one(x), b) + times(a, two(x))).sum() / 2 for b, a in orders)
    close(found, torch.autograd.grad(shares, x)[0] * (X - START))


def test_a_gate_of_its_own_input_by_hand():
    net = seeded(lambda: Does(gated, conv=nn.Conv2d(3, 4, 1)))
    a, a0 = net.conv(X), net.conv(START)
    g, g0 = (one.mean((2, 3), keepdim=True) for one in (a, a0))
    s, s0 = g.sigmoid(), g0.sigmoid()
    m = torch.zeros(3, 4, 1, 1, dtype=torch.float64)
    m[torch.arange(3), CLASSES] = 1 / 80
    through_gate = (m * (a + a0) / 2).sum((2, 3), keepdim=True) * (s - s0) / (g - g0) / 80
    sent = m * (s + s0) / 2 + through_gate
    expected = torch.einsum("nkhw,kc->nchw", sent.expand_as(a), net.conv.weight[:, :, 0, 0]) * (X - START)
    close(between(net, X, START, CLASSES), expected)


def gated(self: nn.Module, x: Tensor) -> Tensor:
    x = self.conv(x)
    return (x * x.mean((2, 3), keepdim=True).sigmoid()).mean((2, 3))


# ---- theorems ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [torch.sigmoid, F.gelu, F.silu])
def test_with_one_hidden_layer_it_is_integrated_gradients(f):
    net = seeded(
        lambda: Does(lambda self, x: self.b(f(self.a(x.flatten(1)))), a=nn.Linear(240, 9), b=nn.Linear(9, 4))
    )
    path = IntegratedGradients(steps=60, rule="gauss-legendre", value=0.3)
    score = bound(net, X / 3, CLASSES)
    close(DeepLIFT(value=0.3).attribute(score, X / 3).map, path.attribute(score, X / 3).map)


@pytest.mark.parametrize("rule", RULES)
def test_where_no_unit_switches_it_is_the_gradient_times_the_difference(rule):
    net, near = small(), X + 1e-6 * START
    score = bound(net, X, CLASSES)
    grad = GRADIENT.attribute(score, X)
    assert_close(GRADIENT.attribute(score, near), grad, rtol=1e-12, atol=1e-14)  # the same linear piece
    close(DeepLIFT(rule=rule).compared(score, X, near)[0], grad * (X - near), 1e-8)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish, nn.Sigmoid])
@pytest.mark.parametrize("rule", RULES)
def test_on_the_reference_itself_multipliers_are_the_gradient_and_the_map_is_empty(rule, act):
    net, x = small(act), X[:1]
    score = bound(net, x, [1])
    close(multipliers(net, x, x, [1], rule), GRADIENT.attribute(score, x))
    assert (DeepLIFT(rule=rule).compared(score, x, x)[0] == 0).all()


def test_behind_anything_but_a_linear_operation_revealing_is_rescaling():
    net = seeded(
        lambda: Does(
            lambda self, x: self.head(F.relu(self.norm(F.avg_pool2d(self.conv(x), 2))).mean((2, 3))),
            conv=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4),
            head=nn.Linear(4, 4),
        )
    )
    maps = [between(net, X, START, CLASSES, rule) for rule in RULES]
    assert_close(maps[1], maps[0], rtol=0, atol=0)
    assert_close(maps[2], maps[0], rtol=0, atol=0)


def test_differences_that_rounding_eats_do_not_spoil_the_map():
    net, x = small(nn.Sigmoid), X.float()
    for start in (x * (1 - 1e-3), x * (1 - 1e-6), torch.where(torch.arange(8) < 5, x, 0.0)):
        exact = between(net, x.double(), start.double(), CLASSES)
        single = between(deepcopy(net).float(), x, start, CLASSES)
        close(single.double(), exact, 2e-3)


# ---- however a network is written --------------------------------------------------------------------------------


def modular(self: nn.Module, x: Tensor) -> Tensor:
    x = self.pool(self.act(self.one(x)))
    x = self.third(self.two(x) + x)
    return self.head(x.mean((2, 3)))


def functional(self: nn.Module, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(self.one(x), inplace=True), 2)
    y = torch.conv2d(x, self.two.weight, self.two.bias)
    y += x
    torch.relu_(y)
    return F.linear(y.mean(3).mean(2), self.head.weight, self.head.bias)


def reused(self: nn.Module, x: Tensor) -> Tensor:
    x = self.pool(self.act(self.one(x)))
    return self.head(self.act(x + self.two(x)).mean((2, 3)))


@pytest.mark.parametrize("rule", RULES)
def test_functions_and_modules_in_place_or_used_twice_are_all_the_same(rule):
    parts = seeded(
        lambda: nn.ModuleDict(
            {
                "one": nn.Conv2d(3, 4, 3),
                "two": nn.Conv2d(4, 4, 1),
                "head": nn.Linear(4, 4),
                "pool": nn.MaxPool2d(2),
            }
        )
    )
    expected = between(Does(modular, **parts, act=nn.ReLU(), third=nn.ReLU()), X, START, CLASSES, rule)
    for run in (functional, reused):
        for inplace in (False, True):
            close(between(Does(run, **parts, act=nn.ReLU(inplace)), X, START, CLASSES, rule), expected)


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_one_image_share_what_runs_forward(rule):
    net, calls, target = small(), [], [1, 3, 0, 2]
    handle = net.register_forward_hook(lambda _module, inputs, _out: calls.append(len(inputs[0])))
    found = DeepLIFT(rule=rule).attribute(bound(net, X, target, [0, 0, 0, 2]), X).map
    assert calls[-2:] == [1, 2]  # one reference for all, and the images that have rows
    handle.remove()
    for row, (image, label) in enumerate(zip([0, 0, 0, 2], target, strict=True)):
        close(
            found[row : row + 1],
            between(net, X[image : image + 1], torch.zeros(1, 3, 10, 8).double(), [label], rule),
        )


def test_pictures_of_their_own_or_one_for_all_and_any_micro_batch_are_the_same():
    net, starts = small(), X.roll(1, 0) / 2
    whole = between(net, X, starts, CLASSES)
    for i in range(3):
        close(between(net, X[i : i + 1], starts[i : i + 1], CLASSES[i : i + 1]), whole[i : i + 1])
    close(between(net, X, starts, CLASSES, micro_batch=2), whole)
    close(between(net, X, START.expand_as(X), CLASSES), between(net, X, START, CLASSES))


@pytest.mark.parametrize("rule", RULES)
def test_a_network_that_mixes_images_with_colours_runs_on_as_many_references(rule):
    net = seeded(lambda: Does(by_colour, conv=nn.Conv2d(1, 4, 3), head=nn.Linear(12, 4)))
    alone = [between(net, X[i : i + 1], START, CLASSES[i : i + 1], rule) for i in range(3)]
    close(between(net, X, START, CLASSES, rule), torch.cat(alone))


def by_colour(self: nn.Module, x: Tensor) -> Tensor:
    maps = self.conv(x.flatten(0, 1)[:, None]).relu().mean((2, 3))
    return self.head(maps.unflatten(0, (-1, 3)).flatten(1))


def test_half_precision_is_near():
    score, half = (bound(small().float(), X.float(), CLASSES) for _ in range(2))
    half = replace(half, execution=Execution(precision=torch.bfloat16))
    exact, found = (
        DeepLIFT(rule="reveal-cancel", value=0.3).attribute(one, X.float()) for one in (score, half)
    )
    assert found.map.dtype == torch.float32
    close(found.map, exact.map, 0.1)


def test_nothing_is_kept_of_a_pass_that_is_over():
    net, rules = small(), Multipliers("reveal-cancel")
    paired = Paired(net, rules, START)
    paired(X.clone().requires_grad_())
    for kept in (rules.record, rules.sources, rules.current, rules.weights):
        assert not len(kept)
    handle = net[5].register_forward_hook(lambda _module, inputs, _out: 1 / (len(inputs[0]) - 3) and None)
    with pytest.raises(ZeroDivisionError):
        paired(X.clone().requires_grad_())
    handle.remove()
    for kept in (rules.record, rules.sources, rules.current, rules.weights):
        assert not len(kept)
    assert not rules.noting


# ---- maps that are differentiated in their turn ------------------------------------------------------------------


def differentiable(self: nn.Module, x: Tensor) -> Tensor:
    x = self.norm(self.one(x)).sigmoid()
    x = self.steep(F.max_pool2d(self.two(x), 2))
    x = x * x.mean((2, 3), keepdim=True).tanh()
    return self.head(x.amax((2, 3)))


@pytest.mark.parametrize(
    ("rule", "own"), [("rescale", True), ("reveal-cancel", False), ("reveal-cancel", True), ("mixed", False)]
)
def test_maps_have_the_derivatives_of_what_they_are_computed_from(rule, own):
    net = seeded(
        lambda: Does(
            differentiable,
            one=nn.Conv2d(3, 3, 3),
            norm=nn.BatchNorm2d(3),
            two=nn.Conv2d(3, 3, 1),
            steep=nn.PReLU(3),
            head=nn.Linear(3, 4),
        )
    ).requires_grad_(True)
    x, weights = X[:2, :, :6, :6].clone().requires_grad_(), dict(net.named_parameters())
    weight = images(2, 3, 6, 6, seed=8)

    score = replace(bound(net, x.detach(), [1, 2]), create_graph=True)

    def loss() -> Tensor:
        start = START[:, :, :6, :6] if not own else torch.cat([x[1:] / 2, x[:1] ** 2])
        return (DeepLIFT(rule=rule).compared(score, x, start)[0] * weight).sum()

    grads = torch.autograd.grad(loss(), [x, *weights.values()], allow_unused=True)
    generator = torch.Generator().manual_seed(0)
    for (name, tensor), grad in zip([("x", x), *weights.items()], grads, strict=True):
        way = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor += step * way
            ends.append(loss().detach())
            with torch.no_grad():
                tensor -= step * way
        expected = (ends[0] - ends[1]) / 2e-5
        given = torch.zeros(()).double() if grad is None else (grad * way).sum()
        assert_close(given, expected, rtol=1e-5, atol=1e-7, msg=lambda told, name=name: f"{name}: {told}")


def test_a_map_that_keeps_its_graph_is_the_same():
    net = small(nn.SiLU)
    for rule in RULES:
        score = bound(net, X, CLASSES)
        kept = DeepLIFT(rule=rule).attribute(replace(score, create_graph=True), X)
        assert kept.map.requires_grad
        close(kept.map.detach(), DeepLIFT(rule=rule).attribute(score, X).map)


# ---- options and refusals ----------------------------------------------------------------------------------------


def test_presets_and_the_picture_that_is_compared_with():
    assert build({"name": "deeplift", "preset": "original"}).rule == "mixed"
    assert build("deeplift").rule == "rescale"
    assert build({"name": "deeplift-shap", "preset": "captum", "baselines": FOLDER}).reduce == "none"
    net, x = small(), X
    score = bound(net, x, CLASSES)
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    close(DeepLIFT(substrate="mean").attribute(score, x).map, between(net, x, mean, CLASSES))
    close(DeepLIFT(value=0.3).attribute(score, x).map, between(net, x, torch.full_like(x, 0.3), CLASSES))


@pytest.mark.parametrize("rule", RULES)
def test_several_pictures_are_the_mean_of_one_by_one(rule):
    net, pictures = small(), images(3, 3, 10, 8, seed=9)
    score = replace(bound(net, X, [1, 3, 0], [0, 0, 2]), pictures={FOLDER: pictures})
    method = DeepLIFTSHAP(baselines=FOLDER, rule=rule)
    each = [DeepLIFT(rule=rule).compared(score, X, one)[0] for one in pictures.split(1)]
    close(method.attribute(score, X).map, sum(each) / 3)
    assert method.draws_from() == (FOLDER,)


def test_pictures_have_to_be_there_and_of_the_size_of_the_images():
    score = bound(small(), X, CLASSES)
    with pytest.raises(ConfigError, match="baselines"):
        DeepLIFTSHAP().attribute(score, X)
    with pytest.raises(ConfigError, match=r"\(3, 4, 4\).*\(3, 10, 8\).*one size"):
        DeepLIFTSHAP(baselines=FOLDER).attribute(replace(score, pictures={FOLDER: images(2, 3, 4, 4)}), X)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "softmax": (
        lambda self, x: self.conv(x).mean((2, 3)).softmax(1),
        "calls softmax, which divides by a sum",
    ),
    "division": (lambda self, x: (self.conv(x) / x.norm()).mean((2, 3)), "calls .*, which is not known here"),
    "bounds": (
        lambda self, x: self.conv(x).clamp(max=x.mean()).mean((2, 3)),
        "calls clamp, which is not known here",
    ),
    "layer norm": (
        lambda self, x: F.layer_norm(self.conv(x), (10, 8)).mean((2, 3)),
        "calls layer_norm, which",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_rule_is_refused_before_the_run(why):
    run, message = REFUSED[why]
    net = seeded(lambda: Does(run, conv=nn.Conv2d(3, 4, 1)))
    for method in (DeepLIFT(), DeepLIFTSHAP(baselines=FOLDER)):
        with pytest.raises(
            ModelError, match=f"{method.name}: the network itself {message}.*integrated-gradients"
        ):
            method.looks_at(bound(net, X, CLASSES).layers)


def test_a_transformer_is_refused_by_the_name_of_the_module():
    net, x = made(Tokens), images(2, 3, 16, 16)
    with pytest.raises(ModelError, match="deeplift: module 'norm1' calls layer_norm.*; integrated-gradients"):
        DeepLIFT().attribute(bound(net, x, [0, 1]), x)


LATE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "three factors": (
        lambda self, x: torch.einsum("nkhw,nkhw,nkhw->nk", *[self.conv(x)] * 3),
        "einsum of three things",
    ),
    "statistics": (
        lambda self, x: F.batch_norm(self.conv(x), None, None, training=True).mean((2, 3)),
        "statistics of the batch",
    ),
    "another way": (
        lambda self, x: (self.conv(x).relu() if x.sum() > 0 else self.conv(x).tanh()).mean((2, 3)),
        "does relu on the picture and tanh on the one that it is compared with",
    ),
    "a longer way": (
        lambda self, x: (self.conv(x).relu() if x.sum() > 0 else self.conv(x)).mean((2, 3)),
        "does relu on the picture and no more on the one",
    ),
    "a shorter way": (
        lambda self, x: (self.conv(x) if x.sum() > 0 else self.conv(x).relu()).mean((2, 3)),
        "does relu on the picture that others are compared with and not on those",
    ),
}


@pytest.mark.parametrize("why", LATE)
def test_what_only_the_run_shows_is_refused_then(why):
    run, message = LATE[why]
    net, x = seeded(lambda: Does(run, conv=nn.Conv2d(3, 4, 1))), X.abs()
    with pytest.raises(ModelError, match=message):
        DeepLIFT(value=-0.5).attribute(bound(net, x, CLASSES), x)


@pytest.mark.parametrize("rule", ["reveal-cancel", "mixed"])
def test_a_batch_norm_of_tokens_is_not_joined_with_a_layer_of_features(rule):
    """Its channels are the tokens, and those of the layer its features."""
    net = seeded(
        lambda: nn.Sequential(
            *(nn.Flatten(2), nn.Linear(80, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 4))
        )
    )
    apart = nn.Sequential(net[0], net[1], nn.Unflatten(1, (3, 1)), nn.Flatten(1, 2), *net[2:])
    close(between(net, X, START, CLASSES, rule), between(apart, X, START, CLASSES, rule))


@pytest.mark.parametrize("why", LATE)
@pytest.mark.parametrize("cls", [DeepLIFT, DeepLIFTSHAP])
def test_what_the_run_refuses_names_the_method(why, cls):
    net, x = seeded(lambda: Does(LATE[why][0], conv=nn.Conv2d(3, 4, 1))), X.abs()
    score = replace(bound(net, x, CLASSES), pictures={FOLDER: torch.full_like(x[:1], -0.5)})
    method = cls(value=-0.5) if cls is DeepLIFT else cls(baselines=FOLDER)
    with pytest.raises(ModelError, match=f"^{method.name}: "):
        method.attribute(score, x)
