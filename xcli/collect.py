"""From the results of batches to the columns of a part, and to the pictures of its images."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from xcli import scoring
from xcli.batches import Result
from xcli.entries import MethodSpec
from xcli.images import BadImage, Source, read_image
from xcli.panels import CELL, PanelRow, panel
from xcli.parts import Array, Attrs, axis
from xcli.pictures import Namer, PictureWriter, picture_path
from xcli.plan import Plan
from xcli.preprocess import Geometry
from xcli.render import colour_table, heatmap_image, overlay_original, to_images
from xcli.store import Column, Encoded, Part, encode

LOG = logging.getLogger(__name__)


Overlays = Mapping[str, Sequence[Image.Image]]
"""By the method's label, one a row."""


class PartBuilder:
    """Gathers the results of one part's images and gives its columns; maps are compressed in ``pool`` meanwhile."""

    def __init__(self, plan: Plan, rows: slice, sources: Sequence[Source], pool: Executor) -> None:
        self.plan, self.rows, self.pool, self.sources = plan, rows, pool, sources[rows]
        count = rows.stop - rows.start
        self.label = np.asarray([plan.label(source) for source in sources[rows]], np.int64)
        self.width, self.height = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.error = [""] * count
        self.seen = 0
        self.truthless = False  # whether some image's ground truth could not be read
        self.owners: list[int] = []
        self.columns: dict[str, list[Array]] = {}
        self.maps: dict[str, list[Array]] = {spec.label: [] for spec in plan.methods}
        self.chunks: dict[str, list[Future[bytes]]] = {spec.label: [] for spec in plan.methods}
        self.squeeze = plan.config.output.compression == "gzip"

    @property
    def full(self) -> bool:
        """Whether every image of the part is in."""
        return self.seen == len(self.error)

    def add(self, result: Result) -> None:
        """Take in a batch of this part's images."""
        for row, reason in result.failed:
            self.error[row - self.rows.start] = reason
        for row, geometry in zip(result.images, result.geometry, strict=True):
            self.height[row - self.rows.start], self.width[row - self.rows.start] = geometry.original
        self.truthless |= bool(result.unscored)
        self.seen += len(result.images) + len(result.failed)
        if not len(result.image):
            return
        self.owners += [result.images[i] for i in result.image.tolist()]
        for name, values in result.columns.items():
            if axis(name) == "shared":
                self.columns[name] = [values.numpy()]
            else:
                self.columns.setdefault(name, []).append(values.numpy())
        for label, maps in result.maps.items():
            if self.squeeze:
                self.chunks[label] += [self.pool.submit(encode, row) for row in maps.numpy()]
            else:
                self.maps[label].append(maps.numpy())

    def part(self) -> Part:
        """The columns and attributes of the part, as results.h5 names them."""
        failed = np.array([bool(reason) for reason in self.error], np.uint8)
        none = np.zeros(0, np.int64)
        columns: dict[str, Column] = {
            "images/label": self.label,
            "images/width": self.width,
            "images/height": self.height,
            "images/bytes": np.asarray([source.size for source in self.sources], np.int64),
            "images/status": failed,
            "images/error": self.error,
            "explanations/image": np.asarray(self.owners, np.int64),
            "explanations/target": none,
            "explanations/score": none.astype(np.float32),
            "explanations/probability": none.astype(np.float32),
            "explanations/status": none.astype(np.uint8),
            **{f"status/{spec.label}": none.astype(np.uint8) for spec in self.plan.methods},
            **{
                f"extras/{label}/{name}": none.astype(np.float32)
                for label, names in self.plan.extras.items()
                for name in names
            },
            **{path: np.zeros((0, *tail), np.float32) for path, tail in self.scored() if not self.owners},
        }
        for name, values in self.columns.items():
            joined = np.concatenate(values)
            real = joined.dtype.kind == "f" or name.startswith("extras/")
            columns[name] = joined.astype(np.float32) if real else joined
        found = [np.asarray(columns[f"explanations/{name}"]) for name in ("score", "probability")]
        columns["explanations/error"] = reasons(*found)
        for label in self.maps:
            columns[f"heatmaps/{label}"] = self._column(label)
        maps: dict[str, Attrs] = {f"heatmaps/{s.label}": attributes(self.plan, s) for s in self.plan.methods}
        return Part(columns, {**maps, **scored_attributes(self.plan, columns, truth=not self.truthless)})

    def scored(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The columns of metrics, and the shape of one row of each."""
        for tails in self.plan.scoring.tails.values():
            yield from tails.items()

    def _column(self, label: str) -> Column:
        shape = self.plan.shapes[label]
        dtype = np.dtype(self.plan.config.output.heatmap.dtype)
        if self.squeeze:
            return Encoded(tuple(chunk.result() for chunk in self.chunks[label]), shape, dtype)
        return np.concatenate([np.zeros((0, *shape), dtype), *self.maps[label]])


def reasons(score: Array, probability: Array) -> list[str]:
    """Why there is nothing to explain in a row: a number of it that is not finite; empty where both are."""
    return [
        "" if np.isfinite([a, b]).all() else f"not finite: the score is {a:g}, its probability {b:g}"
        for a, b in zip(score, probability, strict=True)
    ]


def attributes(plan: Plan, spec: MethodSpec) -> dict[str, str]:
    """What results.h5 says about a method's maps."""
    return {
        "method": spec.name,
        "params": json.dumps(spec.params, sort_keys=True),
        "layer": ",".join(plan.layers_of(spec)),
        "preset": spec.preset,
        "score": spec.scale,
        "source": type(spec.method).source,
    }


def scored_attributes(
    plan: Plan, columns: Container[str], *, images: bool = True, truth: bool = True
) -> dict[str, dict[str, str | int | float]]:
    """What results.h5 says about the columns of metrics, by their path.

    Args:
        images, truth: whether every image, and every ground truth, could be read; else the columns are not complete.
    """
    return {
        path: {
            **scoring.attributes(plan.config, metric),
            "complete": images and (truth or "truth" not in metric.metric.consumes),
        }
        for label, metric in plan.scoring.pairs
        for path in (f"metrics/{label}/{metric.label}", f"curves/{label}/{metric.label}")
        if path in columns
    }


class Pictures:
    """The PNGs of each result: overlays, heatmaps and panels, as the config asks for them; drawn by the writer."""

    def __init__(self, plan: Plan, root: Path, sources: Sequence[Source], writer: PictureWriter) -> None:
        self.plan, self.root, self.sources, self.writer = plan, root, sources, writer
        self.wanted = plan.config.output.png
        self.on_input = plan.config.output.overlay_on == "input"
        self.names = Namer(source.path for source in sources) if self.wanted else None
        self.table = colour_table(plan.config.output.colormap, "cpu")
        self.original = lru_cache(maxsize=4)(self._decoded)  # the methods of one image share its decoding

    def draw(self, result: Result) -> None:
        """Queue the pictures of one batch."""
        if self.names is None or result.pixels is None:
            return
        seen = to_images(result.pixels)
        overlays = {label: to_images(pixels) for label, pixels in result.overlays.items()}
        targets = result.columns["explanations/target"].tolist()
        for place, source in enumerate(result.images):
            rows = (result.image == place).nonzero()[:, 0].tolist()
            name = self.names[self.sources[source].path]
            for row in rows:
                suffix = self._suffix(targets[row]) if len(rows) > 1 else None
                self._singles(result, overlays, place, row, (name, suffix))
            if "panel" in self.wanted and rows:
                self._panel(result, overlays, seen[place], rows, name, self.sources[source].path)

    def _singles(
        self,
        result: Result,
        overlays: Overlays,
        place: int,
        row: int,
        named: tuple[str, str | None],
    ) -> None:
        for label in (spec.label for spec in self.plan.methods):
            if not result.has_map(label, row):
                self._no_picture(label, named)
                continue
            if "overlay" in self.wanted:
                path = picture_path(self.root, "overlay", label, *named)
                if self.on_input:
                    self.writer.write(path, overlays[label][row])
                else:
                    geometry, levels = result.geometry[place], result.levels[label][row]
                    draw = partial(self._on_original, result.images[place], levels, geometry)
                    self.writer.write(path, draw, geometry.original[0] * geometry.original[1])
            if "heatmap" in self.wanted:
                path = picture_path(self.root, "heatmap", label, *named)
                self.writer.write(path, heatmap_image(result.levels[label][row], self.table))

    def _no_picture(self, label: str, named: tuple[str, str | None]) -> None:
        """Remove what an earlier run may have left where there is nothing to show."""
        for kind in ("overlay", "heatmap"):
            self.writer.remove(picture_path(self.root, kind, label, *named))

    def _on_original(self, source: int, levels: Tensor, geometry: Geometry) -> Image.Image | None:
        try:
            original = self.original(source)
        except BadImage as error:  # it was readable a moment ago
            LOG.warning("%s: no overlay on the original: %s", self.sources[source].path, error)
            return None
        return overlay_original(
            original, levels.float() / 255, geometry, self.table, self.plan.config.output.alpha
        )

    def _decoded(self, source: int) -> Image.Image:
        images = self.plan.config.images
        found = self.sources[source]
        return read_image(
            found.file,
            max_pixels=images.max_pixels,
            background=images.background_rgb,
            listed=found.stamp,
        )

    def _panel(
        self,
        result: Result,
        overlays: Overlays,
        seen: Image.Image,
        rows: Sequence[int],
        name: str,
        title: str,
    ) -> None:
        labels = [spec.label for spec in self.plan.methods]
        entries = [
            PanelRow(
                self._category(int(result.columns["explanations/target"][row])),
                f"p={float(result.columns['explanations/probability'][row]):.2f}  "
                f"logit {float(result.columns['explanations/score'][row]):.1f}",
                [overlays[label][row] if result.has_map(label, row) else None for label in labels],
            )
            for row in rows
        ]
        cells = (len(labels) + 1) * len(rows) + 1
        self.writer.write(
            picture_path(self.root, "panel", "", name),
            partial(panel, seen, entries, labels, self.table, title),
            pixels=cells * (CELL + 40) ** 2,
        )

    def _category(self, target: int) -> str:
        names = self.plan.model.categories
        if target < 0:
            return "no class"
        return names[target] if target < len(names) else f"class {target}"

    def _suffix(self, target: int) -> str:
        names = self.plan.model.categories
        return f"{target}-{names[target]}" if 0 <= target < len(names) else str(target)
