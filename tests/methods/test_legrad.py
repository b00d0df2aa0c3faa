"""LeGrad: each layer's own score, by gradients taken one layer at a time, by torchcam, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
import torchvision
from attending import IMAGES, TARGETS, EncoderLayer, Faced, Finder, shaken, torchvision_vit
from contract import snapshot
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Tokens, bound, images, made

import xcli
from xcli.demo import nets
from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.hooks import frozen
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-14}


def literal(blocks, attention, tokens, answer, *, pooled, last, prefix, grid):
    """Maps of the rows, each layer by a backward pass of its own.

    blocks, attention: modules; the probabilities are those of a softmax written out in ``attention``.
    """
    kept, layers = [], []
    for block, part in zip(blocks, attention):
        part.kept.clear()
        found = block(tokens)
        tokens = found[0] if isinstance(found, tuple) else found
        kept.append(part.kept.pop())
        layers.append(tokens)
    maps = []
    for image, target in zip(IMAGES, TARGETS):
        sums = []
        for shown, own in list(zip(kept, layers))[-last:]:
            read = own.mean(1, keepdim=True).expand(own.shape) if pooled == "mean" else own
            (grad,) = torch.autograd.grad(answer(read)[image, target], shown, retain_graph=True)
            sums.append(torch.where(grad[image] > 0, grad[image], 0).sum((0, 1)) / grad[0, :, :, 0].numel())
        maps.append((sum(sums) / len(sums))[prefix:].view(grid))
    return torch.stack(maps)


def of_faced(net, x, pooled, last):
    tokens = net.patches(x.clone().requires_grad_()).flatten(2).transpose(1, 2)
    tokens = torch.cat([net.token.expand(len(x), -1, -1), tokens], 1) + net.place

    def answer(tokens):
        tokens = net.norm(tokens)
        return net.head(tokens.mean(1) if net.pooled else tokens[:, 0])

    blocks = list(net.encoder.layer)
    parts = [block.attention.attention for block in blocks]
    prefix = 0 if net.pooled else 1
    return literal(blocks, parts, tokens, answer, pooled=pooled, last=last, prefix=prefix, grid=(3, 4))


class Explicit(nn.Module):
    """A block of ``shapes-vit`` with attention by softmax."""

    def __init__(self, block):
        super().__init__()
        self.block, self.kept = block, []

    def forward(self, x):
        part, seen = self.block.attention, self.block.norm1(x)
        q, k, v = (
            (seen @ weight.T + bias).unflatten(2, (part.num_heads, -1)).transpose(1, 2)
            for weight, bias in zip(part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3))
        )
        shown = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)
        self.kept.append(shown)
        x = x + part.out_proj((shown @ v).transpose(1, 2).flatten(2))
        return x + self.block.mlp(self.block.norm2(x))


@cache
def faced(pooled):
    net, x = shaken(Faced(pooled=pooled)), images(3, 3, 12, 16)
    return net, x, bound(net, x, TARGETS, IMAGES)


@cache
def of_torchvision():
    net, x = shaken(torchvision_vit()), images(3, 3, 32, 32)
    return net, x, bound(net, x, TARGETS, IMAGES)


@pytest.mark.parametrize("micro_batch", [1, 64])
@pytest.mark.parametrize("last", [2, 3])
@pytest.mark.parametrize("how", ["mean", "own"])
@pytest.mark.parametrize("pooled", [False, True], ids=["class token", "patches averaged"])
def test_maps_are_those_of_a_backward_pass_a_layer(pooled, how, last, micro_batch):
    net, x, score = faced(pooled)
    wanted = of_faced(net, x, how, last)
    method = build({"name": "legrad", "pooled": how, "layers": "all" if last == 3 else last})
    found = method.attribute(replace(score, execution=Execution(micro_batch)), x)
    assert_close(found, wanted, **EXACT)
    assert wanted.flatten(1).std(1).min() > 1e-6
    assert (found[0] != found[1]).any()


def test_the_options_differ():
    _, x, score = faced(False)
    maps = [
        build({"name": "legrad", **own}).attribute(score, x) for own in ({}, {"pooled": "own"}, {"layers": 2})
    ]
    assert all((one - other).abs().max() > 1e-6 for i, one in enumerate(maps) for other in maps[:i])


@pytest.mark.parametrize("how", ["mean", "own"])
def test_maps_of_shapes_vit_are_those_of_a_backward_pass_a_layer(how):
    net, x = nets.load("shapes-vit").double().requires_grad_(False), images(3, 3, 128, 128)
    tokens = net.patches(net.features(x)).flatten(2).transpose(1, 2)
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1) + net.positions
    blocks = [Explicit(block) for block in net.blocks]
    wanted = literal(
        blocks,
        blocks,
        tokens.detach().requires_grad_(),
        lambda tokens: net.head(net.norm(tokens)[:, 0]),
        pooled=how,
        last=4,
        prefix=1,
        grid=(8, 8),
    )
    found = build({"name": "legrad", "pooled": how}).attribute(bound(net, x, TARGETS, IMAGES), x)
    assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("last", [3, 2, 1])
def test_the_preset_torchcam_is_torchcam(last):
    from torchcam.methods import LeGrad

    net, x, score = of_torchvision()
    method = build({"name": "legrad", "preset": "torchcam", "layers": "all" if last == 3 else last})
    found = method.attribute(score, x)
    for row, (image, target) in enumerate(zip(IMAGES, TARGETS)):
        for parameter in net.parameters():  # torchcam looks for a graph in the pass at hand
            assert not parameter.requires_grad
        with LeGrad(net, list(net.encoder.layers)[-last:]) as peer:
            logits = net(x[image : image + 1].clone().requires_grad_())
            (raw,) = peer(target, logits, normalized=False, retain_graph=True)
            (scaled,) = peer(target, logits)
        assert_close(found[row], raw[0], rtol=1e-10, atol=1e-14)
        own = (found[row] - found[row].min()) / (found[row].max() - found[row].min())
        assert_close(own, scaled[0], rtol=0, atol=1e-4)  # it divides by the range and 1e-8


def test_the_map_of_the_last_layer_by_its_own_reading_is_that_of_the_network_itself():
    """What is joined at the last block changes nothing about what the network answers."""
    net, x, score = faced(False)
    logits, kept = net.attention(x)
    maps = []
    for image, target in zip(IMAGES, TARGETS):
        (grad,) = torch.autograd.grad(logits[image, target], kept[-1], retain_graph=True)
        maps.append(grad[image].relu().mean((0, 1))[1:].view(3, 4))
    found = build({"name": "legrad", "pooled": "own", "layers": 1}).attribute(score, x)
    assert_close(found, torch.stack(maps), **EXACT)


def test_other_units_follow_the_outputs_of_each_layer():
    """The log-probability of a layer's own logits has its gradient, not that of the last layer."""
    net, x, score = faced(False)
    method = build({"name": "legrad", "layers": 1, "pooled": "own"})
    logits, kept = net.attention(x)
    target = logits.log_softmax(1)
    (grad,) = torch.autograd.grad(target[0, 1], kept[-1])
    found = method.attribute(score.scaled("log-probability"), x)
    assert_close(found[0], grad[0].relu().mean((0, 1))[1:].view(3, 4), **EXACT)


