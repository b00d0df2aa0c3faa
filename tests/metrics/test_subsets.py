"""Correlations over random sets of pixels: theorems on additive models, and other definitions written out slowly."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import quantus
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.testing import assert_close
from toys import InDouble, PooledLinear, SumModel, Weighted, bound, images, made

from xcli.metrics.faithfulness.subsets import PRIME, Draws, cells, shown_instead, smallest
from xcli.registry import build_metric

RANDOM = ["faithfulness-correlation", "mu-fidelity", "sensitivity-n"]
SMALL = {
    "faithfulness-correlation": {"subset": 9, "samples": 20},
    "mu-fidelity": {"grid": 4, "samples": 20},
    "sensitivity-n": {"samples": 8, "steps": 4},
}
TARGETS, IMAGE = [1, 3, 0, 2, 4], [0, 0, 1, 2, 2]


class Grey(PooledLinear):
    """One colour, in which a pixel is a feature for Quantus too."""

    def forward(self, x):
        return super().forward(x.expand(-1, 3, -1, -1))


def built(name, **options):
    return build_metric({"name": name, **SMALL[name], **options})


def found(metric, net, x, map, target=None, image=None):
    score = bound(net, x, [0] * len(map) if target is None else target, image)
    return metric.measure(map=map, x=x, score=score)


def sets(metric, score, map):
    """The sets (rows, sets, H, W) of pixels that the metric removes, as it makes them."""
    kept = []

    def without(metric, watched, x, row, gone):
        kept.append(gone(torch.arange(len(row))))
        return torch.zeros(len(row), dtype=map.dtype)

    with mock.patch.object(type(metric), "without", without):
        metric.correlations(map, torch.zeros(1), score)
    return kept[0].view(len(map), -1, *map.shape[1:])


# --- known answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("substrate", ["constant", "mean", "minimum"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", RANDOM)
def test_a_map_that_is_what_a_sum_model_adds_up(name, sign, substrate):
    x = images(3, 3, 8, 12)
    metric = built(name, substrate=substrate)
    assert_close(found(metric, SumModel(), x, sign * x.sum(1)).values, torch.full((3,), float(sign)).double())


@pytest.mark.parametrize("name", RANDOM)
def test_over_sets_of_one_size_the_correlation_is_that_over_the_pixels(name):
    """Of an additive model, in the limit of many sets: drawing without replacement scales every covariance alike."""
    weight, map = images(1, 8, 8), images(1, 8, 8, seed=1) + images(1, 8, 8)
    options = {"samples": 4000, "grid": 8} | ({"steps": 3} if name == "sensitivity-n" else {})
    got = found(built(name, **options), Weighted(weight), torch.ones(1, 1, 8, 8).double(), map)
    expected = pearsonr(weight.flatten(), map.flatten())[0]
    numbers = got.values if got.curve is None else got.curve[0]
    assert_close(numbers, torch.full_like(numbers, expected), rtol=0, atol=0.04)


@pytest.mark.parametrize("name", RANDOM)
def test_what_does_not_vary_does_not_correlate(name):
    x, map = images(2, 3, 8, 8), images(2, 8, 8, seed=3)
    metric = built(name)
    assert found(metric, Weighted(torch.zeros(1, 8, 8).double()), x, map).values.isnan().all()
    assert found(metric, SumModel(), x, torch.full_like(map, 0.1)).values.isnan().all()
    bad = map.clone()
    bad[0, 2, 2] = torch.inf
    assert found(metric, SumModel(), x, bad).values.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", RANDOM)
def test_rounding_is_no_variation(name):
    class Steady(nn.Module):
        def forward(self, x):
            return 1 + 1e-16 * x.sum((1, 2, 3))[:, None]

    x, map = 5 * images(2, 3, 8, 8), images(2, 8, 8, seed=3)
    assert found(built(name), Steady(), x, map).values.isnan().all()


def test_a_row_without_a_correlation_may_count_as_zero():
    x, flat = images(2, 3, 8, 8), torch.zeros(2, 8, 8).double()
    metric = built("mu-fidelity", preset="xplique")
    assert found(metric, SumModel(), x, flat).values.tolist() == [0, 0]


def test_sets_as_large_as_the_image_are_all_the_same():
    x = images(2, 3, 8, 8)
    assert found(built("faithfulness-correlation", subset=64), SumModel(), x, x.sum(1)).values.isnan().all()
    assert found(built("faithfulness-correlation", subset=640), SumModel(), x, x.sum(1)).values.isnan().all()


def test_the_curve_of_sensitivity_n_is_over_n():
    metric = build_metric({"name": "sensitivity-n", "samples": 4})
    assert metric.sizes(50176) == [1, 5, 21, 94, 427, 1942, 8829, 40140]  # 40140 ** (k / 7)
    assert metric.sizes(4) == [1, 2, 3]
    got = found(built("sensitivity-n"), SumModel(), images(2, 3, 8, 8), images(2, 8, 8, seed=1))
    assert_close(got.fraction, torch.tensor([1, 4, 14, 51]).double() / 64)
    assert got.curve.shape == (2, 4)
    assert_close(got.values, got.curve.mean(1))


def test_sensitivity_n_leaves_out_sizes_at_which_a_sparse_map_says_nothing():
    x, map = images(1, 3, 8, 8), torch.zeros(1, 8, 8).double()
    map[0, 3, 3] = 1
    got = found(built("sensitivity-n", samples=4), SumModel(), x, map)
    assert got.curve.isnan().any()
    assert_close(got.values, got.curve.nanmean(1))


# --- the draw ------------------------------------------------------------------------------------------------


def test_each_set_is_drawn_evenly():
    score = bound(SumModel(), images(2, 1, 4, 5), [0, 0, 0], [0, 1, 1])
    draws = Draws.of(score, "test", 20, 8000, torch.device("cpu"))
    picked = smallest(draws(torch.arange(24000)), torch.full((24000,), 5)).view(3, 8000, 20)
    assert (picked.sum(2) == 5).all()
    assert torch.equal(picked[1], picked[2])  # two rows of an image
    assert not torch.equal(picked[0], picked[1])
    one = picked[0].double()
    assert_close(one.mean(0), torch.full((20,), 0.25).double(), rtol=0, atol=0.025)  # 5 standard errors
    pairs = one.T @ one / len(one)
    off = pairs[~torch.eye(20, dtype=torch.bool)]
    assert_close(off, torch.full_like(off, 5 * 4 / (20 * 19)), rtol=0, atol=0.0125)
    triples = torch.einsum("si,sj,sk->ijk", one, one, one)[0, 1:, 1:] / len(one)
    off = triples[~torch.eye(19, dtype=torch.bool)]
    assert_close(off, torch.full_like(off, 5 * 4 * 3 / (20 * 19 * 18)), rtol=0, atol=0.006)
    assert len(one.unique(dim=0)) > 5000  # of 15 504


def test_numbers_are_distinct_and_below_the_prime():
    score = bound(SumModel(), images(1, 1, 4, 5), [0])
    keys = Draws.of(score, "test", 50176, 3, torch.device("cpu"))(torch.arange(3))
    assert keys.min() >= 0
    assert keys.max() < PRIME
    assert all(len(line.unique()) == 50176 for line in keys)
    assert abs(keys.double().mean() / PRIME - 0.5) < 0.005
    assert smallest(keys, torch.tensor([1, 25000, 50176])).sum(1).tolist() == [1, 25000, 50176]


def test_bernoulli_sets_have_every_size():
    map = images(1, 8, 8)
    metric = build_metric({"name": "mu-fidelity", "preset": "xplique", "grid": 8, "samples": 2000})
    size = sets(metric, bound(SumModel(), images(1, 3, 8, 8), [0]), map).flatten(2).sum(2).double()
    assert_close(size.mean(), torch.tensor(12.8).double(), rtol=0, atol=0.4)  # of B(64, 0.2)
    assert_close(size.var(), torch.tensor(10.24).double(), rtol=0, atol=1.7)


@pytest.mark.parametrize(("size", "grid"), [((8, 12), 4), ((9, 7), 4), ((5, 5), 9), ((224, 320), 9)])
def test_a_pixel_is_in_the_cell_that_its_middle_falls_into(size, grid):
    expected = [
        int((i + 0.5) * min(grid, size[0]) / size[0]) * min(grid, size[1])
        + int((j + 0.5) * min(grid, size[1]) / size[1])
        for i, j in itertools.product(*map(range, size))
    ]
    got = cells(size, grid)
    assert got.flatten().tolist() == expected
    assert got.unique().tolist() == list(range(int(got.max()) + 1))


def test_what_a_removed_pixel_shows():
    x = images(2, 3, 4, 5)
    assert shown_instead(x, "constant").unique().tolist() == [0]
    assert_close(shown_instead(x, "mean")[:, :, 0, 0], x.mean((2, 3)))
    assert_close(shown_instead(x, "minimum")[:, :, 0, 0], x.flatten(1).min(1).values[:, None].expand(2, 3))


# --- other definitions, on the same sets ---------------------------------------------------------------------


def slowly(net, x, map, target, chosen, fill, correlation):
    """Bhatt et al., definition 3: one image, one set at a time."""
    said, lost = [], []
    whole = net(x[None])[0, target].item()
    for pixels in chosen:
        copy = x.clone()
        copy[:, pixels] = fill
        said.append(sum(value.item() for value in map[pixels]))
        lost.append(whole - net(copy[None])[0, target].item())
    return correlation(said, lost)[0]


@pytest.mark.parametrize(
    ("name", "options", "correlation"),
    [
        ("mu-fidelity", {}, pearsonr),
        ("mu-fidelity", {"preset": "xplique"}, spearmanr),
        ("faithfulness-correlation", {}, pearsonr),
        ("faithfulness-correlation", {"preset": "quantus"}, pearsonr),
    ],
)
def test_a_row_is_its_definition_written_out(name, options, correlation):
    net, x, map = made(PooledLinear), images(3, 3, 9, 12), images(5, 9, 12, seed=1)
    metric, score = built(name, **options), bound(net, x, TARGETS, IMAGE)
    chosen = sets(metric, score, map)
    with torch.no_grad():
        expected = [
            slowly(
                net,
                x[IMAGE[r]],
                map[r],
                TARGETS[r],
                chosen[r],
                x[IMAGE[r]].min() if options == {"preset": "quantus"} else 0.0,
                correlation,
            )
            for r in range(5)
        ]
    got = metric.measure(map=map, x=x, score=score).values
    assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_sensitivity_n_is_its_definition_written_out():
    net, x, map = made(PooledLinear), images(1, 3, 9, 12), images(1, 9, 12, seed=1)
    metric, score = built("sensitivity-n"), bound(net, x, [2])
    chosen = sets(metric, score, map)[0].view(-1, metric.samples, 9, 12)
    with torch.no_grad():
        expected = [slowly(net, x[0], map[0], 2, group, 0.0, pearsonr) for group in chosen]
    got = metric.measure(map=map, x=x, score=score)
    assert_close(got.curve[0], torch.tensor(expected, dtype=torch.float64))
    assert chosen.flatten(2).sum(2)[:, 0].tolist() == metric.sizes(108)


def grey_case(rows=4):
    net = made(Grey)
    x, map = (images(rows, *shape).float().double() for shape in ((1, 8, 8), (8, 8)))
    return net, x, map.flip(0), [target % 5 for target in range(rows)]


def asked(metric, net, x, map, target, softmax=False):
    """What Quantus says of one batch, on one colour."""
    return metric(
        model=InDouble(net, softmax).eval(),
        x_batch=x.numpy(),
        y_batch=np.array(target),
        a_batch=map[:, None].numpy(),
        softmax=False,
        device="cpu",
    )


def test_faithfulness_correlation_equals_quantus(monkeypatch):
    net, x, map, target = grey_case()
    metric, score = built("faithfulness-correlation", preset="quantus"), bound(net, x, target)
    chosen = sets(metric, score, map).transpose(0, 1).flatten(0, 1).flatten(1)  # set by set, row by row
    lines = iter([line.nonzero()[:, 0].numpy() for line in chosen])
    monkeypatch.setattr(np.random, "choice", lambda *_args, **_kwargs: next(lines))
    peer = quantus.FaithfulnessCorrelation(
        nr_runs=metric.samples, subset_size=metric.subset, disable_warnings=True, return_aggregate=False
    )
    expected = asked(peer, net, x, map, target)
    got = metric.measure(map=map, x=x, score=score).values
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-9)


def test_quantus_defaults_are_ours():
    peer = quantus.FaithfulnessCorrelation(disable_warnings=True)
    metric = build_metric({"name": "faithfulness-correlation", "preset": "quantus"})
    assert (metric.samples, metric.subset) == (peer.nr_runs, peer.subset_size)


def test_quantus_finds_an_exact_map_of_a_linear_model_insensitive():
    """Its sensitivity-n adds up the pixels of one step, removes those of all steps, and compares images."""
    weight = images(1, 8, 8).float().double()
    x = images(6, 1, 8, 8, seed=2).float().double()
    map = x[:, 0] * weight
    peer = quantus.SensitivityN(
        features_in_step=8,
        perturb_baseline=0.0,
        normalise=False,
        disable_warnings=True,
        return_aggregate=False,
    )
    theirs = np.array(asked(peer, Weighted(weight), x, map, [0] * 6))
    assert theirs.shape == (6,)  # a number for each step, not for each of the images
    assert theirs.min() < 0.9
    ours = found(built("sensitivity-n"), Weighted(weight), x, map).curve
    assert_close(ours, torch.ones_like(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RANDOM)
def test_numbers_come_in_the_type_of_the_images(name, dtype):
    net, x, map = made(PooledLinear).to(dtype), images(3, 3, 9, 12).to(dtype), images(5, 9, 12).to(dtype)
    got = found(built(name), net, x, map, TARGETS, IMAGE)
    assert got.values.dtype == dtype
    exact = found(built(name), net.double(), x.double(), map.double(), TARGETS, IMAGE)
    assert_close(got.values.double(), exact.values, rtol=0, atol=0.02)
