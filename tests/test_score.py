"""The Score against plain autograd, under forced halving, and one toy method of each kind that will live on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, SumModel, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.forward import Forward
from xcli.hooks import frozen, recording
from xcli.score import Score

ROWS = {"target": [1, 0, 3, 2, 2, 0], "image": [0, 0, 1, 2, 2, 2]}  # 2, 1 and 3 rows an image


def reference(net: nn.Module, x: Tensor, layer: str, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activation, gradient, value of one image by a plain hook and a plain backward pass."""
    kept = {}
    handle = net.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: kept.update(out=out) or out.clone()
    )
    value = net(x[None])[0, target]
    handle.remove()
    (grad,) = torch.autograd.grad(value, kept["out"])
    return kept["out"][0].detach(), grad[0], value.detach()


class OutOfMemory:
    """A module that fails above ``limit`` inputs, as an allocator does, forward or backward."""

    def __init__(self, net: nn.Module, limit: int, backward: bool) -> None:
        self.net, self.limit, self.backward, self.failures = net, limit, backward, 0

    def __enter__(self) -> OutOfMemory:
        def fail(*_args: Any) -> None:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

        def check(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if len(inputs[0]) > self.limit:
                output.register_hook(fail) if self.backward and output.requires_grad else None
                if not self.backward:
                    fail()

        self.handle = self.net.register_forward_hook(check)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
@pytest.mark.parametrize(
    ("kind", "layer"),
    [(PooledLinear, "features"), (PooledLinear, "features.0"), (Residual, "last"), (Tokens, "norm1")],
)
def test_gradients_equal_plain_autograd_row_by_row(kind, layer, micro_batch):
    net, x = made(kind), images(3, 3, 16, 16)
    score = bound(net, x, **ROWS, micro_batch=micro_batch)
    (acts,), (grads,), values = score.gradients(x, at=score.layers.find(layer))
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"], strict=True)):
        act, grad, value = reference(net, x[image], layer, target)
        assert_close(acts[row], act, atol=1e-14, rtol=1e-12)
        assert_close(grads[row], grad, atol=1e-14, rtol=1e-12)
        assert_close(values[row], value, atol=1e-14, rtol=1e-12)


def test_gradients_at_the_input_and_at_two_layers_at_once():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, **ROWS)
    leaf = x.clone().requires_grad_()
    expected = torch.stack(
        [
            torch.autograd.grad(net(leaf)[i, t], leaf)[0][i]
            for t, i in zip(ROWS["target"], ROWS["image"], strict=True)
        ]
    )
    found = score.gradients(x)
    assert_close(found.grads[0], expected)
    assert_close(found.acts[0], x[score.image])
    deep, early = score.layers.find(["features", "features.0"])
    both = score.gradients(x, at=(deep, early))
    assert_close(both.grads[0], score.gradients(x, at=(deep,)).grads[0])
    assert_close(both.grads[1], score.gradients(x, at=(early,)).grads[0])


def test_images_without_a_row_are_left_out():
    net, x = made(PooledLinear), images(4, 3, 8, 6)
    score = bound(net, x, target=[1, 2], image=[1, 3], micro_batch=2)
    (acts,), (grads,), values = score.gradients(x, at=score.layers.find("features"))
    alone = bound(net, x[[1, 3]], target=[1, 2])
    other = alone.gradients(x[[1, 3]], at=alone.layers.find("features"))
    assert_close(acts, other.acts[0])
    assert_close(grads, other.grads[0])
    assert_close(values, other.values)


def test_a_row_given_for_each_input():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, **ROWS, micro_batch=2)
    row = torch.tensor([5, 0, 0, 3])
    copies = images(4, 3, 8, 6, seed=1)
    grads = score.gradients(copies, row=row).grads[0]
    for index, own in enumerate(row.tolist()):
        leaf = copies[index : index + 1].clone().requires_grad_()
        assert_close(grads[index], torch.autograd.grad(net(leaf)[0, ROWS["target"][own]], leaf)[0][0])
    assert_close(
        score.at(copies, row), net(copies)[torch.arange(4), torch.tensor(ROWS["target"])[row]].detach()
    )


