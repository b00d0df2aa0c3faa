"""Probability handed down: against matrices, zennit and TorchRay's definition, and what of it is lost where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import contract
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pixels import TARGETS as CLASSES
from pixels import case
from torch import Tensor, nn
from torch.testing import assert_close
from toys import bound, images, made
from zennit.composites import ExcitationBackprop as Composite

from xcli.demo import nets
from xcli.demo.scenes import scene
from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.hooks import frozen
from xcli.layers import survey
from xcli.methods.base import Method
from xcli.methods.propagation.excitation import ContrastiveExcitationBackprop, ExcitationBackprop
from xcli.registry import build

TARGETS = [1, 0, 2]
METHODS = (ExcitationBackprop, ContrastiveExcitationBackprop)


def explained(method: Method, net: nn.Module, x: Tensor, targets: list[int] | None = None) -> Tensor:
    with frozen(net):
        return method.explain(bound(net, x, targets or TARGETS), x).map


def arrived(layer: str, net: nn.Module, x: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    with frozen(net):
        found = ExcitationBackprop(layer=layer, **options).explain(bound(net, x, TARGETS), x)
    return found.map, found.extras["probability"]


# ---- the definition, as matrices -------------------------------------------------------------------------------


def winner(count: int, targets: list[int] | None = None) -> Tensor:
    return F.one_hot(torch.tensor(targets or TARGETS), count).double()


class Handing:
    """Hands p down by the formula with the matrix of each linear map written out; adds up what is ``lost``."""

    def __init__(self) -> None:
        self.lost = torch.zeros(3, dtype=torch.float64)

    def __call__(self, linear: Callable[[Tensor], Tensor], x: Tensor, p: Tensor, sign: float = 1.0) -> Tensor:
        basis = torch.eye(x[0].numel(), dtype=x.dtype).view(-1, *x.shape[1:])
        weight = sign * (linear(basis) - linear(torch.zeros_like(basis))).flatten(1)  # (I, J)
        weight, excited = weight.clamp(min=0), x.flatten(1).clamp(min=0)
        z = torch.einsum("ij,ni->nj", weight, excited)
        share = torch.where(z > 0, p.flatten(1) / z, 0)
        self.lost += torch.where(z > 0, 0, p.flatten(1)).sum(1)
        return torch.einsum("ni,ij,nj->ni", excited, weight, share).view_as(x)


class Chain(nn.Module):
    """Every operation that a plain network has, one behind the other."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=bias)
        self.act1 = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(5, 6, 3, stride=1, padding=1, groups=1, bias=bias)
        self.act2 = nn.ReLU(inplace=True)
        self.mean = nn.AvgPool2d(2)
        self.fc1 = nn.Linear(24, 7, bias=bias)
        self.drop = nn.Dropout()
        self.fc2 = nn.Linear(7, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mean(self.act2(self.conv2(self.pool(self.act1(self.conv1(x))))))
        return self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))


CHAIN = ("fc1", "mean", "conv2", "pool")


