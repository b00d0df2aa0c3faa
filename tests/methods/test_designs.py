"""Masks of cells: their points against scipy, their cells and what they do to a picture against literal formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from scipy.stats import qmc
from toys import SumModel, bound, images

from xcli.errors import ConfigError
from xcli.methods.perturbation.designs import (
    MOST_SOBOL,
    box_blurred,
    cell_grid,
    halton_points,
    largest_base,
    points,
)
from xcli.methods.perturbation.hsic import HSIC
from xcli.methods.perturbation.sobol import Sobol
from xcli.registry import build
from xcli.targets import ClassRows

CPU = torch.device("cpu")


def scored(x, image=None, seed=0):
    """A score of rows about the images ``image``, all where left out; only its keys, seed and rows matter here."""
    image = list(range(len(x))) if image is None else image
    return replace(bound(SumModel(), x, [0] * len(image), image), seed=seed)


def drawn(kind, count, dimensions, pictures=3, **how):
    """Points (B or 1, count, dimensions) for some pictures."""
    return points(kind, count, dimensions, scored(images(pictures, 1, 16, 16), **how), "some", CPU)


def masks(method, score, x, image):
    """All masks (S, cells) of an image, as its design has them."""
    design = method.design(score, x)
    sample = torch.arange(int(design.count[image]))
    return design.cells(torch.full_like(sample, image), sample)


# ---- points ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The balance properties")
@pytest.mark.parametrize("count", [1, 2, 7, 32, 500])
@pytest.mark.parametrize("dimensions", [1, 18, 128])
def test_sequences_are_those_of_scipy_from_the_origin_on(count, dimensions):
    for kind, peer in (("sobol", qmc.Sobol), ("halton", qmc.Halton)):
        expected = peer(dimensions, scramble=False).random(count)
        found = drawn(kind, count, dimensions) if kind == "sobol" else halton_points(count, dimensions)[None]
        assert found.dtype == torch.float64
        assert found.shape == (1, count, dimensions)
        assert np.array_equal(found[0].numpy(), expected)
        assert not found[0, 0].any()


@pytest.mark.parametrize("kind", ["sobol", "halton"])
def test_sequences_are_the_same_for_every_image_and_seed(kind):
    x = images(3, 1, 16, 16)
    method = Sobol(grid=2, samples=20, points=kind)
    first = masks(method, scored(x), x, 0)
    assert all(torch.equal(masks(method, scored(x, seed=s), x, i), first) for s in (0, 5) for i in (1, 2))


@pytest.mark.parametrize("count", [2, 25, 400])
def test_a_latin_hypercube_has_one_point_in_each_slice_of_every_dimension(count):
    found = drawn("lhs", count, 12)
    assert found.shape == (3, count, 12)
    slices = (found * count).floor().sort(1).values
    assert torch.equal(slices, torch.arange(count).double()[:, None].expand_as(slices))
    assert len({tuple(one.tolist()) for one in (found * count).floor().permute(0, 2, 1).flatten(0, 1)}) > (
        30 if count > 2 else 1  # dimensions are shuffled by themselves
    )


def test_a_latin_hypercube_is_uniform_inside_its_slices_and_its_dimensions_are_independent():
    found = drawn("lhs", 400, 12)
    within = (found * 400) % 1
    for one in within.permute(0, 2, 1).flatten(0, 1):
        assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(within.flatten().numpy(), "uniform").pvalue > 1e-3
    independent(found)
    independent(within)
    for slices, inside in zip((found * 400).floor().mT.flatten(0, 1), within.mT.flatten(0, 1), strict=True):
        assert torch.corrcoef(torch.stack([slices, inside]))[0, 1].abs() < 4.5 / 400**0.5


def test_random_points_are_uniform_and_independent_and_no_hypercube():
    found = drawn("random", 400, 12)
    assert found.shape == (3, 400, 12)
    assert ((found > 0) & (found < 1)).all()
    for one in found.permute(0, 2, 1).flatten(0, 1):
        assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-4
        filled = (one * 400).long().unique()
        assert len(filled) / 400 == pytest.approx(1 - 1 / np.e, abs=0.08)
    assert stats.kstest(found.flatten().numpy(), "uniform").pvalue > 1e-3
    independent(found)


def independent(found):
    """Correlations between all dimensions of all images (B, n, D), and of each with itself a step on, are small."""
    table = found.permute(0, 2, 1).flatten(0, 1)
    between = torch.corrcoef(table) - torch.eye(len(table))
    assert between.abs().max() < 4.5 / table.shape[1] ** 0.5
    assert between.square().mean().sqrt() < 1.2 / table.shape[1] ** 0.5
    stepped = torch.stack([torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1] for one in table])
    assert stepped.abs().max() < 4.5 / table.shape[1] ** 0.5


@pytest.mark.parametrize("kind", ["lhs", "random"])
@pytest.mark.parametrize("method", [Sobol(grid=3, samples=10), HSIC(grid=3, samples=20, kernel="rbf")])
def test_points_are_drawn_by_image_and_seed_not_by_company_or_order(kind, method):
    method = replace(method, points=kind)
    x = images(5, 1, 16, 16)
    whole = [masks(method, scored(x), x, i) for i in range(5)]
    for i in range(5):
        assert all(not torch.equal(whole[i], whole[j]) for j in range(i))
    rows = scored(x, [3, 3])  # the last image has no row, nor have the first ones
    assert torch.equal(masks(method, rows, x, 3), whole[3])
    rows = scored(x, [0])
    assert torch.equal(masks(method, rows, x, 0), whole[0])
    alone = replace(scored(x[3:4]), keys=["image-3"])
    assert torch.equal(masks(method, alone, x[3:4], 0), whole[3])
    turned = replace(scored(x.flip(0)), keys=[f"image-{i}" for i in reversed(range(5))])
    for i in range(5):
        assert torch.equal(masks(method, turned, x.flip(0), 4 - i), whole[i])
    other = masks(method, scored(x, seed=1), x, 3)
    assert (other != whole[3]).double().mean() > 0.9
    assert torch.equal(masks(method, scored(x, seed=1), x, 3), other)


def test_a_score_without_rows_gets_no_maps():
    x = images(2, 1, 16, 16)
    nobody = torch.zeros(0, dtype=torch.long)
    score = replace(scored(x), rows=ClassRows(nobody, nobody))
    for kind in ("sobol", "halton", "lhs", "random"):
        for method in (Sobol(grid=2, samples=20, points=kind), HSIC(grid=2, samples=20, points=kind)):
            assert len(method.attribute(score, x).map) == 0


# ---- cells -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (31, 16), (8, 29)])
@pytest.mark.parametrize("cells", [1, 2, 3, 5, 7, 8])
def test_cells_are_masks_upsampled_by_nearest_pixels(size, cells):
    x = images(2, 3, *size)
    cell = cell_grid(x, cells)
    for row in range(size[0]):
        for column in range(size[1]):
            down, right = (int((at + 0.5) * cells / side) for at, side in zip((row, column), size))
            assert cell[row, column] == down * cells + right
    mask = torch.rand(4, cells * cells, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grown = torch.nn.functional.interpolate(mask.view(4, 1, cells, cells), size, mode="nearest-exact")[:, 0]
    assert torch.equal(mask[:, cell], grown)
    down, across = (cell // cells)[:, 0].bincount(), (cell % cells)[0].bincount()
    assert len(down) == len(across) == cells
    assert max(down.max() - down.min(), across.max() - across.min()) <= 1


@pytest.mark.parametrize("name", ["sobol", "hsic"])
@pytest.mark.parametrize("size", [(16, 28), (23, 17)])
def test_maps_have_the_cell_that_matters_at_its_place(name, size):
    method = build({"name": name, "grid": 4, "samples": 64})
    x = torch.ones(1, 1, *size, dtype=torch.float64)
    for row, column in ((0, 3), (2, 1), (3, 3)):

        class OneCell(torch.nn.Module):
            def forward(self, x, row=row, column=column):
                rows, columns = (((torch.arange(side) + 0.5) * 4 / side).int() for side in size)
                return x[:, 0, rows == row][:, :, columns == column].mean((1, 2))[:, None] + 1

        found = method.attribute(bound(OneCell(), x, [0]), x).map[0]
        assert found.shape == (4, 4)
        best = int(found.argmax())
        assert (best // 4, best % 4) == (row, column)
        assert found[row, column] > 5 * found.flatten().sort().values[-2]
        sized = method.explain(bound(OneCell(), x, [0]), x, size).map[0]
        assert sized.shape == size


@pytest.mark.parametrize("name", ["sobol", "hsic"])
@pytest.mark.parametrize("size", [(8, 30), (30, 8)])
def test_a_grid_has_at_most_as_many_cells_as_the_shorter_side_has_pixels(name, size):
    x = images(1, 1, *size)
    score = scored(x)
    assert build({"name": name, "grid": 8, "samples": 2}).attribute(score, x).map.shape == (1, 8, 8)
    with pytest.raises(ConfigError, match=rf"grid of 9 x 9 cells .* {size[0]} x {size[1]} pixels"):
        build({"name": name, "grid": 9, "samples": 2}).attribute(score, x)


@pytest.mark.parametrize(("method", "side"), [(Sobol, 103), (HSIC, 146)])
def test_the_sobol_sequence_ends_at_its_last_dimension_and_the_message_names_a_smaller_grid(method, side):
    x = torch.zeros(1, 1, side, side)
    dimensions = side**2 * (2 if method is Sobol else 1)
    assert dimensions > MOST_SOBOL > dimensions - 500
    with pytest.raises(ConfigError, match=rf"{MOST_SOBOL} dimensions.*smaller grid"):
        method(grid=side, samples=2, points="sobol").attribute(scored(x), x)
    for kind in ("lhs", "random"):
        shape = method(grid=side, samples=2, points=kind).design(scored(x), x).points.shape
        assert shape == (1, 2, dimensions)
    assert drawn("sobol", 2, MOST_SOBOL).shape == (1, 2, MOST_SOBOL)


# ---- what a mask does to a picture -------------------------------------------------------------------------------

LITERAL = {
    "inpainting": lambda pixel, mask, blurred, sigma: pixel * mask,
    "blurring": lambda pixel, mask, blurred, sigma: mask * pixel + (1 - mask) * blurred,
    "amplitude": lambda pixel, mask, blurred, sigma: pixel * (mask - 0.5) * sigma,
    "shift": lambda pixel, mask, blurred, sigma: pixel + (mask - 0.5) * sigma,
}


@pytest.mark.parametrize("perturbation", LITERAL)
@pytest.mark.parametrize("name", ["sobol", "hsic"])
def test_each_perturbation_is_its_formula_pixel_by_pixel(name, perturbation):
    options = {"grid": 3, "samples": 6, "window": 4, "sigma": 1.7, "points": "random", "binary_masks": False}
    if name == "sobol":
        del options["binary_masks"]
    method = build({"name": name, "perturbation": perturbation, **options})
    if name == "hsic":
        method = replace(method, kernel="rbf")
    x = images(3, 2, 11, 13)
    design = method.design(scored(x), x)
    image, sample = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([0, 0, 5, 3, 2])
    found, mask = design.altered(image, sample), design.cells(image, sample)
    assert ((mask > 0) & (mask < 1)).all()
    for copy, i in enumerate(image.tolist()):
        for channel in range(2):
            plain = x[i, channel].numpy()
            blurred = ndimage.uniform_filter(plain, 4, mode="mirror")
            for row in range(11):
                for column in range(13):
                    here = float(mask[copy, int((row + 0.5) * 3 / 11) * 3 + int((column + 0.5) * 3 / 13)])
                    expected = LITERAL[perturbation](plain[row, column], here, blurred[row, column], 1.7)
                    assert float(found[copy, channel, row, column]) == pytest.approx(expected, abs=1e-13)


def test_masks_take_the_precision_of_the_images():
    x = images(2, 3, 16, 16)
    for perturbation in LITERAL:
        method = HSIC(grid=3, samples=8, perturbation=perturbation)
        index = torch.arange(2), torch.arange(2)
        double = method.design(scored(x), x).altered(*index)
        single = method.design(scored(x.float()), x.float()).altered(*index)
        assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(10, 17), (16, 12)])
@pytest.mark.parametrize("window", range(1, 11))
def test_box_blur_is_the_mean_over_a_window_of_the_mirrored_picture(window, size):
    x = images(2, 3, *size)
    expected = ndimage.uniform_filter(x.numpy(), (1, 1, window, window), mode="mirror", origin=0)
    np.testing.assert_allclose(box_blurred(x, window).numpy(), expected, atol=1e-13)
    ahead = window // 2  # an even window reaches further up and to the left
    literal = np.pad(x.numpy(), [(0, 0), (0, 0), (ahead, window), (ahead, window)], mode="reflect")
    for row, column in ((0, 0), (5, 7), (size[0] - 1, size[1] - 1)):
        mean = literal[:, :, row : row + window, column : column + window].mean((2, 3))
        np.testing.assert_allclose(box_blurred(x, window)[:, :, row, column].numpy(), mean, atol=1e-13)


def test_box_blur_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    x = images(1, 3, 15, 22)
    for window in (1, 2, 3, 4, 9, 10):
        expected = cv2.blur(x[0].permute(1, 2, 0).numpy().copy(), (window, window))
        found = box_blurred(x, window)[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["sobol", "hsic"])
@pytest.mark.parametrize("size", [(12, 20), (20, 12)])
def test_a_window_is_at_most_the_shorter_side_and_only_asked_for_when_blurring(name, size):
    x = images(1, 1, *size)
    spec = {"name": name, "grid": 2, "samples": 4, "perturbation": "blurring"}
    build({**spec, "window": 12}).attribute(scored(x), x)
    with pytest.raises(ConfigError, match=rf"window of 13 pixels .* {size[0]} x {size[1]} pixels"):
        build({**spec, "window": 13}).attribute(scored(x), x)
    build({**spec, "window": 13, "perturbation": "inpainting"}).attribute(scored(x), x)


@pytest.mark.parametrize("name", ["sobol", "hsic"])
@pytest.mark.parametrize(
    "option",
    [
        {"grid": 0},
        {"samples": 1},
        {"window": 0},
        {"sigma": 0.0},
        {"sigma": float("inf")},
        {"points": "grid"},
        {"perturbation": "noise"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(name, option):
    with pytest.raises(ConfigError, match=f"{name}: {next(iter(option))}"):
        build({"name": name, **option})


@pytest.mark.parametrize(
    ("method", "base"), [(Sobol(grid=8, points="halton"), 719), (HSIC(points="halton"), 311)]
)
def test_the_halton_sequence_is_refused_where_its_last_dimension_is_not_filled(method, base):
    """In 32 points the last of 128 dimensions does not get beyond 0.05: the map would be that of their order."""
    x = torch.zeros(1, 1, 16, 16)
    assert halton_points(32, 128)[:, -1].max() < 0.05
    few = replace(method, samples=base - 1)
    with pytest.raises(ConfigError, match=f"{method.name}: the Halton sequence needs at least {base} points"):
        few.design(scored(x), x)
    assert replace(method, samples=base).design(scored(x), x).points.shape[1] == base


def test_the_last_base_of_the_halton_sequence_is_the_prime_of_its_number():
    primes = [n for n in range(2, 1000) if all(n % d for d in range(2, n))]
    assert [largest_base(number) for number in range(1, len(primes) + 1)] == primes
