"""MeGe and ReCo: sets of distances made by hand, and the definition of Xplique written out slowly."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

from xcli.metrics.agreement import MeGe, ReCo, distance, separation
from xcli.registry import build_metric
from xcli.score import Score

NONE = np.zeros(0)


class Answers(nn.Module):
    """A network that prefers the class that the first pixel of an image has in its table, and draws a set map."""

    def __init__(self, table: list[int], maps: Tensor) -> None:
        super().__init__()
        self.table, self.maps = torch.tensor(table), maps
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot(self.table[x[:, 0, 0, 0].long()], 3).double()


def drawn(score: Score, x: Tensor) -> Tensor:
    return score.module.maps[score.image]


def offered(networks, targets):
    """What a metric gets for images 0, 1, ... that know their number."""
    x = torch.arange(len(targets), dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 1, 6, 5)
    score = bound(networks[0], x, targets)
    return {
        "map": drawn(score, x),
        "x": x,
        "score": score,
        "method": drawn,
        "models": tuple(score.using(other) for other in networks[1:]),
    }


def summary(metric, curve):
    return metric.summary(None, curve if curve is None else np.asarray(curve), NONE)


def of_sets(metric, same, other=()):
    """A curve of one pair with these distances."""
    rows = [[value, math.nan] for value in same] + [[math.nan, value] for value in other]
    return summary(metric, np.array(rows).reshape(-1, 2))


# --- distances -----------------------------------------------------------------------------------------------


def test_the_distance_is_that_of_scipy():
    a, b = images(5, 9, 7).round(decimals=1), images(5, 9, 7, seed=1).round(decimals=1)
    b[1] = -a[1]
    rho = np.array([spearmanr(p.ravel(), q.ravel())[0] for p, q in zip(a.numpy(), b.numpy())])
    assert_close(distance(a, b), torch.from_numpy(np.sqrt(1 - np.abs(rho))), rtol=1e-10, atol=1e-7)
    assert rho[1] == pytest.approx(-1)
    assert distance(a, b)[1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_maps_have_no_distance_at_all(dtype):
    a = images(3, 64, 64).to(dtype)
    assert distance(a, 3 * a + 1).tolist() == [0, 0, 0]


def test_flat_and_broken_maps_have_no_distance():
    a, b = images(3, 4, 4), images(3, 4, 4, seed=1)
    a[0], b[1, 0, 0] = 0, torch.nan
    assert distance(a, b).isnan().tolist() == [True, True, False]


# --- the sets ------------------------------------------------------------------------------------------------


def test_pairs_fall_into_the_sets_by_who_is_right():
    maps = [images(4, 6, 5, seed=seed) for seed in range(3)]
    networks = [
        Answers([0, 1, 2, 0], maps[0]),
        Answers([0, 1, 0, 0], maps[1]),
        Answers([0, 0, 0, 2], maps[2]),
    ]
    offers = offered(networks, targets=[0, 1, 2, 1])  # right: all, 0 and 1, 0 alone, none
    pairs = [(0, 1), (0, 2), (1, 2)]
    d = torch.stack([distance(maps[i], maps[j]) for i, j in pairs], 1)
    nan = torch.nan
    same = torch.tensor([[1, 1, 1], [1, nan, nan], [nan] * 3, [nan] * 3]) * d
    other = torch.tensor([[nan] * 3, [nan, 1, 1], [1, 1, nan], [nan] * 3]) * d
    mege, reco = MeGe().measure(**offers), ReCo().measure(**offers)
    assert mege.values is None
    assert reco.values is None
    assert_close(mege.curve, same, equal_nan=True)
    assert_close(reco.curve, torch.cat([same, other], 1), equal_nan=True)
    expected = 1 / (1 + (d[0].sum() + d[1, 0]) / 4)
    assert summary(MeGe(), mege.curve) == pytest.approx(float(expected))


def test_both_metrics_share_the_explanations():
    networks = [Answers([0, 1], images(2, 6, 5, seed=seed)) for seed in range(3)]
    offers, calls = offered(networks, targets=[0, 0]), []
    offers["method"] = lambda score, x: calls.append(score) or drawn(score, x)
    for metric in (MeGe(), ReCo(), ReCo(thresholds=20)):
        metric.measure(**offers)
    assert len(calls) == 2


def test_identical_checkpoints_agree_completely():
    net, x = made(PooledLinear), images(4, 3, 16, 16)
    targets = net(x).argmax(1).tolist()
    score = bound(net, x, targets)

    def method(score, x):
        return score.gradients(x).grads[0].sum(1)

    offers = {"map": method(score, x), "x": x, "score": score, "method": method}
    found = MeGe().measure(**offers, models=(score.using(made(PooledLinear)),) * 2)
    assert found.curve.tolist() == [[0, 0, 0]] * 4
    assert summary(MeGe(), found.curve) == 1
    other = MeGe().measure(**offers, models=(score.using(made(PooledLinear, seed=1)),))
    assert not (other.curve == 0).any()


def test_without_further_checkpoints_there_is_no_number():
    offers = offered([Answers([0, 0], images(2, 6, 5))], targets=[0, 0])
    for metric in (MeGe(), ReCo()):
        found = metric.measure(**offers)
        assert found.curve.shape == (2, 0)
        assert math.isnan(summary(metric, found.curve))


# --- the numbers ---------------------------------------------------------------------------------------------


def test_mege_by_hand():
    assert of_sets(MeGe(), [0.0, 0.5, 1.0]) == pytest.approx(1 / 1.5)
    assert of_sets(MeGe(), [1.0, 1.0]) == 0.5
    assert of_sets(MeGe(), [0.0]) == 1


@pytest.mark.parametrize(
    ("same", "other", "expected"),
    [
        ([0.1, 0.2, 0.3], [0.4, 0.5], 1),  # a threshold of 0.3 tells them apart
        ([0.1, 0.3], [0.2, 0.4], 0.5),
        ([0.4, 0.5], [0.1, 0.2, 0.3], 0),  # the wrong way round
        ([0.2], [0.2], 0),
        ([0.1, 0.2, 0.2], [0.2, 0.3], 0.5),  # at 0.2: 1 + 1/2 - 1
        ([0.1, 0.2, 0.6], [0.3, 0.4, 0.5, 0.7], 2 / 3),
    ],
)
def test_reco_by_hand(same, other, expected):
    assert of_sets(ReCo(), same, other) == pytest.approx(expected)


def test_an_empty_set_has_no_number():
    assert math.isnan(of_sets(MeGe(), []))
    assert math.isnan(of_sets(ReCo(), [0.1], []))
    assert math.isnan(of_sets(ReCo(), [], [0.1]))
    assert math.isnan(summary(MeGe(), None))
    assert math.isnan(summary(ReCo(), None))


def xplique(s_eq, s_ne):
    """Their loop over thresholds, in other words."""
    everything = np.sort(np.concatenate([s_eq, s_ne]))
    best = 0.0
    for gamma in everything[:: len(everything) // 20 + 1]:
        hits, misses = (s_eq < gamma).sum(), (s_eq > gamma).sum()
        spared, blamed = (s_ne > gamma).sum(), (s_ne < gamma).sum()
        best = max(best, hits / (hits + misses + 1e-10) + spared / (spared + blamed + 1e-10) - 1)
    return best


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize(("many", "few"), [(3, 2), (40, 9), (7, 300)])
def test_the_preset_equals_xplique(many, few, decimals):
    metric = build_metric({"name": "reco", "preset": "xplique"})
    for seed in range(20):
        draw = np.random.default_rng(seed)
        same, other = (draw.uniform(size=many) ** 2).round(decimals), draw.uniform(size=few).round(decimals)
        assert of_sets(metric, same, other) == pytest.approx(xplique(same, other), abs=1e-9)


def test_all_thresholds_find_what_twenty_of_them_miss():
    same, other = np.linspace(0, 0.5, 30), np.linspace(0.51, 1, 70)
    assert separation(same, other, None) == 1
    assert xplique(same, other) < 1


def test_the_order_of_rows_does_not_matter():
    draw = np.random.default_rng(0)
    curve = np.where(draw.uniform(size=(50, 6)) < 0.4, draw.uniform(size=(50, 6)), np.nan)
    turned = partial(np.flip, axis=0)
    for metric in (MeGe(), ReCo(), ReCo(thresholds=20)):
        assert summary(metric, curve) == summary(metric, turned(curve))
