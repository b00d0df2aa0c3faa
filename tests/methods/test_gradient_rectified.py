"""deconvnet, guided-backprop and guided-gradcam: by hand, by theorems, and against captum, zennit and grad-cam."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution as CaptumDeconvolution
from captum.attr import GuidedBackprop as CaptumGuidedBackprop
from captum.attr import GuidedGradCam as CaptumGuidedGradCam
from captum.attr import NeuronDeconvolution, NeuronGuidedBackprop
from pixels import RECTIFIED, TARGETS, case
from pytorch_grad_cam import GuidedBackpropReLUModel
from runs import PREPROCESS, photos, plain, written
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made
from zennit.attribution import Gradient
from zennit.composites import DeconvNet as ZennitDeconvNet
from zennit.composites import GuidedBackprop as ZennitGuidedBackprop
from zennit.core import Composite
from zennit.rules import ReLUDeconvNet

import xcli
from xcli.cli import app
from xcli.cli.exits import guarded
from xcli.demo import nets
from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.forward import Forward
from xcli.layers import survey
from xcli.methods.base import resized
from xcli.methods.gradient.plain import Saliency
from xcli.methods.gradient.rectified import DeconvNet, GuidedBackprop, GuidedGradCAM
from xcli.registry import build

pytestmark = pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU:UserWarning")

EXACT = {"rtol": 1e-10, "atol": 1e-13}
METHODS = {"deconvnet": DeconvNet(), "guided-backprop": GuidedBackprop()}
GRADIENT = build({"name": "saliency", "preset": "signed"})
CAPTUM = {"deconvnet": CaptumDeconvolution, "guided-backprop": CaptumGuidedBackprop}
NEURON = {"deconvnet": NeuronDeconvolution, "guided-backprop": NeuronGuidedBackprop}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}


def close(found, expected, tolerance=1e-10):
    """Equal to ``tolerance`` of the largest value, which is not zero."""
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(found, expected, rtol=0, atol=tolerance * peak)


def apart(found, other, share=0.1):
    """Another map, by more than ``share`` of the largest value."""
    assert (found - other).abs().max() > share * other.abs().max()


@cache
def peer(name):
    """The network ``name`` as other packages need it; they leave it as it was."""
    return case(name).peer


@cache
def ours(name, method):
    """Maps (3, 3, H, W) of a case."""
    one = case(name)
    return METHODS[method].attribute(one.score, one.x)


def captums(method, net, x, target):
    return CAPTUM[method](net).attribute(x.clone().requires_grad_(), target=target).detach()


# ---- by hand ---------------------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """Convolutions, rectifiers, max-pooling, linear layers: each can be walked backwards on paper."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 3, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(3 * 2 * 2, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(self.conv2(x)).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


