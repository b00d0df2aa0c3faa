"""Sparseness, complexity, effective complexity: closed forms, literal formulas, and Quantus."""

from __future__ import annotations

import math

import numpy as np
import pytest
import quantus
import scipy.stats
import torch
from torch import nn
from torch.testing import assert_close
from toys import bound, images

from xcli.metrics.complexity import Complexity, EffectiveComplexity, Sparseness
from xcli.registry import build_metric

QUIET = {"disable_warnings": True, "return_aggregate": False}


def maps(*rows):
    return torch.tensor(rows, dtype=torch.float64)[:, None]  # (N, 1, W)


def one_hot(n, height=1):
    hot = torch.zeros(1, height, n, dtype=torch.float64)
    hot[0, 0, n // 2] = -3.0
    return hot


def peer(metric, map):
    """Quantus on one map at a time: it divides a batch by the largest of all."""
    found = [
        metric(
            model=None,
            x_batch=np.zeros((1, 3, *one.shape)),
            y_batch=np.zeros(1, int),
            a_batch=one[None, None],
        )
        for one in map.numpy().copy()
    ]
    return torch.tensor(np.concatenate(found), dtype=torch.float64)


# --- sparseness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_sparseness_of_one_pixel_and_of_all(n):
    assert_close(Sparseness().measure(one_hot(n)).values, maps([1 - 1 / n])[:, 0, 0])
    assert_close(
        Sparseness().measure(torch.full((1, 1, n), -2.0, dtype=torch.float64)).values, maps([0.0])[:, 0, 0]
    )
    ladder = torch.arange(1, n + 1, dtype=torch.float64).view(1, 1, n)
    assert_close(Sparseness().measure(ladder).values, maps([(n - 1) / (3 * n)])[:, 0, 0])


def test_sparseness_is_the_mean_difference_of_two_pixels_over_twice_the_mean():
    map = images(4, 5, 6)
    size = map.abs().flatten(1)
    expected = (size[:, :, None] - size[:, None, :]).abs().mean((1, 2)) / (2 * size.mean(1))
    assert_close(Sparseness().measure(map).values, expected)
    assert_close(Sparseness().measure(-1e6 * map.flip(2)).values, expected)


def test_sparseness_equals_quantus():
    map = images(4, 8, 7)
    assert_close(Sparseness().measure(map).values, peer(quantus.Sparseness(**QUIET), map), rtol=1e-5, atol=0)


def test_sparseness_of_a_single_pixel_is_not_that_of_quantus():
    hot = one_hot(224, 224)
    assert_close(Sparseness().measure(hot).values.item(), 1 - 1 / 224**2)
    assert peer(quantus.Sparseness(**QUIET), hot).item() < 0.9951  # 1e-7 on every pixel


# --- complexity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_complexity_of_one_pixel_and_of_all(n):
    assert Complexity().measure(one_hot(n)).values.item() == 0
    flat = torch.full((1, 1, n), -2.0, dtype=torch.float64)
    assert_close(Complexity().measure(flat).values.item(), math.log(n))


def test_complexity_is_the_entropy_and_equals_quantus():
    map = images(4, 8, 7)
    expected = torch.from_numpy(scipy.stats.entropy(map.abs().flatten(1).numpy(), axis=1))
    assert_close(Complexity().measure(map).values, expected)
    assert_close(peer(quantus.Complexity(**QUIET), map), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("metric", [Sparseness(), Complexity()])
def test_a_map_of_zeros_has_no_value(metric):
    map = torch.cat([torch.zeros(1, 4, 4), torch.ones(1, 4, 4), torch.full((1, 4, 4), torch.nan)])
    assert metric.measure(map).values.isnan().tolist() == [True, False, True]


# --- effective complexity ------------------------------------------------------------------------------------


def linear(weights):
    """A network whose only logit is the weighted sum of the pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weights.numel(), 1, bias=False)).double()
    net[1].weight.data = weights.flatten()[None].clone()
    return net


def effective(net, x, map, **how):
    metric = EffectiveComplexity(**{"score": "logit", "steps": map[0].numel(), **how})
    return metric.measure(map=map, x=x, score=bound(net, x, [0] * len(x)))


def test_the_pixels_that_the_network_sees_have_to_stay():
    weights = torch.zeros(1, 4, 4, dtype=torch.float64)
    weights[0, 1, :3] = torch.tensor([2.0, -1.0, 0.5])
    x = images(2, 1, 4, 4)
    right = weights.expand(2, 4, 4)
    assert effective(linear(weights), x, right, tolerance=1e-9).values.tolist() == [3, 3]
    assert effective(linear(weights), x, 1 / (1 + right.abs()), tolerance=1e-9).values.tolist() == [16, 16]
    assert effective(linear(weights), x, right, tolerance=1e9).values.tolist() == [1, 1]


def test_the_loss_is_that_of_the_formula():
    x, map, net = images(2, 3, 4, 5), images(2, 4, 5, seed=1), linear(images(3, 4, 5, seed=2))
    score = bound(net, x, [0, 0])
    got = effective(net, x, map, samples=3, tolerance=5.0)
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for i in range(2):
        order = map[i].abs().flatten().argsort(descending=True)
        mean, deviation = x[i].mean((1, 2), keepdim=True), x[i].std((1, 2), correction=0, keepdim=True)
        for sample in range(3):
            draw = score.generator(i, f"effective-complexity {sample}")
            other = mean + deviation * torch.randn(3, 4, 5, generator=draw).double()
            for k in range(1, 21):
                keep = torch.zeros(20, dtype=torch.bool)
                keep[order[:k]] = True
                changed = torch.where(keep.view(4, 5), x[i], other)
                expected[i, k - 1] += (net(changed[None]) - net(x[i : i + 1])).item() ** 2 / 3
    assert_close(got.curve, expected)
    assert_close(got.fraction, torch.arange(1, 21).double() / 20)
    fewest = [1 + next(k for k, loss in enumerate(line) if loss < 5.0) for line in expected.tolist()]
    assert got.values.tolist() == fewest
    assert 1 < min(fewest) < 20


def test_steps_name_a_number_of_pixels():
    x, map = images(1, 1, 4, 5), images(1, 4, 5, seed=1)
    net = linear(torch.zeros(1, 4, 5, dtype=torch.float64))
    assert effective(net, x, map, steps=6).values.tolist() == [3]
    assert effective(net, x, map, steps=1).values.tolist() == [20]
    assert effective(net, x, map, steps=100).values.tolist() == [1]


def by_size(map, **how):
    metric = build_metric({"name": "effective-complexity", "preset": "quantus", **how})
    x = images(len(map), 3, *map.shape[1:])
    return metric.measure(map=map, x=x, score=bound(linear(x[0]), x, [0] * len(map))).values


def test_counting_by_size_equals_quantus():
    map = images(3, 6, 5)
    map[0, 2], map[1, 0, 0], map[2] = 0, 1e6, map[2] * 1e-9
    assert by_size(map).tolist() == [25, 1, 30]
    assert_close(by_size(map), peer(quantus.EffectiveComplexity(**QUIET), map))
    got = by_size(map, threshold=0.5)
    assert_close(got, peer(quantus.EffectiveComplexity(**QUIET, eps=0.5), map))
    assert got[1] == 1


def test_the_number_of_quantus_depends_on_the_batch():
    map = torch.stack([torch.ones(4, 4), torch.full((4, 4), 1e-6)]).double()
    given = {"x_batch": np.zeros((2, 3, 4, 4)), "y_batch": np.zeros(2, int), "a_batch": map[:, None].numpy()}
    assert quantus.EffectiveComplexity(**QUIET)(model=None, **given) == [16, 0]
    assert by_size(map).tolist() == [16, 16]


@pytest.mark.parametrize("how", [{}, {"rule": "size"}])
def test_a_map_of_zeros_has_no_effective_complexity(how):
    x, map = images(3, 1, 4, 4), images(3, 4, 4)
    map[0], map[1, 0, 0] = 0, torch.nan
    assert effective(linear(x[0]), x, map, **how).values.isnan().tolist() == [True, True, False]
