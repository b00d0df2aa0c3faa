"""What to explain: from the model's outputs to rows of (image, target). The task lives here and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from xcli.models import find_logits

Scale = Literal["logit", "probability", "log-probability", "contrast", "rest"]


class Rows(Protocol):
    """N rows of (image, target) over B images, sorted by image, and the number explained for each."""

    @property
    def image(self) -> Tensor:
        """(N,) index of each row's image, on the CPU, non-decreasing."""

    def values(self, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
        """The numbers (P,) for pairs of a forward copy (P,) and a row (P,), differentiable in ``outputs``."""

    def scaled(self, scale: Scale) -> Self:
        """The same rows in another unit."""

    def retarget(self, target: Tensor) -> Self:
        """The same images with other targets (N,)."""

    def taken(self, row: Tensor, image: Tensor) -> Self:
        """The rows ``row`` (P,), each about the image ``image`` (P,), non-decreasing."""

    def logits(self, outputs: Any) -> Tensor:
        """What the targets are chosen from, a number each: (M, L) of M inputs."""

    def columns(self) -> Mapping[str, Tensor]:
        """What describes each row in the results: name -> (N,)."""


@dataclass(frozen=True)
class ClassRows:
    """Rows of a classifier: row i explains class ``target[i]`` of image ``image[i]``.

    A model with a single logit is binary: its probability is the logistic function of it, its contrast the logit.
    Class -1 is the predicted one of an image whose probabilities are not finite: none can be told (``decided``).
    """

    image: Tensor
    target: Tensor
    output: str | None = None
    scale: Scale = "logit"

    def values(self, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
        logits = self.logits(outputs)
        device = logits.device
        return in_scale(logits[copy.to(device)], self.target[row].to(device), self.scale)

    def decided(self) -> ClassRows:
        """The same with class 0 where none can be told, so that passes can run; what they give there means nothing."""
        return replace(self, target=self.target.clamp_min(0))

    def scaled(self, scale: Scale) -> ClassRows:
        return replace(self, scale=scale)

    def retarget(self, target: Tensor) -> ClassRows:
        return replace(self, target=target)

    def taken(self, row: Tensor, image: Tensor) -> ClassRows:
        return replace(self, image=image, target=self.target[row.to(self.target.device)])

    def logits(self, outputs: Any) -> Tensor:
        logits = find_logits(outputs, self.output)
        return logits if logits.dtype == torch.float64 else logits.float()

    def columns(self) -> Mapping[str, Tensor]:
        return {"target": self.target}


@dataclass(frozen=True)
class Reading:
    """Other rows with a number of one's own explained for each: ``number(rows, outputs, copy, row)``, where ``rows``
    are those others, in the unit that is asked for, and the rest is as for ``Rows.values``.

    ``index`` and ``about``: which of these rows each is, and its image, where they are not the same.
    """

    rows: Rows
    number: Callable[[Rows, Any, Tensor, Tensor], Tensor]
    index: Tensor | None = None
    about: Tensor | None = None

    @property
    def image(self) -> Tensor:
        return self.rows.image if self.about is None else self.about

    def values(self, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
        return self.number(self.rows, outputs, copy, row if self.index is None else self.index[row])

    def scaled(self, scale: Scale) -> Reading:
        return replace(self, rows=self.rows.scaled(scale))

    def retarget(self, target: Tensor) -> Reading:
        if self.index is None:
            return replace(self, rows=self.rows.retarget(target))
        raise ValueError("rows that were taken from others keep their targets")

    def taken(self, row: Tensor, image: Tensor) -> Reading:
        return replace(self, index=row if self.index is None else self.index[row], about=image)

    def logits(self, outputs: Any) -> Tensor:
        return self.rows.logits(outputs)

    def columns(self) -> Mapping[str, Tensor]:
        columns, index = self.rows.columns(), self.index
        return columns if index is None else {name: column[index] for name, column in columns.items()}


def in_scale(logits: Tensor, target: Tensor, scale: Scale) -> Tensor:
    """One number a row from logits (P, L) and class indices (P,).

    ``logit`` z_c; ``probability`` and ``log-probability`` of the softmax; ``contrast`` z_c - max of the others;
    ``rest`` z_c + log softmax_c, the residual softmax target of arXiv:2501.06261.
    """
    own = logits.gather(1, target[:, None])[:, 0]  # (P,)
    if logits.shape[1] == 1:
        sure = F.logsigmoid(own)
        return {"probability": own.sigmoid(), "log-probability": sure, "rest": own + sure}.get(scale, own)
    match scale:
        case "logit":
            return own
        case "probability":
            return logits.softmax(1).gather(1, target[:, None])[:, 0]
        case "log-probability":
            return logits.log_softmax(1).gather(1, target[:, None])[:, 0]
        case "contrast":
            return own - logits.scatter(1, target[:, None], float("-inf")).amax(1)
        case "rest":
            return own + logits.log_softmax(1).gather(1, target[:, None])[:, 0]


def probabilities(logits: Tensor) -> Tensor:
    """Class probabilities (B, L) of logits (B, L); the logistic function where there is one logit."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def tells(logits: Tensor) -> Tensor:
    """Whether a class can be told from each row of logits (B, L): (B,), false where a probability is not finite."""
    return probabilities(logits).isfinite().all(1)


@dataclass(frozen=True)
class Predicted:
    """The class with the highest logit."""

    most: ClassVar[int] = 1

    def classes(self, logits: Tensor, labels: Tensor) -> list[list[int]]:
        best = torch.where(tells(logits), logits.argmax(1), -1)
        return [[one] for one in best.tolist()]


@dataclass(frozen=True)
class Label:
    """The image's own label; images without one get no row."""

    most: ClassVar[int] = 1

    def classes(self, logits: Tensor, labels: Tensor) -> list[list[int]]:
        return [[label] if label >= 0 else [] for label in labels.tolist()]


@dataclass(frozen=True)
class Classes:
    """The same classes for every image."""

    indices: tuple[int, ...]

    @property
    def most(self) -> int:
        """Most rows it gives an image."""
        return len(self.indices)

    def classes(self, logits: Tensor, labels: Tensor) -> list[list[int]]:
        return [list(self.indices)] * len(logits)


@dataclass(frozen=True)
class Top:
    """The ``k`` most probable classes; with ``above``, only those of at least that probability, the first always."""

    k: int
    above: float = 0.0

    @property
    def most(self) -> int:
        """Most rows it gives an image."""
        return self.k

    def classes(self, logits: Tensor, labels: Tensor) -> list[list[int]]:
        probability, index = probabilities(logits).topk(min(self.k, logits.shape[1]), dim=1)
        kept = probability >= self.above
        kept[:, 0] = True
        index[:, 0] = torch.where(told := tells(logits), index[:, 0], -1)
        kept[:, 1:] &= told[:, None]
        return [
            [i for i, keep in zip(own, mask, strict=True) if keep]
            for own, mask in zip(index.tolist(), kept.tolist(), strict=True)
        ]


Target = Predicted | Label | Classes | Top


def label_classes(
    labels: Sequence[str], categories: Sequence[str], count: int, *, folders: bool
) -> dict[str, int]:
    """Class index of each label: a category's name, else its number, else the folder's place among all folders.

    The last is torchvision's ImageFolder rule and holds for ``folders``, where there are as many of them as classes
    and none is a category. Labels that are no class, or the name of several, are left out.

    Args:
        labels: distinct, sorted.
        count: logits of the model.
    """
    names = [name.casefold() for name in categories[:count]]
    times = Counter(names)
    by_name = {name: index for index, name in enumerate(names) if times[name] == 1}
    by_number = {
        label: int(label) for label in labels if label.isascii() and label.isdigit() and int(label) < count
    }
    found = {label: by_name.get(label.casefold(), by_number.get(label, -1)) for label in labels}
    found = {label: index for label, index in found.items() if index >= 0}
    if folders and not found and len(labels) == count:
        return {label: index for index, label in enumerate(labels)}
    return found


def resolve(
    targets: Sequence[Target], logits: Tensor, labels: Tensor, output: str | None = None
) -> ClassRows:
    """The rows of a batch: each image's classes in the order of ``targets``, a class at most once an image.

    Args:
        logits: (B, L), from one forward pass; where no class can be told from them, the predicted ones are -1.
        labels: (B,) class indices, -1 where there is none.
        output: the name of the output that holds the logits, where it cannot be found by itself.
    """
    found = [target.classes(logits, labels) for target in targets]
    images: list[int] = []
    classes: list[int] = []
    for image in range(len(logits)):
        wanted = dict.fromkeys(c for per_image in found for c in per_image[image])
        images += [image] * len(wanted)
        classes += wanted
    device = logits.device
    return ClassRows(
        torch.tensor(images, dtype=torch.long), torch.tensor(classes, dtype=torch.long, device=device), output
    )
