"""Attention rolled back to the patches, against whole matrices multiplied."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
import torchvision
from attending import IMAGES, TARGETS, Faced, Finder, shaken, torchvision_vit
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Tokens, bound, images, made

import xcli
from xcli.demo import nets
from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.hooks import frozen
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
NAMES = ("attention-rollout", "gradient-rollout", "chefer")


# ---- the definitions, literally -----------------------------------------------------------------------------------


def product(matrices):
    """A_L ... A_1."""
    found = torch.eye(len(matrices[0]), dtype=torch.float64)
    for one in matrices:
        found = one @ found
    return found


def normalised(fused):
    mixed = fused + torch.eye(len(fused), dtype=fused.dtype)
    return torch.stack([row / row.sum() for row in mixed])


def without(fused, share, spare):
    """The ``share`` that is the lowest at 0; ``spare``: the first of all entries stays."""
    values = fused.flatten().tolist()
    lowest = sorted(range(len(values)), key=lambda i: values[i])[: int(len(values) * share)]
    for i in lowest:
        if i or not spare:
            values[i] = 0.0
    return torch.tensor(values, dtype=fused.dtype).view_as(fused)


def rollout(attention, grads, fusion="mean", discard=0.0):
    heads = {"mean": lambda a: a.mean(0), "max": lambda a: a.max(0).values, "min": lambda a: a.min(0).values}
    return product([normalised(without(heads[fusion](a), discard, spare=True)) for a in attention])


def gradient_rollout(attention, grads, discard=0.9):
    fused = [(a * g).mean(0) for a, g in zip(attention, grads)]
    fused = [torch.where(one < 0, 0, one) for one in fused]
    return product([normalised(without(one, discard, spare=False)) for one in fused])


def chefer(attention, grads):
    found = torch.eye(attention[0].shape[-1], dtype=torch.float64)
    for a, g in zip(attention, grads):
        found = found + torch.where(a * g > 0, a * g, 0).mean(0) @ found
    return found


LITERAL = {
    "rollout": ("attention-rollout", rollout, {}),
    "rollout of the largest heads": ("attention-rollout", rollout, {"fusion": "max"}),
    "rollout of the smallest heads": ("attention-rollout", rollout, {"fusion": "min"}),
    "rollout without half": ("attention-rollout", rollout, {"discard": 0.5}),
    "rollout of the largest without a third": (
        "attention-rollout",
        rollout,
        {"fusion": "max", "discard": 0.33},
    ),
    "gradient": ("gradient-rollout", gradient_rollout, {}),
    "gradient of all": ("gradient-rollout", gradient_rollout, {"discard": 0.0}),
    "gradient without a third": ("gradient-rollout", gradient_rollout, {"discard": 0.33}),
    "chefer": ("chefer", chefer, {}),
}


def by_softmax(net, x):
    """Logits and attention of ``shapes-vit``, its blocks written out by hand."""
    tokens = net.patches(net.features(x)).flatten(2).transpose(1, 2)
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1) + net.positions
    tokens, kept = tokens.detach().requires_grad_(), []
    for block in net.blocks:
        part, seen = block.attention, block.norm1(tokens)
        q, k, v = (
            (seen @ weight.T + bias).unflatten(2, (part.num_heads, -1)).transpose(1, 2)
            for weight, bias in zip(part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3))
        )
        kept.append(torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1))
        tokens = tokens + part.out_proj((kept[-1] @ v).transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return net.head(net.norm(tokens)[:, 0]), kept


def by_row(logits, kept):
    """Attention and its gradients, (H, T, T) of each layer, for each row."""
    found = []
    for image, target in zip(IMAGES, TARGETS):
        grads = torch.autograd.grad(logits[image, target], kept, retain_graph=True)
        found.append(([one[image].detach() for one in kept], [one[image] for one in grads]))
    return found


def expected(rows, definition, options, read, prefix, grid):
    """Maps of the rows: the mean of the rows ``read`` of the whole matrix, without the first columns."""
    whole = [definition(*own, **options) for own in rows]
    return torch.stack([matrix[list(read)].mean(0)[prefix:].view(grid) for matrix in whole])


@cache
def faced(pooled):
    """A network, its images and score, attention and gradients of each row, and where tokens lie."""
    net, x = shaken(Faced(pooled=pooled)), images(3, 3, 12, 16)
    where = (range(12), 0, (3, 4)) if pooled else ([0], 1, (3, 4))
    return net, x, bound(net, x, TARGETS, IMAGES), by_row(*net.attention(x)), where


@cache
def shapes():
    net, x = nets.load("shapes-vit").double().requires_grad_(False), images(3, 3, 128, 128)
    return net, x, bound(net, x, TARGETS, IMAGES), by_row(*by_softmax(net, x)), ([0], 1, (8, 8))


@pytest.mark.parametrize("micro_batch", [1, 64])
@pytest.mark.parametrize(("name", "definition", "options"), LITERAL.values(), ids=LITERAL)
@pytest.mark.parametrize("pooled", [False, True], ids=["class token", "patches averaged"])
def test_maps_are_rows_of_the_product_of_whole_matrices(name, definition, options, pooled, micro_batch):
    _, x, score, rows, where = faced(pooled)
    wanted = expected(rows, definition, options, *where)
    score = replace(score, execution=Execution(micro_batch))
    found = build({"name": name, **options}).attribute(score, x)
    assert_close(found, wanted, **EXACT)
    assert wanted.flatten(1).std(1).min() > 1e-6
    same = (found[0] == found[1]).all()
    assert bool(same) == (name == "attention-rollout")  # two classes of one image


@pytest.mark.parametrize(
    ("name", "definition", "options"),
    [
        LITERAL["rollout"],
        LITERAL["rollout of the largest without a third"],
        LITERAL["gradient"],
        LITERAL["chefer"],
    ],
    ids=["rollout", "rollout of the largest without a third", "gradient", "chefer"],
)
def test_maps_of_shapes_vit_are_rows_of_the_product_of_whole_matrices(name, definition, options):
    _, x, score, rows, where = shapes()
    found = build({"name": name, **options}).attribute(score, x)
    assert_close(found, expected(rows, definition, options, *where), **EXACT)


@pytest.mark.parametrize("discard", [0.0, 0.9])
@pytest.mark.parametrize("name", NAMES[:2])
def test_the_rows_of_a_rollout_sum_to_one(name, discard):
    """Where no token is left out, as nothing but patches attends."""
    for pooled, total in ((True, 1.0), (False, None)):
        _, x, score, *_ = faced(pooled)
        found = build({"name": name, "discard": discard}).attribute(score, x)
        sums = found.sum((1, 2))
        assert found.min() >= 0
        assert (sums < 1 + 1e-12).all()
        if total is not None:
            assert_close(sums, torch.ones_like(sums), rtol=1e-13, atol=0)


def test_explicit_and_fused_attention_give_the_same_maps():
    _, x, explicit, *_ = faced(False)
    fused = shaken(Faced(eager=False))
    fused.load_state_dict(explicit.module.state_dict())
    score = bound(fused, x, TARGETS, IMAGES)
    for name in NAMES:
        assert_close(*(build(name).attribute(one, x) for one in (explicit, score)), **EXACT)


# ---- presets and options ------------------------------------------------------------------------------------------


def test_the_preset_vit_explain_discards_nine_tenths():
    for name, definition in (("attention-rollout", rollout), ("gradient-rollout", gradient_rollout)):
        _, x, score, rows, where = faced(False)
        wanted = expected(rows, definition, {"discard": 0.9}, *where)
        method = build({"name": name, "preset": "vit-explain"})
        assert_close(method.attribute(score, x), wanted, **EXACT)


def test_of_equal_entries_the_first_are_discarded_whatever_the_company():
    """Attention of a network at zero is uniform, so everything is equally low."""
    net, x = Faced(pooled=True).double().requires_grad_(False), images(3, 3, 12, 16)
    for block in net.encoder.layer:
        block.attention.attention.query.weight.zero_()
        block.attention.attention.query.bias.zero_()
    method = build({"name": "attention-rollout", "discard": 0.5})
    found = method.attribute(bound(net, x, [0, 0, 0]), x)
    fused = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    one = normalised(without(fused, 0.5, spare=True))
    wanted = (one @ one @ one).mean(0).view(3, 4)
    assert_close(found, wanted.expand(3, 3, 4), **EXACT)


@pytest.mark.parametrize("discard", [-0.1, 1.0, 2.0])
def test_a_share_below_one_is_discarded(discard):
    for name in NAMES[:2]:
        with pytest.raises(ConfigError, match="discard"):
            build({"name": name, "discard": discard})


def test_rollout_asks_for_no_gradient():
    assert build("attention-rollout").needs == {"attention"}
    net, x = shaken(Faced()), images(2, 3, 12, 16)
    score = bound(net, x, [0, 1])
    passes = []
    handle = net.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    build("attention-rollout").attribute(score, x)
    build("chefer").attribute(score, x)
    handle.remove()
    assert passes == [False, True]


# ---- networks -----------------------------------------------------------------------------------------------------

SMALL = {
    "img_size": (32, 16),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "class_token": True,
}
TIMM = {
    "class token": (lambda: timm.models.VisionTransformer(**SMALL), 1, [0]),
    "registers": (lambda: timm.models.VisionTransformer(**SMALL, reg_tokens=3), 4, [0]),
    "patches averaged": (
        lambda: timm.models.VisionTransformer(**{**SMALL, "class_token": False}, global_pool="avg"),
        0,
        range(8),
    ),
    "distilled": (
        lambda: timm.models.deit.VisionTransformerDistilled(**SMALL),
        2,
        [0, 1],
    ),
    "rotated": (
        lambda: timm.models.Eva(**SMALL, use_rot_pos_emb=True, swiglu_mlp=True),
        1,
        range(1, 9),
    ),
}


def of_timm(net, x):
    """Logits and attention of a network of timm, from its explicit path: what its attention dropout is given."""
    kept, handles = [], []
    for block in net.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, given: kept.append(given[0])))
    logits = net(x.clone().requires_grad_())
    for handle, block in zip(handles, net.blocks):
        handle.remove()
        block.attn.fused_attn = True
    return logits, kept


@pytest.mark.parametrize(("kind", "prefix", "read"), TIMM.values(), ids=TIMM)
def test_networks_of_timm(kind, prefix, read):
    """The tokens that are read, and those before the patches, are found; fused attention is seen."""
    net, x = shaken(kind()), images(3, 3, 32, 16)
    rows = by_row(*of_timm(net, x))
    score = bound(net, x, TARGETS, IMAGES)
    for name, definition in (("attention-rollout", rollout), ("chefer", chefer)):
        wanted = expected(rows, definition, {}, read, prefix, (4, 2))
        assert_close(build(name).attribute(score, x), wanted, **EXACT)


def test_a_network_of_torchvision_and_its_wrapper():
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"logits": self.net(x / 2), "other": x}

    net, x = shaken(torchvision_vit()), images(3, 3, 32, 32)
    bare, other = bound(net, x / 2, TARGETS, IMAGES), bound(Wrapped(net), x, TARGETS, IMAGES)
    for name in NAMES:
        alone, wrapped = build(name).attribute(bare, x / 2), build(name).attribute(other, x)
        assert_close(alone, wrapped, **EXACT)
        assert alone.shape == (4, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_the_patch_that_decides_is_the_largest(name):
    net, x = Finder().double(), 0.1 * images(3, 3, 16, 20).abs()
    for image, (row, column) in enumerate([(0, 0), (2, 3), (3, 1)]):
        x[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 2.0
    found = build(name).attribute(bound(net, x, [0, 0, 0]), x)
    assert found.flatten(1).argmax(1).tolist() == [0, 2 * 5 + 3, 3 * 5 + 1]
    if name == "chefer":  # of the other class, nothing about it is positive
        against = build(name).attribute(bound(net, x, [1, 1, 1]), x)
        assert (against.flatten(1).amax(1) < found.flatten(1).amax(1) / 10).all()


# ---- refused ------------------------------------------------------------------------------------------------------


class Cross(nn.Module):
    """Two queries of its own attend to the patches."""

    def __init__(self):
        super().__init__()
        self.patches, self.ask = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 2, 8))
        self.cross, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.cross(self.ask.expand(len(x), -1, -1), tokens, tokens)[0].mean(1))


class Pruned(nn.Module):
    """Drops every other patch between two attentions."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 4)
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.first(tokens, tokens, tokens)[0]
        tokens = tokens[:, ::2]
        return self.head((tokens + self.second(tokens, tokens, tokens)[0]).mean(1))


