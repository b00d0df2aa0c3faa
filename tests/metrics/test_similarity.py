"""Similarities of maps against scikit-image and scipy, and against answers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import pearsonr, spearmanr
from skimage.feature import hog as peer_hog
from skimage.metrics import structural_similarity as peer_ssim
from torch.testing import assert_close
from toys import images

from xcli.metrics.similarity import hog, scaled, similarity, ssim

KINDS = ["spearman", "pearson", "ssim", "ssim-uniform", "ssim-flat", "hog"]
WANG = {"gaussian_weights": True, "use_sample_covariance": False}


def pair(height=50, width=66, seed=0):
    """Smooth maps and maps that are half alike."""
    noise = images(8, height, width, seed=seed)
    smooth = torch.from_numpy(gaussian_filter(noise.numpy(), (0, 3, 2)))
    return smooth[:4], smooth[:4] + 0.4 * smooth[4:] + 0.01 * noise[4:]


def peer(a, b, span=None, **how):
    spans = [max(p.max(), q.max()) - min(p.min(), q.min()) for p, q in zip(a, b)] if span is None else span
    found = [
        peer_ssim(p.numpy(), q.numpy(), data_range=float(r), **how)
        for p, q, r in zip(a, b, spans, strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


# --- structural similarity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 3.0, -100.0])
@pytest.mark.parametrize(("window", "how"), [("uniform", {}), ("gaussian", WANG)])
def test_ssim_equals_scikit_image(window, how, offset):
    a, b = (maps + offset for maps in pair())
    expected = peer(a, b, **how)
    assert 0.1 < expected.min() < expected.max() < 0.99
    assert_close(ssim(a, b, window), expected, rtol=0, atol=1e-8)  # theirs cancels far from 0


def test_ssim_takes_a_range_of_the_data_for_each_pair():
    a, b = pair()
    spans = torch.tensor([0.5, 1.0, 2.0, 7.0], dtype=torch.float64)
    assert_close(ssim(a, b, "uniform", spans), peer(a, b, spans))


def test_ssim_of_a_single_window_by_hand():
    a, b = (maps[:, :7, :7] for maps in pair())
    span = torch.full((4,), 2.0, dtype=torch.float64)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    expected = []
    for p, q in zip(a, b):
        (vp, cov), (_, vq) = torch.cov(torch.stack([p.flatten(), q.flatten()])).tolist()  # over 48
        mp, mq = float(p.mean()), float(q.mean())
        expected.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert_close(ssim(a, b, "uniform", span), torch.tensor(expected, dtype=torch.float64))


def test_ssim_of_a_shifted_map_is_its_luminance():
    a = images(1, 7, 7)
    b = a + 5
    span = float(b.max() - a.min())
    mean, c1 = float(a.mean()), (0.01 * span) ** 2
    expected = (2 * mean * (mean + 5) + c1) / (mean**2 + (mean + 5) ** 2 + c1)
    assert float(ssim(a, b, "uniform")) == pytest.approx(expected)


def test_ssim_of_a_signal_is_that_of_scikit_image():
    a, b = (maps.flatten(1) for maps in pair())
    assert_close(similarity(a.view(4, 50, 66), b.view(4, 50, 66), "ssim-flat", "none"), peer(a, b))


@pytest.mark.parametrize(("side", "window"), [(10, 9), (9, 9), (4, 3)])
def test_ssim_shrinks_its_window_to_what_fits(side, window):
    a, b = (maps[:, :side, :20] for maps in pair())
    assert_close(ssim(a, b, "uniform"), peer(a, b, win_size=min(window, 7)))
    assert ssim(a, b).isfinite().all()


def test_ssim_in_single_precision_of_maps_far_from_zero():
    a, b = pair()
    found = similarity(a.float() + 1000, b.float() + 1000, "ssim")
    assert found.dtype == torch.float32
    assert_close(found.double(), peer(scaled(a, "unit"), scaled(b, "unit"), **WANG), rtol=0, atol=5e-3)
    assert_close(
        similarity(a.float(), b.float(), "ssim").double(), similarity(a, b, "ssim"), rtol=0, atol=1e-5
    )


# --- histograms of oriented gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 66), (64, 64), (112, 95)])
def test_hog_equals_scikit_image(size):
    a = scaled(pair(*size)[0], "unit")
    expected = torch.from_numpy(np.stack([peer_hog(one.numpy(), pixels_per_cell=(16, 16)) for one in a]))
    assert_close(hog(a), expected, rtol=0, atol=1e-6)  # their sums are in single precision


def test_hog_of_a_ramp_has_one_orientation():
    down = torch.arange(48.0, dtype=torch.float64).view(1, 48, 1).expand(1, 48, 48)
    ramps = torch.cat([down, down.mT, down + down.mT])  # 90, 0, 45 degrees
    found = hog(ramps).view(3, 9, 9).amax(1)
    assert found.argmax(1).tolist() == [4, 0, 2]
    assert_close(found[1], torch.tensor([1 / 3] + [0.0] * 8, dtype=torch.float64), rtol=0, atol=1e-6)


def test_hog_is_undefined_below_three_cells():
    a, b = pair(47, 66)
    assert similarity(a, b, "hog").isnan().all()


# --- all of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "peer"), [("spearman", spearmanr), ("pearson", pearsonr)])
def test_correlations_equal_scipy(how, peer):
    a, b = pair()
    a, b = a.round(decimals=1), b.round(decimals=1)  # ties
    expected = torch.tensor([peer(p.flatten(), q.flatten())[0] for p, q in zip(a.numpy(), b.numpy())])
    assert_close(similarity(a, b, how), expected)


@pytest.mark.parametrize("how", KINDS)
def test_equal_maps_are_alike_and_rows_stay_apart(how):
    a, b = pair()
    assert_close(similarity(a, a, how), torch.ones(4, dtype=torch.float64))
    whole = similarity(a, b, how)
    assert ((whole > 0) & (whole < 0.999)).all()
    assert_close(torch.cat([similarity(p[None], q[None], how) for p, q in zip(a, b)]), whole)


@pytest.mark.parametrize("how", KINDS)
def test_flat_and_broken_maps_are_like_nothing(how):
    a, b = pair()
    a[0], b[1], a[2, 3, 4] = 2.5, 0, torch.inf
    for scaling in ("unit", "max", "none"):
        found = similarity(a, b, how, scaling)
        assert found[:3].isnan().all()
        assert found[3].isfinite()
    assert similarity(a[:, :1, :1], b[:, :1, :1], how).isnan().all()


@pytest.mark.parametrize("how", KINDS)
def test_maps_from_0_to_1_forget_their_scale_and_offset(how):
    a, b = pair()
    assert_close(similarity(a, 1e3 * b - 7, how), similarity(a, b, how), rtol=1e-6, atol=1e-8)
    raw = similarity(a, 1e3 * b - 7, how, "none")
    assert torch.allclose(raw, similarity(a, b, how), atol=1e-2) == (how in ("spearman", "pearson", "hog"))


def test_scaled_maps_by_hand():
    maps = torch.tensor([[[1.0, -3.0], [2.0, 5.0]]])
    assert scaled(maps, "unit").tolist() == [[[0.5, 0.0], [0.625, 1.0]]]
    assert_close(scaled(maps, "max"), maps / 5)
    assert scaled(maps, "none") is maps
