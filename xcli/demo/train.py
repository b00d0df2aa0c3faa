"""Train one of the embedded networks on generated scenes, and measure it on scenes it has not seen.

``python -m xcli.demo.train shapes-cnn`` renders the training scenes, trains, writes float16 weights and
evaluates them as read back from that file; ``--evaluate`` only evaluates. A run is set by its seed: scenes,
their order, the augmentation and the initial weights all derive from it. The last bits of the weights can
still differ between types of CPU, numbers of threads and versions of PyTorch, since these sum in different
orders. ``shapes-vit`` takes its convolutional stem, frozen, from the shipped ``shapes-cnn``, so train that first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from xcli.demo.nets import CATEGORIES, MEAN, NETS, SIZE, STD, ShapesCNN, ShapesViT, load, weights_path
from xcli.demo.scenes import Pixels, load_photos, scene_at

CHUNK = 250
BATCH = 64
TRAINING_OBJECTS = (1, 2, 2, 3)
HELD_OUT_SEED = 1_000_003
"""Seed of the scenes for evaluation; training scenes come from the seed of the run."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one network learns."""

    scenes: int
    epochs: int
    rate: float
    decay: float


RECIPES = {
    "shapes-cnn": Recipe(scenes=16_000, epochs=14, rate=3e-3, decay=0.05),
    "shapes-vit": Recipe(scenes=10_000, epochs=3, rate=2e-3, decay=0.05),
}


@dataclass(frozen=True)
class Pictures:
    """Rendered scenes: ``images`` uint8 [N, 3, H, W] and ``present`` float [N, kinds], 1 for a kind in it."""

    images: Tensor
    present: Tensor


def _render_chunk(
    start: int, count: int, seed: int, objects: tuple[int, ...], photos: Sequence[Pixels]
) -> tuple[Pixels, Pixels]:
    """Images [n, 3, H, W] and presence [n, kinds] of ``CHUNK`` scenes from ``start``, fewer at ``count``."""
    indices = range(start, min(start + CHUNK, count))
    images = np.empty((len(indices), 3, *SIZE), np.uint8)
    present = np.zeros((len(indices), len(CATEGORIES)), np.uint8)
    for row, index in enumerate(indices):
        drawn = scene_at(index, seed, objects, photos)
        images[row] = drawn.image.transpose(2, 0, 1)
        present[row, list(drawn.kinds)] = 1
    return images, present


def render(count: int, seed: int, objects: tuple[int, ...], photos: Sequence[Pixels] = ()) -> Pictures:
    """The first ``count`` scenes of ``seed``, drawn by as many processes as there are cores."""
    draw = partial(_render_chunk, count=count, seed=seed, objects=objects, photos=photos)
    starts = range(0, count, CHUNK)
    if len(starts) <= 2:
        chunks = [draw(start) for start in starts]
    else:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
            chunks = list(pool.map(draw, starts))
    images, present = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return Pictures(torch.from_numpy(images), torch.from_numpy(present).float())


def normalised(images: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] as the networks take it."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored and turned at random (no kind depends on it), its colour channels shuffled."""
    count = len(images)
    coins = torch.rand(3, count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(coins[0], images.flip(3), images)
    images = torch.where(coins[1], images.flip(2), images)
    images = torch.where(coins[2], images.transpose(2, 3), images)
    channels = torch.rand(count, 3, generator=generator).argsort(dim=1)
    return images[torch.arange(count)[:, None], channels]


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights of convolutions and linear layers decay; norms, biases and tokens do not."""
    tokens = ("class_token", "positions")
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learned if p.ndim > 1 and name not in tokens]
    others = [p for name, p in learned if p.ndim <= 1 or name in tokens]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def _fresh(name: str) -> nn.Module:
    """Network ``name`` to be trained; the stem of shapes-vit is that of the shipped shapes-cnn and stays so."""
    model = NETS[name]().train()
    if isinstance(model, ShapesViT):
        cnn = load("shapes-cnn")
        assert isinstance(cnn, ShapesCNN)
        model.stem = cnn.front().requires_grad_(False).eval()
    return model


def _mixed(model: nn.Module, batch: Tensor) -> Tensor:
    """Logits [B, kinds] with convolutions in bfloat16, transformer blocks in float32: narrow, they gain nothing."""
    if isinstance(model, ShapesViT):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = model.features(batch)
        return model.encode(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(batch)
    return logits.float()


def train(name: str, pictures: Pictures, epochs: int, rate: float, decay: float, seed: int) -> nn.Module:
    """Network ``name`` after ``epochs`` passes over the pictures, in eval mode.

    Binary cross-entropy for each kind; AdamW with one cycle of learning rates up to ``rate``;
    convolutions in bfloat16.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = _fresh(name).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(_groups(model, decay), lr=rate)
    count = len(pictures.images)
    steps = epochs * (count // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2), pct_start=0.15)
    for epoch in range(epochs):
        start, total = time.monotonic(), 0.0
        order = torch.randperm(count, generator=generator)[: count // BATCH * BATCH]
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            batch = normalised(_augmented(pictures.images[rows], generator))
            logits = _mixed(model, batch.contiguous(memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits, pictures.present[rows])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        mean, seconds = total / max(len(order), 1), time.monotonic() - start
        print(f"epoch {epoch + 1}/{epochs}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def save(model: nn.Module, path: Path) -> None:
    """Write the weights, floating-point ones as float16, to a safetensors file."""
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    halved = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    save_file(halved, str(path))


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Logits [N, kinds] of uint8 images [N, 3, H, W]."""
    return torch.cat([model(normalised(images[i : i + 100])) for i in range(0, len(images), 100)])


def accuracy(model: nn.Module, pictures: Pictures, objects: int) -> float:
    """Share of pictures whose ``objects`` kinds are exactly those with the highest logits."""
    top = logits_of(model, pictures.images).topk(objects).indices
    return float((pictures.present.gather(1, top).sum(1) == objects).float().mean())


def evaluate(name: str, weights: Path, photos: Sequence[Pixels]) -> None:
    """Print how often the weights are right on 1000 held-out scenes with one object, and on 1000 with two."""
    model = load(name, weights)
    one = accuracy(model, render(1000, HELD_OUT_SEED, (1,), photos), 1)
    two = accuracy(model, render(1000, HELD_OUT_SEED + 1, (2,), photos), 2)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}: {parameters} parameters, {weights.stat().st_size} bytes")
    print(f"one object, highest logit: {one:.3f} of 1000; two objects, two highest logits: {two:.3f} of 1000")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m xcli.demo.train", description=__doc__)
    parser.add_argument("name", choices=sorted(NETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, help="scenes to render for training (default: by network)")
    parser.add_argument("--epochs", type=int, help="passes over them (default: by network)")
    parser.add_argument("--photos", type=Path, default=Path("sample_images/photos"), help="backgrounds")
    parser.add_argument("--output", type=Path, help="weights file (default: the shipped one)")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the weights file")
    chosen = parser.parse_args()
    recipe, photos = RECIPES[chosen.name], load_photos(chosen.photos)
    weights = chosen.output or weights_path(chosen.name)
    start = time.monotonic()
    if not chosen.evaluate:
        epochs = chosen.epochs or recipe.epochs
        pictures = render(chosen.scenes or recipe.scenes, chosen.seed, TRAINING_OBJECTS, photos)
        print(f"rendered {len(pictures.images)} scenes in {time.monotonic() - start:.0f} s", flush=True)
        model = train(chosen.name, pictures, epochs, recipe.rate, recipe.decay, chosen.seed)
        save(model, weights)
    evaluate(chosen.name, weights, photos)
    print(f"wall time {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