@pytest.mark.parametrize("backward", [False, True])
def test_running_out_of_memory_halves_and_changes_nothing(backward):
    net, x = made(Residual), images(3, 3, 16, 16)
    calm = bound(net, x, **ROWS)
    expected = calm.gradients(x, at=calm.layers.find("last"))
    for limit, final in ((2, 1), (1, 1)):
        score = bound(net, x, **ROWS)
        with OutOfMemory(net, limit, backward) as trouble:
            found = score.gradients(x, at=score.layers.find("last"))
        assert trouble.failures > 0
        assert score.execution.micro_batch == final
        assert_close(found.grads[0], expected.grads[0], atol=1e-15, rtol=1e-12)
        assert_close(found.values, expected.values, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("backward", [False, True])
def test_running_out_of_memory_with_one_input_is_said(backward):
    net, x = made(Residual), images(1, 3, 16, 16)
    score = bound(net, x, [1])
    with OutOfMemory(net, 0, backward), pytest.raises(ModelError, match="out of memory"):
        score.gradients(x, at=score.layers.find("last"))


def test_other_runtime_errors_pass_through():
    with pytest.raises(RuntimeError, match="shape"):
        Execution(4).each(lambda _x: (_ for _ in ()).throw(RuntimeError("bad shape")), torch.zeros(2))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_one_forward_of_a_copy_serves_every_row_of_its_image(micro_batch):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, **ROWS, micro_batch=micro_batch)
    image = torch.tensor([2, 0, 1, 2])
    copies = images(4, 3, 8, 6, seed=1)
    calls = []
    handle = net.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    values, copy, row = score.on(copies, image)
    handle.remove()
    assert copy.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert row.tolist() == [3, 4, 5, 0, 1, 2, 3, 4, 5]
    assert_close(values, net(copies)[copy, torch.tensor(ROWS["target"])[row]].detach())
    assert sum(calls) == 4
    assert max(calls) <= micro_batch


def test_a_forward_pass_that_has_run_serves_gradients_and_activations():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    plain = bound(net, x, **ROWS)
    with frozen(net):
        forward = Forward(net, x, ["features", "features.0"], Execution(2), leaves=["features", "features.0"])
        shared = replace(plain, forward=forward)
        calls = []
        handle = net.register_forward_hook(lambda *_: calls.append(1))
        layer = shared.layers.find("features")
        for score in (shared, shared.scaled("probability"), shared.retarget(torch.tensor([0] * 6))):
            own = replace(score, forward=None, memo={})
            before = len(calls)
            found, acts = score.gradients(x, at=layer), score.activations(x, layer)
            assert len(calls) == before, "the pass was run again"
            assert_close(found.grads[0], own.gradients(x, at=layer).grads[0])
            assert_close(found.values, own.values(x[own.image], torch.arange(6)).detach())
            assert_close(acts[0], own.activations(x, layer)[0])
        handle.remove()


def test_a_recorded_pass_that_does_not_fit_backward_is_given_up():
    net, x = made(Residual), images(4, 3, 16, 16)
    expected = bound(net, x, [0, 1, 2, 3])
    layer = expected.layers.find("last")
    with OutOfMemory(net, 2, backward=True) as trouble:
        forward = Forward(net, x, ["last"], execution := Execution(4), leaves=["last"])
        score = replace(bound(net, x, [0, 1, 2, 3]), forward=forward, execution=execution)
        found = score.gradients(x, at=layer)
    assert trouble.failures == 2  # once for the kept graph, once for the whole batch anew
    assert execution.micro_batch == 2
    assert not execution.keep_graphs
    assert_close(found.grads[0], expected.gradients(x, at=layer).grads[0])


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (PooledLinear, "features.0"),
        (PooledLinear, "features"),
        (Residual, "block.0"),
        (Residual, "block"),
        (Residual, "last"),
        (Residual, "stem"),
        (Tokens, "norm1"),
        (Tokens, "mlp.0"),
        (Tokens, "attention"),
    ],
)
def test_the_tail_equals_the_whole_network(kind, layer):
    net, x = made(kind), images(3, 3, 16, 16)
    score = bound(net, x, **ROWS, micro_batch=2)
    (place,) = score.layers.find(layer)
    tail = score.tail(x, place)
    acts = tail.prefix.activations()
    image = torch.tensor([2, 0, 1, 2, 1])
    changed = acts[image] * torch.linspace(0.5, 1.5, 5, dtype=torch.float64).view(-1, *[1] * (acts.ndim - 1))
    values, copy, row = tail.on(changed, image)
    for index in range(5):
        with torch.no_grad(), replaced(net, layer, changed[index : index + 1]):
            logits = net(x[image[index]][None])[0]
        own = copy == index
        assert_close(values[own], logits[torch.tensor(ROWS["target"])[row[own]]], atol=1e-12, rtol=1e-10)
    assert_close(tail(acts[score.image]), score(x[score.image]))


