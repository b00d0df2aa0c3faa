"""Localisation metrics: answers known by hand, best and worst maps, theorems between metrics, and Quantus."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import quantus
import torch
from metric_contract import parts_of
from toys import images

from xcli.demo.scenes import scenes
from xcli.metrics.base import Truth
from xcli.metrics.localisation import (
    AttributionLocalisation,
    EnergyPointingGame,
    IntersectionOverUnion,
    LocalisationAUC,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    TopKIntersection,
    enclosing,
)
from xcli.registry import build_metric, metrics

ALL = (
    PointingGame(),
    PointingGame(tolerance=0),
    EnergyPointingGame(),
    EnergyPointingGame(region="annotated"),
    RelevanceMass(),
    RelevanceRank(),
    TopKIntersection(k=400),
    TopKIntersection(k=400, weighted=True),
    AttributionLocalisation(),
    AttributionLocalisation(weighted=True),
    IntersectionOverUnion(),
    IntersectionOverUnion(scale="min-max", threshold=0.5),
    LocalisationAUC(),
)


def truth(mask, known=None, pixel=1.0):
    mask = torch.as_tensor(mask, dtype=torch.bool)
    known = torch.ones(len(mask), dtype=torch.bool) if known is None else torch.tensor(known)
    return Truth(mask, known, torch.full((len(mask), 2), float(pixel), dtype=torch.float64))


def value(metric, map, mask, **how):
    """The value of one map and mask, given as nested lists."""
    found = metric.measure(
        torch.as_tensor(map, dtype=torch.float64)[None], truth(torch.as_tensor(mask)[None], **how)
    )
    return found.values.item()


def blobs(count=12, size=(24, 40), seed=0):
    """Masks of random rectangles that leave enough room on every side of them."""
    draw = np.random.default_rng(seed)
    masks = np.zeros((count, *size), dtype=bool)
    for mask in masks:
        y, x = draw.integers(0, 10), draw.integers(0, 12)
        mask[y : y + draw.integers(7, 10), x : x + draw.integers(7, 10)] = True
    return torch.from_numpy(masks)


# ---- known answers -------------------------------------------------------------------------------------------------

MAP = [[4.0, 1.0, -1.0], [2.0, 3.0, -5.0]]
MASK = [[1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (EnergyPointingGame(region="annotated"), 6 / 10),
        (EnergyPointingGame(), 1.0),
        (RelevanceMass(), 6 / 10),
        (RelevanceMass(part="absolute"), 11 / 16),
        (RelevanceMass(part="signed"), 1 / 4),
        (RelevanceRank(), 2 / 3),  # the three highest: 4, 3, 2
        (TopKIntersection(k=2), 1 / 2),
        (TopKIntersection(k=2, weighted=True), 1.0),  # the object is half of the image
        (TopKIntersection(k=6), 3 / 6),
        (AttributionLocalisation(), 6 / 10),
        (AttributionLocalisation(part="absolute"), 11 / 16),
        (AttributionLocalisation(weighted=True), 12 / 10),
        (AttributionLocalisation(max_size=0.5), 6 / 10),
        (IntersectionOverUnion(), 2 / 5),  # from 0.8 on: 4, 1, 2, 3
        (IntersectionOverUnion(threshold=0.5), 2 / 4),  # from 2 on: 4, 2, 3
        (IntersectionOverUnion(scale="min-max"), 2 / 6),  # from -3.2 on: all but the -5
        (LocalisationAUC(), 5 / 9),  # 4 beats 3, 2 beats 2, -5 beats none of 1, -1, 3
        (PointingGame(tolerance=0), 1.0),
    ],
    ids=lambda value: repr(value) if not isinstance(value, float) else "",
)
def test_answers_by_hand(metric, expected):
    assert value(metric, MAP, MASK) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("sides", [(1.0, 1.0), (2.0, 2.0), (3.0, 5.0)])
@pytest.mark.parametrize(
    "offset", [(0, 14), (0, 15), (9, 12), (9, 11), (3, 0), (5, 0), (4, 3), (0, 3), (-9, -12)]
)
def test_the_tolerance_is_in_pixels_of_the_original_and_strict(sides, offset):
    map, mask = torch.zeros(1, 41, 41, dtype=torch.float64), torch.zeros(1, 41, 41, dtype=torch.bool)
    map[0, 20, 20] = 1
    mask[0, 20 + offset[0], 20 + offset[1]] = True
    given = Truth(mask, torch.tensor([True]), torch.tensor([sides], dtype=torch.float64))
    inside = (offset[0] * sides[0]) ** 2 + (offset[1] * sides[1]) ** 2 < 225
    assert PointingGame().measure(map, given).values.item() == inside


def test_the_nearest_pixel_of_the_object_counts():
    map, mask = torch.zeros(1, 9, 50), torch.zeros(1, 9, 50, dtype=torch.bool)
    map[0, 4, 4] = 1
    mask[0, 4, [18, 49]] = True
    assert PointingGame().measure(map, truth(mask)).values.item() == 1
    mask[0, 4, 18] = False
    assert PointingGame().measure(map, truth(mask)).values.item() == 0


def test_the_first_of_equal_pixels_points_and_a_flat_map_points_nowhere():
    exact, any_tie = PointingGame(tolerance=0), PointingGame(tolerance=0, ties="any")
    tied = [[0.0, 1.0], [1.0, 0.0]]
    assert value(exact, tied, [[0, 1], [0, 0]]) == 1
    assert value(exact, tied, [[0, 0], [1, 0]]) == 0
    assert value(any_tie, tied, [[0, 0], [1, 0]]) == 1
    assert value(any_tie, tied, [[1, 0], [0, 0]]) == 0
    assert value(PointingGame(), [[0.0, 0.0]], [[1, 1]]) == 0


def test_the_summary_of_the_pointing_game_is_a_mean_over_classes():
    values, target = np.array([1.0, 1, 0, 0, np.nan, np.nan]), np.array([7, 7, 7, 2, 2, 5])
    assert PointingGame().summary(values, None, target) == pytest.approx((2 / 3 + 0) / 2)
    assert math.isnan(PointingGame().summary(values[4:], None, target[4:]))
    assert RelevanceMass().summary(values, None, target) is None


# ---- ties, theorems, limits ----------------------------------------------------------------------------------------


def test_tied_pixels_count_as_the_average_over_all_ways_to_break_the_tie():
    map, mask = (
        torch.tensor([3.0, 1, 1, 1, 0, 0], dtype=torch.float64),
        torch.tensor([0, 1, 1, 0, 1, 0]).bool(),
    )
    orders = [
        order
        for order in itertools.permutations(range(6))
        if all(map[a] >= map[b] for a, b in itertools.pairwise(order))
    ]
    for k in range(1, 7):
        by_hand = np.mean([sum(mask[i].item() for i in order[:k]) / k for order in orders])
        assert value(TopKIntersection(k=k), map[None], mask[None]) == pytest.approx(by_hand)
    by_hand = np.mean([sum(mask[i].item() for i in order[:3]) / 3 for order in orders])
    assert value(RelevanceRank(), map[None], mask[None]) == pytest.approx(by_hand)


def test_auc_is_the_share_of_pairs_won_ties_by_half():
    map, mask = images(1, 9, 9).mul(2).round(), blobs(1, (30, 30))[:, :9, :9]
    mask[0, 3, 3] = True
    inside, outside = map[0][mask[0]], map[0][~mask[0]]
    won = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside)
    assert 0 < (inside[:, None] == outside).double().mean() < 1
    assert LocalisationAUC().measure(map, truth(mask)).values.item() == pytest.approx(
        won.mean().item(), abs=1e-15
    )


def test_auc_and_rank_of_a_flat_map_are_those_of_chance():
    mask = blobs()
    flat = torch.full(mask.shape, 0.3, dtype=torch.float64)
    part = mask.flatten(1).double().mean(1)
    torch.testing.assert_close(
        LocalisationAUC().measure(flat, truth(mask)).values, torch.full_like(part, 0.5)
    )
    torch.testing.assert_close(RelevanceRank().measure(flat, truth(mask)).values, part)
    torch.testing.assert_close(TopKIntersection(k=7).measure(flat, truth(mask)).values, part)
    weighted = AttributionLocalisation(weighted=True).measure(flat, truth(mask)).values
    torch.testing.assert_close(weighted, torch.ones_like(part))


def test_three_papers_measure_the_same_share_of_positive_energy():
    map, given = images(12, 24, 40), truth(blobs())
    share = RelevanceMass().measure(map, given).values
    for metric in (EnergyPointingGame(region="annotated"), AttributionLocalisation()):
        assert torch.equal(metric.measure(map, given).values, share)
    boxed = EnergyPointingGame(region="box").measure(map, given).values
    assert torch.equal(boxed, share), "the masks are boxes"


def test_the_enclosing_box():
    mask = torch.tensor([[[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], [[0] * 4] * 3]).bool()
    assert enclosing(mask).int().tolist() == [[[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]], [[0] * 4] * 3]


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_the_mask_itself_is_best_and_its_complement_worst(metric):
    mask = torch.zeros(1, 50, 64, dtype=torch.bool)
    mask[:, 25:45, 30:55] = True
    others = images(60, 50, 64) + 0.5 * torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None, None] * mask
    maps = torch.cat([mask.double(), others, 1 - mask.double()])
    found = metric.measure(maps, truth(mask.expand(len(maps), -1, -1))).values
    assert found.isfinite().all()
    assert found[0] == found.max()
    assert found[-1] == found.min()
    assert found[0] > found[-1]
    if metric.name != "pointing-game":
        assert found[-1] < found[1:-1].min()
        assert found[0] > found[1:-1].max()


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_a_scaled_map_has_the_same_value(metric):
    map, given = images(12, 24, 40), truth(blobs())
    scaled, found = metric.measure(map * 1e-7, given), metric.measure(map, given)
    torch.testing.assert_close(parts_of(scaled), parts_of(found), rtol=1e-9, atol=0)


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_single_precision_is_close_and_stays_single(metric):
    map, given = images(12, 64, 80), truth(blobs(size=(64, 80)))
    double, single = metric.measure(map, given).values, metric.measure(map.float(), given).values
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ALL, ids=repr)
def test_what_is_not_defined_is_nan(metric):
    map, mask = images(6, 24, 40), blobs(6)
    mask[0] = False
    map[1, 3, 4] = torch.nan
    map[2, 3, 4] = torch.inf
    found = metric.measure(map, truth(mask, known=[True, True, True, False, True, True])).values
    assert found.isnan().tolist() == [True] * 4 + [False] * 2
    assert metric.measure(map[:0], truth(mask[:0])).values.shape == (0,)


def test_undefined_limits_of_each_metric():
    empty, full = [[0.0, -1.0]], [[1, 1]]
    for metric in (EnergyPointingGame(), RelevanceMass(), AttributionLocalisation(), IntersectionOverUnion()):
        assert math.isnan(value(metric, empty, [[1, 0]])), metric
    assert math.isnan(value(LocalisationAUC(), [[1.0, 2.0]], full))
    assert math.isnan(value(IntersectionOverUnion(scale="min-max"), [[2.0, 2.0]], full))
    assert math.isnan(value(TopKIntersection(k=3), [[1.0, 2.0]], full))
    assert math.isnan(value(AttributionLocalisation(max_size=0.9), [[1.0, 2.0]], full))


# ---- the reference implementation ----------------------------------------------------------------------------------

PEERS = {
    "pointing-game": quantus.PointingGame,
    "relevance-mass": quantus.RelevanceMassAccuracy,
    "relevance-rank": quantus.RelevanceRankAccuracy,
    "top-k-intersection": quantus.TopKIntersection,
    "attribution-localisation": quantus.AttributionLocalisation,
    "localisation-auc": quantus.AUC,
}


def peer(kind, maps, masks, **options):
    metric = kind(disable_warnings=True, display_progressbar=False, **options)
    found = metric(
        model=None,
        x_batch=np.zeros((len(maps), 3, *maps.shape[1:])),
        y_batch=np.zeros(len(maps), dtype=int),
        a_batch=maps[:, None].numpy(),
        s_batch=masks[:, None].numpy(),
    )
    return torch.tensor(np.asarray(found, dtype=float))


@pytest.mark.parametrize("name", PEERS)
def test_the_quantus_presets_equal_quantus(name):
    maps, masks = images(12, 40, 48) + 0.3, blobs(size=(40, 48))
    maps += masks * torch.linspace(0, 4, 12, dtype=torch.float64)[:, None, None]
    ours = build_metric({"name": name, "preset": "quantus"}).measure(maps, truth(masks)).values
    theirs = peer(PEERS[name], maps, masks)
    assert len(theirs.unique()) > 1
    torch.testing.assert_close(ours, theirs, rtol=2e-9, atol=1e-12)


def test_every_quantus_preset_is_compared():
    presets = {
        name for name, cls in metrics().items() if "quantus" in cls.presets and "localis" in cls.__module__
    }
    assert presets == set(PEERS)


def test_quantus_breaks_ties_of_the_pointing_game_in_favour_of_the_map():
    maps, masks = torch.zeros(3, 40, 48, dtype=torch.float64), blobs(3, (40, 48)).roll((20, 30), (1, 2))
    maps[:, 0], maps[masks] = 1.0, 1.0
    preset = build_metric({"name": "pointing-game", "preset": "quantus"})
    assert peer(quantus.PointingGame, maps, masks).tolist() == [1] * 3
    assert preset.measure(maps, truth(masks)).values.tolist() == [1] * 3
    assert PointingGame().measure(maps, truth(masks)).values.tolist() == [0] * 3


def test_quantus_concept_influence_is_the_weighted_intersection():
    maps, masks = images(12, 40, 48), blobs(size=(40, 48))
    ours = TopKIntersection(k=100, weighted=True).measure(maps, truth(masks)).values
    torch.testing.assert_close(
        ours, peer(quantus.TopKIntersection, maps, masks, k=100, concept_influence=True)
    )


def test_quantus_calls_an_empty_object_a_hit_and_we_do_not():
    """Its NaN is written into a bool array, where it becomes True."""
    maps, masks = images(2, 40, 48), blobs(2, (40, 48))
    masks[0] = False
    assert peer(quantus.PointingGame, maps, masks)[0] == 1
    assert PointingGame().measure(maps, truth(masks)).values[0].isnan()


def test_quantus_weighted_localisation_depends_on_the_batch_and_grows_with_the_object():
    """It multiplies by a size taken from ``x_batch[2:]``, other images of the batch, where the paper divides by the
    object's share of its own image."""
    maps, masks = images(6, 40, 48).abs(), blobs(6, (40, 48))
    whole = peer(quantus.AttributionLocalisation, maps, masks, weighted=True)
    part = peer(quantus.AttributionLocalisation, maps[:3], masks[:3], weighted=True)
    assert (whole[:3] / part).allclose(
        torch.tensor(1 / 4, dtype=torch.float64)
    )  # 4 images count instead of 1
    metric = AttributionLocalisation(weighted=True)
    ours = metric.measure(maps, truth(masks)).values
    torch.testing.assert_close(metric.measure(maps[:3], truth(masks[:3])).values, ours[:3])
    share, area = RelevanceMass().measure(maps, truth(masks)).values, masks.flatten(1).double().mean(1)
    torch.testing.assert_close(ours, share / area)


