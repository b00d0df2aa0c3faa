"""What ``xai check`` finds out before a long run: what will be done, what it costs, and the usual traps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from xcli import calibration
from xcli.choices import logit_count, noise
from xcli.config import Config
from xcli.images import BadImage, Source, read_image
from xcli.plan import Plan, dtype_of, explanations, prepared
from xcli.rectifiers import RECTIFIERS
from xcli.scoring import practised


@dataclass(frozen=True)
class MethodReport:
    """One method on the model: where it looks, the grid of its map, what one image takes."""

    label: str
    layer: str
    grid: tuple[int, ...]
    score: str
    cost: str
    seconds: float


@dataclass(frozen=True)
class MetricReport:
    """One metric: which way is better, and its cost for each method or baseline."""

    label: str
    direction: str
    cost: str


@dataclass(frozen=True)
class Report:
    """What a config would do."""

    model: str
    weights: str
    device: str
    images: int
    size: tuple[int, int]
    preprocess: dict[str, Any]
    classes: int
    batch_size: int
    part_length: int
    methods: tuple[MethodReport, ...]
    metrics: tuple[MetricReport, ...]
    baselines: tuple[str, ...]
    scoring_seconds: float
    seconds_per_image: float
    megabytes: float
    memory_megabytes: float | None
    traps: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The report for a reader."""
        how = ", ".join(
            f"{key} {value}" for key, value in self.preprocess.items() if value not in (None, False)
        )
        yield f"model      {self.model}, weights {self.weights}, on {self.device}, {self.classes} classes"
        yield f"input      {self.size[0]}x{self.size[1]}: {how}"
        yield f"images     {self.images}, in batches of {self.batch_size}, parts of {self.part_length}"
        for one in self.methods:
            at = f" at {one.layer}, map {'x'.join(map(str, one.grid))}" if one.layer else ""
            yield f"method     {one.label}: {one.score}{at}; {one.cost}; {one.seconds * 1000:.0f} ms alone"
        for metric in self.metrics:
            yield f"metric     {metric.label}: {metric.direction} is better; {metric.cost}"
        if self.metrics:
            beside = f" and {', '.join(self.baselines)}" if self.baselines else ""
            each = f"all methods{beside}"
            yield f"scoring    {each}: {self.scoring_seconds * 1000:.0f} ms an explanation"
        memory = f", {self.memory_megabytes:.0f} MB on the device" if self.memory_megabytes else ""
        yield (
            f"cost       about {self.seconds_per_image * 1000:.0f} ms an image one by one, "
            f"{duration(self.seconds_per_image * self.images)} for all at most; "
            f"{self.megabytes:.0f} MB of maps before compression{memory}"
        )
        for trap in self.traps:
            yield f"beware     {trap}"
        if not self.traps:
            yield "beware     nothing found"


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def checked_up(config: Config, sources: Sequence[Source]) -> Report:
    """Load the model and explain one picture, timing each method; writes nothing.

    Raises:
        XaiError: what would stop a run.
    """
    with prepared(config, sources, quick=True) as plan:
        x, readable = first_picture(plan, sources)
        timed = tuple(reports(plan, x))
        scoring = scoring_seconds(plan, x)
        memory = torch.cuda.max_memory_allocated(plan.device) / 1e6 if plan.device.type == "cuda" else None
        stored = sum(4 * int(torch.Size(shape).numel()) for shape in plan.shapes.values())
        return Report(
            model=f"{plan.model.source}:{plan.model.name}",
            weights=plan.model.weights,
            device=str(plan.device),
            images=len(sources),
            size=plan.size,
            preprocess=plan.preprocess.describe(),
            classes=logit_count(plan.model, x),
            batch_size=plan.batch_size,
            part_length=plan.part_length,
            methods=timed,
            metrics=tuple(
                MetricReport(spec.label, spec.metric.direction, spec.metric.cost)
                for spec in plan.scoring.metrics
            ),
            baselines=tuple(spec.label for spec in plan.scoring.baselines),
            scoring_seconds=scoring,
            seconds_per_image=sum(one.seconds for one in timed) + scoring * plan.most_rows,
            megabytes=stored * len(sources) * plan.most_rows / 1e6,
            memory_megabytes=memory,
            traps=tuple(traps(plan, x, readable)),
        )


