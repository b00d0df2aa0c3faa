"""``Score.folded`` against plain autograd, one row at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract import snapshot
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

from xcli.hooks import frozen
from xcli.score import Score

IMAGE, TARGET = [0, 0, 1, 2, 2, 2, 4], [1, 3, 0, 2, 2, 0, 1]
"""Rows of five images: several of one, one of another, none of the fourth; the same one twice."""

PLACES = {
    PooledLinear: ("features.0", "features.2"),
    Residual: ("stem", "block.0", "block.2", "twice", "last"),
    Tokens: ("patches", "norm1", "mlp.0", "mlp.2"),
}
"""Modules before an in-place ReLU or an in-place sum, and one that runs three times."""


def fold(number: int, grad: Tensor, count: int = 0) -> tuple[Tensor, Tensor]:
    """Not linear, so that each call of a module has to be folded by itself, and told apart by the module."""
    size = grad.flatten(1).abs().sum(1)
    return (number + 1) * size.square(), torch.stack([(size + 1).sqrt(), size * number], 1)


def plain(net: nn.Module, x: Tensor, image: int, target: int, at: tuple[str, ...], *, graph: bool = False):
    """The gradient at the pixels and the sums of one row, by one pass of one image."""
    outs: list[tuple[int, Tensor]] = []

    def keeping(number: int):
        def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            outs.append((number, out))
            return out.clone()  # what is kept is not overwritten

        return keep

    handles = [net.get_submodule(name).register_forward_hook(keeping(i)) for i, name in enumerate(at)]
    pixels = x[image : image + 1] if graph else x[image : image + 1].clone().requires_grad_()
    with torch.enable_grad():
        value = net(pixels * 1)[0, target]
    for handle in handles:
        handle.remove()
    grad, *grads = torch.autograd.grad(value, [pixels, *(out for _, out in outs)], create_graph=graph)
    made = [fold(number, own) for (number, _), own in zip(outs, grads, strict=True)]
    return grad, [sum(tensors) for tensors in zip(*made, strict=True)], value


def by_rows(net: nn.Module, x: Tensor, at: tuple[str, ...], **how: bool):
    rows = [plain(net, x, image, target, at, **how) for image, target in zip(IMAGE, TARGET, strict=True)]
    grads, folds, values = zip(*rows, strict=True)
    return torch.cat(grads), [torch.cat(own) for own in zip(*folds, strict=True)], torch.stack(values)


def agree(found, expected) -> None:
    grads, folds, values = expected
    assert_close(found.grads, grads)
    assert len(found.folds) == len(folds) == 2
    for ours, theirs in zip(found.folds, folds, strict=True):
        assert_close(ours, theirs)
    assert_close(found.values, values)


@pytest.fixture(params=PLACES, ids=lambda kind: kind.__name__)
def case(request) -> tuple[nn.Module, Tensor, Score, tuple[str, ...]]:
    net, x = made(request.param).requires_grad_(False), images(5, 3, 16, 16)
    return net, x, bound(net, x, TARGET, IMAGE), PLACES[request.param]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_rows_of_any_micro_batch_equal_those_alone(case, micro_batch):
    net, x, score, at = case
    score.execution.micro_batch = micro_batch
    found = score.folded(x, at, fold)
    agree(found, by_rows(net, x, at))
    tensors = (found.grads, *found.folds, found.values)
    assert not any(tensor.requires_grad for tensor in tensors)


def test_the_grad_mode_of_the_caller_does_not_matter(case):
    net, x, score, at = case
    with torch.no_grad():
        found = score.folded(x, at, fold)
    agree(found, by_rows(net, x, at))


def test_one_row_an_image_shares_one_backward_pass(case):
    net, x, _, at = case
    score, calls = bound(net, x, [0, 1, 2, 3, 1]), []

    def counting(number: int, grad: Tensor, count: int) -> tuple[Tensor, ...]:
        calls.append((number, len(grad)))
        return fold(number, grad)

    found = score.folded(x, at, counting)
    runs = {name: 3 if name == "twice" else 1 for name in at}
    assert sorted(calls) == sorted((i, 5) for i, name in enumerate(at) for _ in range(runs[name]))
    expected = plain(net, x, 3, 3, at)
    assert_close(found.grads[3:4], expected[0])
    assert_close(found.folds[1][3:4], expected[1][1])


@pytest.mark.parametrize("where", ["forward", "fold"])
def test_memory_that_runs_out_midway_changes_nothing(case, where):
    net, x, score, at = case
    expected, tried = by_rows(net, x, at), []

    def limited(size: int) -> None:
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("out of memory")

    def squeezed(number: int, grad: Tensor, count: int) -> tuple[Tensor, ...]:
        if where == "fold" and number == 0:  # the others have been folded by then
            limited(len(grad))
        return fold(number, grad)

    handle = (
        net.register_forward_pre_hook(lambda _, inputs: limited(len(inputs[0])))
        if where == "forward"
        else None
    )
    found = score.folded(x, at, squeezed)
    if handle:
        handle.remove()
    assert tried[0] == 4  # one image has no row
    assert score.execution.micro_batch == 2
    agree(found, expected)


def test_an_in_place_operation_does_not_change_the_gradient_of_what_came_before():
    net, x = made(PooledLinear).requires_grad_(False), images(5, 3, 8, 8)
    apart = made(PooledLinear).requires_grad_(False)
    apart.features[1].inplace = apart.relu.inplace = False
    found = [bound(one, x, TARGET, IMAGE).folded(x, PLACES[PooledLinear], fold) for one in (net, apart)]
    for ours, theirs in zip(found[0].folds, found[1].folds, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


def test_with_a_graph_everything_can_be_differentiated_by_images_and_weights():
    net, x = made(Residual), images(5, 3, 8, 8).requires_grad_()
    at = PLACES[Residual]
    score = replace(bound(net, x.detach(), TARGET, IMAGE, micro_batch=2), create_graph=True)
    found, expected = score.folded(x, at, fold), by_rows(net, x, at, graph=True)
    agree(found, expected)
    wanted = [x, net.stem.weight, net.twice.weight, net.head.weight]
    loss = (
        found.grads.square().sum() + found.folds[0].sum() + found.folds[1].square().sum() + found.values.sum()
    )
    grads, folds, values = expected
    other = grads.square().sum() + folds[0].sum() + folds[1].square().sum() + values.sum()
    ours, theirs = torch.autograd.grad(loss, wanted), torch.autograd.grad(other, wanted)
    for one, another in zip(ours, theirs, strict=True):
        assert another.abs().max() > 0
        assert_close(one, another)


def test_shapes_that_broadcast_add_up():
    net, x = made(Residual).requires_grad_(False), images(5, 3, 8, 8)

    def uneven(number: int, grad: Tensor, count: int) -> tuple[Tensor]:
        return (grad.new_full((len(grad), 1, 1), 2.0) if number else grad.abs().sum(1),)

    both = bound(net, x, TARGET, IMAGE).folded(x, ["stem", "last"], uneven).folds[0]
    alone = bound(net, x, TARGET, IMAGE).folded(x, ["stem"], uneven).folds[0]
    assert_close(both, alone + 2)


def test_without_modules_or_with_one_that_does_not_run_there_are_no_sums():
    net, x = made(PooledLinear).requires_grad_(False), images(5, 3, 8, 8)
    net.unused = nn.Linear(2, 2)
    score = bound(net, x, TARGET, IMAGE)
    for at in ((), ("unused",)):
        found = score.folded(x, at, fold)
        assert found.folds == ()
        assert_close(found.grads, score.gradients(x).grads[0])


def test_half_precision_gradients_are_handed_over_in_full():
    net, x = made(PooledLinear).float().requires_grad_(False), images(5, 3, 8, 8).float()
    score, seen = bound(net, x, TARGET, IMAGE), []
    score.execution.precision = torch.bfloat16

    def looking(number: int, grad: Tensor, count: int) -> tuple[Tensor, ...]:
        seen.append(grad.dtype)
        return fold(number, grad)

    found = score.folded(x, PLACES[PooledLinear], looking)
    assert set(seen) == {torch.float32} == {t.dtype for t in (found.grads, *found.folds, found.values)}


@pytest.mark.parametrize("where", ["forward", "fold"])
def test_an_exception_leaves_the_network_as_found(where):
    net, x = made(Residual), images(5, 3, 8, 8)
    score = bound(net, x, TARGET, IMAGE)

    class Stop(Exception):
        pass

    def stop(*_: object) -> tuple[Tensor, ...]:
        raise Stop

    handle = net.head.register_forward_pre_hook(stop) if where == "forward" else None
    with frozen(net):
        before = snapshot(net)
        with pytest.raises(Stop):
            score.folded(x, PLACES[Residual], fold if handle else stop)
        assert snapshot(net) == before
    if handle:
        handle.remove()


def test_what_is_differentiated_later_is_not_folded_again():
    net, x, calls = made(Residual), images(5, 3, 8, 8).requires_grad_(), []
    score = replace(bound(net, x.detach(), TARGET, IMAGE), create_graph=True)

    def counting(number: int, grad: Tensor, count: int) -> tuple[Tensor, ...]:
        calls.append(number)
        return fold(number, grad)

    found = score.folded(x, PLACES[Residual], counting)
    before = len(calls)
    torch.autograd.grad(found.folds[0].sum() + found.values.sum(), x)
    assert len(calls) == before
