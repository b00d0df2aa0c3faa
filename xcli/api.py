"""The Python interface: one call on a batch of tensors, the caller's model left exactly as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution
from xcli.forward import Forward
from xcli.hooks import frozen
from xcli.layers import Layers, survey
from xcli.methods.base import Method
from xcli.models import find_logits
from xcli.registry import build
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

    Raises:
        ConfigError: unknown method or option, a class out of range.
        ModelError: the model has no layer that fits, no logits are found, or its weights are inference tensors.

    >>> import torch, xcli
    >>> from xcli.demo import nets
    >>> model, images = nets.load("shapes-cnn"), torch.rand(2, 3, 128, 128)
    >>> found = xcli.explain(model, images, {"name": "layercam", "layer": "stages"}, target=[3, 5], native=True)
    >>> found.map.shape, found.target.tolist()
    (torch.Size([2, 16, 16]), [3, 5])
    """
    _refuse_mistakes(model, images, target, score)
    chosen = method if isinstance(method, Method) else build(method)
    compiled = getattr(model, "_orig_mod", None)  # hooks do not reach compiled code
    model = compiled if isinstance(compiled, nn.Module) else model
    execution = Execution(micro_batch)
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(exact())
        undo.enter_context(frozen(model))
        layers = surveyed(model, images, output)
        at = [layer.name for layer in chosen.looks_at(layers)]
        forward = Forward(model, images, at, execution, leaves=at if "gradients" in chosen.needs else ())
        logits = torch.cat([find_logits(found, output).detach() for found in forward.outputs])
        rows = _rows(target, logits, output)
        bound = Score(
            model, rows, layers, execution, seed, ContentKeys(images), forward if at else None
        ).scaled(score or chosen.scale)
        found = chosen.explain(bound, images, None if native else (images.shape[-2], images.shape[-1]))
        own = logits[rows.image.to(logits.device)]
        index = rows.target[:, None]
        return Explanations(
            found.map.detach(),
            rows.image,
            rows.target,
            own.gather(1, index)[:, 0],
            probabilities(own).gather(1, index)[:, 0],
            found.extras,
        )


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


class ContentKeys(Sequence[str]):
    """A key an image, made from its values when a method first draws random numbers for it."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        content = self.images[index].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()


def _rows(target: int | Sequence[int] | Tensor | None, logits: Tensor, output: str | None) -> ClassRows:
    count, classes = logits.shape
    if target is None:
        return resolve([Predicted()], logits, torch.full((count,), -1), output)
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
