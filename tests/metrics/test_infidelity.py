"""Infidelity: maps that say exactly what a model does, captum, Quantus and the authors' squares."""

from __future__ import annotations

import itertools

import captum.metrics
import numpy as np
import pytest
import quantus
import torch
from torch.testing import assert_close
from toys import InDouble, PooledLinear, SumModel, Weighted, bound, images, made

from xcli.metrics.faithfulness.infidelity import Infidelity, best_factor, gaussian, squares
from xcli.metrics.faithfulness.subsets import PRIME, shown_instead
from xcli.registry import build_metric

TARGETS, IMAGE = [1, 3, 0, 2, 4], [0, 0, 1, 2, 2]
KINDS = ["square", "noisy-baseline", "noise", "sweep"]


def found(metric, net, x, map, target=None, image=None):
    score = bound(net, x, [0] * len(map) if target is None else target, image)
    return metric.measure(map=map, x=x, score=score).values


def copies_of(metric, score, x, map):
    """Every perturbed image (N, S, C, H, W), as the metric makes it, and what is removed (N, S, H, W)."""
    noisy = metric.perturbation in ("noise", "noisy-baseline")
    gone, count = (None, metric.samples) if noisy else metric.removed(score, map)
    image = score.image.repeat_interleave(count)
    make = metric.noised(score, x, image) if noisy else metric.copies(x, image, gone)
    every = torch.arange(len(image))
    shape = (len(map), count)
    return make(every).unflatten(0, shape), None if noisy else gone(every).unflatten(0, shape)


# --- known answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["square", "sweep"])
def test_a_map_of_shares_is_faithful_to_a_sum_model(kind):
    x = images(3, 3, 10, 12)
    metric = Infidelity(perturbation=kind, samples=20)
    assert_close(found(metric, SumModel(), x, x.sum(1)), torch.zeros(3).double())
    off = found(metric, SumModel(), x, x.sum(1) + 0.1)  # by 0.1 a removed pixel
    _, gone = copies_of(metric, bound(SumModel(), x, [0] * 3), x, x.sum(1))
    assert_close(off, (0.1 * gone.flatten(2).sum(2).double()).square().mean(1))


