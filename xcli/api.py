"""The Python interface: calls on a batch of tensors, the caller's model left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.forward import Forward
from xcli.hooks import frozen
from xcli.keys import ContentKeys
from xcli.layers import Layers, survey
from xcli.methods.base import Method, reduced
from xcli.metrics.base import Measured, Metric, Truth
from xcli.models import find_logits
from xcli.registry import build, build_metric
from xcli.score import Score
from xcli.targets import ClassRows, Predicted, Scale, probabilities, resolve
from xcli.tuning import exact


@dataclass(frozen=True)
class Explanations:
    """One row an (image, target) pair: N rows, sorted by image, on the device of the images.

    Attributes:
        map: (N, H, W), or (N, C, H, W) with ``reduce: none``; raw.
        image, target: (N,) index into the images, class index.
        score: (N,) the logit of the target; probability: (N,) its softmax.
        extras: what the method adds, (N,) each.
    """

    map: Tensor
    image: Tensor
    target: Tensor
    score: Tensor
    probability: Tensor
    extras: Mapping[str, Tensor]


def explain(
    model: nn.Module,
    images: Tensor,
    method: str | Mapping[str, object] | Method = "gradcam",
    *,
    target: int | Sequence[int] | Tensor | None = None,
    score: Scale | None = None,
    native: bool = False,
    output: str | None = None,
    seed: int = 0,
    micro_batch: int = 64,
    create_graph: bool = False,
    pictures: Mapping[str, Tensor] | None = None,
) -> Explanations:
    """Explain a batch of preprocessed images.

    Args:
        model: any network; its mode, flags and weights come back as they were, also after an exception.
        images: float, (B, C, H, W), on the model's device.
        method: a name (``xai methods`` lists them), a mapping as in the YAML
            (``{"name": "gradcam", "layer": "layer3"}``, with a ``preset`` if you like), or a method such as
            ``GradCAM(layer="layer3")``.
        target: one class for all images, one class an image (B,), or the predicted class (None).
        score: logit, probability, log-probability or contrast; None: what the method's paper explains.
        native: keep the method's own grid instead of the images' size.
        output: name of the output that holds the logits, where it cannot be found by itself.
        seed: of random methods; what they draw depends on it and on the image's content only.
        micro_batch: most inputs in one pass; halved where memory runs out.
        create_graph: keep the graph behind the maps, so that a loss over them can be differentiated, by every weight
            that asks for a gradient and by images that do; the model runs in evaluation mode all the same.
        pictures: for options that name a folder, such as ``baselines``: by that name, preprocessed images (R, C, H, W).

    Raises:
        ConfigError: unknown method or option, a class out of range.
        ModelError: the model has no layer that fits, no logits are found, its weights are inference tensors, or the
            method gives no maps that can be trained through.

    >>> import torch, xcli
    >>> from xcli.demo import nets
    >>> model, images = nets.load("shapes-cnn"), torch.rand(2, 3, 128, 128)
    >>> found = xcli.explain(model, images, {"name": "layercam", "layer": "stages"}, target=[3, 5], native=True)
    >>> found.map.shape, found.target.tolist()
    (torch.Size([2, 16, 16]), [3, 5])
    """
    _refuse_mistakes(model, images, target, score)
    images = usable(images)
    chosen = method if isinstance(method, Method) else build(method)
    opened = _bound(model, images, target, output, Execution(micro_batch), seed, chosen, train=create_graph)
    with opened as (bound, logits):
        bound = replace(bound, pictures={} if pictures is None else pictures)
        size = None if native else (images.shape[-2], images.shape[-1])
        if create_graph:
            if not (images.requires_grad or any(p.requires_grad for p in bound.module.parameters())):
                raise ModelError(
                    "create_graph: neither the images nor a weight of the model asks for a gradient"
                )
            bound = replace(bound, forward=None, create_graph=True)
        found = chosen.explain(bound.scaled(score or chosen.scale), images, size)
        maps = found.map if create_graph else found.map.detach()
        if create_graph and not maps.requires_grad:
            raise ModelError(f"{chosen.name} gives no maps that can be trained through")
        rows = cast(ClassRows, bound.rows)
        own = logits[rows.image.to(logits.device)]
        index = rows.target[:, None]
        return Explanations(
            maps,
            rows.image,
            rows.target,
            own.gather(1, index)[:, 0],
            probabilities(own).gather(1, index)[:, 0],
            found.extras,
        )


def evaluate(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    metric: str | Mapping[str, object] | Metric = "deletion",
    *,
    target: int | Sequence[int] | Tensor | None = None,
    method: str | Mapping[str, object] | Method | None = None,
    truth: Tensor | None = None,
    checkpoints: Sequence[nn.Module] = (),
    output: str | None = None,
    seed: int = 0,
    micro_batch: int = 64,
    pictures: Mapping[str, Tensor] | None = None,
) -> Measured:
    """Score the maps of a batch of preprocessed images, one map an image.

    Args:
        model, images, target, output, seed, micro_batch, pictures: as for ``explain``.
        maps: (B, H, W), from any method, at the images' size.
        metric: a name (``xai metrics`` lists them), a mapping as in the YAML, or one such as ``Deletion(steps=8)``.
        method: what made the maps, for metrics that explain other inputs with it (robustness, randomisation).
        truth: (B, H, W), bool, where the object is, for metrics of localisation.
        checkpoints: further networks of the same structure, for metrics across models.

    Returns: values (B,), and the curve behind them where there is one.

    Raises:
        ConfigError: unknown metric or option, maps of another shape, or something that the metric consumes is missing.
        ModelError: as for ``explain``.

    >>> import torch, xcli
    >>> from xcli.demo import nets
    >>> model, images = nets.load("shapes-cnn"), torch.rand(2, 3, 128, 128)
    >>> maps = xcli.explain(model, images, "gradcam").map
    >>> found = xcli.evaluate(model, images, maps, {"name": "deletion", "steps": 4})
    >>> found.values.shape, found.curve.shape
    (torch.Size([2]), torch.Size([2, 5]))
    """
    _refuse_mistakes(model, images, target, None)
    images = usable(images)
    chosen = metric if isinstance(metric, Metric) else build_metric(metric)
    wanted = (len(images), *images.shape[2:])
    for name, given in (("maps", maps), ("truth", truth)):
        if given is not None and tuple(given.shape) != wanted:
            raise ConfigError(
                f"{name}: one of the images' size for each image, {wanted}; got {tuple(given.shape)}"
            )
    made = method if isinstance(method, Method | None) else build(method)
    with ExitStack() as undo:
        bound, _ = undo.enter_context(
            _bound(model, images, target, output, Execution(micro_batch), seed, made)
        )
        bound = replace(bound, pictures={} if pictures is None else pictures)
        for other in checkpoints:
            undo.enter_context(frozen(other))
        offers: dict[str, Any] = {
            "map": maps.to(images), "x": images, "score": bound, "module": bound.module,
        }  # fmt: skip
        if checkpoints:
            offers["models"] = tuple(bound.using(other) for other in checkpoints)
        if truth is not None:
            ones = torch.ones(len(images), dtype=torch.bool, device=images.device)
            offers["truth"] = Truth(truth.bool(), ones, torch.ones(len(images), 2).to(images))
        if made is not None:
            offers["method"] = partial(_maps, made, wanted[1:])
        if lacking := [name for name in chosen.consumes if name not in offers]:
            raise ConfigError(f"{chosen.name} needs {' and '.join(NAMED[name] for name in lacking)}")
        with torch.no_grad():
            return chosen.measure(**{name: offers[name] for name in chosen.consumes})


NAMED = {
    "truth": "truth=, the objects' masks",
    "method": "method=, what made the maps",
    "models": "checkpoints=",
}


def _maps(method: Method, size: tuple[int, int], score: Score, x: Tensor) -> Tensor:
    """A method as a metric sees it."""
    return reduced(method.explain(score.scaled(method.scale), x, size).map.detach(), "sum")


@contextmanager
def _bound(
    model: nn.Module,
    images: Tensor,
    target: int | Sequence[int] | Tensor | None,
    output: str | None,
    execution: Execution,
    seed: int,
    method: Method | None,
    *,
    train: bool = False,
) -> Iterator[tuple[Score, Tensor]]:
    """The score of ``target`` on ``images``, in logits, and the logits (B, L), from one pass; the model stays frozen
    inside the block, or with ``train`` in evaluation mode alone."""
    compiled = getattr(model, "_orig_mod", None)  # hooks do not reach compiled code
    model = compiled if isinstance(compiled, nn.Module) else model
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(exact())
        undo.enter_context(frozen(model, weights=not train))
        layers = surveyed(model, images, output)
        looked_at = method.looks_at(layers) if method is not None else ()
        at = list(dict.fromkeys(layer.name for layer in looked_at))
        graph = method is not None and "gradients" in method.needs and not train
        pixels = graph and method is not None and "pixels" in method.needs
        forward = Forward(model, images, at, execution, leaves=at if graph else (), pixels=pixels)
        logits = torch.cat([find_logits(found, output).detach() for found in forward.outputs])
        rows = _rows(target, logits, output)
        yield Score(model, rows, layers, execution, seed, ContentKeys(images), forward), logits


def _refuse_mistakes(model: nn.Module, images: Tensor, target: object, score: str | None) -> None:
    """Say in words what would fail later in PyTorch's."""
    if not isinstance(images, Tensor):
        raise ConfigError(f"images: a float tensor (B, C, H, W); got {type(images).__name__}")
    if score is not None and score not in get_args(Scale):
        raise ConfigError(f"score: one of {', '.join(get_args(Scale))}; got {score!r}")
    if isinstance(target, str):
        raise ConfigError(f"target: a class index, or one for each image; got {target!r}")
    if images.ndim != 4 or not images.is_floating_point() or not len(images):
        raise ConfigError(f"images: float (B, C, H, W) with B > 0; got {images.dtype} {tuple(images.shape)}")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "the model was built under torch.inference_mode(), so it has no gradients; build it outside"
        )


