"""One group of pixels at a time, or one upon the other: answers known beforehand, Quantus, and AIX360 written out."""

from __future__ import annotations

import numpy as np
import pytest
import quantus
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.testing import assert_close
from toys import InDouble, PooledLinear, SumModel, Weighted, bound, images, made

from xcli.metrics.faithfulness.groups import MonotonicityCorrelation
from xcli.metrics.faithfulness.subsets import cells
from xcli.registry import build_metric

CORRELATED = ["faithfulness-estimate", "monotonicity-correlation"]
TARGETS, IMAGE = [1, 3, 0, 2, 4], [0, 0, 1, 2, 2]


class Grey(PooledLinear):
    """One colour, in which a pixel is a feature for Quantus too; probabilities that move."""

    def forward(self, x):
        return 10 * super().forward(x.expand(-1, 3, -1, -1))


def found(metric, net, x, map, target=None, image=None):
    metric = build_metric(metric)
    score = bound(net, x, [0] * len(map) if target is None else target, image)
    return metric.measure(map=map, x=x, score=score)


def grey_case(rows=4):
    x, map = (images(rows, *shape).float().double() for shape in ((1, 8, 8), (8, 8)))
    return made(Grey), x, map.flip(0), [target % 5 for target in range(rows)]


def asked(metric, net, x, map, target, softmax=False):
    """What Quantus says of one batch."""
    return metric(
        model=InDouble(net, softmax).eval(),
        x_batch=x.numpy(),
        y_batch=np.array(target),
        a_batch=map[:, None].numpy(),
        softmax=False,
        device="cpu",
    )


# --- faithfulness-estimate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("how", [{"grid": 4}, {"grid": 5}, {"pixels": 6}])
def test_a_map_that_is_what_a_sum_model_adds_up(how, sign):
    x = images(3, 3, 8, 12)
    got = found({"name": "faithfulness-estimate", "score": "logit", **how}, SumModel(), x, sign * x.sum(1))
    assert_close(got.values, torch.full((3,), float(sign)).double())


def test_the_estimate_is_its_definition_written_out():
    net, x, map = made(PooledLinear), images(3, 3, 9, 12), images(5, 9, 12, seed=1)
    got = found({"name": "faithfulness-estimate", "grid": 4}, net, x, map, TARGETS, IMAGE).values
    cell = cells((9, 12), 4)
    for r, (i, target) in enumerate(zip(IMAGE, TARGETS)):
        whole = net(x[i : i + 1]).softmax(1)[0, target].item()
        said, lost = [], []
        for number in range(16):
            said.append(map[r][cell == number].sum().item())
            copy = torch.where(cell == number, 0.0, x[i])
            lost.append(whole - net(copy[None]).softmax(1)[0, target].item())
        assert_close(got[r].item(), pearsonr(said, lost)[0])


@pytest.mark.parametrize("pixels", [1, 4])
def test_the_estimate_equals_quantus(pixels):
    net, x, map, target = grey_case()
    peer = quantus.FaithfulnessEstimate(features_in_step=pixels, disable_warnings=True)
    expected = asked(peer, net, x, map, target)
    got = found(
        {"name": "faithfulness-estimate", "preset": "quantus", "pixels": pixels}, net, x, map, target
    ).values
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_the_estimate_of_single_pixels_is_that_of_aix360():
    net, x, map, _target = grey_case(2)
    target = net(x).argmax(1).tolist()
    metric = {"name": "faithfulness-estimate", "pixels": 1}
    got = found(metric, net, x, map, target).values
    for r in range(2):
        left = []
        for place in range(64):
            copy = x[r].clone()
            copy.view(-1)[place] = 0
            left.append(net(copy[None]).softmax(1)[0, target[r]].item())
        assert_close(got[r].item(), -np.corrcoef(map[r].flatten(), left)[0, 1])


# --- monotonicity --------------------------------------------------------------------------------------------

PIXELS = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]], dtype=torch.float64)


