"""Shapley sampling against captum with the same orders, enumeration, the axioms, and the counts of passes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from captum.attr import ShapleyValueSampling
from coalitions import (
    CELLS,
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
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

import xcli
from xcli.errors import ConfigError
from xcli.methods.perturbation.shapley import ShapleySampling
from xcli.registry import build
from xcli.segments import grid

ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
LABELS = (cut((16, 16), 9), cut((16, 16), 4, seed=1), grid((16, 16), 3))


@cache
def setting(kind):
    """A network, three images, and the score of four rows on them."""
    net, x = made(kind), images(3, 3, 16, 16)
    return net, x, celled(bound(net, x, **ROWS), *LABELS)


def orders_of(method, score, image, features):
    """The features of an image in the orders drawn, (O, F): first the one that is shown first."""
    seeds = score.seeds(torch.tensor([image]), method.name).expand(method.orders)
    rank = method.ranks(seeds, torch.arange(method.orders), torch.tensor([features]))
    return rank.argsort(1)


def added(net, x, other, label, orders, target):
    """What each feature adds in each order, (O, F), picture by picture."""
    found = torch.zeros(orders.shape, dtype=torch.float64)
    for o, order in enumerate(orders.tolist()):
        sets = torch.zeros(len(order) + 1, len(order), dtype=torch.bool)
        for place, feature in enumerate(order):
            sets[place + 1 :, feature] = True
        with torch.no_grad():
            score = net(shown(x, other, label, sets))[:, target]
        for place, feature in enumerate(order):
            found[o, feature] = score[place + 1] - score[place]
    return found


# ---- captum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PooledLinear, Residual, Tokens])
def test_maps_are_those_of_captum_with_the_same_orders(kind, monkeypatch):
    net, x, score = setting(kind)
    method = ShapleySampling(orders=6, segments=CELLS)
    found = method.attribute(score, x).map
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        orders = orders_of(method, score, image, int(LABELS[image].max()) + 1)
        peer = ShapleyValueSampling(net)
        peer.permutation_generator = lambda features, samples, orders=orders: iter(orders.tolist())
        with monkeypatch.context() as patch:
            captum_in_double(patch)
            one = peer.attribute(
                x[image : image + 1],
                target=target,
                n_samples=6,
                feature_mask=LABELS[image][None, None],
                perturbations_per_eval=4,
            )
        assert one.dtype == torch.float64
        assert_close(one[0, 0], found[row], rtol=1e-10, atol=1e-10 * float(one.abs().max()))


def test_the_number_of_orders_is_that_of_captum():
    assert ShapleySampling().orders == 25
    assert ShapleyValueSampling.attribute.__wrapped__.__defaults__[4] == 25
    assert (ShapleySampling().segments, ShapleySampling().scale) == ("grid:7", "logit")


# ---- literal pictures, the error, the passes ---------------------------------------------------------------------


@pytest.mark.parametrize("substrate", ["constant", "mean", "minimum", "blur", "negative", "uniform"])
def test_maps_and_errors_are_those_of_literal_pictures_with_any_substrate(substrate):
    net, x, score = setting(Residual)
    method = ShapleySampling(orders=5, segments=CELLS, substrate=substrate, value=0.7, sigma=2.0)
    found, whole = method.attribute(score, x), method.whole(score, x)
    if substrate in ("constant", "mean"):
        assert_close(
            whole, torch.full_like(x, 0.7) if substrate == "constant" else x.mean((2, 3), True) + 0 * x
        )
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        label = LABELS[image]
        orders = orders_of(method, score, image, int(label.max()) + 1)
        one = added(net, x[image], whole[image], label, orders, target)
        mean = one.sum(0) / 5
        assert_close(found.map[row], mean[label], rtol=1e-9, atol=1e-10 * float(mean.abs().max()))
        squared = ((one - mean) ** 2).sum(0) / 4 / 5
        assert_close(found.extras["standard_error"][row], squared.mean().sqrt(), rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("micro_batch", [1, 5, 64])
def test_passes_are_orders_by_all_features_but_one(micro_batch):
    net, x, _ = setting(Residual)
    score = celled(bound(net, x, **ROWS, micro_batch=micro_batch), *LABELS)
    method = ShapleySampling(orders=3, segments=CELLS)
    found, seen = seen_by(net, lambda: method.attribute(score, x))
    assert sum(map(len, seen)) == 3 * (8 + 3 + 8) + 3 + 1  # and the images, and none of them
    assert found.extras["forwards"].tolist() == [24, 24, 9, 24]


def test_a_single_order_has_no_standard_error():
    _, x, score = setting(Residual)
    found = ShapleySampling(orders=1, segments=CELLS).attribute(score, x)
    assert torch.isnan(found.extras["standard_error"]).all()
    assert torch.isfinite(found.map).all()


@pytest.mark.parametrize("orders", [1, 4])
def test_one_feature_is_the_whole_difference_and_costs_two_passes(orders):
    net, x = made(Residual), images(2, 3, 16, 16)
    method = ShapleySampling(orders=orders, segments="grid:1")
    score = bound(net, x, [1, 2])
    found, seen = seen_by(net, lambda: method.attribute(score, x))
    expected = (net(x) - net(torch.zeros_like(x)))[[0, 1], [1, 2]].detach()
    assert_close(found.map, expected[:, None, None].expand(2, 16, 16), rtol=1e-12, atol=1e-14)
    assert found.extras["forwards"].tolist() == [0, 0]
    assert sum(map(len, seen)) == 3


def test_one_two_and_nine_features_in_one_batch():
    net, x = made(Residual), images(3, 3, 16, 16)
    labels = (torch.zeros(16, 16).long(), (torch.arange(16) // 8).expand(16, 16), LABELS[2])
    score = celled(bound(net, x, [1, 2, 0]), *labels)
    method = ShapleySampling(orders=4, segments=CELLS)
    found = method.attribute(score, x)
    assert found.extras["forwards"].tolist() == [0, 4, 32]
    for image, target in enumerate([1, 2, 0]):
        orders = orders_of(method, score, image, int(labels[image].max()) + 1)
        mean = added(net, x[image], torch.zeros_like(x[0]), labels[image], orders, target).mean(0)
        assert_close(found.map[image], mean[labels[image]], rtol=1e-9, atol=1e-12)


# ---- the axioms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [1, 2, 7])
@pytest.mark.parametrize("substrate", ["constant", "mean", "blur", "imputation"])
def test_numbers_of_the_features_sum_to_what_the_picture_adds(orders, substrate):
    net, x, score = setting(Residual)
    method = ShapleySampling(orders=orders, segments=CELLS, substrate=substrate, sigma=2.0, value=-0.4)
    found, whole = method.attribute(score, x), method.whole(score, x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        both = net(torch.stack([x[image], whole[image]]))[:, target]
        total = of_features(found.map[row : row + 1], LABELS[image]).sum()
        assert_close(total, both[0] - both[1], rtol=1e-11, atol=1e-13)


def test_many_orders_give_the_shapley_values():
    score, x = game(polynomial(9), [0, 1, 2])
    expected = torch.stack([shapley(one) for one in polynomial(9)(every(9).double()).T])
    found = numbers(ShapleySampling(orders=2000, segments=CELLS), score, x)
    assert_close(found, expected, rtol=0, atol=0.04 * float(expected.abs().max()))
    four = grid((16, 16), 2)
    score, x = game(polynomial(4), [2], four)
    table = polynomial(4)(every(4).double())[:, 2]
    found = numbers(ShapleySampling(orders=2000, segments=CELLS), score, x)[0]
    expected = shapley_by_orders(table)
    assert_close(found, expected, rtol=0, atol=0.03 * float(expected.abs().max()))
    assert_close(shapley(table), expected)


def test_a_feature_that_never_counts_gets_nothing_and_a_linear_one_its_coefficient():
    def play(seen):
        return (
            seen[:, :1] * seen[:, 1:2] + 3 * seen[:, 2:3] - seen[:, 3:4] * seen[:, 4:5] * seen[:, 5:6]
        ).exp()

    score, x = game(play)
    phi = numbers(ShapleySampling(orders=40, segments=CELLS), score, x)[0]
    assert (phi[6:] == 0).all()
    assert (phi[2:6] != 0).all()
    score, x = game(lambda seen: 3 * seen[:, 2:3] + (seen[:, :1] * seen[:, 1:2]))
    phi = numbers(ShapleySampling(orders=3, segments=CELLS), score, x)[0]
    assert phi[2] == pytest.approx(3, abs=1e-12)


def test_features_that_play_the_same_part_get_the_same_in_the_limit():
    def play(seen):
        return (seen[:, :3].sum(1, keepdim=True) ** 3) + seen[:, 3:4] * seen[:, :3].sum(1, keepdim=True)

    score, x = game(play)
    method = ShapleySampling(orders=3000, segments=CELLS)
    found = method.attribute(score, x)
    phi = of_features(found.map, grid((16, 16), 3))[0]
    assert_close(phi[:3], phi[:3].mean().expand(3), rtol=0.05, atol=0)
    assert phi[3] == pytest.approx(1.5, rel=0.05)
    few = numbers(ShapleySampling(orders=3, segments=CELLS), score, x)[0]
    assert (few[:3] - few[:3].mean()).abs().max() > 0.1 * few[:3].mean()


# ---- the orders --------------------------------------------------------------------------------------------------


def test_every_order_is_as_likely_as_any_other():
    _, _, score = setting(Residual)
    orders = orders_of(ShapleySampling(orders=24000, segments=CELLS), score, 1, 4)
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(24000, 4))
    words = orders @ torch.tensor([64, 16, 4, 1])
    counts = torch.unique(words, return_counts=True)[1].numpy()
    assert len(counts) == 24
    assert chisquare(counts).pvalue > 1e-4


def test_orders_belong_to_the_seed_and_the_image():
    _, _, score = setting(Residual)
    method = ShapleySampling(orders=20, segments=CELLS)
    first = orders_of(method, score, 0, 9)
    assert torch.equal(first[:7], orders_of(ShapleySampling(orders=7, segments=CELLS), score, 0, 9))
    assert not torch.equal(first, orders_of(method, score, 2, 9))
    assert not torch.equal(first, orders_of(method, replace(score, seed=1), 0, 9))
    assert len({tuple(one) for one in first.tolist()}) == 20
    small = torch.tensor([9, 4, 12])
    seeds = score.seeds(torch.tensor([0, 0, 0]), method.name)
    mixed = method.ranks(seeds, torch.tensor([5, 5, 5]), small)
    for rank, features in zip(mixed, small.tolist()):
        alone = method.ranks(seeds[:1], torch.tensor([5]), torch.tensor([features]))
        assert torch.equal(rank[:features], alone[0])


# ---- the standard error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [5, 40])
def test_the_standard_error_says_how_far_the_map_is_from_its_limit(orders):
    score, x = game(polynomial(9), [0, 1, 2])
    limit = torch.stack([shapley(one) for one in polynomial(9)(every(9).double()).T])
    maps, errors, _ = over_seeds(ShapleySampling(orders=orders, segments=CELLS), score, x, 60)
    ratio = honesty(maps, errors, limit)
    assert (ratio > 0.8).all(), ratio
    assert (ratio < 1.25).all(), ratio


# ---- rows, batches, precision ------------------------------------------------------------------------------------


def test_rows_and_images_of_different_numbers_of_features_are_what_they_are_alone():
    method = ShapleySampling(orders=5, segments=CELLS)
    labels = (*LABELS[:2], cut((16, 16), 6))
    rows_and_images_do_not_need_company(method, made(Residual), images(3, 3, 16, 16), *labels)


def test_single_precision_is_near():
    single_precision_is_near(ShapleySampling(orders=6, segments="grid:3"), made(Tokens), images(2, 3, 16, 16))


def test_maps_can_be_differentiated_by_pixels_and_weights():
    method = ShapleySampling(orders=3, segments="grid:3")
    maps_can_be_differentiated(method, made(Residual), images(2, 3, 16, 16), "stem.weight")


def test_explain_takes_label_maps_and_trains_through_the_map():
    net, x = made(Residual), images(3, 3, 16, 16)
    spec = {"name": "shapley-sampling", "orders": 3, "segments": CELLS}
    pictures = {"cells": torch.stack(LABELS)[:, None]}
    found = xcli.explain(net, x, spec, target=[1, 0, 2], create_graph=True, pictures=pictures)
    found.map.square().sum().backward()
    assert net.head.weight.grad.abs().max() > 0
    for one, label in zip(found.map.detach(), LABELS):
        of_features(one[None], label)


@pytest.mark.parametrize(
    "wrong", [{"orders": 0}, {"segments": "cells:3"}, {"until": {"stable": 0.1}}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "shapley-sampling", **wrong})
