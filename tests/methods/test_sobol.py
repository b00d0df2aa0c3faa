"""Total Sobol indices against literal pick-freeze designs, scipy, known functions, and what their error says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from coalitions import (
    cut,
    game,
    honesty,
    maps_can_be_differentiated,
    polynomial,
    rows_and_images_do_not_need_company,
    seen_by,
    single_precision_is_near,
)
from scipy.stats import qmc, sobol_indices
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

import xcli
from xcli.errors import ConfigError
from xcli.methods.perturbation.base import asked, next_look, numbered
from xcli.methods.perturbation.sobol import Sobol
from xcli.registry import build
from xcli.segments import grid

ESTIMATORS = ("jansen", "homma", "janon", "glen", "saltelli")
POINTS = ("sobol", "halton", "lhs", "random")
TWO, THREE = grid((8, 8), 2), grid((9, 9), 3)

pytestmark = pytest.mark.filterwarnings("ignore:The balance properties")


# ---- functions whose indices are known ---------------------------------------------------------------------------


def ishigami(m):
    """sin u1 + 7 sin^2 u2 + 0.1 u3^4 sin u1 with u from -pi to pi; a fourth cell does nothing."""
    u = (2 * m - 1) * math.pi
    return (u[:, 0].sin() + 7 * u[:, 1].sin().square() + 0.1 * u[:, 2] ** 4 * u[:, 0].sin())[:, None]


def ishigami_indices():
    first = (1 + 0.1 * math.pi**4 / 5) ** 2 / 2
    second, both = 7**2 / 8, 8 * 0.1**2 * math.pi**8 / 225
    return torch.tensor([first + both, second, both, 0.0]).double() / (first + second + both)


WEIGHTS = torch.tensor([0, 0.5, 1, 2, 4, 9, 20, 99]).double()


def g_function(m):
    """The product of (|4 m - 2| + a) / (1 + a) over eight cells; a ninth does nothing."""
    return ((4 * m[:, :8] - 2).abs() + WEIGHTS).div(1 + WEIGHTS).prod(1)[:, None]


def g_indices():
    own = 1 / (3 * (1 + WEIGHTS) ** 2)
    total = own * (1 + own).prod() / (1 + own) / ((1 + own).prod() - 1)
    return torch.cat([total, torch.zeros(1).double()])


def additive(m):
    """3 m1 + 2 m2^2 - m3: the variances of the terms are 9/12, 4 (1/5 - 1/9), and 1/12."""
    return (3 * m[:, 0] + 2 * m[:, 1].square() - m[:, 2])[:, None]


def additive_indices():
    terms = torch.tensor([9 / 12, 4 * (1 / 5 - 1 / 9), 1 / 12, 0.0]).double()
    return terms / terms.sum()


KNOWN = {
    "ishigami": (ishigami, TWO, ishigami_indices()),
    "g": (g_function, THREE, g_indices()),
    "additive": (additive, TWO, additive_indices()),
}


def on(play, label, target=(0,), **options):
    """A method on the grid of ``label``, the score of a picture whose cells are the inputs of ``play``, the picture."""
    method = Sobol(grid=math.isqrt(int(label.max()) + 1), **options)
    return (method, *game(play, target, label))


def indices(play, label, target=(0,), **options):
    """The indices (n, cells)."""
    method, score, x = on(play, label, target, **options)
    return method.attribute(score, x).map.flatten(1)


def by_estimator(play, label, **options):
    """The indices (cells,) by each estimator of the same scores."""
    method, score, x = on(play, label, **options)
    design = method.design(score, x)
    scores = asked(score, x, *numbered(design.count, torch.tensor([0])), design.altered)
    designs = {one: replace(design, method=replace(method, estimator=one)) for one in ESTIMATORS}
    return {one: own.estimate(torch.tensor([0]), scores).map.flatten() for one, own in designs.items()}


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("name", ["ishigami", "g"])
def test_indices_go_to_the_analytic_ones_of_ishigami_and_sobol_as_points_are_added(name, points):
    play, label, expected = KNOWN[name]
    few, many = (by_estimator(play, label, samples=n, points=points) for n in (64, 4096))
    assert_close(indices(play, label, samples=64, points=points)[0], few["jansen"])
    for estimator in ESTIMATORS:
        before, after = few[estimator] - expected, many[estimator] - expected
        assert before.abs().max() < 0.6
        assert after.abs().max() < (0.02 if points in ("sobol", "halton") else 0.06)
        assert after.square().mean().sqrt() < 0.75 * before.square().mean().sqrt()


@pytest.mark.parametrize("points", POINTS)
def test_indices_of_an_additive_score_sum_to_one(points):
    play, label, expected = KNOWN["additive"]
    few, many = (by_estimator(play, label, samples=n, points=points) for n in (64, 4096))
    for estimator in ESTIMATORS:
        off = [float((found[estimator].sum() - 1).abs()) for found in (few, many)]
        assert off[1] < min(off[0], 0.005 if points in ("sobol", "halton") else 0.06)
        assert (many[estimator] - expected).abs().max() < 0.04


def test_interactions_count_for_each_of_their_cells():
    expected = KNOWN["ishigami"][2]
    assert float(expected.sum()) == pytest.approx(1.2437, abs=1e-4)
    assert float(indices(ishigami, TWO, samples=4096).sum()) == pytest.approx(float(expected.sum()), abs=2e-3)


# ---- the design and the estimators, literally --------------------------------------------------------------------


def estimated(a, c, estimator):
    """The total index of one cell as the papers write it, from lists of f(A) and f(C)."""
    count = len(a)
    mean = sum(a) / count
    variance = sum((y - mean) ** 2 for y in a) / (count - 1)
    product = sum(y * z for y, z in zip(a, c, strict=True)) / count
    match estimator:
        case "jansen":
            return sum((y - z) ** 2 for y, z in zip(a, c, strict=True)) / (2 * count * variance)
        case "homma":
            return (variance - (product - mean**2)) / variance
        case "saltelli":
            return 1 - (product - mean**2) / variance
        case "janon":
            shared = sum((y + z) / 2 for y, z in zip(a, c, strict=True)) / count
            squares = sum((y**2 + z**2) / 2 for y, z in zip(a, c, strict=True)) / count
            return 1 - (product - shared**2) / (squares - shared**2)
        case _:
            return 1 - np.corrcoef(a, c)[0, 1]


def passes(play, points, target=0):
    """f(A) and the f(C) of each cell, by one row of a design after another: lists."""
    cells, masks = points.shape[1] // 2, []
    for point in points.tolist():
        masks.append(point[:cells])
        for cell in range(cells):
            mixed = point[:cells]
            mixed[cell] = point[cells + cell]
            masks.append(mixed)
    values = play(torch.tensor(masks, dtype=torch.float64))[:, target].tolist()
    return values[:: cells + 1], [values[1 + cell :: cells + 1] for cell in range(cells)]


def jackknife(a, c, estimator, parts):
    """The standard errors of the cells: without point j, j + parts, ... for each j below ``parts``."""
    errors = []
    for own in c:
        left = []
        for j in range(parts):
            kept = [i for i in range(len(a)) if i % parts != j]
            left.append(estimated([a[i] for i in kept], [own[i] for i in kept], estimator))
        mean = sum(left) / parts
        errors.append(math.sqrt((parts - 1) / parts * sum((one - mean) ** 2 for one in left)))
    return errors


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("points", "samples"), [("sobol", 3), ("sobol", 32), ("sobol", 45), ("halton", 20), ("halton", 70)]
)
def test_maps_and_errors_are_those_of_a_literal_pick_freeze_and_jackknife(points, estimator, samples):
    play = polynomial(4, centre=0.5)
    peer = {"sobol": qmc.Sobol, "halton": qmc.Halton}[points](8, scramble=False).random(samples)
    method, score, x = on(play, TWO, (0, 1, 2), samples=samples, points=points, estimator=estimator)
    found = method.attribute(score, x)
    for row in range(3):
        a, c = passes(play, peer, row)
        expected = [estimated(a, own, estimator) for own in c]
        np.testing.assert_allclose(found.map[row].flatten().numpy(), expected, rtol=1e-8, atol=1e-10)
        errors = jackknife(a, c, estimator, min(samples, 32))
        assert float(found.extras["standard_error"][row]) == pytest.approx(
            math.sqrt(sum(error**2 for error in errors) / 4), rel=1e-7
        )


@pytest.mark.parametrize("points", ["lhs", "random"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_maps_of_drawn_points_are_those_of_a_literal_pick_freeze_with_the_same_points(points, estimator):
    play = polynomial(4, centre=0.5)
    method, score, x = on(play, TWO, samples=40, points=points, estimator=estimator)
    own = method.design(score, x).points
    assert own.shape == (1, 40, 8)
    a, c = passes(play, own[0].numpy())
    expected = [estimated(a, one, estimator) for one in c]
    np.testing.assert_allclose(
        method.attribute(score, x).map.flatten().numpy(), expected, rtol=1e-8, atol=1e-10
    )


def test_jansen_is_that_of_scipy_but_for_the_variance_in_which_scipy_has_b_too():
    points = qmc.Sobol(6, scramble=False).random(64)
    play = polynomial(4, centre=0.5)

    def f(masks):
        return play(torch.as_tensor(np.array(masks)))[:, 2].numpy()

    first, second = (np.concatenate([half, np.zeros((64, 1))], 1) for half in (points[:, :3], points[:, 3:]))
    mixed = np.stack([first] * 3)
    for cell in range(3):
        mixed[cell, :, cell] = second[:, cell]
    ours = {"f_A": f(first)[None], "f_B": f(second)[None]}
    ours["f_AB"] = np.stack([f(one) for one in mixed])[:, None]
    peer = sobol_indices(func=ours, n=64).total_order.squeeze()
    variance = np.concatenate([ours["f_A"][0], ours["f_B"][0]]).var()

    def without_the_last(m):
        return play(torch.cat([m[:, :3], torch.zeros(len(m), 1).double()], 1))

    method, score, x = on(without_the_last, TWO, (2,), samples=64)
    eight = torch.zeros(64, 8).double()
    eight[:, :3], eight[:, 4:7] = torch.tensor(points[:, :3]), torch.tensor(points[:, 3:])
    design = replace(method.design(score, x), points=eight[None])
    sample = torch.arange(64 * 5)
    values = without_the_last(design.cells(torch.zeros_like(sample), sample))[None, :, 2]
    found = design.estimate(torch.tensor([0]), values).map.flatten()
    np.testing.assert_allclose(found[:3].numpy() * ours["f_A"].var(ddof=1), peer * variance, rtol=1e-10)
    assert found[3] == 0


def test_homma_and_saltelli_agree_to_the_last_bit():
    for points in POINTS:
        homma, saltelli = (
            indices(polynomial(9, centre=0.5), THREE, (0, 1, 2), samples=64, points=points, estimator=one)
            for one in ("homma", "saltelli")
        )
        assert torch.equal(homma, saltelli)
        assert homma.std() > 0.01


def test_other_estimators_do_not_agree():
    found = [indices(ishigami, TWO, samples=50, estimator=one)[0] for one in ESTIMATORS[:4]]
    apart = [float((one - other).abs().max()) for i, one in enumerate(found) for other in found[:i]]
    assert min(apart) > 1e-4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_large_constant_in_the_score_changes_only_what_the_formula_says(estimator):
    """homma's estimator sees a constant k by k (mean(c) - mean(a)) / V; the others do not see it at all."""
    plain = indices(additive, TWO, samples=64, points="random", estimator=estimator)[0]
    shifted = indices(lambda m: additive(m) + 1e6, TWO, samples=64, points="random", estimator=estimator)[0]
    if estimator not in ("homma", "saltelli"):
        assert_close(shifted, plain, rtol=0, atol=1e-6)
        return
    method, score, x = on(additive, TWO, samples=64, points="random")
    a, c = passes(additive, method.design(score, x).points[0].numpy())
    moved = [1e6 * (np.mean(a) - np.mean(own)) / np.var(a, ddof=1) for own in c]
    np.testing.assert_allclose((shifted - plain).numpy(), moved, rtol=1e-6, atol=1e-4)