# ---- networks -----------------------------------------------------------------------------------------------------

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
TIMM = {
    "registers": lambda: timm.models.VisionTransformer(**SMALL, reg_tokens=3),
    "patches averaged": lambda: timm.models.VisionTransformer(**SMALL, global_pool="avg"),
    "distilled": lambda: timm.models.deit.VisionTransformerDistilled(**SMALL),
    "rotated": lambda: timm.models.Eva(**SMALL, use_rot_pos_emb=True, swiglu_mlp=True),
    "biased": lambda: timm.models.Beit(**SMALL, use_rel_pos_bias=True),
}


@pytest.mark.parametrize("kind", TIMM.values(), ids=TIMM)
def test_networks_of_timm(kind):
    """The head of each layer is that of the network, so its own hooks can say what it gives."""
    net, x = shaken(kind()), images(3, 3, 32, 32)
    score = bound(net, x, TARGETS, IMAGES)
    blocks = build("legrad").blocks(score.layers)
    assert blocks == ("blocks.0", "blocks.1")
    found = build({"name": "legrad", "layers": 1, "pooled": "own"}).attribute(score, x)
    kept = []
    block = net.blocks[1].attn
    block.fused_attn = False
    handle = block.attn_drop.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    logits = net(x.clone().requires_grad_())
    handle.remove()
    block.fused_attn = True
    prefix = kept[0].shape[-1] - 16
    for row, (image, target) in enumerate(zip(IMAGES, TARGETS)):
        (grad,) = torch.autograd.grad(logits[image, target], kept, retain_graph=True)
        assert_close(found[row], grad[image].relu().mean((0, 1))[prefix:].view(4, 4), **EXACT)
    every = build("legrad").attribute(score, x)
    assert every.shape == (4, 4, 4)
    assert every.min() >= 0
    assert every.flatten(1).std(1).min() > 0


