"""Attention written out is attention, and whoever listens sees the probabilities it takes its means by."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from attending import Encoder, Faced, shaken, torchvision_vit
from timm.layers import attention as timms
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from toys import PooledLinear, images, made

import xcli
from xcli.attention import Attended, unfused
from xcli.errors import ModelError
from xcli.layers import survey
from xcli.operations import Watching

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Unfusing(Watching):
    """Lets ``unfused`` answer for fused calls."""

    def depends(self, leaf):
        return isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter)

    def called(self, call):
        if call.kind == "attention":
            self.count = getattr(self, "count", 0) + 1
            return unfused(call)
        return call.asked()


def some(*shape, seed=0, grad=True):
    return images(*shape, seed=seed).requires_grad_(grad)


def allowed(*shape):
    """Who takes part, everybody at least with the first key."""
    found = torch.rand(*shape, generator=torch.Generator().manual_seed(5)) > 0.4
    found[..., 0] = True
    return found


# ---- written out --------------------------------------------------------------------------------------------------

FUSED = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": allowed(5, 7)},
    "a mask a head": {"attn_mask": allowed(2, 4, 5, 7)},
    "a bias": {"attn_mask": images(2, 1, 5, 7, seed=4)},
    "a bias and scale": {"attn_mask": images(5, 7, seed=4), "scale": 2.0},
    "dropout of an eval pass": {"dropout_p": 0.0},
    "groups": {"enable_gqa": True},
    "causal groups": {"enable_gqa": True, "is_causal": True, "scale": 0.1},
}


@pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)
def test_scaled_dot_product_attention_written_out_is_the_same_and_so_are_its_gradients(options):
    groups = 2 if "enable_gqa" in options else 4
    inputs = some(2, 4, 5, 6), some(2, groups, 7, 6, seed=1), some(2, groups, 7, 3, seed=2)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    with Unfusing() as mode:
        found = F.scaled_dot_product_attention(*inputs, **options)
    assert mode.count == 1
    assert_close(found, expected, **EXACT)
    sent = images(*expected.shape, seed=9)
    grads = [torch.autograd.grad(out, inputs, sent) for out in (found, expected)]
    assert_close(*grads, **EXACT)


def test_arguments_by_position_and_fewer_axes_are_understood():
    q, k, v = some(5, 6), some(7, 6, seed=1), some(7, 3, seed=2)
    mask = allowed(5, 7)
    with Unfusing() as mode:
        found = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False)
    assert mode.count == 1
    assert_close(found, F.scaled_dot_product_attention(q, k, v, mask), **EXACT)


MULTI = {
    "plain": ({}, {}),
    "weights asked for": ({}, {"need_weights": True}),
    "weights a head": ({}, {"need_weights": True, "average_attn_weights": False}),
    "without biases": ({"bias": False}, {}),
    "own sizes of keys and values": ({"kdim": 5, "vdim": 3}, {"need_weights": True}),
    "padding": ({}, {"key_padding_mask": ~allowed(2, 7)}),
    "padding as numbers": ({}, {"key_padding_mask": images(2, 7, seed=8)}),
    "boolean mask": ({}, {"attn_mask": ~allowed(4, 7), "need_weights": True}),
    "a bias a head": ({}, {"attn_mask": images(4, 4, 7, seed=8)}),
    "a mask a head and padding": ({}, {"attn_mask": ~allowed(4, 4, 7), "key_padding_mask": ~allowed(2, 7)}),
}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize(("how", "asked"), MULTI.values(), ids=MULTI)
def test_multi_head_attention_written_out_is_the_same(how, asked, batch_first):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        part = nn.MultiheadAttention(8, 2, batch_first=batch_first, dropout=0.2, **how).double().eval()
    if part.in_proj_bias is not None:
        nn.init.normal_(part.in_proj_bias)
    query, key, value = (
        some(2, length, width, seed=i)
        for i, (length, width) in enumerate([(4, 8), (7, part.kdim), (7, part.vdim)])
    )
    if not batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    asked = {"need_weights": False, **asked}
    expected, weights = part(query, key, value, **asked)
    with Unfusing() as mode:
        found, shown = part(query, key, value, **asked)
    assert mode.count == 1
    assert_close(found, expected, **EXACT)
    assert (shown is None) == (weights is None)
    if weights is not None:
        assert_close(shown, weights, **EXACT)
    sent = images(*expected.shape, seed=9)
    wanted = [query, key, value, *part.parameters()]
    grads = [torch.autograd.grad(out, wanted, sent, retain_graph=True) for out in (found, expected)]
    assert_close(*grads, **EXACT)


@pytest.mark.parametrize("asked", [{}, {"attn_mask": ~allowed(4, 4)}, {"key_padding_mask": ~allowed(4)}])
@pytest.mark.parametrize("average", [True, False])
def test_one_sequence_without_a_batch_axis(asked, average):
    part = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x = some(4, 8)
    expected, weights = part(x, x, x, average_attn_weights=average, **asked)
    with Unfusing() as mode:
        found, shown = part(x, x, x, average_attn_weights=average, **asked)
    assert mode.count == 1
    assert_close(found, expected, **EXACT)
    assert_close(shown, weights, **EXACT)


def test_a_causal_layer_is_the_same():
    part = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
    x, mask = some(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    expected = part(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    with Unfusing():
        found = part(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert_close(found, expected, **EXACT)


class Bordered(nn.Module):
    """Attention to the tokens of a picture, and to keys of its own."""

    def __init__(self, adds: dict[str, bool]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **adds)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("adds", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_to_keys_that_no_token_stands_for_runs_as_it_is_and_cannot_be_explained(adds):
    net, x, seen = made(lambda: Bordered(adds)), images(2, 3, 16, 16), []
    expected = net(x)
    with Attended(seen.append):
        assert torch.equal(net(x), expected)
    assert not seen
    assert xcli.explain(net, x, "saliency", target=1).map.shape == (2, 16, 16)
    for method in ("chefer", "attention-rollout"):
        with pytest.raises(ModelError, match=f"{method}: .*(no attention|keys of its own).*; gradcam"):
            xcli.explain(net, x, method, target=1)
    with pytest.raises(ModelError, match="keys of its own"):
        xcli.explain(net, x, "attnlrp", target=1)
    assert not _get_current_function_mode_stack()


def test_a_softmax_over_another_axis_is_no_attention():
    """Of slots that compete for tokens, for instance: its rows do not sum to one."""
    q, seen = some(2, 2, 5, 4), []
    with Attended(seen.append):
        (q @ q.transpose(-1, -2)).softmax(-2) @ q
    assert not seen
    with Attended(seen.append):
        (q @ q.transpose(-1, -2)).softmax(3) @ q
    assert len(seen) == 1


# ---- seen ---------------------------------------------------------------------------------------------------------


class Einsum(nn.Module):
    def forward(self, x):
        shown = (x @ x.transpose(-1, -2)).softmax(-1)
        return torch.einsum("bhts,bhse->bhte", shown, x)


class NotAttention(nn.Module):
    """Softmaxes that take no means: class probabilities, and weights of channels."""

    def forward(self, x):
        return x.softmax(-1) * x + torch.softmax(x, 1)


class HalfWay(nn.Module):
    """Softmax in another precision, as transformers in half precision do."""

    def forward(self, x):
        shown = F.softmax(x @ x.mT, -1, dtype=torch.float32).type_as(x)
        return F.dropout(shown, 0.1, self.training) @ x


def of_timm(fused):
    part = timms.Attention(8, 2, qkv_bias=True)
    part.fused_attn = fused
    return part


def of_encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


SEEN = {
    "fused": (lambda: Encoder(2, 8, 2, eager=False), (3, 5, 8), [(3, 2, 5, 5)] * 2),
    "softmax, dropout, matmul": (lambda: Encoder(2, 8, 2, eager=True), (3, 5, 8), [(3, 2, 5, 5)] * 2),
    "timm, fused": (lambda: of_timm(True), (3, 5, 8), [(3, 2, 5, 5)]),
    "timm, explicit": (lambda: of_timm(False), (3, 5, 8), [(3, 2, 5, 5)]),
    "torch": (of_encoder, (3, 5, 8), [(3, 2, 5, 5)]),
    "einsum": (Einsum, (3, 2, 5, 4), [(3, 2, 5, 5)]),
    "another precision": (HalfWay, (3, 2, 5, 4), [(3, 2, 5, 5)]),
    "no attention": (NotAttention, (3, 2, 5, 4), []),
    "torchvision": (torchvision_vit, (3, 3, 32, 32), [(3, 2, 17, 17)] * 3),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4]),
        (3, 3, 32, 32),
        [(12, 2, 16, 16), (3, 2, 16, 16)],
    ),
    "windows apart": (
        lambda: torchvision.models.MaxVit((32, 32), 8, 4, [8], [1], 4, 0.0, num_classes=4),
        (3, 3, 32, 32),
        [(12, 2, 16, 16)] * 2,
    ),
    "timm's swin": (
        lambda: timm.models.SwinTransformer(
            32, 4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=3
        ),
        (3, 3, 32, 32),
        [(12, 2, 16, 16), (3, 2, 16, 16)],
    ),
}


@pytest.mark.parametrize("grad", [True, False], ids=["with a graph", "without"])
@pytest.mark.parametrize(("kind", "shape", "shapes"), SEEN.values(), ids=SEEN)
def test_probabilities_are_seen_however_a_network_asks_for_attention(kind, shape, shapes, grad):
    net, x, seen = shaken(kind()), images(*shape).requires_grad_(grad), []
    tensor = (lambda out: out["last_hidden_state"]) if isinstance(net, Encoder) else lambda out: out
    with torch.set_grad_enabled(grad):
        expected = tensor(net(x))
        with Attended(seen.append):
            found = tensor(net(x))
    assert_close(found, expected, **EXACT)
    assert [tuple(one.shape) for one in seen] == shapes
    for one in seen:
        assert_close(one.sum(-1), torch.ones(one.shape[:3], dtype=one.dtype))
        assert one.min() >= 0
        assert one.requires_grad == grad
    if grad and seen:  # means are taken by what was seen: no gradient goes round it
        grads = torch.autograd.grad(found.square().sum(), seen)
        assert all(one.abs().max() > 0 for one in grads)


def test_fused_and_explicit_attention_show_the_same_probabilities_and_gradients():
    shown = []
    for eager in (True, False):
        net, x, seen = shaken(Faced(eager)), images(3, 3, 12, 16).requires_grad_(), []
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for weight in net.parameters():
                weight.normal_(0, 0.5)
        with Attended(seen.append):
            logits = net(x)["logits"]
        grads = torch.autograd.grad(logits[:, 1].sum(), seen)
        shown.append([*seen, *grads])
    assert len(shown[0]) == 6
    for explicit, fused in zip(*shown, strict=True):
        assert_close(explicit, fused, **EXACT)
    assert shown[0][3].abs().max() > 1e-3


def test_what_is_seen_of_explicit_attention_is_the_very_softmax_of_the_network():
    net, seen = shaken(Faced()), []
    with Attended(seen.append):
        logits, kept = net.attention(images(2, 3, 12, 16))
    assert [a is b for a, b in zip(seen, kept, strict=True)] == [True] * 3
    assert_close(
        torch.autograd.grad(logits.sum(), seen, retain_graph=True),
        torch.autograd.grad(logits.sum(), kept),
        **EXACT,
    )


@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_path_of_torch_does_not_hide_attention(grad):
    part = nn.TransformerEncoder(of_encoder(), 2, enable_nested_tensor=False).double().eval()
    part.requires_grad_(False)
    x, seen = images(2, 5, 8), []
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(grad), Attended(seen.append):
        found = part(x)
    assert len(seen) == 2
    assert_close(found, part(x), **EXACT)


# ---- left as found ------------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = of_timm(True)

    def forward(self, x):
        self.inner(x)
        raise KeyError("stop")


def test_nothing_is_left_behind_after_the_block_or_an_exception():
    x, seen, before = images(2, 5, 8), [], F.scaled_dot_product_attention
    for net, stops in ((of_timm(False), nullcontext()), (Breaks(), pytest.raises(KeyError))):
        net = net.double().eval()
        mode = Attended(seen.append)
        with stops, mode:
            net(x)
        assert len(seen) == 1
        assert not _get_current_function_mode_stack()
        assert F.scaled_dot_product_attention is before
        assert not len(mode.softmaxes)
        assert not len(mode.current)
        of_timm(True).double()(x)
        assert len(seen) == 1
        seen.clear()


def test_an_exception_inside_a_fused_call_takes_the_mode_away():
    q = images(2, 2, 5, 4)
    with pytest.raises(RuntimeError), Attended(lambda _: None):
        F.scaled_dot_product_attention(q, q[..., :3], q)
    assert not _get_current_function_mode_stack()


# ---- what the survey says -----------------------------------------------------------------------------------------


def test_the_survey_names_modules_shapes_windows_and_the_tokens_that_are_read():
    layers = survey(shaken(Faced()), images(1, 3, 12, 16))
    assert [one.module for one in layers.attention] == [
        f"encoder.layer.{i}.attention.attention" for i in range(3)
    ]
    assert {one.shape for one in layers.attention} == {(2, 13, 13)}
    assert [len(one.read) for one in layers.attention] == [13, 13, 1]
    assert layers.attention[-1].read == (0,)
    pooled = survey(shaken(Faced(pooled=True)), images(1, 3, 12, 16)).attention
    assert pooled[-1].read == tuple(range(12))
    swin = SEEN["swin"][0]()
    assert [one.windows for one in survey(shaken(swin), images(1, 3, 32, 32)).attention] == [4, 1]


def test_the_survey_of_a_network_without_attention_names_none():
    assert survey(made(PooledLinear), images(1, 3, 8, 8)).attention == ()
