"""LIME against captum and sklearn with the same samples, known linear models, its limit and its standard error."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from captum.attr import LimeBase
from captum.attr._core.lime import default_from_interp_rep_transform
from coalitions import (
    CELLS,
    Fitted,
    captum_in_double,
    celled,
    cut,
    every,
    game,
    honesty,
    maps_can_be_differentiated,
    numbers,
    of_features,
    over_seeds,
    polynomial,
    rows_and_images_do_not_need_company,
    seen_by,
    shown,
    single_precision_is_near,
)
from scipy.stats import chisquare
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

import xcli
from xcli.errors import ConfigError
from xcli.methods.perturbation.surrogate import LIME
from xcli.registry import build
from xcli.segments import grid

ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
LABELS = (cut((16, 16), 9), cut((16, 16), 4, seed=1), grid((16, 16), 3))
NARROW = {"distance": "euclidean", "kernel_width": 20.0}


@cache
def setting(kind):
    """A network, three images and the score of four rows on them, in probabilities."""
    net, x = made(kind), images(3, 3, 16, 16)
    return net, x, celled(bound(net, x, **ROWS), *LABELS).scaled("probability")


def samples_of(method, score, x, image=0):
    """The sets of an image, (S, F)."""
    design = method.design(score, x)
    sample = torch.arange(int(design.count[image]))
    kept = design.kept(torch.full_like(sample, image), sample)
    return kept[:, : int(design.features[image])]


def similarity(method):
    """exp(-d^2 / w^2) of a picture, as captum asks for it."""

    def weight(x, picture, kept, **_):
        if method.distance == "euclidean":
            apart = (x - picture).pow(2).sum().sqrt()
        else:
            z, one = kept[0].double(), torch.ones(kept.shape[1], dtype=torch.float64)
            lengths = z.norm() * one.norm()
            apart = 1 - (z @ one / lengths if lengths else 0)
        return torch.exp(-(torch.as_tensor(apart) ** 2) / method.kernel_width**2)[None]

    return weight


def literal(method, net, x, other, label, kept, target):
    """sklearn's weighted ridge regression over literal pictures: coefficients (F,), r2, weights."""
    pictures = shown(x, other, label, kept)
    with torch.no_grad():
        scores = net(pictures).softmax(1)[:, target].numpy()
    weigh = similarity(method)
    weights = torch.cat([weigh(x, one, z[None]) for one, z in zip(pictures, kept)]).numpy()
    model = Ridge(alpha=method.ridge).fit(kept.numpy().astype(float), scores, sample_weight=weights)
    r2 = r2_score(scores, model.predict(kept.numpy().astype(float)), sample_weight=weights)
    return torch.from_numpy(model.coef_), float(r2), weights


