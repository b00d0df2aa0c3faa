"""What the tests of LIME, Kernel SHAP and Shapley sampling share: label maps, games, every set of features, captum.

A game is a network that sees of a picture only how much of each cell is there, so that any function of the features
can be explained: pictures of ones on a substrate of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import permutations
from math import factorial

import pytest
import torch
from captum._utils.models.model import Model
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor, nn
from torch.testing import assert_close
from toys import bound, images

from xcli.methods.base import Attribution, Method
from xcli.score import Score
from xcli.segments import grid

CELLS = "given:cells"


def cut(size: tuple[int, int], count: int, seed: int = 0) -> Tensor:
    """A label map (H, W) of ``count`` features of any form and of unequal sizes."""
    made = torch.Generator().manual_seed(seed)
    skewed = (torch.rand(size, generator=made) ** 1.5 * count).long()
    skewed.view(-1)[torch.randperm(skewed.numel(), generator=made)[:count]] = torch.arange(count)
    return skewed


def celled(score: Score, *labels: Tensor) -> Score:
    """``score`` with the label maps (H, W) of its images, or one for all, as ``CELLS``."""
    return replace(score, pictures={"cells": torch.stack(labels)[:, None]})


class Game(nn.Module):
    """Logits that are any function of what is seen of the cells of a label map (H, W): ``play``, (n, F) -> (n, L)."""

    def __init__(self, label: Tensor, play: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        cells = nn.functional.one_hot(label).permute(2, 0, 1).double()
        self.register_buffer("cells", cells / cells.sum((1, 2), keepdim=True))
        self.play = play

    def forward(self, x: Tensor) -> Tensor:
        return self.play(torch.einsum("nhw,fhw->nf", x.mean(1), self.cells.to(x)))


def game(
    play: Callable[[Tensor], Tensor], target: Sequence[int] = (0,), label: Tensor | None = None
) -> tuple[Score, Tensor]:
    """One image of ones on which ``play`` is explained for the logits ``target``, its cells those of ``label``."""
    label = grid((16, 16), 3) if label is None else label
    x = torch.ones(1, 1, *label.shape, dtype=torch.float64)
    return celled(bound(Game(label, play), x, list(target), [0] * len(target)), label), x


def polynomial(features: int, seed: int = 0, centre: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Three logits with interactions: of first and second, first and third, and of all three orders."""
    a, b, c = (images(features, seed=seed + i) / features**0.5 for i in range(3))

    def play(seen: Tensor) -> Tensor:
        first, second, third = (2 * (seen - centre) @ w for w in (a, b, c))
        square, cube = second.square(), third**3
        return torch.stack([first + square, first + cube, first + square + cube], 1)

    return play


def every(features: int) -> Tensor:
    """All 2^F sets (2^F, F), bool, set s by the bits of s."""
    return torch.tensor([[bool(s >> f & 1) for f in range(features)] for s in range(1 << features)])


def shown(x: Tensor, other: Tensor, label: Tensor, kept: Tensor) -> Tensor:
    """Pictures (S, C, H, W): of each set (S, F) the features from ``x``, the rest from ``other``, (C, H, W) both."""
    found = other.expand(x.shape).repeat(len(kept), 1, 1, 1)
    for one, chosen in zip(found, kept, strict=True):
        for feature in chosen.nonzero()[:, 0].tolist():
            one[:, label == feature] = x[:, label == feature]
    return found


def shapley(values: Tensor) -> Tensor:
    """Shapley values (F,) of a game, from its values (2^F,) of all sets by bits."""
    features = len(values).bit_length() - 1
    weight = [factorial(k) * factorial(features - k - 1) / factorial(features) for k in range(features)]
    known, found = values.tolist(), [0.0] * features
    for s in range(len(known)):
        for f in range(features):
            if not s >> f & 1:
                found[f] += weight[s.bit_count()] * (known[s | 1 << f] - known[s])
    return torch.tensor(found, dtype=torch.float64)


def shapley_by_orders(values: Tensor) -> Tensor:
    """The same by all F! orders."""
    features = len(values).bit_length() - 1
    found = torch.zeros(features, dtype=torch.float64)
    for order in permutations(range(features)):
        present = 0
        for f in order:
            found[f] += values[present | 1 << f] - values[present]
            present |= 1 << f
    return found / factorial(features)


def of_features(maps: Tensor, label: Tensor) -> Tensor:
    """The number (n, F) of each feature from maps (n, H, W) that are constant on the cells of a label map (H, W)."""
    found = torch.stack([maps[:, label == f][:, 0] for f in range(int(label.max()) + 1)], 1)
    assert torch.equal(maps, found[:, label])
    return found


def numbers(method: Method, score: Score, x: Tensor) -> Tensor:
    """The numbers of the features of a score of one image and ``CELLS``, (n, F)."""
    return of_features(method.attribute(score, x).map, score.pictures["cells"][0, 0])


