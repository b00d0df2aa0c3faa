"""Scoring the maps of a batch: every metric on every method and baseline, on the device."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from xcli.annotations import Annotations, TruthSpec, truth
from xcli.config import Config
from xcli.entries import MethodSpec, MetricSpec
from xcli.errors import InputError, MemoryExhausted
from xcli.execution import out_of_memory
from xcli.images import Source
from xcli.methods.base import reduced, resized
from xcli.methods.baselines import BASELINES
from xcli.metrics.base import Measured, Truth
from xcli.models import load_model
from xcli.preprocess import Geometry
from xcli.registry import build
from xcli.score import Score

if TYPE_CHECKING:
    from xcli.plan import Plan

LOG = logging.getLogger(__name__)
Pair = tuple[str, MetricSpec]


@dataclass(frozen=True)
class Scoring:
    """What is scored in a run.

    Attributes:
        pairs: (label of a method or baseline, metric), label by label.
        baselines: those among the labels, built.
        annotations: where the objects are, if a metric asks for it.
        models: further checkpoints of the network, if a metric asks for them.
        tails: shape of one row of each column by its path in results.h5, for each "label/metric", as the probe of the
            plan found it.
    """

    pairs: tuple[Pair, ...] = ()
    baselines: tuple[MethodSpec, ...] = ()
    annotations: Annotations | None = None
    models: tuple[nn.Module, ...] = ()
    tails: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[MetricSpec, ...]:
        """Every metric once."""
        return tuple({spec.label: spec for _, spec in self.pairs}.values())

    def consumes(self, what: str) -> bool:
        """Whether any of the metrics does."""
        return any(what in spec.metric.consumes for spec in self.metrics)

    def specs(self, methods: Sequence[MethodSpec]) -> Iterator[tuple[MethodSpec, list[MetricSpec]]]:
        """Each method or baseline that is scored, with its metrics."""
        for spec in (*methods, *self.baselines):
            own = [metric for label, metric in self.pairs if label == spec.label]
            if own:
                yield spec, own


def baseline_specs(config: Config) -> tuple[MethodSpec, ...]:
    """The baselines to score beside the methods: those that no method of the config is called like."""
    if not config.baselines:
        return ()
    taken = {spec.label.casefold() for spec in config.methods}
    names = [name for name in BASELINES if name not in taken]
    return tuple(MethodSpec(name, name, "paper", "auto", build(name)) for name in names)


def all_pairs(config: Config) -> tuple[Pair, ...]:
    """Every method and baseline of the config with every metric."""
    labels = [spec.label for spec in (*config.methods, *baseline_specs(config))]
    return tuple((label, metric) for label in labels for metric in config.metrics)


def truth_spec(config: Config) -> TruthSpec | None:
    """The config's ground truth as ``xcli.annotations`` wants it."""
    section = config.images.truth_section
    if section is None:
        return None
    return TruthSpec(section.path, section.format, section.values, section.difficult)


def scoring_of(
    config: Config,
    pairs: Sequence[Pair],
    sources: Sequence[Source],
    categories: Sequence[str],
    like: Tensor,
) -> Scoring:
    """What ``pairs`` need, loaded: ground truth and further checkpoints, on the device and in the type of ``like``.

    Raises:
        ConfigError, ModelError: the annotations or a checkpoint cannot be used.
    """
    labels = {label for label, _ in pairs}
    baselines = tuple(spec for spec in baseline_specs(config) if spec.label in labels)
    found = Scoring(tuple(pairs), baselines)
    spec = truth_spec(config) if found.consumes("truth") else None
    annotations = None if spec is None else Annotations.open(spec, sources, categories)
    files = getattr(config.model, "checkpoints", ()) if found.consumes("models") else ()
    models = tuple(
        load_model(config.model_spec(file), like.device).module.to(like.dtype).requires_grad_(False)
        for file in files
    )
    return Scoring(found.pairs, baselines, annotations, models)


