"""A model as the rest of the tool sees it: a module in eval mode, its preprocessing, and the names of its logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcli.errors import ModelError
from xcli.preprocess import Preprocess
from xcli.sources import SOURCES, nearest
from xcli.sources import ModelSpec as ModelSpec
from xcli.visible import shown

LARGEST_LIST = 64 << 20
"""Bytes of a file of category names."""


@dataclass(frozen=True)
class Model:
    """A network that is ready to be explained.

    Attributes:
        module: in eval mode, on its device, no parameter asks for a gradient; not compiled, not wrapped.
        preprocess: from an image to its input.
        categories: names of the logits, in order; empty where they are unknown.
        name, source: as in the config.
        output: which output holds the logits, None where that is found out (``find_logits``).
        weights: what was loaded: the name of an offer, a file, "shipped", "factory", or "none" (random).
    """

    module: nn.Module
    preprocess: Preprocess
    categories: tuple[str, ...]
    name: str
    source: str
    output: str | None
    weights: str


def load_model(spec: ModelSpec, device: torch.device | str = "cpu") -> Model:
    """Build the model of a config and make it ready on ``device``.

    Raises:
        ModelError: the source, name, weights, categories or the user's factory are at fault; nothing is known of the
            preprocessing.
    """
    if spec.source not in SOURCES:
        raise ModelError(f"there is no source {spec.source!r}{nearest(spec.source, SOURCES)}")
    built = SOURCES[spec.source](spec)
    preprocess = built.preprocess if spec.preprocess == "auto" else spec.preprocess
    if preprocess is None:
        raise ModelError(
            f"nothing says how the input of {spec.name} is made; set `model.preprocess`, for example "
            "{resize: 256, crop: 224, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
            + (", or let the factory return (module, {...})" if spec.source == "factory" else "")
        )
    module = unwrap(built.module).to(device)
    module.eval()
    module.requires_grad_(False)
    categories = built.categories if spec.categories == "auto" else _categories(spec.categories)
    return Model(module, preprocess, categories, spec.name, spec.source, spec.output, built.weights)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel, at every depth (in place).

    Compiled code ignores hooks that come later, and DataParallel runs replicas that hooks never see.
    """
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            break
    if getattr(module, "_compiled_call_impl", None) is not None:  # what module.compile() leaves
        module._compiled_call_impl = None
    for name, child in module._modules.items():
        if child is not None and (inner := unwrap(child)) is not child:
            module._modules[name] = inner
    return module


def find_logits(outputs: Any, name: str | None = None) -> Tensor:
    """The logits (B, L) among what a model returns: a tensor, tuple, list, mapping, or an object with fields.

    Args:
        name: key, attribute or index. ``None`` looks for a lone tensor, then "logits", then "out", then the only
            2-D tensor, then, in a tuple or list, the first one.
    Raises:
        ModelError: there is none; lists what there is.
    """
    if name is None and isinstance(outputs, Tensor):
        logits: Any = outputs
    else:
        entries = _entries(outputs)
        logits = _likely(entries, isinstance(outputs, tuple | list)) if name is None else entries.get(name)
    if isinstance(logits, Tensor) and logits.dim() == 2:
        return logits
    raise ModelError(_no_logits(outputs, name))


def _entries(outputs: Any) -> dict[str, Any]:
    """The parts of an output by name; those of a tuple also by index."""
    if isinstance(outputs, Mapping):
        return {str(key): value for key, value in outputs.items()}
    if isinstance(outputs, tuple | list):
        named = zip(getattr(outputs, "_fields", ()), outputs, strict=False)
        return {**{str(i): value for i, value in enumerate(outputs)}, **dict(named)}
    if dataclasses.is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return dict(vars(outputs)) if hasattr(outputs, "__dict__") and not isinstance(outputs, Tensor) else {}


def _likely(entries: dict[str, Any], ordered: bool) -> Any:
    for key in ("logits", "out"):
        if isinstance(entries.get(key), Tensor):
            return entries[key]
    flat = {id(value): value for value in entries.values() if isinstance(value, Tensor) and value.dim() == 2}
    return next(iter(flat.values())) if flat and (ordered or len(flat) == 1) else None


def _no_logits(outputs: Any, name: str | None) -> str:
    parts = {type(outputs).__name__: outputs} if isinstance(outputs, Tensor) else _entries(outputs)
    listed = ", ".join(
        f"{key} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{key} ({type(value).__name__})"
        for key, value in parts.items()
    )
    wanted = "no logits (B, L) were found" if name is None else f"`model.output` {name!r} is no tensor (B, L)"
    return f"{wanted} in what the model returns: {listed or type(outputs).__name__}; set `model.output` to one of them"


def _categories(given: str | tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(given, str):
        return given
    try:
        if Path(given).exists() and not Path(given).is_file():  # a FIFO never answers, a device never ends
            raise ModelError(f"categories: {shown(given)} is not a regular file")
        if Path(given).is_file() and Path(given).stat().st_size > LARGEST_LIST:
            raise ModelError(
                f"categories: {shown(given)} is larger than {LARGEST_LIST >> 20} MiB; one name a line is wanted"
            )
        lines = Path(given).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"categories: {shown(given)} cannot be read as a text file with one name a line: {error}"
        ) from error
    while lines and not lines[-1].strip():
        lines.pop()
    return tuple(line.strip() for line in lines)
