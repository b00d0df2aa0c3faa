"""RISE: masks against other implementations' ways to make them, maps against literal sums, errors against truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.transform import resize
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Weighted, bound, images, made

from xcli import draws
from xcli.baselines import Removal
from xcli.errors import ConfigError
from xcli.methods.perturbation import rise
from xcli.methods.perturbation.rise import RISE
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
"""Rows about images 0, 0, 1 and 2."""
SIZES = [(14, 21), (13, 9), (8, 8), (5, 16)]


# ---- literal masks ------------------------------------------------------------------------------------------------


def numbers(method, score, image, count):
    """What the masks of one image are made of: grids, and a number in (0, 1) for the offset along each side."""
    seed = score.seeds(torch.tensor([image]), "rise").expand(count)
    number = draws.uniform(draws.sampled(seed, torch.arange(count)), method.cells**2 + 2)
    grid = (number[:, 2:] < method.keep).double().view(count, method.cells, method.cells)
    return zip(grid, number[:, 0].tolist(), number[:, 1].tolist())


def as_the_authors(grid, size, down, right):
    """explanations.py: resized by scikit-image, cut at an offset below the cell size."""
    cell = [math.ceil(side / len(grid)) for side in size]
    large = resize(
        grid.numpy(),
        [(len(grid) + 1) * one for one in cell],
        order=1,
        mode="reflect",
        anti_aliasing=False,
    )
    return cut(torch.from_numpy(large), size, int(down * cell[0]), int(right * cell[1]))


def as_torchray(grid, size, down, right):
    """rise.py there: a frame of mirrored cells, cells of the size that the picture and one of its cells need."""
    cell = [math.ceil(side / len(grid)) for side in size]
    long = [side + one for side, one in zip(size, cell)]
    own = [math.ceil(one / len(grid)) for one in long]
    framed = F.pad(grid[None, None], (1, 1, 1, 1), mode="reflect")
    large = F.interpolate(
        framed, [one * (len(grid) + 2) for one in own], mode="bilinear", align_corners=False
    )[0, 0]
    large = cut(large, long, *own)
    return cut(large, size, int(down * cell[0]), int(right * cell[1]))


def as_xplique(grid, size, down, right):
    """rise.py there: resized as TensorFlow does, at an offset that leaves the picture inside."""
    long = [int(side * (1.0 + 1.0 / len(grid))) for side in size]
    large = F.interpolate(grid[None, None], long, mode="bilinear", align_corners=False)[0, 0]
    return cut(large, size, int(down * (long[0] - size[0] + 1)), int(right * (long[1] - size[1] + 1)))


def cut(large, size, top, left):
    found = large[top : top + size[0], left : left + size[1]]
    assert found.shape == tuple(size)
    return found


LITERAL = {"rise": as_the_authors, "torchray": as_torchray, "xplique": as_xplique}


def masks(method, score, x, image):
    """All masks of one image, one by one."""
    make = LITERAL[method.drawn]
    parts = numbers(method, score, image, method.masks)
    return torch.stack([make(grid, x.shape[2:], down, right) for grid, down, right in parts])


def weighed(method, net, score, x, other=0.0):
    """The map as a literal sum over explicit masks."""
    maps = []
    for target, image in zip(ROWS["target"], ROWS["image"]):
        mask = masks(method, score, x, image)
        own = mask[:, None]
        with torch.no_grad():
            number = net(x[image] * own + other * (1 - own))
        number = number.sigmoid() if method.logistic else number
        total = (number[:, target, None, None] * mask).sum(0)
        match method.normalise:
            case "expectation":
                maps.append(total / (method.masks * method.keep))
            case "count":
                maps.append(total / method.masks)
            case _:
                maps.append(total / (mask.sum(0) + method.eps))
    return torch.stack(maps)


@pytest.mark.parametrize("cells", [2, 4, 6])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("drawn", LITERAL)
def test_masks_are_those_of_the_other_implementation(drawn, size, cells):
    x, method = images(2, 1, *size), RISE(drawn=drawn, cells=cells, keep=0.4, masks=24)
    score = bound(made(PooledLinear), images(2, 3, 8, 6), [0, 1])
    design = method.design(score, x)
    for image in range(2):
        sample = torch.arange(24)
        grid, down, right = design.parts(torch.full_like(sample, image), sample)
        assert set(grid.unique().tolist()) == {0, 1}
        assert_close(down @ grid @ right.mT, masks(method, score, x, image), **EXACT)


@pytest.mark.parametrize("drawn", LITERAL)
@pytest.mark.parametrize("side", [7, 12, 224])
def test_every_offset_can_be_drawn_and_no_other(drawn, side):
    cells = 4
    cell = math.ceil(side / cells)
    shifts = int(side * (1 + 1 / cells)) - side + 1 if drawn == "xplique" else cell
    basis = rise.upsampling(side, cells, drawn, images(1))
    assert basis.shape == (shifts, side, cells)
    assert_close(basis.sum(2), torch.ones(shifts, side, dtype=torch.float64), **EXACT)
    assert basis.min() >= 0
    for shift in range(1, shifts):
        assert torch.equal(basis[shift, :-1], basis[shift - 1, 1:])


@pytest.mark.parametrize("drawn", LITERAL)
def test_a_grid_of_one_cell_shows_all_or_nothing(drawn):
    x, method = images(1, 3, 6, 5), RISE(drawn=drawn, cells=1, masks=30)
    grid, down, right = method.design(bound(made(Residual), x, [0]), x).parts(
        torch.zeros(30, dtype=torch.long), torch.arange(30)
    )
    assert torch.equal(down @ grid @ right.mT, grid.expand(30, 6, 5))
    assert set(grid.flatten().tolist()) == {0, 1}


# ---- draws --------------------------------------------------------------------------------------------------------


def test_cells_are_seen_with_their_probability_and_offsets_are_even_and_independent():
    x, count = images(2, 1, 21, 10), 6000
    method = RISE(cells=3, keep=0.3, masks=count)
    score = bound(made(PooledLinear), images(2, 3, 8, 6), [0, 1])
    design, words = method.design(score, x), []
    for image in range(2):
        sample = torch.arange(count)
        grid, down, right = design.parts(torch.full_like(sample, image), sample)
        mean = (down @ grid @ right.mT).mean(0)
        assert (mean - 0.3).abs().max() < 4 * math.sqrt(0.21 / count)
        offsets = [
            (part[:, None] == basis).flatten(2).all(2).int().argmax(1)
            for part, basis in zip((down, right), design.bases)
        ]
        for offset, cell in zip(offsets, (7, 4)):
            share = torch.bincount(offset, minlength=cell) / count
            assert len(share) == cell
            assert_close(share, torch.full((cell,), 1 / cell), rtol=0, atol=4 / math.sqrt(4 * count))
        words += [*grid.flatten(1).T, *(offset.double() for offset in offsets)]
    alike = torch.corrcoef(torch.stack(words))
    assert (alike - torch.eye(22)).abs().max() < 5 / math.sqrt(count)


def test_masks_belong_to_the_seed_the_image_and_their_number_and_to_nothing_else():
    net, x = made(Residual), images(3, 3, 9, 7)
    score, method = bound(net, x, **ROWS), RISE(masks=40, cells=3)
    whole = method.attribute(score, x).map
    for micro_batch in (1, 7):
        small = method.attribute(bound(net, x, **ROWS, micro_batch=micro_batch), x).map
        assert_close(small, whole, **EXACT)
    turned = replace(bound(net, x.flip(0), [2, 0, 3, 1], [0, 1, 2, 2]), keys=score.keys[::-1])
    assert_close(method.attribute(turned, x.flip(0)).map.flip(0), whole, **EXACT)
    alone = replace(bound(net, x[2:], [2]), keys=score.keys[2:])
    assert_close(method.attribute(alone, x[2:]).map, whole[3:], **EXACT)
    for other in (replace(score, seed=1), replace(score, keys=["a", "b", "c"])):
        assert (method.attribute(other, x).map - whole).abs().amax((1, 2)).min() > 1e-3 * whole.abs().max()
    same = method.attribute(bound(net, x[[0, 0, 0]], [1, 1, 1]), x[[0, 0, 0]]).map
    assert (same[0] - same[1]).abs().max() > 1e-3 * whole.abs().max()  # another key, another draw


@pytest.mark.parametrize("normalise", ["expectation", "count", "coverage"])
def test_the_first_masks_of_many_are_those_of_few(normalise):
    net, x = made(Residual), images(3, 3, 9, 7)
    score = bound(net, x, **ROWS)
    few = RISE(masks=30, cells=3, normalise=normalise)
    mask = torch.stack([masks(replace(few, masks=60), score, x, image)[:30] for image in range(3)])
    with torch.no_grad():
        number = torch.stack([net(x[i] * mask[i][:, None]) for i in range(3)])[
            ROWS["image"], :, ROWS["target"]
        ]
    own = mask[ROWS["image"]]
    total = (number[:, :, None, None] * own).sum(1)
    below = {"expectation": 15.0, "count": 30.0, "coverage": own.sum(1)}[normalise]
    assert_close(few.attribute(score, x).map, total / below, **EXACT)


# ---- maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logistic", [False, True])
@pytest.mark.parametrize("normalise", ["expectation", "count", "coverage"])
@pytest.mark.parametrize("drawn", LITERAL)
def test_maps_are_the_sum_of_masks_weighed_by_scores(drawn, normalise, logistic):
    net, x = made(Residual), images(3, 3, 13, 9)
    score = bound(net, x, **ROWS)
    method = RISE(masks=35, cells=4, keep=0.4, drawn=drawn, normalise=normalise, logistic=logistic, eps=0.01)
    found = method.attribute(score, x)
    assert_close(found.map, weighed(method, net, score, x), **EXACT)
    assert found.extras["forwards"].tolist() == [35] * 4


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("paper", (4000, 7, 0.5, "rise", "expectation", 0.0, False)),
        ("rise-o", (6000, 8, 0.1, "rise", "expectation", 0.0, False)),
        ("torchray", (8000, 7, 0.5, "torchray", "count", 0.0, True)),
        ("xplique", (4000, 7, 0.5, "xplique", "coverage", 1e-4, False)),
    ],
)
def test_presets_are_what_the_implementations_do(preset, options):
    net, x = made(Residual), images(3, 3, 13, 9)
    score = bound(net, x, **ROWS)
    method = build({"name": "rise", "preset": preset})
    names = ("masks", "cells", "keep", "drawn", "normalise", "eps", "logistic")
    assert tuple(getattr(method, name) for name in names) == options
    small = build({"name": "rise", "preset": preset, "masks": 25})
    assert_close(small.attribute(score, x).map, weighed(small, net, score, x), **EXACT)
    # whatever unit the run asks for, torchray's is the logistic function of the logit
    other = small.attribute(score.scaled("probability"), x).map
    assert torch.equal(other, small.attribute(score, x).map) == (preset == "torchray")


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_neither_the_blocks_nor_the_size_of_products_change_the_map(chunk, monkeypatch):
    net, x = made(Residual), images(3, 3, 13, 9)
    score, method = bound(net, x, **ROWS), RISE(masks=35, cells=4)
    expected = weighed(method, net, score, x)
    monkeypatch.setattr(rise, "AT_ONCE", chunk)
    assert_close(method.attribute(score, x).map, expected, **EXACT)
    monkeypatch.setattr(rise, "BLOCKS", 5)
    assert_close(method.attribute(score, x).map, expected, **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"value": -0.7},
        {"substrate": "mean"},
        {"substrate": "blur", "kernel": 5, "sigma": 2.0},
        {"substrate": "gaussian"},
    ],
)
def test_where_a_mask_is_below_one_the_substrate_shows(options):
    net, x = made(Residual), images(3, 3, 13, 9)
    score, method = bound(net, x, **ROWS), RISE(masks=25, cells=4, **options)
    whole = Removal(**options).whole(score, x)
    if options.get("substrate") == "mean":
        assert_close(whole, x.mean((2, 3), keepdim=True).expand(x.shape), **EXACT)
    found, maps = method.attribute(score, x).map, []
    for target, image in zip(ROWS["target"], ROWS["image"]):
        mask = masks(method, score, x, image)
        own = mask[:, None]
        with torch.no_grad():
            number = net(x[image] * own + whole[image] * (1 - own))[:, target]
        maps.append((number[:, None, None] * mask).sum(0) / (25 * 0.5))
    assert_close(found, torch.stack(maps), **EXACT)
    plain = RISE(masks=25, cells=4).attribute(score, x).map
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()


# ---- known answers ------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.7123, -2.0], dtype=torch.float64))

    def forward(self, x):
        return self.bias.expand(len(x), 2) + 0 * x.sum((1, 2, 3))[:, None]


def test_a_constant_score_is_flat_under_coverage_and_shows_the_surplus_of_masks_otherwise():
    net, x = Constant(), images(2, 3, 12, 10)
    score = bound(net, x, [0, 1])
    flat = RISE(masks=60, normalise="coverage").attribute(score, x)
    expected = torch.tensor([0.7123, -2.0], dtype=torch.float64)[:, None, None]
    assert_close(flat.map, expected.expand(2, 12, 10), rtol=1e-12, atol=0)
    assert flat.extras["standard_error"].max() < 1e-12
    for normalise, mean in (("expectation", 1.0), ("count", 0.5)):
        found = RISE(masks=60, normalise=normalise).attribute(score, x).map
        coverage = torch.stack([masks(RISE(masks=60), score, x, image).mean(0) for image in range(2)])
        assert_close(found, expected * coverage * 2 * mean, **EXACT)
        assert (found.amax((1, 2)) - found.amin((1, 2))).min() > 0.05


def test_pixels_that_no_mask_showed_are_zero_and_do_not_spoil_the_error():
    net, x = made(Residual), images(3, 3, 14, 14)
    score, method = bound(net, x, **ROWS), RISE(masks=10, keep=0.01, normalise="coverage")
    unseen = torch.stack([masks(method, score, x, image).sum(0) == 0 for image in range(3)])[ROWS["image"]]
    assert unseen.any()
    found = method.attribute(score, x)
    assert (found.map[unseen] == 0).all()
    assert found.map.isfinite().all()
    assert found.extras["standard_error"].isfinite().all()


@pytest.mark.parametrize("drawn", LITERAL)
@pytest.mark.parametrize("normalise", ["expectation", "coverage"])
def test_the_maximum_lies_in_the_region_that_the_model_looks_at(normalise, drawn):
    weight = torch.zeros(2, 28, 24, dtype=torch.float64)
    weight[0, 16:22, 4:9] = 1
    weight[1, 3:9, 14:20] = 1
    x = 1 + 0.1 * images(1, 3, 28, 24)
    method = RISE(masks=1500, normalise=normalise, drawn=drawn)
    found = method.attribute(bound(Weighted(weight), x, [0, 1], [0, 0]), x).map
    for row in range(2):
        top, left = divmod(int(found[row].argmax()), 24)
        assert weight[row, top, left] == 1


def expected_map(size, cells, keep, terms):
    """The map of a linear model in the limit, for ``terms`` (H, W) of its score.

    E[M_u M_v] = p^2 + p (1 - p) K_u K_v, K a product over sides of the mean over offsets of D D^T.
    """
    kernels = []
    for side in size:
        cell, long = math.ceil(side / cells), (cells + 1) * math.ceil(side / cells)
        large = resize(np.eye(cells), (long, cells), order=1, mode="reflect", anti_aliasing=False)
        shifted = [torch.from_numpy(large[shift : shift + side]) for shift in range(cell)]
        kernels.append(sum(one @ one.T for one in shifted) / cell)
    both = keep**2 * terms.sum() + keep * (1 - keep) * kernels[0] @ terms @ kernels[1]
    return both / keep


@pytest.mark.soak
@pytest.mark.parametrize("normalise", ["expectation", "coverage"])
def test_the_standard_error_is_the_deviation_from_endless_masks_and_shrinks_with_their_root(normalise):
    """Over 40 seeds, on a linear model, whose map in the limit is known."""
    size, cells, keep = (10, 8), 3, 0.4
    x, weight = 1 + images(1, 3, *size), 1 + images(2, *size, seed=4)
    limit = torch.stack([expected_map(size, cells, keep, one * x[0].sum(0)) for one in weight])
    score, errors, told = bound(Weighted(weight), x, [0, 1], [0, 0]), {}, {}
    for count in (128, 512):
        method = RISE(masks=count, cells=cells, keep=keep, normalise=normalise)
        found = [method.attribute(replace(score, seed=seed), x) for seed in range(40)]
        maps = torch.stack([one.map for one in found])
        errors[count] = (maps - limit).square().mean((0, 2, 3)).sqrt()
        told[count] = torch.stack([one.extras["standard_error"] for one in found]).square().mean(0).sqrt()
        share = errors[count] / told[count]
        assert (share > 0.7).all()
        assert (share < 1.4).all()
        assert ((maps.mean(0) - limit).square().mean((1, 2)).sqrt() < 0.4 * errors[count]).all()
    for either in (errors, told):
        assert (either[128] / either[512] > 1.6).all()
        assert (either[128] / either[512] < 2.5).all()


def test_the_standard_error_is_in_the_unit_of_the_map_and_counts_each_of_its_cells():
    net, x = made(Residual), images(3, 3, 9, 7)
    score = bound(net, x, **ROWS)
    found = {n: RISE(masks=50, cells=3, normalise=n).attribute(score, x) for n in ("count", "expectation")}
    errors = {name: one.extras["standard_error"] for name, one in found.items()}
    assert_close(errors["count"] * 2, errors["expectation"], **EXACT)
    ends = [50 * block // 16 for block in range(17)]
    for row, (target, image) in enumerate(zip(*ROWS.values())):
        mask = masks(RISE(masks=50, cells=3), score, x, image)
        with torch.no_grad():
            each = net(x[image] * mask[:, None])[:, target, None, None] * mask
        mean = each.mean(0)
        sums = [(each[a:b] - mean).sum(0).square() for a, b in itertools.pairwise(ends)]
        expected = (sum(sums) * 16 / 15).mean().sqrt() / 50
        assert_close(errors["count"][row], expected, **EXACT)


@pytest.mark.parametrize("count", [2, 3, 15, 17])
def test_few_masks_still_have_an_error(count):
    net, x = made(Residual), images(3, 3, 9, 7)
    for normalise in ("expectation", "coverage"):
        found = RISE(masks=count, cells=3, normalise=normalise, eps=1e-6).attribute(bound(net, x, **ROWS), x)
        assert (found.extras["standard_error"] > 0).all()
        assert found.map.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"masks": 1}, "masks: Input should be greater than or equal to 2"),
        ({"cells": 0}, "cells: Input should be greater than or equal to 1"),
        ({"keep": 0}, "keep: Input should be greater than 0"),
        ({"keep": 1}, "keep: Input should be less than 1"),
        ({"eps": -1}, "eps: Input should be greater than or equal to 0"),
        ({"drawn": "captum"}, "drawn: Input should be 'rise', 'torchray' or 'xplique'"),
        ({"normalise": "sum"}, "normalise: Input should be"),
        ({"mask": 3}, "rise has no option 'mask'; did you mean 'masks'"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build({"name": "rise", **wrong})
