"""Kernel SHAP against captum with the same sets, the constrained problem, Shapley values by enumeration, its draws."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from captum.attr import KernelShap
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
    shapley,
    shapley_by_orders,
    shown,
    single_precision_is_near,
)
from scipy.stats import chisquare
from sklearn.linear_model import LinearRegression
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

import xcli
from xcli.errors import ConfigError
from xcli.methods.perturbation.surrogate import KernelSHAP
from xcli.registry import build
from xcli.segments import grid

ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
LABELS = (cut((16, 16), 9), cut((16, 16), 4, seed=1), grid((16, 16), 3))
ALL = 1 << 20


@cache
def setting(kind):
    """A network, three images, and the score of four rows on them."""
    net, x = made(kind), images(3, 3, 16, 16)
    return net, x, celled(bound(net, x, **ROWS), *LABELS)


def fresh(kind):
    """The same, with nothing known of the images or of the picture without any."""
    net, x, score = setting(kind)
    return net, x, replace(score, memo={}, scales={})


def samples_of(method, score, x, image=0):
    """The sets of an image, (S, F)."""
    design = method.design(score, x)
    sample = torch.arange(int(design.count[image]))
    kept = design.kept(torch.full_like(sample, image), sample)
    return kept[:, : int(design.features[image])]


def values(net, x, other, label, kept, target):
    """The logits of literal pictures."""
    with torch.no_grad():
        return net(shown(x, other, label, kept))[:, target]


def kernel(kept):
    """(F - 1) / (C(F, k) k (F - k)) of each set."""
    features = kept.shape[1]
    return torch.tensor(
        [(features - 1) / (comb(features, k) * k * (features - k)) for k in kept.sum(1).tolist()]
    ).double()


def constrained(kept, scores, weights, total):
    """The least squares of ``scores`` (S,) by coefficients that sum to ``total``, from its conditions as they stand."""
    z, w, features = kept.double(), weights.double(), kept.shape[1]
    system = torch.zeros(features + 1, features + 1, dtype=torch.float64)
    for one, weight in zip(z, w):
        system[:features, :features] += 2 * weight * one[:, None] * one
    system[:features, features] = system[features, :features] = 1
    right = torch.cat([2 * (z * (w * scores)[:, None]).sum(0), total[None]])
    return torch.linalg.solve(system, right)[:features]


# ---- captum, the conditions, enumeration -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PooledLinear, Residual, Tokens])
def test_maps_are_those_of_captum_with_the_same_sets_and_heavy_ends(kind, monkeypatch):
    net, x, score = setting(kind)
    method = KernelSHAP(samples=60, segments="grid:3")
    found = method.attribute(score, x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        kept = samples_of(method, score, x, image).long()

        def sets(_x, kept=kept, **_):
            yield torch.ones_like(kept[:1])
            yield torch.zeros_like(kept[:1])
            yield from kept[:, None]

        with monkeypatch.context() as patch:
            captum_in_double(patch)
            peer = KernelShap(net)
            peer.perturb_func, peer.inf_weight = sets, 1e8
            peer.interpretable_model = Fitted(LinearRegression())
            one = peer.attribute(
                x[image : image + 1],
                target=target,
                n_samples=62,
                feature_mask=LABELS[2][None, None],
                return_input_shape=False,
            )
        ours = of_features(found.map[row : row + 1], LABELS[2])
        assert_close(ours, one, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("kind", [PooledLinear, Residual, Tokens])
def test_maps_solve_the_constrained_least_squares(kind, paired):
    net, x, score = setting(kind)
    method = KernelSHAP(samples=40, segments=CELLS, paired=paired)
    found = method.attribute(score, x)
    exact = [False, True, False]
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        kept, other = samples_of(method, score, x, image), torch.zeros_like(x[0])
        ends = net(torch.stack([other, x[image]]))[:, target].detach()
        scores = values(net, x[image], other, LABELS[image], kept, target) - ends[0]
        weights = kernel(kept) if exact[image] else torch.ones(len(kept))
        expected = constrained(kept, scores, weights, ends[1] - ends[0])
        assert_close(
            of_features(found.map[row : row + 1], LABELS[image])[0],
            expected,
            rtol=1e-8,
            atol=1e-9 * float(expected.abs().max()),
        )
        assert len(kept) == (14 if exact[image] else 40)


def test_all_sets_give_exact_shapley_values_also_where_numbers_of_features_differ():
    net, x, score = fresh(Residual)
    method = KernelSHAP(samples=510, segments=CELLS)
    found, seen = seen_by(net, lambda: method.attribute(score, x))
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        count = int(LABELS[image].max()) + 1
        table = values(net, x[image], torch.zeros_like(x[0]), LABELS[image], every(count), target)
        expected = shapley(table)
        assert_close(
            found.map[row], expected[LABELS[image]], rtol=1e-9, atol=1e-10 * float(expected.abs().max())
        )
        if count == 4:
            assert_close(shapley_by_orders(table), expected, rtol=1e-12, atol=1e-15)
    assert found.extras["forwards"].tolist() == [510, 510, 14, 510]
    assert found.extras["standard_error"].tolist() == [0.0] * 4
    assert sum(map(len, seen)) == 510 + 14 + 510 + 3 + 1


@pytest.mark.parametrize("paired", [True, False])
def test_one_image_is_exact_while_another_is_sampled(paired):
    net, x, score = setting(Tokens)
    method = KernelSHAP(samples=101, segments=CELLS, paired=paired)
    found = method.attribute(score, x)
    drawn = 102 if paired else 101
    assert found.extras["forwards"].tolist() == [drawn, drawn, 14, drawn]
    table = values(net, x[1], torch.zeros_like(x[1]), LABELS[1], every(4), 0)
    assert_close(found.map[2], shapley_by_orders(table)[LABELS[1]], rtol=1e-9, atol=1e-12)
    assert (found.extras["standard_error"] > 0).tolist() == [True, True, False, True]


def test_drawn_sets_tend_to_the_shapley_values():
    score, x = game(polynomial(9), [0, 1, 2])
    expected = torch.stack([shapley(one) for one in polynomial(9)(every(9).double()).T])
    for paired in (True, False):
        by_few, by_many = (
            torch.stack(
                [
                    numbers(
                        KernelSHAP(samples=count, segments=CELLS, paired=paired), replace(score, seed=s), x
                    )
                    for s in range(4)
                ]
            )
            for count in (60, 500)
        )
        few, many = ((one - expected).square().mean().sqrt() for one in (by_few, by_many))
        assert many < 0.5 * few
        assert many < 0.05 * expected.abs().max()


# ---- the sum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 2},
        {"samples": 5, "paired": False},
        {"samples": 30},
        {"samples": ALL},
        {"samples": 30, "substrate": "blur", "sigma": 2.0},
        {"samples": 30, "substrate": "mean"},
        {"samples": 30, "substrate": "constant", "value": 0.7},
        {"samples": 30, "substrate": "uniform"},
        {"samples": 30, "substrate": "imputation"},
    ],
    ids=str,
)
def test_numbers_of_the_features_sum_to_what_the_picture_adds(options):
    net, x, score = setting(Residual)
    method = KernelSHAP(segments=CELLS, **options)
    found, whole = method.attribute(score, x), method.whole(score, x)
    if options.get("substrate") == "mean":
        assert_close(whole, x.mean((2, 3), keepdim=True).expand(x.shape))
    if "value" in options:
        assert (whole == 0.7).all()
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        both = net(torch.stack([x[image], whole[image]]))[:, target]
        total = of_features(found.map[row : row + 1], LABELS[image]).sum()
        assert_close(total, both[0] - both[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("substrate", ["constant", "mean", "blur", "negative", "gaussian"])
def test_the_network_sees_the_pictures_of_the_sets(substrate):
    net, x, score = setting(Residual)
    method = KernelSHAP(samples=20, segments=CELLS, substrate=substrate, value=-0.3)
    other = method.whole(score, x)
    _, seen = seen_by(net, lambda: method.attribute(score, x))
    pictures = torch.cat(seen)
    for image in range(3):
        for one in shown(x[image], other[image], LABELS[image], samples_of(method, score, x, image)):
            assert (pictures == one).flatten(1).all(1).any()


def test_too_few_sets_give_the_equal_shares_that_they_do_not_speak_against():
    """Two sets of nine features: the residual is nil, and no other solution is nearer to equal shares."""
    net, x, score = setting(Residual)
    method = KernelSHAP(samples=2, segments="grid:3")
    found = method.attribute(score, x)
    kept = samples_of(method, score, x).double()
    scores = values(net, x[0], torch.zeros_like(x[0]), LABELS[2], kept.bool(), 1)
    ends = net(torch.stack([torch.zeros_like(x[0]), x[0]]))[:, 1].detach()
    share = (ends[1] - ends[0]) / 9
    phi = of_features(found.map[:1], LABELS[2])[0]
    odd = kept - kept.mean(1, keepdim=True)  # one direction, as the sets are complements
    slope = (odd[0] @ (phi - share)) / odd[0].square().sum()
    assert_close(phi - share, slope * odd[0], rtol=1e-8, atol=1e-12)
    aim = (odd * (scores - ends[0] - share * kept.sum(1))[:, None]).sum(0) @ odd[0] / 2
    assert_close(slope, aim / odd[0].square().sum() ** 2, rtol=1e-8, atol=1e-12)


# ---- the draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("features", [5, 9])
def test_sizes_of_drawn_sets_follow_the_kernel_and_sets_of_a_size_are_alike(features, paired):
    label = torch.arange(256).view(16, 16) % features
    score, x = game(polynomial(features), label=label)
    method = replace(KernelSHAP(samples=20, segments=CELLS, paired=paired))
    design = method.design(score, x)
    sample = torch.arange(40000)
    kept = design.kept(torch.zeros_like(sample), sample)[:: 2 if paired else 1]
    if design.count[0] == 2 ** design.features[0] - 2:
        pytest.fail("these sets are not drawn")
    sizes = torch.bincount(kept.sum(1), minlength=features + 1).numpy()
    assert sizes[0] == sizes[features] == 0
    chance = np.array([1 / (k * (features - k)) for k in range(1, features)])
    assert chisquare(sizes[1:features], chance / chance.sum() * sizes.sum()).pvalue > 1e-4
    for size in (1, 2, features - 1):
        words = kept[kept.sum(1) == size].long() @ (1 << torch.arange(features))
        sets = [sum(1 << f for f in chosen) for chosen in combinations(range(features), size)]
        found = torch.bincount(words, minlength=1 << features)[sets].numpy()
        assert found.sum() == len(words)
        assert chisquare(found).pvalue > 1e-4


def test_every_second_set_is_the_complement_of_the_one_before():
    _, x, score = setting(Residual)
    kept = samples_of(KernelSHAP(samples=61, segments=CELLS), score, x)
    assert len(kept) == 62
    assert torch.equal(kept[1::2], ~kept[::2])
    single = samples_of(KernelSHAP(samples=61, segments=CELLS, paired=False), score, x)
    assert len(single) == 61
    assert not torch.equal(single[1:61:2], ~single[:60:2])
    assert torch.equal(single[:31], kept[::2])
    assert len({tuple(one.tolist()) for one in kept[::2]}) > 15


def test_exact_images_take_every_proper_set_once():
    _, x, score = setting(Residual)
    kept = samples_of(KernelSHAP(samples=14, segments=CELLS), score, x, 1)
    assert sorted(map(tuple, kept.tolist())) == sorted(map(tuple, every(4)[1:-1].tolist()))
    kept = samples_of(KernelSHAP(samples=510, segments=CELLS), score, x, 0)
    assert sorted(map(tuple, kept.tolist())) == sorted(map(tuple, every(9)[1:-1].tolist()))


@pytest.mark.parametrize("paired", [True, False])
def test_sets_belong_to_the_seed_and_the_image_and_not_to_the_company(paired):
    net, x = made(Residual), images(3, 3, 16, 16)
    labels = (cut((16, 16), 6), cut((16, 16), 25, seed=1), grid((16, 16), 3))
    method = KernelSHAP(samples=40, segments=CELLS, paired=paired)
    score = celled(bound(net, x, **ROWS), *labels)
    for image in range(3):
        one = replace(bound(net, x[image : image + 1], [0]), keys=[f"image-{image}"])
        alone = samples_of(method, celled(one, labels[image]), x[image : image + 1])
        assert torch.equal(alone, samples_of(method, score, x, image))
        other = replace(celled(one, labels[image]), seed=1)
        assert not torch.equal(alone, samples_of(method, other, x[image : image + 1]))
        longer = samples_of(replace(method, samples=60), score, x, image)
        assert torch.equal(longer[:40], alone)
    assert not torch.equal(samples_of(method, score, x, 0), samples_of(method, score, x, 2)[:, :6])


# ---- one and two features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [True, False])
def test_one_feature_is_the_whole_difference_and_costs_two_passes(paired):
    net, x = made(Residual), images(2, 3, 16, 16)
    score = bound(net, x, [1, 2])
    method = KernelSHAP(samples=20, segments="grid:1", paired=paired)
    found, seen = seen_by(net, lambda: method.attribute(score, x))
    expected = (net(x) - net(torch.zeros_like(x)))[[0, 1], [1, 2]].detach()
    assert_close(found.map, expected[:, None, None].expand(2, 16, 16), rtol=1e-10, atol=1e-12)
    assert found.extras["forwards"].tolist() == found.extras["standard_error"].tolist() == [0.0, 0.0]
    assert sum(map(len, seen)) == 3  # the two images, and none of them


@pytest.mark.parametrize("options", [{}, {"paired": False}, {"until": {"stable": 0.01}}], ids=str)
def test_one_two_and_many_features_in_one_batch(options):
    net, x = made(Residual), images(3, 3, 16, 16)
    halves = (torch.arange(16) // 8).expand(16, 16)
    labels = (torch.zeros(16, 16).long(), halves, LABELS[2])
    score = celled(bound(net, x, [1, 2, 0]), *labels)
    method = KernelSHAP(samples=30, segments=CELLS, **options)
    found = method.attribute(score, x)
    none = torch.zeros_like(x[0])
    for image, target in ((0, 1), (1, 2)):
        table = values(net, x[image], none, labels[image], every(image + 1), target)
        assert_close(found.map[image], shapley_by_orders(table)[labels[image]], rtol=1e-9, atol=1e-12)
    assert found.extras["forwards"].tolist() == [0, 2, 30]
    assert found.extras["standard_error"][:2].tolist() == [0, 0]


# ---- rows, batches, precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"paired": False}, {"constrained": False}, {"until": {"stable": 0.1}}], ids=str
)
def test_rows_and_images_of_different_numbers_of_features_are_what_they_are_alone(options):
    method = KernelSHAP(samples=300 if "until" in options else 40, segments=CELLS, **options)
    labels = (cut((16, 16), 12), cut((16, 16), 4, seed=1), cut((16, 16), 7))
    rows_and_images_do_not_need_company(method, made(Residual), images(3, 3, 16, 16), *labels)


def test_single_precision_is_near():
    single_precision_is_near(KernelSHAP(samples=60, segments="grid:3"), made(Tokens), images(2, 3, 16, 16))


@pytest.mark.parametrize("samples", [30, ALL])
def test_maps_can_be_differentiated_by_pixels_and_weights(samples):
    method = KernelSHAP(samples=samples, segments="grid:2" if samples == ALL else "grid:3")
    maps_can_be_differentiated(method, made(Residual), images(2, 3, 16, 16), "stem.weight")


def test_explain_trains_through_the_map():
    net, x = made(Residual), images(2, 3, 16, 16)
    found = xcli.explain(
        net, x, {"name": "kernel-shap", "samples": 20, "segments": "grid:3"}, create_graph=True
    )
    found.map.square().sum().backward()
    assert net.head.weight.grad.abs().max() > 0


# ---- the standard error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"paired": False}, {"constrained": False, "paired": False}, {"constrained": False}],
    ids=str,
)
def test_the_standard_error_says_how_far_the_map_is_from_its_limit(options):
    """12 features: too many sets to take all."""
    label = torch.arange(256).view(16, 16) % 12
    score, x = game(polynomial(12, centre=0.2), [0, 1, 2], label)
    if options.get("constrained", True):
        limit = torch.stack([shapley(one) for one in polynomial(12, centre=0.2)(every(12).double()).T])
    else:
        kept = every(12)[1:-1]
        scores = polynomial(12, centre=0.2)(kept.double())
        model = LinearRegression().fit(kept.numpy(), scores.numpy(), sample_weight=kernel(kept).numpy())
        limit = torch.from_numpy(model.coef_)
    maps, errors, _ = over_seeds(KernelSHAP(samples=200, segments=CELLS, **options), score, x, 48)
    ratio = honesty(maps, errors, limit)
    if options.get("paired", True):  # which have no error in the first, see below
        ratio = ratio[1:]
    assert (ratio > 0.7).all(), ratio
    assert (ratio < 1.4).all(), ratio


def test_pairs_take_out_what_interactions_of_two_bring_and_the_standard_error_knows():
    score, x = game(polynomial(12), [0, 1], torch.arange(256).view(16, 16) % 12)
    expected = torch.stack([shapley(one) for one in polynomial(12)(every(12).double()).T])
    pairs, single = (
        KernelSHAP(samples=300, segments=CELLS, paired=paired).attribute(score, x) for paired in (True, False)
    )
    scale = float(expected.abs().max())
    label = score.pictures["cells"][0, 0]
    assert_close(of_features(pairs.map, label)[0], expected[0], rtol=0, atol=1e-9 * scale)
    assert pairs.extras["standard_error"][0] < 1e-9 * scale
    assert single.extras["standard_error"][0] > 0.01 * expected[0].abs().max()
    assert pairs.extras["standard_error"][1] > 0.01 * expected[1].abs().max()  # of three: no help


def test_until_stops_and_is_honest_about_where():
    score, x = game(polynomial(12, centre=0.2), [2], torch.arange(256).view(16, 16) % 12)
    limit = shapley(polynomial(12, centre=0.2)(every(12).double())[:, 2])[None]
    method = KernelSHAP(samples=4000, segments=CELLS, until={"stable": 0.05})
    maps, errors, forwards = over_seeds(method, score, x, 40)
    span = maps.amax(2) - maps.amin(2)
    assert (errors <= 0.05 * span).all()
    assert (forwards < 4000).all()
    assert (forwards > 256).any()
    ratio = honesty(maps, errors, limit)
    assert (ratio > 0.7).all(), ratio
    assert (ratio < 1.4).all(), ratio
    stopped = numbers(KernelSHAP(samples=int(forwards[0]), segments=CELLS), score, x)
    assert_close(stopped, maps[0], rtol=1e-9, atol=1e-12)


def test_exact_images_are_never_stopped_half_way():
    _, x, score = setting(Residual)
    method = KernelSHAP(samples=510, segments=CELLS, until={"stable": 0.9})
    found = method.attribute(score, x)
    assert found.extras["forwards"].tolist() == [510, 510, 14, 510]
    assert found.extras["standard_error"].tolist() == [0.0] * 4
    assert_close(
        found.map, KernelSHAP(samples=510, segments=CELLS).attribute(score, x).map, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"paired": False}, {"constrained": False}], ids=str)
def test_until_does_not_stop_before_there_are_more_sets_than_features(options):
    """Numbers of 196 features go through any 128 scores; that says nothing about their error."""
    score, x = game(polynomial(196), [2], label=grid((28, 28), 14))
    method = KernelSHAP(samples=600, segments=CELLS, until={"stable": 0.03}, **options)
    assert method.attribute(score, x).extras["forwards"].tolist() == [600]
    few, many = (
        KernelSHAP(samples=count, segments=CELLS, **options).attribute(score, x).extras["standard_error"]
        for count in (100, 600)
    )
    assert few > many


# ---- options -----------------------------------------------------------------------------------------------------


def test_the_preset_of_xplique_is_plain_regression_with_an_intercept():
    preset = build({"name": "kernel-shap", "preset": "xplique"})
    assert (preset.samples, preset.segments) == (800, "quickshift:2")
    assert (preset.paired, preset.constrained) == (False, False)
    net, x, score = setting(Residual)
    method = build({"name": "kernel-shap", "preset": "xplique", "samples": 80, "segments": CELLS})
    found = method.attribute(score, x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        kept = samples_of(method, score, x, image)
        scores = values(net, x[image], torch.zeros_like(x[0]), LABELS[image], kept, target)
        weight = kernel(kept).numpy() if image == 1 else None
        model = LinearRegression().fit(kept.numpy().astype(float), scores.numpy(), sample_weight=weight)
        expected = torch.from_numpy(model.coef_)
        ours = of_features(found.map[row : row + 1], LABELS[image])[0]
        assert_close(ours, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
    assert "r2" not in found.extras


def test_defaults():
    method = KernelSHAP()
    assert (method.samples, method.segments, method.scale) == (1000, "grid:7", "logit")
    assert method.paired
    assert method.constrained


@pytest.mark.parametrize(
    "wrong", [{"samples": 1}, {"segments": "cells:3"}, {"until": {"stable": 0}}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "kernel-shap", **wrong})
