"""Networks as users write them, each with a habit that has broken an explainer; factories for ``model.name``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PREPROCESS = {"resize": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class Plain(nn.Module):
    """Two convolutions and a head; the others change one habit each."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.norm = nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)).relu().mean((2, 3)))


class Views(Plain):
    """Flattens a map by ``view``, which channels-last memory does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8 * 32 * 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(x))
        return self.head(x.view(x.size(0), -1))


class Branches(Plain):
    """Two branches that meet at the head: neither lies behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head((self.left(x).relu() + self.right(x).relu()).mean((2, 3)))


class SometimesInfinite(Plain):
    """Overflows on pictures that are bright on the whole."""

    def forward(self, x: Tensor) -> Tensor:
        bright = (x.mean((1, 2, 3)) > 0.5)[:, None, None, None]
        x = self.features(torch.where(bright, torch.inf, x))
        return self.head(self.norm(x).relu().mean((2, 3)))


def seeded(kind: type[nn.Module], *arguments: int) -> tuple[nn.Module, dict[str, object]]:
    torch.manual_seed(0)
    return kind(*arguments), PREPROCESS


def plain() -> tuple[nn.Module, dict[str, object]]:
    return seeded(Plain)


def views() -> tuple[nn.Module, dict[str, object]]:
    return seeded(Views)


def branches() -> tuple[nn.Module, dict[str, object]]:
    return seeded(Branches)


def sometimes_infinite() -> tuple[nn.Module, dict[str, object]]:
    return seeded(SometimesInfinite)


def one_logit() -> tuple[nn.Module, dict[str, object]]:
    return seeded(Plain, 1)


def weight_norm() -> tuple[nn.Module, dict[str, object]]:
    net, preprocess = seeded(Plain)
    torch.nn.utils.parametrizations.weight_norm(net.features[2])
    return net, preprocess
