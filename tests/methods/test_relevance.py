"""Relevance reaches operations however a network calls them, leaves nothing behind, and can be differentiated."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from contract import snapshot
from pixels import case
from torch import Tensor, nn
from torch.testing import assert_close
from toys import bound, images

import xcli
from xcli.errors import ModelError
from xcli.methods.propagation.lrp import LRP
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
RULES = {"first": "flat", "convolution": "gamma", "linear": "epsilon"}
X = images(2, 3, 6, 6)


class Spelled(nn.Module):
    """The same parts, called by whatever function it is given."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
            self.fc, self.identity = nn.Linear(4, 3), nn.Identity()
            self.bn.running_mean.normal_(0, 0.3)
            self.bn.running_var.uniform_(0.5, 2)
            self.bn.weight.data.uniform_(0.5, 2)
            self.bn.bias.data.normal_(0, 0.3)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def lrp(net: nn.Module, x: Tensor = X, **options: object):
    spec = {"name": "lrp", "rules": RULES, "reduce": "none", **options}
    return xcli.explain(net, x, spec, target=[0, 1], native=True)


def plain(n: Spelled, x: Tensor) -> Tensor:
    early = n.relu(n.a(x))
    return n.fc(n.relu(n.bn(n.b(early)) + early).mean((2, 3)))


def body(n: Spelled, x: Tensor, relu=F.relu, add=torch.add, norm=None, mean=None) -> Tensor:
    early = relu(n.a(x))
    total = relu(add((norm or n.bn)(n.b(early)), early))
    return n.fc(total.mean((2, 3)) if mean is None else mean(total))


def function(n: Spelled, x: Tensor) -> Tensor:
    early = torch.relu(torch.conv2d(x, n.a.weight, n.a.bias, 1, 1))
    late = F.batch_norm(
        F.conv2d(early, n.b.weight, padding="same"),
        n.bn.running_mean,
        n.bn.running_var,
        n.bn.weight,
        n.bn.bias,
    )
    return F.linear(F.relu(late + early).mean((2, 3)), n.fc.weight, n.fc.bias)


def in_place(n: Spelled, x: Tensor) -> Tensor:
    early = n.a(x)
    early.relu_()
    late = n.bn(n.b(early))
    late += early
    F.relu(late, inplace=True)
    return n.fc(F.adaptive_avg_pool2d(late, 1).flatten(1))


def aten(n: Spelled, x: Tensor) -> Tensor:
    q, bn = torch.ops.aten, n.bn
    early = q.relu_.default(q.conv2d.default(x, n.a.weight, n.a.bias, [1, 1], [1, 1]))
    late = q.conv2d.padding(early, n.b.weight, None, [1, 1], "same")
    late = q.batch_norm.default(
        late, bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, bn.eps, False
    )
    pooled = q.mean.dim(q.relu_.default(q.add_.Tensor(late, early)), [2, 3])
    return q.linear.default(pooled, n.fc.weight, n.fc.bias)


def with_views(n: Spelled, x: Tensor) -> Tensor:
    early = n.relu(n.a(x.contiguous().view(len(x), 3, -1).unflatten(2, (6, 6)).transpose(2, 3).mT))
    halves = torch.cat(early.split(2, 1)[::-1], 1)
    shuffled = F.channel_shuffle(torch.stack(early.unbind(1), 1), 2)
    assert shuffled.shape == halves.shape
    early = torch.cat([halves[:, 2:], halves[:, :2]], 1).flip(0).flip(0)
    late = F.relu(n.bn(F.dropout(n.b(early), training=False)) + early)
    return n.fc(late.flatten(2).mean(2))


def shuffled(n: Spelled, x: Tensor) -> Tensor:
    early = n.relu(n.a(x))
    early = F.channel_shuffle(F.channel_shuffle(early, 2), 2)
    turned = early.reshape(-1, 2, 2, 6, 6).transpose(1, 2).transpose(1, 2).flatten(1, 2)
    return n.fc(n.relu(n.bn(n.b(turned)) + early).mean((2, 3)))


def by_entry(n: Spelled, x: Tensor) -> Tensor:
    early = n.relu(n.a(x))
    whole = torch.zeros(len(x), 4, 6, 6, dtype=x.dtype)
    whole[:, :2] = early[:, :2]
    whole[:, 2:] = early[:, 2:]
    return n.fc(n.relu(n.bn(n.b(whole)) + whole).mean((2, 3)))


