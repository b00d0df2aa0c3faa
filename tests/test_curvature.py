"""Products of the score's Hessian with the activations, against the Hessian itself, entry by entry."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torchvision.ops import roi_align
from toys import PooledLinear, Residual, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.hooks import frozen
from xcli.targets import in_scale

ROWS = {"target": [1, 3, 0, 2, 2], "image": [0, 0, 1, 2, 2]}
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@contextmanager
def answering(layer, output):
    """Let ``layer`` answer with ``output`` inside the block."""
    handle = layer.register_forward_hook(lambda *_: output.clone())
    try:
        yield
    finally:
        handle.remove()


def tail(net, x, name, target, scale):
    """The output of a layer for one image, and the score as a function of it."""
    layer, seen = net.get_submodule(name), []
    handle = layer.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach().clone())
    )
    net(x[None])
    handle.remove()

    def score(act):
        with answering(layer, act), sdpa_kernel(SDPBackend.MATH):
            return in_scale(net(x[None]), torch.tensor([target]), scale)[0]

    return seen[0], score


def whole(net, x, name, target, scale):
    """Activations, gradient and Hessian times activations of one row, from the Hessian as a matrix."""
    act, score = tail(net, x, name, target, scale)
    hessian = torch.autograd.functional.hessian(score, act, vectorize=True).reshape(act.numel(), act.numel())
    grad = torch.autograd.functional.jacobian(score, act)
    return act[0], grad[0], (hessian @ act.flatten()).reshape(act.shape)[0]


CURVED = {Residual: ("stem", "block", "last"), Tokens: ("patches", "norm1", "mlp")}


@pytest.mark.parametrize("scale", ["logit", "rest"])
@pytest.mark.parametrize("kind", CURVED, ids=lambda kind: kind.__name__)
def test_products_of_several_layers_at_once_equal_those_of_whole_hessians(kind, scale):
    net, x = made(kind), images(3, 3, 8, 8) if kind is Residual else images(3, 3, 16, 16)
    if kind is Residual:
        x = x[:, :, :5, :4].contiguous()
    score = bound(net, x, **ROWS).scaled(scale)
    found = score.curvature(x, at=[score.layers.find(name)[0] for name in CURVED[kind]])
    for index, name in enumerate(CURVED[kind]):
        for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"], strict=True)):
            act, grad, product = whole(net, x[image], name, target, scale)
            assert product.abs().max() > 1e-6 or (name, scale) == ("mlp", "logit")  # it bends
            assert_close(found.acts[index][row], act, **EXACT)
            assert_close(found.grads[index][row], grad, **EXACT)
            assert_close(found.products[index][row], product, **EXACT)
    assert_close(found.values, score.clean(x))
    assert not any(t.requires_grad for own in found[:3] for t in own)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_rows_and_images_without_a_row(micro_batch):
    net, x = made(Tokens), images(4, 3, 16, 16)
    rows = {"target": [1, 3, 0], "image": [1, 1, 3]}
    score, part = bound(net, x, **rows), bound(net, x, **rows, micro_batch=micro_batch)
    layers = [score.layers.find(name)[0] for name in CURVED[Tokens]]
    for expected, found in zip(score.curvature(x, layers)[:3], part.curvature(x, layers)[:3], strict=True):
        for one, other in zip(expected, found, strict=True):
            assert len(one) == 3
            assert_close(other, one, **EXACT)


@pytest.mark.parametrize("backward", [False, True])
def test_running_out_of_memory_halves_and_changes_nothing(backward):
    net, x = made(Residual), images(3, 3, 5, 4)
    score = bound(net, x, **ROWS)
    layers = score.layers.find(("block", "last"))
    expected = score.curvature(x, layers)
    failures = []

    def fail(*_):
        failures.append(backward)
        raise torch.OutOfMemoryError("out of memory")

    def check(_module, inputs, output):
        if len(inputs[0]) > 1:
            output.register_hook(fail) if backward else fail()

    handle = net.register_forward_hook(check)
    tight = bound(net, x, **ROWS)
    failures.clear()  # those of the survey, if any
    try:
        found = tight.curvature(x, layers)
    finally:
        handle.remove()
    assert failures
    assert tight.execution.micro_batch == 1
    for one, other in zip(expected[:3], found[:3], strict=True):
        for own, tried in zip(one, other, strict=True):
            assert_close(tried, own, **EXACT)


class LinearTail(nn.Module):
    """A layer that is followed by a linear map alone, after one that is followed by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.curved = nn.Conv2d(3, 4, 3, padding=1)
        self.layer = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4 * 6 * 5, 3)

    def forward(self, x):
        early = self.curved(x)
        return self.head(self.layer(early * early.flip(1)).flatten(1))