# ---- what does not vary ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", POINTS)
def test_a_cell_that_does_not_matter_gets_nothing(points):
    """Nothing at all of jansen; 1 / N of homma, whose variance is over N - 1; rounding of the others."""
    for samples in (24, 50):
        for estimator in ESTIMATORS:
            found = indices(ishigami, TWO, samples=samples, points=points, estimator=estimator)[0]
            if estimator == "jansen":
                assert found[3] == 0
            least = 1 / samples if estimator in ("homma", "saltelli") else 0.0
            assert float(found[3]) == pytest.approx(least, abs=1e-12)
            assert (found[:3] > 0.02).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.3, 1.0, 7.7, -1e5 / 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_constant_score_gives_a_map_of_zeros(estimator, constant):
    for samples in (2, 24, 32, 33, 100):
        method, score, x = on(
            lambda m: torch.full((len(m), 1), constant).double(), THREE, samples=samples, estimator=estimator
        )
        found = method.attribute(score, x)
        assert torch.equal(found.map, torch.zeros(1, 3, 3).double())
        error = float(found.extras["standard_error"][0])
        assert math.isnan(error) if samples == 2 else error == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_score_that_hardly_varies_has_the_indices_of_its_variation(estimator):
    """A saturated probability: 1 less something of 1e-9."""
    expected = indices(additive, TWO, samples=64, estimator=estimator)[0]
    found = indices(lambda m: 1 - 1e-9 * additive(m), TWO, samples=64, estimator=estimator)[0]
    if estimator in ("homma", "saltelli"):  # which see the constant
        assert torch.isfinite(found).all()
    else:
        assert_close(found, expected, rtol=0, atol=1e-5)


