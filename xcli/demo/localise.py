"""Does a map sit on the object it explains? ``python -m xcli.demo.localise`` prints a table over all methods.

Each of 200 generated scenes shows two objects of different kinds; each object is explained by its own class. The
energy of a map is the sum of its positive part; its share inside a mask says where it looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from xcli.demo import nets
from xcli.demo.scenes import PAIRS_SEED, load_photos, scenes


@dataclass(frozen=True)
class Localisation:
    """Means over all (scene, object) pairs.

    Attributes:
        own, other: share of the energy inside the explained object's mask, and inside the other object's.
        pointing: how often the highest pixel lies on the explained object.
    """

    own: float
    other: float
    pointing: float


def pairs(count: int, photos: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, H, W) as model input, kinds (B, 2), masks (B, 2, H, W) of two-object scenes."""
    drawn = list(scenes(count, seed=PAIRS_SEED, objects=(2,), photos=photos))
    pixels = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (nets.MEAN, nets.STD))
    kinds = torch.tensor([scene.kinds for scene in drawn])
    return (pixels - mean) / std, kinds, torch.from_numpy(np.stack([scene.masks for scene in drawn]))


def localisation(
    net: nn.Module, method: str, x: Tensor, kinds: Tensor, masks: Tensor, batch: int = 50
) -> Localisation:
    """Explain both objects of every scene with ``method``, each by its class."""
    import xcli

    own, other, hits = [], [], []
    for index in range(2):
        maps = torch.cat(
            [
                xcli.explain(
                    net, x[start : start + batch], method, target=kinds[start : start + batch, index]
                ).map
                for start in range(0, len(x), batch)
            ]
        )
        energy = maps.relu().flatten(1)
        total = energy.sum(1).clamp_min(1e-12)
        mine, yours = masks[:, index].flatten(1), masks[:, 1 - index].flatten(1)
        own.append((energy * mine).sum(1) / total)
        other.append((energy * yours).sum(1) / total)
        hits.append(mine.gather(1, maps.flatten(1).argmax(1, keepdim=True)).float())
    return Localisation(*(float(torch.cat(values).mean()) for values in (own, other, hits)))


def main(
    model: Annotated[str, typer.Argument(help="shapes-cnn or shapes-vit")] = "shapes-cnn",
    count: Annotated[int, typer.Option(help="Scenes.")] = 200,
    photos: Annotated[Path, typer.Option(help="Photographs for backgrounds.")] = Path("sample_images/photos"),
) -> None:
    """Print the localisation of every method on two-object scenes."""
    from xcli.registry import methods

    net = nets.load(model)
    x, kinds, masks = pairs(count, load_photos(photos))
    print(f"{model}, {count} scenes of two objects, each explained by its class")
    print(
        f"{'method':<22}{'inside own':>11}{'inside other':>13}{'own/other':>11}{'own/random':>12}{'pointing':>10}"
    )
    floor = localisation(net, "random", x, kinds, masks)
    for name in methods():
        found = localisation(net, name, x, kinds, masks)
        ratio = found.own / max(found.other, 1e-12)
        print(
            f"{name:<22}{found.own:>11.3f}{found.other:>13.4f}{ratio:>11.1f}{found.own / floor.own:>12.1f}"
            f"{found.pointing:>10.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