def usable(images: Tensor) -> Tensor:
    """The images, as a tensor that gradients can be taken at."""
    if not images.is_inference():
        return images
    with torch.inference_mode(False):
        return images.clone()


_SURVEYS: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Layers]] = WeakKeyDictionary()


def surveyed(model: nn.Module, images: Tensor, output: str | None) -> Layers:
    """The survey of a model at the images' size, kept for the next batch as long as the model stays as it is."""
    weights = (
        tuple((id(part), type(part)) for part in model.modules()),
        tuple(p._version for p in model.parameters()),
    )
    state = (images.shape[1:], images.dtype, images.device, output, weights)
    known = _SURVEYS.get(model)
    if known is None or known[0] != state:
        known = _SURVEYS[model] = (state, survey(model, images[:1], output))
    return known[1]


def _rows(target: int | Sequence[int] | Tensor | None, logits: Tensor, output: str | None) -> ClassRows:
    count, classes = logits.shape
    if target is None:
        return resolve([Predicted()], logits, torch.full((count,), -1), output).decided()
    wanted = torch.as_tensor(target, dtype=torch.long, device=logits.device)
    wanted = wanted.expand(count) if wanted.ndim == 0 else wanted
    if wanted.shape != (count,):
        raise ConfigError(
            f"target: one class, or one for each of the {count} images; got {tuple(wanted.shape)}"
        )
    if int(wanted.min()) < 0 or int(wanted.max()) >= classes:
        raise ConfigError(
            f"target: classes go from 0 to {classes - 1}; got {int(wanted.min())}..{int(wanted.max())}"
        )
    return ClassRows(torch.arange(count), wanted, output)
