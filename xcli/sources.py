"""Where models come from: one small function a source, each ``ModelSpec -> Built``.

Only ``factory`` runs code that its user wrote. An exported program is data with a graph of known operators; what in it
would run code is refused (``programs``), yet PyTorch itself advises to load only programs one trusts.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from xcli.errors import ModelError, XaiError
from xcli.factory import BlackBox, call, seeded
from xcli.preprocess import Preprocess
from xcli.programs import load_program
from xcli.visible import shown
from xcli.weights import SUFFIXES, fill, load_weights, read_state_dict

Source = Literal["demo", "torchvision", "timm", "factory", "exported"]


@dataclass(frozen=True)
class ModelSpec:
    """The ``model:`` part of a config.

    Args:
        source: which kind of model ``name`` names.
        name: a builder's name; factory: "package.module:callable" or "path/to/file.py:callable"; exported: a file.
        weights: "DEFAULT" (what the source offers), the name of another offer, a checkpoint file, or "none": random,
            the same each time.
        preprocess: "auto" takes what belongs to the weights.
        categories: names of the logits; "auto", a text file with one name a line, or the names.
        output: where the logits are among several outputs (``models.find_logits``).
        args: keyword arguments of the factory, or of the torchvision or timm builder.
    """

    source: Source
    name: str
    weights: str = "DEFAULT"
    preprocess: Literal["auto"] | Preprocess = "auto"
    categories: str | tuple[str, ...] = "auto"
    output: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What a source gives: ``preprocess`` is None and ``categories`` empty where it does not know them."""

    module: nn.Module
    preprocess: Preprocess | None
    categories: tuple[str, ...]
    weights: str


def demo(spec: ModelSpec) -> Built:
    """One of the embedded networks."""
    from xcli.demo import nets

    _known(spec.name, nets.NETS, "demo model")
    preprocess = Preprocess(resize=nets.SIZE[0], crop=nets.SIZE, mean=nets.MEAN, std=nets.STD)
    if spec.weights == "DEFAULT":
        return Built(nets.load(spec.name), preprocess, nets.CATEGORIES, "shipped")
    with seeded():
        module = nets.NETS[spec.name]()
    if spec.weights == "none":
        return Built(module, preprocess, nets.CATEGORIES, "none")
    load_weights(module, spec.weights)
    return Built(module, preprocess, nets.CATEGORIES, spec.weights)


def torchvision(spec: ModelSpec) -> Built:
    """A builder of ``torchvision.models``; preprocessing and category names are those of its weights' record."""
    from torchvision import models

    _known(spec.name, models.list_models(), "torchvision model")
    offers = models.get_model_weights(spec.name)
    if is_file_name(spec.weights) or spec.weights == "none":
        record = getattr(offers, "DEFAULT", None)
        module = _torchvision_from_file(spec) if spec.weights != "none" else _torchvision_built(spec, None)
    else:
        _known(spec.weights, offers.__members__, f"weights of {shown(spec.name)}")
        record = offers[spec.weights]
        with _cached(record.url):
            module = _torchvision_built(spec, record)
    preprocess = None if record is None or spec.preprocess != "auto" else record.transforms()
    names = () if record is None else tuple(record.meta.get("categories", ()))
    return Built(
        module,
        preprocess and Preprocess.from_torchvision(preprocess),
        names if spec.args.get("num_classes", len(names)) == len(names) == _logits(module) else (),
        record.name if record is not None and spec.weights in offers.__members__ else spec.weights,
    )


def _torchvision_built(spec: ModelSpec, weights: Any, **options: Any) -> nn.Module:
    from torchvision import models

    with seeded(), warnings.catch_warnings(), _arguments_of(spec):
        warnings.filterwarnings(
            "ignore", category=FutureWarning, message=".*init.*weights"
        )  # googlenet, inception
        module: nn.Module = models.get_model(spec.name, weights=weights, **{**options, **spec.args})
    return module


def _torchvision_from_file(spec: ModelSpec) -> nn.Module:
    """The architecture with as many classes as the file has, and the file in it."""
    tensors = read_state_dict(spec.weights)
    options: dict[str, Any] = {}
    if spec.name in ("googlenet", "inception_v3"):  # as their published weights want it
        auxiliary = any(key.startswith(("aux", "AuxLogits")) for key in tensors)
        options = {"transform_input": True, "aux_logits": auxiliary, "init_weights": False}
    module = _torchvision_built(spec, None, **options)
    own = module.state_dict()
    heads = {
        tensors[key].shape[0]
        for key, value in own.items()
        if key in tensors and value.dim() and tensors[key].dim() and value.shape != tensors[key].shape
        if value.shape[0] == 1000 and value.shape[1:] == tensors[key].shape[1:]
    }
    if len(heads) == 1:
        module = _torchvision_built(spec, None, **{**options, "num_classes": heads.pop()})
    fill(module, tensors, spec.weights)
    return module


def timm(spec: ModelSpec) -> Built:
    """A model of timm (``pip install 'xcli[timm]'``), with the preprocessing of its data configuration."""
    try:
        import timm
    except ImportError as error:
        raise ModelError("source timm needs timm: pip install 'xcli[timm]'") from error
    name, _, tag = spec.name.partition(".")
    _known(name, timm.list_models(), "timm model")
    from_file, offered = is_file_name(spec.weights), spec.weights not in ("none",)
    if offered and not from_file and spec.weights != "DEFAULT":
        tag = spec.weights
    full = f"{name}.{tag}" if tag else name
    pretrained = offered and not from_file
    where = f"https://huggingface.co/timm/{full}"
    with (
        seeded(),
        _arguments_of(spec),
        _reachable(where, "the Hugging Face cache (HF_HOME)") if pretrained else contextlib.nullcontext(),
    ):
        try:
            module = timm.create_model(full, pretrained=pretrained, **spec.args)
        except RuntimeError as error:
            raise ModelError(f"timm cannot build {full}: {error}") from error
    if from_file:
        load_weights(module, spec.weights)
    return Built(module, _timm_preprocess(module), _timm_categories(module), spec.weights)


