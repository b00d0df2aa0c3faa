"""Does a map sit on the object it explains? ``python -m xcli.demo.localise`` prints a table over all methods.

Each of 200 generated scenes shows two objects of different kinds; each object is explained by its own class. The
energy of a map is the sum of its positive part; its share inside a mask says where it looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from xcli.demo import nets
from xcli.demo.scenes import PAIRS_SEED, Scene, load_photos, scenes
from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.hooks import frozen
from xcli.layers import survey
from xcli.score import Score
from xcli.targets import ClassRows

SHORTER: dict[str, dict[str, object]] = {
    "ss-cam": {"samples": 2, "most": 24},
    "is-cam": {"samples": 4, "most": 24},
    "opti-cam": {"steps": 20},
    "integrated-gradients": {"steps": 20},
    "blur-ig": {"steps": 20},
    "guided-ig": {"steps": 20},
    "expected-gradients": {"baselines": "other scenes", "samples": 20},
    "deeplift-shap": {"baselines": "other scenes"},
    "smoothgrad": {"samples": 20},
    "squaregrad": {"samples": 20},
    "vargrad": {"samples": 20},
    "occlusion": {"patch": 18, "stride": 18},
    "rise": {"masks": 200},
    "lime": {"samples": 100},
    "kernel-shap": {"samples": 100},
    "shapley-sampling": {"orders": 2},
    "sobol": {"grid": 5, "samples": 5},
    "hsic": {"grid": 6, "samples": 120},
    "extremal-perturbation": {"areas": (0.05,), "iterations": 50},
}
"""Options for methods that take hours at their defaults, or need some; the table says so."""

OTHERS = 32
"""How many further scenes, of one object or two, ``other scenes`` are."""


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
    kinds = torch.tensor([scene.kinds for scene in drawn])
    return as_input(drawn), kinds, torch.from_numpy(np.stack([scene.masks for scene in drawn]))


def others(photos: Sequence[np.ndarray]) -> Tensor:
    """Further scenes as model input, to compare with, (R, 3, H, W)."""
    return as_input(list(scenes(OTHERS, seed=PAIRS_SEED + 1, objects=(1, 2), photos=photos)))


def as_input(drawn: Sequence[Scene]) -> Tensor:
    """The pictures of scenes, normalised: (B, 3, H, W)."""
    pixels = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (nets.MEAN, nets.STD))
    return (pixels - mean) / std


def localisation(
    net: nn.Module,
    method: str,
    x: Tensor,
    kinds: Tensor,
    masks: Tensor,
    batch: int = 50,
    pictures: Mapping[str, Tensor] | None = None,
) -> Localisation:
    """Explain both objects of every scene with ``method``, in ``SHORTER`` form if there is one, each by its class.

    Raises:
        ModelError: the method cannot be computed on this network.
    """
    from xcli.registry import build

    chosen, size = build({"name": method, **SHORTER.get(method, {})}), (x.shape[-2], x.shape[-1])
    layers, execution = survey(net, x[:1]), Execution(batch)
    own, other, hits = [], [], []
    with frozen(net):
        for start in range(0, len(x), batch):
            part, shown = x[start : start + batch], masks[start : start + batch].flatten(0, 1).flatten(1)
            rows = ClassRows(
                torch.arange(len(part)).repeat_interleave(2), kinds[start : start + batch].flatten()
            )
            keys = [f"scene-{start + index}" for index in range(len(part))]
            score = Score(net, rows, layers, execution, keys=keys, pictures=pictures or {}).scaled(
                chosen.scale
            )
            maps = chosen.explain(score, part, size).map.flatten(1)  # (2 B, H W)
            energy = maps.relu()
            total = energy.sum(1).clamp_min(torch.finfo(energy.dtype).tiny)
            rival = shown.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            own.append((energy * shown).sum(1) / total)
            other.append((energy * rival).sum(1) / total)
            hits.append(shown.gather(1, maps.argmax(1, keepdim=True)).float())
    return Localisation(*(float(torch.cat(values).mean()) for values in (own, other, hits)))


def main(
    models: Annotated[
        list[str] | None, typer.Argument(help="shapes-cnn, shapes-vit; both if left out")
    ] = None,
    count: Annotated[int, typer.Option(help="Scenes.")] = 200,
    only: Annotated[str, typer.Option(help="Methods, separated by commas; all if left out.")] = "",
    photos: Annotated[Path, typer.Option(help="Photographs for backgrounds.")] = Path("sample_images/photos"),
) -> None:
    """Print the localisation of every method on two-object scenes, for each network."""
    from xcli.registry import methods

    chosen = models or ["shapes-cnn", "shapes-vit"]
    backgrounds = load_photos(photos)
    data, beside = pairs(count, backgrounds), {"other scenes": others(backgrounds)}
    print(f"{count} scenes of two objects, each explained by its class: mean of {2 * count} maps")
    print(
        "own, other: share of the map's energy on the object explained, on the other; pointing: highest pixel on it"
    )
    print(f"{'':<22}" + "".join(f"{name:^30}" for name in chosen))
    print(f"{'method':<22}" + f"{'own':>10}{'other':>10}{'pointing':>10}" * len(chosen))
    nets_by_name = {name: nets.load(name) for name in chosen}
    for name in [one for one in methods() if not only or one in only.split(",")]:
        less = "".join(f"  {key}: {value}" for key, value in SHORTER.get(name, {}).items())
        numbers = "".join(line(net, name, data, beside) for net in nets_by_name.values())
        print(f"{name:<22}{numbers}{less}", flush=True)


def line(
    net: nn.Module, name: str, data: tuple[Tensor, Tensor, Tensor], pictures: Mapping[str, Tensor]
) -> str:
    """Three numbers of one method on one network, or that it is not defined there."""
    try:
        found = localisation(net, name, *data, pictures=pictures)
    except ModelError:
        return f"{'not defined':>30}"
    return f"{found.own:>10.3f}{found.other:>10.3f}{found.pointing:>10.3f}"


if __name__ == "__main__":
    typer.run(main)