def chain_handed(
    net: Chain, x: Tensor, hand: Handing, sign: float = 1.0, less: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """p at each place of a chain; ``less`` is taken from it on the way."""
    less, p = less or {}, {}

    def put(name: str, value: Tensor) -> Tensor:
        p[name] = value - less.get(name, torch.zeros_like(value))
        return p[name]

    h1 = net.conv1(x).relu()
    pooled, index = F.max_pool2d(h1, 2, return_indices=True)
    h2 = net.conv2(pooled).relu()
    mean = F.avg_pool2d(h2, 2)
    h3 = net.fc1(mean.flatten(1)).relu()
    down = put("fc1", hand(net.fc2, h3, winner(4), sign))
    down = put("mean", hand(net.fc1, mean.flatten(1), down).view_as(mean))
    down = put("conv2", hand(lambda v: F.avg_pool2d(v, 2), h2, down))
    down = put("pool", hand(net.conv2, pooled, down))
    down = put(
        "conv1", torch.zeros_like(h1).flatten(2).scatter(2, index.flatten(2), down.flatten(2)).view_as(h1)
    )
    put("input", hand(net.conv1, x, down))
    return p


class Branched(nn.Module):
    """A batch norm, a layer that is called twice, a residual sum in place before its ReLU, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        )
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.running_mean)
        self.twice = nn.Conv2d(4, 4, 1)
        self.end = nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = self.act(self.norm(self.stem(x)))
        late = self.twice(F.relu(self.twice(early)))
        late += early
        late = self.end(F.relu(late))
        return self.head(torch.cat([late, F.avg_pool2d(late, 3, 1, 1)], 1).mean((2, 3)))


def branched_handed(net: Branched, x: Tensor, hand: Handing) -> dict[str, Tensor]:
    early = net.norm(net.stem(x)).relu()
    inner = net.twice(early).relu()
    branch = net.twice(inner)
    late = (branch + early).relu()
    both = torch.cat([late, F.avg_pool2d(late, 3, 1, 1)], 1)
    p = hand(lambda v: v.mean((2, 3)), both, hand(net.head, both.mean((2, 3)), winner(4)))
    end = p[:, :4] + hand(lambda v: F.avg_pool2d(v, 3, 1, 1), late, p[:, 4:])
    total = branch.clamp(min=0) + early
    ends, skipped = (torch.where(total > 0, end * one / total, 0) for one in (branch.clamp(min=0), early))
    down = skipped + hand(net.twice, early, hand(net.twice, inner, ends))
    return {"end": end, "act": down, "input": hand(lambda v: net.norm(net.stem(v)), x, down)}


def forced(net: nn.Module) -> nn.Module:
    """Some units driven by their bias alone."""
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                part.weight[0].abs_().neg_()
                part.bias[0] = 3.0
    return net


@pytest.mark.parametrize("change", [nn.Module.eval, forced])
def test_a_chain_is_that_of_matrices_and_says_what_is_lost(change):
    net, x = change(made(Chain)), images(3, 3, 8, 8)
    hand = Handing()
    with torch.no_grad():
        p = chain_handed(net, x, hand)
    for layer in ("input", "conv1", "pool", "conv2", "mean"):
        found, total = arrived(layer, net, x)
        assert_close(found, p[layer].sum(1), rtol=1e-12, atol=1e-14)
        assert_close(total, p[layer].flatten(1).sum(1), rtol=1e-12, atol=1e-14)
        assert not found.requires_grad
    assert_close(arrived("input", net, x)[1], 1 - hand.lost)
    assert (hand.lost > 1e-3).any()


@pytest.mark.parametrize("change", [nn.Module.eval, forced])
def test_branches_are_those_of_matrices_and_say_what_is_lost(change):
    net, x = change(made(Branched)), images(3, 3, 6, 5)
    hand = Handing()
    with torch.no_grad():
        p = branched_handed(net, x, hand)
    for layer, expected in p.items():
        assert_close(arrived(layer, net, x)[0], expected.sum(1), rtol=1e-12, atol=1e-14)
    assert_close(arrived("input", net, x)[1], 1 - hand.lost)


def test_a_batch_norm_that_passes_probability_on_leaves_the_sign_of_weights_alone():
    net, x = made(Branched), images(3, 3, 6, 5)
    assert (net.norm.weight < 0).any()  # a positive scale cancels
    with torch.no_grad():
        p = branched_handed(net, x, Handing())
        expected = Handing()(net.stem, x, p["act"]).sum(1)
    found, _ = arrived("input", net, x, norms="passed")
    assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (found - p["input"].sum(1)).abs().max() > 0.01


def test_probability_is_one_at_every_layer_where_nothing_is_negative_and_no_bias_works():
    net, x = made(lambda: Chain(bias=False)), images(3, 3, 8, 8).abs()
    for layer in ("input", "conv1", "act1", "pool", "conv2", "act2", "mean"):
        assert_close(arrived(layer, net, x)[1], torch.ones(3).double(), rtol=1e-12, atol=0)
    branched = made(Branched)
    with torch.no_grad():  # batch norms that take nothing away
        branched.norm.running_mean.zero_(), branched.norm.weight.abs_()
        branched.stem.bias.zero_(), branched.twice.bias.zero_()
    for layer in ("input", "act", "end"):
        assert_close(arrived(layer, branched, x)[1], torch.ones(3).double(), rtol=1e-12, atol=0)


# ---- networks of blocks, as functions --------------------------------------------------------------------------


class Blocks:
    """p handed down a network of residual blocks of two convolutions, without our mechanism.

    ``ours``: batch norms joined with layers, positive parts; else TorchRay's definition.
    """

    def __init__(self, ours: bool) -> None:
        self.ours, self.lost = ours, 0.0

    def part(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) if self.ours else x

    def hand(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, p: Tensor) -> Tensor:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt() if self.ours else torch.ones(1).to(x)
        weight = (conv.weight * scale.view(-1, 1, 1, 1)).clamp(min=0)
        z, back = torch.func.vjp(lambda v: F.conv2d(v, weight, None, conv.stride, conv.padding), self.part(x))
        if self.ours:
            self.lost = self.lost + torch.where(z == 0, p, 0).flatten(1).sum(1)
        return self.part(x) * back(torch.where(z == 0, 0, p / z) if self.ours else p / (z + 1e-20))[0]

    def block(self, block: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        side = next(
            (getattr(block, name) for name in ("shortcut", "downsample") if hasattr(block, name)), None
        )
        side = side if isinstance(side, nn.Sequential) else None
        inner = block.bn1(block.conv1(x)).relu()
        branch, skipped = block.bn2(block.conv2(inner)), x if side is None else side(x)
        total = self.part(branch) + self.part(skipped)

        def down(p: Tensor) -> Tensor:
            ends = [torch.where(total == 0, 0, p * self.part(one) / total) for one in (branch, skipped)]
            found = self.hand(block.conv1, block.bn1, x, self.hand(block.conv2, block.bn2, inner, ends[0]))
            return found + (ends[1] if side is None else self.hand(side[0], side[1], x, ends[1]))

        return (branch + skipped).relu(), down

    def run(self, blocks: dict[str, nn.Module], x: Tensor, head: nn.Linear, targets: list[int], sign: float):
        """p at the input of each block, and behind the last."""
        backs = []
        for name, block in blocks.items():
            x, down = self.block(block, x)
            backs.append((name, down))
        excited = self.part(x).mean((2, 3))
        weight = (sign * head.weight[targets]).clamp(min=0)
        p = excited * weight / (excited * weight).sum(1, keepdim=True)
        p = p[:, :, None, None] * self.part(x) / (excited[:, :, None, None] * x[0, 0].numel())
        found = {"last": torch.where(x == 0, 0, p)}
        for name, down in reversed(backs):
            found[name] = down(list(found.values())[-1])
        return found


def blocks_of(name: str) -> tuple[nn.Module, nn.Module, dict[str, nn.Module], nn.Linear, list[str]]:
    """A network, the part before its blocks, those, its head, and some of the blocks."""
    net = case(name).net
    if name == "shapes-cnn":
        places = ["stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1"]
        return net, net.stem, {place: net.get_submodule(place) for place in places}, net.head, places
    front = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    places = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    return net, front, {place: net.get_submodule(place) for place in places}, net.fc, places[1:6:2]


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("shapes-cnn", "paper"),
        ("resnet18", "torchray"),
        pytest.param("shapes-cnn", "torchray", marks=pytest.mark.soak),
        pytest.param("resnet18", "paper", marks=pytest.mark.soak),
    ],
)
def test_networks_of_blocks(name, preset):
    net, front, blocks, head, places = blocks_of(name)
    if name == "shapes-cnn":
        x, targets = contract.pictures((64, 48))[[1, 2, 3]], [9, 1, 0]
    else:
        x, targets = case(name).x, TARGETS
    ours = Blocks(ours=preset == "paper")
    with torch.no_grad():
        p = ours.run(blocks, front(x), head, targets, 1.0)
        against = Blocks(ours=preset == "paper").run(blocks, front(x), head, targets, -1.0)
    score = bound(net, x, targets)
    following = dict(zip(blocks, [*list(blocks)[1:], "last"], strict=True))
    for place in places:  # what a block gives, the next one is given
        after = following[place]
        plain, contrastive = (
            build({"name": cls.name, "layer": place, "preset": preset}).explain(score, x) for cls in METHODS
        )
        assert_close(plain.map, p[after].sum(1), rtol=1e-8, atol=1e-12)
        assert_close(contrastive.map, (p[after] - against[after]).sum(1).relu(), rtol=1e-8, atol=1e-12)
    if preset == "paper":
        stem = ExcitationBackprop(layer="stem" if name == "shapes-cnn" else "maxpool").explain(score, x)
        assert_close(stem.extras["probability"], 1 - ours.lost, rtol=1e-10, atol=0)
        assert (ours.lost < 0.02).all()
    if name == "shapes-cnn" and preset == "paper":
        assert (ours.lost > 1e-4).all()  # units that a bias alone makes positive
        total = ExcitationBackprop(layer="stages").explain(score, x).extras["probability"]
        assert_close(total, torch.ones(3).double(), rtol=1e-12, atol=0)


def test_zennits_composite_on_a_chain_without_biases():
    given, layers = case("vgg11"), {"features.3": "paper", "features.14": "torchray"}
    net, score = given.peer, given.score
    kept = {}
    with Composite(stabilizer=1e-30, zero_params=["bias"]).context(net) as ready:
        for layer in layers:
            part = ready.get_submodule(layer)
            part.register_forward_hook(lambda *seen, layer=layer: kept.update({layer: seen[-1]}))
        out = ready(given.x.clone().requires_grad_())
        expected = torch.autograd.grad(out, list(kept.values()), winner(10, CLASSES))
    for layer, grad in zip(kept, expected, strict=True):
        method = build({"name": "excitation-backprop", "layer": layer, "preset": layers[layer]})
        assert_close(method.explain(score, given.x).map, grad.sum(1), rtol=1e-8, atol=1e-14)


# ---- the contrastive form --------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", CHAIN)
def test_the_contrast_can_be_taken_at_any_layer(contrast):
    net, x = made(Chain), images(3, 3, 8, 8)
    with torch.no_grad():
        against = chain_handed(net, x, Handing(), -1.0)
        p = chain_handed(net, x, Handing(), less={contrast: against[contrast]})
    for layer in ("input", "conv1", "pool", "conv2", "mean")[: 5 - max(0, CHAIN.index(contrast) - 1)]:
        found = explained(ContrastiveExcitationBackprop(layer=layer), net, x)
        assert_close(found, p[layer].sum(1).relu(), rtol=1e-11, atol=1e-14)
    assert (found > 0).any()
    assert (found == 0).any()


class Ends(nn.Module):
    """Ends of networks whose classifier is not simply the last module."""

    def __init__(self, kind: str = "module") -> None:
        super().__init__()
        self.kind = kind
        self.front = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.head, self.box = nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.front(x)
        pooled = seen.mean((2, 3))
        weight, bias = self.head.weight, self.head.bias
        match self.kind:
            case "function":
                return F.linear(pooled, weight, bias)
            case "boxes":
                logits = self.head(pooled)
                return {"logits": logits, "boxes": self.box(pooled)}
            case "convolution":
                return F.conv2d(pooled[:, :, None, None], weight[:, :, None, None], bias).flatten(1)
            case "shared":
                return self.box(self.box(pooled).relu())
            case "turned":
                return self.head(pooled).relu() * 2 + 1
            case "matrix":
                return pooled @ weight.t() + bias
        return self.head(pooled)


def ended(kind: str) -> nn.Module:
    return made(lambda: Ends(kind))


@pytest.mark.parametrize("kind", ["function", "boxes", "convolution"])
def test_the_classifier_is_found_however_it_is_called(kind):
    x = images(3, 3, 6, 6)
    expected = explained(ContrastiveExcitationBackprop(layer="front"), ended("module"), x)
    found = explained(ContrastiveExcitationBackprop(layer="front"), ended(kind), x)
    assert (expected > 0).any()
    assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_only_the_last_call_of_a_shared_layer_is_the_classifier():
    net, x = ended("shared"), images(3, 3, 6, 6)
    with torch.no_grad():
        seen = net.front(x)
        pooled = seen.mean((2, 3))
        inner, hand = net.box(pooled).relu(), Handing()
        down = hand(net.box, inner, winner(6)) - hand(net.box, inner, winner(6), -1.0)
        expected = hand(lambda v: v.mean((2, 3)), seen, hand(net.box, pooled, down)).sum(1).relu()
    assert_close(
        explained(ContrastiveExcitationBackprop(layer="front"), net, x), expected, rtol=1e-11, atol=1e-14
    )


def test_a_classifier_that_has_no_opposite_or_is_not_behind_the_layer_is_refused():
    x = images(3, 3, 6, 6)
    with pytest.raises(
        ModelError, match="contrastive-.*: the logits are a product with constants.*; use excit"
    ):
        explained(ContrastiveExcitationBackprop(layer="front"), ended("matrix"), x)
    convolved = made(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(
        ModelError, match="contrastive-.*: no layer with weights comes between '0' and .*; name an ear"
    ):
        explained(ContrastiveExcitationBackprop(layer="0"), convolved, x)


def test_contrast_follows_the_class():
    net = nets.load("shapes-cnn").double().eval().requires_grad_(False)
    drawn = [scene(np.random.default_rng((5, i)), objects=2, size=64) for i in range(20)]
    x = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2).double()
    masks = torch.from_numpy(np.stack([one.masks for one in drawn])).double()  # (20, 2, H, W)
    kinds = [kind for one in drawn for kind in one.kinds]
    x = (x / 255 - 0.5) / 0.25
    score = contract.score_of(net, x, [i for i in range(20) for _ in range(2)], kinds)
    energy = []
    for cls in METHODS:
        map = cls().explain(score, x, (64, 64)).map.unflatten(0, (20, 2))
        energy.append(torch.einsum("nrhw,nkhw->nrk", map, masks) / map.sum((2, 3))[..., None])
    plain, contrastive = (one.diagonal(dim1=1, dim2=2).mean() for one in energy)
    assert contrastive > plain + 0.1  # 0.35 and 0.22, of objects that cover 0.04
    plain, contrastive = (
        one.flip(2).diagonal(dim1=1, dim2=2).mean() for one in energy
    )  # in the other object
    assert contrastive < plain
    assert (energy[1] > energy[0]).diagonal(dim1=1, dim2=2).double().mean() > 0.85


# ---- what is constant, what is not -----------------------------------------------------------------------------


class Shifted(nn.Module):
    """Constants that are added to activations, in every way that a network may come by them."""

    def __init__(self, kind: str = "none") -> None:
        super().__init__()
        self.kind = kind
        self.front = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.place = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.register_buffer("held", torch.rand(1, 4, 1, 1) / 100)
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        match self.kind:
            case "parameter":
                x = x + self.place
            case "made of buffers":
                x = x + self.held.sqrt() * self.place.view(1, 4, 1, 1)
            case "number":
                x = x + 3
            case "made on the way":
                x = torch.ones(4, dtype=x.dtype, device=x.device)[:, None, None] + x
            case "less":
                x = x - self.held
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["parameter", "made of buffers", "number", "made on the way", "less"])
def test_constants_that_are_added_get_nothing(kind):
    net, x = made(lambda: Shifted(kind)), images(3, 3, 6, 6)
    with torch.no_grad():
        net.head.weight.abs_()
    method, one = ExcitationBackprop(layer="front"), torch.ones(3).double()
    with frozen(net):
        score = bound(net, x, TARGETS)
        assert_close(method.explain(score, x).extras["probability"], one, rtol=1e-12, atol=0)
        whole = method.explain(replace(score, create_graph=True), x)
    assert_close(whole.extras["probability"], one, rtol=1e-12, atol=0)


class Bypassed(nn.Module):
    """A layer in one of two branches: the other has no graph where that layer is explained."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.inner = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.gate, self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x).relu()
        return self.head((x + self.gate(self.inner(x).relu())).mean((2, 3)))


def test_a_layer_in_a_branch_has_the_share_of_its_branch():
    net, x = made(Bypassed), images(3, 3, 6, 6)
    with torch.no_grad():
        for part in (net.inner, net.gate[0], net.head):
            part.weight.abs_()
        early = net.front(x).relu()
        late, hand = net.gate(net.inner(early).relu()), Handing()
        p = hand(
            lambda v: v.mean((2, 3)), early + late, hand(net.head, (early + late).mean((2, 3)), winner(4))
        )
        expected = torch.where(late > 0, p * late / (early + late), 0)
    found, total = arrived("gate", net, x)
    assert_close(found, expected.sum(1), rtol=1e-12, atol=1e-14)
    assert (total < 1).all()
    assert (total > 0).all()
    with frozen(net):
        whole = (
            ExcitationBackprop(layer="gate")
            .explain(replace(bound(net, x, TARGETS), create_graph=True), x)
            .map
        )
    assert_close(whole.detach(), found, rtol=1e-12, atol=1e-14)


def test_a_product_with_constants_is_a_layer_by_their_positive_parts():
    x = images(3, 3, 6, 6)
    found, expected = (
        explained(ExcitationBackprop(layer="front"), ended(k), x) for k in ("matrix", "module")
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_row_without_anything_positive_is_lost_and_not_infinite():
    net, x = ended("module"), images(3, 3, 6, 6)
    with torch.no_grad():
        net.head.weight[1].abs_().neg_()
    found, total = arrived("front", net, x)
    assert_close(total, torch.tensor([0.0, 1, 1]).double())
    assert (found[0] == 0).all()
    contrast = explained(ContrastiveExcitationBackprop(layer="front"), net, x)
    assert (contrast[0] == 0).all()
    assert (contrast[1:] > 0).any()
    black = explained(
        ExcitationBackprop(layer="input"), made(lambda: Chain(bias=False)), x.new_zeros(3, 3, 8, 8)
    )
    assert (black == 0).all()


# ---- numbers ---------------------------------------------------------------------------------------------------


def test_the_size_of_activations_does_not_matter_in_float32_until_they_are_nothing():
    net = made(lambda: Chain(bias=False))
    x = images(3, 3, 8, 8)
    expected, single = explained(ExcitationBackprop(layer="conv1"), net, x), net.float()
    for scale in (1.0, 1e-12, 1e12):
        found = explained(ExcitationBackprop(layer="conv1"), single, (scale * x).float())
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    nothing = explained(ExcitationBackprop(layer="conv1"), single, (1e-30 * x).float())
    assert torch.isfinite(nothing).all()


@pytest.mark.parametrize("cls", METHODS)
def test_half_precision(cls):
    net, x = made(Branched).float(), images(3, 3, 8, 8).float()
    score = bound(net, x, TARGETS)
    with frozen(net):
        whole = cls(layer="act").explain(score, x)
        half = cls(layer="act").explain(replace(score, execution=Execution(precision=torch.bfloat16)), x)
    assert half.map.dtype == torch.float32
    assert_close(half.map, whole.map, rtol=0.1, atol=0.01)
    for name, value in whole.extras.items():
        assert_close(half.extras[name], value, rtol=0.05, atol=0)


def test_rows_of_an_image_do_not_touch_each_other():
    net, x = made(Branched), images(3, 3, 6, 5)
    rows, classes = [0, 0, 0, 1, 2, 2], [1, 3, 0, 2, 2, 1]
    with frozen(net):
        for cls in METHODS:
            whole = cls(layer="act").explain(bound(net, x, classes, rows), x).map
            for row, (image, target) in enumerate(zip(rows, classes, strict=True)):
                own = x[image : image + 1]
                alone = cls(layer="act").explain(bound(net, own, [target]), own).map[0]
                assert_close(whole[row], alone, rtol=1e-11, atol=1e-14)


def test_another_score_is_the_sum_of_the_logits_maps_by_its_gradient():
    net, x = made(Branched), images(3, 3, 6, 5)
    with frozen(net):
        rival = net(x).scatter(1, torch.tensor(TARGETS)[:, None], float("-inf")).argmax(1).tolist()
        found = ExcitationBackprop(layer="act").explain(bound(net, x, TARGETS).scaled("contrast"), x)
    own, other = (explained(ExcitationBackprop(layer="act"), net, x, t) for t in (TARGETS, rival))
    assert_close(found.map, own - other, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("preset", ["paper", "torchray"])
def test_maps_can_be_differentiated(cls, preset):
    net, x = made(Branched), images(3, 3, 6, 5)
    way = images(3, 3, 6, 5, seed=1)
    method = build({"name": cls.name, "layer": "act", "preset": preset})

    def loss(x: Tensor) -> Tensor:
        return (
            method.explain(replace(bound(net, x.detach(), TARGETS), create_graph=True), x).map.square().sum()
        )

    with frozen(net):
        at = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(at), at)
        step = 1e-6
        slope = (loss(x + step * way) - loss(x - step * way)) / (2 * step)
    assert_close((grad * way).sum(), slope.detach(), rtol=1e-5, atol=1e-9)


# ---- layers and refusals ---------------------------------------------------------------------------------------


def test_the_layer_is_one_grid_finer_than_the_default_one():
    for name, layers in {
        "vgg11": ("features.14", "features.9"),
        "resnet18": ("layer2", "layer1"),
        "shapes-cnn": ("stages.0", "stem"),
    }.items():
        known = survey(case(name).net, case(name).x[:1])
        assert ExcitationBackprop().pinned(known).layer == layers[0]
        assert ExcitationBackprop(layer="auto:3").pinned(known).layer == layers[1]
        assert ExcitationBackprop(layer="auto").pinned(known).layer == known.default.name
        assert (
            ExcitationBackprop().pinned(known, ["stem"] if name == "shapes-cnn" else [layers[1]]).layer
            == layers[1]
        )


def test_needs():
    assert ExcitationBackprop().needs == {"gradients", "layer"}
    assert ExcitationBackprop(layer="input").needs == {"gradients"}
    assert build({"name": "excitation-backprop", "preset": "torchray"}).needs == {
        "gradients",
        "layer",
        "structure",
    }


class Odd(nn.Module):
    """A network that does one thing without a rule."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.front, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x).relu()
        pooled = x.mean((2, 3))
        match self.kind:
            case "mul":
                x = x * pooled.sigmoid()[:, :, None, None]
            case "rsub":
                x = 1 - x
            case "sub":
                x = x - pooled[:, :, None, None]
            case "softmax":
                x = x.softmax(1)
            case "layer_norm":
                x = F.layer_norm(x, x.shape[2:])
        if self.kind == "linear":
            return F.linear(pooled, pooled.expand(4, 4))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("kind", ["mul", "rsub", "sub", "softmax", "layer_norm", "linear"])
def test_what_has_no_rule_is_refused_by_name(kind, cls):
    net, x = made(lambda: Odd(kind)), images(3, 3, 6, 6)
    with pytest.raises(ModelError, match=rf"^{cls.name}: the network itself calls {kind}, which .*; attnlrp"):
        cls(layer="front").pinned(survey(net, x[:1]))


def test_several_layers_are_refused():
    net, x = made(Chain), images(3, 3, 8, 8)
    with pytest.raises(ModelError, match="excitation-backprop looks at one layer"):
        explained(ExcitationBackprop(layer="conv*"), net, x)
    with pytest.raises(ModelError, match="'fc1' has no spatial map"):
        explained(ExcitationBackprop(layer="fc1"), net, x)
