"""Generated scenes: one to three shapes of distinct kinds on a background, with the pixels of each.

``python -m xcli.demo.scenes --output sample_images`` rewrites the sample pictures there from a fixed seed:
``scenes/one/*.jpg`` and ``scenes/two/*.jpg`` (256x256), the same tree of object masks in ``masks/``, and
``scenes.csv``. A mask is a palette PNG whose value is 0 on the background and 1 + the index of the kind on an
object. Backgrounds come from ``photos/``. Of the seed's scenes it keeps those that both shipped networks name
rightly; that seed is neither one of training nor one of evaluation.

With ``--count N`` it writes N scenes of two objects instead, as they come, to ``scenes/`` and ``masks/`` there, for
evaluations: ``python -m xcli.demo.scenes --count 200 --output results/pairs``.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import nn

from xcli.demo.drawing import Floats, Polygon, blend, checker, coverage, dots, outline, ramp, smooth, wave
from xcli.demo.nets import CATEGORIES, MEAN, NETS, SIZE, STD, load

Pixels = NDArray[np.uint8]

RADII = {1: (0.11, 0.22), 2: (0.10, 0.18), 3: (0.09, 0.14)}
"""Range of an object's radius as a share of the picture's side, by the number of objects in the scene."""

SAMPLE_SEED = 2_000_003
PAIRS_SEED = 77
"""Of scenes for evaluations; none of them was trained on."""
SAMPLE_SIDE = 256
SAMPLES = 12
"""Sample pictures with one object, and with two."""

PALETTE = (
    *((0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)),
    *((145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212)),
)
"""RGB of the background and of each kind in the sample masks."""


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it: objects of distinct kinds, apart from each other."""

    image: Pixels
    """RGB, [H, W, 3]."""
    kinds: tuple[int, ...]
    """Index into ``CATEGORIES`` of each object."""
    masks: NDArray[np.bool_]
    """The visible pixels of each object, [objects, H, W]; at most one mask is true at a pixel."""