def identity(config: Config, spec: MetricSpec) -> str:
    """What a metric's numbers depend on beside the maps, as a hash: its options, the files that these name, the ground
    truth, checkpoints."""
    told: dict[str, Any] = {"name": spec.name, "params": json.loads(json.dumps(spec.params))}
    named = [value for value in spec.params.values() if isinstance(value, str) and Path(value).suffix]
    if files := [content(name) for name in named if Path(name).is_file()]:
        told["files"] = files
    if "truth" in spec.metric.consumes and (section := config.images.truth_section) is not None:
        how = section.model_dump(mode="json", exclude={"path"})
        told["truth"] = [how, content(section.path)]
    if "models" in spec.metric.consumes:
        told["models"] = [content(file) for file in getattr(config.model, "checkpoints", ())]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def surroundings(config: Config, spec: MetricSpec) -> dict[str, str]:
    """Keys of the config that a metric depends on beside its own options, as JSON by their path."""
    found = {}
    if "truth" in spec.metric.consumes and config.images.truth_section is not None:
        found["images.truth"] = config.images.truth_section.model_dump_json()
    if "models" in spec.metric.consumes:
        found["model.checkpoints"] = json.dumps(getattr(config.model, "checkpoints", ()))
    return found


def content(path: str) -> str:
    """A hash of the file or of all files below the folder ``path``, by name and content; of none, where it is not."""
    root = Path(path)
    files = sorted(found for found in root.rglob("*") if found.is_file()) if root.is_dir() else [root]
    told = [(str(file.relative_to(root)), file.stat()) for file in files if file.is_file()]
    return _hashed(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in told))


@lru_cache(maxsize=64)
def _hashed(path: str, files: tuple[tuple[str, int, int], ...]) -> str:
    """Read again only where a size or a time has changed."""
    found = hashlib.sha256()
    for name, _, _ in files:
        found.update(name.encode("utf-8", "surrogateescape"))
        with (Path(path) / name).open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def attributes(config: Config, spec: MetricSpec) -> dict[str, str]:
    """What results.h5 says about a metric's columns."""
    return {
        "metric": spec.name,
        "params": json.dumps(spec.params, sort_keys=True),
        "preset": spec.preset,
        "direction": spec.metric.direction,
        "bounds": json.dumps(spec.metric.bounds),
        "source": spec.metric.source,
        "identity": identity(config, spec),
        **surroundings(config, spec),
    }


def truth_of(
    plan: Plan,
    score: Score,
    sources: Sequence[Source],
    geometry: Sequence[Geometry],
    lost: Callable[[int, str], None],
) -> Truth | None:
    """Where the explained objects of a batch are, if a metric asks for it; not known where that cannot be read.

    Args:
        lost: told the place in the batch of an image whose annotation cannot be read, and why.
    """
    annotations = plan.scoring.annotations
    if annotations is None:
        return None

    def report(index: int, error: InputError) -> None:
        lost(index, f"its ground truth cannot be read: {error}")

    target = score.rows.columns()["target"]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return truth(
            annotations,
            sources,
            geometry,
            score.image,
            target,
            plan.size,
            plan.device,
            pool=pool,
            on_error=report,
        )


def measured(
    plan: Plan, score: Score, x: Tensor, maps: Mapping[str, Tensor], truth: Truth | None, whole: Tensor
) -> dict[str, Tensor]:
    """The columns below ``metrics/`` and ``curves/`` of a batch.

    Args:
        score: N rows over the batch's images, in any unit.
        x: (B, C, H, W), as the network sees it.
        maps: of each method, (N, H, W) or (N, C, H, W), at any size; a baseline's are made here.
        whole: (N,), whether the number that a row explains is finite; else nothing of it is measured.
    """
    models = tuple(score.using(module) for module in plan.scoring.models)
    shared = {"x": x, "score": score, "module": plan.model.module, "models": models, "truth": truth}
    columns: dict[str, Tensor] = {}
    with torch.no_grad():
        for spec, metrics in plan.scoring.specs(plan.methods):
            explain = partial(explained_by, spec, plan.size)
            map = maps[spec.label] if spec.label in maps else explain(score, x)
            map = flattened(spec, map, plan.size).to(x)
            finite = map.isfinite().flatten(1).all(1) & whole.to(map.device)
            offers = {**shared, "map": torch.where(finite[:, None, None], map, 0.0), "method": explain}
            for metric in metrics:
                found = scored(metric, offers)
                columns |= named(plan, spec.label, metric.label, found, finite)
            score.forget(offers["map"])
    return columns