def replaced(net: nn.Module, layer: str, value: Tensor) -> Any:
    """A context in which the output of ``layer`` is ``value``; the slow way, through the whole network."""
    handle = net.get_submodule(layer).register_forward_hook(
        lambda _m, _i, out: value.clone() if isinstance(out, Tensor) else (value.clone(), *out[1:])
    )
    return handle


def test_the_tail_skips_what_comes_before():
    net, x = made(Residual), images(2, 3, 16, 16)
    score = bound(net, x, [0, 1])
    tail = score.tail(x, score.layers.find("last")[0])
    ran = []
    inner = net.block[0].register_forward_hook(lambda *_: ran.append("block"))
    after = net.head.register_forward_hook(lambda *_: ran.append("head"))
    tail(tail.prefix.activations())
    inner.remove()
    after.remove()
    assert ran == ["head"]


def test_the_gradient_of_the_tail_is_that_of_the_layer():
    net, x = made(Residual), images(2, 3, 16, 16)
    score = bound(net, x, [0, 1])
    layer = score.layers.find("last")
    tail = score.tail(x, layer[0])
    assert_close(tail.gradients(tail.prefix.activations()).grads[0], score.gradients(x, at=layer).grads[0])


def test_gradients_can_be_differentiated_in_turn():
    net, x = made(Tokens), images(2, 3, 16, 16).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 1]), create_graph=True)

    def loss(pixels: Tensor) -> Tensor:
        (acts,), (grads,), _ = score.gradients(pixels, at=score.layers.find("norm1"))
        return (acts * grads).square().sum()

    (slope,) = torch.autograd.grad(loss(x), x)
    step = images(2, 3, 16, 16, seed=5)
    numeric = (loss(x + 1e-5 * step) - loss(x - 1e-5 * step)) / 2e-5
    assert_close((slope * step).sum(), numeric.detach(), rtol=1e-6, atol=1e-8)


def test_images_without_a_row_cost_nothing_and_change_nothing():
    net, x = made(Residual), images(5, 3, 8, 8)
    rows = {"target": [1, 0, 3], "image": [1, 1, 3]}
    score, alone = bound(net, x, **rows), bound(net, x[[1, 3]], [1, 0, 3], [0, 0, 1])
    ran: list[int] = []
    handle = net.register_forward_pre_hook(lambda _net, inputs: ran.append(len(inputs[0])))
    values, copy, row = score.on(x.repeat_interleave(2, 0), torch.arange(5).repeat_interleave(2))
    assert (sum(ran), copy.tolist(), row.tolist()) == (4, [2, 2, 3, 3, 6, 7], [0, 1, 0, 1, 2, 2])
    assert_close(values, alone(x[[1, 1, 3]])[row])
    ran.clear()
    layer = score.layers.find("last")
    found, expected = score.gradients(x, at=layer), alone.gradients(x[[1, 3]], at=layer)
    assert sum(ran) == 4  # two each
    for ours, theirs in zip(
        [*found.acts, *found.grads, found.values], [*expected.acts, *expected.grads, expected.values]
    ):
        assert_close(ours, theirs)
    folded = score.folded(x, ["stem"], lambda _number, grad, _count: (grad.abs().sum((1, 2, 3)),))
    other = alone.folded(x[[1, 3]], ["stem"], lambda _number, grad, _count: (grad.abs().sum((1, 2, 3)),))
    assert_close(folded.grads, other.grads)
    assert_close(folded.folds[0], other.folds[0])
    handle.remove()


