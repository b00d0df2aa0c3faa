"""A network of your own, for configs/own-model.yaml: a function that returns it and how its input is made."""

from __future__ import annotations

from torch import nn


def build(classes: int) -> tuple[nn.Module, dict[str, object]]:
    """Two convolutions and a linear layer, untrained; called with ``model.args`` of the config."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
    return network, {"resize": 144, "crop": 128, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