def test_positive_pixels_raise_a_sum_model_and_a_negative_one_does_not():
    metric = {"name": "monotonicity", "score": "logit", "steps": 4}
    got = found(metric, SumModel(), PIXELS, PIXELS[:, 0])
    assert_close(got.curve, torch.tensor([[1.0, 3, 6, 10]]).double())
    assert_close(got.fraction, torch.tensor([0.25, 0.5, 0.75, 1]).double())
    assert (got.values.item(), got.extras["share"].item()) == (1, 1)
    fallen = PIXELS * torch.tensor([[1.0, 1], [-1, 1]]).double()
    got = found(metric, SumModel(), fallen, PIXELS[:, 0])
    assert_close(got.curve, torch.tensor([[1.0, 3, 0, 4]]).double())
    assert (got.values.item(), got.extras["share"].item()) == (0, pytest.approx(2 / 3))


def test_a_flat_map_orders_nothing():
    got = found({"name": "monotonicity", "steps": 4}, SumModel(), PIXELS, torch.ones(1, 2, 2).double())
    assert got.values.isnan().all()
    assert got.extras["share"].isnan().all()
    assert got.curve.isnan().all()


def test_rounding_is_no_fall():
    class Steady(nn.Module):
        def forward(self, x):
            return 1 - 1e-16 * x.sum((1, 2, 3))[:, None]

    got = found({"name": "monotonicity", "score": "logit", "steps": 4}, Steady(), 20 * PIXELS, PIXELS[:, 0])
    assert got.values.item() == 1


@pytest.mark.parametrize(("steps", "expected"), [(4, [2, 5, 7, 10]), (3, [3, 6, 10]), (40, range(1, 11))])
def test_steps_are_as_even_as_pixels_allow(steps, expected):
    assert build_metric({"name": "monotonicity", "steps": steps}).counts(10) == list(expected)


def test_so_many_pixels_a_step():
    assert build_metric({"name": "monotonicity", "pixels": 4}).counts(10) == [4, 8, 10]
    assert build_metric({"name": "monotonicity", "pixels": 12}).counts(10) == [10]


def aix360(net, x, map, target):
    """One pixel after the other, lowest first, added to an image of zeros."""
    copy, seen = torch.zeros_like(x), []
    for place in map.flatten().argsort():
        copy.view(len(x), -1)[:, place] = x.view(len(x), -1)[:, place]
        seen.append(net(copy[None]).softmax(1)[0, target].item())
    return np.diff(seen) >= 0


def test_monotonicity_equals_aix360():
    x = images(4, 1, 4, 4).abs()
    x[1:3] *= torch.where(images(2, 1, 4, 4) > 1, -1.0, 1.0).double()  # some that fall, some that do not
    weight = torch.stack([torch.ones(4, 4), -torch.ones(4, 4)]).double()
    map = x[:, 0].abs()
    got = found({"name": "monotonicity", "preset": "aix360"}, Weighted(weight), x, map)
    with torch.no_grad():
        rising = [aix360(Weighted(weight), *row, 0) for row in zip(x, map)]
    assert got.values.tolist() == [float(steps.all()) for steps in rising]
    assert set(got.values.tolist()) == {0, 1}
    assert_close(got.extras["share"], torch.tensor([steps.mean() for steps in rising]))


def test_quantus_calls_every_map_monotonous():
    net, x, map, target = grey_case()
    peer = quantus.Monotonicity(features_in_step=4, disable_warnings=True)
    assert asked(peer, net, x, map, target, softmax=True) == [True] * 4
    metric = {"name": "monotonicity", "preset": "quantus", "pixels": 4}
    assert found(metric, net, x, map, target).values.tolist() == [0] * 4


# --- monotonicity-correlation --------------------------------------------------------------------------------


def colours_of(metric, net, x, target):
    return metric.drawn(bound(net, x, target), x)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_map_as_large_as_what_a_pixel_does_to_a_linear_model(sign):
    """f moves by w (x - u) when a pixel takes the level u."""
    weight, x = images(1, 4, 4), images(2, 1, 4, 4, seed=1)
    metric = MonotonicityCorrelation(pixels=1, samples=3, score="logit")
    net = Weighted(weight)
    level = colours_of(metric, net, x, [0, 0])[:, :, 0, None, None]  # (2, 3, 1, 1)
    moved = (weight * (x - level)).square().mean(1)
    map = moved if sign > 0 else 1 / moved
    got = metric.measure(map=-map, x=x, score=bound(net, x, [0, 0]))  # by magnitude
    assert_close(got.values, torch.full((2,), float(sign)).double())


