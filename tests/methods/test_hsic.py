"""HSIC against its textbook estimator, all masks, Xplique's arithmetic, and what its standard error says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coalitions import (
    cut,
    every,
    game,
    honesty,
    maps_can_be_differentiated,
    polynomial,
    rows_and_images_do_not_need_company,
    seen_by,
    single_precision_is_near,
)
from scipy.stats import qmc
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

import xcli
from xcli.errors import ConfigError
from xcli.methods.perturbation.hsic import HSIC
from xcli.registry import build
from xcli.segments import grid

POINTS = ("sobol", "halton", "lhs", "random")
KERNELS = ("binary", "rbf", "sobolev")
TWO, THREE = grid((8, 8), 2), grid((9, 9), 3)

pytestmark = pytest.mark.filterwarnings("ignore:The balance properties")


def on(play, label, target=(0,), **options):
    """A method on the grid of ``label``, the score of a picture whose cells are the inputs of ``play``, the picture."""
    method = HSIC(grid=math.isqrt(int(label.max()) + 1), **options)
    return (method, *game(play, target, label))


def masks_of(method, score, x):
    """The masks (n, cells) that the first image is seen behind, as the network sees them."""
    design = method.design(score, x)
    sample = torch.arange(int(design.count[0]))
    return design.cells(torch.zeros_like(sample), sample)


def positive(cells, seed=0):
    """Three scores with interactions, all of them positive: their median is no bad width."""
    play = polynomial(cells, seed, centre=0.5)
    return lambda m: play(m).exp()


# ---- the textbook ------------------------------------------------------------------------------------------------


def gaussian(one, other, width):
    return math.exp(-((one - other) ** 2) / (2 * width**2))


def bernoulli(one, other):
    """Sobolev's kernel of first order by Bernoulli's polynomials B_1 and B_2."""
    apart = abs(one - other)
    return (one - 1 / 2) * (other - 1 / 2) + (apart**2 - apart + 1 / 6) / 2


INPUT = {
    "binary": lambda one, other: 0.5 - (one - other) ** 2,
    "rbf": lambda one, other: gaussian(one, other, 0.5),
    "sobolev": bernoulli,
}


def gram(kernel, values):
    return np.array([[kernel(one, other) for other in values] for one in values])


def wide_by(values, width):
    """The median of the scores, or of the distances between two of them, the lower one of an even number."""
    if width == "outputs":
        return float(np.median(values))
    apart = sorted(abs(values[i] - values[j]) for i in range(len(values)) for j in range(i))
    return apart[(len(apart) - 1) // 2]


def textbook(masks, values, kernel, width, divide, one_more=False):
    """tr(K H L H) / (n - 1)^2 of each cell, with H written out; ``one_more``: of 1 + K."""
    n = len(values)
    centring = np.eye(n) - np.ones((n, n)) / n
    wide = wide_by(values, width)
    outputs = gram(lambda one, other: gaussian(one, other, wide), values)
    found = []
    for own in np.asarray(masks).T:
        inputs = gram(INPUT[kernel], own) + (1 if one_more else 0)
        trace = np.trace(inputs @ centring @ outputs @ centring)
        found.append(trace / ((n - 1) ** 2 if divide == "(n-1)^2" else n))
    return np.array(found)


@pytest.mark.parametrize("divide", ["(n-1)^2", "n"])
@pytest.mark.parametrize("width", ["outputs", "distances"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("binary", [False, True])
def test_maps_are_the_textbook_estimator_for_each_kernel_width_and_divisor(kernel, width, divide, binary):
    for samples, points in ((2, "random"), (25, "lhs"), (24, "sobol")):
        play = positive(4)
        options = {"kernel": kernel, "width": width, "divide": divide, "binary_masks": binary}
        method, score, x = on(play, TWO, (0, 1, 2), samples=samples, points=points, **options)
        masks = masks_of(method, score, x)
        values = play(masks)
        found = method.attribute(score, x).map
        for row in range(3):
            expected = textbook(masks.numpy(), values[:, row].tolist(), kernel, width, divide)
            np.testing.assert_allclose(found[row].flatten().numpy(), expected, rtol=1e-9, atol=1e-14)
            more = textbook(masks.numpy(), values[:, row].tolist(), kernel, width, divide, one_more=True)
            np.testing.assert_allclose(more, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_preset_is_xpliques_arithmetic_on_the_sobol_sequence_from_its_origin_on(kernel):
    """sum((H (1 + K) H) o (H L H)^T) / n, the width of L the linearly interpolated median of the scores."""
    method = build({"name": "hsic", "preset": "xplique", "grid": 2, "samples": 40, "kernel": kernel})
    play = positive(4)
    score, x = game(play, (1,), TWO)
    masks = torch.tensor(qmc.Sobol(4, scramble=False).random(40))
    masks = masks.round() if kernel == "binary" else masks  # halves to even, that is, to 0
    values = play(masks)[:, 1].numpy()
    n, y = 40, values[:, None]
    outputs = np.exp(-((y - y.T) ** 2) / (2 * np.percentile(values, 50.0) ** 2))
    centring = np.eye(n) - np.ones((n, n)) / n
    expected = []
    for m in masks.numpy().T[:, :, None]:
        inner = {
            "binary": 0.5 - (m - m.T) ** 2,
            "rbf": np.exp(-((m - m.T) ** 2) / (2 * 0.5**2)),
            "sobolev": (abs(m - m.T) ** 2 - abs(m - m.T) + 1 / 6) / 2 + (m - 0.5) @ (m - 0.5).T,
        }[kernel]
        both = (centring @ (1 + inner) @ centring) * (centring @ outputs @ centring).T
        expected.append(both.sum() / n)
    found = method.attribute(score, x)
    np.testing.assert_allclose(found.map.flatten().numpy(), expected, rtol=1e-9, atol=1e-14)
    paper = build({"name": "hsic", "grid": 2, "samples": 40, "kernel": kernel, "points": "sobol"})
    ours = paper.attribute(score, x)
    assert_close(found.map, ours.map * 39**2 / 40)
    assert_close(found.extras["standard_error"], ours.extras["standard_error"] * 39**2 / 40)


@pytest.mark.parametrize("samples", [2, 4, 10, 250])
def test_one_cell_that_is_the_score_has_the_value_worked_out_by_hand(samples):
    """Half the masks are 1, so K is centred: n^2 (1 - e) / 4 is the trace, e what L has between the two scores."""
    for width, low, high in (("outputs", 1.0, 4.0), ("distances", 0.0, 7.0)):
        options = {"samples": samples, "width": width}
        method, score, x = on(
            lambda m, low=low, high=high: low + (high - low) * m, grid((8, 8), 1), **options
        )
        wide = {"outputs": 2.5, "distances": 7.0}[width]
        e = math.exp(-((high - low) ** 2) / (2 * wide**2))
        expected = samples**2 * (1 - e) / 4 / (samples - 1) ** 2
        assert float(method.attribute(score, x).map) == pytest.approx(expected, rel=1e-10)


# ---- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", POINTS)
def test_binary_masks_are_zeros_and_ones_and_the_rounded_points(points):
    for options in ({}, {"kernel": "rbf", "binary_masks": True}, {"kernel": "sobolev", "binary_masks": True}):
        for samples in (24, 50, 51):
            plain = {"samples": samples, "points": points}
            method, score, x = on(positive(9), THREE, **plain, **options)
            masks = masks_of(method, score, x)
            assert set(masks.unique().tolist()) == {0.0, 1.0}
            raw, *_ = on(positive(9), THREE, **plain, kernel="rbf")
            drawn = masks_of(raw, score, x)
            assert torch.equal(masks, drawn.round())
            assert ((drawn > 0) & (drawn < 1)).double().mean() > 0.4
            ones = masks.sum(0)
            if points == "lhs":
                assert ((ones == samples // 2) | (ones == (samples + 1) // 2)).all()
                assert samples % 2 or (ones == samples / 2).all()
            elif points == "random":
                assert len(ones.unique()) > 2
    _, seen = seen_by(score.module, lambda: method.attribute(score, x))
    assert torch.equal(torch.cat(seen)[:, 0, ::3, ::3].flatten(1), masks)


@pytest.mark.parametrize("samples", [2, 33])
def test_the_network_runs_once_for_each_mask_of_each_image_with_rows(samples):
    x, net = images(3, 3, 16, 16), made(Residual)
    score = bound(net, x, [0, 1, 2, 3], [0, 0, 0, 2])
    found, seen = seen_by(net, lambda: HSIC(grid=3, samples=samples).attribute(score, x))
    assert sum(len(batch) for batch in seen) == 2 * samples
    assert found.extras["forwards"].tolist() == [samples] * 4


# ---- what it measures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", ["outputs", "distances"])
@pytest.mark.parametrize("points", POINTS)
def test_values_are_at_least_zero(points, width, kernel):
    for samples in (23, 30) if points == "halton" else (2, 3, 30):
        found = [
            on(
                positive(9, seed),
                THREE,
                (0, 1, 2),
                samples=samples,
                points=points,
                kernel=kernel,
                width=width,
            )
            for seed in range(3)
        ]
        for method, score, x in found:
            assert method.attribute(score, x).map.min() > -1e-16


@pytest.mark.parametrize("width", ["outputs", "distances"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("points", ["lhs", "random"])
def test_a_cell_without_effect_goes_to_zero_as_one_over_n_and_those_with_one_do_not(points, kernel, width):
    def play(m):
        return (0.2 + m[:, :1] + m[:, 1:2].square()) * 2

    means = []
    for samples in (50, 400):
        method, score, x = on(play, TWO, samples=samples, points=points, kernel=kernel, width=width)
        x = x.expand(24, -1, -1, -1)
        means.append(method.attribute(bound(score.module, x, [0] * 24), x).map.flatten(1).mean(0))
    few, many = means
    for idle in (2, 3):
        assert 5 < float(few[idle] / many[idle]) < 13  # 8, but for the scatter
        assert 0 < many[idle] < many[:2].min() / 20
    for matters in (0, 1):
        assert 0.7 < float(few[matters] / many[matters]) < 1.4
    first = few[:2].min() / few[2:].max()
    assert first > 2


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 7.7, -1e5 / 3])
@pytest.mark.parametrize("width", ["outputs", "distances"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_constant_score_gives_a_map_of_zeros(kernel, width, constant):
    for samples in (2, 33, 100):
        options = {"samples": samples, "kernel": kernel, "width": width}
        method, score, x = on(lambda m: torch.full((len(m), 1), constant).double(), TWO, **options)
        found = method.attribute(score, x)
        assert torch.equal(found.map, torch.zeros(1, 2, 2).double())
        assert float(found.extras["standard_error"][0]) == 0


def test_a_width_of_zero_tells_equal_scores_from_others():
    """More than half of the scores are 0, so is their median: L is 1 where scores are equal, else 0."""
    method, score, x = on(lambda m: m.amin(1, keepdim=True), TWO, samples=32, points="sobol")
    masks = masks_of(method, score, x)
    values = masks.amin(1)
    assert values.median() == 0 < values.sum()
    n, found = 32, method.attribute(score, x)
    centring = np.eye(n) - np.ones((n, n)) / n
    outputs = (values[:, None] == values).double().numpy()
    expected = [
        np.trace(gram(INPUT["binary"], own.tolist()) @ centring @ outputs @ centring) / 31**2
        for own in masks.T
    ]
    np.testing.assert_allclose(found.map.flatten().numpy(), expected, rtol=1e-10)
    assert torch.isfinite(found.extras["standard_error"]).all()


@pytest.mark.parametrize("width", ["outputs", "distances"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_cells_of_a_linear_score_are_ranked_by_the_size_of_their_weights(kernel, width):
    nine = torch.tensor([0.5, -8, 1.5, 4, 0, -2.7, 6, -10, 12]).double()
    four = torch.tensor([3, -6, 1.5, 10]).double()  # apart enough for points that are drawn
    for weight, label, points in ((nine, THREE, "sobol"), (four, TWO, "lhs"), (four, TWO, "random")):

        def play(m, weight=weight):
            return 30 + m @ weight[:, None]

        method, score, x = on(play, label, samples=512, points=points, kernel=kernel, width=width)
        found = method.attribute(score, x).map.flatten()
        assert found.argsort().tolist() == weight.abs().argsort().tolist()


# ---- the standard error ------------------------------------------------------------------------------------------


def limit(play, cells, width):
    """HSIC under all masks of zeros and ones, each as likely: expectations over pairs, no estimate; (cells,)."""
    masks = every(cells).double().numpy()
    values = play(torch.tensor(masks))[:, 0].tolist()
    if width == "outputs":
        wide = float(np.median(values))
    else:
        wide = float(np.median([abs(one - other) for one in values for other in values]))
    outputs = gram(lambda one, other: gaussian(one, other, wide), values)
    found = []
    for own in masks.T:
        inputs = gram(INPUT["binary"], own)
        both, apart = (inputs * outputs).mean(), inputs.mean() * outputs.mean()
        crossed = (inputs.mean(0) * outputs.mean(0)).mean()
        found.append(both + apart - 2 * crossed)
    return torch.tensor(found)


def stepped(m):
    """Few scores, about half of them in the middle, so that the median of some is that of all."""
    both = m[:, 0] + m[:, 1]
    return (1 + both + both.square() / 2 + 0.2 * m[:, 2] * m[:, 3])[:, None]


def wavy(m):
    return (2 + 3 * m[:, 0] + 1.7 * m[:, 1] + m[:, 0] * m[:, 2] + 0.6 * m[:, 3])[:, None]


@pytest.mark.parametrize("samples", [100, 250])
@pytest.mark.parametrize("width", ["outputs", "distances"])
@pytest.mark.parametrize("kernel", ["binary", "rbf"])
def test_the_standard_error_of_independent_masks_is_honest_where_cells_matter(kernel, width, samples):
    play = stepped if kernel == "binary" else wavy
    method, score, x = on(play, TWO, samples=samples, points="random", kernel=kernel, width=width)
    if kernel == "binary":
        expected = limit(stepped, 4, width)
    else:
        expected = replace(method, points="sobol", samples=800).attribute(score, x).map.flatten()
    x = x.expand(60, -1, -1, -1)  # the same picture under other names draws other masks
    found = method.attribute(bound(score.module, x, [0] * 60), x)
    errors = found.extras["standard_error"][:, None]
    assert 0.6 < float(honesty(found.map.flatten(1)[:, None], errors, expected[None])) < 1.5
    assert len(errors.unique()) > 50


@pytest.mark.parametrize("divide", ["(n-1)^2", "n"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_standard_error_is_that_of_what_each_mask_adds(kernel, divide):
    """Twice the standard deviation of the rows' sums of centred K o centred L, by sqrt n; quadratic mean over cells."""
    play = positive(4)
    method, score, x = on(play, TWO, samples=30, points="random", kernel=kernel, divide=divide)
    masks = masks_of(method, score, x)
    values = play(masks)[:, 0].tolist()
    n = len(values)
    centring = np.eye(n) - np.ones((n, n)) / n
    outputs = centring @ gram(lambda a, b: gaussian(a, b, wide_by(values, "outputs")), values) @ centring
    squares = []
    for own in masks.T.tolist():
        added = (centring @ gram(INPUT[kernel], own) @ centring * outputs).sum(1)
        squares.append((2 * math.sqrt(n) * added.std(ddof=1) / {"n": n}.get(divide, (n - 1) ** 2)) ** 2)
    error = float(method.attribute(score, x).extras["standard_error"][0])
    assert error == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-9)


