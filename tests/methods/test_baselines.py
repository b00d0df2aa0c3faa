"""The baselines: uniform noise, reproducible, its own for each image; the middle; the edges."""

from __future__ import annotations

import math

import torch
from toys import PooledLinear, bound, images, made

from xcli.methods.baselines import BASELINES, Centre, Random, Sobel
from xcli.registry import methods


def test_each_is_a_method_like_any_other():
    assert set(BASELINES) <= set(methods())


def test_noise_is_uniform_and_belongs_to_the_image():
    net, x = made(PooledLinear), images(3, 3, 64, 64)
    score = bound(net, x, target=[0, 1, 2, 3], image=[0, 0, 1, 2])
    maps = Random().attribute(score, x)
    assert maps.shape == (4, 64, 64)
    assert (maps[0] == maps[1]).all()
    assert (maps[1] != maps[2]).any()
    assert (Random().attribute(score, x) == maps).all()
    counts = torch.histc(maps[1:].flatten(), bins=10, min=0, max=1)
    expected = 3 * 64 * 64 / 10
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


def test_centre_falls_off_with_the_distance():
    x = images(1, 3, 4, 8)
    (found,) = Centre().attribute(bound(made(PooledLinear), x, [0]), x)
    assert math.isclose(found[3, 1], 1 - math.hypot(1.5, 2.5) / math.hypot(2, 4))
    torch.testing.assert_close(found, found.flip(0).flip(1))
    assert found.max() == found[1:3, 3:5].min()


def test_sobel_of_a_ramp_is_its_slope_and_of_a_step_sits_on_the_step():
    ramp = 3.0 * torch.arange(10, dtype=torch.float64).expand(1, 3, 7, 10).contiguous()
    (slope,) = Sobel().attribute(bound(made(PooledLinear), ramp, [0]), ramp)
    torch.testing.assert_close(slope[:, 1:-1], torch.full((7, 8), 3.0, dtype=torch.float64))
    step = torch.zeros(1, 3, 6, 6, dtype=torch.float64)
    step[..., 3:] = 1
    (edge,) = Sobel().attribute(bound(made(PooledLinear), step, [0]), step)
    assert (edge[:, 2:4] > 0).all()
    assert (edge[:, [0, 1, 4, 5]] == 0).all()