SPELLINGS = {
    "relu_": lambda n, x: body(n, x, relu=torch.relu_),
    "Tensor.relu": lambda n, x: body(n, x, relu=Tensor.relu),
    "nn.ReLU in place": lambda n, x: body(n, x, relu=nn.ReLU(inplace=True)),
    "clamp": lambda n, x: body(n, x, relu=lambda h: h.clamp(min=0)),
    "threshold": lambda n, x: body(n, x, relu=lambda h: F.threshold(h, 0, 0)),
    "+": lambda n, x: body(n, x, add=lambda a, b: b + a),
    "add_": lambda n, x: body(n, x, add=Tensor.add_),
    "+=": lambda n, x: body(n, x, add=Tensor.__iadd__),
    "sum of a stack": lambda n, x: body(n, x, add=lambda a, b: torch.stack([a, b]).sum(0)),
    "torch.batch_norm": lambda n, x: body(
        n,
        x,
        norm=lambda h: torch.batch_norm(
            h, n.bn.weight, n.bn.bias, n.bn.running_mean, n.bn.running_var, False, 0.1, n.bn.eps, False
        ),
    ),
    "identities between": lambda n, x: body(n, x, norm=lambda h: n.bn(n.identity(h.contiguous()))),
    "avg_pool2d": lambda n, x: body(n, x, mean=lambda h: F.avg_pool2d(h, 6).flatten(1)),
    "AdaptiveAvgPool2d": lambda n, x: body(n, x, mean=lambda h: nn.AdaptiveAvgPool2d(1)(h)[..., 0, 0]),
    "mean of a mean": lambda n, x: body(n, x, mean=lambda h: h.mean(3, keepdim=True).mean(2).squeeze(-1)),
    "functions": function,
    "in place": in_place,
    "aten": aten,
    "views": with_views,
    "shuffled": shuffled,
    "by entry": by_entry,
    "a copy first": lambda n, x: plain(n, x.clone()),
    "read and asked": lambda n, x: plain(n, x * (1 if float(x.mean()) < 9 and x.max() < 99 else 2)),
}
EQUAL = {"mean of a mean": 1e-3}  # each sum is made safe by itself


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")
@pytest.mark.parametrize("how", SPELLINGS)
def test_maps_do_not_depend_on_how_a_network_calls_its_operations(how):
    net, other = Spelled(plain), Spelled(SPELLINGS[how])
    assert_close(other(X), net(X), **EXACT)
    expected, found = lrp(net).map, lrp(other).map
    peak = float(expected.abs().max())
    assert_close(found, expected, rtol=0, atol=EQUAL.get(how, 1e-10) * peak)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_program_gives_the_same_map():
    net = Spelled(plain)
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(net, (X,), dynamic_shapes={"x": {0: batch}}, strict=False).module()
    assert_close(exported(X), net(X), **EXACT)
    assert_close(lrp(exported).map, lrp(net).map, **EXACT)


def test_what_a_network_does_to_the_picture_first_passes_relevance_on():
    def own(n: Spelled, x: Tensor) -> Tensor:
        x = (x - 0.4) / torch.tensor([0.2, 0.3, 0.4]).double().view(3, 1, 1)
        return plain(n, x)

    def in_place_too(n: Spelled, x: Tensor) -> Tensor:
        x.sub_(0.4)
        x.div_(torch.tensor([0.2, 0.3, 0.4]).double().view(3, 1, 1))
        return plain(n, x)

    inner = (X - 0.4) / torch.tensor([0.2, 0.3, 0.4]).double().view(3, 1, 1)
    expected = lrp(Spelled(plain), inner).map
    for run in (own, in_place_too):
        net = Spelled(run)
        found = LRP(rules=RULES, reduce="none").attribute(bound(net, X, [0, 1]), X)
        assert_close(found.map, expected, **EXACT)


