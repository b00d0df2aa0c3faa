"""The promises that every method keeps, as functions of (method, network), so that a broken one can be seen to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from xcli.demo.scenes import scene
from xcli.execution import Execution
from xcli.forward import Forward
from xcli.hooks import frozen
from xcli.layers import Layers, survey
from xcli.methods.base import Attribution, Method
from xcli.score import Score
from xcli.targets import ClassRows

T = TypeVar("T")
NETWORKS = {"shapes-cnn": (64, 48), "shapes-vit": (128, 128)}
REFUSED = {
    ("cam", "shapes-vit"),
    ("lrp", "shapes-vit"),
    ("deeplift", "shapes-vit"),
    ("deeplift-shap", "shapes-vit"),
    ("excitation-backprop", "shapes-vit"),
    ("contrastive-excitation-backprop", "shapes-vit"),
    ("attention-rollout", "shapes-cnn"),
    ("chefer", "shapes-cnn"),
    ("gradient-rollout", "shapes-cnn"),
    ("legrad", "shapes-cnn"),
}
"""Pairs that cannot be computed exactly, so that a method says so instead of answering."""

IMAGES = 5
ROWS = ([0, 0, 1, 2, 3, 3, 4], [6, 9, 1, 7, 0, 1, 2])  # image and class of each row: what the scenes show


@cache
def pictures(size: tuple[int, int]) -> Tensor:
    """Five scenes of (H, W) as network input: noise would leave the rectified maps empty."""
    drawn = [scene(np.random.default_rng((3, i)), objects=2, size=max(size)).image for i in range(IMAGES)]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)[..., : size[0], : size[1]]
    return (pixels.double() / 255 - 0.5) / 0.25


def score_of(
    net: nn.Module, x: Tensor, images: Sequence[int], targets: Sequence[int], micro_batch: int = 64
) -> Score:
    """Rows (image, target) on the pictures ``x``; keys name the pictures by content, as paths name files."""
    keys = [f"{float(one.sum()):.12e}" for one in x]
    rows = ClassRows(torch.tensor(images), torch.tensor(targets))
    layers = layers_of(net, tuple(x.shape[1:]))
    return Score(net, rows, layers, Execution(micro_batch), keys=keys, pictures=Others(x.shape[2:]))


class Others(dict):
    """Whatever folder an option names, it holds these two pictures."""

    def __init__(self, size: torch.Size) -> None:
        self.size = size

    def __missing__(self, name: str) -> Tensor:
        return pictures(self.size)[[2, 4]].flip(3) / 2

    def __contains__(self, name: object) -> bool:
        return True


@cache
def layers_of(net: nn.Module, shape: tuple[int, ...]) -> Layers:
    """The survey of a network, once for all promises."""
    return survey(net, pictures(shape[1:])[:1])


class Whole:
    """What was found for all rows at once, kept until it is asked for something else: several promises start there."""

    asked: tuple[object, ...] = ()
    kept: object = None

    def of(self, find: Callable[..., T], *asked: object) -> T:
        """``find(*asked)``, which is not called again for the same objects."""
        if len(asked) != len(self.asked) or any(a is not b for a, b in zip(asked, self.asked)):
            self.asked, self.kept = (), find(*asked)
            self.asked = asked
        return self.kept


WHOLE = Whole()


def whole_of(method: Method, net: nn.Module, x: Tensor) -> Tensor:
    return WHOLE.of(lambda *given: maps_of(*given, *ROWS), method, net, x)


def maps_of(
    method: Method, net: nn.Module, x: Tensor, images: Sequence[int], targets: Sequence[int], **how: int
) -> Tensor:
    return found(method, score_of(net, x, images, targets, **how), x).map


def found(method: Method, score: Score, x: Tensor) -> Attribution:
    return method.explain(score.scaled(method.scale), x)


def has_right_shape_and_is_finite(method: Method, net: nn.Module, x: Tensor) -> None:
    given = found(method, score_of(net, x, *ROWS), x)
    assert given.map.shape[0] == len(ROWS[0])
    assert given.map.ndim in (3, 4)
    assert given.map.dtype == x.dtype
    assert given.map.device == x.device
    assert torch.isfinite(given.map).all()
    assert (given.map != 0).any()
    assert all(values.shape == (len(ROWS[0]),) for values in given.extras.values())
    sized = method.explain(score_of(net, x, *ROWS).scaled(method.scale), x, (20, 30)).map
    assert sized.shape[-2:] == (20, 30)


def batch_and_micro_batch_do_not_matter(method: Method, net: nn.Module, x: Tensor) -> None:
    whole = whole_of(method, net, x)
    for micro_batch in (1, 3):
        assert_close(maps_of(method, net, x, *ROWS, micro_batch=micro_batch), whole, rtol=1e-10, atol=1e-12)
    alone = [
        maps_of(method, net, x[image : image + 1], [0], [target]) for image, target in zip(*ROWS, strict=True)
    ]
    assert_close(torch.cat(alone), whole, rtol=1e-10, atol=1e-12)


def order_and_company_do_not_matter(method: Method, net: nn.Module, x: Tensor) -> None:
    whole = whole_of(method, net, x)
    turned = maps_of(
        method, net, x.flip(0), [IMAGES - 1 - i for i in reversed(ROWS[0])], list(reversed(ROWS[1]))
    )
    assert_close(turned.flip(0), whole, rtol=1e-10, atol=1e-12)
    pair = maps_of(method, net, x[[3, 1]], [0, 1], [0, 1])
    assert_close(pair, whole[[4, 2]], rtol=1e-10, atol=1e-12)


def a_recorded_pass_gives_the_same(method: Method, net: nn.Module, x: Tensor) -> None:
    score = score_of(net, x, *ROWS)
    layers = method.looks_at(score.layers)
    with frozen(net):
        forward = Forward(
            net, x, [layer.name for layer in layers], Execution(2), leaves=[layer.name for layer in layers]
        )
        assert_close(found(method, replace(score, forward=forward), x).map, whole_of(method, net, x))


def running_out_of_memory_changes_nothing(method: Method, net: nn.Module, x: Tensor) -> None:
    whole = whole_of(method, net, x)
    score = score_of(net, x, *ROWS)

    def limited(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    handle = net.register_forward_pre_hook(limited)
    try:
        squeezed = found(method, score, x).map
    finally:
        handle.remove()
    assert_close(squeezed, whole, rtol=1e-10, atol=1e-12)


def the_network_is_left_as_found(method: Method, net: nn.Module, x: Tensor) -> None:
    net.train()
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, 0.5) if index % 3 == 0 else None
    before = snapshot(net)
    with frozen(net):
        maps_of(method, net, x, *ROWS)
    assert snapshot(net) == before

    class Stop(Exception):
        pass

    def explode(*_: object) -> None:
        raise Stop

    with frozen(net):
        score = score_of(net, x, *ROWS, micro_batch=2)
    last = [part for part in net.modules() if not list(part.children())][-1]
    handle = last.register_forward_pre_hook(explode)
    try:
        with frozen(net):
            found(method, score, x)
    except Stop:
        pass
    else:
        assert not method.needs, "the network was never asked"
    finally:
        handle.remove()
    assert snapshot(net) == before


def snapshot(net: nn.Module) -> list[object]:
    """Everything about a network that an explainer could leave changed, comparable by ``==``."""
    state: list[object] = [torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()]
    for name, part in net.named_modules():
        hooks = [
            len(kept) for kind, kept in vars(part).items() if kind.endswith("_hooks") and kept is not None
        ]
        state.append((name, id(part), type(part), part.training, "forward" in vars(part), hooks))
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        grad = None if value.grad is None else value.grad.sum().item()
        state.append(
            (name, id(value), value.requires_grad, grad, value.stride(), value.double().sum().item())
        )
    return state


PROMISES: Sequence[Callable[[Method, nn.Module, Tensor], None]] = (
    has_right_shape_and_is_finite,
    batch_and_micro_batch_do_not_matter,
    order_and_company_do_not_matter,
    a_recorded_pass_gives_the_same,
    running_out_of_memory_changes_nothing,
    the_network_is_left_as_found,
)
