"""The function being explained. Methods and metrics reach the model through a Score and in no other way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from xcli.backward import (
    Blocks,
    Curvature,
    Fold,
    Folded,
    Gradients,
    attended,
    attention,
    curvature,
    differentiated,
    folded,
    from_forward,
    gradients,
)
from xcli.copies import Copies, pairs, taken
from xcli.draws import seed_of
from xcli.errors import ConfigError, ModelError
from xcli.execution import Execution, joined
from xcli.forward import Forward, require_all
from xcli.hooks import recording
from xcli.keys import CopiedKeys
from xcli.layers import Layer, Layers
from xcli.operations import Rules
from xcli.precision import full
from xcli.prefix import Prefix
from xcli.targets import Reading, Rows, Scale

Kept = TypeVar("Kept")


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
        create_graph: keep the graphs of whatever is computed, so that maps can be differentiated in turn, by the
            images and by every weight that asks for a gradient; memory grows with all that is kept.
        pictures: further images that options name, preprocessed, (R, C, H, W) each.
        span: the lowest and the highest input that any picture gives, (C,) each, where that is known.
        context: what forward passes run in, see ``within``.
    """

    module: nn.Module
    rows: Rows
    layers: Layers
    execution: Execution = field(default_factory=Execution)
    seed: int = 0
    keys: Sequence[str] = ()
    forward: Forward | None = None
    create_graph: bool = False
    pictures: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    span: tuple[Tensor, Tensor] | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    prefix: Prefix | None = None
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

    def within(self, context: Callable[[], AbstractContextManager[object]]) -> Score:
        """The same rows, with every forward pass that is asked for scores or gradients in a ``context()``: one that
        gives operations another backward pass, such as ``rectifiers.Rectified``, and leaves values as they are."""
        return replace(self, context=context, forward=None, memo={}, scales={})

    def reading(self, number: Callable[[Rows, Any, Tensor, Tensor], Tensor]) -> Score:
        """The same rows with another number explained: ``number(rows, outputs, copy, row)``, see ``Reading``."""
        return replace(self, rows=Reading(self.rows, number), memo={}, scales={})

    def apart(self) -> Score:
        """The same rows with an image of their own each, in the same order: for inputs that differ from row to row."""
        return self._taken(torch.arange(len(self.image)), torch.arange(len(self.image)), self.image)

    def copies(self, image: Tensor) -> tuple[Score, Tensor]:
        """The score of copies of the images ``image`` (M,), each for all rows of its image, and which row of this score
        each of its rows (P,) is. Copies draw the random numbers of their image."""
        copy, row = self.pairs(image)
        return self._taken(row, copy, image), row

    def _taken(self, row: Tensor, image: Tensor, source: Tensor) -> Score:
        if self.prefix is not None:
            raise ValueError("the inputs of a tail are copies already")
        keys = CopiedKeys(self.keys, source) if len(self.keys) else ()
        rows = self.rows.taken(row, image)
        return replace(self, rows=rows, keys=keys, forward=None, prefix=None, memo={}, scales={})

    def renamed(self, number: Tensor) -> Score:
        """The same with a number (B,) added to the key of each image, so that it draws other random numbers."""
        keys = CopiedKeys(self.keys, torch.arange(len(number)), number)
        return replace(self, keys=keys, memo={}, scales={})

    def generator(self, row: int, tag: str) -> torch.Generator:
        """A fresh CPU generator for one row, seeded by (seed, its image's key, ``tag``): the batch, the order and
        the device never change what it draws. Rows of one image draw the same unless ``tag`` tells them apart."""
        return torch.Generator().manual_seed(seed_of(self.seed, self.keys[int(self.image[row])], tag))

    def seeds(self, image: Tensor, tag: str) -> Tensor:
        """(m,) a seed for ``draws``, int64, for each of the images ``image`` (m,), as ``generator`` has."""
        return torch.tensor([seed_of(self.seed, self.keys[i], tag) for i in image.tolist()], dtype=torch.long)

    def picture(self, name: str) -> Tensor:
        """The further images (R, C, H, W) that an option calls ``name``.

        Raises:
            ConfigError: there are none of that name, or they are no pictures.
        """
        if not name:
            raise ConfigError("the option `baselines` has to name the pictures to compare with")
        if name not in self.pictures:
            raise ConfigError(
                f"{name!r} stands for pictures that were not handed over; pass pictures={{{name!r}: ...}}, a float "
                "tensor (R, C, H, W), preprocessed as the images are"
            )
        found = self.pictures[name]
        if not isinstance(found, Tensor) or found.ndim != 4 or not len(found):
            told = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"pictures[{name!r}]: a float tensor (R, C, H, W) with R > 0; got {told}")
        return found

    # ---- forward only -----------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """The score of row i on input i: (N, C, H, W) -> (N,)."""
        return self.at(x, torch.arange(len(self.image)))

    def at(self, x: Copies, row: Tensor) -> Tensor:
        """The scores (M,) of inputs (M, C, H, W), input i for ``row[i]``."""

        def score(index: Tensor) -> tuple[Tensor, ...]:
            return (self.values(taken(x, index), row[index]),)

        with torch.inference_mode(not self.create_graph):
            (values,) = self.execution.each(score, torch.arange(len(row)))
        return values.clone()

    def on(self, x: Copies, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of copies (M, C, H, W) of the images ``image`` (M,) for every row of each copy's image.

        Returns (values, copy, row), each (P,): value p is of input ``copy[p]`` for row ``row[p]``.
        """
        copy, row = self.pairs(image)
        served = copy.unique()  # copies of images without a row cost nothing
        bounds = torch.cat([torch.searchsorted(copy, served), torch.tensor([len(copy)])])

        def score(index: Tensor) -> tuple[Tensor, ...]:
            own, pairs = served[index], slice(int(bounds[index[0]]), int(bounds[index[-1] + 1]))
            outputs = self.outputs(taken(x, own), image[own])
            return (self.rows.values(outputs, torch.searchsorted(own, copy[pairs]), row[pairs]),)

        with torch.inference_mode(not self.create_graph):
            (values,) = self.execution.each(score, torch.arange(len(served)))
        return values.clone(), copy, row

    def elsewhere(self, x: Tensor) -> Tensor:
        """The scores of all rows on inputs (M, C, H, W) that belong to none of the images: (M, N)."""
        rows = torch.arange(len(self.image))

        def score(index: Tensor) -> tuple[Tensor, ...]:
            copy = torch.arange(len(index)).repeat_interleave(len(rows))
            outputs = self.execution.run(self.module, taken(x, index))
            return (self.rows.values(outputs, copy, rows.repeat(len(index))).unflatten(0, (len(index), -1)),)

        with torch.inference_mode(not self.create_graph):
            (values,) = self.execution.each(score, torch.arange(len(x)))
        return values.clone()

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
            parts.append(self.rows.values(outputs, *self.pairs(torch.arange(first, last))).detach())
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
        return self.rows.values(self.outputs(x, self.image[row]), torch.arange(len(row)), row)

    def activations(self, x: Tensor, at: Sequence[Layer]) -> tuple[Tensor, ...]:
        """The raw outputs of layers on the images ``x`` (B, C, H, W), one tensor (B, ...) a layer."""
        names = [layer.name for layer in at]
        if self.forward is not None and not self.create_graph and self.forward.covers(x, names, graph=False):
            chunks = [tuple(acts[name].detach() for name in names) for acts in self.forward.acts]
            return tuple(full(joined(tensors)) for tensors in zip(*chunks, strict=True))

        def run(part: Tensor) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(self.create_graph), recording(self.module, names) as kept:
                self.execution.run(self.module, part)
            return tuple(full(require_all(kept, names)[name]) for name in names)

        return self.execution.each(run, x)

    def tail(self, x: Tensor, at: Layer) -> Score:
        """The score as a function of the raw output of ``at``; what comes before has run once and is kept.

        Inputs of the new score are layer outputs (M, ...), for copies of the same B images. ``x`` is the batch.

        Raises:
            ModelError: what follows the layer cannot be run by itself, or the score keeps its graph.
        """
        if self.create_graph:
            raise ModelError("this method runs the network in parts: its maps cannot be trained through")
        prefix = Prefix(self.module, at.name, x, self.execution, self.layers.tails)
        execution = self.execution.part(prefix.activations())
        return replace(self, prefix=prefix, execution=execution, forward=None, memo={}, scales={})

    # ---- gradients --------------------------------------------------------------------------------------------

    def gradients(self, x: Tensor, at: Sequence[Layer] = (), *, row: Tensor | None = None) -> Gradients:
        """Activations, gradients and values at layers, or at the input where ``at`` is empty.

        Args:
            x: the images (B, C, H, W), explained for every row; or inputs (M, C, H, W), input i for ``row[i]``.
            at: layers; the graph starts at the first of them to run, so what comes before costs inference alone.

        Returns:
            raw layer outputs and gradients, (N, ...) each ((M, ...) with ``row``), and the values (N,) or (M,).
        """
        names = tuple(layer.name for layer in at)
        if row is None and not self.create_graph and (known := from_forward(self, x, names)) is not None:
            return known
        found = differentiated(self, x, names, gradients, row)
        count = (len(found) - 1) // 2
        return Gradients(found[:count], found[count:-1], found[-1])

    def curvature(self, x: Tensor, at: Sequence[Layer]) -> Curvature:
        """``gradients`` at layers and the products H A of the Hessian of the score there with the activations A.

        One forward pass, one backward pass of the tail and one through it again, for each layer.
        """
        found = differentiated(self, x, tuple(layer.name for layer in at), curvature)
        count = len(at)
        return Curvature(found[:count], found[count : 2 * count], found[2 * count : -1], found[-1])

    def folded(
        self, x: Tensor, at: Sequence[str], fold: Callable[[int, Tensor, int], tuple[Tensor, ...]]
    ) -> Folded:
        """The gradient at the images (B, C, H, W), and sums over modules of what ``fold`` makes of the gradient there.

        The gradient at a module's output lives until it is folded, so many modules cost no more memory than one.

        Args:
            at: names of modules, each of which yields one tensor; one that runs twice is folded twice.
            fold: (index into ``at``, gradient, number m of images) -> tensors (m, ...), of shapes that broadcast. The
                gradient is that of the output as the module gives it; images without a row in the pass bring zeros.
        """
        grads, *folds, values = folded(self, x, at, fold)
        return Folded(grads, tuple(folds), values)

    def attended(
        self, x: Tensor, fold: Fold, *, gradients: bool = True, blocks: Blocks | None = None
    ) -> tuple[Tensor, ...]:
        """What ``fold`` makes of the attention of the images (B, C, H, W) and its gradients: tensors (N, ...).

        Args:
            fold: (probabilities, gradients of the score there), (m, heads, T, T) for each attention as they ran, of m
                images of one pass -> tensors (m, ...); without ``gradients``, from a forward pass, the second is empty.
            blocks: of the last attentions alone, one a block, with the gradient of the score of that block.
        """
        return attended(self, x, fold, blocks) if gradients else attention(self, x, fold)

    # ---- which copy serves which row --------------------------------------------------------------------------

    def pairs(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Every (copy, row) where the row is of the copy's image, sorted by copy, for copies of ``image`` (M,)."""
        return pairs(self.image, image)

    def outputs(self, x: Tensor, image: Tensor) -> Any:
        """What the network answers to copies (M, ...) of the images ``image`` (M,), in the precision of the run."""
        prefix = self.prefix
        answer = self.module if prefix is None else lambda acts: prefix(acts, image)
        with self.context() as rules:
            outputs = self.execution.run(answer, x)
            return rules.settled(outputs) if isinstance(rules, Rules) else outputs