def test_signs_are_those_of_everything_a_tensor_is_made_of():
    def signed(relu):
        def run(n: Spelled, x: Tensor) -> Tensor:
            h = relu(n.a(x))
            h = torch.cat([h[:, :2], torch.full_like(h[:, 2:], -0.7)], 1)
            h = F.pad(h, (1, 1, 1, 1), value=-0.5)
            return n.fc(relu(n.b(h)).mean((2, 3)))

        return Spelled(run)

    # clamp says nothing about signs, so its outputs are looked at as if they could be negative
    expected = lrp(signed(lambda h: h.clamp(min=0)), rules="epsilon-plus").map
    assert_close(lrp(signed(F.relu), rules="epsilon-plus").map, expected, **EXACT)

    def scaled(n: Spelled, x: Tensor) -> Tensor:
        early = F.relu(n.a(x))
        return n.fc(F.relu(n.b(torch.add(early, early, alpha=-2))).mean((2, 3)))

    def minus(n: Spelled, x: Tensor) -> Tensor:
        early = F.relu(n.a(x))
        return n.fc(F.relu(n.b(early - 2 * early)).mean((2, 3)))

    assert_close(
        lrp(Spelled(scaled), rules="epsilon-plus").map, lrp(Spelled(minus), rules="epsilon-plus").map, **EXACT
    )


def test_a_layer_is_joined_with_a_batch_norm_that_reads_its_very_output_alone():
    def both(n: Spelled, x: Tensor) -> Tensor:
        h = n.a(x)
        return n.fc((F.relu(n.bn(h)) + F.relu(h)).mean((2, 3)))

    def twice(n: Spelled, x: Tensor) -> Tensor:
        return n.fc((F.relu(n.bn(n.a(x))) + F.relu(n.a(x))).mean((2, 3)))

    assert_close(lrp(Spelled(both)).map, lrp(Spelled(twice)).map, **EXACT)


def test_features_of_tokens_are_no_channels():
    net = nn.Sequential(
        nn.Flatten(2), nn.Linear(36, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)
    )
    net[2].running_var.copy_(torch.tensor([0.2, 1.0, 3.0]))
    net = net.double().eval().requires_grad_(False)
    apart = nn.Sequential(net[0], net[1], nn.Unflatten(1, (3, 1)), nn.Flatten(1, 2), *net[2:])
    assert_close(lrp(net, rules="epsilon").map, lrp(apart, rules="epsilon").map, **EXACT)


def test_statistics_of_the_batch_are_refused():
    def run(n: Spelled, x: Tensor) -> Tensor:
        return n.fc(F.relu(F.batch_norm(n.a(x), None, None, training=True)).mean((2, 3)))

    with pytest.raises(ModelError, match="batch_norm, which takes the statistics of the batch"):
        lrp(Spelled(run))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda n, x: n.fc((n.a(x) * n.a(x)).mean((2, 3))),
            "the network itself calls mul, which multiplies two",
        ),
        (
            lambda n, x: n.fc(F.conv2d(n.a(x), n.a(x)[:1]).mean((2, 3))[:, [0] * 4]),
            "calls conv2d, which multiplies",
        ),
        (lambda n, x: n.fc(n.a(x).softmax(1).mean((2, 3))), "calls softmax, which divides by a sum"),
        (lambda n, x: n.fc((2 / n.a(x)).mean((2, 3))), "calls rdiv, which is not known here"),
        (
            lambda n, x: n.fc(F.layer_norm(n.a(x), (6,)).mean((2, 3))),
            "calls layer_norm, which divides by a stat",
        ),
    ],
)
def test_what_has_no_rule_is_refused_with_what_to_do(run, message):
    with pytest.raises(ModelError, match=f"lrp: .*{message}.*; attnlrp has .*integrated-gradients"):
        lrp(Spelled(run))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("mobilenet_v3_small", "features.1.block.1"),
        pytest.param("vit_b_16", "encoder.layers.encoder_layer_0.", marks=pytest.mark.soak),
    ],
)
def test_refusals_name_the_module(name, module):
    with pytest.raises(ModelError, match=f"module '{module}"):
        LRP().looks_at(case(name).score.layers)