def explained_by(spec: MethodSpec, size: tuple[int, int], score: Score, x: Tensor) -> Tensor:
    """The maps (N, H, W) of a method, in the unit that it explains."""
    return flattened(spec, spec.method.explain(score.scaled(spec.scale), x, size).map.detach(), size)


def flattened(spec: MethodSpec, map: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps as metrics see them: one number a pixel of the input, (N, H, W)."""
    return resized(reduced(map, "sum"), size, spec.method.upsampling)


def scored(spec: MetricSpec, offers: Mapping[str, Any]) -> Measured | None:
    """The metric with what it consumes, and nothing else; ``None`` where a decomposition did not converge, or a single
    image is too large for it: its maps are kept all the same."""
    try:
        return spec.metric.measure(**{name: offers[name] for name in spec.metric.consumes})
    except LinAlgError:
        return None
    except (MemoryExhausted, RuntimeError) as error:
        exhausted = isinstance(error, MemoryExhausted) or out_of_memory(error)
        if not exhausted or len(offers["x"]) > 1:
            raise
        LOG.warning("out of memory: no %s for an image", spec.label)
        return None


def named(plan: Plan, label: str, metric: str, found: Measured | None, finite: Tensor) -> dict[str, Tensor]:
    """A metric's columns by their path, NaN for maps that are not finite."""
    prefix = f"{label}/{metric}"
    if found is None:
        return {
            path: finite.new_full((len(finite), *tail), torch.nan, dtype=torch.float32)
            for path, tail in plan.scoring.tails[prefix].items()
        }
    rows = {f"metrics/{prefix}.{name}": values for name, values in found.extras.items()}
    if found.values is not None:
        rows[f"metrics/{prefix}"] = found.values
    if found.curve is not None:
        rows[f"curves/{prefix}"] = found.curve
    columns = {path: only(finite, values) for path, values in rows.items()}
    if found.curve is not None and found.fraction is not None:
        columns[f"curves/{prefix}.fraction"] = found.fraction.float()
    return columns


def only(finite: Tensor, values: Tensor) -> Tensor:
    """Values (N, ...), NaN where ``finite`` (N,) does not hold."""
    mask = finite.reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(mask, values.to(finite.device).float(), torch.nan)


def practised(plan: Plan, score: Score, x: Tensor, maps: Mapping[str, Tensor]) -> Scoring:
    """The plan's scoring after every metric has run on a picture of noise: the shapes of its columns.

    The ground truth is made up: the middle of the picture.
    """
    top, left = (max(1, side // 4) for side in plan.size)
    mask = torch.zeros(len(score.image), *plan.size, dtype=torch.bool, device=x.device)
    mask[:, top : plan.size[0] - top, left : plan.size[1] - left] = True
    known = torch.ones(len(mask), dtype=torch.bool, device=x.device)
    truth = Truth(mask, known, torch.ones(len(mask), 2).to(x))
    found = measured(plan, score, x, maps, truth, whole=known)
    tails: dict[str, dict[str, tuple[int, ...]]] = {}
    for label, metric in plan.scoring.pairs:
        prefix = f"{label}/{metric.label}"
        tails[prefix] = {
            path: tuple(values.shape[1:])
            for path, values in found.items()
            if f"{path.partition('/')[2]}.".startswith(f"{prefix}.") and not path.endswith(".fraction")
        }
    return replace(plan.scoring, tails=tails)