@pytest.mark.parametrize("points", ["sobol", "random"])
def test_until_stops_where_the_map_is_that_of_exactly_the_masks_so_far(points):
    method, score, x = on(wavy, TWO, samples=3000, points=points, until={"stable": 0.1})
    found, seen = seen_by(score.module, lambda: method.attribute(score, x))
    count = int(found.extras["forwards"][0])
    assert sum(len(batch) for batch in seen) == count
    assert 128 <= count < 3000
    straight = replace(method, samples=count, until=None).attribute(score, x)
    assert_close(found.map, straight.map, rtol=1e-12, atol=1e-15)
    assert_close(found.extras["standard_error"], straight.extras["standard_error"])
    assert float(found.extras["standard_error"][0]) <= 0.1 * float(found.map.amax() - found.map.amin())


# ---- images and rows ---------------------------------------------------------------------------------------------

LABELS = (cut((16, 16), 9), cut((16, 16), 4), cut((16, 16), 5))


@pytest.mark.parametrize("kind", [PooledLinear, Tokens])
@pytest.mark.parametrize(
    "options",
    [
        {"points": "lhs"},
        {"points": "random", "kernel": "sobolev", "perturbation": "blurring", "width": "distances"},
    ],
    ids=["lhs", "random"],
)
def test_rows_and_images_do_not_need_company(kind, options):
    method = HSIC(grid=3, samples=30, **options)
    rows_and_images_do_not_need_company(method, made(kind), images(3, 3, 16, 16), *LABELS)


