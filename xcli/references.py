"""Pictures beside those that are explained: what methods compare with, and what options are found on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xcli.errors import InputError
from xcli.images import find_images, stream

if TYPE_CHECKING:
    from xcli.config import Config
    from xcli.plan import Plan

LOG = logging.getLogger(__name__)
MOST = 128
"""Of a larger folder so many pictures are taken, spread evenly over its sorted list."""


def read(plan: Plan, name: str) -> tuple[Tensor, str]:
    """The pictures of a folder, list or glob as model input, (R, C, H, W) on the device, and the SHA-256 of their
    pixels.

    Raises:
        InputError: there are none, or none can be read.
    """
    sources, images = find_images([name]), plan.config.images
    count = min(MOST, len(sources))
    chosen = [sources[place * len(sources) // count] for place in range(count)]
    batches = stream(
        chosen,
        range(count),
        plan.preprocess,
        size=plan.size,
        batch_size=16,
        workers=0,
        background=images.background_rgb,
        max_pixels=images.max_pixels,
        draft=images.draft,
    )
    digest, found = hashlib.sha256(), []
    for batch in batches:
        for row, reason in batch.failed:
            LOG.warning("%s: %s: left out: %s", name, chosen[row].path, reason)
        if batch.rows:
            digest.update(batch.pixels.numpy().tobytes())
            found.append(plan.on_device(batch.pixels))
    if not found:
        raise InputError(f"{name}: none of its {len(sources)} images can be read")
    return torch.cat(found), digest.hexdigest()


def refuse_missing(config: Config, *, begun: bool) -> None:
    """Before anything is loaded: a folder that a method draws from, or in a run that is not yet begun is calibrated on,
    has no images.

    Raises:
        InvalidConfigError: with the method's place in the config.
    """
    for index, spec in enumerate(config.methods):
        for name in (*spec.method.draws_from(), *(() if begun else folders(spec.method.post_process))):
            try:
                find_images([name])
            except InputError as error:
                raise config.error(("methods", index), str(error)) from None


def folders(steps: Sequence[Any]) -> list[str]:
    """What the steps of ``post_process`` are calibrated on."""
    return [step["calibration"] for step in steps if isinstance(step, dict) and "calibration" in step]


def with_pictures(plan: Plan, known: Mapping[str, Any]) -> Plan:
    """The plan with the pictures that its methods draw from.

    Args:
        known: ``Plan.resolved`` of the run that goes on, if one does.

    Raises:
        InputError: some cannot be read, or are others than when the run began.
    """
    running = [spec for spec in plan.methods if spec.label not in plan.idle]
    names = dict.fromkeys(name for spec in running for name in spec.method.draws_from())
    found = {name: read(plan, name) for name in names}
    digests, before = {name: digest for name, (_, digest) in found.items()}, known.get("pictures", {})
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            raise InputError(
                f"{name}: its pictures are others than when this run began; put them back, or start over with --fresh"
            )
    return replace(plan, pictures={name: pictures for name, (pictures, _) in found.items()}, digests=digests)
