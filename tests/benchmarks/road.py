"""ROAD's imputation alone, ours and grad-cam's: ``OMP_NUM_THREADS=2 python tests/benchmarks/road.py``.

16 images of 224 x 224 lose 20, 40, 60 and 80 % of their pixels, the highest of a smooth map first and the lowest first:
128 imputations. grad-cam, which takes one image at a time, does the first ``--peer`` of them; all numbers are
milliseconds an imputation. Contenders take turns within each level.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import race

from xcli import tuning
from xcli.imputation import Solver, impute
from xcli.metrics.order import places

BATCH, SIZE, LEVELS = 16, 224, (20, 40, 60, 80)


def pictures() -> tuple[Tensor, Tensor]:
    """Images, and the place of each pixel in the order of an up-sampled 7 x 7 map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    maps = F.interpolate(torch.randn(BATCH, 1, 7, 7, generator=generator), size=(SIZE, SIZE), mode="bilinear")
    return x, places(maps[:, 0]).view(BATCH, SIZE, SIZE)


def masks(place: Tensor, percentage: int) -> tuple[Tensor, Tensor]:
    """What most and least relevant first remove, (B, H, W) each."""
    count = SIZE * SIZE * percentage // 100
    return place < count, place >= SIZE * SIZE - count


def ours(x: Tensor, removed: tuple[Tensor, ...], solver: Solver) -> list[Tensor]:
    return [impute(x, own, solver)[0] for own in removed]


def peer(x: Tensor, removed: tuple[Tensor, ...]) -> list[Tensor]:
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    imputer = NoisyLinearImputer(noise=0)
    return [imputer(image, mask) for own in removed for image, mask in zip(x, (~own).float())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--peer", type=int, default=2, help="images of grad-cam's turn")
    chosen = parser.parse_args()
    tuning.keep_freed_memory()
    x, place = pictures()
    total: dict[str, float] = {}
    dropped = 0
    print(f"{torch.get_num_threads()} threads; milliseconds an imputation")
    for percentage in LEVELS:
        removed = masks(place, percentage)
        few = tuple(own[: chosen.peer] for own in removed)
        contenders: dict[str, Callable[[], object]] = {
            "exact": partial(ours, x, removed, "exact"),
            "multigrid": partial(ours, x, removed, "multigrid"),
            "grad-cam": partial(peer, x[: chosen.peer], few),
        }
        found = race(contenders, chosen.repeats, chosen.tries)
        dropped += sum(timing.dropped for timing in found.values())
        images = {"exact": BATCH, "multigrid": BATCH, "grad-cam": chosen.peer}
        each = {name: 1000 * timing.median / 2 / images[name] for name, timing in found.items()}
        total = {name: total.get(name, 0) + value / len(LEVELS) for name, value in each.items()}
        print(f"{percentage:3d} %", "  ".join(f"{name} {value:7.1f}" for name, value in each.items()))
    print("mean ", "  ".join(f"{name} {value:7.1f}" for name, value in total.items()))
    for name in ("exact", "multigrid"):
        print(f"{name}: {total['grad-cam'] / total[name]:.1f} times as fast as grad-cam")
    print(f"largest difference to exact, as a share of the range: {difference(x, place, chosen.peer)}")
    print(f"{dropped} disturbed runs dropped")


def difference(x: Tensor, place: Tensor, peers: int) -> dict[str, str]:
    """Of multigrid and grad-cam, at the hardest level."""
    few, removed = x[:peers], tuple(own[:peers] for own in masks(place, LEVELS[-1]))
    exact, extent = torch.cat(ours(few, removed, "exact")), x.max() - x.min()
    others = {
        "multigrid": torch.cat(ours(few, removed, "multigrid")),
        "grad-cam": torch.stack(peer(few, removed)),
    }
    return {name: f"{float((other - exact).abs().max() / extent):.1e}" for name, other in others.items()}


if __name__ == "__main__":
    main()