@pytest.mark.parametrize("weights", [True, False])
def test_a_linear_tail_gives_zeros_beside_a_layer_that_bends(weights):
    net, x = made(LinearTail), images(2, 3, 6, 5)
    score = bound(net, x, [1, 2, 0], [0, 0, 1])
    with frozen(net, weights):  # only then has the gradient no graph at all
        for names in (("layer", "curved"), ("curved", "layer"), ("layer",)):
            found = score.curvature(x, [score.layers.find(name)[0] for name in names])
            products = dict(zip(names, found.products, strict=True))
            assert (products["layer"] == 0).all()
            assert products["layer"].shape == (3, 4, 6, 5)
            if "curved" in names:  # the score is quadratic there, so H A = G
                assert_close(products["curved"], found.grads[names.index("curved")], **EXACT)


def test_a_piecewise_linear_tail_gives_zeros():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [1, 2])
    for product in score.curvature(x, score.layers.find(("features.0", "features", "relu"))).products:
        assert (product == 0).all()


def test_the_residual_softmax_on_a_pooled_linear_net():
    """z = W m + b with m the mean over the places, so H A = -W' (diag p - p p') W m / hw at every place."""
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [4, 0]).scaled("rest")
    (acts,), (grads,), (products,), _ = score.curvature(x, score.layers.find("relu"))
    weight, cells = net.head.weight.detach(), acts[0, 0].numel()
    p = net(x).detach().softmax(1)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    pulled = -torch.einsum("lk,nlm,mj,nj->nk", weight, spread, weight, acts.mean((2, 3))) / cells
    slope = (2 * weight[[4, 0]] - p @ weight) / cells
    assert_close(grads, slope[:, :, None, None].expand_as(acts), **EXACT)
    assert_close(products, pulled[:, :, None, None].expand_as(acts), **EXACT)


@pytest.mark.parametrize(("kind", "names"), [(Residual, ("stem", "last")), (Tokens, ("norm1", "mlp"))])
def test_a_third_derivative_where_graphs_are_kept(kind, names):
    net, x = made(kind), images(2, 3, 16, 16).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 1, 2], [0, 0, 1]).scaled("rest"), create_graph=True)
    layers = [score.layers.find(name)[0] for name in names]

    def loss(pixels):
        return sum((own * (2 + own)).sum() for own in score.curvature(pixels, layers).products)

    (slope,) = torch.autograd.grad(loss(x), x)
    step = images(2, 3, 16, 16, seed=5)
    numeric = (loss(x + 1e-5 * step) - loss(x - 1e-5 * step)) / 2e-5
    assert slope.abs().max() > 0
    assert_close((slope * step).sum(), numeric.detach(), rtol=1e-6, atol=1e-10)


def test_the_callers_grad_mode_does_not_matter():
    net, x = made(Tokens), images(2, 3, 16, 16)
    score = bound(net, x, [0, 1])
    layers = score.layers.find("norm1")
    expected = score.curvature(x, layers).products[0]
    with torch.no_grad():
        found = score.curvature(x, layers).products[0]
    assert_close(found, expected, **EXACT)


class Gated(nn.Module):
    """A layer that gates itself by a hard sigmoid, and what ends a network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.gate = nn.Hardsigmoid()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        a = self.layer(x)
        return self.head((a * self.gate(a)).mean((2, 3)))


def test_a_hard_sigmoid_has_a_second_derivative():
    net, x = made(Gated), 3 * images(2, 3, 6, 5)
    score = bound(net, x, [1, 2])
    (acts,), _, (products,), _ = score.curvature(x, score.layers.find("layer"))
    inside = (acts.abs() < 3).double()  # a (a / 6 + 1 / 2) there, a or 0 elsewhere
    weight = net.head.weight.detach()[[1, 2], :, None, None] / 30
    assert 0 < inside.mean() < 1
    assert_close(products, weight * inside * acts / 3, **EXACT)


class Pooled(nn.Module):
    """A layer whose output is pooled by an operation that has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=x.dtype)] * len(x)
        return self.head(roi_align(self.layer(x), boxes, 2).sigmoid().mean((2, 3)))


def test_what_cannot_be_differentiated_twice_is_said():
    net, x = made(Pooled), images(2, 3, 6, 5)
    score = bound(net, x, [1, 2])
    with pytest.raises(ModelError, match="no second derivative .*roi_align.*; name a later layer"):
        score.curvature(x, score.layers.find("layer"))