# ---- captum and sklearn ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"ridge": 0.0, "kernel_width": 0.6}, NARROW, {**NARROW, "ridge": 0.02}], ids=str
)
@pytest.mark.parametrize("kind", [PooledLinear, Residual, Tokens])
def test_maps_are_those_of_captum_with_the_same_samples(kind, options, monkeypatch):
    net, x, score = setting(kind)
    method = LIME(samples=60, segments=CELLS, **options)
    found = method.attribute(score, x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        kept = samples_of(method, score, x, image)

        def samples(_x, kept=kept, **_):
            yield from kept.long()[:, None]

        with monkeypatch.context() as patch:
            captum_in_double(patch)
            peer = LimeBase(
                lambda pictures: net(pictures).softmax(1),
                Fitted(Ridge(alpha=method.ridge)),
                similarity(method),
                samples,
                True,
                default_from_interp_rep_transform,
                None,
            )
            one = peer.attribute(
                x[image : image + 1],
                target=target,
                n_samples=60,
                feature_mask=LABELS[image][None, None],
                baselines=0.0,
            )
        ours = of_features(found.map[row : row + 1], LABELS[image])
        assert_close(ours, one, rtol=1e-8, atol=1e-8 * float(one.abs().max()))


@pytest.mark.parametrize("substrate", ["constant", "mean", "minimum", "blur", "negative", "gaussian"])
@pytest.mark.parametrize("distance", [{}, NARROW], ids=["cosine", "euclidean"])
def test_maps_and_r2_are_those_of_sklearn_on_the_pictures_with_any_substrate(substrate, distance):
    net, x, score = setting(Residual)
    method = LIME(
        samples=50, segments=CELLS, substrate=substrate, value=0.7, sigma=2.0, ridge=0.1, **distance
    )
    other, found = method.whole(score, x), method.attribute(score, x)
    if substrate in ("constant", "mean"):
        assert_close(
            other, torch.full_like(x, 0.7) if substrate == "constant" else x.mean((2, 3), True) + 0 * x
        )
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        kept = samples_of(method, score, x, image)
        b, r2, weights = literal(method, net, x[image], other[image], LABELS[image], kept, target)
        assert_close(found.map[row], b[LABELS[image]], rtol=1e-8, atol=1e-8 * float(b.abs().max()))
        assert float(found.extras["r2"][row]) == pytest.approx(r2, abs=1e-8)
        assert weights.max() > 1.5 * weights.min()


def test_what_imputation_shows_for_a_feature_depends_on_the_others_so_it_has_no_distance():
    with pytest.raises(ConfigError, match="euclidean is a sum over features"):
        build({"name": "lime", "distance": "euclidean", "substrate": "imputation"})
    assert build({"name": "lime", "substrate": "imputation"}).distance == "cosine"


@pytest.mark.parametrize("substrate", ["constant", "blur", "uniform"])
def test_the_network_sees_the_pictures_of_the_sets_and_nothing_else(substrate):
    net, x, score = setting(Residual)
    method = LIME(samples=20, segments=CELLS, substrate=substrate)
    expected = torch.cat(
        [shown(x[i], method.whole(score, x)[i], LABELS[i], samples_of(method, score, x, i)) for i in range(3)]
    )
    found, seen = seen_by(net, lambda: method.attribute(score, x))
    assert torch.equal(torch.cat(seen), expected)
    assert found.extras["forwards"].tolist() == [20] * 4


# ---- known answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"distance": "euclidean", "kernel_width": 9.0}, {"keep": 0.8}], ids=str
)
def test_a_score_that_is_linear_in_the_features_gives_its_coefficients_without_ridge(options):
    slope = images(9, 2, seed=4)
    score, x = game(lambda seen: seen @ slope + 3, [0, 1])
    method = LIME(samples=60, segments=CELLS, ridge=0.0, **options)
    found = method.attribute(score, x)
    assert_close(of_features(found.map, grid((16, 16), 3)), slope.T, rtol=1e-9, atol=1e-10)
    assert_close(found.extras["r2"], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found.extras["standard_error"].max() < 1e-10


def test_many_samples_give_the_weighted_regression_over_all_sets():
    """Each of the 2^9 sets with its probability, and the ridge spread over the samples."""
    method = LIME(samples=30000, segments=CELLS, keep=0.7, kernel_width=0.2, ridge=600.0)
    score, x = game(polynomial(9), [0, 2])
    limit = by_all_sets(method, polynomial(9), [0, 2], 30000)
    found = numbers(method, score, x)
    assert_close(found, limit, rtol=0, atol=0.02 * float(limit.abs().max()))
    plain = by_all_sets(replace(method, ridge=0.0), polynomial(9), [0, 2], 30000)
    assert (limit - plain).abs().max() > 0.1 * limit.abs().max()


def by_all_sets(method, play, target, samples):
    """The limit (n, F) of LIME in the game ``play``, its ridge that of so many samples."""
    kept = every(9)
    size = kept.sum(1).double()
    chance = method.keep**size * (1 - method.keep) ** (9 - size)
    weights = (-((1 - (size / 9).sqrt()) ** 2) / method.kernel_width**2).exp() * chance * samples
    scores = play(kept.double())[:, target]
    model = Ridge(alpha=method.ridge).fit(kept.numpy(), scores.numpy(), sample_weight=weights.numpy())
    return torch.from_numpy(model.coef_)


def test_features_are_kept_independently_with_the_probability_asked_for():
    score, x = game(polynomial(9))
    kept = samples_of(LIME(samples=20000, segments=CELLS, keep=0.3), score, x).double()
    assert_close(kept.mean(0), torch.full((9,), 0.3, dtype=torch.float64), rtol=0, atol=0.013)
    linked = np.corrcoef(kept.numpy().T) - np.eye(9)
    assert abs(linked).max() < 0.03
    sizes = torch.bincount(kept.sum(1).long(), minlength=10)[:7].tolist()
    binomial = [(every(9).sum(1) == k).sum().item() * 0.3**k * 0.7 ** (9 - k) for k in range(7)]
    expected = np.array(binomial) / sum(binomial) * sum(sizes)
    assert chisquare(sizes, expected).pvalue > 1e-4


def test_samples_belong_to_the_seed_and_the_image_and_not_to_the_company():
    net, x, score = setting(Residual)
    method = LIME(samples=40, segments=CELLS)
    alone = replace(bound(net, x[1:2], [0]), keys=["image-1"])
    small = samples_of(method, celled(alone, LABELS[1]), x[1:2])
    assert small.shape == (40, 4)
    assert torch.equal(small, samples_of(method, score, x, 1))
    assert not torch.equal(samples_of(method, score, x, 0), samples_of(method, score, x, 2))
    other = replace(celled(alone, LABELS[1]), seed=1)
    assert not torch.equal(small, samples_of(method, other, x[1:2]))
    longer = LIME(samples=90, segments=CELLS)
    assert torch.equal(samples_of(longer, score, x, 1)[:40], small)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3, 5.0])
