"""Gradients of the rows of a score: one graph a micro-batch, as many backward passes as an image has rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xcli.attention import Attended
from xcli.errors import ModelError
from xcli.forward import require_all
from xcli.hooks import Elementary, Gate, gathered, observed, recording
from xcli.precision import full
from xcli.targets import Rows

if TYPE_CHECKING:
    from xcli.score import Score

Differentiate = Callable[[Tensor, bool], tuple[Tensor, ...]]
"""(a sum of scores of different copies, whether the graph is needed again) -> tensors of an entry a copy."""

Fold = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
"""What ``Score.attended`` makes of attention and its gradients."""

_NONE = ("is not implemented", "double backwards on")
"""How PyTorch and torchvision say that an operation has no second derivative."""


class Gradients(NamedTuple):
    """What ``Score.gradients`` gives, an entry a layer (one entry for the input): tensors of N rows."""

    acts: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    values: Tensor


class Curvature(NamedTuple):
    """What ``Score.curvature`` gives, an entry a layer: activations A, gradients G, and products H A with the Hessian
    H of the score at that layer, tensors of N rows."""

    acts: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    products: tuple[Tensor, ...]
    values: Tensor


class Folded(NamedTuple):
    """What ``Score.folded`` gives: the gradient at the input (N, C, H, W) and the sums over layers (N, ...)."""

    grads: Tensor
    folds: tuple[Tensor, ...]
    values: Tensor


Derive = Callable[..., tuple[Tensor, ...]]
"""``gradients`` or ``curvature``, below."""


def gradients(picked: Tensor, at: tuple[Tensor, ...], *, again: bool, graph: bool) -> tuple[Tensor, ...]:
    """The gradients of a sum of scores at some tensors; zeros where it does not depend on one."""
    grads = torch.autograd.grad(picked, at, retain_graph=again, create_graph=graph, materialize_grads=True)
    return _settled(grads, graph)


def _settled(grads: Sequence[Tensor], graph: bool) -> tuple[Tensor, ...]:
    """``grads``, which ask for gradients themselves only with a graph: zeros of PyTorch 2.6 always do."""
    return tuple(grad if graph else grad.detach() for grad in grads)


def curvature(picked: Tensor, at: tuple[Tensor, ...], *, again: bool, graph: bool) -> tuple[Tensor, ...]:
    """Gradients G, then products of the Hessian with the tensors themselves, one each: d(G . A) / dA with A held."""
    grads = gradients(picked, at, again=True, graph=True)
    products: list[Tensor] = []
    for index, (act, grad) in enumerate(zip(at, grads, strict=True)):
        if not grad.requires_grad:  # what follows is linear
            products.append(torch.zeros_like(act))
            continue
        keep = again or graph or index < len(at) - 1
        products.append(_product(grad, act, act if graph else act.detach(), again=keep, graph=graph))
    return (*_settled(grads, graph), *_settled(products, graph))


def _product(grad: Tensor, act: Tensor, held: Tensor, *, again: bool, graph: bool) -> Tensor:
    try:
        (product,) = torch.autograd.grad(
            grad, act, held, retain_graph=again, create_graph=graph, materialize_grads=True
        )
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NONE):
            raise
        raise ModelError(
            f"what follows the layer has no second derivative ({error}); name a later layer"
        ) from None
    return product


def differentiated(
    score: Score, x: Tensor, names: tuple[str, ...], derive: Derive, row: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Activations (or the input), what ``derive`` makes of score and activations, the values: N rows each."""

    def run(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        image = index if row is None else score.image[row[index]]
        acts, outputs = _graph(score, part, image, names, second=score.create_graph or derive is curvature)
        return _explained(score, acts, outputs, derive, *_served(score, index, row))

    return score.execution.each(run, *(needed(score, x) if row is None else (x, torch.arange(len(x)))))


def needed(score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """The images that some row is about, and which they are: the others cost nothing."""
    index = score.image.unique()
    if len(index) in (0, len(x)):
        return x, torch.arange(len(x))
    return x[index.to(x.device)], index


def folded(
    score: Score, x: Tensor, at: Sequence[str], fold: Callable[[int, Tensor, int], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """The gradient at the input, the sums over modules of what ``fold`` makes of the gradient there, the values."""

    def run(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        sums: list[Tensor] = []

        def add(number: int, grad: Tensor) -> None:
            made = fold(number, full(grad), len(part))
            sums[:] = [a + b for a, b in zip(sums, made, strict=True)] if sums else made

        def differentiate(picked: Tensor, again: bool) -> tuple[Tensor, ...]:
            sums.clear()
            return (*gradients(picked, pixels, again=again, graph=score.create_graph), *sums)

        with ExitStack() as undo:
            for number, name in enumerate(at):
                undo.enter_context(observed(score.module.get_submodule(name), partial(add, number)))
            pixels, outputs = _graph(score, part, index, (), second=score.create_graph)
            return _rows(score, outputs, differentiate, *score.pairs(index))

    return score.execution.each(run, *needed(score, x))


class Blocks(NamedTuple):
    """Modules that run one after the other and hand tokens (B, T, C) on, and what of these is ``read`` (B, T, C) in
    the place of the last ones, so that each of the modules has a score of its own."""

    names: tuple[str, ...]
    read: Callable[[Tensor], Tensor]


def attended(score: Score, x: Tensor, fold: Fold, blocks: Blocks | None) -> tuple[Tensor, ...]:
    """What ``fold`` makes of the attention of the images of each pass and its gradients: N rows each. With ``blocks``
    the scores of all of them are differentiated at once, each at the attention of its own block: what one hands on to
    the next lets no gradient through, but to a loss over what comes of it."""
    count, gate = len(blocks.names) if blocks is not None else 0, Gate()
    own = score.reading(partial(_of_blocks, count)) if count else score

    def run(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []

        def differentiate(picked: Tensor, again: bool) -> tuple[Tensor, ...]:
            at = tuple(seen[-count:])  # all of them, where there are no blocks
            grads = gradients(picked, at, again=again, graph=score.create_graph)
            kept = at if score.create_graph else [one.detach() for one in at]
            return fold([full(one) for one in kept], [full(grad) for grad in grads])

        with ExitStack() as undo:
            if blocks is not None:
                undo.enter_context(gathered(score.module, blocks.names, partial(_joined, blocks.read), gate))
            undo.enter_context(Attended(seen.append))
            _, outputs = _graph(own, part, index, (), second=score.create_graph)
        return _rows(own, outputs, differentiate, *score.pairs(index))[:-1]

    found = score.execution.each(run, *needed(score, x))
    gate.open = True
    return found


def _joined(read: Callable[[Tensor], Tensor], outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([read(one) for one in outputs])


def _of_blocks(count: int, rows: Rows, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
    """The sums (P,) of scores by outputs that are those of all copies for one of ``count`` blocks after the other."""
    copies = len(rows.logits(outputs)) // count
    return torch.stack([rows.values(outputs, copy + block * copies, row) for block in range(count)]).sum(0)


def attention(score: Score, x: Tensor, fold: Fold) -> tuple[Tensor, ...]:
    """What ``fold`` makes of the attention of the images of each pass alone: N rows each."""

    def run(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        seen: list[Tensor] = []
        with torch.set_grad_enabled(score.create_graph), Attended(seen.append):
            score.execution.run(score.module, part)
        copy, _ = score.pairs(index)
        return tuple(of_copies(made, copy) for made in fold([full(one) for one in seen], ()))

    return score.execution.each(run, *needed(score, x))


def from_forward(score: Score, x: Tensor, names: tuple[str, ...]) -> Gradients | None:
    """Gradients of the pass that has already run, where it covers what is asked and memory suffices."""
    if score.forward is None or not score.forward.covers(x, names, graph=True):
        return None
    if names not in score.memo:
        parts = []
        ran, bounds = score.forward, itertools.pairwise(score.forward.bounds)
        for own, kept, outputs, span in zip(ran.inputs, ran.acts, ran.outputs, bounds, strict=True):
            acts, pairs = tuple(kept[name] for name in names) or (own,), score.pairs(torch.arange(*span))
            explained = partial(_explained, score, acts, outputs, gradients, *pairs, keep=True)
            part = score.execution.attempt(explained)
            if part is None:
                score.forward.drop()
                score.execution.keep_graphs = False
                return None
            parts.append(part)
        found = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        count = (len(found) - 1) // 2
        score.memo[names] = Gradients(found[:count], found[count:-1], found[-1])
    known: Gradients = score.memo[names]
    return known


def _served(score: Score, index: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    return score.pairs(index) if row is None else (torch.arange(len(index)), row[index])


def _graph(
    score: Score, x: Tensor, image: Tensor, names: Sequence[str], *, second: bool
) -> tuple[tuple[Tensor, ...], Any]:
    """One forward pass: the tensors to differentiate at, and the outputs. ``second``: to be done twice."""
    whole = score.create_graph or not names
    with ExitStack() as undo:
        undo.enter_context(torch.set_grad_enabled(whole))
        if second:  # fused attention has no second derivative
            undo.enter_context(sdpa_kernel(SDPBackend.MATH))
            undo.enter_context(Elementary())
        if whole:
            x = x if score.create_graph and x.requires_grad else x.detach().requires_grad_()
        if not names:
            return (x,), score.outputs(x.clone(), image)
        kept = undo.enter_context(recording(score.module, names, leaves=() if whole else names))
        outputs = score.outputs(x, image)
        return tuple(require_all(kept, names)[name] for name in names), outputs


def _explained(
    score: Score,
    acts: tuple[Tensor, ...],
    outputs: Any,
    derive: Derive,
    copy: Tensor,
    row: Tensor,
    *,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    def differentiate(picked: Tensor, again: bool) -> tuple[Tensor, ...]:
        return derive(picked, acts, again=again, graph=score.create_graph)

    own = tuple(full(of_copies(act if score.create_graph else act.detach(), copy)) for act in acts)
    return (*own, *_rows(score, outputs, differentiate, copy, row, keep=keep))


def _rows(
    score: Score, outputs: Any, differentiate: Differentiate, copy: Tensor, row: Tensor, *, keep: bool = False
) -> tuple[Tensor, ...]:
    """What ``differentiate`` makes of the score of each pair (copy, row), and the scores."""
    with torch.enable_grad():  # whatever mode the caller is in
        values = score.rows.values(outputs, copy, row)  # (P,)
    made = each_row(values, copy, differentiate, keep=keep or score.create_graph)
    return (*map(full, made), values if score.create_graph else values.detach())


def each_row(
    values: Tensor, copy: Tensor, differentiate: Differentiate, *, keep: bool = False
) -> tuple[Tensor, ...]:
    """What ``differentiate`` makes of the score of each pair (P,): tensors (P, ...).

    Scores of different copies do not touch each other, so one backward pass serves a row of every copy.

    Args:
        values: scores (P,) with their graph, sorted by ``copy``.
        copy: (P,) index of each pair's copy.
        keep: leave the graph as it is after the last pass too.
    """
    if not values.requires_grad:
        raise ModelError(
            "the model gives no gradient: it is a black box, or cuts its graph off; methods that only look at scores "
            "work, such as rise, occlusion, kernel-shap (xai methods lists the perturbation family)"
        )
    turns = turn_of(copy)  # (P,)
    last = max(int(turns.max()), 0) if len(turns) else 0
    made: list[tuple[Tensor, ...]] = []
    for turn in range(last + 1):
        with torch.enable_grad():  # whatever mode the caller is in
            own = (turns == turn).nonzero()[:, 0]  # of a mask a GPU would have to tell the length
            picked = values.sum() if last == 0 else values[own.to(values.device)].sum()
        made.append(differentiate(picked, keep or turn < last))
    if last == 0:
        return tuple(of_copies(tensor, copy) for tensor in made[0])
    return tuple(of_pairs(torch.stack(own), turns, copy) for own in zip(*made, strict=True))


def of_copies(tensor: Tensor, copy: Tensor) -> Tensor:
    """The entry of each pair (P, ...) from that of each copy; the tensor itself where every copy has one pair."""
    if len(copy) == len(tensor) and bool((turn_of(copy) == 0).all()):
        return tensor
    return tensor[copy.to(tensor.device)]


def of_pairs(stacked: Tensor, turn: Tensor, copy: Tensor) -> Tensor:
    """The gradient of each pair (P, ...) from those of each turn and copy (turns, copies, ...)."""
    return stacked[turn.to(stacked.device), copy.to(stacked.device)]


def turn_of(copy: Tensor) -> Tensor:
    """How often each entry of a sorted index (P,) has been seen before it: 0 for the first row of a copy."""
    starts = torch.searchsorted(copy, copy)
    return torch.arange(len(copy)) - starts
