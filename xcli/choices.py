"""What `auto` stands for: the device, the input size, the memory layout; and the first pass of the network."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from xcli import tuning
from xcli.config import Config
from xcli.errors import ConfigError, InputError, MemoryExhausted, ModelError
from xcli.execution import numbers_of, out_of_memory
from xcli.images import BadImage, Source, image_size
from xcli.models import Model, find_logits
from xcli.preprocess import Preprocess
from xcli.targets import label_classes


def refuse_underflow(config: Config) -> None:
    """Raise ``ConfigError`` where gradients would be computed in float16: most of them become zero."""
    needing = [spec.label for spec in config.methods if "gradients" in spec.method.needs]
    if config.runtime.precision == "float16" and needing:
        text = f"gradients vanish in float16 ({', '.join(needing)}); use bfloat16 or float32"
        raise config.error(("runtime", "precision"), text)


def logit_count(model: Model, x: Tensor) -> int:
    """How many logits the model gives; its first pass, in which an input that does not fit shows.

    Raises:
        ModelError: the network cannot be run on ``x``; says why, and where in the network.
    """
    try:
        with torch.no_grad():
            return find_logits(model.module(x), model.output).shape[1]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise MemoryExhausted(
                f"one {tuple(x.shape)} input does not fit into memory{numbers_of(error)}; use a smaller input size or "
                "another device"
            ) from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ModelError(
            f"{model.name} cannot run on an input of shape {tuple(x.shape)}: {error} "
            f"({type(error).__name__} in {Path(last.filename).name}:{last.lineno}); check model.preprocess"
        ) from None


def wants_channels_last(config: Config, model: Model, x: Tensor) -> bool:
    """Whether to keep images and weights in channels-last layout; ``auto``: with convolutions, where the network
    takes it (one that calls ``view`` on a map does not)."""
    if config.runtime.channels_last != "auto":
        return config.runtime.channels_last
    if not any(isinstance(part, nn.Conv2d) for part in model.module.modules()):
        return False
    try:
        with tuning.channels_last(model.module), torch.no_grad():
            model.module(x.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


def chosen_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU, else the CPU.

    Raises:
        ConfigError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}.get(
        device.type, 1
    )
    if (device.index or 0) >= count:
        raise ConfigError(
            f"runtime.device: {name} is not there ({count} {device.type} devices); use auto or cpu"
        )
    return device


def input_size(config: Config, preprocess: Preprocess, sources: Sequence[Source]) -> tuple[int, int]:
    """The one input size (H, W) of a run: the preprocessing's, else ``images.size``, else the first readable image's.

    Raises:
        InputError: no image can be read.
    """
    if config.images.size is not None:
        return preprocess.with_size(config.images.size).size or config.images.size
    if preprocess.size is not None:
        return preprocess.size
    for source in sources:
        try:
            return preprocess.size_for(*image_size(source.file))
        except BadImage:
            continue
    raise InputError(
        f"none of the {len(sources)} images can be read; set images.size: [H, W] to run all the same"
    )


def noise(preprocess: Preprocess, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """One picture of seeded noise as model input, (1, 3, H, W)."""
    pixels = torch.randint(
        0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return preprocess.normalise(pixels.to(device), dtype)


def class_labels(
    config: Config, sources: Sequence[Source], categories: Sequence[str], count: int
) -> dict[str, int]:
    """Class index of each label among the images' (``targets.label_classes``).

    Raises:
        ConfigError: the config needs labels and none of them is a class; or it asks for right and wrong answers of a
            model with a single logit, which names no class.
    """
    labels = sorted({source.label for source in sources if source.label})
    found = label_classes(labels, categories, count, folders=config.images.labels == "folder")
    if count == 1 and config.images.only in ("wrong", "correct"):
        raise config.error(("images", "only"), "the model has a single logit, so no class is right or wrong")
    if labels and not found and config.needs_labels:
        known = f"; its classes are {', '.join(map(repr, categories[:3]))}, ..." if categories else ""
        some = ", ".join(map(repr, labels[:3]))
        raise config.error(
            ("images", "labels"), f"none of the labels ({some}, ...) is a class of the model{known}"
        )
    return found