def _crop(rng: np.random.Generator, photo: Pixels, size: int) -> Floats:
    """A random square of a photograph, perhaps mirrored, dimmed or faded, [size, size, 3] in [0, 1]."""
    side = int(min(photo.shape[:2]) * rng.uniform(0.35, 1.0))
    top, left = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    part = Image.fromarray(photo[top : top + side, left : left + side])
    crop: Floats = np.asarray(part.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    crop = rng.uniform(0.55, 1.0) * crop + rng.uniform(0, 0.25) * rng.random(3)
    return np.asarray(crop.clip(0, 1), np.float32)


def _background(rng: np.random.Generator, photos: Sequence[Pixels], size: int) -> Floats:
    """A crop of one of the photographs or a generated texture, [size, size, 3] in [0, 1]."""
    if photos and rng.random() < 0.45:
        return _crop(rng, photos[int(rng.integers(len(photos)))], size)
    low = 0.55 * rng.random() + 0.45 * rng.random(3)
    high = np.clip(low + rng.uniform(-0.35, 0.35, 3), 0, 1)
    match rng.integers(5):
        case 0:
            pattern = 0.6 * smooth(rng, size, 4) + 0.4 * smooth(rng, size, 14)
        case 1:
            pattern = ramp(rng, size)
        case 2:
            grain = wave(rng, size, rng.uniform(4, 10), rng.uniform(0.5, 3))
            pattern = 0.7 * grain + 0.3 * smooth(rng, size, 24)
        case 3:
            pattern = checker(rng, size, rng.uniform(2, 5))
        case _:
            pattern = 0.5 * smooth(rng, size, 3) + 0.5 * smooth(rng, size, 40)
    return blend(pattern, low, high)


def _fill(rng: np.random.Generator, around: Floats, size: int) -> Floats:
    """A texture [size, size, 3] whose colours stand out from the mean colour [3] ``around`` it."""
    colours = rng.uniform(0, 1, (12, 3))
    luminance = np.abs((colours - around) @ np.array([0.30, 0.59, 0.11]))
    distance = np.linalg.norm(colours - around, axis=1) + 1.5 * luminance
    distinct = np.flatnonzero((luminance > 0.2) & (distance > 0.7))
    low = colours[distinct[0] if len(distinct) else np.argmax(distance)]
    high = np.clip(low + 0.55 * (low - around) + rng.uniform(-0.2, 0.2, 3), 0, 1)
    match rng.integers(6):
        case 0:
            return blend(np.zeros((size, size), np.float32), low, high)
        case 1:
            return blend(wave(rng, size, rng.uniform(10, 20), 0.0), low, high)
        case 2:
            return blend(dots(rng, size, rng.uniform(10, 18)), low, high)
        case 3:
            return blend(ramp(rng, size), low, high)
        case 4:
            return blend(smooth(rng, size, 20), low, high)
        case _:
            return blend(checker(rng, size, rng.uniform(6, 10)), low, high)


def _places(rng: np.random.Generator, objects: int, size: int) -> list[tuple[Polygon, float]]:
    """Centre (x, y) and radius in pixels of each object; the circles lie in the picture and keep apart."""
    low, high = RADII[objects]
    while True:
        placed: list[tuple[Polygon, float]] = []
        for _ in range(objects):
            radius = rng.uniform(low, high)
            centre = rng.uniform(radius + 0.01, 0.99 - radius, 2)
            if all(np.linalg.norm(centre - c) > 1.05 * (radius + r) for c, r in placed):
                placed.append((centre, radius))
        if len(placed) == objects:
            return [(centre * size, radius * size) for centre, radius in placed]


def _shade(image: Floats, cover: Floats, strength: float, size: int) -> Floats:
    """The image with a soft shadow just below and right of the covered pixels."""
    blurred = Image.fromarray((cover * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 50))
    shadow = np.roll(np.asarray(blurred, np.float32) / 255, (size // 50, size // 50), (0, 1))
    return np.asarray(image * (1 - strength * shadow[..., None]))


def scene(
    rng: np.random.Generator,
    objects: int,
    photos: Sequence[Pixels] = (),
    size: int = SIZE[0],
) -> Scene:
    """One picture of ``size`` x ``size`` pixels with 1, 2 or 3 objects, on a crop of ``photos`` or a texture.

    The same generator state with a larger ``size`` draws much the same scene, more finely.
    """
    kinds = rng.permutation(len(CATEGORIES))[:objects]
    image = _background(rng, photos, size)
    masks: list[NDArray[np.bool_]] = []
    for kind, (centre, radius) in zip(kinds, _places(rng, objects, size), strict=True):
        cover = coverage(outline(int(kind), rng), centre, radius, rng.uniform(0, 2 * np.pi), size)
        around = image[cover > 0.5].mean(axis=0)
        fill = _fill(rng, around, size)
        image = _shade(image, cover, rng.uniform(0, 0.5), size)
        image = image + cover[..., None] * (fill - image)
        masks = [*(mask & (cover <= 0.5) for mask in masks), cover > 0.5]
    image = image + rng.normal(0, rng.uniform(0, 0.02), image.shape)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Scene(pixels, tuple(int(kind) for kind in kinds), np.stack(masks))


def scene_at(
    index: int,
    seed: int,
    objects: tuple[int, ...] = (1, 2),
    photos: Sequence[Pixels] = (),
    size: int = SIZE[0],
) -> Scene:
    """Scene ``index`` of the endless sequence that ``seed`` stands for; see ``scenes``."""
    rng = np.random.default_rng([seed, index])
    return scene(rng, objects[int(rng.integers(len(objects)))], photos, size)


def scenes(
    count: int, seed: int, objects: tuple[int, ...] = (1, 2), photos: Sequence[Pixels] = ()
) -> Iterator[Scene]:
    """The first ``count`` scenes of ``seed``, each with a number of objects drawn from ``objects``."""
    return (scene_at(index, seed, objects, photos) for index in range(count))


def load_photos(folder: Path) -> list[Pixels]:
    """The JPEG files of a folder in the order of their names, each RGB [H, W, 3]; none without a folder."""
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.jpg"))]


def _named_rightly(nets: Sequence[nn.Module], jpeg: bytes, kinds: tuple[int, ...]) -> bool:
    """Whether each network's highest logits are those of the kinds in the picture, resized to ``SIZE``."""
    picture = Image.open(io.BytesIO(jpeg)).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    pixels = (np.asarray(picture, np.float32) / 255 - MEAN) / STD
    batch = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        return all(set(net(batch)[0].topk(len(kinds)).indices.tolist()) == set(kinds) for net in nets)


def _jpeg(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92, optimize=True)
    return buffer.getvalue()


def _mask(drawn: Scene) -> Image.Image:
    """Palette image: 0 on the background, 1 + the index of the kind on an object."""
    values = np.zeros(drawn.masks.shape[1:], np.uint8)
    for kind, mask in zip(drawn.kinds, drawn.masks, strict=True):
        values[mask] = 1 + kind
    image = Image.fromarray(values, "P")
    image.putpalette([channel for colour in PALETTE for channel in colour])
    return image


def write_samples(folder: Path, part: str, objects: int, nets: Sequence[nn.Module]) -> list[tuple[str, str]]:
    """Write ``SAMPLES`` pictures and masks with so many objects; rows (path below ``folder``, first kind).

    The first kinds take turns. Files are named by their kinds and a number, such as ``heart-ring-01.jpg``.
    """
    photos, drawn = load_photos(folder / "photos"), count()
    pictures, masks = folder / "scenes" / part, folder / "masks" / part
    for target in (pictures, masks):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    seen: Counter[str] = Counter()
    rows: list[tuple[str, str]] = []
    while len(rows) < SAMPLES:
        one = scene_at(next(drawn), SAMPLE_SEED + objects, (objects,), photos, SAMPLE_SIDE)
        data = _jpeg(one.image)
        if one.kinds[0] != len(rows) % len(CATEGORIES) or not _named_rightly(nets, data, one.kinds):
            continue
        name = "-".join(CATEGORIES[kind] for kind in one.kinds)
        seen[name] += 1
        stem = f"{name}-{seen[name]:02d}"
        (pictures / f"{stem}.jpg").write_bytes(data)
        _mask(one).save(masks / f"{stem}.png", optimize=True)
        rows.append((f"scenes/{part}/{stem}.jpg", CATEGORIES[one.kinds[0]]))
    return rows


def write_pairs(folder: Path, number: int, photos: Sequence[Pixels]) -> None:
    """Write the first ``number`` scenes of two objects of the evaluation seed, lossless, and their masks."""
    for name in ("scenes", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, drawn in enumerate(scenes(number, PAIRS_SEED, (2,), photos)):
        name = f"{index:04d}-{'-'.join(CATEGORIES[kind] for kind in drawn.kinds)}.png"
        Image.fromarray(drawn.image).save(folder / "scenes" / name)
        _mask(drawn).save(folder / "masks" / name, optimize=True)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m xcli.demo.scenes", description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="where they go; of the samples, with photos/"
    )
    parser.add_argument("--count", type=int, help="this many scenes of two objects instead of the samples")
    parser.add_argument("--photos", type=Path, default=Path("sample_images/photos"), help="for backgrounds")
    given = parser.parse_args()
    folder: Path = given.output
    if given.count is not None:
        write_pairs(folder, given.count, load_photos(given.photos))
        print(f"wrote {given.count} scenes and their masks to {folder}")
        return
    nets = [load(name) for name in NETS]
    rows = write_samples(folder, "one", 1, nets) + write_samples(folder, "two", 2, nets)
    with (folder / "scenes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "label"), *sorted(rows)])
    print(f"wrote {len(rows)} pictures to {folder}")


if __name__ == "__main__":
    main()