class Nowhere(nn.Module):
    """Rows of pixels as tokens: they have no grid."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.MultiheadAttention(48, 2, batch_first=True), nn.Linear(48, 4)

    def forward(self, x):
        tokens = x.transpose(1, 2).flatten(2)[:, :3]
        return self.head(self.rows(tokens, tokens, tokens)[0].mean(1))


class Unread(Tokens):
    """A class token that answers by what it was before it attended."""

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.place
        late = tokens[:, :1] + 0 * self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(late[:, 0] + tokens.mean(1))


def swin():
    return torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4])


def maxvit():
    return torchvision.models.MaxVit((32, 32), 8, 4, [8], [1], 4, 0.0, num_classes=4)


REFUSED = {
    "no attention": (PooledLinear, (3, 8, 8), "no attention"),
    "swin": (swin, (3, 32, 32), r"'features.1.0.attn' attends within windows"),
    "maxvit": (maxvit, (3, 32, 32), r"attends within windows"),
    "cross": (Cross, (3, 16, 16), r"'cross', 2 tokens attend to 16 others"),
    "pruned": (Pruned, (3, 16, 16), r"'second', 8 tokens attend to each other, in module 'first' 16"),
    "no grid": (Nowhere, (3, 16, 16), r"no layer says how the 3 tokens of module 'rows' lie"),
    "unread": (Unread, (3, 16, 16), r"does not depend on the attention of module 'attention'"),
}


@pytest.mark.parametrize(("kind", "shape", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_before_a_pass(kind, shape, why):
    net, x = made(kind), images(2, *shape)
    score = bound(net, x, [0, 1])
    net.register_forward_pre_hook(lambda *_: pytest.fail("a pass"))
    for name in NAMES:
        method = build(name)
        for ask in (method.looks_at, method.pinned):
            with pytest.raises(ModelError, match=f"{name}: .*{why}.*; gradcam"):
                ask(score.layers)
        with pytest.raises(ModelError, match=why):
            method.attribute(score, x)


# ---- precision, training, state -----------------------------------------------------------------------------------


def slope(loss, tensor, step=1e-6):
    """d loss / d tensor along a direction: by differences and by autograd."""
    direction = images(*tensor.shape, seed=11)
    (grad,) = torch.autograd.grad(loss(), tensor)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            tensor += sign * step * direction
        values.append(loss().item())
        with torch.no_grad():
            tensor -= sign * step * direction
    return (grad * direction).sum().item(), (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("eager", [True, False], ids=["explicit", "fused"])
@pytest.mark.parametrize(
    "spec", [*NAMES, {"name": "attention-rollout", "fusion": "max", "discard": 0.5}], ids=str
)
def test_maps_can_be_differentiated_in_turn(spec, eager):
    net, x = shaken(Faced(eager, depth=2)), images(2, 3, 12, 16).requires_grad_()
    weight = net.encoder.layer[0].attention.attention.query.weight.requires_grad_()
    score = replace(bound(net, x.detach(), [1, 2, 3], [0, 0, 1]), create_graph=True)

    def loss():
        found = build(spec).attribute(score, x)
        return (found * images(*found.shape, seed=6)).sum()

    for tensor in (x, weight):
        by_autograd, by_differences = slope(loss, tensor)
        assert abs(by_autograd) > 1e-8
        assert by_autograd == pytest.approx(by_differences, rel=1e-5)
    plain = build(spec).attribute(replace(score, create_graph=False), x.detach())
    assert_close(build(spec).attribute(score, x).detach(), plain, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_gives_nearly_the_same_map_in_single(name):
    net, x = shaken(torchvision_vit()).float(), images(3, 3, 32, 32).float()
    score = bound(net, x, TARGETS, IMAGES)
    wanted = build(name).attribute(score, x)
    half = build(name).attribute(replace(score, execution=Execution(64, torch.bfloat16)), x)
    assert half.dtype == torch.float32
    if name != "gradient-rollout":  # which entries are lowest is another matter
        assert_close(half, wanted, rtol=0.2, atol=0.05 * wanted.max().item())
    assert (half != wanted).any()


def test_maps_by_the_interface():
    net, x = shaken(torchvision_vit()), images(2, 3, 32, 32)
    with frozen(net):
        for name in NAMES:
            assert xcli.explain(net, x, name, target=[1, 2]).map.shape == (2, 32, 32)
