"""The baseline: uniform, reproducible, its own for each image."""

from __future__ import annotations

import torch
from toys import PooledLinear, bound, images, made

from xcli.methods.random import Random


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