def test_seeds_change_drawn_masks_only():
    net, x = made(PooledLinear), images(2, 3, 16, 16)
    for points in POINTS:
        method = HSIC(grid=2, samples=20, points=points, kernel="rbf")
        maps = [method.attribute(replace(bound(net, x, [0, 1]), seed=seed), x).map for seed in (0, 0, 1)]
        assert torch.equal(maps[0], maps[1])
        assert torch.equal(maps[0], maps[2]) == (points in ("sobol", "halton"))


@pytest.mark.parametrize("score", [None, "probability", "logit"])
def test_the_probability_is_explained_unless_another_score_is_asked_for(score):
    net, x = made(Residual), images(1, 3, 12, 20)
    spec = {"name": "hsic", "grid": 3, "samples": 20, "points": "sobol", "kernel": "rbf"}
    found = xcli.explain(net, x, spec, target=2, score=score, native=True)
    masks = torch.tensor(qmc.Sobol(9, scramble=False).random(20))
    with torch.no_grad():
        z = net(x * masks[:, grid((12, 20), 3)][:, None])
    values = (z if score == "logit" else z.softmax(1))[:, 2].tolist()
    expected = textbook(masks.numpy(), values, "rbf", "outputs", "(n-1)^2")
    assert found.map.shape == (1, 3, 3)
    np.testing.assert_allclose(found.map[0].flatten().numpy(), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", ["outputs", "distances"])
def test_single_precision_is_near(kernel, width):
    method = HSIC(grid=2, samples=41, kernel=kernel, width=width)
    single_precision_is_near(method, made(PooledLinear), 4 * images(3, 3, 16, 16))


def test_scores_of_single_precision_are_compared_in_double():
    method, score, x = on(wavy, TWO, samples=40)
    design, sample = method.design(score, x), torch.arange(40)
    scores = wavy(design.cells(torch.zeros_like(sample), sample)).T.float()
    found, wide = (design.estimate(torch.tensor([0]), one) for one in (scores, scores.double()))
    assert_close(found.map, wide.map, rtol=1e-12, atol=0, check_dtype=False)
    assert_close(found.error, wide.error, rtol=1e-12, atol=0, check_dtype=False)


@pytest.mark.parametrize("width", ["outputs", "distances"])
def test_maps_can_be_differentiated(width):
    method = HSIC(grid=2, samples=20, width=width, kernel="rbf", perturbation="shift", sigma=3.0)
    maps_can_be_differentiated(method, made(Tokens), images(2, 3, 16, 16), "head.weight")


def test_defaults_are_those_of_the_paper_and_the_preset_those_of_xplique():
    method = build("hsic")
    assert (method.grid, method.samples, method.kernel, method.points) == (8, 500, "binary", "lhs")
    assert (method.width, method.divide, method.scale) == ("outputs", "(n-1)^2", "probability")
    assert (method.perturbation, method.upsampling) == ("inpainting", "bicubic")
    preset = build({"name": "hsic", "preset": "xplique"})
    assert replace(preset, points="lhs", divide="(n-1)^2") == method
    assert (preset.points, preset.divide) == ("sobol", "n")
    with pytest.raises(ConfigError, match="hsic: kernel"):
        build({"name": "hsic", "kernel": "laplace"})
