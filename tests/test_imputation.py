"""Imputation: against dense linear algebra written out pixel by pixel, against grad-cam, and where it is known."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from toys import images

from xcli import multigrid
from xcli.imputation import TOLERANCE, dissected, impute, iterated, suggested

SOLVERS = ("exact", "multigrid")


def literal(image, removed):
    """One image (C, H, W) by the definition: an equation a pixel, dense."""
    channels, height, width = image.shape
    places = [(i, j) for i in range(height) for j in range(width) if removed[i, j]]
    number = {place: n for n, place in enumerate(places)}
    a, b = np.zeros((len(places), len(places))), np.zeros((len(places), channels))
    for n, (i, j) in enumerate(places):
        for di, dj in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
            k, l = i + di, j + dj  # noqa: E741
            if not (0 <= k < height and 0 <= l < width):
                continue
            weight = 1 / 12 if di and dj else 1 / 6
            a[n, n] += weight
            if removed[k, l]:
                a[n, number[k, l]] -= weight
            else:
                b[n] += weight * image[:, k, l].numpy()
    filled = image.clone()
    filled[:, removed] = torch.from_numpy(np.linalg.solve(a, b)).T
    return filled


def scattered(share, *shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def smooth(share, height, width, seed=0):
    """The highest share of an up-sampled 7 x 7 grid of noise, as heat-maps are."""
    maps = F.interpolate(images(1, 1, 7, 7, seed=seed), size=(height, width), mode="bilinear")[:, 0]
    return maps >= maps.flatten().sort().values[int((1 - share) * maps.numel())]


def block(height, width):
    """One hole of 90 %, open to two sides."""
    removed = torch.zeros(1, height, width, dtype=torch.bool)
    removed[:, : round(height * 0.9487), : round(width * 0.9487)] = True
    return removed


def grid(height, width, step):
    """Walls of single pixels that are kept."""
    removed = torch.ones(1, height, width, dtype=torch.bool)
    removed[:, ::step] = False
    removed[:, :, ::step] = False
    return removed


def two_known(height, width):
    removed = torch.ones(1, height, width, dtype=torch.bool)
    removed[:, 1, 2] = removed[:, height - 3, width - 2] = False
    return removed


def natural(height, width, seed=0):
    """Something with structure of every size, on (1, 3, H, W)."""
    x = images(1, 3, height, width, seed=seed).cumsum(2).cumsum(3)
    return x / x.std() + 3


@cache
def exact(name, height, width):
    return impute(natural(height, width), MASKS[name](height, width), "exact")[0]


MASKS = {
    "scattered 10": lambda h, w: scattered(0.1, 1, h, w),
    "scattered 30": lambda h, w: scattered(0.3, 1, h, w),
    "scattered 90": lambda h, w: scattered(0.9, 1, h, w),
    "scattered 99": lambda h, w: scattered(0.99, 1, h, w),
    "smooth 20": lambda h, w: smooth(0.2, h, w),
    "smooth 80": lambda h, w: smooth(0.8, h, w),
    "block": block,
    "walls": lambda h, w: grid(h, w, 5),
    "long walls": lambda h, w: grid(h, w, h // 2),
    "two known": two_known,
}


# --- against the definition ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(9, 12), (26, 31)])
def test_imputation_is_the_dense_solution(name, size, solver):
    x, removed = natural(*size), MASKS[name](*size)
    filled, error = impute(x, removed, solver)
    expected = literal(x[0], removed[0])
    assert_close(filled[0], expected, rtol=0, atol=1e-10 if solver == "exact" else 2 * TOLERANCE * 20)
    off = float((filled[0] - expected).abs().max() / (x.max() - x.min()))
    assert off <= float(error) + 1e-12
    assert float(error) <= (1e-12 if solver == "exact" else TOLERANCE)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(37, 53), (224, 224)])
def test_multigrid_states_an_error_that_holds(name, size):
    x, removed = natural(*size), MASKS[name](*size)
    filled, error = impute(x, removed, "multigrid")
    off = float((filled - exact(name, *size)).abs().max() / (x.max() - x.min()))
    assert off <= float(error) <= TOLERANCE


@pytest.mark.parametrize("size", [(224, 224), (37, 53)])
def test_every_pixel_is_the_mean_of_its_neighbours(size):
    removed = block(*size)
    filled = exact("block", *size)
    mean = suggested(filled) / suggested(torch.ones(size, dtype=torch.float64))
    assert_close((filled - mean)[:, :, removed[0]].abs().max().item(), 0.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("masks", [scattered, smooth])
def test_imputation_equals_grad_cams(masks, share):
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    x = natural(24, 31).float()
    removed = scattered(share, 1, 24, 31) if masks is scattered else smooth(share, 24, 31)
    theirs = NoisyLinearImputer(noise=0)(x[0], (~removed[0]).float())
    assert_close(impute(x, removed)[0][0], theirs, rtol=0, atol=2e-6)


# --- where the answer is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_hole_in_a_ramp_is_filled_with_the_ramp(solver):
    row, column = torch.arange(30.0, dtype=torch.float64)[:, None], torch.arange(20.0, dtype=torch.float64)
    x = torch.stack([2 * row - column, row + 3 * column])[None]
    removed = torch.zeros(1, 30, 20, dtype=torch.bool)
    removed[:, 4:25, 2:18] = True
    filled, _ = impute(x, removed, solver)
    assert_close(filled, x, rtol=0, atol=1e-12 if solver == "exact" else 90 * TOLERANCE)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_removed_pixel_is_the_weighted_mean(solver):
    x = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 99.0, 16.0], [32.0, 64.0, 128.0]]]], dtype=torch.float64)
    middle, corner = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    middle[0, 1, 1] = corner[0, 0, 0] = True
    assert impute(x, middle, solver)[0][0, 0, 1, 1].item() == pytest.approx(
        (2 + 8 + 16 + 64) / 6 + (1 + 4 + 32 + 128) / 12, abs=1e-4 if solver == "multigrid" else 1e-12
    )
    assert impute(x, corner, solver)[0][0, 0, 0, 0].item() == pytest.approx(
        ((2 + 8) / 6 + 99 / 12) / (2 / 6 + 1 / 12), abs=1e-4 if solver == "multigrid" else 1e-12
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_removed_changes_nothing_and_all_removed_is_the_mean_colour(solver):
    x = images(3, 2, 12, 11)
    removed = torch.stack([torch.zeros(12, 11), torch.ones(12, 11), torch.eye(12, 11)]).bool()
    filled, error = impute(x, removed, solver)
    assert torch.equal(filled[0], x[0])
    assert_close(filled[1], x[1].mean((1, 2), keepdim=True).expand(2, 12, 11))
    assert_close(filled[2], literal(x[2], removed[2]), rtol=0, atol=1e-5)
    assert error[:2].tolist() == [0, 0]
    assert impute(x[:0], removed[:0], solver)[0].shape == (0, 2, 12, 11)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 2), (1, 300), (300, 1), (3, 100), (2, 65)])
def test_the_smallest_and_thinnest_images(size, solver):
    x, removed = images(1, 2, *size), torch.ones(1, *size, dtype=torch.bool)
    removed[0, -1, 0] = removed[0, 0, -1] = False
    filled, error = impute(x, removed, solver)
    off = float((filled[0] - literal(x[0], removed[0])).abs().max() / (x.max() - x.min()).clamp_min(1e-9))
    assert off <= float(error) + 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_image_stays_constant(solver):
    filled, error = impute(torch.full((1, 3, 20, 20), 0.7), block(20, 20), solver)
    assert_close(filled, torch.full((1, 3, 20, 20), 0.7))
    assert error.item() <= TOLERANCE


# --- promises --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_company_does_not_matter(solver):
    """Images that need few rounds beside one that needs many; a million times as bright, empty, whole."""
    names = ["scattered 30", "two known", "block", "walls"]
    x = torch.cat([natural(40, 33, seed=seed) for seed in range(4)])
    x[1] *= 1e6
    removed = torch.cat([MASKS[name](40, 33) for name in names])
    filled, error = impute(x, removed, solver)
    for i in range(4):
        alone, own = impute(x[i : i + 1], removed[i : i + 1], solver)
        scale = float(x[i].max() - x[i].min())
        assert_close(
            filled[i : i + 1], alone, rtol=0, atol=1e-10 * scale if solver == "exact" else 1e-8 * scale
        )
        assert_close(error[i : i + 1], own, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_single_precision_stays_single_and_what_is_kept_stays_as_it_was(solver):
    x, removed = natural(50, 40).float(), smooth(0.6, 50, 40)
    filled, error = impute(x, removed, solver)
    assert filled.dtype == error.dtype == torch.float32
    assert torch.equal(filled[:, :, ~removed[0]], x[:, :, ~removed[0]])
    assert_close(filled.double(), impute(x.double(), removed, "exact")[0], rtol=0, atol=1e-5)


def test_multigrid_alone_in_single_precision_states_what_it_reached():
    """As on a device without float64."""
    removed = block(224, 224)
    x = natural(224, 224)
    wide = []
    for dtype in (torch.float32, torch.float64):
        b = suggested(torch.where(removed[:, None], 0, x - x.mean())) * removed[:, None]
        wide.append(iterated(removed[:, None], b.to(dtype), torch.full((1,), 1e-5, dtype=dtype)))
    (single, error), (double, _) = wide
    assert float((single - double).abs().max()) <= float(error) + 2e-5
    assert float(error) <= 1e-4


def test_multigrid_never_comes_to_the_host(monkeypatch):
    x, removed = natural(30, 30), smooth(0.5, 30, 30)

    def refuse(*_args, **_named):
        raise AssertionError("to the host")

    for name in ("cpu", "numpy", "tolist", "item", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    impute(x, removed, "multigrid")
    with pytest.raises(AssertionError, match="to the host"):
        impute(x, removed)  # the CPU's choice is exact


# --- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 4), (13, 20), (37, 53)])
def test_dissection_is_an_order_of_all_pixels(size):
    assert sorted(dissected(*size).tolist()) == list(range(size[0] * size[1]))


def dense(stencil):
    """The matrix (HW, HW) of a stencil (1, 9, H, W)."""
    height, width = stencil.shape[2:]
    unit = torch.eye(height * width, dtype=stencil.dtype).view(1, -1, height, width)
    return multigrid.applied(stencil, unit).flatten(2)[0].T


def stencil_of(removed):
    """That of the imputation, in float64."""
    kept = []
    inner = multigrid.solve
    try:
        multigrid.solve = lambda stencil, b, goal: kept.append(stencil) or (b, goal)
        iterated(removed[:, None], torch.zeros(1, 1, *removed.shape[1:], dtype=torch.float64), torch.zeros(1))
    finally:
        multigrid.solve = inner
    return kept[0]


@pytest.mark.parametrize("size", [(9, 12), (8, 7)])
def test_the_coarser_stencil_is_that_of_the_product(size):
    stencil = stencil_of(smooth(0.7, *size))
    coarser = (size[0] // 2 + 1) * (size[1] // 2 + 1)
    unit = torch.eye(coarser, dtype=torch.float64).view(1, coarser, size[0] // 2 + 1, size[1] // 2 + 1)
    p = multigrid.prolonged(unit, *size).flatten(2)[0].T  # (HW, hw)
    every = torch.eye(size[0] * size[1], dtype=torch.float64).view(1, -1, *size)
    assert_close(multigrid.restricted(every).flatten(2)[0].T, p.T)
    assert_close(dense(multigrid.galerkin(stencil)), p.T @ dense(stencil) @ p)


@pytest.mark.parametrize("name", MASKS)
def test_a_cycle_is_a_good_preconditioner(name):
    """Symmetric, positive definite, and close to the inverse: the error that is left by one cycle is below a half."""
    removed = MASKS[name](26, 21)
    stencil, own = stencil_of(removed), removed[0].flatten()
    unit = torch.eye(546, dtype=torch.float64).view(1, 546, 26, 21)
    found = multigrid.cycle(multigrid.coarsened(stencil), unit).flatten(2)[0][own][:, own]
    assert_close(found, found.T, rtol=0, atol=1e-6)
    half = torch.linalg.cholesky(dense(stencil)[own][:, own])
    share = torch.linalg.eigvalsh(half.T @ (found + found.T) @ half / 2)
    assert share.min() > 0.5
    assert share.max() < 1 + 1e-4
