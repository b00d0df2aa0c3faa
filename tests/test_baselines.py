"""What stands in for removed pixels: closed forms, the authors' blur, and noise that belongs to the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

from xcli.baselines import IMPUTATION_NOISE, Removal, blurred, window
from xcli.errors import ConfigError
from xcli.registry import build_metric

SUBSTRATES = ("constant", "mean", "minimum", "blur", "uniform", "gaussian", "negative", "imputation")
HALF = torch.arange(12) % 2 == 0


@pytest.fixture(scope="module")
def net():
    return made(PooledLinear)


def half_removed(removal, score, x):
    """Every image, once, without every second column."""
    removed = HALF.expand(len(x), x.shape[2], 12)
    return removal.remover(score, x)(torch.arange(len(x)), removed)


def whole(substrate, net, x, **options):
    removal = Removal(substrate=substrate, **options)
    score = bound(net, x, [0] * len(x))
    return removal.remover(score, x)(torch.arange(len(x)), torch.ones(len(x), *x.shape[2:], dtype=torch.bool))


@pytest.mark.parametrize("substrate", SUBSTRATES)
def test_what_is_not_removed_stays(substrate, net):
    x = images(2, 3, 10, 12)
    found = half_removed(Removal(substrate=substrate), bound(net, x, [0, 1]), x)
    assert torch.equal(found[..., ~HALF], x[..., ~HALF])
    assert (found[..., HALF] != x[..., HALF]).double().mean() > 0.99  # the minimum stands in for itself


def test_closed_forms(net):
    x = images(2, 3, 4, 5)
    assert_close(whole("constant", net, x), torch.zeros_like(x))
    assert_close(whole("constant", net, x, value=-1.5), torch.full_like(x, -1.5))
    assert_close(whole("mean", net, x), x.mean((2, 3))[:, :, None, None].expand(x.shape))
    assert_close(whole("minimum", net, x), x.flatten(1).amin(1)[:, None, None, None].expand(x.shape))
    assert_close(whole("negative", net, x), -x)


# --- blur ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "sigma"), [(11, 5.0), (11, 1.0), (3, 5.0), (1, 2.0), (31, 5.0), (4, 2.5)])
def test_the_window_is_that_of_rise(kernel, sigma):
    delta = np.zeros((kernel, kernel))
    delta[kernel // 2, kernel // 2] = 1
    side = torch.tensor(window(kernel, sigma), dtype=torch.float64)
    assert_close(
        side[:, None] * side, torch.from_numpy(gaussian_filter(delta, sigma)), rtol=1e-12, atol=1e-15
    )


def test_the_blur_is_that_of_rise():
    x = images(2, 3, 20, 17)
    delta = np.zeros((11, 11))
    delta[5, 5] = 1
    kernels = torch.zeros(3, 3, 11, 11, dtype=torch.float64)
    kernels[[0, 1, 2], [0, 1, 2]] = torch.from_numpy(gaussian_filter(delta, 5))
    expected = nn.functional.conv2d(x, kernels, padding=5)
    assert_close(blurred(x, 11, 5.0), expected, rtol=1e-12, atol=1e-14)
    assert_close(blurred(x.float(), 11, 5.0), expected.float())


def test_the_blur_of_a_picture_smaller_than_its_window():
    assert blurred(torch.ones(1, 1, 2, 3, dtype=torch.float64), 11, 5.0).shape == (1, 1, 2, 3)


# --- noise ---------------------------------------------------------------------------------------------------


def test_uniform_noise_fills_the_range_of_each_channel(net):
    x = images(1, 3, 60, 60) * torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    found = whole("uniform", net, x)
    low, high = x.amin((2, 3)), x.amax((2, 3))
    place = (found - low[..., None, None]) / (high - low)[..., None, None]
    assert 0 <= place.min() < 0.01
    assert 0.99 < place.max() <= 1
    assert_close(place.mean((2, 3)), torch.full((1, 3), 0.5, dtype=torch.float64), rtol=0, atol=0.02)


def test_gaussian_noise_has_the_moments_of_each_channel(net):
    x = images(1, 3, 80, 80) * torch.tensor([1.0, 5.0, 0.1])[:, None, None] + 2
    found = whole("gaussian", net, x)
    assert_close(found.mean((2, 3)), x.mean((2, 3)), rtol=0.1, atol=0.01)
    assert_close(found.std((2, 3)), x.std((2, 3)), rtol=0.05, atol=0)


@pytest.mark.parametrize("substrate", ["uniform", "gaussian", "imputation"])
def test_noise_belongs_to_the_image(substrate, net):
    x, removal = images(3, 3, 10, 12), Removal(substrate=substrate)
    score = bound(net, x, [0, 1, 2, 3], image=[0, 0, 1, 2])
    found = half_removed(removal, score, x)
    assert torch.equal(half_removed(removal, score, x), found)
    alone = bound(net, x, [0], image=[1])  # the others have no rows
    assert torch.equal(half_removed(removal, alone, x)[1], found[1])
    same = half_removed(removal, bound(net, x[:1].repeat(2, 1, 1, 1), [0, 0]), x[:1].repeat(2, 1, 1, 1))
    assert not torch.equal(same[0], same[1])  # two files, one content


# --- imputation ----------------------------------------------------------------------------------------------


def test_imputed_pixels_follow_their_neighbours_but_for_a_little_noise(net):
    x = torch.linspace(0, 1, 12, dtype=torch.float64).expand(1, 3, 10, 12).contiguous()
    found = half_removed(Removal(substrate="imputation"), bound(net, x, [0]), x)
    inner = found[..., 2:-1:2] - x[..., 2:-1:2]  # between two known columns of a ramp
    assert inner.abs().max() < 6 * IMPUTATION_NOISE
    assert 0.5 * IMPUTATION_NOISE < inner.std() < 2 * IMPUTATION_NOISE


def test_with_nothing_left_to_follow_the_image_becomes_its_mean_colour(net):
    x, removal = images(1, 3, 10, 12), Removal(substrate="imputation")
    score = bound(net, x, [2])
    expected = score(x.mean((2, 3), keepdim=True).expand(x.shape))
    assert_close(removal.emptied(score, x), expected, rtol=0.02, atol=0.02)


# --- the emptied image ---------------------------------------------------------------------------------------


class Counting(PooledLinear):
    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.mark.parametrize("substrate", SUBSTRATES)
def test_the_emptied_image_is_seen_once_an_image_and_a_constant_one_once(substrate):
    seen = 1 if substrate == "constant" else 3
    net, x = made(Counting), images(4, 3, 10, 12)
    score = bound(net, x, [0, 1, 2, 3], image=[0, 0, 1, 3])  # image 2 has no row
    removal, before = Removal(substrate=substrate), net.seen
    found = removal.emptied(score, x)
    assert net.seen - before == seen
    assert torch.equal(Removal(substrate=substrate).emptied(score, x), found)
    assert net.seen - before == seen
    if substrate != "imputation":
        everything = torch.ones(4, 10, 12, dtype=torch.bool)
        assert_close(found, score(removal.remover(score, x)(score.image, everything)))


def test_only_what_means_the_same_is_shared():
    net, x = made(Counting), images(1, 3, 10, 12)
    score, before = bound(net, x, [0]), None
    for removal, passes in [
        (Removal(), 1),
        (Removal(sigma=2.0), 1),  # of no meaning for a constant
        (Removal(value=1.0), 2),
        (Removal(substrate="blur"), 3),
        (Removal(substrate="blur", value=1.0), 3),
        (Removal(substrate="blur", sigma=2.0), 4),
    ]:
        before = net.seen if before is None else before
        removal.emptied(score, x)
        assert net.seen - before == passes
    other = x + 1
    assert not torch.equal(
        Removal(substrate="mean").emptied(score, x), Removal(substrate="mean").emptied(score, other)
    )


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"kernel": 0}, {"sigma": 0.0}, {"substrate": "black"}, {"value": float("nan")}]
)
def test_options_are_checked(wrong):
    with pytest.raises(ValidationError):
        Removal(**wrong)


def test_a_metric_takes_them_from_yaml():
    metric = build_metric({"name": "deletion", "substrate": "blur", "sigma": 3.0})
    assert (metric.substrate, metric.sigma, metric.kernel) == ("blur", 3.0, 11)
    with pytest.raises(ConfigError, match="substrate"):
        build_metric({"name": "deletion", "substrate": "blurr"})


@pytest.mark.parametrize("substrate", SUBSTRATES)
def test_copies_keep_the_layout_that_the_network_likes(substrate):
    x = images(2, 3, 12, 10).contiguous(memory_format=torch.channels_last)
    removed = images(3, 12, 10, seed=1) > 0
    remover = Removal(substrate=substrate).remover(bound(made(PooledLinear), x, [0, 0]), x)
    copies = remover(torch.tensor([0, 1, 1]), removed)
    assert copies.is_contiguous(memory_format=torch.channels_last)