# ---- nothing is left behind ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_activations_do_not_outlive_a_pass(fails):
    kept: list[weakref.ref] = []
    failing = [False]

    def run(n: Spelled, x: Tensor) -> Tensor:
        early = n.relu(n.a(x))
        late = n.relu(n.bn(n.b(early)))
        kept.extend(map(weakref.ref, (early, late)))
        if failing[0]:
            raise ZeroDivisionError
        return n.fc((late + early).mean((2, 3)))

    net = Spelled(run)
    score, method = bound(net, X, [0, 1]), LRP(rules=RULES)
    before = snapshot(net)
    kept.clear()
    failing[0] = fails
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        method.attribute(score, X)
    gc.collect()
    assert len(kept) == 2
    assert [ref() for ref in kept] == [None, None]
    assert snapshot(net) == before
    assert F.relu(X.clone().requires_grad_()).grad_fn.name().startswith("Relu")


def test_what_goes_into_an_activation_is_not_kept():
    kept: dict[str, weakref.ref] = {}
    alive: list[bool] = []

    def run(n: Spelled, x: Tensor) -> Tensor:
        h = n.a(x)
        kept["before"] = weakref.ref(h.untyped_storage())
        h = F.relu(h)
        h = F.relu(n.b(h))
        alive.append(kept["before"]() is not None)
        return n.fc(h.mean((2, 3)))

    score = bound(Spelled(run), X, [0, 1])
    alive.clear()
    LRP(rules={"first": "flat", "convolution": "z+", "linear": "epsilon"}).attribute(score, X)
    assert alive == [False]


# ---- maps that are differentiated in turn ----------------------------------------------------------------------


