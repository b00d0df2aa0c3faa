"""Two small networks that name the kinds of shapes in a picture, and their shipped weights.

Both map normalised RGB ``[B, 3, H, W]`` to ten logits ``[B, 10]``, one per kind in ``CATEGORIES``. They were
trained with a multi-label loss, so the sigmoid of a logit is the belief that this kind is somewhere in the
picture, whatever else is in it. Normalised means ``(rgb - MEAN) / STD`` with ``rgb`` in ``[0, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CATEGORIES: tuple[str, ...] = (
    "disc",
    "ring",
    "square",
    "triangle",
    "star",
    "cross",
    "heart",
    "crescent",
    "arrow",
    "flower",
)
"""The ten kinds, in the order of the logits."""

SIZE: tuple[int, int] = (128, 128)
"""Height and width in pixels at which both networks were trained."""

MEAN: tuple[float, float, float] = (0.5, 0.5, 0.5)
STD: tuple[float, float, float] = (0.25, 0.25, 0.25)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first divides height and width by ``stride``."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = _conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


class ShapesCNN(nn.Module):
    """Residual network of stride 8: ``[B, 3, H, W]`` (any H, W >= 32) to ``[B, 10]``.

    ``stages`` ends in ``[B, 96, H / 8, W / 8]`` non-negative maps; ``pool`` averages them and ``head`` is the
    only layer after that, so class activation maps are defined at ``stages``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 16, 2), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(
            nn.Sequential(ResidualBlock(16, 32, 2)),
            nn.Sequential(ResidualBlock(32, 64, 2), ResidualBlock(64, 64)),
            nn.Sequential(ResidualBlock(64, 96), ResidualBlock(96, 96)),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(96, len(CATEGORIES))

    def front(self) -> nn.Sequential:
        """The layers up to the second stage: ``[B, 3, H, W]`` to ``[B, 64, H / 8, W / 8]``."""
        return nn.Sequential(self.stem, self.stages[0], self.stages[1])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.stages(self.stem(x))).flatten(1))
        return logits


class Block(nn.Module):
    """Pre-norm transformer block on tokens ``[B, T, width]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ShapesViT(nn.Module):
    """Vision transformer on convolutional features: ``[B, 3, 128, 128]`` to ``[B, 10]``.

    ``stem`` is that of ``ShapesCNN`` up to its second stage, ``[B, 64, 16, 16]``; ``patches`` joins 2x2 cells to
    an 8x8 grid; ``blocks`` see ``[B, 1 + 64, 96]`` tokens, the class token first, the others row by row; ``head``
    reads the class token after ``norm``.
    """

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = ShapesCNN().front()
        self.patches = nn.Conv2d(64, width, 2, stride=2)
        self.grid = (SIZE[0] // 16, SIZE[1] // 16)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid[0] * self.grid[1], width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CATEGORIES))

    def features(self, x: Tensor) -> Tensor:
        """Convolutional features ``[B, 64, 16, 16]`` of pictures ``[B, 3, 128, 128]``."""
        if tuple(x.shape[-2:]) != SIZE:
            raise ValueError(
                f"shapes-vit takes {SIZE[0]}x{SIZE[1]} pixels, got {x.shape[-2]}x{x.shape[-1]}: "
                "its position embeddings are learned"
            )
        found: Tensor = self.stem(x)
        return found

    def encode(self, features: Tensor) -> Tensor:
        """Logits ``[B, 10]`` of features ``[B, 64, 16, 16]``."""
        tokens = self.patches(features).flatten(2).transpose(1, 2)  # [B, 64, width]
        tokens = torch.cat([self.class_token.expand(len(features), -1, -1), tokens], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(self.features(x))


def shapes_cnn() -> nn.Module:
    """A residual network with random weights; see ``ShapesCNN``."""
    return ShapesCNN()


def shapes_vit() -> nn.Module:
    """A vision transformer with random weights; see ``ShapesViT``."""
    return ShapesViT()


NETS: dict[str, Callable[[], nn.Module]] = {"shapes-cnn": shapes_cnn, "shapes-vit": shapes_vit}
"""Builders by name; the shipped weights of ``name`` lie next to this file as ``<name>.safetensors``."""


def weights_path(name: str) -> Path:
    """Where the shipped float16 weights of ``name`` lie."""
    return Path(__file__).with_name(f"{name}.safetensors")


def load(name: str, path: Path | None = None) -> nn.Module:
    """Network ``name`` in float32 and eval mode, with the weights at ``path`` (the shipped ones by default).

    Leaves the state of the random number generators as it was. An unknown name is a ``KeyError``.
    """
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]):
        model = NETS[name]()
    weights = load_file(str(path or weights_path(name)))
    model.load_state_dict({key: w.float() if w.is_floating_point() else w for key, w in weights.items()})
    return model.eval()
