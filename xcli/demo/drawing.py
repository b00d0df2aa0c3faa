"""Outlines of the ten kinds of shapes, and patterns to fill them and the background with.

Patterns are [size, size] in [0, 1] and depend on ``size`` only in how finely they are sampled: frequencies
count periods, and noise counts bumps, along a side of the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from xcli.demo.nets import CATEGORIES

Floats = NDArray[np.floating[Any]]
Polygon = NDArray[np.floating[Any]]
"""Points (x, y), [points, 2], of a closed curve."""

SUPERSAMPLING = 4
"""Outlines are drawn this many times as large and averaged, which smooths their edges."""


def _polar(radius: Callable[[Polygon], Polygon] | float, points: int = 120) -> Polygon:
    """Closed curve at ``radius`` of the angle."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    distance = radius(angle) if callable(radius) else radius
    curve: Polygon = np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.reshape(distance, (-1, 1))
    return curve


def _star(rng: np.random.Generator) -> Polygon:
    inner = rng.uniform(0.38, 0.48)
    return _polar(lambda angle: np.where(np.arange(len(angle)) % 2 == 0, 1.0, inner), 10)


def _cross(rng: np.random.Generator) -> Polygon:
    a, b = 0.96, rng.uniform(0.24, 0.36)
    corners = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a)]
    return np.array([*corners, (-b, b), (-a, b), (-a, -b), (-b, -b)])


def _heart(_: np.random.Generator) -> Polygon:
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16.5


def _crescent(rng: np.random.Generator) -> Polygon:
    offset, inner = rng.uniform(0.42, 0.52), 0.84
    cosine = (1 + offset**2 - inner**2) / (2 * offset)
    start = np.arccos(cosine)
    outer_angle = np.linspace(start, 2 * np.pi - start, 80)
    outer = np.stack([np.cos(outer_angle), np.sin(outer_angle)], axis=1)
    stop = np.arctan2(np.sin(start), cosine - offset)
    inner_angle = np.linspace(2 * np.pi - stop, stop, 80)
    back = np.stack([offset + inner * np.cos(inner_angle), inner * np.sin(inner_angle)], axis=1)
    curve: Polygon = np.concatenate([outer, back]) + np.array([0.2, 0.0])
    return curve


def _arrow(rng: np.random.Generator) -> Polygon:
    shaft, neck = rng.uniform(0.17, 0.25), rng.uniform(-0.25, -0.05)
    right = [(0.0, -1.0), (0.74, neck), (shaft, neck), (shaft, 0.98)]
    return np.array(right + [(-x, y) for x, y in reversed(right[1:])])


def outline(kind: int, rng: np.random.Generator) -> list[Polygon]:
    """The outline of one object within the unit circle, and the outline of its hole where it has one."""
    match CATEGORIES[kind]:
        case "disc":
            return [_polar(0.95)]
        case "ring":
            return [_polar(0.98), _polar(rng.uniform(0.5, 0.66))]
        case "square":
            return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * rng.uniform(0.72, 0.82, 2)]
        case "triangle":
            return [np.array([(0, -1), (0.9, 0.62), (-0.9, 0.62)]) * (rng.uniform(0.85, 1.0), 1)]
        case "star":
            return [_star(rng)]
        case "cross":
            return [_cross(rng)]
        case "heart":
            return [_heart(rng)]
        case "crescent":
            return [_crescent(rng)]
        case "arrow":
            return [_arrow(rng)]
        case _:
            petals, depth = int(rng.integers(6, 9)), rng.uniform(0.17, 0.24)
            return [_polar(lambda angle: 1 - depth + depth * np.cos(petals * angle), 240)]


def coverage(curves: list[Polygon], centre: Polygon, scale: float, turn: float, size: int) -> Floats:
    """How much of each pixel an outline covers, [size, size] in [0, 1].

    ``centre`` (x, y) and ``scale`` (the radius) are in pixels, ``turn`` in radians.
    """
    canvas = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for paint, polygon in zip((255, 0), curves, strict=False):
        points = (polygon @ rotation * scale + centre) * SUPERSAMPLING
        draw.polygon([(float(x), float(y)) for x, y in points], fill=paint)
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255


def smooth(rng: np.random.Generator, size: int, cells: int) -> Floats:
    """Smooth noise [size, size] in [0, 1] with about ``cells`` bumps along a side."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    field = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return np.asarray(np.clip(field, 0, 1))


def wave(rng: np.random.Generator, size: int, periods: float, bend: float) -> Floats:
    """Stripes in [0, 1] of random direction; ``bend`` periods of smooth noise bend them, as in wood."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, np.pi)
    phase = periods * (x * np.cos(angle) + y * np.sin(angle)) + bend * smooth(rng, size, 5)
    return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * phase), np.float32)


def checker(rng: np.random.Generator, size: int, periods: float) -> Floats:
    """Soft-edged squares in [0, 1], turned by a random angle."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, np.pi / 2)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    product = np.sin(2 * np.pi * periods * u) * np.sin(2 * np.pi * periods * v)
    return np.asarray(np.clip(0.5 + 3 * product, 0, 1), np.float32)


def dots(rng: np.random.Generator, size: int, periods: float) -> Floats:
    """Round dots of 1 on 0, in rows and columns."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    shift = rng.uniform(0, 1, 2)
    bumps = np.cos(2 * np.pi * (periods * x + shift[0])) + np.cos(2 * np.pi * (periods * y + shift[1]))
    return np.asarray(np.clip(2 * (bumps - 0.6), 0, 1), np.float32)


def ramp(rng: np.random.Generator, size: int) -> Floats:
    """A linear gradient from 0 to 1 in a random direction."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    slope = x * np.cos(angle) + y * np.sin(angle)
    return np.asarray((slope - slope.min()) / (slope.max() - slope.min()), np.float32)


def blend(pattern: Floats, low: Floats, high: Floats) -> Floats:
    """Colours [H, W, 3] from ``low`` [3] where the pattern is 0 to ``high`` [3] where it is 1."""
    return np.asarray(low + pattern[..., None] * (high - low), np.float32)