def _timm_preprocess(module: nn.Module) -> Preprocess:
    from timm import data

    config: dict[str, Any] = data.resolve_data_config(  # type: ignore[attr-defined, no-untyped-call]
        {}, model=module
    )
    _, h, w = config["input_size"]
    scaled = int(h / config["crop_pct"]), int(w / config["crop_pct"])
    short_side = config["crop_mode"] != "squash" and h == w
    mode = config["interpolation"]
    return Preprocess(
        resize=scaled[0] if short_side else scaled,
        crop=(h, w),
        interpolation=mode if mode != "random" else "bilinear",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _timm_categories(module: nn.Module) -> tuple[str, ...]:
    from torchvision.models import ResNet18_Weights

    return (
        tuple(ResNet18_Weights.DEFAULT.meta["categories"])
        if getattr(module, "num_classes", 0) == 1000
        else ()
    )


def factory(spec: ModelSpec) -> Built:
    """Whatever the user's callable returns: a module or a function of pictures, alone or with its preprocessing."""
    made = call(spec.name, spec.args)
    made, keys = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(made, type) or not callable(made):
        kind = f"the class {made.__name__}" if isinstance(made, type) else f"a {type(made).__name__}"
        raise ModelError(
            f"factory {shown(spec.name)} returned {kind}, not an nn.Module or a function of pictures (N, C, H, W) that "
            "returns (N, L), alone or as a pair with its preprocessing"
        )
    if not isinstance(made, nn.Module):
        made = BlackBox(made, spec.name)
    if is_file_name(spec.weights):
        load_weights(made, spec.weights)
    elif spec.weights not in ("DEFAULT", "none"):
        raise ModelError(
            f"factory {shown(spec.name)} offers no weights {spec.weights!r}; name a file, or leave `weights` out"
        )
    return Built(
        made, _preprocess(keys, spec.name), (), spec.weights if is_file_name(spec.weights) else "factory"
    )


def _preprocess(keys: Any, name: str) -> Preprocess | None:
    if keys is None or isinstance(keys, Preprocess):
        return keys
    try:
        fields: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in dict(keys).items()
        }
        return Preprocess(**fields)
    except (TypeError, ValueError, XaiError) as error:
        raise ModelError(
            f"factory {shown(name)} returned a preprocessing that cannot be used: {error}"
        ) from error


def exported(spec: ModelSpec) -> Built:
    """A program saved by ``torch.export.save``, unflattened so that its modules take hooks."""
    if spec.weights != "DEFAULT":
        raise ModelError("an exported program carries its own weights; leave `weights` out")
    return Built(load_program(spec.name), None, (), spec.name)


def is_file_name(weights: str) -> bool:
    """Whether ``weights`` names a file rather than an offer of the source."""
    return weights.endswith(SUFFIXES) or os.sep in weights or "/" in weights or Path(weights).is_file()


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; nearest: ..." with up to 5 names like ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def _known(name: str, known: Iterable[str], what: str) -> None:
    names = list(known)
    if name not in names:
        shown = nearest(name, names) or (f"; there are: {', '.join(names)}" if len(names) <= 10 else "")
        raise ModelError(f"there is no {what} {name!r}{shown}")


def _logits(module: nn.Module) -> int:
    """Outputs of the last linear layer or convolution; 0 if there is none."""
    sizes = [getattr(part, "out_features", getattr(part, "out_channels", 0)) for part in module.modules()]
    return next((size for size in reversed(sizes) if size), 0)


@contextlib.contextmanager
def _arguments_of(spec: ModelSpec) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        if not spec.args:
            raise
        raise ModelError(
            f"{spec.source} model {shown(spec.name)} cannot be built with {dict(spec.args)}: {error}"
        ) from error


@contextlib.contextmanager
def _cached(url: str) -> Iterator[None]:
    """Say what is wrong with a file in torch's own cache, or that it is not there and cannot be fetched."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    try:
        with _reachable(url, str(file)) if not file.is_file() else contextlib.nullcontext():
            yield
    except (RuntimeError, OSError, EOFError, LookupError, pickle.UnpicklingError):
        if file.is_file():
            try:
                read_state_dict(file)
            except ModelError as error:
                raise ModelError(
                    f"in torch's cache, {error}; delete the file to download it again"
                ) from error
        raise


@contextlib.contextmanager
def _reachable(url: str, place: str) -> Iterator[None]:
    """Turn a failed download into what to do about it."""
    try:
        yield
    except OSError as error:  # URLError and the errors of huggingface_hub among them
        raise ModelError(
            f"the weights are not on this machine and cannot be downloaded ({error}). Download {url} elsewhere and "
            f"put it at {place}; or name a file with `weights: PATH`; or take random weights with `weights: none`"
        ) from error


SOURCES: dict[str, Callable[[ModelSpec], Built]] = {
    "demo": demo,
    "torchvision": torchvision,
    "timm": timm,
    "factory": factory,
    "exported": exported,
}
