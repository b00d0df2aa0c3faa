"""One batch: pixels in, the maps and pictures of every row out, copied to the host while the next batch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from xcli.errors import MemoryExhausted
from xcli.execution import numbers_of, out_of_memory
from xcli.images import Batch, Source
from xcli.methods.base import FAILED, FLAT, NOT_FINITE, OK, map_status, reduced, resized
from xcli.models import find_logits
from xcli.plan import Plan
from xcli.preprocess import Geometry
from xcli.render import colour_table, levels, normalise, overlay
from xcli.score import Score
from xcli.scoring import measured, only, truth_of
from xcli.targets import ClassRows, probabilities, resolve, tells


@dataclass
class Result:
    """What a batch of B images and N rows gave; its tensors are on the host once ``wait`` has returned.

    Attributes:
        images: index among the run's sources of each image that was read, (B,).
        failed: (source index, reason) of each that was not.
        image: (N,) place of each row's image in ``images``.
        columns: by dataset path below the root, such as ``explanations/target`` or ``status/gradcam``, (N,).
        maps: raw, by the method's label, (N, H, W) or (N, C, H, W).
        levels: uint8, (N, H, W), the maps as steps of a colour map; overlays: uint8, (N, 3, H, W); each by label,
            where the config asks for pictures made of them.
        pixels: what the model saw, uint8 (B, 3, H, W).
        unscored: (source index, reason) of each image whose ground truth could not be read.
    """

    images: list[int]
    failed: list[tuple[int, str]]
    geometry: list[Geometry]
    image: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, Tensor] = field(default_factory=dict)
    overlays: dict[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None
    unscored: list[tuple[int, str]] = field(default_factory=list)
    arrived: torch.cuda.Event | None = None

    def lose(self, place: int, reason: str) -> None:
        """Note that the image at ``place`` has no ground truth."""
        self.unscored.append((self.images[place], reason))

    def has_map(self, label: str, row: int) -> bool:
        """Whether the method ``label`` found something to show for a row, once its tensors have arrived."""
        return int(self.columns[f"status/{label}"][row]) in (OK, FLAT)

    def wait(self) -> Result:
        """Return once the copies from the device have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


def explained(plan: Plan, batch: Batch, sources: Sequence[Source]) -> Iterator[Result]:
    """Every method on every row of a batch."""
    return in_halves(
        plan, labelled(plan, batch, sources), lambda part: sent(plan, together(plan, part, sources))
    )


def in_halves(plan: Plan, batch: Batch, work: Callable[[Batch], Result]) -> Iterator[Result]:
    """``work`` on a batch. Where memory does not suffice even for one input at once, the batch is taken in halves, down
    to single images, so that only those that really do not fit fail."""
    reason = ""
    if batch.rows:
        try:
            yield work(batch)
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = f"out of memory{numbers_of(error)}"
        except MemoryExhausted as error:
            reason = str(error)
    if len(batch.rows) <= 1:
        failed = [*batch.failed, *((row, reason) for row in batch.rows)]
        yield Result([], failed, [], torch.zeros(0, dtype=torch.long))
        return
    middle = len(batch.rows) // 2
    plan.execution.cut(len(batch.rows), middle)
    for part, failed in ((slice(0, middle), batch.failed), (slice(middle, None), [])):
        half = Batch(batch.rows[part], batch.pixels[part], batch.geometry[part], failed)
        yield from in_halves(plan, half, work)


def labelled(plan: Plan, batch: Batch, sources: Sequence[Source]) -> Batch:
    """The batch, without the images that would get no row for want of a label; these failed."""
    if set(plan.config.target) != {"label"}:
        return batch
    lost = [row for row in batch.rows if plan.label(sources[row]) < 0]
    reasons = [
        f"label {sources[row].label!r} is no class of the model" if sources[row].label else "no label"
        for row in lost
    ]
    return batch.without(list(zip(lost, reasons, strict=True)))


