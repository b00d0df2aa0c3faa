"""Deletion and insertion: curves known beforehand, and the definitions of other implementations written out slowly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, SumModel, bound, images, made

from xcli.baselines import Removal
from xcli.errors import ConfigError
from xcli.metrics.curves import area_under
from xcli.metrics.faithfulness.deletion import Deletion, Insertion
from xcli.registry import build_metric

SQUARE = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]], dtype=torch.float64)
ZEROS = {"score": "logit", "substrate": "constant"}


def found(metric, net, x, map, target=None, image=None):
    score = bound(net, x, [0] * len(x) if target is None else target, image)
    return metric.measure(map=map, x=x, score=score)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


# --- known answers -------------------------------------------------------------------------------------------


def test_deletion_of_a_sum_model_is_a_sorted_running_sum():
    got = found(Deletion(score="logit", steps=4), SumModel(), SQUARE, SQUARE[:, 0])
    assert_close(got.curve, row(10, 6, 3, 1, 0))
    assert_close(got.fraction, row(0, 0.25, 0.5, 0.75, 1)[0])
    assert_close(got.values, row((10 / 2 + 6 + 3 + 1 + 0 / 2) / 4)[0])


def test_insertion_of_a_sum_model_is_a_sorted_running_sum():
    got = found(Insertion(**ZEROS, steps=4), SumModel(), SQUARE, SQUARE[:, 0])
    assert_close(got.curve, row(0, 4, 7, 9, 10))
    assert_close(got.values, row((0 / 2 + 4 + 7 + 9 + 10 / 2) / 4)[0])


def test_an_area_by_hand_under_each_convention():
    x = torch.tensor([[[[5.0, 4.0, 3.0, 2.0, 1.0]]]], dtype=torch.float64)
    values = {}
    for how in ("fraction", "steps", "sum"):
        got = found(Deletion(score="logit", pixels=2, area=how), SumModel(), x, x[:, 0])
        assert_close(got.curve, row(15, 6, 1, 0))  # the last step takes one pixel alone
        assert_close(got.fraction, row(0, 0.4, 0.8, 1)[0])
        values[how] = float(got.values)
    assert values["fraction"] == pytest.approx(0.4 * (15 + 6) / 2 + 0.4 * (6 + 1) / 2 + 0.2 * (1 + 0) / 2)
    assert values["steps"] == pytest.approx(((15 + 6) / 2 + (6 + 1) / 2 + (1 + 0) / 2) / 3)
    assert values["sum"] == pytest.approx((6 + 1) / 2 + (1 + 0) / 2)


def test_steps_are_whole_pixels():
    assert Deletion(steps=4).counts(10) == [0, 2, 5, 7, 10]
    assert Deletion(steps=4, rounding="up").counts(10) == [0, 3, 6, 9, 10]
    assert Deletion(pixels=4).counts(10) == [0, 4, 8, 10]
    assert Deletion(pixels=5).counts(10) == [0, 5, 10]
    assert Deletion(pixels=40).counts(10) == [0, 10]
    assert Deletion(steps=40).counts(3) == [0, 1, 2, 3]  # no step without a pixel
    assert Deletion(steps=1).counts(10) == [0, 10]
    assert Deletion(steps=2, until=0.5).counts(10) == [0, 2, 5]
    assert Deletion(steps=2, until=0.01).counts(10) == [0, 1]


class Dies(nn.Module):
    """1 while the first pixel is what it was, else 0."""

    def forward(self, x):
        return (x[:, :, 0, 0] == 7).double()


def test_a_network_that_dies_at_the_first_pixel():
    x = torch.full((1, 1, 4, 4), 7.0, dtype=torch.float64)
    best = torch.arange(16, 0, -1, dtype=torch.float64).view(1, 4, 4)
    for steps in (1, 2, 8, 16):
        options = {**ZEROS, "steps": steps}
        least, most = 1 / (2 * steps), 1 - 1 / (2 * steps)
        assert found(Deletion(**options), Dies(), x, best).values.item() == pytest.approx(least)
        assert found(Deletion(**options), Dies(), x, -best).values.item() == pytest.approx(most)
        assert found(Insertion(**options), Dies(), x, best).values.item() == pytest.approx(most)
        assert found(Insertion(**options), Dies(), x, -best).values.item() == pytest.approx(least)


def test_of_all_orders_the_contributions_are_best():
    x = torch.tensor([[[[1.5, -2.0], [0.25, 3.0]]]], dtype=torch.float64)
    for metric, best in ((Deletion(**ZEROS, steps=4), min), (Insertion(**ZEROS, steps=4), max)):
        orders = [torch.tensor(order).view(1, 2, 2).double() for order in itertools.permutations(range(4))]
        values = [found(metric, SumModel(), x, order).values.item() for order in orders]
        assert len(set(values)) > 4
        assert found(metric, SumModel(), x, x[:, 0]).values.item() == pytest.approx(best(values))


def test_of_an_additive_network_deletion_and_insertion_mirror_each_other():
    x = images(3, 3, 8, 9)
    map, net = images(3, 8, 9, seed=1), nn.Sequential(nn.Flatten(), nn.Linear(216, 4).double())
    options = {"score": "logit", "substrate": "blur", "steps": 7}
    down = found(Deletion(**options), net, x, map, [0, 1, 2])
    up = found(Insertion(**options), net, x, map, [0, 1, 2])
    assert_close(down.curve + up.curve, (down.curve[:, :1] + up.curve[:, :1]).expand(-1, 8))


def test_insertion_is_deletion_backwards():
    net, x, map = made(PooledLinear), images(2, 3, 8, 9), images(2, 8, 9, seed=1)
    options = {"substrate": "blur", "steps": 8}
    up = found(Insertion(**options), net, x, map, [1, 3])
    assert_close(up.curve.flip(1), found(Deletion(**options), net, x, -map, [1, 3]).curve)


def test_equal_pixels_go_in_raster_order():
    got = found(Deletion(score="logit", steps=4), SumModel(), SQUARE, torch.zeros(1, 2, 2))
    assert_close(got.curve, row(10, 6, 5, 2, 0))
    got = found(Insertion(**ZEROS, steps=4), SumModel(), SQUARE, torch.zeros(1, 2, 2))
    assert_close(got.curve, row(0, 4, 5, 8, 10))


def test_all_colours_of_a_pixel_go_at_once():
    x = SQUARE * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    got = found(Deletion(score="logit", steps=4), SumModel(), x, SQUARE[:, 0])
    assert_close(got.curve, 111 * row(10, 6, 3, 1, 0))


def test_the_curve_may_end_early():
    x = torch.arange(8, 0, -1, dtype=torch.float64).view(1, 1, 2, 4)
    got = found(Deletion(score="logit", steps=2, until=0.5), SumModel(), x, x[:, 0])
    assert_close(got.curve, row(36, 21, 10))
    assert_close(got.fraction, row(0, 0.25, 0.5)[0])
    assert_close(got.values, row((36 / 2 + 21 + 10 / 2) / 2)[0])
    got = found(Insertion(**ZEROS, steps=2, until=0.5), SumModel(), x, x[:, 0])
    assert_close(got.curve, row(0, 15, 26))


def test_a_map_that_is_not_finite_has_no_order():
    x, maps = SQUARE.repeat(3, 1, 1, 1), SQUARE[:, 0].repeat(3, 1, 1)
    maps[1, 0, 0], maps[2, 1, 1] = torch.nan, torch.inf
    got = found(Deletion(score="logit", steps=4), SumModel(), x, maps)
    assert got.values.isnan().tolist() == [False, True, True]
    assert got.curve.isnan().all(1).tolist() == [False, True, True]


def test_precision_is_that_of_the_network():
    net, x = made(PooledLinear), images(2, 3, 8, 9)
    exact = found(Insertion(steps=3), net, x, x[:, 0], [1, 3])
    single = found(Insertion(steps=3), net.float(), x.float(), x[:, 0].float(), [1, 3])
    assert exact.values.dtype == exact.curve.dtype == torch.float64
    assert single.values.dtype == single.curve.dtype == torch.float32
    assert_close(single.curve.double(), exact.curve, rtol=1e-4, atol=1e-5)


# --- what is spent -------------------------------------------------------------------------------------------


class Counting(PooledLinear):
    seen = 0
    passes = 0

    def forward(self, x):
        self.seen += len(x)
        self.passes += 1
        return super().forward(x)


def test_both_together_count_their_ends_once():
    net, x, rows, steps = made(Counting), images(3, 3, 8, 9), 4, 5
    score = bound(net, x, [0, 1, 2, 3], image=[0, 0, 1, 2])
    maps = images(rows, 8, 9, seed=1)
    net.seen = net.passes = 0
    for metric in (
        Deletion(steps=steps),
        Insertion(steps=steps),
        Insertion(steps=steps, substrate="constant"),
    ):
        metric.measure(map=maps, x=x, score=score)
    clean, emptied = (
        len(x),
        1 + len(x),
    )  # to zeros, one for all, and to blur; a pass serves all rows of an image
    assert net.seen == clean + emptied + 3 * (steps - 1) * rows
    assert net.passes == 1 + 2 + 3  # every curve is one call


@pytest.mark.parametrize("steps", [1, 3])
def test_copies_are_made_as_the_passes_need_them(steps):
    net, x = made(Counting), images(2, 3, 8, 9)
    made_at_once = []
    remover = Removal.remover

    class Watched(Deletion):
        def remover(self, score, x):
            inner = remover(self, score, x)

            def outer(image, removed):
                made_at_once.append(len(image))
                return inner(image, removed)

            return outer

    score = bound(net, x, [0, 1], micro_batch=3)
    Watched(steps=steps).measure(map=images(2, 8, 9, seed=1), x=x, score=score)
    assert made_at_once == ([] if steps == 1 else [3, 1])


# --- other implementations, written out ----------------------------------------------------------------------


def case(height, width, targets=(1, 3, 0), image=(0, 0, 1)):
    net = made(PooledLinear)
    return (
        net,
        images(2, 3, height, width),
        images(len(targets), height, width, seed=1),
        list(targets),
        list(image),
    )


def rise(net, image, map, target, mode, step, substrate):
    """The metric of RISE's authors, one image and one pass at a time: (scores, area)."""
    emptied = substrate(image)
    now, then = (image.clone(), emptied) if mode == "del" else (emptied.clone(), image)
    order = np.argsort(map.numpy().ravel())[::-1].copy()
    scores = [net(now).softmax(1)[0, target].item()]
    for first in range(0, len(order), step):
        pixels = torch.from_numpy(order[first : first + step])
        now.flatten(2)[:, :, pixels] = then.flatten(2)[:, :, pixels]
        scores.append(net(now).softmax(1)[0, target].item())
    scores = np.array(scores)
    return scores, (scores.sum() - scores[0] / 2 - scores[-1] / 2) / (len(scores) - 1)


