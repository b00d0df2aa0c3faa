"""What ``post_process`` makes of a map: each step on maps with a known answer, scipy and Xplique's filter beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from scipy.ndimage import gaussian_filter
from test_schema import matches
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

import xcli
from xcli.complaints import InvalidConfigError
from xcli.config import load_config
from xcli.errors import ConfigError
from xcli.methods.base import Attribution, Method
from xcli.methods.cam.gradient import GradCAM
from xcli.methods.gradient.plain import Saliency
from xcli.methods.steps import applied, low_passed, resized, smoothed
from xcli.registry import build, options
from xcli.schema import json_schema
from xcli.yamlfile import read_yaml

EXACT = {"rtol": 0, "atol": 1e-12}
SIZES = [(8, 8), (9, 9), (7, 12), (12, 7), (5, 16)]


# ---- each step, and their order ---------------------------------------------------------------------------------


def test_absolute_and_positive_on_a_known_map():
    maps = torch.tensor([[[-2.0, 3.0], [0.0, -0.5]]])
    assert applied(["absolute"], maps, (2, 2), "bilinear").tolist() == [[[2, 3], [0, 0.5]]]
    assert applied(["positive"], maps, (2, 2), "bilinear").tolist() == [[[0, 3], [0, 0]]]
    assert applied([], maps, (4, 4), "bilinear") is maps


STEPS = ["absolute", "positive", {"smooth": 1.3}, {"low_pass": 2.0}, {"resize": "bicubic"}]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["of the input's size", "smaller"])
def test_colours_are_treated_apart_as_maps_of_their_own(step, small):
    size = (6, 9)
    maps = images(2, 3, *((3, 4) if small else size))
    whole = applied([step], maps, size, "bilinear")
    apart = applied([step], maps.flatten(0, 1), size, "bilinear")
    assert whole.shape[:2] == (2, 3)
    assert_close(whole.flatten(0, 1), apart, **EXACT)
    for row in range(2):
        alone = applied([step], maps[row : row + 1], size, "bilinear")
        assert_close(alone[0], whole[row], **EXACT)


def test_steps_are_taken_in_the_order_in_which_they_are_written():
    """A wave of three periods and a constant: what its steps give can be told by hand."""
    wave = torch.cos(2 * math.pi * 3 * torch.arange(24, dtype=torch.float64) / 24).expand(1, 24, 24)
    maps, size = wave - 0.5, (24, 24)
    first = applied([{"low_pass": 1}, "absolute"], maps, size, "bilinear")
    last = applied(["absolute", {"low_pass": 1}], maps, size, "bilinear")
    assert_close(first, torch.full_like(maps, 0.5), **EXACT)
    assert_close(last, (wave - 0.5).abs().mean().expand_as(maps), **EXACT)
    assert last.mean() > 0.7
    both = applied(["positive", "absolute", {"low_pass": 1}], -maps, size, "bilinear")
    assert_close(both, (-maps).relu().mean().expand_as(maps), **EXACT)


def test_the_order_of_smoothing_and_rectifying_shows():
    maps, size = images(2, 7, 5), (7, 5)
    first = applied([{"smooth": 0.8}, "positive"], maps, size, "bilinear")
    last = applied(["positive", {"smooth": 0.8}], maps, size, "bilinear")
    assert_close(first, smoothed(maps, 0.8).relu(), **EXACT)
    assert_close(last, smoothed(maps.relu(), 0.8), **EXACT)
    assert (first - last).abs().max() > 0.1


def test_a_cut_off_that_is_still_to_be_found_is_refused():
    with pytest.raises(ConfigError, match=r"low_pass: auto .* when a run begins; name a cut-off"):
        applied([{"low_pass": "auto", "calibration": "x"}], images(1, 4, 4), (4, 4), "bilinear")


@pytest.mark.parametrize("step", [*STEPS, {"resize": "bilinear"}], ids=str)
def test_every_step_can_be_differentiated(step):
    for shape, size in (((2, 5, 6), (5, 6)), ((1, 2, 3, 4), (6, 7))):
        maps = images(*shape).requires_grad_()
        assert maps.abs().min() > 1e-3  # away from the kink at 0
        assert torch.autograd.gradcheck(lambda x, size=size: applied([step], x, size, "bilinear"), maps)


# ---- maps smaller than the input --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("colours", [None, 3])
def test_resize_is_that_of_interpolate(mode, colours):
    maps = images(2, *([colours] if colours else []), 3, 5)
    four = maps if colours else maps[:, None]
    expected = F.interpolate(
        four, (8, 7), mode=mode, **({} if mode == "nearest" else {"align_corners": False})
    )
    expected = expected if colours else expected[:, 0]
    assert_close(resized(maps, (8, 7), mode), expected, **EXACT)
    assert_close(applied([{"resize": mode}], maps, (8, 7), "nearest"), expected, **EXACT)
    assert resized(maps, None, mode) is maps
    assert resized(maps, (3, 5), mode) is maps


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("step", [{"smooth": 1.5}, {"low_pass": 3.0}], ids=str)
def test_steps_in_pixels_work_at_the_size_of_the_input(mode, step):
    maps, size = images(2, 3, 4), (12, 15)
    grown = resized(maps, size, mode)
    expected = smoothed(grown, 1.5) if "smooth" in step else low_passed(grown, 3.0)
    assert_close(applied([step], maps, size, mode), expected, **EXACT)
    small = smoothed(maps, 1.5) if "smooth" in step else low_passed(maps, 3.0)
    assert (
        resized(small, size, mode) - expected
    ).abs().max() > 1e-2  # the same on the grid of the map is not it


def test_a_resize_comes_before_the_upsampling_of_the_method():
    maps, size = images(1, 3, 4), (9, 8)
    found = applied([{"resize": "nearest"}, {"smooth": 1.0}], maps, size, "bilinear")
    assert_close(found, smoothed(resized(maps, size, "nearest"), 1.0), **EXACT)
    assert (found - applied([{"smooth": 1.0}], maps, size, "bilinear")).abs().max() > 1e-2


NET, X = made(PooledLinear), images(3, 3, 12, 10)
SCORE = {"target": [1, 3, 0], "image": [0, 1, 1]}


@pytest.mark.parametrize(
    ("steps", "shape"),
    [
        ([], (6, 5)),
        (["absolute", "positive"], (6, 5)),
        ([{"smooth": 1.0}], (12, 10)),
        ([{"low_pass": 2.0}], (12, 10)),
        ([{"resize": "nearest"}], (12, 10)),
    ],
    ids=str,
)
def test_a_native_map_has_the_input_size_once_a_step_counts_in_pixels(steps, shape):
    score = bound(NET, X, **SCORE)
    raw = GradCAM(layer="relu", relu=False).attribute(score, X)
    assert raw.shape[1:] == (6, 5)
    method = GradCAM(layer="relu", relu=False, upsampling="bicubic", post_process=tuple(steps))
    native = method.explain(score, X).map
    assert native.shape == (3, *shape)
    assert_close(native, applied(steps, raw, (12, 10), "bicubic"), **EXACT)
    full = method.explain(score, X, (12, 10)).map
    assert_close(full, resized(native, (12, 10), "bicubic"), **EXACT)


# ---- in a method ------------------------------------------------------------------------------------------------


@options
class Given(Method):
    """Twice the image with its colours apart, and a number beside."""

    name: ClassVar[str] = "given"
    factor: Annotated[float, Field(description="what the image is multiplied by")] = 2.0

    def attribute(self, score, x):
        return Attribution(self.factor * x, {"beside": x.sum((1, 2, 3))})


@pytest.mark.parametrize("reduce", ["none", "sum", "mean", "max", "l2"])
def test_channels_become_one_before_the_steps(reduce):
    how = {
        "none": lambda x: x,
        "sum": lambda x: x.sum(1),
        "mean": lambda x: x.mean(1),
        "max": lambda x: x.abs().amax(1),
        "l2": lambda x: x.square().sum(1).sqrt(),
    }[reduce]
    found = Given(reduce=reduce, post_process=("positive", {"low_pass": 2})).explain(None, X)
    assert_close(found.map, low_passed(how(2 * X).relu(), 2.0), **EXACT)
    assert_close(found.extras["beside"], X.sum((1, 2, 3)), **EXACT)
    assert found.map.ndim == (4 if reduce == "none" else 3)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "gradcam", "layer": "relu", "relu": False},
        {"name": "random"},
        {"name": "sobel"},
        {"name": "saliency"},
        {"name": "smoothgrad", "samples": 2, "reduce": "none"},
    ],
    ids=lambda spec: spec["name"],
)
def test_any_method_takes_the_steps(spec):
    steps = ["absolute", {"smooth": 0.7}, {"low_pass": 2.5}]
    score, size = bound(NET, X, **SCORE), (12, 10)
    plain, stepped = build(spec), build({**spec, "post_process": steps})
    assert stepped.post_process == ("absolute", {"smooth": 0.7}, {"low_pass": 2.5})
    raw = plain.explain(score, X).map
    expected = low_passed(smoothed(resized(raw.abs(), size, "bilinear"), 0.7), 2.5)
    assert_close(stepped.explain(score, X, size).map, expected, **EXACT)
    found = xcli.explain(NET, X, {**spec, "post_process": steps}, target=1)
    expected = xcli.explain(NET, X, spec, target=1, native=True).map
    expected = low_passed(smoothed(resized(expected.abs(), size, "bilinear"), 0.7), 2.5)
    assert_close(found.map, expected, **EXACT)


def test_maps_can_be_trained_through_the_steps():
    """The gradient of a loss over a filtered map is that of the filtered loss: the filter is its own adjoint."""
    signed, weight, given = Saliency(absolute=False), NET.features[2].weight, images(3, 12, 10, seed=4)
    found, plain = (
        xcli.explain(NET, X, replace(signed, post_process=steps), target=1, create_graph=True).map
        for steps in (({"low_pass": 3.0},), ())
    )
    (ours,) = torch.autograd.grad((found * given).sum(), weight)
    (theirs,) = torch.autograd.grad((plain * low_passed(given, 3.0)).sum(), weight)
    assert theirs.abs().max() > 1e-3
    assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---- smooth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (6, 11), (13, 4)], ids=str)
@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.5, 1.0, 1.1, 2.25, 3.3, 40.0])
def test_smooth_is_scipys_gaussian_with_continued_borders(size, sigma):
    """Sigma may be larger than the image; the kernel ends at the first whole pixel beyond four deviations."""
    maps = images(2, 3, *size)
    found = smoothed(maps, sigma)
    one = {"sigma": sigma, "mode": "nearest", "axes": (-2, -1)}
    exact = gaussian_filter(maps.numpy(), radius=max(1, math.ceil(4 * sigma)), **one)
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=1e-12)
    cut = gaussian_filter(maps.numpy(), truncate=4, **one)
    whole = float(4 * sigma).is_integer()
    np.testing.assert_allclose(found.numpy(), cut, rtol=0, atol=1e-12 if whole else 1e-3)


def test_scipys_truncate_rounds_where_ours_goes_to_the_next_pixel():
    """At sigma 1.1 the weight of the fifth pixel, exp(-(5 / 1.1)^2 / 2) = 3e-5 of the first, is ours alone."""
    impulse = torch.zeros(1, 1, 31, dtype=torch.float64)
    impulse[0, 0, 15] = 1
    ours = smoothed(impulse, 1.1)[0, 0].numpy()
    theirs = gaussian_filter(impulse[0, 0].numpy(), 1.1, mode="nearest", truncate=4)
    assert (np.count_nonzero(ours), np.count_nonzero(theirs)) == (11, 9)
    assert ours[20] / ours[15] == pytest.approx(math.exp(-((5 / 1.1) ** 2) / 2), rel=1e-12)
    assert theirs[20] == 0


@pytest.mark.parametrize("sigma", [0.2, 1.0, 2.7, 100.0])
def test_smooth_keeps_constant_maps(sigma):
    constant = torch.tensor([3.0, -1.5], dtype=torch.float64)[:, None, None].expand(2, 5, 9)
    assert_close(smoothed(constant, sigma), constant, **EXACT)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 1.7])
def test_smooth_spreads_an_impulse_into_a_gaussian_of_mass_one(sigma):
    impulse = torch.zeros(1, 17, 19, dtype=torch.float64)
    impulse[0, 8, 9] = 1
    found = smoothed(impulse, sigma)[0]
    assert_close(found.sum(), torch.ones((), dtype=torch.float64), **EXACT)
    down, right = torch.arange(17) - 8, torch.arange(19) - 9
    for move, weight in ((down, found.sum(1)), (right, found.sum(0))):
        assert abs(float((weight * move).sum())) < 1e-12
        if sigma >= 1:  # narrower ones are too coarse on whole pixels for their variance to be sigma^2
            assert float((weight * move**2).sum()) == pytest.approx(sigma**2, rel=2e-3)
    assert_close(
        found[9, 9] / found[8, 9], torch.tensor(math.exp(-0.5 / sigma**2), dtype=torch.float64), **EXACT
    )
    assert_close(found, found.flip(0), **EXACT)


def test_two_gaussians_are_one_whose_variance_is_the_sum():
    impulse = torch.zeros(1, 61, 61, dtype=torch.float64)
    impulse[0, 30, 30] = 1
    assert_close(smoothed(smoothed(impulse, 3.0), 4.0), smoothed(impulse, 5.0), rtol=0, atol=2e-6)
    assert smoothed(impulse, 5.0).max() > 5e-3


# ---- low_pass ---------------------------------------------------------------------------------------------------


def wave(size, down, right, phase=0.0):
    """A wave of ``down`` and ``right`` periods along the sides of a map."""
    (height, width), turn = size, 2 * math.pi
    i, j = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.cos(turn * (down * i / height + right * j / width) + phase)


def periods(size, down, right):
    """Its periods along the longer side of the map, in its own direction."""
    height, width = size
    down, right = (min(down, height - down) / height, min(right, width - right) / width)
    return math.hypot(down, right) * max(size)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_pass_keeps_waves_below_the_cut_off_and_drops_those_above(size):
    """Every wave that the grid holds, alone and in a sum."""
    cutoff, kept, gone, seen = 2.6, 0, 0, {True: 0, False: 0}
    for down in range(size[0]):
        for right in range(size[1]):
            one = wave(size, down, right, phase=0.3 + down + 2 * right)
            below = periods(size, down, right) <= cutoff
            seen[below] += 1
            kept, gone = (kept + one, gone) if below else (kept, gone + one)
            assert_close(low_passed(one[None], cutoff)[0], one if below else 0 * one, **EXACT)
    assert min(seen.values()) >= 5
    assert_close(low_passed((kept + gone)[None], cutoff)[0], kept, rtol=0, atol=1e-11)


def test_periods_are_counted_along_the_longer_side_in_every_direction():
    """16 x 8: a wave of one period across the short side is as fine as one of two along the long side."""
    size = (16, 8)
    for down, right, frequency in ((2, 0, 2.0), (0, 1, 2.0), (3, 2, 5.0), (0, 4, 8.0), (8, 0, 8.0)):
        maps = wave(size, down, right)[None]
        assert periods(size, down, right) == pytest.approx(frequency, rel=1e-12)
        assert_close(low_passed(maps, frequency), maps, **EXACT)
        assert_close(low_passed(maps, frequency * (1 - 1e-4)), 0 * maps, **EXACT)
        assert_close(low_passed(maps.mT, frequency), maps.mT, **EXACT)
        assert_close(low_passed(maps.mT, frequency * (1 - 1e-4)), 0 * maps.mT, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(10, 10), (11, 11), (9, 14), (21, 6), (64, 48), (224, 224)], ids=str)
def test_a_wave_at_the_cut_off_is_kept_whatever_the_rounding(size, dtype):
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        down, right = (int(torch.randint(0, side // 2 + 1, (), generator=draw)) for side in size)
        down = down or 1
        maps, cutoff = wave(size, down, right)[None].to(dtype), periods(size, down, right)
        close = EXACT if dtype == torch.float64 else {"rtol": 0, "atol": 1e-5}
        assert_close(low_passed(maps, cutoff), maps, **close)
        assert_close(low_passed(maps, cutoff * (1 - 1e-4)), 0 * maps, **close)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cutoff", [1e-3, 1.0, 2.5, 4.0])
def test_low_pass_is_a_linear_projection_that_keeps_the_mean(size, cutoff):
    maps, other = images(2, 3, *size), images(2, 3, *size, seed=1)
    found = low_passed(maps, cutoff)
    assert found.dtype == maps.dtype
    assert found.shape == maps.shape
    assert_close(low_passed(found, cutoff), found, **EXACT)
    assert_close(found.mean((-2, -1)), maps.mean((-2, -1)), **EXACT)
    assert_close(low_passed(2 * maps - 3 * other, cutoff), 2 * found - 3 * low_passed(other, cutoff), **EXACT)
    assert_close((found * other).sum(), (maps * low_passed(other, cutoff)).sum(), **EXACT)  # self-adjoint
    assert (found.square().sum((-2, -1)) < maps.square().sum((-2, -1))).all()
    if cutoff < 1:
        assert_close(found, maps.mean((-2, -1), keepdim=True).expand_as(maps), **EXACT)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_energy_grows_with_the_cut_off_until_everything_is_kept(size):
    maps = images(1, *size)
    everything = max(size) / math.sqrt(2)
    energy = [float(low_passed(maps, cutoff).square().sum()) for cutoff in (0.5, 1, 2, 3, 4, everything)]
    assert all(less < more for less, more in pairwise(energy))
    assert_close(low_passed(maps, everything), maps, **EXACT)
    assert_close(low_passed(maps, 1e6), maps, **EXACT)


# ---- FORGrad ----------------------------------------------------------------------------------------------------


def forgrad(maps, sigma):
    """What Xplique's filter does, in numpy, to maps (N, C, n, n): the mean over colours, and its size; the half
    spectrum of that, times a disc drawn about the middle of a whole shifted one and shifted back; and the size again.

    Odd maps come out as Xplique has them before it stretches them: one pixel narrower.
    """
    maps = np.abs(maps.mean(1))
    n = maps.shape[-1]
    row, column = np.mgrid[:n, :n]
    disc = np.hypot(row - n // 2, column - n // 2) <= sigma
    half = np.fft.fftshift(disc)[:, : n // 2 + 1]
    return np.abs(np.fft.irfft2(np.fft.rfft2(maps) * half))


@pytest.mark.parametrize(
    ("side", "sigma"), [(16, 1), (16, 5), (30, 1), (30, 15), (64, 5), (64, 15), (64, 64)]
)
def test_three_steps_over_the_mean_are_forgrad_on_even_squares(side, sigma):
    x = images(2, 3, side, side)
    method = Given(reduce="mean", factor=1.0, post_process=("absolute", {"low_pass": sigma}, "absolute"))
    found = method.explain(None, x, (side, side)).map
    np.testing.assert_allclose(found.numpy(), forgrad(x.numpy(), sigma), rtol=0, atol=1e-12)
    kept = forgrad(x.numpy(), 2 * side)
    assert (np.abs(kept - found.numpy()).max() > 0.1) == (sigma < side)


def test_forgrad_takes_the_size_twice_as_the_filter_rings_below_zero():
    """An impulse has waves of all frequencies, all of one height: without the high ones it has negative lobes."""
    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    x[0, 0, 3, 5] = -1
    once = Given(reduce="mean", factor=1.0, post_process=("absolute", {"low_pass": 4}))
    twice = replace(once, post_process=(*once.post_process, "absolute"))
    assert once.explain(None, x).map.min() < -0.01
    np.testing.assert_allclose(twice.explain(None, x).map.numpy(), forgrad(x.numpy(), 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sigma", "mean", "down", "right", "mean_left", "wave_left"),
    [(1, 2, 0, 1, 0, 0), (2, 2, 0, 2, 1, 0), (2, 2, 2, 0, 1, 1 / 2)],
)
def test_xpliques_filter_of_odd_maps_lies_beside_the_mean(sigma, mean, down, right, mean_left, wave_left):
    """Shifted back by the wrong half, its disc lies about the wave (-1, -1): at a cut-off of 1 even the mean is gone,
    at 2 the two periods across are, and of those down one half. And 8 columns come back of 9."""
    one = wave((9, 9), down, right)
    maps = (mean + one)[None, None]
    assert_close(low_passed(maps[:, 0], sigma), maps[:, 0], **EXACT)
    found = forgrad(maps.numpy(), sigma)[0]
    assert found.shape == (9, 8)
    kept = mean_left * mean + wave_left * one[:, :8].numpy()
    np.testing.assert_allclose(found, 9 / 8 * kept, rtol=0, atol=1e-12)


# ---- in the config ----------------------------------------------------------------------------------------------

DEMO = "model: {source: demo}\nimages: {path: pictures}\n"
CHOICES = "expected one of absolute, positive, {smooth: pixels}, {low_pass: cycles}, {resize: mode}"
GOOD = [
    ("[]", ()),
    ("[absolute]", ("absolute",)),
    ("[absolute, {low_pass: 15}, absolute]", ("absolute", {"low_pass": 15.0}, "absolute")),
    ("[{smooth: 2.5}, positive, {resize: nearest}]", ({"smooth": 2.5}, "positive", {"resize": "nearest"})),
    ("[{smooth: 1000}, {low_pass: 1.0e-3}]", ({"smooth": 1000.0}, {"low_pass": 1e-3})),
    (
        "[{low_pass: auto, calibration: some folder}]",
        ({"low_pass": "auto", "calibration": "some folder"},),
    ),
]
BAD = [
    ("[absolut]", 42, "[0]", CHOICES),
    ("[absolute, abs]", 52, "[1]", CHOICES),
    ("[3]", 42, "[0]", CHOICES),
    ("[null]", 42, "[0]", CHOICES),
    ("[[absolute]]", 42, "[0]", CHOICES),
    ("[{}]", 42, "[0]", CHOICES),
    ("[{sharpen: 2}]", 42, "[0]", CHOICES),
    ("[{calibration: x}]", 42, "[0]", CHOICES),
    ("absolute", 41, "", "expected a list; got 'absolute'"),
    ("{smooth: 2}", 41, "", "expected a list; got keys with values"),
    ("[{smooth: -1}]", 51, "[0].smooth", "must be above 0; got -1"),
    ("[{smooth: 0}]", 51, "[0].smooth", "must be above 0; got 0"),
    ("[{smooth: 1001}]", 51, "[0].smooth", "must be at most 1000; got 1001"),
    ("[{smooth: wide}]", 51, "[0].smooth", "expected a number; got 'wide'"),
    ("[{smooth: true}]", 51, "[0].smooth", "expected a number; got true"),
    ("[{smooth: .nan}]", 51, "[0].smooth", ".nan is not a finite number"),
    ("[{low_pass: -1}]", 53, "[0].low_pass", "must be above 0; got -1"),
    ("[{low_pass: 0}]", 53, "[0].low_pass", "must be above 0; got 0"),
    ("[{low_pass: .inf}]", 53, "[0].low_pass", ".inf is not a finite number"),
    (
        "[{low_pass: aut}]",
        53,
        "[0].low_pass",
        "expected auto or a number; got 'aut'; did you mean 'auto'?",
    ),
    ("[{low_pass: null}]", 53, "[0].low_pass", "expected auto or a number; got null"),
    (
        "[positive, {resize: cubic}]",
        61,
        "[1].resize",
        "expected one of bilinear, bicubic, nearest; got 'cubic'; did you mean 'bicubic'?",
    ),
]
SCHEMA = json_schema()


@pytest.fixture
def loaded(tmp_path):
    def from_text(text):
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(path)
        except InvalidConfigError as error:
            return [line.replace(f"{tmp_path}/", "") for line in error.problems]

    return from_text


def entry(steps, name="gradcam"):
    return f"{DEMO}methods: [{{name: {name}, post_process: {steps}}}]\n"


@pytest.mark.parametrize(("text", "steps"), GOOD)
@pytest.mark.parametrize("name", ["gradcam", "random", "saliency", "smoothgrad"])
def test_steps_are_read_and_written_out_and_read_again(loaded, text, steps, name):
    config = loaded(entry(text, name))
    assert config.methods[0].method.post_process == config.methods[0].params["post_process"] == steps
    assert config.methods[0].method == build({"name": name, "post_process": list(steps)})
    again = loaded(config.text())
    assert again == config
    assert again.text() == config.text()
    assert again.fingerprint() == config.fingerprint()
    if steps:
        assert config.fingerprint() != loaded(entry("[positive, positive]", name)).fingerprint()


@pytest.mark.parametrize(("text", "column", "place", "problem"), BAD, ids=[row[0] for row in BAD])
def test_a_wrong_step_is_named_with_its_place_and_the_choices(loaded, text, column, place, problem):
    assert loaded(entry(text)) == [f"my.yaml:3:{column}: methods[0].post_process{place}: {problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[{low_pass: auto}]", "low_pass: auto is found on images; name them by calibration: folder"),
        ("[{low_pass: 3, calibration: x}]", "calibration goes with low_pass: auto; this cut-off is given"),
        ("[{low_pass: auto, calibration: ''}]", "must not be empty"),
        ("[{low_pass: auto, calibration: 3}]", "expected text; got 3; quote it: '3'"),
    ],
)
def test_a_cut_off_and_the_images_it_is_found_on_go_together(loaded, text, problem):
    (line,) = loaded(entry(text))
    assert line.startswith("my.yaml:3:")
    assert ": methods[0].post_process[0]" in line
    assert line.endswith(f": {problem}")
    with pytest.raises(ConfigError, match="^gradcam: post_process: "):
        build({"name": "gradcam", "post_process": read_yaml(text, "step").data})


@pytest.mark.parametrize(
    "step", ["{smooth: 2, sigma: 3}", "{smooth: 2, low_pass: 3}", "{resize: nearest, low_pass: 3}"]
)
def test_a_step_does_one_thing(loaded, step):
    (line,) = loaded(entry(f"[{step}]"))
    assert line == f"my.yaml:3:42: methods[0].post_process[0]: {CHOICES}"


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("{low_pass: auto, calibraton: x}", f"3:42: methods[0].post_process[0]: {CHOICES}"),
        (
            "{low_pass: auto, calibration: ''}",
            "3:72: methods[0].post_process[0].calibration: must not be empty",
        ),
    ],
)
def test_an_error_is_told_at_the_key_that_it_is_about(loaded, step, place):
    assert loaded(entry(f"[{step}]")) == [f"my.yaml:{place}"]


def test_all_wrong_steps_are_said_at_once(loaded):
    lines = loaded(entry("[absolute, {smooth: -1}, nope, {low_pass: auto}, {resize: 3}]"))
    places = [line.split(": ")[1].removeprefix("methods[0].post_process")[:3] for line in lines]
    assert places == ["[1]", "[2]", "[3]", "[4]"]


def test_building_says_all_that_is_wrong_too():
    with pytest.raises(ConfigError) as error:
        build({"name": "saliency", "post_process": ["nope", {"smooth": 0}, {"resize": "cubic"}]})
    lines = str(error.value).splitlines()
    assert lines == [
        f"saliency: post_process: {CHOICES}",
        "saliency: post_process: Input should be greater than 0",
        "saliency: post_process: Input should be 'bilinear', 'bicubic' or 'nearest'",
    ]


def test_a_method_within_another_leaves_the_steps_to_that_one(loaded):
    text = f"{DEMO}methods: [{{name: smoothgrad, base: {{name: saliency, post_process: [absolute]}}}}]\n"
    (line,) = loaded(text)
    assert "methods[0].base.post_process" in line
    assert "saliency takes post_process from the method around it; set it there" in line


# ---- for editors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "steps"), GOOD)
@pytest.mark.parametrize("name", ["gradcam", "random", "saliency", "smoothgrad"])
def test_the_schema_takes_what_the_config_takes(loaded, text, steps, name):
    assert matches(SCHEMA, read_yaml(entry(text, name).encode(), "short").data)
    assert matches(SCHEMA, json.loads(json.dumps(loaded(entry(text, name)).plain())))
    assert len(steps) == len(read_yaml(text, "steps").data or [])


BOUNDS = ("must be above", "is not a finite number")
"""What ``matches`` does not look at; see below."""
REFUSED = [text for text, *_, problem in BAD if not any(words in problem for words in BOUNDS)]


@pytest.mark.parametrize("text", REFUSED)
def test_the_schema_refuses_what_the_config_refuses(text):
    option = SCHEMA["$defs"]["method-gradcam"]["properties"]["post_process"]
    data = read_yaml(entry(text).encode(), "short").data["methods"][0]["post_process"]
    assert not matches(option, data)


def test_the_schema_has_the_bounds_of_the_steps():
    option = json.dumps(SCHEMA["$defs"]["method-saliency"]["properties"]["post_process"])
    assert '"$ref": "#/$defs/Smooth"' in option
    smooth, cut = (SCHEMA["$defs"][name]["properties"] for name in ("Smooth", "LowPass"))
    assert (smooth["smooth"]["exclusiveMinimum"], smooth["smooth"]["maximum"]) == (0, 1000)
    number, word = cut["low_pass"]["anyOf"]
    assert (number["type"], number["exclusiveMinimum"], word["const"]) == ("number", 0, "auto")
    assert cut["calibration"]["minLength"] == 1