def test_a_score_that_does_not_vary_has_no_r2_and_a_map_of_zeros(value):
    score, x = game(lambda seen: torch.full_like(seen[:, :2], value), [0, 1])
    found = LIME(samples=50, segments=CELLS).attribute(score, x)
    assert torch.isnan(found.extras["r2"]).all()
    assert (found.map == 0).all()
    assert (found.extras["standard_error"] == 0).all()


def test_samples_too_far_away_to_weigh_anything_leave_zeros_by_the_ridge():
    _, x, score = setting(Residual)
    found = LIME(samples=30, segments=CELLS, distance="euclidean", kernel_width=0.2).attribute(score, x)
    assert_close(found.map, torch.zeros_like(found.map))


def test_an_image_that_is_not_finite_spoils_its_own_map_alone():
    _, x, score = setting(Residual)
    broken = x.clone()
    broken[1, 0, 3, 3] = torch.nan
    method = LIME(samples=30, segments=CELLS, **NARROW)
    found, expected = method.attribute(score, broken).map, method.attribute(score, x).map
    assert_close(found[[0, 1, 3]], expected[[0, 1, 3]])
    assert torch.isnan(found[2]).all()


def test_one_feature_is_the_difference_that_it_makes():
    score, x = game(lambda seen: torch.stack([3 * seen[:, 0] ** 2 - 1], 1), label=torch.zeros(16, 16).long())
    found = LIME(samples=30, segments=CELLS, ridge=0.0).attribute(score, x)
    assert_close(found.map, torch.full((1, 16, 16), 3.0).double())


# ---- rows, batches, precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, NARROW, {"until": {"stable": 0.1}}], ids=str)
def test_rows_and_images_of_different_numbers_of_features_are_what_they_are_alone(options):
    method = LIME(samples=300 if "until" in options else 40, segments=CELLS, **options)
    rows_and_images_do_not_need_company(
        method, made(Residual), images(3, 3, 16, 16), *LABELS[:2], cut((16, 16), 6)
    )


def test_single_precision_is_near():
    single_precision_is_near(LIME(samples=60, segments="grid:3"), made(Tokens), images(2, 3, 16, 16))


@pytest.mark.parametrize("options", [{}, NARROW], ids=["cosine", "euclidean"])
def test_maps_can_be_differentiated_by_pixels_and_weights(options):
    method = LIME(samples=30, segments="grid:3", **options)
    maps_can_be_differentiated(method, made(Residual), images(2, 3, 16, 16), "stem.weight")