def rise_blur(image):
    delta = np.zeros((11, 11))
    delta[5, 5] = 1
    kernels = torch.zeros(3, 3, 11, 11, dtype=torch.float64)
    kernels[[0, 1, 2], [0, 1, 2]] = torch.from_numpy(gaussian_filter(delta, 5))
    return nn.functional.conv2d(image, kernels, padding=5)


@pytest.mark.parametrize("size", [(32, 28), (30, 31)])  # 4 whole steps, or 5 with a short one
@pytest.mark.parametrize("name", ["deletion", "insertion"])
def test_preset_rise(name, size):
    net, x, maps, targets, image = case(*size)
    got = found(build_metric({"name": name, "preset": "rise"}), net, x, maps, targets, image)
    for i, (target, own) in enumerate(zip(targets, image)):
        substrate = torch.zeros_like if name == "deletion" else rise_blur
        curve, area = rise(net, x[own : own + 1], maps[i], target, name[:3], 224, substrate)
        assert_close(got.curve[i], torch.from_numpy(curve))
        assert got.values[i].item() == pytest.approx(area)


def xplique(net, x, maps, targets, mode, steps, until):
    """Xplique's CausalFidelity, NumPy, channels last, for one image a row; it returns the mean of all rows."""
    inputs = x.permute(0, 2, 3, 1).numpy().astype(np.float64)
    flat = inputs.reshape(len(inputs), -1, 3)
    most = int(np.floor(flat.shape[1] * until))
    order = np.argsort(maps.numpy().reshape(len(maps), -1), axis=-1)[:, ::-1]
    start, end = (flat, np.zeros_like(flat)) if mode == "deletion" else (np.zeros_like(flat), flat)
    scores = {}
    for step in np.linspace(0, most, steps + 1, dtype=np.int32):
        batch = start.copy()
        for i, ids in enumerate(order[:, :step]):
            batch[i, ids] = end[i, ids]
        logits = net(torch.from_numpy(batch.reshape(inputs.shape)).permute(0, 3, 1, 2))
        scores[int(step)] = logits[torch.arange(len(targets)), targets].mean().item()
    values = np.array(list(scores.values()))
    return scores, np.mean(values[:-1] + values[1:]) * 0.5