def test_every_unit_of_the_score():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    logits = net(x).detach()
    score = bound(net, x, [1, 4])
    rest = logits.clone()
    rest[[0, 1], [1, 4]] = -torch.inf
    for scale, expected in {
        "logit": logits[[0, 1], [1, 4]],
        "probability": logits.softmax(1)[[0, 1], [1, 4]],
        "log-probability": logits.log_softmax(1)[[0, 1], [1, 4]],
        "contrast": logits[[0, 1], [1, 4]] - rest.amax(1),
    }.items():
        assert_close(score.scaled(scale)(x), expected)
    binary = bound(made(SumModel), x, [0, 0])
    assert_close(binary.scaled("probability")(x), x.flatten(1).sum(1).sigmoid())


def test_random_numbers_depend_on_seed_image_and_tag_alone():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, **ROWS)

    def draw(own: Score, row: int, tag: str = "noise") -> list[float]:
        return torch.rand(3, generator=own.generator(row, tag)).tolist()

    turned = bound(net, x.flip(0), target=[0, 3], image=[0, 1])
    turned = replace(turned, keys=["image-2", "image-1", "image-0"])
    assert draw(score, 5) == draw(turned, 0) == draw(score, 3)
    assert draw(score, 0) != draw(score, 2)
    assert draw(score, 0) != draw(score, 0, "other")
    assert draw(score, 0) != draw(replace(score, seed=1), 0)


def test_a_layer_that_runs_twice_is_refused():
    net, x = made(Residual), images(1, 3, 16, 16)
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match="more than once"),
        recording(net, ["twice"], leaves=["twice"]),
    ):
        net(x)
    assert not net.twice._forward_hooks


# ---- one toy of each kind that is to live on Score -------------------------------------------------------------


def test_toy_perturbation_occlusion_of_a_sum_is_the_image():
    """Occluding pixels of f = sum one by one gives back each pixel; copies of all images share the passes."""
    net, x = made(SumModel), images(2, 3, 4, 5)
    score = bound(net, x, [0, 0], micro_batch=7)
    masks = torch.eye(20, dtype=torch.float64).view(20, 1, 4, 5)
    image = torch.arange(2).repeat_interleave(20)
    copies = (x[:, None] * (1 - masks)).flatten(0, 1)
    values, _copy, row = score.on(copies, image)
    drop = score(x)[row] - values
    assert_close(drop.view(2, 4, 5), x.sum(1))


def test_toy_metric_deletion_of_a_sum_is_a_sorted_running_sum():
    net = made(SumModel)
    x = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]], dtype=torch.float64)
    score = bound(net, x, [0])
    order = x.flatten(1).argsort(1, descending=True)
    keep = torch.stack([torch.ones(4, dtype=torch.float64).index_fill(0, order[0, :k], 0) for k in range(5)])
    curve = score.at(x * keep.view(5, 1, 2, 2), torch.zeros(5, dtype=torch.long))
    assert curve.tolist() == [10, 6, 3, 1, 0]


def test_toy_ablation_of_channels_on_a_linear_tail():
    """Leaving channel k out of a pooled linear net costs w_ck * mean(A_k), for every row from one tail pass."""
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, target=[1, 4, 0], image=[0, 0, 1])
    layer = score.layers.find("relu")[0]
    tail = score.tail(x, layer)
    acts = tail.prefix.activations()
    keep = (1 - torch.eye(8, dtype=torch.float64))[:, :, None, None]
    image = torch.arange(2).repeat_interleave(8)
    values, copy, row = tail.on((acts[:, None] * keep).flatten(0, 1), image)
    cost = score(x[score.image])[row] - values
    weight = net.head.weight[torch.tensor([1, 4, 0])[row], copy % 8]
    assert_close(cost, (weight * acts.mean((2, 3))[score.image[row], copy % 8]).detach())


