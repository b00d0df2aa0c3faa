"""Convolutions and linear layers read off their calls: the map, its transpose, and what a batch norm makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close
from toys import images

from xcli.linear import Linear, normalising
from xcli.operations import Call, Rules, plainly

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = {1: (7,), 2: (7, 6), 3: (5, 6, 4)}


def calls(run, *kinds: str) -> list[Call]:
    """The calls of some kinds that ``run`` makes on a picture."""
    seen: list[Call] = []

    def noted(call: Call):
        seen.append(call)
        return plainly(call)

    with Rules(dict.fromkeys(kinds, noted)):
        run()
    return seen


def given(*shape: int, seed: int = 0) -> Tensor:
    return images(*shape, seed=seed).requires_grad_()


def weights(*shape: int, seed: int = 5) -> Tensor:
    return images(*shape, seed=seed)


def cases():
    for dims in (1, 2, 3):
        x, w, b = given(2, 4, *SIZES[dims]), weights(6, 2, *(3,) * dims), weights(6)
        conv, back = getattr(F, f"conv{dims}d"), getattr(F, f"conv_transpose{dims}d")
        yield f"conv{dims}d", lambda c=conv, x=x, w=w, b=b: c(x, w, b, 2, 1, 2, 2)
        yield (
            f"conv{dims}d by name",
            lambda c=conv, x=x, w=w, b=b: c(input=x, weight=w, bias=b, groups=2, padding=1),
        )
        yield f"conv{dims}d same", lambda c=conv, x=x, w=w: c(x, w, None, 1, "same", 1, 2)
        yield f"conv{dims}d valid", lambda c=conv, x=x, w=w: c(x, w, padding="valid", groups=2)
        wt, bt = weights(4, 3, *(3,) * dims), weights(6)
        yield f"transposed {dims}d", lambda c=back, x=x, w=wt, b=bt: c(x, w, b, 2, 1, 1, 2, 1)
        yield (
            f"transposed {dims}d by name",
            lambda c=back, x=x, w=wt: c(
                x, w, dilation=2, stride=(3,) * (w.ndim - 2), output_padding=1, groups=2
            ),
        )
    x, w, b = given(2, 4, 7, 6), weights(6, 4, 2, 4), weights(6)
    yield "uneven same", lambda: F.conv2d(x, w, b, padding="same", dilation=(1, 2))
    yield "torch", lambda: torch.conv2d(x, w, b, (2, 1), (1, 0))
    yield "aten", lambda: torch.ops.aten.conv2d.default(x, w, b, [1, 2], [0, 1])
    yield "aten, padded by name", lambda: torch.ops.aten.conv2d.padding(x, w, None, [1, 1], "same")
    yield "linear", lambda: F.linear(x, weights(5, 6), weights(5))
    yield "aten linear", lambda: torch.ops.aten.linear.default(x, weights(5, 6))


CASES = dict(cases())


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_call_is_the_linear_map_it_computes_and_back_is_its_transpose(name):
    (call,) = calls(CASES[name], "weighted")
    linear, x, weight, bias = Linear.of(call)
    value = call.run(x)
    assert_close(linear(x, weight, bias), value, **EXACT)
    other = torch.randn_like(weight)
    inputs = x.detach().requires_grad_()
    out = linear(inputs, other)
    sent = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, inputs, sent)
    assert_close(linear.back(sent, other, x.detach()), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", ["conv2d", "uneven same", "transposed 2d", "linear"])
def test_back_can_be_differentiated(name):
    (call,) = calls(CASES[name], "weighted")
    linear, x, weight, bias = Linear.of(call)
    sent = torch.randn_like(linear(x, weight, bias)).detach().requires_grad_()
    weight = weight.detach().requires_grad_()
    torch.autograd.gradcheck(lambda s, w: linear.back(s, w, x.detach()), (sent, weight), fast_mode=True)


def statistics(norm: nn.Module) -> nn.Module:
    made = torch.Generator().manual_seed(3)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_(generator=made)
    norm.running_var.uniform_(0.5, 2, generator=made)
    return norm.double().eval().requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_folded_is_pytorchs_fusion(kind, bias):
    norm = statistics(nn.BatchNorm1d(6) if kind == "linear" else nn.BatchNorm2d(6))
    layer = (
        {
            "conv": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
            "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=bias),
            "linear": lambda: nn.Linear(4, 6, bias=bias),
        }[kind]()
        .double()
        .eval()
        .requires_grad_(False)
    )
    x = given(3, 4) if kind == "linear" else given(3, 4, 5, 5)
    first, second = calls(lambda: norm(layer(x)), "weighted", "batch-norm")
    linear, _, weight, own = Linear.of(first)
    _, scale, shift = normalising(second)
    made = linear.folded(weight, own, scale, shift)
    assert_close(linear(x, *made), norm(layer(x)), **EXACT)
    fused = {"conv": fuse_conv_bn_eval, "linear": fuse_linear_bn_eval}.get(kind)
    if fused is not None:
        assert_close(made[0], fused(layer, norm).weight, **EXACT)
        assert_close(made[1], fused(layer, norm).bias, **EXACT)


def norms():
    norm = statistics(nn.BatchNorm2d(4))
    x, mean, var, w, b = given(2, 4, 3, 3), norm.running_mean, norm.running_var, norm.weight, norm.bias
    yield "module", lambda: norm(x), (w, b, norm.eps)
    yield "function", lambda: F.batch_norm(x, mean, var, w, b, eps=0.1), (w, b, 0.1)
    yield "by name", lambda: F.batch_norm(x, running_var=var, running_mean=mean), (None, None, 1e-5)
    yield "bias alone", lambda: F.batch_norm(x, mean, var, None, b), (None, b, 1e-5)
    yield "torch", lambda: torch.batch_norm(x, w, b, mean, var, False, 0.1, 0.2, False), (w, b, 0.2)
    yield (
        "aten",
        lambda: torch.ops.aten.batch_norm.default(x, w, b, mean, var, False, 0.1, 0.3, False),
        (w, b, 0.3),
    )


@pytest.mark.parametrize(("run", "extras"), [one[1:] for one in norms()], ids=[one[0] for one in norms()])
def test_normalising_reads_every_spelling(run, extras):
    (call,) = calls(run, "batch-norm")
    x, scale, shift = normalising(call)
    assert x is call.inputs[0]
    assert_close(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), run(), **EXACT)


def test_statistics_of_the_batch_are_none():
    x, mean, var = given(2, 4, 3, 3), weights(4), weights(4).exp()
    training = nn.BatchNorm2d(4).double().train()
    for run in (
        lambda: training(x),
        lambda: F.batch_norm(x, mean, var, training=True),
        lambda: F.batch_norm(x, None, None, training=True),
    ):
        (call,) = calls(run, "normalisation")
        assert normalising(call) is None