# ---- the scenes ---------------------------------------------------------------------------------------------------


def test_the_objects_of_the_scenes_rank_first_and_everything_but_them_last():
    """Perfect and worst maps made from the masks of two-object scenes, beside noise and the middle of the picture."""
    drawn = list(scenes(12, seed=5, objects=(2,)))
    own = torch.stack([torch.from_numpy(one.masks[0]) for one in drawn])
    side = own.shape[-1]
    line = torch.arange(side) - side / 2
    maps = {
        "perfect": own.double(),
        "noise": torch.rand(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        "middle": (side - torch.hypot(line[:, None], line)).double().expand(own.shape),
        "worst": (~own).double(),
    }
    truth = Truth(own, torch.ones(len(own), dtype=torch.bool), torch.ones(len(own), 2, dtype=torch.float64))
    localising = [name for name, cls in metrics().items() if set(cls.consumes) == {"map", "truth"}]
    assert len(localising) == 8
    for name in localising:
        metric = build_metric(name)
        mean = {
            key: float(metric.measure(map=map, truth=truth).values.nanmean()) for key, map in maps.items()
        }
        assert max(mean, key=mean.get) == "perfect", (name, mean)
        assert mean["worst"] == min(mean.values()), (name, mean)
        assert mean["perfect"] > mean["noise"], (name, mean)