@pytest.mark.parametrize("substrate", ["constant", "mean", "minimum"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_slopes_is_faithful_to_a_linear_model(kind, substrate):
    x, weight = images(3, 3, 10, 12), images(1, 10, 12, seed=1)
    metric = Infidelity(perturbation=kind, samples=20, means="slope", substrate=substrate)
    assert_close(found(metric, Weighted(weight), x, weight.expand(3, -1, -1)), torch.zeros(3).double())
    assert (found(metric, Weighted(weight), x, weight.flip(2).expand(3, -1, -1)) > 1).all()


def test_an_empty_map_misses_all_that_is_lost():
    x, weight = images(2, 3, 10, 12), images(1, 10, 12, seed=1)
    for options in ({}, {"scaled": True}):
        metric = Infidelity(samples=5, **options)
        score = bound(Weighted(weight), x, [0, 0])
        copies, _ = copies_of(metric, score, x, x[:, 0])
        lost = score.clean(x)[:, None] - Weighted(weight)(copies.flatten(0, 1)).view(2, 5)
        assert_close(found(metric, Weighted(weight), x, 0 * x[:, 0]), lost.detach().square().mean(1))


def test_scaling_finds_the_unit_of_a_map():
    x = images(3, 3, 10, 12)
    assert_close(found(Infidelity(scaled=True), SumModel(), x, -3 * x.sum(1)), torch.zeros(3).double())
    said, lost = images(4, 9), images(4, 9, seed=1)
    slope = torch.stack([torch.linalg.lstsq(a[:, None], b).solution for a, b in zip(said, lost)])
    assert_close(best_factor(said, lost), slope)


def test_a_square_is_drawn_evenly_from_all_that_fit():
    drawn = squares(5, 6, 3, 40000, torch.Generator().manual_seed(0))
    every = [
        (top, left, side)
        for side in (1, 2, 3)
        for top, left in itertools.product(range(5 - side + 1), range(6 - side + 1))
    ]
    assert len(every) == 30 + 20 + 12
    unique, count = drawn.unique(dim=0, return_counts=True)
    assert sorted(map(tuple, unique.tolist())) == sorted(every)
    expected = torch.full((62,), 40000 / 62)
    assert ((count - expected).square() / expected).sum() < 110  # chi-square with 61 degrees: 1 in 10 000


def test_noise_is_normal():
    keys = torch.randint(PRIME, (100000,), generator=torch.Generator().manual_seed(0))
    noise = gaussian(torch.cat([keys, torch.tensor([0, PRIME - 1])]))
    assert noise.isfinite().all()
    assert_close(noise.mean(), torch.tensor(0.0), rtol=0, atol=0.015)
    assert_close(noise.std(), torch.tensor(1.0), rtol=0, atol=0.015)
    assert_close((noise > 1.645).float().mean(), torch.tensor(0.05), rtol=0, atol=0.003)


@pytest.mark.parametrize("kind", ["noise", "noisy-baseline"])
def test_noise_belongs_to_the_image_and_the_sample(kind):
    x = images(3, 3, 8, 8)
    metric = Infidelity(perturbation=kind, samples=4, deviation=0.5)
    copies, _ = copies_of(metric, bound(SumModel(), x, [0] * 5, IMAGE), x, images(5, 8, 8))
    noise = copies if kind == "noisy-baseline" else x[IMAGE][:, None] - copies
    assert_close(noise[0], noise[1])
    assert noise.flatten(1).unique(dim=0).shape[0] == 3
    assert noise[0].flatten(1).unique(dim=0).shape[0] == 4
    assert_close(noise.std(), torch.tensor(0.5).double(), rtol=0.1, atol=0)


def test_a_sweep_removes_square_after_square():
    metric = Infidelity(perturbation="sweep", patch=2)
    _, gone = copies_of(
        metric, bound(SumModel(), images(1, 1, 3, 4), [0]), images(1, 1, 3, 4), images(1, 3, 4)
    )
    assert gone.flatten(2).sum(2).tolist() == [[4, 8, 10, 12]]
    assert gone[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert gone[0, 2].int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]


# --- references ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"preset": "captum"}, *({"perturbation": kind, "samples": 6} for kind in KINDS), {"means": "slope"}],
    ids=str,
)
def test_infidelity_equals_captum(options, scaled):
    net, x, map = made(PooledLinear), images(3, 3, 8, 12), images(5, 8, 12, seed=1)
    metric = build_metric({"name": "infidelity", "scaled": scaled, **options})
    score = bound(net, x, TARGETS, IMAGE)
    copies, gone = copies_of(metric, score, x, map)
    share = gone is not None and metric.means == "share"
    weights = map[:, None].expand(-1, 3, -1, -1) / (
        3 if share else 1
    )  # an indicator counts once, not by colour

    def perturb(inputs):
        changed = copies.flatten(0, 1)
        moved = gone.flatten(0, 1)[:, None].expand_as(inputs).double() if share else inputs - changed
        return moved, changed

    expected = captum.metrics.infidelity(
        net,
        perturb,
        x[IMAGE],
        weights,
        target=torch.tensor(TARGETS),
        n_perturb_samples=copies.shape[1],
        normalize=scaled,
    )
    got = metric.measure(map=map, x=x, score=score).values
    assert expected.min() > 0
    assert_close(got, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_infidelity_equals_quantus(channels):
    class Net(PooledLinear):
        def forward(self, x):
            return super().forward(x.expand(-1, 3, -1, -1))

    net, map = made(Net), images(4, 8, 12, seed=1).float().double()
    x, target = images(4, channels, 8, 12).float().double(), [0, 1, 2, 3]
    expected = quantus.Infidelity(n_perturb_samples=2, disable_warnings=True)(
        model=InDouble(net).eval(),
        x_batch=x.numpy(),
        y_batch=np.array(target),
        a_batch=map[:, None].numpy(),
        channel_first=True,
        device="cpu",
    )
    got = found(build_metric({"name": "infidelity", "preset": "quantus"}), net, x, map, target)
    assert_close(got, torch.tensor(np.array(expected)).double(), rtol=1e-6, atol=1e-8)


def test_random_squares_come_near_to_the_authors_mean_over_all_of_them():
    net, x, map = made(PooledLinear), images(1, 3, 6, 6), images(1, 6, 6, seed=1)
    said, lost = [], []
    with torch.no_grad():
        for side in (1, 2, 3):
            for top, left in itertools.product(range(7 - side), repeat=2):
                copy = x.clone()
                copy[..., top : top + side, left : left + side] = 0
                said.append(map[..., top : top + side, left : left + side].sum())
                lost.append((net(x) - net(copy))[0, 2])
    said, lost = torch.stack(said), torch.stack(lost)
    beta = (lost * said).mean() / (said * said).mean()
    metric = build_metric({"name": "infidelity", "preset": "authors", "largest": 0.5, "samples": 5000})
    got = found(metric, net, x, map, [2])
    assert_close(got[0], (lost - beta * said).square().mean(), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_come_in_the_type_of_the_images(kind, dtype):
    net, x, map = made(PooledLinear).to(dtype), images(3, 3, 8, 12).to(dtype), images(5, 8, 12).to(dtype)
    metric = Infidelity(perturbation=kind, samples=4)
    got = found(metric, net, x, map, TARGETS, IMAGE)
    assert got.dtype == dtype
    exact = found(metric, net.double(), x.double(), map.double(), TARGETS, IMAGE)
    assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)


def test_removed_pixels_show_the_substrate():
    x = images(2, 3, 8, 8)
    copies, gone = copies_of(
        Infidelity(substrate="mean", samples=3), bound(SumModel(), x, [0, 0]), x, images(2, 8, 8)
    )
    shown = shown_instead(x, "mean")[:, None]
    assert_close(copies, torch.where(gone[:, :, None], shown, x[:, None]))