def together(plan: Plan, batch: Batch, sources: Sequence[Source]) -> Result:
    """One forward pass for the targets and all CAMs, then each method on the rows that are selected."""
    pixels = batch.pixels.to(plan.device, non_blocking=True)
    x = plan.to_input(pixels)
    forward = plan.forward(x)
    logits = torch.cat([find_logits(outputs, plan.model.output).detach() for outputs in forward.outputs])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = torch.tensor([plan.label(sources[row]) for row in batch.rows])
    rows = selected(resolve(plan.targets, logits, labels, plan.model.output), plan, logits, labels)
    result = Result(list(batch.rows), batch.failed, batch.geometry, rows.image)
    own = logits[rows.image.to(logits.device)]
    index = rows.decided().target[:, None]
    logit, probability = (found.gather(1, index)[:, 0] for found in (own, probabilities(own)))
    logit = torch.where(rows.target < 0, own.amax(1), logit)
    whole = logit.isfinite() & probability.isfinite()
    result.columns = {
        **{f"explanations/{name}": values for name, values in rows.columns().items()},
        "explanations/score": logit,
        "explanations/probability": probability,
        "explanations/status": torch.where(whole, OK, NOT_FINITE).to(torch.uint8),
    }
    if len(rows.image):
        score = plan.score(forward, rows.decided(), [sources[row].path for row in batch.rows])
        add_maps(plan, result, score, x, whole)
        add_pictures(plan, result, pixels)
        if plan.scoring.pairs:
            forward.settle()  # the graph has done its work
            seen = [sources[row] for row in batch.rows]
            truth = truth_of(plan, score, seen, batch.geometry, result.lose)
            result.columns |= measured(plan, score, x, result.maps, truth, whole)
    return result


def selected(rows: ClassRows, plan: Plan, logits: Tensor, labels: Tensor) -> ClassRows:
    """The rows of those images that ``images.only`` asks for."""
    wanted = plan.config.images.only
    if wanted == "all":
        return rows
    best = logits.argmax(1).cpu()
    if wanted == "correct":
        keep = (best == labels) & (labels >= 0)
    elif wanted == "wrong":
        keep = (best != labels) & (labels >= 0)
    else:
        keep = probabilities(logits).amax(1).cpu() < wanted.probability_below
    keep |= ~tells(logits).cpu()  # it is neither right nor wrong nor sure, and shall be seen
    mine = keep[rows.image]
    return ClassRows(rows.image[mine], rows.target[mine.to(rows.target.device)], rows.output)


def add_maps(plan: Plan, result: Result, score: Score, x: Tensor, whole: Tensor) -> None:
    """Run the methods, those that use the graph of the first pass first; of one unit they share their passes.

    Args:
        whole: (N,), whether the row's number is finite; else there is nothing to explain, and its maps are NaN.
    """
    stored = None if plan.config.output.heatmap.size == "native" else plan.size
    dtype = torch.float16 if plan.config.output.heatmap.dtype == "float16" else torch.float32
    graphs = [spec for spec in plan.methods if plan.uses_graph(spec)]
    for spec in (*graphs, *(one for one in plan.methods if one not in graphs)):
        if spec not in graphs and score.forward is not None:
            score.forward.settle()  # its graph is as large as that of any pass to come
        try:
            found = spec.method.explain(score.scaled(spec.scale), x, stored)
            maps = only(whole, found.map.detach()).to(dtype)
            status, extras = map_status(maps), found.extras
        except LinAlgError:  # a decomposition that did not converge: the rows of this method failed
            maps = x.new_full((len(score.image), *plan.shapes[spec.label]), torch.nan, dtype=dtype)
            status = torch.full((len(score.image),), FAILED, dtype=torch.uint8)
            extras = {name: x.new_full((len(score.image),), torch.nan) for name in plan.extras[spec.label]}
        result.maps[spec.label] = maps
        result.columns[f"status/{spec.label}"] = status
        for name, values in extras.items():
            result.columns[f"extras/{spec.label}/{name}"] = only(whole, values.detach())
    result.maps = {spec.label: result.maps[spec.label] for spec in plan.methods}


def add_pictures(plan: Plan, result: Result, pixels: Tensor) -> None:
    """The uint8 tensors that the pictures of the config are made of."""
    output = plan.config.output
    if not output.png:
        return
    table = colour_table(output.colormap, plan.device)
    blended = "panel" in output.png or ("overlay" in output.png and output.overlay_on == "input")
    stepped = "heatmap" in output.png or ("overlay" in output.png and output.overlay_on == "original")
    for spec in plan.methods:
        flat = resized(reduced(result.maps[spec.label].float(), "sum"), plan.size, spec.method.upsampling)
        scaled = normalise(flat)  # (N, H, W) in [0, 1]
        if blended:
            seen = pixels[result.image.to(pixels.device)]
            result.overlays[spec.label] = overlay(seen, scaled, table, output.alpha)
        if stepped:
            result.levels[spec.label] = levels(scaled)
    result.pixels = pixels


def sent(plan: Plan, result: Result) -> Result:
    """Start copying every tensor to the host, without waiting."""
    for group in (result.maps, result.columns, result.levels, result.overlays):
        group.update({name: on_host(tensor.detach()) for name, tensor in group.items()})
    result.pixels = None if result.pixels is None else on_host(result.pixels)
    if plan.device.type == "cuda":
        result.arrived = torch.cuda.Event()
        result.arrived.record()
    return result


def on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory that arrives later, or the tensor itself on a CPU."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    landing = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return landing.copy_(tensor, non_blocking=True)
