"""Everything a run has to know before its first image: what is `auto` in the config is decided here, once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from xcli import calibration, references, tuning
from xcli.choices import (
    chosen_device,
    class_labels,
    input_size,
    logit_count,
    noise,
    refuse_underflow,
    wants_channels_last,
)
from xcli.config import Config, resolve_targets
from xcli.entries import MethodSpec
from xcli.errors import ModelError
from xcli.execution import Execution, fitting
from xcli.forward import Forward
from xcli.hooks import frozen
from xcli.images import Source
from xcli.layers import Layers, survey
from xcli.methods.base import Attribution, resized
from xcli.models import Model, find_logits, load_model
from xcli.preprocess import Preprocess
from xcli.score import Score
from xcli.scoring import Pair, Scoring, all_pairs, practised, scoring_of
from xcli.targets import ClassRows, Predicted, Target, resolve
from xcli.weights import weights_hash

PART_SECONDS = 60.0
PART_BYTES = 256 << 20
PART_IMAGES = 256
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Plan:
    """A model on its device, ready to explain, and every choice that is fixed for the run.

    Attributes:
        preprocess: gives ``size`` (H, W) for every image.
        methods: as configured, their layers by name.
        scoring: which metrics on which of them.
        classes: class index of each label's text.
        batch_size: images in a batch; a part holds whole batches, so a batch is the same in every run.
        shapes: of one stored map, by the method's label; extras: names of what it adds for each row.
        idle: labels of methods whose maps are there and that no metric makes new ones with.
        pictures: what methods compare with, by the name that their options have for it; digests: SHA-256 of each.
        seconds: what one image took when the plan was made, all methods together.
    """

    config: Config
    model: Model
    device: torch.device
    preprocess: Preprocess
    size: tuple[int, int]
    targets: tuple[Target, ...]
    classes: Mapping[str, int]
    methods: tuple[MethodSpec, ...]
    layers: Layers
    execution: Execution
    channels_last: bool
    weights_sha256: str
    scoring: Scoring = field(default_factory=Scoring)
    folds: int = 0
    batch_size: int = 1
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    pictures: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    digests: Mapping[str, str] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()

    @property
    def at(self) -> tuple[str, ...]:
        """The layers that any of the methods looks at."""
        return tuple(dict.fromkeys(name for spec in self.methods for name in self.layers_of(spec)))

    @property
    def part_length(self) -> int:
        """Images a part: about a minute's work and at most 256 MB of maps, in whole batches."""
        maps = sum(4 * int(torch.Size(shape).numel()) for shape in self.shapes.values())
        most = min(
            PART_IMAGES, PART_BYTES / (maps * self.most_rows + 1), PART_SECONDS / max(self.seconds, 1e-6)
        )
        return max(1, int(most) // self.batch_size) * self.batch_size

    def label(self, source: Source) -> int:
        """Class index of an image's label, -1 where it has none."""
        return self.classes.get(source.label or "", -1)

    @property
    def most_rows(self) -> int:
        """Most targets that one image can have."""
        return sum(target.most for target in self.targets)

    def layers_of(self, spec: MethodSpec) -> tuple[str, ...]:
        """Names of the layers that a method looks at."""
        return tuple(layer.name for layer in spec.method.looks_at(self.layers))

    def uses_graph(self, spec: MethodSpec) -> bool:
        """Whether a method differentiates the pass that serves the targets."""
        needs = spec.method.needs
        return "gradients" in needs and ("pixels" in needs or bool(spec.method.looks_at(self.layers)))

    def resolved(self) -> dict[str, Any]:
        """What was decided, as JSON: kept in the record, given back to ``prepared`` when the run goes on."""
        return {
            "size": list(self.size),
            "batch_size": self.batch_size,
            "layers": {spec.label: list(self.layers_of(spec)) for spec in self.methods},
            "shapes": {label: list(shape) for label, shape in self.shapes.items()},
            "folded": self.folds,
            "channels_last": self.channels_last,
            "preprocess": self.preprocess.describe(),
            "pictures": dict(self.digests),
            "steps": {spec.label: list(spec.method.post_process) for spec in self.methods},
        }

    def to_input(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) on the device -> normalised model input, in the layout the model likes."""
        x = self.preprocess.normalise(pixels, dtype_of(self.config))
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def on_device(self, pixels: Tensor) -> Tensor:
        """``to_input`` of pixels that are on the host."""
        return self.to_input(pixels.to(self.device))

    def forward(self, x: Tensor) -> Forward:
        """The one pass over a batch that serves the targets, every CAM and every gradient at the images."""
        wanted = [spec.method for spec in self.methods if "gradients" in spec.method.needs]
        leaves = {layer.name for method in wanted for layer in method.looks_at(self.layers)}
        pixels = any("pixels" in method.needs for method in wanted)
        return Forward(self.model.module, x, self.at, self.execution, leaves=leaves, pixels=pixels)

    def score(self, forward: Forward, rows: ClassRows, keys: Sequence[str]) -> Score:
        """The rows of a batch, bound to the model."""
        seed = self.config.runtime.seed
        return Score(
            self.model.module,
            rows,
            self.layers,
            self.execution,
            seed,
            keys,
            forward,
            pictures=self.pictures,
            span=self.preprocess.span(self.device, dtype_of(self.config)),
        )

    def practice(self, x: Tensor) -> Score:
        """The score of the predicted classes of ``x``, with the pass that has run."""
        forward = self.forward(x)
        logits = torch.cat([find_logits(found, self.model.output).detach() for found in forward.outputs])
        rows = resolve([Predicted()], logits, torch.full((len(x),), -1), self.model.output)
        return self.score(forward, rows.decided(), [f"probe {place}" for place in range(len(x))])


@contextmanager
def prepared(
    config: Config,
    sources: Sequence[Source],
    known: Mapping[str, Any] | None = None,
    pairs: Sequence[Pair] | None = None,
    *,
    quick: bool = False,
) -> Iterator[Plan]:
    """Load the model, decide what is `auto`, try every method and metric on one image; the model is put back at the
    end.

    Args:
        sources: the images of the run.
        known: ``Plan.resolved`` of the run that goes on; its choices are taken again.
        pairs: of maps that are there, which metric scores which method; ``None``: all of the config, each by each.
        quick: for a trial: take some cut-off where one is to be found, see ``calibration``.

    Raises:
        ConfigError, ModelError, InputError: what the user has to change before anything can run.
    """
    known = known or {}
    refuse_underflow(config)
    if pairs is None:
        references.refuse_missing(config, begun=bool(known))
    with loaded(config) as (model, digest, device), ExitStack() as undo:
        with fitting(model.name):
            size = tuple(known["size"]) if known else input_size(config, model.preprocess, sources)
            preprocess = model.preprocess.with_size(size)
            x = noise(preprocess, size, device, dtype_of(config))
            count = logit_count(model, x)
            if config.model.categories != "auto" and len(model.categories) != count:
                text = f"the model gives {count} logits, but {len(model.categories)} names are listed"
                raise config.error(("model", "categories"), text)
            last = known["channels_last"] if known else wants_channels_last(config, model, x)
            if last:
                undo.enter_context(tuning.channels_last(model.module))
                x = x.contiguous(memory_format=torch.channels_last)
            layers = survey(model.module, x, model.output)
            names = known.get("layers", {})
            methods = tuple(pinned(config, index, layers, names) for index in range(len(config.methods)))
            plan = Plan(
                config=config,
                model=model,
                device=device,
                preprocess=preprocess,
                size=size,
                targets=resolve_targets(config, model.categories, count),
                classes=class_labels(config, sources, model.categories, count),
                methods=methods,
                layers=layers,
                execution=Execution(1, AUTOCAST.get(config.runtime.precision)),
                channels_last=last,
                weights_sha256=digest,
                scoring=scoring_of(
                    config, all_pairs(config) if pairs is None else pairs, sources, model.categories, x
                ),
            )
            whole = [
                *(spec.method.needs for spec in methods),
                *(m.metric.needs for m in plan.scoring.metrics),
            ]
            if config.runtime.fold and not any("structure" in needs for needs in whole):
                plan = replace(plan, folds=undo.enter_context(tuning.folded(model.module, x, plan.at)))
            if pairs is not None:  # maps are there to be scored
                busy = {label for label, metric in pairs if "method" in metric.metric.consumes}
                plan = replace(plan, idle=frozenset(spec.label for spec in methods if spec.label not in busy))
            plan = references.with_pictures(plan, known)
            plan = tried(calibration.with_cutoffs(plan, known, quick=quick), x, known)
        yield plan


@contextmanager
def loaded(config: Config) -> Iterator[tuple[Model, str, torch.device]]:
    """The model, frozen on its device with arithmetic in full precision; its weights' hash; the device."""
    device, spec = chosen_device(config.runtime.device), config.model_spec()
    with ExitStack() as undo:
        with fitting(spec.name):
            model = load_model(spec, device)
            digest = weights_hash(model.module)
            model.module.to(dtype_of(config))
        if device.type == "cuda":
            undo.enter_context(torch.cuda.device(device))
        undo.enter_context(tuning.exact())
        undo.enter_context(frozen(model.module))
        yield model, digest, device


def dtype_of(config: Config) -> torch.dtype:
    """Of weights and images; bfloat16 and float16 are autocast over float32."""
    return torch.float64 if config.runtime.precision == "float64" else torch.float32


def pinned(config: Config, index: int, layers: Layers, known: Mapping[str, Sequence[str]]) -> MethodSpec:
    """One of the methods with its layers by name; a missing layer, or one without a map, is refused here."""
    spec = config.methods[index]
    try:
        return replace(spec, method=spec.method.pinned(layers, known.get(spec.label, ())))
    except ModelError as error:
        where = ("methods", index, "layer") if "layer" in spec.method.needs else ("methods", index)
        raise config.error(where, str(error)) from None


def tried(plan: Plan, x: Tensor, known: Mapping[str, Any]) -> Plan:
    """The plan after every method has run on one picture: what it stores, time, and the size of a batch."""
    began = time.perf_counter()
    cuda = plan.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    used = torch.cuda.memory_allocated(plan.device) if cuda else 0
    native = plan.config.output.heatmap.size == "native"
    score = plan.practice(x)
    shapes, extras, maps = {}, {}, {}
    for spec in (spec for spec in plan.methods if spec.label in plan.idle):
        maps[spec.label] = noise(plan.preprocess, plan.size, plan.device, dtype_of(plan.config))[:, 0]
    for label, found in explanations(plan, score, x):
        stored = found.map if native else resized(found.map, plan.size, "nearest")
        shapes[label] = tuple(stored.shape[1:])
        extras[label] = tuple(found.extras)
        maps[label] = found.map.detach()
    scoring = practised(plan, score, x, maps)
    seconds = time.perf_counter() - began
    plan = replace(plan, shapes=shapes, extras=extras, scoring=scoring, seconds=seconds)
    if known:
        batch = int(known["batch_size"])
        plan = replace(plan, shapes={label: tuple(shape) for label, shape in known["shapes"].items()})
    else:
        chosen = plan.config.runtime.batch_size
        batch = fitting_batch(plan, used, len(x)) if chosen == "auto" else chosen
    return replace(plan, batch_size=batch, execution=Execution(batch, plan.execution.precision))


def explanations(plan: Plan, score: Score, x: Tensor) -> Iterator[tuple[str, Attribution]]:
    """The raw maps of ``x`` by each method that is not idle."""
    for spec in (spec for spec in plan.methods if spec.label not in plan.idle):
        with fitting(f"{spec.label} on one image of {x.shape[-2]}x{x.shape[-1]}"):
            found = spec.method.explain(score.scaled(spec.scale), x)
        yield spec.label, found


def fitting_batch(plan: Plan, used: int, images: int) -> int:
    """A power of two: on a GPU, what fits half of the free memory (at most 128); on a CPU, 16 at 224 x 224 pixels
    and more for smaller pictures, since a batch that leaves the caches is no faster."""
    if plan.device.type == "cuda":
        each = max(1, (torch.cuda.max_memory_allocated(plan.device) - used) // images)
        most = min(128, torch.cuda.mem_get_info(plan.device)[0] // 2 // each)
    else:
        most = min(32, max(1, 16 * 224 * 224 // (plan.size[0] * plan.size[1])))
    most = int(most) * 8 // max(8, plan.most_rows)  # gradients exist for every row of a batch
    rows = PART_BYTES // (
        4 * max(1, sum(int(torch.Size(s).numel()) for s in plan.shapes.values())) * plan.most_rows
    )
    return 1 << max(0, min(int(most), max(1, rows)).bit_length() - 1)


def surveyed(config: Config) -> Layers:
    """The layers of a config's model, at its input size (224 x 224 where that is the images' own)."""
    with loaded(config) as (model, _, device), fitting(config.model_spec().name):
        size = config.images.size or model.preprocess.size or (224, 224)
        x = noise(model.preprocess.with_size(size), size, device, dtype_of(config))
        logit_count(model, x)
        return survey(model.module, x, model.output)