class Smooth(nn.Module):
    """Convolutions, a batch norm, a residual sum, twice the same tensor; differentiable as often as one likes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.bn.running_mean.normal_(0, 0.3)
        self.double().eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.bn(self.a(x)))
        h = F.pad(self.b(h), (1, 1, 1, 1)) + h
        h = F.softplus(h)
        return self.fc((h + h).mean((2, 3)))


TWICE = {
    "z+": "epsilon-plus",
    "epsilon": {"convolution": {"epsilon": 0.1}, "linear": {"epsilon": 0.1}},
    "gamma": {"first": "z-box", "convolution": "gamma", "linear": {"epsilon": 0.1}},
    "alpha-beta": {"first": "w2", "convolution": "alpha-beta", "linear": {"epsilon": 0.1}},
}


def numerical(of: Callable[[Tensor], Tensor], at: Tensor, places: list[int], step: float = 1e-6) -> Tensor:
    found = []
    for place in places:
        move = torch.zeros(at.numel(), dtype=at.dtype)
        move[place] = step
        found.append((of(at + move.view_as(at)) - of(at - move.view_as(at))) / (2 * step))
    return torch.stack(found)


@pytest.mark.parametrize("rules", TWICE)
@pytest.mark.parametrize("layer", ["input", "a", "bn"])
def test_the_derivative_of_a_map_is_the_numerical_one(rules, layer):
    net, x, w = Smooth(), images(1, 3, 5, 5), images(1, 1, 5, 5, seed=4)
    spec = {"name": "lrp", "rules": TWICE[rules], "reduce": "none", "box": [-4, 4], "layer": layer}

    def loss(x: Tensor, graph: bool = False) -> Tensor:
        return (xcli.explain(net, x, spec, target=0, native=True, create_graph=graph).map * w).sum()

    asking = x.clone().requires_grad_()
    value = loss(asking, True)
    assert_close(value.detach(), loss(x), **EXACT)
    (found,) = torch.autograd.grad(value, asking)
    places = [0, 17, 40, 61]
    expected = numerical(loss, x, places)
    assert expected.abs().max() > 1e-4
    assert_close(found.flatten()[places], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))

    weight = net.a.weight
    weight.requires_grad_()
    (found,) = torch.autograd.grad(loss(x, True), weight)
    held = weight.data.clone()

    def moved(value: Tensor) -> Tensor:
        weight.data.copy_(value)
        return loss(x)

    expected = numerical(moved, held, places)
    weight.data.copy_(held)
    assert_close(found.flatten()[places], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_a_sum_of_a_tensor_and_what_was_made_of_it_keeps_its_map():
    net, x = case("shapes-cnn").net, case("shapes-cnn").x[:1]
    spec = {"name": "lrp", "rules": "epsilon", "reduce": "none"}
    whole = xcli.explain(net, x, spec, target=1).map
    again = xcli.explain(net, x.clone().requires_grad_(), spec, target=1, create_graph=True).map
    assert_close(again.detach(), whole, **EXACT)


def test_a_table_is_one_method_for_all_its_spellings():
    assert build({"name": "lrp", "rules": dict(RULES)}) == LRP(rules=RULES)


# ---- what a model returns --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    hidden: Tensor


class Plain:
    """An object with fields."""

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        self.logits, self.hidden = logits, hidden


class Listed(list):
    """No list to PyTorch."""


RETURNS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple": lambda logits, hidden: (logits, hidden),
    "list": lambda logits, hidden: Listed([logits, hidden]),
    "dict": lambda logits, hidden: {"hidden": hidden, "logits": logits},
    "mapping": lambda logits, hidden: UserDict(hidden=hidden, logits=logits),
    "dataclass": Answer,
    "object": Plain,
}


@pytest.mark.parametrize("kind", RETURNS)
def test_relevance_starts_as_the_logits_whatever_a_model_returns(kind):
    def run(n: Spelled, x: Tensor) -> object:
        logits = plain(n, x)
        return RETURNS[kind](logits, logits.detach()[..., None])

    expected, found = lrp(Spelled(plain)), lrp(Spelled(run))
    assert_close(found.map, expected.map, **EXACT)
    assert_close(found.extras["conservation"], expected.extras["conservation"], **EXACT)


# ---- numbers that a network writes itself ----------------------------------------------------------------------


def below(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = -1
    return h


@pytest.mark.parametrize(
    "bring",
    [
        below,
        lambda h: torch.constant_pad_nd(h, (1, 1, 1, 1), -1),
        lambda h: torch.ops.aten.constant_pad_nd.default(h, [1, 1, 1, 1], -1),
        lambda h: F.pad(h, (1, 1, 1, 1), value=-1),
        lambda h: torch.cat([h[:, 1:], torch.full_like(h[:, :1], -1, dtype=torch.int64)], 1),
    ],
    ids=["setitem", "constant_pad_nd", "aten", "pad", "cat"],
)
def test_whole_numbers_can_be_negative_too(bring):
    def net(relu: Callable[[Tensor], Tensor]) -> Spelled:
        return Spelled(lambda n, x: n.fc(F.relu(n.b(bring(relu(n.a(x))))).mean((2, 3))))

    expected = lrp(net(lambda h: h.clamp(min=0)), rules="epsilon-plus").map
    assert_close(lrp(net(F.relu), rules="epsilon-plus").map, expected, **EXACT)


def forgotten(n: Spelled, x: Tensor) -> Tensor:
    y = n.fc(F.relu(n.a(x)).mean((2, 3)))
    y.mul_(0.01)
    F.relu_(y)
    return y


def kept(n: Spelled, x: Tensor) -> Tensor:
    return F.relu(n.fc(F.relu(n.a(x)).mean((2, 3))) * 0.01)


@pytest.mark.parametrize("method", ["lrp", "attnlrp", "deeplift", "excitation-backprop"])
def test_outputs_that_are_changed_in_place_at_the_very_end_are_what_they_became(method):
    expected, found = (xcli.explain(Spelled(run), X, method, target=[0, 1]) for run in (kept, forgotten))
    assert_close(found.map, expected.map, rtol=1e-10, atol=1e-14)


def test_a_keyword_does_not_hide_a_change_in_place():
    def run(n: Spelled, x: Tensor) -> Tensor:
        h = n.a(x)
        F.relu(input=h, inplace=True)
        return n.fc(h.mean((2, 3)))

    assert_close(lrp(Spelled(run)).map, lrp(Spelled(lambda n, x: n.fc(F.relu(n.a(x)).mean((2, 3))))).map)


@pytest.mark.parametrize("method", ["lrp", "attnlrp", "deeplift"])
def test_a_buffer_that_is_written_through_a_view_is_refused(method):
    def run(n: Spelled, x: Tensor) -> Tensor:
        h = F.relu(n.a(x))
        room = torch.zeros_like(h)
        room[:, :2][:] = h[:, :2]
        return n.fc((room + 0).mean((2, 3)) + h.mean((2, 3)))

    with pytest.raises(ModelError, match="changes a tensor in place and hands a view of it"):
        xcli.explain(Spelled(run), X, method, target=[0, 1])