def seen_by(net: nn.Module, run: Callable[[], Attribution]) -> tuple[Attribution, list[Tensor]]:
    """What ``run`` gives, and the batches that the network got meanwhile."""
    seen: list[Tensor] = []
    handle = net.register_forward_pre_hook(lambda _net, given: seen.append(given[0].detach().clone()))
    try:
        return run(), seen
    finally:
        handle.remove()


def over_seeds(method: Method, score: Score, x: Tensor, seeds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of runs by different seeds on one image: numbers (seeds, n, F), standard errors (seeds, n), forwards (seeds,)."""
    label, found = score.pictures["cells"][0, 0], []
    for seed in range(seeds):
        one = method.attribute(replace(score, seed=seed, memo={}, scales={}), x)
        found.append((of_features(one.map, label), one.extras["standard_error"], one.extras["forwards"][0]))
    maps, errors, forwards = zip(*found, strict=True)
    return torch.stack(maps), torch.stack(errors), torch.stack(forwards)


def honesty(maps: Tensor, errors: Tensor, limit: Tensor) -> Tensor:
    """How far estimates (seeds, n, F) lie from their limit (n, F), by the standard errors (seeds, n) given: (n,)."""
    return (maps - limit).square().mean((0, 2)).sqrt() / errors.square().mean(0).sqrt()


class Fitted(Model):
    """sklearn's linear model for captum, in float64."""

    def __init__(self, model: Ridge | LinearRegression) -> None:
        self.model = model

    def fit(self, train_data: Iterable[Sequence[Tensor]], **_: object) -> None:
        ((x, y, weight),) = train_data
        self.model.fit(x.numpy(), y.numpy(), sample_weight=weight.numpy())

    def representation(self) -> Tensor:
        return torch.from_numpy(self.model.coef_)[None]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.model.predict(x.numpy()))


def captum_in_double(patch: pytest.MonkeyPatch) -> None:
    """captum rounds samples, scores and maps to float32 on its way; not so here."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(torch, "float", torch.float64)


# ---- what holds for all three ------------------------------------------------------------------------------------


def rows_and_images_do_not_need_company(method: Method, net: nn.Module, x: Tensor, *labels: Tensor) -> None:
    """Three images of different numbers of features, one of three rows: each as it is alone, in any micro-batch."""
    target, image = [1, 0, 2, 3, 1], [0, 0, 0, 1, 2]
    score = celled(bound(net, x, target, image), *labels).scaled(method.scale)
    whole = method.attribute(score, x)
    assert len({int(label.max()) for label in labels}) == 3
    for micro_batch in (1, 7):
        small = celled(bound(net, x, target, image, micro_batch), *labels).scaled(method.scale)
        again = method.attribute(small, x)
        assert_close(again.map, whole.map, rtol=1e-9, atol=1e-13)
    for row, (t, i) in enumerate(zip(target, image, strict=True)):
        one = replace(bound(net, x[i : i + 1], [t]), keys=[f"image-{i}"])
        alone = method.attribute(celled(one, labels[i]).scaled(method.scale), x[i : i + 1])
        assert_close(alone.map[0], whole.map[row], rtol=1e-9, atol=1e-13)
        assert alone.extras.keys() == whole.extras.keys()
        for name, values in alone.extras.items():
            assert_close(values[0], whole.extras[name][row], rtol=1e-7, atol=1e-13)
        assert not torch.isnan(whole.map).any()


def single_precision_is_near(method: Method, net: nn.Module, x: Tensor) -> None:
    rows = {"target": [1, 0, 2], "image": [0, 0, 1]}
    expected = method.attribute(bound(net, x, **rows).scaled(method.scale), x).map
    single = bound(deepcopy(net).float(), x.float(), **rows).scaled(method.scale)
    found = method.attribute(single, x.float())
    assert found.map.dtype == torch.float32
    assert_close(found.map.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def maps_can_be_differentiated(method: Method, net: nn.Module, x: Tensor, weight: str) -> None:
    """By pixels and by a weight, against central differences."""
    score = bound(net, x, [0, 1, 2], [0, 0, 1]).scaled(method.scale)
    graph = replace(score, create_graph=True, memo={}, scales={})
    pixels, own = x.clone().requires_grad_(), net.get_parameter(weight)
    steps = images(*x.shape, seed=5), images(*own.shape, seed=6)

    def loss(score: Score, pixels: Tensor) -> Tensor:
        maps = method.attribute(replace(score, memo={}, scales={}), pixels).map
        return (maps / 1e-3).square().mean()

    slopes = torch.autograd.grad(loss(graph, pixels), (pixels, own))
    by_pixels, by_weight = [], []
    for sign in (1, -1):
        by_pixels.append(loss(score, x + sign * 1e-5 * steps[0]))
        other = deepcopy(net)
        other.get_parameter(weight).data += sign * 1e-5 * steps[1]
        by_weight.append(loss(score.using(other), x))
    for slope, step, (up, down) in zip(slopes, steps, (by_pixels, by_weight), strict=True):
        assert slope.abs().max() > 0
        assert_close((slope * step).sum(), (up - down) / 2e-5, rtol=1e-4, atol=1e-12)
