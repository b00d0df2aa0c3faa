"""lrp against zennit and captum, by known answers, and what its table of rules takes and refuses."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import captum.attr
import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr._utils.lrp_rules import EpsilonRule
from pixels import TARGETS, case
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from toys import bound, images
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES as ZENNIT
from zennit.composites import LayerMapComposite, layer_map_base
from zennit.layer import Sum
from zennit.rules import Epsilon
from zennit.types import Convolution

import xcli
from xcli.demo.nets import ResidualBlock
from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.methods.propagation.lrp import COMPOSITES, LRP, Sums
from xcli.registry import build
from xcli.score import Score
from xcli.targets import ClassRows

EXACT = {"rtol": 1e-10, "atol": 1e-13}
ZERO = {"convolution": {"epsilon": 0}, "linear": {"epsilon": 0}}
LOW, HIGH = -3.0, 3.5


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to ``tolerance`` of the largest value, which is not zero."""
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(found, expected, rtol=0, atol=tolerance * peak)


def lrp(net: nn.Module, x: Tensor, rules: object, target: list[int] | None = None, **options: object):
    spec = {"name": "lrp", "rules": rules, "reduce": "none", **options}
    return xcli.explain(net, x, spec, target=target or [1] * len(x), native=True)


# ---- zennit ----------------------------------------------------------------------------------------------------


def residual(self: nn.Module, x: Tensor) -> Tensor:
    """A residual block of torchvision or of the demo, its sum and its activations modules."""
    inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
    return self.relu2(self.sum(torch.stack([inner, self.shortcut(x)], -1)))


def densenet(self: nn.Module, x: Tensor) -> Tensor:
    return self.classifier(self.pool(self.last(self.features(x))).flatten(1))


def peer(net: nn.Module) -> nn.Module:
    """A copy for zennit: every operation a module of its own, batch norms behind a convolution folded into it."""
    net = deepcopy(net)
    for part in list(net.modules()):
        if isinstance(part, torchvision.models.resnet.BasicBlock | ResidualBlock):
            if not isinstance(part, ResidualBlock):
                part.relu1, part.relu2 = nn.ReLU(), nn.ReLU()
                part.shortcut = part.downsample or nn.Identity()
            part.sum, part.forward = Sum(), residual.__get__(part)
        if isinstance(part, torchvision.models.DenseNet):
            part.last, part.pool, part.forward = nn.ReLU(), nn.AdaptiveAvgPool2d(1), densenet.__get__(part)
    for part in list(net.modules()):
        names = [name for name, _ in part.named_children()]
        for one, other in pairwise(names):
            fold(part, one, other)
        fold(part, "conv1", "norm2")  # of a dense layer, as it runs
        for child in part.children():
            if hasattr(child, "inplace"):
                child.inplace = False
    return net


def fold(part: nn.Module, one: str, other: str) -> None:
    conv, norm = getattr(part, one, None), getattr(part, other, None)
    if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        setattr(part, one, fuse_conv_bn_eval(conv, norm))
        setattr(part, other, nn.Identity())


