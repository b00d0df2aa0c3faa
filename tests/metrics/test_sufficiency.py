"""Sufficiency: runs counted by hand, Quantus on one batch, and what it does with several."""

from __future__ import annotations

import numpy as np
import pytest
import quantus
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from torch import nn
from torch.testing import assert_close
from toys import images

from xcli.metrics.faithfulness import sufficiency
from xcli.metrics.faithfulness.sufficiency import Sufficiency, squared_distances, standardised
from xcli.registry import build_metric


class Fixed(nn.Module):
    """Predicts the class that the first pixel names."""

    def forward(self, x):
        return F.one_hot(x[:, 0, 0, 0].long(), 5).float()


def run(maps, labels, **options):
    metric = build_metric({"name": "sufficiency", **options})
    return metric.summary(None, metric.measure(map=maps).curve.numpy(), np.array(labels))


def asked(maps, labels, batch_size=64, **options):
    """The scores of Quantus."""
    x = torch.zeros(len(maps), 1, 8, 8)
    x[:, 0, 0, 0] = torch.tensor(labels)
    peer = quantus.Sufficiency(disable_warnings=True, **options)
    return np.array(
        peer(
            model=Fixed().eval(),
            x_batch=x.numpy(),
            y_batch=np.array(labels),
            a_batch=maps[:, None].numpy(),
            device="cpu",
            batch_size=batch_size,
            softmax=False,
        )
    )


def clusters(rows=40, spread=0.5):
    kinds = torch.arange(rows) % 4
    labels = ((kinds + (torch.arange(rows) % 7 == 0)) % 4).tolist()
    return 3 * images(4, 8, 8)[kinds] + spread * images(rows, 8, 8, seed=1), labels


# --- known answers -------------------------------------------------------------------------------------------


def on_a_line(*values):
    """Maps of 2 x 2 pixels that differ in one number."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None].expand(-1, 2, 2).clone()


def test_a_run_counted_by_hand():
    maps = on_a_line(0, 1, 2, 10)  # nearer than 0.25 * 10: the first three, to one another
    assert run(maps, [7, 7, 8, 8], threshold=0.25) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert run(maps, [7, 7, 8, 8], threshold=0.25, undefined="zero") == pytest.approx((0.5 + 0.5 + 0 + 0) / 4)
    assert run(maps, [7, 7, 8, 8], threshold=1.0) == pytest.approx(1 / 3)


def test_the_bound_is_inside():
    assert run(on_a_line(0, 1, 3, 10), [1, 1, 1, 2], threshold=0.1) == 1
    assert run(on_a_line(4, 4, 3, 10), [1, 1, 1, 2], threshold=0.0) == 1
    assert np.isnan(run(on_a_line(0, 1.1, 3, 10), [1, 1, 1, 2], threshold=0.1))


def test_maps_are_compared_by_magnitude():
    assert run(on_a_line(-2, 2, 9), [1, 1, 2], threshold=0.1) == 1


def test_equal_maps_are_all_similar():
    assert run(on_a_line(5, 5, 5), [1, 1, 2]) == pytest.approx(1 / 3)


def test_a_run_without_pairs_has_no_number():
    assert np.isnan(run(on_a_line(5), [1]))
    assert np.isnan(run(on_a_line(5, torch.nan), [1, 1]))
    assert np.isnan(run(on_a_line(torch.nan), [1]))


def test_rows_that_are_not_finite_are_left_out():
    maps, labels = clusters()
    bad = maps.clone()
    bad[5, 3, 3], bad[11, 0, 0] = torch.nan, torch.inf
    kept = [row for row in range(40) if row not in (5, 11)]
    assert run(bad, labels) == pytest.approx(run(maps[kept], [labels[row] for row in kept]))


def test_large_maps_are_averaged_and_small_ones_kept():
    maps = images(3, 28, 30)
    found = Sufficiency().measure(map=maps)
    assert found.values is None
    assert found.curve.shape == (3, 196)
    assert_close(found.curve[1, 15], maps[1, 2:4].abs()[:, 2:5].mean())  # 30 / 14 pixels, whole ones
    assert_close(Sufficiency().measure(map=maps[:, :6, :5]).curve, maps[:, :6, :5].abs().flatten(1))
    assert Sufficiency().measure(map=maps.float()).curve.dtype == torch.float32


@pytest.mark.parametrize("at_once", [1, 41, 130, 10**6])
def test_distances_in_pieces_are_those_of_scipy(monkeypatch, at_once):
    monkeypatch.setattr(sufficiency, "AT_ONCE", at_once)
    points = np.abs(images(40, 20).numpy())
    pieces = list(squared_distances(standardised(points)))
    assert len(pieces) == -(-40 // max(1, at_once // 40))
    found = np.concatenate([squared for _, squared in pieces])
    variance = points.var(0)
    np.testing.assert_allclose(found, cdist(points, points, "seuclidean", V=variance) ** 2, atol=1e-10)


def test_pieces_do_not_change_the_number(monkeypatch):
    maps, labels = clusters()
    whole = run(maps, labels)
    monkeypatch.setattr(sufficiency, "AT_ONCE", 120)
    assert run(maps, labels) == whole


# --- Quantus -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("spread", [0.5, 2])
def test_one_batch_of_quantus_is_a_run(threshold, spread):
    maps, labels = clusters(spread=spread)
    expected = asked(maps, labels, threshold=threshold)
    got = run(maps, labels, threshold=threshold, preset="quantus")
    assert 0 < got < 1
    assert got == pytest.approx(expected.mean(), abs=1e-12)


def test_quantus_counts_rows_on_their_own_as_zero():
    maps, labels = clusters()
    maps[0] *= 5
    expected = asked(maps, labels, threshold=0.3)
    assert expected[0] == 0
    assert run(maps, labels, threshold=0.3, preset="quantus") == pytest.approx(expected.mean())
    assert run(maps, labels, threshold=0.3) == pytest.approx(expected[1:].mean())


def test_the_number_of_quantus_depends_on_the_batch():
    maps, labels = clusters()
    assert abs(asked(maps, labels, batch_size=8).mean() - asked(maps, labels).mean()) > 0.01
    order = np.random.default_rng(0).permutation(40)
    shuffled = run(maps[order], [labels[row] for row in order])
    assert shuffled == pytest.approx(run(maps, labels), abs=1e-12)


def test_quantus_gives_zero_where_one_pixel_is_the_same_in_all_maps():
    maps, labels = clusters()
    whole = run(maps, labels)
    maps[:, 0, 0] = 0  # as rectified maps are in many a corner
    with np.errstate(all="ignore"):
        assert asked(maps, labels).tolist() == [0] * 40
    assert run(maps, labels) == pytest.approx(whole, abs=0.05)
    assert run(maps, labels) > 0.2
