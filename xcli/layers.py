"""Layers of a network: what each module yields, the default layer, layers by name.

``survey`` runs one forward and one backward pass and needs no table of architectures. What it records of every
module call: the shape of its output, the ``Grid`` by which that output is a map of the picture, and the share of
cells whose value can still change what the network answers.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import takewhile

import torch
from torch import Tensor, nn

from xcli.attention import Attended
from xcli.errors import ModelError
from xcli.grids import Grid as Grid
from xcli.hooks import frozen, unfused
from xcli.operations import Census, Operation
from xcli.rectifiers import Activations
from xcli.trace import Attention, Call, Heeded, Trace

_NEAREST = 5
_ALIVE = 0.5


@dataclass(frozen=True)
class Layer:
    """A module by name, the shape of its output for one picture, and its grid where it has one."""

    name: str
    grid: Grid | None
    shape: tuple[int, ...]

    def require_map(self) -> Grid:
        """The grid.

        Raises:
            ModelError: the layer has none.
        """
        if self.grid is None:
            raise ModelError(
                f"layer {self.name!r} has no spatial map: its output has shape {self.shape}; "
                "`xai layers CONFIG` shows the layers that have one"
            )
        return self.grid

    def maps(self, t: Tensor) -> Tensor:
        """Raw output (N, *shape) to maps (N, K, h, w).

        Raises:
            ModelError: the layer has no grid, or ``t`` is not on it.
        """
        return self.require_map().maps(t)


@dataclass(frozen=True)
class Row:
    """What the survey saw of one module; ``shape`` and ``grid`` are those of its last call.

    ``fit``: it meets every condition of the default layer but for being the last.
    """

    name: str
    kind: str
    calls: int
    shape: tuple[int, ...] | None
    grid: Grid | None
    default: bool = False
    fit: bool = False

    @property
    def cells(self) -> int:
        """Cells of its map; 0 where it has none."""
        return self.grid.h * self.grid.w if self.grid else 0

    @property
    def depth(self) -> int:
        """How many modules enclose it, the network itself not counted."""
        return self.name.count(".")


@dataclass(frozen=True)
class Layers:
    """The modules of one network as one forward pass used them.

    ``rows`` are in the order of definition, parents before children; ``order`` holds the names of those that ran,
    in the order in which their (last) call ended; ``aliases`` maps other names of a shared module to its first;
    ``tails`` is what running the network from a layer on has taught (``prefix.Prefix``), by the layer's name;
    ``activations`` says how often each kind of activation ran, as module or function (``rectifiers.Activations``), and
    ``operations`` how often each operation that the picture goes through did, in the order of their first calls;
    ``attention`` are the places where tokens attend to each other, as they ran.
    """

    rows: tuple[Row, ...]
    order: tuple[str, ...]
    aliases: dict[str, str]
    tails: dict[str, tuple[bool, ...]] = field(default_factory=dict, compare=False, repr=False)
    activations: Mapping[str, int] = field(default_factory=dict)
    operations: Mapping[Operation, int] = field(default_factory=dict, repr=False)
    attention: tuple[Attention, ...] = ()

    @property
    def default(self) -> Layer:
        """The last layer before the head with a map in which at least half of the cells matter to the answer.

        Raises:
            ModelError: there is none.
        """
        for row in self.rows:
            if row.default:
                return self._layer(row)
        raise ModelError(
            "no layer before the head has a spatial map that the answer depends on; "
            "name one with `layer:` (`xai layers CONFIG` lists them)"
        )

    def find(self, spec: str | Sequence[str]) -> tuple[Layer, ...]:
        """Layers by name, each once: "auto", a name, a wildcard (those with a map, as they ran), or a list of these.

        "auto:3" gives up to three layers, the default one last and before it what stands for it on finer grids, each of
        at least twice as many cells: the last layer before the network goes on to a coarser one. Where the grid stays
        the same, as in a vision transformer, it gives the layers of the same name but for the first number in it:
        those of the last three blocks.

        Raises:
            ModelError: a name is unknown, ran not at all or several times, or a wildcard finds no layer with a map.
        """
        names = [spec] if isinstance(spec, str) else list(spec)
        if not names:
            raise ModelError("no layer is named; `layer: auto` takes the default one")
        found = {layer.name: layer for name in names for layer in self._matching(name)}
        return tuple(found.values())

    def _matching(self, name: str) -> Iterator[Layer]:
        if name == "auto":
            yield self.default
        elif several := re.fullmatch(r"auto:([1-9]\d*)", name):
            yield from self._ending_in_default(int(several[1]))
        elif any(sign in name for sign in "*?["):
            yield from self._wildcard(name)
        else:
            yield self._layer(self._named(name))

    def _ending_in_default(self, count: int) -> Iterator[Layer]:
        by_name = {row.name: row for row in self.rows}
        default = by_name[self.default.name]
        fit = [by_name[name] for name in self.order if by_name[name].fit]
        alike = [row for row in fit if row.cells == default.cells and _any_block(row) == _any_block(default)]
        finer = self._finer(fit, default)
        tokens = default.grid is not None and default.grid.layout == "tokens"
        chosen = alike if len(alike) > 1 and (tokens or len(finer) == 1) else finer
        yield from map(self._layer, chosen[-count:])

    def _finer(self, fit: Sequence[Row], default: Row) -> list[Row]:
        """The default layer, last, and one for each finer grid: of those that the fewest modules with a coarser output
        enclose, the last. What a block that halves the grid computes before it does so is not handed on."""
        enclosing = {row.name: row.cells for row in self.rows}

        def within_coarser(row: Row) -> int:
            steps = row.name.split(".")
            outer = [enclosing.get(".".join(steps[:depth]), 0) for depth in range(1, len(steps))]
            return sum(0 < cells < row.cells for cells in outer)

        chosen = [default]
        for cells in sorted({row.cells for row in fit}):
            if cells >= 2 * chosen[0].cells:
                chosen.insert(
                    0, min(reversed([row for row in fit if row.cells == cells]), key=within_coarser)
                )
        return chosen

    def _wildcard(self, pattern: str) -> Iterator[Layer]:
        by_name = {row.name: row for row in self.rows}
        matching = [row for row in self.rows if fnmatchcase(row.name, pattern)]
        usable = [by_name[name] for name in self.order if fnmatchcase(name, pattern)]
        usable = [row for row in usable if row.calls == 1 and row.grid is not None]
        if not usable:
            seen = f"{len(matching)} modules, none with a spatial map" if matching else "no module"
            raise ModelError(f"layer {pattern!r} matches {seen}; `xai layers CONFIG` lists them")
        yield from map(self._layer, usable)

    def _named(self, name: str) -> Row:
        own = self.aliases.get(name, name)
        row = next((row for row in self.rows if row.name == own), None)
        if row is None:
            near = difflib.get_close_matches(name, [row.name for row in self.rows], n=_NEAREST, cutoff=0.4)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ModelError(f"there is no layer {name!r}{hint}; `xai layers CONFIG` lists them")
        if row.calls != 1:
            raise ModelError(self._unusable(row))
        return row

    def _unusable(self, row: Row) -> str:
        within = [
            other.name for other in self.rows if other.calls == 1 and other.name.startswith(row.name + ".")
        ]
        parents = [
            other.name for other in self.rows if other.calls == 1 and row.name.startswith(other.name + ".")
        ]
        if row.calls:
            why = f"runs {row.calls} times in one forward pass, so its map is ambiguous"
        else:
            why = "does not run in a forward pass"
        near = ([] if row.calls else sorted(within, key=lambda name: name.count("."))) or parents[::-1]
        hint = f"; name a layer that runs once, such as {', '.join(near[:_NEAREST])}" if near else ""
        return f"layer {row.name!r} {why}{hint}"

    def _layer(self, row: Row) -> Layer:
        return Layer(row.name, row.grid, row.shape or ())


def _any_block(row: Row) -> str:
    """Its name with the first number, that of its block, left out."""
    return re.sub(r"\d+", "#", row.name, count=1)


def survey(module: nn.Module, x: Tensor, output: str | None = None) -> Layers:
    """Run ``module`` on ``x`` once, forward and backward, and record every module call.

    The default layer is the last one, in the order in which calls end, that ends before the head begins, has a map
    of more than one cell, changes its input (dropout in eval mode and reshapes do not), is no average pooling and,
    on tokens, no ``nn.Linear`` (queries, keys, values), and in whose map at least half of the cells get a gradient.
    The head is the last module with parameters that yields the logits. What is differentiated is a fixed random
    projection of the head's input, not of the logits: a head that starts at zero would hide all gradients.

    Parameters, buffers, flags and hooks of ``module`` are left as they were, also after an exception.

    Args:
        x: preprocessed images (B, C, H, W); one is enough.
        output: which of several outputs holds the logits (``models.find_logits``).
    Raises:
        ModelError: the network takes no hooks (TorchScript). What its forward raises is passed on.
    """
    trace = Trace(module, x)
    heeded = Heeded(trace)
    with torch.inference_mode(False), torch.enable_grad(), frozen(module), unfused():
        pixels = x.detach().clone().requires_grad_()
        with trace, Attended(heeded.see), Activations() as activations, Census(trace.running) as census:
            outputs = module(pixels.clone())  # a copy: some networks normalise their input in place
        head = trace.differentiate(outputs, output, pixels)
    found = _layers(module, trace.calls, _fit(trace.calls, head))
    return replace(
        found,
        activations=dict(activations.seen),
        operations=dict(census.seen),
        attention=tuple(heeded.attention()),
    )


def _fit(calls: Sequence[Call], head: Call | None) -> list[str]:
    """Names of the layers that meet the conditions of the default one, as they ran; that is the last of them."""
    runs = Counter(call.name for call in calls)
    before = takewhile(lambda call: call is not head, calls)
    usable = [call for call in before if call.may_be_default() and runs[call.name] == 1]
    shares = [(call.name, call.alive.share) for call in usable]
    return [name for name, share in shares if share is not None and share.item() >= _ALIVE]


def _layers(module: nn.Module, calls: Sequence[Call], fit: Sequence[str]) -> Layers:
    last: dict[str, Call] = {}
    for call in calls:
        last.pop(call.name, None)  # so that the order is that of last calls
        last[call.name] = call
    runs = Counter(call.name for call in calls)
    names = {part: name for name, part in module.named_modules()}
    rows = []
    for part, name in names.items():
        ran = last.get(name)
        shape, grid = (ran.shape, ran.grid) if ran else (None, None)
        rows.append(Row(name, type(part).__name__, runs[name], shape, grid, name in fit[-1:], name in fit))
    aliases = {
        name: names[part]
        for name, part in module.named_modules(remove_duplicate=False)
        if name != names[part]
    }
    named = tuple(row for row in rows if row.name)
    return Layers(named, tuple(filter(None, last)), aliases)