@cache
def network(name: str) -> tuple[nn.Module, Tensor]:
    if name != "vgg11_bn":
        return case(name).net, case(name).x
    with torch.random.fork_rng():
        torch.manual_seed(1)
        features = torchvision.models.vgg11_bn(num_classes=10).features
        head = (nn.Linear(512, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
        net = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).double().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.bias.data.normal_(0, 0.1)
    return net.requires_grad_(False), images(3, 3, 32, 32)


def every(canonizers: object = None) -> LayerMapComposite:
    return LayerMapComposite([*layer_map_base(), (Convolution, Epsilon()), (nn.Linear, Epsilon())])


PEERS = {
    **{name: ZENNIT[name.replace("-", "_")] for name in COMPOSITES if name != "epsilon"},
    "epsilon": every,
    "epsilon-gamma-box": partial(ZENNIT["epsilon_gamma_box"], low=LOW, high=HIGH),
}
QUICK = {("resnet18", "epsilon-plus-flat")}


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")
@pytest.mark.parametrize(
    ("name", "rules"),
    [
        pytest.param(
            name, rules, marks=[] if name == "shapes-cnn" or (name, rules) in QUICK else [pytest.mark.soak]
        )
        for name in ("shapes-cnn", "vgg11_bn", "resnet18", "densenet121")
        for rules in COMPOSITES
    ],
)
def test_composites_are_zennits(name, rules):
    net, x = network(name)
    other = peer(net)
    assert_close(other(x), net(x), **EXACT)
    picked = F.one_hot(torch.tensor(TARGETS), 10)
    with Gradient(model=other, composite=PEERS[rules]()) as attributor:
        outputs, expected = attributor(x, lambda out: out * picked)
    found = lrp(net, x, rules, TARGETS, box=[LOW, HIGH])
    close(found.map, expected, 1e-9)  # a hundred layers of epsilon
    assert_close(found.extras["conservation"], expected.flatten(1).sum(1) / (outputs * picked).sum(1))


# ---- captum ----------------------------------------------------------------------------------------------------


def chain(bias: bool = True, pool: bool = True, seed: int = 0) -> nn.Sequential:
    """Convolutions, rectifiers, max-pooling and linear layers, one behind the other, on images of 8 x 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.Conv2d(6, 5, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(80 if pool else 320, 12, bias=bias),
            nn.ReLU(),
            nn.Linear(12, 4, bias=bias),
        )
    return net.double().eval().requires_grad_(False)


class InParts(nn.Module):
    """A chain whose flattening is no module: captum has no rule for one."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.features, self.head = net[:5], net[6:]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def test_epsilon_is_captums():
    x, net = images(3, 3, 8, 8), chain()
    other = deepcopy(net)
    for part in other.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.rule = EpsilonRule(epsilon=0.01)
    expected = captum.attr.LRP(InParts(other)).attribute(
        x.clone().requires_grad_(), target=torch.tensor([1, 0, 3])
    )
    found = lrp(net, x, {"*": {"epsilon": 0.01}}, [1, 0, 3])
    close(found.map, expected.detach(), 1e-8)  # it makes max-pooling safe by 1e-9


# ---- known answers ---------------------------------------------------------------------------------------------


def test_lrp_0_is_input_times_gradient_and_conserves_without_biases():
    x, net = images(3, 3, 8, 8), chain(bias=False)
    found = lrp(net, x, ZERO, conservation="layers")
    expected = xcli.explain(net, x, {"name": "input-x-gradient", "reduce": "none"}, target=1)
    close(found.map, expected.map)
    ones = torch.ones(3, dtype=torch.float64)
    assert_close(found.extras["conservation"], ones, **EXACT)
    layers = [name for name in found.extras if name.startswith("relevance at ")]
    assert layers == ["relevance at 0", "relevance at 3", "relevance at 6", "relevance at 8"]
    for name in layers:
        assert_close(found.extras[name], found.score, **EXACT)


def test_what_biases_take_is_what_is_missing():
    x, net = images(3, 3, 8, 8), chain()
    found = lrp(net, x, ZERO)
    biases = [part.bias for part in net if hasattr(part, "bias")]
    taken = []
    for image in x:
        moved = [torch.zeros_like(bias, requires_grad=True) for bias in biases]
        own = deepcopy(net)
        parts = [part for part in own if hasattr(part, "bias")]
        for part, bias, move in zip(parts, biases, moved, strict=True):
            del part.bias
            part.bias = bias + move
        grads = torch.autograd.grad(own(image[None])[0, 1], moved)
        taken.append(sum((bias * grad).sum() for bias, grad in zip(biases, grads, strict=True)))
    assert_close(found.map.flatten(1).sum(1) + torch.stack(taken), found.score, **EXACT)


@pytest.mark.parametrize("first", ["flat", "w2", "z+", "z-box"])
def test_the_first_layer_conserves(first):
    x, net = images(3, 3, 8, 8).clamp(LOW, HIGH), chain(bias=first != "z+")
    found = lrp(net, x, {**ZERO, "first": first}, conservation="layers", box=[LOW, HIGH])
    arrives = found.extras["relevance at 0"]
    assert (arrives.abs() > 1e-3).all()
    assert_close(found.map.flatten(1).sum(1), arrives, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rules", ["epsilon-plus-flat", "epsilon"])
def test_a_layers_map_is_the_relevance_that_arrives_there(rules):
    net, x = case("shapes-cnn").net, case("shapes-cnn").x
    found = lrp(net, x, rules, TARGETS, conservation="layers")
    names = [name.removeprefix("relevance at ") for name in found.extras if " at " in name]
    assert {"stem.1", "stages.1.0.shortcut.1", "head"} <= set(names)
    assert not {"stem.0", "stages.1.0.conv1"} & set(names)  # their batch norm is part of them
    for name in ("stem.1", "stages.1.0.bn2", "stages.2.1.bn1"):
        at = lrp(net, x, rules, TARGETS, layer=name)
        assert_close(at.map.flatten(1).sum(1), found.extras[f"relevance at {name}"])
        assert_close(at.extras["conservation"], found.extras[f"relevance at {name}"] / found.score)
    close(lrp(net, x, rules, TARGETS, layer="stem.0").map, lrp(net, x, rules, TARGETS, layer="stem.1").map)


def test_relevance_starts_as_gradient_times_logits_in_other_units():
    x, net = images(3, 3, 8, 8), chain(bias=False)
    spec = {"name": "lrp", "rules": ZERO, "reduce": "none"}
    found = xcli.explain(net, x, spec, target=2, score="probability").map
    ixg = {"name": "input-x-gradient", "reduce": "none"}
    close(found, xcli.explain(net, x, ixg, target=2, score="probability").map)


def test_a_shared_layer_counts_each_time_it_runs():
    shared = nn.Conv2d(3, 3, 3, padding=1, bias=False).double()
    net = nn.Sequential(
        shared, nn.ReLU(), shared, nn.ReLU(), nn.Flatten(), nn.Linear(192, 2, bias=False)
    ).double()
    apart = deepcopy(net)
    apart[2] = deepcopy(apart[0])
    x = images(2, 3, 8, 8)
    close(lrp(net, x, "epsilon-plus-flat").map, lrp(apart, x, "epsilon-plus-flat").map)
    found = lrp(net, x, ZERO, conservation="layers").extras["relevance at 0"]
    assert_close(found, 2 * xcli.explain(net, x, "saliency", target=[1, 1]).score, **EXACT)


# ---- the table of rules ----------------------------------------------------------------------------------------


def test_a_name_wins_over_first_and_first_over_the_type():
    x, net = images(2, 3, 8, 8), chain()
    base = {"convolution": "z+", "linear": "epsilon"}
    named = {"0": "flat", "3": "z+", "6": "epsilon", "8": "epsilon"}
    assert_close(lrp(net, x, {**base, "first": "flat"}).map, lrp(net, x, named).map, **EXACT)
    assert_close(
        lrp(net, x, {"*": "gamma", **base, "first": "flat"}).map, lrp(net, x, {"*": "gamma"}).map, **EXACT
    )
    assert_close(
        lrp(net, x, {"[03]": "w2", **base}).map, lrp(net, x, {**named, "0": "w2", "3": "w2"}).map, **EXACT
    )
    assert not torch.allclose(lrp(net, x, {**base, "first": "flat"}).map, lrp(net, x, base).map)
    for number, spec in enumerate(COMPOSITES.values()):
        assert_close(
            lrp(net, x, list(COMPOSITES)[number], box=[LOW, HIGH]).map,
            lrp(net, x, dict(spec), box=[LOW, HIGH]).map,
            **EXACT,
        )


def test_the_first_name_that_fits_is_taken():
    x, net = images(2, 3, 8, 8), chain()
    rest = {"convolution": "z+", "linear": "epsilon"}
    assert_close(
        lrp(net, x, {"3": "flat", "?": "w2"}).map,
        lrp(net, x, {"3": "flat", "0": "w2", "6": "w2", "8": "w2"}).map,
    )
    assert_close(lrp(net, x, {"?": "w2", "3": "flat", **rest}).map, lrp(net, x, {"?": "w2"}).map)


def test_numbers_are_those_of_the_rule():
    x, net = images(2, 3, 8, 8), chain()
    for spec, other in (
        ({"alpha-beta": 1}, "z+"),
        ({"alpha-beta": 2}, "alpha-beta"),
        ({"gamma": 0}, "epsilon"),
        ({"gamma": 0.25}, "gamma"),
        ({"epsilon": 1e-6}, "epsilon"),
    ):
        tables = [{"convolution": one, "linear": "epsilon"} for one in (spec, other)]
        close(lrp(net, x, tables[0]).map, lrp(net, x, tables[1]).map)
    far = lrp(net, x, {"convolution": {"gamma": 1e9}, "linear": "epsilon"}).map
    assert not torch.allclose(far, lrp(net, x, {"convolution": "gamma", "linear": "epsilon"}).map)


def test_a_batch_norm_of_its_own_passes_or_takes_the_share_of_its_shift():
    norm = nn.BatchNorm2d(3)
    norm.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), norm, nn.Flatten(), nn.Linear(48, 2)).double().eval()
    net.requires_grad_(False)
    x = images(2, 3, 4, 4)
    rules = {"convolution": {"epsilon": 0.1}, "linear": {"epsilon": 0.1}}
    passed, shared = (lrp(net, x, {**rules, **own}, layer="1").map for own in ({}, {"batch-norm": "epsilon"}))
    arrives = lrp(net, x, rules, layer="2").map
    close(passed, arrives)
    hidden = net[:2](x)
    z, scale = norm(hidden), (norm.weight / (norm.running_var + norm.eps).sqrt()).view(1, 3, 1, 1)
    safe = z + 1e-6 * torch.where(z < 0, -1.0, 1.0)
    close(shared, hidden * scale * arrives / safe)