def taps(conv, h, w):
    """(cell of the output, cell of the input, row and column of the kernel) of each product; ``h`` x ``w`` input."""
    stride, pad = conv.stride[0], conv.padding[0]
    for i in range((h + 2 * pad - 3) // stride + 1):
        for j in range((w + 2 * pad - 3) // stride + 1):
            for a in range(3):
                for b in range(3):
                    p, q = i * stride + a - pad, j * stride + b - pad
                    if 0 <= p < h and 0 <= q < w:
                        yield i, j, p, q, a, b


def convolved(conv, x):
    stride, pad = conv.stride[0], conv.padding[0]
    h, w = ((size + 2 * pad - 3) // stride + 1 for size in x.shape[1:])
    out = conv.bias[:, None, None].repeat(1, h, w)
    for i, j, p, q, a, b in taps(conv, *x.shape[1:]):
        out[:, i, j] += conv.weight[:, :, a, b] @ x[:, p, q]
    return out


def transposed(conv, g, size):
    out = g.new_zeros(conv.in_channels, *size)
    for i, j, p, q, a, b in taps(conv, *size):
        out[:, p, q] += conv.weight[:, :, a, b].T @ g[:, i, j]
    return out


def pooled(x):
    """Max-pooling of 2 x 2 cells, and where each maximum, the first of equal ones, was."""
    out, place = x.new_zeros(x.shape[0], x.shape[1] // 2, x.shape[2] // 2), {}
    for k in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                cells = [(2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)]
                place[k, i, j] = max(cells, key=lambda cell: float(x[k, cell[0], cell[1]]))
                out[k, i, j] = x[(k, *place[k, i, j])]
    return out, place


def unpooled(g, place, size):
    out = g.new_zeros(len(g), *size)
    for (k, i, j), (p, q) in place.items():
        out[k, p, q] += g[k, i, j]
    return out


def through(rule, g, z):
    """A rectifier backwards: its gradient, Zeiler and Fergus 2013, Springenberg et al. 2014."""
    out = torch.zeros_like(g)
    for index in range(g.numel()):
        grad, own = float(g.flatten()[index]), float(z.flatten()[index])
        passes = {"saliency": own > 0, "deconvnet": grad > 0, "guided-backprop": grad > 0 and own > 0}
        out.view(-1)[index] = grad if passes[rule] else 0.0
    return out


@torch.no_grad()
def walked(net, x, target, rule):
    """The map (3, H, W) of one image: forwards, then backwards layer by layer."""
    z1 = convolved(net.conv1, x)
    small, place = pooled(z1.clamp_min(0))
    z2 = convolved(net.conv2, small)
    z3 = net.fc1.weight @ z2.clamp_min(0).flatten() + net.fc1.bias
    g = net.fc1.weight.T @ through(rule, net.fc2.weight[target], z3)
    g = transposed(net.conv2, through(rule, g.view_as(z2), z2), small.shape[1:])
    return transposed(net.conv1, through(rule, unpooled(g, place, z1.shape[1:]), z1), x.shape[1:])


@pytest.mark.parametrize(("rule", "method"), [("saliency", GRADIENT), *METHODS.items()])
def test_each_rule_walked_backwards_layer_by_layer(rule, method):
    net, x = made(ByHand), images(3, 3, 6, 7)
    found = method.attribute(bound(net, x, **ROWS), x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"], strict=True)):
        close(found[row], walked(net, x[image], target, rule), 1e-13)


class Unit(nn.Module):
    """``v`` times one rectified unit: v relu(w . x + b)."""

    def __init__(self, v: float, b: float) -> None:
        super().__init__()
        self.v, self.unit = v, nn.Linear(3, 1).double()
        self.unit.weight.data.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        self.unit.bias.data.fill_(b)

    def forward(self, x):
        return self.v * self.unit(x.flatten(1)).relu()


@pytest.mark.parametrize(
    ("v", "b", "saliency", "deconvnet", "guided"),
    [  # factors of the unit's weights, where w . x is 0
        (3.0, 1.0, 3, 3, 3),
        (3.0, -1.0, 0, 3, 0),  # silent: deconvnet passes it all the same
        (-3.0, 1.0, -3, 0, 0),
        (-3.0, -1.0, 0, 0, 0),
        (3.0, 0.0, 0, 3, 0),
    ],
)
def test_one_unit_has_maps_that_can_be_read_off(v, b, saliency, deconvnet, guided):
    x = torch.tensor([2.0, 1.5, 2.0], dtype=torch.float64).view(1, 3, 1, 1)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    score = bound(Unit(v, b), x, [0])
    for method, factor in ((GRADIENT, saliency), (DeconvNet(), deconvnet), (GuidedBackprop(), guided)):
        assert method.attribute(score, x).flatten().tolist() == (factor * weight).tolist(), method.name
        assert method.explain(score, x).map.item() == -0.5 * factor  # colours summed, signed


# ---- theorems --------------------------------------------------------------------------------------------------


def test_where_weights_and_pixels_are_positive_all_three_are_the_gradient():
    net, x = made(ByHand), images(3, 3, 6, 7).abs()
    for parameter in net.parameters():
        parameter.data.abs_()
    score = bound(net, x, **ROWS)
    expected = GRADIENT.attribute(score, x)
    assert expected.min() == 0  # what no maximum came from
    for method in METHODS.values():
        close(method.attribute(score, x), expected, 1e-14)


def test_where_every_unit_is_active_both_rules_agree_and_are_not_the_gradient():
    net, x = made(ByHand), images(3, 3, 6, 7)
    for layer in (net.conv1, net.conv2, net.fc1):
        layer.bias.data.fill_(20)
    score = bound(net, x, **ROWS)
    guided = GuidedBackprop().attribute(score, x)
    close(DeconvNet().attribute(score, x), guided, 1e-14)
    apart(GRADIENT.attribute(score, x), guided)


def test_without_pooling_deconvnet_does_not_look_at_the_picture():
    """As Springenberg et al. 2014 say: what it shows is then the same for every picture."""
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, [2, 2, 2])
    same = DeconvNet().attribute(score, x)
    close(same, same[:1].expand_as(same), 1e-14)
    guided = GuidedBackprop().attribute(score, x)
    apart(guided[1], guided[0])
    net, x = made(ByHand), images(3, 3, 6, 7)
    others = DeconvNet().attribute(bound(net, x, [2, 2, 2]), x)
    apart(others[1], others[0])


class OneHidden(nn.Module):
    """A score and its negative over one layer of rectified units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 4 * 5, 1)

    def forward(self, x):
        score = self.head(self.conv(x).relu().flatten(1))
        return torch.cat([score, -score], 1)


def test_behind_one_hidden_layer_the_gradient_is_what_speaks_for_less_what_speaks_against():
    net, x = made(OneHidden), images(2, 3, 6, 7)
    maps = GuidedBackprop().attribute(bound(net, x, [0, 1, 0, 1], [0, 0, 1, 1]), x)
    close(maps[::2] - maps[1::2], GRADIENT.attribute(bound(net, x, [0, 0]), x), 1e-13)


# ---- other packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECTIFIED)
def test_maps_equal_captum(name, method):
    """Also of mobilenet_v3_small, whose hard swishes keep their gradient."""
    close(ours(name, method), captums(method, peer(name), case(name).x, TARGETS))


def has_rule(method):
    """zennit's rule on every ReLU, and nothing on any other module."""
    if method == "guided-backprop":
        return ZennitGuidedBackprop()
    return Composite(
        module_map=lambda _ctx, _name, module: ReLUDeconvNet() if isinstance(module, nn.ReLU) else None
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECTIFIED)
def test_maps_equal_zennit(name, method):
    one = case(name)
    chosen = torch.eye(10, dtype=torch.float64)[TARGETS]
    with Gradient(peer(name), has_rule(method)) as attributor:
        _, expected = attributor(one.x.clone(), chosen)
    close(ours(name, method), expected.detach())


def test_zennit_s_deconvnet_is_the_same_rule():
    one = case("shapes-cnn")
    with Gradient(peer(one.name), ZennitDeconvNet()) as attributor:
        _, expected = attributor(one.x.clone(), torch.eye(10, dtype=torch.float64)[TARGETS])
    close(ours(one.name, "deconvnet"), expected.detach())


@pytest.mark.parametrize("name", ["shapes-cnn", "mobilenet_v3_small"])
def test_guided_maps_equal_grad_cam_image_by_image(name):
    one, model = case(name), case(name).peer
    for image, target in enumerate(TARGETS):
        expected = GuidedBackpropReLUModel(model)(one.x[image : image + 1].clone(), target)
        close(ours(name, "guided-backprop")[image], torch.from_numpy(expected).permute(2, 0, 1))


def test_in_shapes_vit_the_rule_reaches_its_convolutions_and_not_its_tokens():
    net = nets.load("shapes-vit").double()
    x = images(2, 3, 128, 128)
    score = bound(net, x, [1, 7])
    assert score.layers.activations == {"relu": 7, "gelu": 4}
    for part in net.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False  # as captum needs it
    for name, method in METHODS.items():
        found = method.attribute(score, x)
        close(found, captums(name, net, x, [1, 7]))
        apart(GRADIENT.attribute(score, x), found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", ["captum", "zennit"])
def test_presets_leave_the_colours_apart(method, preset):
    one = case("shapes-cnn")
    found = build({"name": method, "preset": preset}).explain(one.score, one.x, (64, 48)).map
    assert_close(found, ours("shapes-cnn", method), **EXACT)
    summed = build(method).explain(one.score, one.x, (64, 48)).map
    assert_close(summed, found.sum(1), **EXACT)
    assert (summed < 0).any()


# ---- one network, written in many ways ---------------------------------------------------------------------------


class Written(nn.Module):
    """conv, ReLU, conv, ReLU, mean, linear, ReLU, linear; the ReLU called as ``how`` says."""

    def __init__(self, how: str = "module", kind: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 5)
        inplace = how in ("in place", "for its effect")
        self.acts = nn.ModuleList(
            kind(inplace) for _ in range(1 if how in ("reused", "for its effect") else 3)
        )
        self.how = how

    def rectified(self, x, place):
        match self.how:
            case "reused":
                return self.acts[0](x)
            case "for its effect":
                self.acts[0](x)
                return x
            case "module" | "in place":
                return self.acts[place](x)
            case "function":
                return F.relu(x)
            case "function in place":
                return F.relu(x, inplace=True)
            case "torch":
                return torch.relu_(x) if place else torch.relu(x)
            case "tensor":
                return x.relu_() if place else x.relu()
            case "operator":
                return torch.ops.aten.relu.default(x)
            case "a view in place":
                x[:, :3].relu_()
                return torch.cat([x[:, :3], x[:, 3:].relu()], 1)

    def forward(self, x):
        x = self.rectified(self.conv2(self.rectified(self.conv1(x), 0)), 1)
        return self.fc2(self.rectified(self.fc1(x.mean((2, 3))), 2))


HOW = (
    *("in place", "reused", "for its effect", "function", "function in place", "torch", "tensor", "operator"),
    "a view in place",
)


def written_as(how, kind=nn.ReLU):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Written(how, kind).double().eval()


@pytest.mark.parametrize("how", HOW)
def test_maps_do_not_depend_on_how_a_network_calls_its_rectifiers(how):
    x = images(3, 3, 9, 8)
    net, plain_net = written_as(how), written_as("module")
    score, expected = bound(net, x, **ROWS), bound(plain_net, x, **ROWS)
    assert score.layers.activations == {"relu": 6 if how == "a view in place" else 3}
    assert_close(score(x[[0, 0, 1, 2]]), expected(x[[0, 0, 1, 2]]), **EXACT)
    for method in METHODS.values():
        maps = method.attribute(expected, x)
        close(method.attribute(score, x), maps, 1e-14)
        apart(GRADIENT.attribute(score, x), maps)


@pytest.mark.parametrize("method", METHODS)
def test_captum_and_zennit_give_the_plain_gradient_where_the_relu_is_a_function(method):
    """Both look for modules only; ours of the same network is theirs of the one with modules."""
    x, target = images(3, 3, 9, 8), [1, 3, 0]
    functional, modules = written_as("function"), written_as("module")
    gradient = GRADIENT.attribute(bound(functional, x, target), x)
    expected = captums(method, modules, x, target)
    close(METHODS[method].attribute(bound(functional, x, target), x), expected, 1e-13)
    apart(gradient, expected)
    close(captums(method, functional, x, target), gradient, 1e-13)
    with Gradient(functional, has_rule(method)) as attributor:
        _, theirs = attributor(x.clone(), torch.eye(5, dtype=torch.float64)[target])
    close(theirs.detach(), gradient, 1e-13)


def test_grad_cam_gives_the_plain_gradient_where_the_relu_is_a_function():
    x = images(1, 3, 9, 8)

    def theirs(how):
        found = GuidedBackpropReLUModel(written_as(how))(x.clone(), 1)
        return torch.from_numpy(np.ascontiguousarray(found)).permute(2, 0, 1)[None]

    score = bound(written_as("function"), x, [1])
    gradient, guided = GRADIENT.attribute(score, x), GuidedBackprop().attribute(score, x)
    close(theirs("module"), guided, 1e-13)
    close(theirs("function"), gradient, 1e-13)
    apart(gradient, guided)


@pytest.mark.parametrize("method", METHODS)
def test_captum_gives_the_plain_gradient_of_relu6_where_ours_is_ruled(method):
    """A ReLU that does not saturate on these pictures, so that ReLU and ReLU6 are the same function."""
    x, target = images(3, 3, 9, 8), [1, 3, 0]
    capped, net = written_as("module", nn.ReLU6), written_as("module")
    score = bound(capped, x, target)
    assert score.layers.activations == {"relu6": 3}
    expected = captums(method, net, x, target)
    close(METHODS[method].attribute(score, x), expected, 1e-13)
    close(captums(method, capped, x, target), GRADIENT.attribute(score, x), 1e-13)
    apart(GRADIENT.attribute(score, x), expected)


# ---- networks without a ReLU -----------------------------------------------------------------------------------


class Swish(nn.Module):
    """Convolutions and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(True), nn.Conv2d(6, 8, 3), nn.SiLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Linear(nn.Module):
    """No activation at all."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("method", [*METHODS, "guided-gradcam"])
@pytest.mark.parametrize(
    ("kind", "there"), [(Tokens, "gelu"), (Swish, "silu"), (Linear, "none")], ids=lambda value: str(value)
)
def test_a_network_without_relu_is_refused_with_the_activations_it_has(kind, there, method):
    net, x = made(kind), images(2, 3, 16, 16)
    one = build(method)
    said = rf"no ReLU \(its activations: {there}\); use saliency or smoothgrad"
    with pytest.raises(ModelError, match=said):
        one.looks_at(survey(net, x[:1]))
    with pytest.raises(ModelError, match=said):
        one.pinned(survey(net, x[:1]))
    with pytest.raises(ModelError, match=said):
        xcli.explain(net, x, method)


def test_vit_b_16_is_refused_and_saliency_is_not():
    one = case("vit_b_16")
    layers = one.score.layers
    assert layers.activations == {"gelu": 12}
    for method in (*METHODS.values(), GuidedGradCAM()):
        with pytest.raises(ModelError, match=r"no ReLU \(its activations: gelu\)"):
            method.pinned(layers)
    assert Saliency().pinned(layers) == Saliency()
    assert GuidedGradCAM(base="saliency").pinned(layers).looks_at(layers)


@pytest.fixture
def xai(capfd, monkeypatch):
    """The command in this process: its exit code, what it printed, what it complained about."""
    monkeypatch.setattr("xcli.tuning.keep_freed_memory", lambda: True)  # a setting of the whole process

    def run(*arguments):
        capfd.readouterr()
        code = guarded(lambda: app([str(one) for one in arguments], prog_name="xai"))
        return (code, *capfd.readouterr())

    return run


@pytest.mark.parametrize(
    ("method", "kind"), [("deconvnet", "GELU"), ("guided-backprop", "SiLU"), ("guided-gradcam", "SiLU")]
)
def test_the_command_refuses_before_any_map_is_written(xai, tmp_path, method, kind):
    photos(tmp_path / "photos", 2)
    (tmp_path / "model.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(\n"
        f"        nn.Conv2d(3, 6, 3), nn.{kind}(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()\n    )\n"
    )
    model = {"source": "factory", "name": f"{tmp_path / 'model.py'}:net", "preprocess": PREPROCESS}
    config = plain(tmp_path / "photos", tmp_path / "run", methods=["saliency", method])
    written(tmp_path / "config.yaml", {**config, "model": model})
    for command in ("explain", "check"):
        code, out, said = xai(command, tmp_path / "config.yaml")
        assert (code, out) == (2, "")
        assert f"its rule is for ReLU, and this network has no ReLU (its activations: {kind.lower()})" in said
        assert "methods[1]" in said
        assert not (tmp_path / "run").exists()
    written(tmp_path / "config.yaml", {**config, "model": model, "methods": ["saliency"]})
    assert xai("explain", tmp_path / "config.yaml")[0] == 0  # so that it was the method


def test_check_says_how_many_activations_the_rule_reaches(xai, tmp_path):
    photos(tmp_path / "photos", 1)
    ruled = ["deconvnet", {"name": "guided-gradcam", "as": "ggc"}]
    others = ["saliency", {"name": "guided-gradcam", "as": "plain", "base": "saliency"}]

    def told(name, methods):
        model = {"source": "torchvision", "name": name, "weights": "none", "preprocess": PREPROCESS}
        config = plain(tmp_path / "photos", tmp_path / "run", methods=methods)
        written(tmp_path / "config.yaml", {**config, "model": model})
        code, out, _ = xai("check", tmp_path / "config.yaml", "--json")
        assert code == 0
        return [trap for trap in json.loads(out)["traps"] if "activations are ReLU" in trap]

    mixed = "deconvnet, ggc: 14 of 33 activations are ReLU; hardswish keep their gradient"
    assert told("mobilenet_v3_small", ruled + others) == [mixed]
    assert told("mobilenet_v3_small", others) == []
    assert told("squeezenet1_1", ruled) == []


# ---- at a layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_at_a_layer_the_rectifiers_behind_it_are_ruled(name):
    """captum's map of the rest of the network, whose input is the output of the layer."""
    one, net = case("shapes-cnn"), peer("shapes-cnn")
    rest = nn.Sequential(net.stages[1:], net.pool, nn.Flatten(), net.head)
    with torch.no_grad():
        acts = net.stages[0](net.stem(one.x))
    expected = captums(name, rest, acts, TARGETS)
    method = build({"name": name, "layer": "stages.0"})
    close(method.attribute(one.score, one.x), expected)
    size = method.explain(one.score, one.x, (64, 48)).map
    assert_close(size, resized(expected.sum(1), (64, 48), "bilinear"), **EXACT)


@pytest.mark.parametrize("name", METHODS)
def test_at_the_layer_before_the_last_rectifier_the_map_has_a_closed_form(name):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    target, image = ROWS["target"], ROWS["image"]
    found = build({"name": name, "layer": "features"}).attribute(bound(net, x, **ROWS), x)
    with torch.no_grad():
        z = net.features(x)[image]
        expected = (net.head.weight[target].relu() / 12)[:, :, None, None].expand_as(z)
        close(found, expected if name == "deconvnet" else expected * (z > 0), 1e-14)
    behind = build({"name": name, "layer": "relu"}).attribute(bound(net, x, **ROWS), x)
    weight = net.head.weight.detach()[target] / 12
    close(behind, weight[:, :, None, None].expand_as(behind), 1e-14)  # no rectifier follows


@pytest.mark.parametrize("name", METHODS)
def test_a_neuron_of_a_layer_as_the_score_equals_captum_s_neuron_form(name):
    """For each image, the neuron of the layer that answers most."""
    one, net = case("shapes-cnn"), peer("shapes-cnn")
    front = nn.Sequential(one.net.stem, one.net.stages[:2], nn.Flatten())
    with torch.no_grad():
        acts = net.stages[:2](net.stem(one.x))
    neurons = acts.flatten(1).argmax(1)
    found = METHODS[name].attribute(bound(front, one.x, neurons.tolist()), one.x)
    for image, neuron in enumerate(zip(*torch.unravel_index(neurons, acts.shape[1:]), strict=True)):
        pixels = one.x[image : image + 1].clone().requires_grad_()
        expected = NEURON[name](net, net.stages[1]).attribute(pixels, neuron_selector=tuple(map(int, neuron)))
        close(found[image : image + 1], expected.detach())


def test_layers_are_pinned_by_name_and_taken_again():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    layers = survey(net, x[:1])
    for name, method in METHODS.items():
        assert method.pinned(layers) == method
        assert method.pinned(layers, ()) == method
        auto = build({"name": name, "layer": "auto"})
        assert auto.pinned(layers).layer == "relu"
        assert auto.pinned(layers, ("features",)).layer == "features"
        with pytest.raises(ModelError, match=f"{name} looks at one layer; '\\*' names"):
            build({"name": name, "layer": "*"}).pinned(layers)
        with pytest.raises(ModelError, match="no spatial map"):
            build({"name": name, "layer": "head"}).looks_at(layers)


# ---- promises --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"layer": "last"}])
@pytest.mark.parametrize("name", METHODS)
def test_rows_micro_batches_and_company_change_nothing(name, options):
    net, x = made(Residual), images(4, 3, 8, 6)
    method, rows = build({"name": name, **options}), {"target": [2, 1, 3, 0], "image": [0, 2, 2, 3]}
    whole = method.attribute(bound(net, x, **rows), x)
    for size in (1, 2, 3):
        assert_close(method.attribute(bound(net, x, **rows, micro_batch=size), x), whole, **EXACT)
    for row, (target, image) in enumerate(zip(rows["target"], rows["image"], strict=True)):
        own = x[image : image + 1]
        assert_close(method.attribute(bound(net, own, [target]), own)[0], whole[row], **EXACT)
    apart(whole[2], whole[1])


@pytest.mark.parametrize("layer", ["input", "features"])
def test_a_rule_does_not_reach_the_gradients_of_other_methods(layer):
    """Also where one recorded pass serves them all."""
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    recorded = Forward(net, x, ["features"], Execution(2), leaves=["features"], pixels=layer == "input")
    shared = replace(bound(net, x, **ROWS), forward=recorded)
    names = ("guided-backprop", "saliency", "deconvnet")
    methods = [build({"name": name, "layer": layer}) for name in names]
    expected = [one.attribute(bound(net, x, **ROWS), x) for one in methods]
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        for place in order:
            close(methods[place].attribute(shared, x), expected[place], 1e-14)
    apart(expected[0], expected[1])
    apart(expected[2], expected[0])


class Capped(nn.Module):
    """ReLU6 as function and module, with smooth layers between, so that maps bend."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.capped, self.last, self.head = nn.ReLU6(True), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv2(F.relu6(8 * self.conv1(x))).sin()
        return self.head(self.last(self.capped(9 * x)).tanh().mean((2, 3)))


def slopes_of(loss, at, size=1e-7):
    """The derivative of ``loss()`` by the tensors ``at``, each along a step of its own: by autograd, and by central
    differences."""
    steps = [images(*one.shape, seed=seed) for seed, one in enumerate(at)]
    found = torch.autograd.grad(loss(), at, allow_unused=True, materialize_grads=True)

    def moved(by):
        with torch.no_grad():
            for one, step in zip(at, steps, strict=True):
                one.add_(step, alpha=by)
        return loss().detach()

    ahead, behind = moved(size), moved(-2 * size)
    along = sum((grad * step).sum() for grad, step in zip(found, steps, strict=True))
    return along, (ahead - behind) / (2 * size), found


@pytest.mark.parametrize("kind", [PooledLinear, ByHand])
@pytest.mark.parametrize(
    "spec",
    [
        *METHODS,
        {"name": "guided-backprop", "layer": "auto"},
        {"name": "guided-gradcam", "cam": "hirescam", "base": "deconvnet"},
        "guided-gradcam",
    ],
    ids=str,
)
def test_maps_can_be_differentiated_by_every_weight(kind, spec):
    net, x = made(kind), images(2, 3, 6, 7)
    score = replace(bound(net, x, [0, 1, 2], [0, 0, 1]), create_graph=True)

    def loss():
        return build(spec).explain(score, x).map.square().sum()

    along, expected, found = slopes_of(loss, list(net.parameters()))
    assert_close(along, expected, rtol=1e-5, atol=1e-10)
    assert sum(bool((slope != 0).any()) for slope in found) >= 1


def test_a_guided_map_of_a_piecewise_linear_network_bends_with_no_pixel():
    net, x = made(ByHand), images(2, 3, 6, 7).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 1]), create_graph=True)
    for spec, bends in (("guided-backprop", False), ("guided-gradcam", True)):

        def loss(spec=spec):
            return build(spec).explain(score, x).map.square().sum()

        along, expected, (slope,) = slopes_of(loss, [x])
        assert bool((slope != 0).any()) == bends
        assert_close(along, expected, rtol=1e-5, atol=1e-10)


def test_the_interface_trains_through_a_guided_map():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    found = xcli.explain(net, x, "guided-backprop", target=[1, 2], create_graph=True)
    found.map.square().sum().backward()
    assert all(one.weight.grad.abs().max() > 0 for one in (net.features[0], net.features[2], net.head))
    assert_close(found.map.detach(), xcli.explain(net, x, "guided-backprop", target=[1, 2]).map, **EXACT)


def test_maps_with_a_graph_are_the_maps_without():
    net, x = made(Capped), images(2, 3, 8, 7)
    score = bound(net, x, [0, 1, 2], [0, 0, 1])
    for method in METHODS.values():
        kept = method.attribute(replace(score, create_graph=True), x)
        assert kept.requires_grad
        close(kept.detach(), method.attribute(score, x), 1e-13)


@pytest.mark.parametrize("spec", [*METHODS, "guided-gradcam"])
def test_autocast_gives_nearly_the_same_map(spec):
    net, x = made(PooledLinear).float(), images(2, 3, 8, 6).float()
    score = bound(net, x, [1, 2])
    expected = build(spec).explain(score, x).map
    half = build(spec).explain(replace(score, execution=Execution(64, torch.bfloat16)), x).map
    assert half.dtype == torch.float32
    close(half, expected, 0.05)
    assert (half != expected).any()


# ---- guided-gradcam --------------------------------------------------------------------------------------------

LAYERS = {
    "shapes-cnn": "stages",
    "vgg11": "features.18",
    "resnet18": "layer3",
    "densenet121": "features.denseblock3",
}


@pytest.mark.parametrize("name", LAYERS)
def test_guided_gradcam_equals_captum(name):
    one, net = case(name), peer(name)
    attributor = CaptumGuidedGradCam(net, net.get_submodule(LAYERS[name]))
    expected = attributor.attribute(one.x.clone().requires_grad_(), target=TARGETS).detach()
    method = build(
        {"name": "guided-gradcam", "preset": "captum", "cam": {"name": "gradcam", "layer": LAYERS[name]}}
    )
    close(method.explain(one.score, one.x, tuple(one.x.shape[-2:])).map, expected)


CAMS = [
    "gradcam",
    {"name": "layercam", "layer": ["features.0", "relu"], "fusion": "max"},
    {"name": "hirescam", "layer": "features", "relu": False},
    {"name": "eigencam", "layer": "features"},
    {"name": "gradcam++", "layer": "relu", "aug_smooth": True},
]
BASES = [
    "saliency",
    {"name": "saliency", "absolute": False},
    {"name": "integrated-gradients", "steps": 5},
    {"name": "smoothgrad", "samples": 3, "base": "guided-backprop"},
    "deconvnet",
]


def named(spec):
    return {"name": spec} if isinstance(spec, str) else spec


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("cam", CAMS, ids=str)
def test_it_is_the_product_of_its_two_parts(cam, base):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, **ROWS)
    found = GuidedGradCAM(cam=cam, base=base).explain(score, x)
    region = build(cam).explain(score, x, (8, 6)).map
    detail = build({**named(base), "reduce": "none"}).explain(score, x, (8, 6))
    expected = torch.einsum("nhw,nchw->nhw", region, detail.map)
    close(found.map, expected, 1e-13)
    assert set(found.extras) == set(detail.extras)
    for name, values in detail.extras.items():
        assert_close(found.extras[name], values, **EXACT)
    colours = GuidedGradCAM(cam=cam, base=base, reduce="none").explain(score, x).map
    assert_close(colours, region[:, None] * detail.map, **EXACT)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_the_cam_is_brought_to_the_input_s_size_as_upsampling_says(mode):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [1, 2])
    method = GuidedGradCAM(cam="hirescam", upsampling=mode, reduce="none")
    region, detail = build("hirescam").attribute(score, x), GuidedBackprop().attribute(score, x)
    assert region.shape == (2, 4, 3)
    how = {"mode": mode} if mode == "nearest" else {"mode": mode, "align_corners": False}
    close(method.explain(score, x).map, F.interpolate(region[:, None], (8, 6), **how) * detail, 1e-14)


@pytest.mark.parametrize(
    "base", [{"name": "guided-backprop", "layer": "auto"}, {"name": "saliency", "layer": "relu"}]
)
def test_a_base_that_looks_at_a_layer_gives_no_detail_and_is_refused(base):
    with pytest.raises(ConfigError, match="guided-gradcam: its base gives the detail of the pixels"):
        GuidedGradCAM(base=base)
    with pytest.raises(ConfigError, match="linear-approximation has a map of a layer, not of the pixels"):
        build({"name": "guided-gradcam", "base": "linear-approximation"})


def test_a_base_that_needs_no_rectifier_works_on_any_network():
    net, x = made(Tokens), images(2, 3, 16, 16)
    method = GuidedGradCAM(
        cam={"name": "gradcam", "layer": "norm1"}, base={"name": "saliency", "absolute": False}
    )
    assert "rectifiers" not in method.needs
    assert GuidedGradCAM().needs >= {"gradients", "layer", "rectifiers"}
    score = bound(net, x, [1, 2])
    region = build({"name": "gradcam", "layer": "norm1"}).explain(score, x, (16, 16)).map
    close(method.explain(score, x).map, region * GRADIENT.attribute(score, x).sum(1), 1e-13)


def test_the_pictures_of_its_base_are_its_own():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    base = {"name": "expected-gradients", "baselines": "others", "samples": 4}
    method = GuidedGradCAM(base=base)
    assert method.draws_from() == ("others",)
    assert GuidedGradCAM().draws_from() == ()
    score = replace(bound(net, x, [1, 2]), pictures={"others": images(3, 3, 8, 6, seed=7)})
    found, detail = method.explain(score, x), build(base).explain(score, x)
    close(found.map, build("gradcam").explain(score, x, (8, 6)).map * detail.map, 1e-13)
    assert_close(found.extras["delta"], detail.extras["delta"], **EXACT)


def test_both_parts_explain_what_the_cam_explains():
    assert GuidedGradCAM().scale == build("gradcam").scale == "logit"
    cam = {"name": "shapleycam", "layer": "features"}
    method = GuidedGradCAM(cam=cam)
    assert method.scale == build(cam).scale != "logit"
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    found = xcli.explain(net, x, method, target=1).map
    parts = [xcli.explain(net, x, one, target=1, score=method.scale).map for one in (cam, "guided-backprop")]
    close(found, parts[0] * parts[1], 1e-13)
    apart(found, parts[0] * xcli.explain(net, x, "guided-backprop", target=1).map, 1e-3)


def test_the_layers_of_the_cam_are_pinned_by_name_and_taken_again():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    layers = survey(net, x[:1])
    method = GuidedGradCAM(cam={"name": "layercam", "layer": "features.*"}, base="deconvnet")
    first = [layer.name for layer in method.looks_at(layers)]
    assert first == ["features.0", "features.1", "features.2"]
    pinned = method.pinned(layers)
    assert pinned.cam["layer"] == first
    assert pinned.pinned(layers) == method.pinned(layers, first) == pinned
    assert method.pinned(layers, ("features.0", "features")).cam["layer"] == ["features.0", "features"]
    score = bound(net, x, [1, 2])
    assert_close(pinned.explain(score, x).map, method.explain(score, x).map, **EXACT)
    assert GuidedGradCAM().pinned(layers).cam["layer"] == ["relu"]


@pytest.mark.parametrize("preset", ["paper", "captum"])
def test_presets_are_those_of_the_outer_method(preset):
    method = build({"name": "guided-gradcam", "preset": preset})
    expected = ("nearest", "none") if preset == "captum" else ("bilinear", "sum")
    assert (method.upsampling, method.reduce) == expected
    assert method.detail == GuidedBackprop()
    assert method.region.relu
    inner = build({"name": "guided-gradcam", "base": {"name": "saliency", "preset": "captum"}})
    assert inner.reduce == "sum"  # colours are the outer method's business
    assert inner.detail.absolute


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(
            (
                {part: {"name": inner, option: value}},
                f"{part}: {inner} takes {option} from the method around it",
            )
            for part, inner in (("cam", "layercam"), ("base", "saliency"))
            for option, value in (
                ("reduce", "mean"),
                ("upsampling", "nearest"),
                ("post_process", ["absolute"]),
            )
        ),
        ({"base": "guided-gradcam"}, "base: guided-gradcam cannot be used around itself"),
        ({"base": "gradcam"}, "base: expected one of .*saliency.*; got 'gradcam'"),
        ({"cam": "saliency"}, "cam: expected one of .*gradcam.*; got 'saliency'"),
        ({"layer": "features"}, "guided-gradcam has no option 'layer'"),
        ({"cam": {"name": "gradcam", "steps": 3}}, "gradcam has no parameter 'steps' here"),
        ({"base": {"name": "integrated-gradients", "steps": 0}}, "base: .*greater than or equal to 1"),
    ],
    ids=str,
)
def test_what_belongs_elsewhere_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        build({"name": "guided-gradcam", **options})


@pytest.mark.parametrize(
    ("kind", "layer", "scale"),
    [
        (Residual, "input", "logit"),
        (Residual, "last", "logit"),
        (Capped, "input", "logit"),
        (Capped, "last", "logit"),
        (PooledLinear, "input", "probability"),
        (ByHand, "input", "probability"),
    ],
)
@pytest.mark.parametrize("name", ["deconvnet", "guided-backprop", "guided-gradcam"])
def test_maps_that_depend_on_values_behind_a_rectifier_can_be_differentiated(name, kind, layer, scale):
    """The rule makes the map; what the map depends on changes as the network's own derivative says."""
    net, x = made(kind), images(2, 3, 8, 7)
    base = {} if name == "guided-gradcam" else {"layer": layer}
    score = replace(bound(net, x, [0, 1, 2], [0, 0, 1]), create_graph=True).scaled(scale)
    x.requires_grad_()

    def loss():
        return build({"name": name, **base}).explain(score, x).map.square().sum()

    along, expected, found = slopes_of(loss, [x, *net.parameters()])
    assert found[0].abs().max() > 0
    assert_close(along, expected, rtol=1e-5, atol=1e-12)