def test_a_wrapper_and_tuples_change_no_block():
    layers = faced(False)[2].layers
    assert build("legrad").blocks(layers) == ("encoder.layer.0", "encoder.layer.1", "encoder.layer.2")
    assert build({"name": "legrad", "layers": 2}).blocks(layers) == ("encoder.layer.1", "encoder.layer.2")
    layers = of_torchvision()[2].layers
    assert build("legrad").blocks(layers)[0] == "encoder.layers.encoder_layer_0"


@pytest.mark.parametrize("how", ["mean", "own"])
def test_the_patch_that_decides_is_the_largest(how):
    net, x = Finder().double(), 0.1 * images(3, 3, 16, 20).abs()
    for image, (row, column) in enumerate([(0, 0), (2, 3), (3, 1)]):
        x[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2.0
    found = build({"name": "legrad", "pooled": how}).attribute(bound(net, x, [0, 0, 0]), x)
    assert found.flatten(1).argmax(1).tolist() == [0, 2 * 5 + 3, 3 * 5 + 1]


# ---- refused ------------------------------------------------------------------------------------------------------


class Bare(Tokens):
    """Two attentions that no blocks hold."""

    def __init__(self):
        super().__init__()
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place[:, 1:]
        for part in (self.attention, self.second):
            tokens = tokens + part(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


class Shared(Faced):
    """One block, twice."""

    def __init__(self):
        super().__init__(depth=1)
        self.encoder.layer.append(self.encoder.layer[0])


class TokensFirst(nn.Module):
    """Blocks hand on (T, B, C)."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 4)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
        self.again = nn.Identity()

    def forward(self, x):
        tokens = self.again(self.patches(x).flatten(2).transpose(1, 2)).transpose(0, 1)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens.mean(0))


class Outside(nn.Module):
    """Holds attention alone; the residual sum is outside."""

    def __init__(self, between):
        super().__init__()
        self.patches, self.head, self.between = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 4), between
        self.layers = nn.ModuleList(EncoderLayer(8, 2, True) for _ in range(2))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = self.between(tokens, layer(tokens)[0])
        return self.head(tokens.mean(1))


REFUSED = {
    "no attention": (PooledLinear, (3, 8, 8), "no attention"),
    "windows": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4]),
        (3, 32, 32),
        "attends within windows",
    ),
    "no blocks": (Bare, (3, 16, 16), "no module holds the attention of module 'attention' and no other"),
    "shared": (Shared, (3, 12, 16), "no module holds the attention"),
    "tokens first": (TokensFirst, (3, 16, 16), r"'layers.0', a block, gives outputs of shape .*, not tokens"),
}


@pytest.mark.parametrize(("kind", "shape", "why"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_blocks_is_refused_before_a_pass(kind, shape, why):
    net, x = made(kind), images(2, *shape)
    score, method = bound(net, x, [0, 1]), build("legrad")
    net.register_forward_pre_hook(lambda *_: pytest.fail("a pass"))
    for ask in (method.looks_at, method.pinned):
        with pytest.raises(ModelError, match=f"legrad: .*{why}.*; gradcam"):
            ask(score.layers)
    with pytest.raises(ModelError, match=why):
        method.attribute(score, x)


def test_blocks_that_do_not_hand_tokens_on_as_they_are_are_refused_in_the_first_pass():
    x = images(2, 3, 16, 16)
    for between in (lambda before, after: before + after, lambda before, after: after + 1):
        net = made(lambda between=between: Outside(between))
        score, before = bound(net, x, [0, 1]), snapshot(net)
        with pytest.raises(ModelError, match=r"'layers.1' does not read the output of 'layers.0' as it is"):
            build("legrad").attribute(score, x)
        assert snapshot(net) == before
    net = made(lambda: Outside(lambda before, after: after))
    assert build("legrad").attribute(bound(net, x, [0, 1]), x).shape == (2, 4, 4)


@pytest.mark.parametrize("layers", [0, -1, 1.5, "none"])
def test_layers_are_all_or_a_number(layers):
    with pytest.raises(ConfigError, match="layers"):
        build({"name": "legrad", "layers": layers})


def test_more_layers_than_there_are_is_an_error():
    _, x, score = faced(False)
    with pytest.raises(ModelError, match="layers: 4 is more than the 3 blocks"):
        build({"name": "legrad", "layers": 4}).attribute(score, x)


# ---- state, training, precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "own"])
def test_a_micro_batch_that_ends_within_the_images_changes_nothing(how):
    _, x, score = faced(False)
    method = build({"name": "legrad", "pooled": how})
    pieces = method.attribute(replace(score, execution=Execution(2)), x)
    assert_close(pieces, method.attribute(score, x), **EXACT)


def test_the_network_is_left_as_found_also_after_an_exception():
    net, x, score = of_torchvision()
    before = snapshot(net)
    build("legrad").attribute(score, x)
    assert snapshot(net) == before
    handle = net.heads.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        build("legrad").attribute(score, x)
    handle.remove()
    assert snapshot(net) == before


class Overwrites(nn.Module):
    """Blocks that add to the very tensor they are given."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x += self.attention(x, x, x, need_weights=False)[0]
            return x

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 4)
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2) * 1).mean(1))


