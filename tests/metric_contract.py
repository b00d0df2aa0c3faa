"""The promises that every metric keeps, as functions of (metric, network), so that a broken one can be seen to fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from contract import IMAGES, ROWS, WHOLE, pictures, score_of, snapshot
from torch import Tensor, nn
from torch.testing import assert_close

from xcli.hooks import frozen
from xcli.methods.cam.gradient import GradCAM
from xcli.metrics.base import Measured, Metric, Truth
from xcli.score import Score

METHOD = GradCAM(relu=False)
SIZE = (64, 64)


def explain(score: Score, x: Tensor) -> Tensor:
    return METHOD.explain(score.scaled(METHOD.scale), x, (x.shape[2], x.shape[3])).map


def truth_of(
    keys: Sequence[str], images: Sequence[int], size: tuple[int, int], device: torch.device
) -> Truth:
    """A box somewhere in each image, named by the image's key as a file would be; one image has none."""
    masks, known = (
        torch.zeros(len(images), *size, dtype=torch.bool),
        torch.ones(len(images), dtype=torch.bool),
    )
    for row, image in enumerate(images):
        place = int(float(keys[image]) * 1e3) % 24
        masks[row, place : place + 24, 8 : 24 + place] = True
        known[row] = place % 5 != 1
    pixel = torch.full((len(images), 2), 1.5, dtype=torch.float64, device=device)
    return Truth((masks & known[:, None, None]).to(device), known.to(device), pixel)


def given(
    metric: Metric, net: nn.Module, x: Tensor, images: Sequence[int], targets: Sequence[int], **how: int
) -> dict[str, Any]:
    """Everything that the metric consumes, and nothing else."""
    score = score_of(net, x, images, targets, **how)
    offers: Mapping[str, Callable[[], object]] = {
        "map": lambda: explain(score, x),
        "x": lambda: x,
        "score": lambda: score,
        "truth": lambda: truth_of(score.keys, images, SIZE, x.device),
        "method": lambda: explain,
        "module": lambda: net,
        "models": lambda: tuple(score.using(other) for other in checkpoints(net)),
    }
    return {name: offers[name]() for name in metric.consumes}


@cache
def checkpoints(net: nn.Module) -> tuple[nn.Module, ...]:
    """Two networks a little off the first."""
    made = []
    for seed in range(2):
        other, draw = deepcopy(net), torch.Generator().manual_seed(seed)
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter)
            parameter.data += 0.05 * parameter.data.std(unbiased=False) * noise
        made.append(other)
    return tuple(made)


def measured(
    metric: Metric, net: nn.Module, x: Tensor, images: Sequence[int], targets: Sequence[int], **how: int
) -> Measured:
    return metric.measure(**given(metric, net, x, images, targets, **how))


def whole_of(metric: Metric, net: nn.Module, x: Tensor) -> list[Tensor]:
    return WHOLE.of(lambda *told: parts_of(measured(*told, *ROWS)), metric, net, x)


def parts_of(found: Measured) -> list[Tensor]:
    return [part for part in (found.values, found.curve, *found.extras.values()) if part is not None]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-8, atol=1e-10, equal_nan=True)


def values_are_in_bounds(metric: Metric, net: nn.Module, x: Tensor) -> None:
    found = measured(metric, net, x, *ROWS)
    count = len(ROWS[0])
    assert found.values is not None or found.curve is not None
    assert all(part.shape[0] == count for part in parts_of(found))
    assert all(not part.requires_grad for part in parts_of(found))
    if found.curve is not None and found.fraction is not None:
        assert found.curve.shape == (count, len(found.fraction))
        assert (found.fraction.diff() > 0).all()
    if found.values is None:
        return
    assert found.values.shape == (count,)
    defined = found.values[found.values.isfinite()]
    assert len(defined) >= 2, "hardly any row has a value"
    assert len(defined.unique()) >= 2 or metric.bounds == (0, 1), "every row has the same value"
    low, high = metric.bounds
    assert low is None or (defined >= low - 1e-9).all()
    assert high is None or (defined <= high + 1e-9).all()


def batch_and_micro_batch_do_not_matter(metric: Metric, net: nn.Module, x: Tensor) -> None:
    whole = whole_of(metric, net, x)
    same(parts_of(measured(metric, net, x, *ROWS, micro_batch=3)), whole)
    alone = [
        parts_of(measured(metric, net, x[image : image + 1], [0], [target]))
        for image, target in zip(*ROWS, strict=True)
    ]
    same([torch.cat(parts) for parts in zip(*alone, strict=True)], whole)


def order_and_company_do_not_matter(metric: Metric, net: nn.Module, x: Tensor) -> None:
    whole = whole_of(metric, net, x)
    images, targets = [IMAGES - 1 - i for i in reversed(ROWS[0])], list(reversed(ROWS[1]))
    same([part.flip(0) for part in parts_of(measured(metric, net, x.flip(0), images, targets))], whole)


def a_recorded_pass_gives_the_same(metric: Metric, net: nn.Module, x: Tensor) -> None:
    from xcli.execution import Execution
    from xcli.forward import Forward

    offered, whole = given(metric, net, x, *ROWS), whole_of(metric, net, x)
    if "score" in offered:
        with frozen(net):
            forward = Forward(net, x, (), Execution(2))
        offered["score"] = replace(offered["score"], forward=forward, memo={}, scales={})
    same(parts_of(metric.measure(**offered)), whole)


def the_network_is_left_as_found(metric: Metric, net: nn.Module, x: Tensor) -> None:
    before = snapshot(net)
    with frozen(net):
        measured(metric, net, x, *ROWS)
    assert snapshot(net) == before


PROMISES: Sequence[Callable[[Metric, nn.Module, Tensor], None]] = (
    values_are_in_bounds,
    batch_and_micro_batch_do_not_matter,
    order_and_company_do_not_matter,
    a_recorded_pass_gives_the_same,
    the_network_is_left_as_found,
)


def scenes() -> Tensor:
    return pictures(SIZE)
