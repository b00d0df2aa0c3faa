"""The names of images from which their random numbers are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class ContentKeys(Sequence[str]):
    """A key an image, made from its values when a method first draws random numbers for it, and remembered."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.known: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if index not in self.known:
            content = self.images[index].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            self.known[index] = hashlib.sha256(content).hexdigest()
        return self.known[index]


class CopiedKeys(Sequence[str]):
    """The keys of copies of the images ``source`` (M,), made when they are asked for; with ``number`` (M,) behind
    each."""

    def __init__(self, keys: Sequence[str], source: Tensor, number: Tensor | None = None) -> None:
        self.keys, self.source, self.number = keys, source, number

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        key = self.keys[int(self.source[index])]
        return key if self.number is None else f"{key}\0{int(self.number[index])}"
