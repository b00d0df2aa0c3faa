"""FORGrad's cut-off: the frequency up to which a method's maps are most faithful on a set of images."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xcli.execution import Execution
from xcli.methods.base import Attribution, Method, reduced
from xcli.methods.steps import applied, low_passed, resized
from xcli.metrics.faithfulness.deletion import Deletion, Insertion
from xcli.references import read
from xcli.score import Score

if TYPE_CHECKING:
    from xcli.plan import Plan

LOG = logging.getLogger(__name__)

BATCH = 16

FAITHFULNESS = (Insertion(), Deletion())
"""What is better the higher, and what is better the lower."""

PASSES = sum(one.steps - 1 for one in FAITHFULNESS)
"""Forward passes that both take of one map, but for those that all maps of an image share."""


def with_cutoffs(plan: Plan, known: Mapping[str, Any], *, quick: bool = False) -> Plan:
    """The plan with every ``low_pass: auto`` of its methods found.

    Args:
        known: ``Plan.resolved`` of the run that goes on, if one does: its cut-offs are taken again.
        quick: take the middle one of the candidates, unseen.
    """
    before, methods = known.get("steps", {}), []
    running = replace(plan, execution=Execution(BATCH, plan.execution.precision))
    for spec in plan.methods:
        method = spec.method
        if open_steps(method) and spec.label in before:
            method = replace(method, post_process=tuple(before[spec.label]))
        if quick:
            method = with_step(method, [place for place, _ in open_steps(method)], middle(plan.size))
        while unknown := open_steps(method):
            folder = unknown[0][1]["calibration"]
            parts = read(plan, folder)[0].split(BATCH)
            LOG.warning(
                "%s: finding its cut-off on %d pictures of %s", spec.label, sum(map(len, parts)), folder
            )
            # without the pass: its graph would stay for all pictures at once
            scores = (replace(running.practice(part), forward=None).scaled(spec.scale) for part in parts)
            method = calibrated(method, list(zip(scores, parts, strict=True)), folder)
        methods.append(replace(spec, method=method))
    return replace(plan, methods=tuple(methods))


def open_steps(method: Method) -> list[tuple[int, Any]]:
    """The steps of ``method`` whose cut-off is to be found, and their places."""
    steps: Sequence[Any] = method.post_process
    return [
        (i, step) for i, step in enumerate(steps) if isinstance(step, dict) and step.get("low_pass") == "auto"
    ]


def candidates(size: tuple[int, int]) -> list[float]:
    """Cut-offs for maps of ``size`` (H, W): two an octave from 2 periods up, and one that keeps everything."""
    side = max(size)
    everything = math.ceil(side / math.sqrt(2))
    steps = [round(2 * 2 ** (k / 2)) for k in range(2 * max(1, side.bit_length()))]
    return [*map(float, sorted({step for step in steps if step < everything})), float(everything)]


def calibrated(method: Method, batches: Sequence[tuple[Score, Tensor]], folder: str | None = None) -> Method:
    r"""``method`` with each ``low_pass: auto`` of its steps given the cut-off that is best on some images, one after
    the other; further steps count.

    .. math:: \sigma^* = \arg\max_\sigma \mathbb{E}_x\, F(\varphi_\sigma(x)), \qquad
        F = \text{insertion} - \text{deletion}

    with both metrics as they are by default. Of equally faithful cut-offs the highest is taken; maps that have no
    faithfulness (not finite) do not count. Source: Muzellec et al. 2023, arXiv:2307.09591, who take 1 280 images; their
    abstract leaves open which F, and which cut-offs they try.

    Args:
        batches: scores in the unit that is explained, with the images (B, C, H, W) that each is about.
        folder: go on only as long as the next step names these images; ``None``: whatever it names.
    """
    while (unknown := open_steps(method)) and folder in (None, unknown[0][1]["calibration"]):
        place = unknown[0][0]
        method = with_step(method, [place], best(method, place, batches))
    return method


def with_step(method: Method, places: Sequence[int], cutoff: float) -> Method:
    """``method`` with that cut-off at some places of its steps."""
    given: Any = {"low_pass": cutoff}
    steps = (given if place in places else step for place, step in enumerate(method.post_process))
    return replace(method, post_process=tuple(steps))


def middle(size: tuple[int, int]) -> float:
    """Some cut-off for maps of ``size``."""
    found = candidates(size)
    return found[len(found) // 2]


def best(method: Method, place: int, batches: Sequence[tuple[Score, Tensor]]) -> float:
    """The most faithful cut-off of the step at ``place``; later ones that are to be found are left out."""
    later = [other for other, _ in open_steps(method) if other > place]
    before = method.post_process[:place]
    after = [step for i, step in enumerate(method.post_process) if i > place and i not in later]
    cutoffs, found = candidates((batches[0][1].shape[-2], batches[0][1].shape[-1])), list[Tensor]()
    for score, x in batches:
        size = (x.shape[-2], x.shape[-1])
        maps = reduced(Attribution.of(method.attribute(score, x)).map, method.reduce).detach()
        maps = resized(applied(before, maps, size, method.upsampling), size, method.upsampling)

        def filtered(cutoff: float, maps: Tensor = maps, size: tuple[int, int] = size) -> Tensor:
            done = applied(after, low_passed(maps, cutoff), size, method.upsampling)
            return reduced(done, "sum")

        found.append(torch.stack([faithfulness(score, x, filtered(cutoff)) for cutoff in cutoffs]))
    means = torch.cat(found, 1).nanmean(1).tolist()  # one a cut-off
    told = ", ".join(f"{cutoff:g}: {mean:.3f}" for cutoff, mean in zip(cutoffs, means, strict=True))
    LOG.info("%s: faithfulness by cut-off: %s", method.name, told)
    ranked = [
        (-math.inf if math.isnan(mean) else mean, cutoff) for mean, cutoff in zip(means, cutoffs, strict=True)
    ]
    return max(ranked)[1]


def faithfulness(score: Score, x: Tensor, maps: Tensor) -> Tensor:
    """Insertion less deletion of maps (N, H, W): (N,)."""
    gain, loss = (one.measure(map=maps, x=x, score=score).values for one in FAITHFULNESS)
    return gain - loss  # type: ignore[operator]
