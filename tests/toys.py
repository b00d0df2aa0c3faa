"""Networks small enough to know: float64, seeded, milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xcli.execution import Execution
from xcli.layers import survey
from xcli.score import Score
from xcli.targets import ClassRows


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class PooledLinear(nn.Module):
    """Convolutions, in-place ReLU, global average pooling, one linear layer: the net of CAM's theorem."""

    def __init__(self, labels: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        )
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.features(x)).mean((2, 3)))


class Residual(nn.Module):
    """Skip connections around everything, functional additions in place, a block that is called twice."""

    def __init__(self, labels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(6))
        self.twice = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, labels)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        mixed = self.block(early)
        mixed += early
        mixed = self.twice(mixed).tanh() + self.twice(early)
        late = self.last(mixed)
        late = late + early * mixed
        return self.head(self.twice(late).sigmoid().mean((2, 3)))


class Tokens(nn.Module):
    """A one-block transformer with a class token over 4x4 patches."""

    def __init__(self, labels: int = 4, width: int = 8, grid: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, grid * grid + 1, width))
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.place
        seen = self.norm1(tokens)
        tokens = tokens + self.attention(seen, seen, seen, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norm2(tokens))
        return self.head(tokens[:, 0])


class SumModel(nn.Module):
    """The sum of all pixels as the only logit."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True)


class Weighted(nn.Module):
    """A logit for each of some fixed weightings (L, H, W) of the pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,lhw->nl", x, self.weight)


class InDouble(nn.Module):
    """A network of float64 for packages that hand it float32."""

    def __init__(self, net: nn.Module, softmax: bool = False) -> None:
        super().__init__()
        self.net, self.softmax = net, softmax

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x.double())
        return out.softmax(1) if self.softmax else out


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().double().eval()


def bound(
    net: nn.Module, x: Tensor, target: list[int], image: list[int] | None = None, micro_batch: int = 64
) -> Score:
    """The score of classes ``target`` of the images ``image`` (one row an image where left out)."""
    rows = ClassRows(torch.tensor(list(range(len(target))) if image is None else image), torch.tensor(target))
    keys = [f"image-{i}" for i in range(len(x))]
    return Score(net, rows, survey(net, x[:1]), Execution(micro_batch), keys=keys)