def test_two_points_give_a_map_without_a_standard_error():
    for estimator in ESTIMATORS:
        method, score, x = on(ishigami, TWO, samples=2, points="random", estimator=estimator)
        found = method.attribute(score, x)
        assert torch.isfinite(found.map).all()
        assert torch.isnan(found.extras["standard_error"]).all()
        assert found.map.abs().max() > 0
    method, score, x = on(ishigami, TWO, samples=3, points="random")
    assert torch.isfinite(method.attribute(score, x).extras["standard_error"]).all()


# ---- the standard error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [30, 100])
@pytest.mark.parametrize("estimator", ESTIMATORS[:4])
@pytest.mark.parametrize("name", ["ishigami", "additive"])
def test_the_standard_error_of_independent_points_is_honest(name, estimator, samples):
    play, label, expected = KNOWN[name]
    method, score, x = on(play, label, samples=samples, points="random", estimator=estimator)
    x = x.expand(60, -1, -1, -1)  # the same picture under other names draws other points
    found = method.attribute(bound(score.module, x, [0] * 60), x)
    errors = found.extras["standard_error"][:, None]
    assert 0.6 < float(honesty(found.map.flatten(1)[:, None], errors, expected[None])) < 1.5
    assert len(errors.unique()) == 60


def test_a_sequence_is_better_than_its_standard_error_says():
    for name in ("ishigami", "g"):
        play, label, expected = KNOWN[name]
        method, score, x = on(play, label, samples=1024)
        found = method.attribute(score, x)
        off = (found.map.flatten() - expected).square().mean().sqrt()
        assert off < 0.8 * float(found.extras["standard_error"][0])