def test_explain_trains_through_the_map():
    net, x = made(Residual), images(2, 3, 16, 16)
    found = xcli.explain(net, x, {"name": "lime", "samples": 20, "segments": "grid:3"}, create_graph=True)
    found.map.square().sum().backward()
    assert net.head.weight.grad.abs().max() > 0


# ---- the standard error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"ridge": 0.0}, {"ridge": 0.0, "keep": 0.7, "kernel_width": 0.15}, {}], ids=str
)
def test_the_standard_error_says_how_far_the_map_is_from_its_limit(options):
    method = LIME(samples=400, segments=CELLS, **options)
    score, x = game(polynomial(9), [0, 1, 2])
    limit = by_all_sets(method, polynomial(9), [0, 1, 2], 400)
    maps, errors, _ = over_seeds(method, score, x, 60)
    ratio = honesty(maps, errors, limit)
    assert (ratio > 0.7).all(), ratio
    assert (ratio < 1.4).all(), ratio


def test_the_standard_error_falls_with_the_root_of_the_samples():
    score, x = game(polynomial(9), [0, 1, 2])
    few, many = (
        LIME(samples=count, segments=CELLS).attribute(score, x).extras["standard_error"]
        for count in (500, 8000)
    )
    assert_close(few / many, torch.full((3,), 4.0).double(), rtol=0.2, atol=0)


def test_until_stops_when_the_map_stands_still_and_gives_what_so_many_samples_give():
    score, x = game(polynomial(9), [0, 2])
    method = LIME(samples=20000, segments=CELLS, until={"stable": 0.02})
    found = method.attribute(score, x)
    forwards = int(found.extras["forwards"][0])
    assert 128 < forwards < 20000
    assert found.extras["forwards"].tolist() == [forwards] * 2
    span = found.map.amax((1, 2)) - found.map.amin((1, 2))
    assert (found.extras["standard_error"] <= 0.02 * span).all()
    assert_close(
        found.map, LIME(samples=forwards, segments=CELLS).attribute(score, x).map, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_until_does_not_stop_before_there_are_more_samples_than_features(ridge):
    """A linear model of 196 features goes through any 128 scores; that says nothing about its error."""
    score, x = game(polynomial(196), label=grid((28, 28), 14))
    method = LIME(samples=600, segments=CELLS, ridge=ridge, until={"stable": 0.05})
    found = method.attribute(score, x)
    assert found.extras["forwards"].tolist() == [600]
    few = LIME(samples=100, segments=CELLS, ridge=ridge).attribute(score, x)
    assert few.extras["standard_error"] > found.extras["standard_error"]


# ---- options -----------------------------------------------------------------------------------------------------


def test_the_preset_has_the_numbers_of_xplique():
    method = build({"name": "lime", "preset": "xplique"})
    assert (method.samples, method.segments, method.keep) == (150, "quickshift:2", 0.5)
    assert (method.distance, method.kernel_width, method.ridge) == ("euclidean", 45.0, 2.0)
    plain = LIME()
    assert (plain.samples, plain.segments, plain.distance) == (1000, "grid:7", "cosine")
    assert (plain.kernel_width, plain.ridge, plain.keep, plain.scale) == (0.25, 1.0, 0.5, "probability")


def test_the_width_of_the_authors_package_is_half_an_eighth_root():
    """Their kernel is the root of exp(-d^2 / 0.25^2): ours at 0.25 * sqrt(2)."""
    d = torch.linspace(0, 1, 11)
    assert_close((-(d**2) / 0.3536**2).exp(), (-(d**2) / 0.25**2).exp().sqrt(), rtol=1e-3, atol=1e-4)
    assert "0.3536" in LIME.__doc__


@pytest.mark.parametrize(
    "wrong",
    [
        {"samples": 1},
        {"keep": 0.0},
        {"keep": 1.0},
        {"kernel_width": 0.0},
        {"ridge": -1.0},
        {"distance": "other"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "lime", **wrong})