def test_the_unsettled_score_is_its_definition_written_out():
    net, x, map = made(PooledLinear), images(3, 3, 9, 12), images(5, 9, 12, seed=1)
    metric = MonotonicityCorrelation(grid=3, samples=2)
    score = bound(net, x, TARGETS, IMAGE)
    got, shown, cell = (
        metric.measure(map=map, x=x, score=score).values,
        metric.drawn(score, x),
        cells((9, 12), 3),
    )
    for r, (i, target) in enumerate(zip(IMAGE, TARGETS)):
        whole = net(x[i : i + 1]).softmax(1)[0, target].item()
        said, moved = [], []
        for number in range(9):
            said.append(map[r].abs()[cell == number].sum().item())
            scores = [
                net(torch.where(cell == number, colour[:, None, None], x[i])[None]).softmax(1)[0, target]
                for colour in shown[r]
            ]
            moved.append(np.mean([(whole - other.item()) ** 2 for other in scores]))
        assert_close(got[r].item(), spearmanr(said, moved)[0])


def test_colours_lie_between_the_images_extremes():
    x = images(2, 3, 9, 12) * torch.tensor([1.0, 10, 100]).double()[:, None, None]
    shown = colours_of(MonotonicityCorrelation(samples=500), SumModel(), x, [0, 0])
    low, high = x.amin((2, 3))[:, None], x.amax((2, 3))[:, None]
    assert (shown >= low).all()
    assert (shown <= high).all()
    assert (shown.amax(1) - shown.amin(1) > 0.95 * (high - low)[:, 0]).all()
    grey = colours_of(MonotonicityCorrelation(samples=500, colours="unit"), SumModel(), x, [0, 0])
    assert torch.equal(grey[..., 0], grey[..., 2])
    assert 0 <= grey.min() < 0.01 < 0.99 < grey.max() < 1


def test_monotonicity_correlation_equals_quantus(monkeypatch):
    net, x, map, target = grey_case()
    metric = MonotonicityCorrelation(pixels=4, samples=6, colours="unit")
    level = colours_of(metric, net, x, target)[..., 0]  # (4, 6)
    turns = iter([sample for _group in range(16) for sample in level.T.numpy()])
    monkeypatch.setattr(np.random, "uniform", lambda *_args, **_kwargs: next(turns))
    peer = quantus.MonotonicityCorrelation(nr_samples=6, features_in_step=4, disable_warnings=True)
    expected = asked(peer, net, x, map, target, softmax=True)
    got = metric.measure(map=map, x=x, score=bound(net, x, target)).values
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_quantus_stops_at_a_batch_with_one_score_near_zero():
    weight, x = torch.ones(1, 8, 8).double(), images(2, 1, 8, 8).float().double()
    x[1, :, 4:] = -x[1, :, :4]
    map = images(2, 8, 8, seed=3)
    peer = quantus.MonotonicityCorrelation(nr_samples=2, features_in_step=4, disable_warnings=True)
    with pytest.raises(ValueError, match="NumPy boolean array indexing"):
        asked(peer, Weighted(weight), x, map, [0, 0])
    metric = {"name": "monotonicity-correlation", "score": "logit", "samples": 2, "pixels": 4}
    assert found(metric, Weighted(weight), x, map).values.isfinite().all()


@pytest.mark.parametrize("name", CORRELATED)
def test_what_does_not_vary_does_not_correlate(name):
    x, map = images(2, 3, 8, 8), images(2, 8, 8, seed=3)
    metric = {"name": name, "grid": 3}
    assert found(metric, Weighted(torch.zeros(1, 8, 8).double()), x, map).values.isnan().all()
    assert found(metric, SumModel(), x, torch.full_like(map, 0.1)).values.isnan().all()
    assert found(metric, SumModel(), x, map).values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*CORRELATED, "monotonicity"])
def test_numbers_come_in_the_type_of_the_images(name, dtype):
    net, x, map = made(PooledLinear).to(dtype), images(3, 3, 9, 12).to(dtype), images(5, 9, 12).to(dtype)
    got = found(name, net, x, map, TARGETS, IMAGE)
    assert {part.dtype for part in (got.values, *got.extras.values())} == {dtype}
    exact = found(name, net.double(), x.double(), map.double(), TARGETS, IMAGE)
    assert_close(got.values.double(), exact.values, rtol=0, atol=0.02)