# ---- passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [2, 7, 40])
def test_the_network_runs_once_for_each_point_and_cell_and_once_for_each_point(samples):
    x = images(3, 3, 16, 16)
    net = made(Residual)
    score = bound(net, x, [0, 1, 2, 3], [0, 0, 0, 2])  # three rows, none, one
    found, seen = seen_by(net, lambda: Sobol(grid=3, samples=samples).attribute(score, x))
    assert sum(len(batch) for batch in seen) == 2 * samples * (9 + 1)
    assert found.extras["forwards"].tolist() == [samples * 10] * 4


def test_of_each_point_the_network_sees_a_and_a_with_one_cell_of_b():
    method, score, x = on(ishigami, TWO, samples=5, points="random")
    drawn = method.design(score, x).points[0]
    _, seen = seen_by(score.module, lambda: method.attribute(score, x))
    cells = torch.cat(seen)[:, 0, ::4, ::4].flatten(1).view(5, 5, 4)
    for point in range(5):
        first, second = drawn[point, :4], drawn[point, 4:]
        assert torch.equal(cells[point, 0], first)
        for cell in range(4):
            expected = first.clone()
            expected[cell] = second[cell]
            assert torch.equal(cells[point, 1 + cell], expected)


@pytest.mark.parametrize("points", ["sobol", "random"])
@pytest.mark.parametrize(("play", "label"), [(ishigami, TWO), (g_function, THREE)])
@pytest.mark.parametrize("stable", [0.2, 0.08])
def test_until_stops_where_the_map_is_that_of_exactly_the_points_so_far(play, label, points, stable):
    method, score, x = on(play, label, samples=2000, points=points, until={"stable": stable})
    found, seen = seen_by(score.module, lambda: method.attribute(score, x))
    unit = int(label.max()) + 2
    forwards = int(found.extras["forwards"][0])
    count, rest = divmod(forwards, unit)
    assert rest == 0
    assert sum(len(batch) for batch in seen) == forwards
    assert 16 <= count < 2000
    straight = replace(method, samples=count, until=None).attribute(score, x)
    assert_close(found.map, straight.map, rtol=1e-12, atol=1e-14)
    assert_close(found.extras["standard_error"], straight.extras["standard_error"], rtol=1e-9, atol=0)
    drawn = method.design(score, x).points[0, :count].numpy()
    a, c = passes(play, drawn)
    expected = [estimated(a, own, "jansen") for own in c]
    np.testing.assert_allclose(found.map.flatten().numpy(), expected, rtol=1e-9, atol=1e-12)
    reach = found.map.amax() - found.map.amin()
    assert float(found.extras["standard_error"][0]) <= stable * float(reach)
    looks, done = [], 0
    while done < forwards:
        done = next_look(done, unit)
        looks.append(done // unit)
    assert looks[-1] == count
    for n in looks[:-1]:
        early = replace(method, samples=n, until=None).attribute(score, x)
        reach = early.map.amax() - early.map.amin()
        assert float(early.extras["standard_error"][0]) > stable * float(reach)


def test_until_looks_after_sixteen_points_at_the_earliest_and_never_runs_more_than_samples():
    flat = {"until": {"stable": 0.5}, "samples": 1000}
    for label, expected in ((TWO, 26), (THREE, 16), (grid((10, 10), 5), 16)):
        cells = int(label.max()) + 1
        method, score, x = on(lambda m: 0 * m[:, :1], label, **flat)
        assert method.attribute(score, x).extras["forwards"].tolist() == [expected * (cells + 1)]
    method, score, x = on(ishigami, TWO, samples=12, until={"stable": 0.001})
    found = method.attribute(score, x)
    assert found.extras["forwards"].tolist() == [60]
    assert_close(found.map, replace(method, until=None).attribute(score, x).map)


# ---- images and rows ---------------------------------------------------------------------------------------------

LABELS = (cut((16, 16), 9), cut((16, 16), 4), cut((16, 16), 5))


@pytest.mark.parametrize("kind", [PooledLinear, Tokens])
@pytest.mark.parametrize(
    "options",
    [
        {"points": "lhs", "samples": 20},
        {"points": "random", "samples": 20, "estimator": "janon", "perturbation": "blurring"},
    ],
    ids=["lhs", "random"],
)
def test_rows_and_images_do_not_need_company(kind, options):
    x = images(3, 3, 16, 16)
    x[1] *= 4
    rows_and_images_do_not_need_company(Sobol(**{"grid": 3, **options}), made(kind), x, *LABELS)


def test_images_stop_by_themselves():
    net, x = made(PooledLinear), images(3, 3, 16, 16)
    x[1] *= 10
    method = Sobol(grid=2, points="random", samples=400, until={"stable": 0.1})
    target = {0: [1, 2], 1: [0], 2: [1]}
    found = method.attribute(bound(net, x, [1, 2, 0, 1], [0, 0, 1, 2]), x)
    assert len(set(found.extras["forwards"].tolist())) == 3
    for image, own in target.items():
        one = x[image : image + 1]
        score = replace(bound(net, one, own, [0] * len(own)), keys=[f"image-{image}"])
        alone, row = method.attribute(score, one), [[0, 1], [2], [3]][image]
        assert_close(alone.map, found.map[row], rtol=1e-10, atol=1e-13)
        for name in ("forwards", "standard_error"):
            assert_close(alone.extras[name], found.extras[name][row], rtol=1e-8, atol=0)


def test_seeds_change_drawn_points_only():
    net, x = made(PooledLinear), images(2, 3, 16, 16)
    for points in POINTS:
        maps = [
            Sobol(grid=2, points=points).attribute(replace(bound(net, x, [0, 1]), seed=seed), x).map
            for seed in (0, 0, 1)
        ]
        assert torch.equal(maps[0], maps[1])
        assert torch.equal(maps[0], maps[2]) == (points in ("sobol", "halton"))


@pytest.mark.parametrize("score", [None, "probability", "logit", "log-probability", "contrast"])
def test_the_probability_is_explained_unless_another_score_is_asked_for(score):
    net, x = made(Residual), images(1, 3, 12, 20)
    found = xcli.explain(
        net, x, {"name": "sobol", "grid": 3, "samples": 16}, target=2, score=score, native=True
    )
    points = torch.tensor(qmc.Sobol(18, scramble=False).random(16))
    cell = grid((12, 20), 3)

    def play(m):
        with torch.no_grad():
            z = net(x * m[:, cell][:, None])
        others = z.clone()
        others[:, 2] = -torch.inf
        return {
            "logit": z,
            "log-probability": z.log_softmax(1),
            "contrast": z - others.amax(1, True),
        }.get(score, z.softmax(1))

    a, c = passes(play, points.numpy(), 2)
    expected = [estimated(a, own, "jansen") for own in c]
    np.testing.assert_allclose(found.map[0].flatten().numpy(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_single_precision_is_near(estimator):
    method = Sobol(grid=2, samples=24, estimator=estimator, perturbation="blurring", window=5)
    x = 4 * images(3, 3, 16, 16)  # or the variance is little beside the mean, which homma's estimator squares
    single_precision_is_near(method, made(PooledLinear), x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scores_of_single_precision_are_added_up_in_double(estimator):
    method, score, x = on(additive, TWO, samples=40, estimator=estimator)
    design, sample = method.design(score, x), torch.arange(40 * 5)
    scores = (additive(design.cells(torch.zeros_like(sample), sample)).T + 1e3).float()
    found, wide = (design.estimate(torch.tensor([0]), one) for one in (scores, scores.double()))
    assert_close(found.map, wide.map, rtol=1e-12, atol=0, check_dtype=False)
    assert_close(found.error, wide.error, rtol=1e-12, atol=0, check_dtype=False)


def test_maps_can_be_differentiated():
    for estimator in ESTIMATORS:
        method = Sobol(grid=2, samples=10, estimator=estimator, perturbation="shift", sigma=3.0)
        maps_can_be_differentiated(method, made(Tokens), images(2, 3, 16, 16), "head.weight")


def test_passes_and_defaults_are_those_of_the_paper_and_its_package():
    method = build("sobol")
    assert (method.grid, method.samples, method.estimator, method.points) == (8, 32, "jansen", "sobol")
    assert (method.perturbation, method.upsampling, method.scale) == ("inpainting", "bicubic", "probability")
    with pytest.raises(ConfigError, match="sobol: estimator"):
        build({"name": "sobol", "estimator": "owen"})