@dataclass(frozen=True)
class BoxRows:
    """Toy detections: the model answers with one dict an image; a row is the best overlap with its box."""

    image: Tensor
    box: Tensor

    def values(self, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
        return torch.stack(
            [
                (outputs[c]["weight"] * overlap(outputs[c]["box"], self.box[r])).amax()
                for c, r in zip(copy, row)
            ]
        )

    def scaled(self, scale: str) -> BoxRows:
        return self

    def retarget(self, target: Tensor) -> BoxRows:
        return replace(self, box=target)

    def columns(self) -> Mapping[str, Tensor]:
        return {"box": self.box}


def overlap(boxes: Tensor, own: Tensor) -> Tensor:
    """Overlap of intervals (Q, 2) with one interval, by the union."""
    inner = (torch.minimum(boxes[:, 1], own[1]) - torch.maximum(boxes[:, 0], own[0])).clamp_min(0)
    return inner / (torch.maximum(boxes[:, 1], own[1]) - torch.minimum(boxes[:, 0], own[0]))


class Detector(nn.Module):
    """Two intervals an image, of a weight that depends on the picture."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        boxes = torch.tensor([[0.0, 2.0], [1.0, 4.0]], dtype=x.dtype)
        return [{"box": boxes, "weight": torch.stack([one.sum(), one.square().sum()])} for one in x]


def test_toy_detection_rows_with_a_list_of_outputs():
    x = images(2, 3, 4, 4).abs()
    rows = BoxRows(
        torch.tensor([0, 0, 1]), torch.tensor([[0.0, 2.0], [1.0, 4.0], [0.0, 4.0]], dtype=torch.float64)
    )
    net = Detector()
    plain = bound(made(SumModel), x, [0, 0])
    score = replace(plain, module=net, rows=rows, execution=Execution(2))
    total, power = x.flatten(1).sum(1), x.flatten(1).square().sum(1)
    assert_close(score.on(x, torch.arange(2))[0][0], torch.maximum(total[0], power[0] * 0.25))
    leaf = x.clone().requires_grad_()
    best = rows.values(net(leaf), torch.tensor([0, 0, 1]), torch.arange(3))
    expected = [
        torch.autograd.grad(value, leaf, retain_graph=True)[0][image] for value, image in zip(best, (0, 0, 1))
    ]
    assert_close(score.gradients(x).grads[0], torch.stack(expected))


def test_toy_randomisation_another_module_under_the_same_rows():
    net, other, x = made(PooledLinear), made(PooledLinear, seed=1), images(2, 3, 8, 6)
    score = bound(net, x, [1, 4])
    moved = score.using(other)
    assert_close(moved(x), other(x)[[0, 1], [1, 4]].detach())
    layer = score.layers.find("features")
    assert_close(
        moved.gradients(x, at=layer).grads[0], bound(other, x, [1, 4]).gradients(x, at=layer).grads[0]
    )


def test_toy_random_logit_retargets():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    assert_close(bound(net, x, [1, 4]).retarget(torch.tensor([0, 2]))(x), net(x)[[0, 1], [0, 2]].detach())


def test_gradients_do_not_depend_on_the_callers_grad_mode():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, [0, 1, 2, 3], [0, 0, 1, 2])
    layer = score.layers.find("features")
    expected = score.gradients(x, at=layer)
    with torch.no_grad():
        found = score.gradients(x, at=layer)
        assert_close(score.gradients(x).grads, bound(net, x, [0, 1, 2, 3], [0, 0, 1, 2]).gradients(x).grads)
    assert_close(found.grads, expected.grads)


def test_what_was_kept_for_a_map_is_forgotten_with_it_in_every_unit():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score, first, second = bound(net, x, [0, 1]), torch.zeros(1), torch.zeros(1)
    for one in (score, score.scaled("probability")):
        for kept in (first, second):
            one.once((kept, "kept"), lambda: torch.ones(1))
    score.forget(first)
    for one in (score, score.scaled("probability")):
        assert [key[0] is second for key in one.memo] == [True]
