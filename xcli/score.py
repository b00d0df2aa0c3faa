"""The function being explained. Methods and metrics reach the model through a Score and in no other way."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xcli.execution import Execution
from xcli.forward import Forward, require_all
from xcli.hooks import recording
from xcli.layers import Layer, Layers
from xcli.replay import Replay
from xcli.targets import Rows, Scale

Kept = TypeVar("Kept")
Copies = Tensor | Callable[[Tensor], Tensor]
"""Inputs (M, C, H, W), or a pure function that makes those of an index (m,): a retry calls it again."""


class Gradients(NamedTuple):
    """What ``Score.gradients`` gives, an entry a layer (one entry for the input): tensors of N rows."""

    acts: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    values: Tensor


@dataclass(frozen=True)
class Score:
    """The number explained, as a function of the input: B images, N >= B rows of (image, target).

    Chunking into micro-batches and the halving when memory runs out happen in here, forward and backward. A forward
    pass of one copy serves every row of its image, and copies of different images share a micro-batch.

    Attributes:
        module: the network, in eval mode with frozen weights (``hooks.frozen``).
        rows: which image and target each row is, and the number explained.
        layers: the survey of the network's layers (``layers.survey``).
        keys: one name an image, from which its random numbers are drawn; for bare tensors, a hash of the content.
        forward: a pass that has already run on the batch, used where it covers what is asked.
    """

    module: nn.Module
    rows: Rows
    layers: Layers
    execution: Execution = field(default_factory=Execution)
    seed: int = 0
    keys: Sequence[str] = ()
    forward: Forward | None = None
    prefix: Replay | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    scales: dict[Scale, Score] = field(default_factory=dict, repr=False)

    # ---- what is explained ------------------------------------------------------------------------------------

    @property
    def image(self) -> Tensor:
        """(N,) index of each row's image."""
        return self.rows.image

    def scaled(self, scale: Scale) -> Score:
        """The same rows in another unit: logit, probability, log-probability or contrast; one object a unit."""
        if scale not in self.scales:
            self.scales[scale] = replace(self, rows=self.rows.scaled(scale), memo={}, scales={})
        return self.scales[scale]

    def retarget(self, target: Tensor) -> Score:
        """The same images with other targets (N,)."""
        return replace(self, rows=self.rows.retarget(target), memo={}, scales={})

    def using(self, module: nn.Module) -> Score:
        """The same rows seen by another network of the same structure."""
        return replace(self, module=module, forward=None, prefix=None, memo={}, scales={})

    def apart(self) -> Score:
        """The same rows with an image of their own each, in the same order: for inputs that differ from row to row."""
        keys = [self.keys[image] for image in self.image.tolist()]
        return replace(self, rows=self.rows.apart(), keys=keys, forward=None, prefix=None, memo={}, scales={})

    def generator(self, row: int, tag: str) -> torch.Generator:
        """A fresh CPU generator for one row, seeded by (seed, its image's key, ``tag``): the batch, the order and
        the device never change what it draws. Rows of one image draw the same unless ``tag`` tells them apart."""
        text = f"{self.seed}\0{self.keys[int(self.image[row])]}\0{tag}"
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    # ---- forward only -----------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """The score of row i on input i: (N, C, H, W) -> (N,)."""
        return self.at(x, torch.arange(len(self.image)))

    def at(self, x: Copies, row: Tensor) -> Tensor:
        """The scores (M,) of inputs (M, C, H, W), input i for ``row[i]``."""

        def score(index: Tensor) -> tuple[Tensor, ...]:
            return (self.values(taken(x, index), row[index]),)

        with torch.inference_mode():
            (values,) = self.execution.each(score, torch.arange(len(row)))
        return values.clone()

    def on(self, x: Copies, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of copies (M, C, H, W) of the images ``image`` (M,) for every row of each copy's image.

        Thousands of copies need not exist at once: ``x`` may be a function that makes those of an index (m,).

        Returns (values, copy, row), each (P,): value p is of input ``copy[p]`` for row ``row[p]``.
        """
        copy, row = self._pairs(image)
        bounds = torch.searchsorted(copy, torch.arange(len(image) + 1))

        def score(index: Tensor) -> tuple[Tensor, ...]:
            first, last = int(bounds[index[0]]), int(bounds[index[-1] + 1])
            outputs = self._outputs(taken(x, index), image[index])
            return (self.rows.values(outputs, copy[first:last] - index[0], row[first:last]),)

        with torch.inference_mode():
            (values,) = self.execution.each(score, torch.arange(len(image)))
        return values.clone(), copy, row

    def clean(self, x: Tensor) -> Tensor:
        """The scores (N,) of the images ``x`` (B, C, H, W) themselves: from the pass that has already run, else from
        one pass now; asked for again, they are at hand."""
        known = self.memo.get("clean")
        if known is None or known[0] is not x:
            self.memo["clean"] = known = (x, self._clean(x))
        values: Tensor = known[1]
        return values

    def _clean(self, x: Tensor) -> Tensor:
        if self.forward is None or not self.forward.covers(x, (), graph=False):
            return self.on(x, torch.arange(len(x)))[0]
        bounds, parts = itertools.pairwise(self.forward.bounds), []
        for outputs, (first, last) in zip(self.forward.outputs, bounds, strict=True):
            parts.append(self.rows.values(outputs, *self._pairs(torch.arange(first, last))).detach())
        return torch.cat(parts)

    def logits(self, x: Tensor) -> Tensor:
        """What the targets of the images ``x`` (B, C, H, W) are chosen from, (B, L): of the pass that has already run,
        else of one pass now; asked for again, they are at hand."""
        forward = self.forward

        def known() -> Tensor:
            if forward is not None and forward.covers(x, (), graph=False):
                return torch.cat([self.rows.logits(outputs).detach() for outputs in forward.outputs])
            return self.execution.each(torch.no_grad()(run), x)[0]

        def run(part: Tensor) -> tuple[Tensor, ...]:
            return (self.rows.logits(self.execution.run(self.module, part)),)

        return self.once((x, "logits"), known)  # a tensor is a key by identity

    def once(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """``make()``, computed the first time that ``key`` is asked of this score: for what several metrics share."""
        if key not in self.memo:
            self.memo[key] = make()
        found: Kept = self.memo[key]
        return found

    def forget(self, key: object) -> None:
        """Drop what was kept ``once`` for ``key``, in every unit: an object that is done with, such as a map."""
        for score in (self, *self.scales.values()):
            for kept in [k for k in score.memo if isinstance(k, tuple) and any(part is key for part in k)]:
                del score.memo[kept]

    def values(self, x: Tensor, row: Tensor) -> Tensor:
        """``at`` in one pass, without chunks, in whatever grad mode the caller is: a differentiable (M,)."""
        return self.rows.values(self._outputs(x, self.image[row]), torch.arange(len(row)), row)

    def activations(self, x: Tensor, at: Sequence[Layer]) -> tuple[Tensor, ...]:
        """The raw outputs of layers on the images ``x`` (B, C, H, W), one tensor (B, ...) a layer."""
        names = [layer.name for layer in at]
        if self.forward is not None and self.forward.covers(x, names, graph=False):
            chunks = [tuple(acts[name].detach() for name in names) for acts in self.forward.acts]
            return tuple(full(torch.cat(tensors)) for tensors in zip(*chunks, strict=True))

        def run(part: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad(), recording(self.module, names) as kept:
                self.execution.run(self.module, part)
            return tuple(full(require_all(kept, names)[name]) for name in names)

        return self.execution.each(run, x)

    def tail(self, x: Tensor, at: Layer) -> Score:
        """The score as a function of the raw output of ``at``; what comes before has run once and is kept.

        Inputs of the new score are layer outputs (M, ...), for copies of the same B images. ``x`` is the batch.
        """
        return replace(self, prefix=Replay(self.module, at.name, x), forward=None, memo={}, scales={})

    # ---- gradients --------------------------------------------------------------------------------------------

    def gradients(
        self,
        x: Tensor,
        at: Sequence[Layer] = (),
        *,
        row: Tensor | None = None,
        create_graph: bool = False,
    ) -> Gradients:
        """Activations, gradients and values at layers, or at the input where ``at`` is empty.

        Args:
            x: the images (B, C, H, W), explained for every row; or, with ``row``, inputs (M, C, H, W), input i for
                ``row[i]``.
            at: layers; the graph starts at the first of them to run, so what comes before costs inference alone.
            create_graph: keep the whole graph, so that the gradients can be differentiated in turn.

        Returns:
            raw layer outputs and gradients, (N, ...) each ((M, ...) with ``row``), and the values (N,) or (M,).
        """
        names = tuple(layer.name for layer in at)
        if row is None and not create_graph and (known := self._from_forward(x, names)) is not None:
            return known

        def run(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            image = index if row is None else self.image[row[index]]
            acts, outputs = self._graph(part, image, names, whole=create_graph)
            pairs = self._pairs(index) if row is None else (torch.arange(len(index)), row[index])
            return self._backward(acts, outputs, *pairs, keep=create_graph, create_graph=create_graph)

        return as_gradients(self.execution.each(run, x, torch.arange(len(x))))

    def _graph(
        self, x: Tensor, image: Tensor, names: Sequence[str], *, whole: bool
    ) -> tuple[tuple[Tensor, ...], Any]:
        with ExitStack() as undo:
            undo.enter_context(torch.set_grad_enabled(whole or not names))
            if whole:  # fused attention has no second derivative
                undo.enter_context(sdpa_kernel(SDPBackend.MATH))
            if whole or not names:
                x = x if whole and x.requires_grad else x.detach().requires_grad_()
            if not names:
                return (x,), self._outputs(x.clone(), image)
            kept = undo.enter_context(recording(self.module, names, leaves=() if whole else names))
            outputs = self._outputs(x, image)
            return tuple(require_all(kept, names)[name] for name in names), outputs

    def _backward(
        self,
        acts: tuple[Tensor, ...],
        outputs: Any,
        copy: Tensor,
        row: Tensor,
        *,
        keep: bool,
        create_graph: bool,
    ) -> tuple[Tensor, ...]:
        """Activations, gradients and values of pairs (copy, row); as many backward passes as a copy has rows."""
        with torch.enable_grad():
            values = self.rows.values(outputs, copy, row)  # (P,)
        turns = turn_of(copy)  # (P,)
        last = int(turns.max()) if len(turns) else -1
        grads = [[torch.zeros_like(act)] for act in acts] if last < 0 else [[] for _ in acts]
        for turn in range(last + 1):
            with torch.enable_grad():  # whatever mode the caller is in
                picked = values.sum() if last == 0 else values[(turns == turn).to(values.device)].sum()
            again = keep or turn < last
            found = torch.autograd.grad(
                picked, acts, retain_graph=again, create_graph=create_graph, materialize_grads=True
            )
            for own, grad in zip(grads, found, strict=True):
                own.append(grad)
        own_grads = tuple(of_pairs(torch.stack(own), turns, copy) if last else own[0] for own in grads)
        own_acts = (
            acts if last == 0 and len(copy) == len(acts[0]) else tuple(a[copy.to(a.device)] for a in acts)
        )
        if last == 0 and own_acts is not acts:  # some copies have no row
            own_grads = tuple(grad[copy.to(grad.device)] for grad in own_grads)
        if not create_graph:
            own_acts, values = tuple(act.detach() for act in own_acts), values.detach()
        return (*map(full, own_acts), *map(full, own_grads), values)

    def _from_forward(self, x: Tensor, names: tuple[str, ...]) -> Gradients | None:
        """``gradients`` of the pass that has already run, where it covers what is asked and memory suffices."""
        if self.forward is None or not self.forward.covers(x, names, graph=True):
            return None
        if names not in self.memo:
            parts = []
            for kept, outputs, bounds in zip(
                self.forward.acts, self.forward.outputs, itertools.pairwise(self.forward.bounds), strict=True
            ):
                acts, pairs = tuple(kept[name] for name in names), self._pairs(torch.arange(*bounds))
                backward = partial(self._backward, acts, outputs, *pairs, keep=True, create_graph=False)
                part = self.execution.attempt(backward)
                if part is None:
                    self.forward.drop()
                    self.execution.keep_graphs = False
                    return None
                parts.append(part)
            self.memo[names] = as_gradients(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        found: Gradients = self.memo[names]
        return found

    # ---- which copy serves which row --------------------------------------------------------------------------

    def _pairs(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Every (copy, row) where the row is of the copy's image, sorted by copy, for copies of ``image`` (M,)."""
        start = torch.searchsorted(self.image, image)
        count = torch.searchsorted(self.image, image, right=True) - start
        copy = torch.repeat_interleave(torch.arange(len(image)), count)
        within = torch.arange(len(copy)) - (count.cumsum(0) - count)[copy]
        return copy, start[copy] + within

    def _outputs(self, x: Tensor, image: Tensor) -> Any:
        if (prefix := self.prefix) is None:
            return self.execution.run(self.module, x)
        return self.execution.run(lambda acts: prefix(acts, image), x)


def taken(x: Copies, index: Tensor) -> Tensor:
    """The inputs of ``index`` (m,), made now or picked out."""
    return x(index) if callable(x) else x[index.to(x.device)]


def as_gradients(found: tuple[Tensor, ...]) -> Gradients:
    """The flat result of a chunked pass, activations, gradients and values in this order, taken apart."""
    count = (len(found) - 1) // 2
    return Gradients(found[:count], found[count:-1], found[-1])


def of_pairs(stacked: Tensor, turn: Tensor, copy: Tensor) -> Tensor:
    """The gradient of each pair (P, ...) from those of each turn and copy (turns, copies, ...)."""
    return stacked[turn.to(stacked.device), copy.to(stacked.device)]


def turn_of(copy: Tensor) -> Tensor:
    """How often each entry of a sorted index (P,) has been seen before it: 0 for the first row of a copy."""
    starts = torch.searchsorted(copy, copy)
    return torch.arange(len(copy)) - starts


def full(tensor: Tensor) -> Tensor:
    """At least float32: half-precision activations are brought up before a method computes with them."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