def scored(net: nn.Module, x: Tensor, span: tuple[Tensor, Tensor] | None) -> Score:
    return replace(bound(net, x, [1] * len(x)), span=span)


def test_the_box_is_that_of_the_preprocessing_or_the_one_given():
    x, net = images(2, 3, 8, 8), chain()
    span = tuple(torch.full((3,), value, dtype=torch.float64) for value in (LOW, HIGH))
    given = lrp(net, x, "epsilon-gamma-box", box=[LOW, HIGH]).map
    auto = build({"name": "lrp", "rules": "epsilon-gamma-box", "reduce": "none"})
    assert_close(auto.attribute(scored(net, x, span), x).map, given, **EXACT)
    uneven = (torch.tensor([-3.0, -2.0, -4.0]).double(), torch.tensor([3.0, 4.0, 2.0]).double())
    picked = F.one_hot(torch.tensor([1, 1]), 4)
    box = partial(
        ZENNIT["epsilon_gamma_box"], low=uneven[0].view(1, 3, 1, 1), high=uneven[1].view(1, 3, 1, 1)
    )
    with Gradient(model=peer(net), composite=box()) as attributor:
        _, expected = attributor(x, lambda out: out * picked)
    close(auto.attribute(scored(net, x, uneven), x).map, expected)