class Anew(Overwrites):
    class Block(Overwrites.Block):
        def forward(self, x):
            return x + self.attention(x, x, x, need_weights=False)[0]


def test_blocks_that_work_in_place_give_the_same():
    x, maps = images(2, 3, 16, 16), []
    for kind in (Overwrites, Anew):
        net = made(kind)
        maps.append(build("legrad").attribute(bound(net, x, [0, 1]), x))
    assert_close(*maps, **EXACT)


@pytest.mark.parametrize("how", ["mean", "own"])
def test_maps_can_be_differentiated_in_turn(how):
    net, x = shaken(Faced(eager=False, depth=2)), images(2, 3, 12, 16).requires_grad_()
    weight = net.encoder.layer[0].attention.attention.query.weight.requires_grad_()
    score = replace(bound(net, x.detach(), [1, 2, 3], [0, 0, 1]), create_graph=True)
    method = build({"name": "legrad", "pooled": how})

    def loss():
        found = method.attribute(score, x)
        return (found * images(*found.shape, seed=6)).sum()

    for tensor in (x, weight):
        direction = images(*tensor.shape, seed=11)
        (grad,) = torch.autograd.grad(loss(), tensor)
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                tensor += step * direction
            values.append(loss().item())
        with torch.no_grad():
            tensor += 1e-6 * direction
        along = (grad * direction).sum().item()
        assert abs(along) > 1e-8
        assert along == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    plain = method.attribute(replace(score, create_graph=False), x.detach())
    assert_close(method.attribute(score, x).detach(), plain, **EXACT)


def test_half_precision_gives_nearly_the_same_map_in_single():
    net, x, score = of_torchvision()
    net, x = shaken(torchvision_vit()).float(), x.float()
    score = bound(net, x, TARGETS, IMAGES)
    wanted = build("legrad").attribute(score, x)
    half = build("legrad").attribute(replace(score, execution=Execution(64, torch.bfloat16)), x)
    assert half.dtype == torch.float32
    assert_close(half, wanted, rtol=0.2, atol=0.05 * wanted.max().item())
    assert (half != wanted).any()


def test_maps_by_the_interface():
    net, x, _ = of_torchvision()
    with frozen(net):
        assert xcli.explain(net, x, "legrad", target=[1, 2, 0]).map.shape == (3, 32, 32)