@pytest.mark.parametrize("until", [1.0, 0.37])
@pytest.mark.parametrize("size", [(10, 10), (9, 7)])
@pytest.mark.parametrize("name", ["deletion", "insertion"])
def test_preset_xplique(name, size, until):
    net, x, maps, targets, image = case(*size)
    metric = build_metric({"name": name, "preset": "xplique", "until": until})
    got = found(metric, net, x, maps, targets, image)
    scores, area = xplique(net, x[image], maps, targets, name, 10, until)
    assert metric.counts(size[0] * size[1]) == list(scores)
    assert_close(got.curve.mean(0), torch.tensor(list(scores.values()), dtype=torch.float64))
    assert got.values.mean().item() == pytest.approx(area)


def torchcam(net, x, maps, targets, steps):
    """torch-cam's DeletionInsertionMetric on given maps, one forward pass a point: (fractions, deletion, insertion)."""
    total = maps[0].numel()
    size = (total + steps - 1) // steps
    counts = [*range(0, total, size), total]
    order = torch.argsort(maps.flatten(1), dim=1, descending=True, stable=True)
    ranks = torch.argsort(order, dim=1).view(maps.shape)
    deletion, insertion = [], []
    for count in counts:
        first = (ranks < count)[:, None]
        for curve, kept in ((deletion, ~first), (insertion, first)):
            logits = net(torch.where(kept, x, torch.zeros_like(x)))
            curve.append(logits[torch.arange(len(targets)), targets])
    fractions = torch.tensor(counts, dtype=torch.float64) / total
    return fractions, torch.stack(deletion, 1), torch.stack(insertion, 1)