class Own(nn.Module):
    """Brings the picture to another range and order by itself, then asks ``net``."""

    def __init__(self, net: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.net, self.flat = net, flat
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).double().view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.25, -0.2, 0.5]).double().view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x[:, [2, 1, 0]] - self.mean) / self.std
        return self.net(x.flatten(1) if self.flat else x)


@pytest.mark.parametrize("flat", [False, True])
def test_the_box_goes_through_what_the_network_does_to_the_picture_first(flat):
    x = images(2, 3, 8, 8).clamp(-1, 1)
    net = chain() if not flat else nn.Sequential(nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    net.requires_grad_(False)
    own = Own(net, flat)
    rules = {"first": "z-box", "convolution": "z+", "linear": "epsilon"}
    found = lrp(own, x, rules, box=[-1, 2]).map
    inner = (x[:, [2, 1, 0]] - own.mean) / own.std
    ends = [(value - own.mean.flatten()) / own.std.flatten() for value in (-1, 2)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    if flat:
        inner, low, high = inner.flatten(1), low.repeat_interleave(64), high.repeat_interleave(64)
        w, b = net[0].weight, net[0].bias
        hidden = inner @ w.T + b
        out = net[2](hidden.relu())[:, 1]
        safe = out + 1e-6 * out.sign()
        top = net[2].weight[1] * hidden.relu() * (out / safe)[:, None]
        z = inner @ w.T - low @ w.clamp(min=0).T - high @ w.clamp(max=0).T
        s = top / (z + 1e-6)
        expected = inner * (s @ w) - low * (s @ w.clamp(min=0)) - high * (s @ w.clamp(max=0))
        expected = expected.view(2, 3, 8, 8)[:, [2, 1, 0]]
    else:
        auto = build({"name": "lrp", "rules": rules, "reduce": "none"})
        expected = auto.attribute(scored(net, inner, (low, high)), inner).map[:, [2, 1, 0]]
    close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"convolution": {"alpha-beta": 0.5}}}, "alpha is at least 1"),
        (
            {"rules": {"batch-norm": "gamma", "convolution": "z+"}},
            "batch-norm takes pass or epsilon; got gamma",
        ),
        ({"conservation": "layers", "layer": "0"}, "leave `layer` out"),
        ({"box": [2.0, -2.0]}, "the lowest input, then the highest"),
        ({"rules": {"convolution": {"gamma": -1}}}, "greater than or equal to 0"),
        ({"rules": {"convolution": {"z+": 1}}}, "z\\+"),
        ({"rules": {"convolution": "zplus"}}, "zplus|epsilon"),
        ({"rules": "epsilon-minus"}, "epsilon-minus|epsilon-plus"),
        ({"rules": {}}, "rules"),
    ],
)
def test_what_an_option_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        build({"name": "lrp", **options})


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            {"convolutions": "z+", "linear": "epsilon"},
            ModelError,
            "no layer is called 'convolutions'.*convolution",
        ),
        ({"linear": "epsilon"}, ModelError, "has none for '0': name it, or give one for convolution"),
        ({"convolution": "z+"}, ModelError, "has none for '[68]': name it, or give one for linear"),
        (
            {"convolution": "pass", "linear": "epsilon"},
            ModelError,
            "pass is for .*'[03]' does not; give it another",
        ),
        (
            {"3": "z-box", "convolution": "z+", "linear": "epsilon"},
            ModelError,
            "z-box .*'3' does not; give it",
        ),
    ],
)
def test_tables_that_do_not_fit_the_network(rules, error, message):
    with pytest.raises(error, match=message):
        lrp(chain(), images(2, 3, 8, 8), rules, box=[LOW, HIGH])


