"""Checkpoint files: read without running code, unwrapped, and loaded strictly."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from xcli.errors import ModelError
from xcli.visible import shown

LOG = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
"""Kinds of file that are read."""

_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_ema", "ema")
_PREFIXES = ("module.", "model.")  # DataParallel, Lightning
_SHOWN = 10
_DEEPEST = 10
_GROWTH, _FREE = 20, 64 << 20
"""How much larger than its file what a checkpoint holds may be, and bytes that any may hold."""
_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU; nothing in the file is run.

    Looks inside the wrappers that trainers write (``state_dict``, ``model``, ``model_state_dict``, ``model_ema``,
    ``ema``; the first of these wins) and takes off what DataParallel (``module.``), torch.compile (``_orig_mod.``)
    and Lightning (``model.``, where all names have it) put before the names, however often they nest.

    Raises:
        ModelError: the file is missing, of another kind, damaged, holds more than tensors, or no tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(
            f"there is no weights file {shown(file)}"
            if not file.exists()
            else f"{shown(file)} is not a regular file"
        )
    if file.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{shown(file)}: weights are read from {', '.join(SUFFIXES)} files")
    content = _safetensors(file) if file.suffix.lower() == ".safetensors" else _pickled(file)
    tensors = _unwrapped(content, file)
    _refuse_strange(tensors, file)
    return {short: tensors[name] for name, short in short_names(tensors).items()}


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Read ``path`` into ``module``: every name and every shape must agree; the dtype is that of ``module``.

    Raises:
        ModelError: as ``read_state_dict``, or something does not agree; says all that is missing, unexpected or of
            another shape, and then ``module`` may be partly loaded.
    """
    fill(module, read_state_dict(path), str(path))


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """As ``load_weights``, from tensors in memory; ``source`` says in the error where they come from."""
    own = module.state_dict()
    full = {short: name for name, short in short_names(own).items()}
    given = {full.get(key, key): value for key, value in tensors.items()}
    given = {_modern(key, own): value for key, value in given.items()}
    shapes = [key for key, value in given.items() if key in own and value.shape != own[key].shape]
    fitting = {key: value for key, value in given.items() if key not in shapes}
    result = module.load_state_dict(fitting, strict=False)
    missing = [key for key in result.missing_keys if key not in shapes]
    wrong = [f"{key} {tuple(given[key].shape)} instead of {tuple(own[key].shape)}" for key in shapes]
    problems = [
        _listed("missing from the file", missing),
        _listed("unknown to the model", result.unexpected_keys),
        _listed("of another shape", wrong),
    ]
    if any(problems):
        raise ModelError(f"{shown(source)} does not fit the model:\n" + "\n".join(filter(None, problems)))
    _warn_of_nan(module, source)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of all parameters and stored buffers: names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without the prefixes that wrappers put before it."""
    short = {name: name.replace("_orig_mod.", "") for name in names}
    while True:
        prefix = next((p for p in _PREFIXES if short and all(n.startswith(p) for n in short.values())), None)
        if prefix is None:
            return short
        short = {name: value.removeprefix(prefix) for name, value in short.items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{shown(file)} is damaged or no safetensors file: {error}") from error
    return tensors


def refuse_bomb(file: Path) -> None:
    """Raise ``ModelError`` for an archive that says it holds far more than its size: PyTorch would unpack it all."""
    with zipfile.ZipFile(file) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    _refuse_claim(file, claimed)


def _refuse_claim(file: Path, claimed: int) -> None:
    size = file.stat().st_size
    if claimed > _FREE + _GROWTH * size:
        raise ModelError(
            f"{shown(file)} has {size} bytes and claims to hold {claimed}; it is damaged or made to fill memory"
        )


def _refuse_strange(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise ``ModelError`` for tensors that are no plain numbers, or larger than what is stored of them."""
    for name, value in tensors.items():
        strided = value.layout is torch.strided and not value.is_quantized and not value.is_meta
        if not strided or value.is_complex():
            kind = "quantized" if value.is_quantized else "without data" if value.is_meta else value.dtype
            raise ModelError(
                f"{shown(file)}: {shown(name)} is {kind if value.layout is torch.strided else value.layout}; "
                "weights are plain real numbers: save model.state_dict() of the float model"
            )
    _refuse_claim(file, sum(value.numel() * value.element_size() for value in tensors.values()))


def _warn_of_nan(module: nn.Module, source: str) -> None:
    bad = [name for name, value in module.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        LOG.warning(
            "%s: %d of its tensors hold values that are not finite (the first is %s); maps will not be finite either",
            source,
            len(bad),
            bad[0],
        )


def _pickled(file: Path) -> Any:
    try:
        with file.open("rb") as data:
            zipped = data.read(4) == b"PK\3\4"
        if zipped:
            refuse_bomb(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("GLOBAL|[Uu]nsupported|disallow", str(error)):
            raise ModelError(_holds_code(file, str(error))) from error
        raise ModelError(f"{shown(file)} is damaged or no PyTorch checkpoint") from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise ModelError(_holds_code(file, "TorchScript program")) from error
        raise ModelError(f"{shown(file)} is damaged or no PyTorch checkpoint: {first_line(error)}") from error
    except DAMAGED as error:
        raise ModelError(f"{shown(file)} is damaged or no PyTorch checkpoint: {first_line(error)}") from error


DAMAGED = (
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    zipfile.BadZipFile,
)
"""What ``torch.load`` raises on files that are cut off or not pickles."""


def _holds_code(file: Path, reason: str) -> str:
    found = re.search(r"GLOBAL:? ([\w.]+)", reason)
    what = f"a Python object ({found[1]})" if found else reason if "Script" in reason else "Python objects"
    return (
        f"{shown(file)} holds code: {what}, not only tensors, and reading that could run anything. "
        "In the program that wrote it, save `model.state_dict()` alone: torch.save(model.state_dict(), 'weights.pt') "
        "or safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    )


def _unwrapped(content: Any, file: Path) -> dict[str, Tensor]:
    for _ in range(_DEEPEST):  # a dict may hold itself
        if not isinstance(content, Mapping) or all(isinstance(value, Tensor) for value in content.values()):
            break
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            keys = ", ".join(shown(str(key)[:100]) for key in list(content)[:_SHOWN])
            raise ModelError(
                f"{shown(file)} is no state dict, nor holds one under {', '.join(_WRAPPERS)}; it has: {keys}"
            )
        content = inner
    if not isinstance(content, Mapping) or not content:
        kind = "is empty" if isinstance(content, Mapping) else f"holds a {type(content).__name__}"
        raise ModelError(f"{shown(file)} {kind}; a dict of tensors by name is needed")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"{shown(file)} is nested more than {_DEEPEST} deep; a dict of tensors by name is needed"
        )
    averaged = "n_averaged" in content and all(
        key.startswith("module.") for key in content if key != "n_averaged"
    )
    return {str(key): value for key, value in content.items() if not (averaged and key == "n_averaged")}


def _modern(key: str, own: Mapping[str, Tensor]) -> str:
    """The name today of a tensor in torchvision's published DenseNet files (``norm.1`` is now ``norm1``)."""
    old = None if key in own else _DENSENET.match(key)
    return old[1] + old[2] if old and old[1] + old[2] in own else key


def _listed(title: str, names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"  {len(names)} {title}: {', '.join(map(shown, names[:_SHOWN]))}{more}" if names else ""


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