def first_picture(plan: Plan, sources: Sequence[Source]) -> tuple[torch.Tensor, bool]:
    """The first readable image as model input (1, C, H, W), or noise; and whether it is an image."""
    options = plan.config.images
    for source in sources[:100]:
        try:
            image = read_image(source.file, max_pixels=options.max_pixels, background=options.background_rgb)
        except BadImage:
            continue
        pixels, _ = plan.preprocess.apply(image)
        return plan.to_input(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(plan.device)), True
    return noise(plan.preprocess, plan.size, plan.device, dtype_of(plan.config)), False


def reports(plan: Plan, x: torch.Tensor) -> Iterator[MethodReport]:
    """Each method run by itself on ``x``."""
    for spec in plan.methods:
        alone = replace(plan, methods=(spec,))
        began = time.perf_counter()
        ((_, found),) = explanations(alone, alone.practice(x), x)
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        seconds = time.perf_counter() - began
        layer = ", ".join(plan.layers_of(spec))
        grid = tuple(found.map.shape[-2:])
        yield MethodReport(spec.label, layer, grid, spec.scale, type(spec.method).cost, seconds)


def scoring_seconds(plan: Plan, x: torch.Tensor) -> float:
    """What all metrics take on one explanation by every method."""
    score = plan.practice(x)
    maps = {label: found.map.detach() for label, found in explanations(plan, score, x)}
    began = time.perf_counter()
    practised(plan, score, x, maps)
    if plan.device.type == "cuda":
        torch.cuda.synchronize(plan.device)
    return time.perf_counter() - began if plan.scoring.pairs else 0.0


def traps(plan: Plan, x: torch.Tensor, readable: bool) -> Iterator[str]:
    """What often goes wrong unnoticed."""
    count, names = logit_count(plan.model, x), len(plan.model.categories)
    if not readable:
        yield "no image could be read; the report is about a picture of noise"
    if plan.model.weights == "none":
        yield "the weights are random: maps of an untrained network mean nothing"
    if names and names != count:
        yield f"the model gives {count} logits but {names} class names are known: targets may be named wrongly"
    if plan.config.model.preprocess == "auto" and plan.model.source in ("factory", "exported"):
        yield "the preprocessing is a guess of the factory's; set model.preprocess to what the model was trained with"
    for spec in plan.config.methods:
        if calibration.open_steps(spec.method):
            count = len(calibration.candidates(plan.size))
            yield (
                f"{spec.label}: a run first finds its cut-off: {count} candidates, about "
                f"{calibration.PASSES} passes each, on every picture of its calibration folder (at most 128)"
            )
    for label, found in explanations(plan, plan.practice(x), x):
        grid = found.map.shape[-2:]
        if bool((found.map.flatten(1).amax(1) == found.map.flatten(1).amin(1)).all()):
            yield f"{label}: the map of the first image is flat; for a class that nothing speaks for that is right"
        elif min(grid) < 5:
            yield f"{label}: the map has only {grid[0]}x{grid[1]} cells; a larger input or an earlier layer gives more"
    seen = plan.layers.activations
    rest = sorted(name for name in seen if name not in RECTIFIERS)
    ruled = ", ".join(spec.label for spec in plan.methods if "rectifiers" in spec.method.needs)
    if rest and ruled:
        total, apart = sum(seen.values()), sum(seen[name] for name in rest)
        yield f"{ruled}: {total - apart} of {total} activations are ReLU; {', '.join(rest)} keep their gradient"