def test_z_box_without_a_known_span_says_what_to_give():
    with pytest.raises(ConfigError, match=r"box: \[low, high\]"):
        lrp(chain(), images(2, 3, 8, 8), "epsilon-gamma-box")


def test_bfloat16_runs_and_comes_near():
    net, x = chain().float(), images(2, 3, 8, 8).float()
    rows = ClassRows(torch.arange(2), torch.tensor([1, 2]))
    for rules in ("epsilon-plus-flat", "epsilon-gamma-box", "epsilon-alpha2-beta1"):
        method = LRP(rules=rules, reduce="none", box=(LOW, HIGH))
        found = []
        for precision in (None, torch.bfloat16):
            score = bound(net, x, [1, 2])
            score = Score(net, rows, score.layers, Execution(8, precision), keys=["a", "b"])
            found.append(method.attribute(score, x).map)
        assert found[1].dtype == torch.float32
        assert (found[1] - found[0]).abs().max() < 0.05 * found[0].abs().max()


@pytest.mark.parametrize("rules", COMPOSITES)
def test_float32_comes_near_float64(rules):
    net, x = chain(), images(2, 3, 8, 8)
    double = lrp(net, x, rules, box=[LOW, HIGH]).map
    close(lrp(deepcopy(net).float(), x.float(), rules, box=[LOW, HIGH]).map.double(), double, 1e-3)


def test_a_layer_that_makes_its_weights_cannot_be_named():
    net, x = chain(), images(2, 3, 8, 8)
    whole = lrp(net, x, "epsilon-plus-flat").map
    nn.utils.parametrizations.weight_norm(net[3])
    assert_close(lrp(net, x, "epsilon-plus-flat").map, whole, **EXACT)
    with pytest.raises(ModelError, match="rules: '3' makes its weights anew.*; give a rule for its type"):
        lrp(net, x, {"3": "flat", "convolution": "z+", "linear": "epsilon"})


@pytest.mark.parametrize("key", ["stages.1", "stages.1.0", "stages.1.0.bn1", "stages.?", "*bn2"])
def test_a_name_has_to_be_that_of_a_layer_with_weights(key):
    net, x = case("shapes-cnn").net, case("shapes-cnn").x
    rest = {"convolution": "z+", "linear": "epsilon"}
    within = r"; did you mean 'stages\.1.*\.\*'" if key[-2:] in (".0", ".1") else ""
    with pytest.raises(ModelError, match=f"lrp: rules: '{re.escape(key)}' .* no layer with weights{within}"):
        LRP(rules={key: "flat", **rest}).looks_at(case("shapes-cnn").score.layers)
    found = lrp(net, x, {"stages.1.*": "w2", **rest}, TARGETS).map
    assert not torch.allclose(found, lrp(net, x, rest, TARGETS).map)


def test_weights_that_another_module_runs_with_have_the_name_of_their_owner():
    class Outside(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            first = self.net[0]
            return self.net[1:](F.conv2d(x, first.weight, first.bias, padding=1))

    x, net = images(2, 3, 8, 8), chain()
    rest = {"convolution": "z+", "linear": "epsilon"}
    found = lrp(Outside(net), x, {"net.0": "flat", **rest}).map
    assert_close(found, lrp(net, x, {"0": "flat", **rest}).map, **EXACT)


def test_sums_of_relevance_stay_on_their_device():
    """Nothing is made elsewhere and copied over."""
    with Copied() as copied:
        (found,) = Sums(4)(2, torch.full((3, 2, 2), 0.5), 3)
    assert found.tolist() == [[0, 0, 2, 0]] * 3
    assert copied.seen == []


class Copied(TorchDispatchMode):
    """What was made anew or copied inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_to_copy", "aten::lift_fresh", "aten::scatter"):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))