@pytest.mark.parametrize("size", [(10, 10), (9, 7)])
@pytest.mark.parametrize("name", ["deletion", "insertion"])
def test_preset_torch_cam(name, size):
    net, x, maps, targets, image = case(*size)
    maps = maps.round()  # ties are in raster order there too
    got = found(build_metric({"name": name, "preset": "torch-cam"}), net, x, maps, targets, image)
    fractions, *curves = torchcam(net, x[image], maps, targets, 20)
    curve = curves[name == "insertion"]
    assert_close(got.fraction, fractions)
    assert_close(got.curve, curve.detach())
    assert_close(got.values, torch.trapezoid(curve.detach(), fractions, dim=1))


def test_the_steps_of_xplique_lose_a_pixel_to_rounding_where_ours_do_not():
    assert np.linspace(0, 120, 27, dtype=np.int32)[13] == 59  # half of 120 pixels, in 26 steps
    assert Deletion(steps=26).counts(120)[13] == 60
    for side in range(16, 1025):  # with its own 10 steps the two agree
        assert np.linspace(0, side**2, 11, dtype=np.int32).tolist() == Deletion(steps=10).counts(side**2)


def test_an_area_is_the_mean_height():
    flat = torch.full((2, 6), 3.0, dtype=torch.float64)
    uneven = torch.tensor([0, 0.1, 0.15, 0.3, 0.4, 0.5], dtype=torch.float64)
    assert_close(area_under(flat, uneven, "fraction"), flat[:, 0])
    assert_close(area_under(flat, uneven, "steps"), flat[:, 0])
    assert_close(area_under(flat, uneven, "sum"), 4 * flat[:, 0])


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"until": 0.0}, {"until": 1.5}, {"pixels": 0}, {"rounding": "down"}]
)
def test_options_are_checked(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build_metric({"name": "deletion", **wrong})
