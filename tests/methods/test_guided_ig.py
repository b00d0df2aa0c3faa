"""Guided integrated gradients against algorithm 1 in plain loops, and against what is known of its path."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pixels import RECTIFIED, case
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, Weighted, bound, images, made

import xcli
from xcli.errors import ConfigError, ModelError
from xcli.methods.gradient.guided_ig import GuidedIG
from xcli.methods.gradient.paths import IntegratedGradients
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}


def near(found, expected, share):
    """Equal up to a share of the largest number."""
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(found, expected, rtol=0, atol=share * peak)


def logits(net, x, target, image):
    return net(x[torch.tensor(image)])[torch.arange(len(image)), target].detach()


def algorithm_1(net, x, start, target, steps, fraction, distance):
    """The paper's algorithm for one image (C, H, W), in NumPy and flat: while a step is not made, the numbers below a
    quantile of the absolute gradients of those that may still move go on, at most to the far end of their range."""
    end, start = x.numpy().ravel(), start.numpy().ravel()
    here, total = start.copy(), np.zeros_like(end)
    way = np.abs(end - start).sum()

    def slope(flat):
        point = torch.from_numpy(flat).view(1, *x.shape).requires_grad_()
        return torch.autograd.grad(net(point)[0, target], point)[0].numpy().ravel()

    for step in range(1, steps + 1):
        before, grad = here.copy(), slope(here)
        near_end = start + (end - start) * max(step / steps - distance, 0)
        far_end = start + (end - start) * min(step / steps + distance, 1)
        wanted = way * (1 - step / steps)
        late = np.abs(here - start) < np.abs(near_end - start)
        here[late] = near_end[late]
        size = np.abs(grad)
        while np.abs(end - here).sum() - wanted > 1e-12 * way:
            size[here == far_end] = np.inf
            chosen = (size <= np.quantile(size, fraction, method="lower")) & (size < np.inf)
            room = np.abs(far_end - here)[chosen].sum()
            share = min((np.abs(end - here).sum() - wanted) / room, 1)
            here[chosen] = far_end[chosen] if share == 1 else here[chosen] + share * (far_end - here)[chosen]
            size[chosen] = np.inf
        total += (here - before) * grad
    return torch.from_numpy(total).view_as(x)


def path_of(method, score, x):
    """The points g_0 .. g_(steps - 1) of the path of each row, (steps, N, C, H, W)."""
    seen = []
    handle = score.module.register_forward_pre_hook(lambda _net, given: seen.append(given[0].detach()))
    method.attribute(score, x)
    handle.remove()
    return torch.stack(seen[: method.steps])


# ---- algorithm 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 1.0])
def test_maps_are_those_of_algorithm_1_for_every_row(fraction, distance):
    net, x = made(Residual), images(3, 3, 6, 8)
    method = GuidedIG(steps=6, fraction=fraction, distance=distance, value=-0.2)
    found = method.attribute(bound(net, x, **ROWS), x).map
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        expected = algorithm_1(net, x[image], torch.full_like(x[image], -0.2), target, 6, fraction, distance)
        near(found[row], expected, 1e-9)


@pytest.mark.parametrize("substrate", ["mean", "blur", "uniform", "negative"])
def test_maps_are_those_of_algorithm_1_from_every_kind_of_baseline(substrate):
    net, x = made(Tokens), images(3, 3, 16, 16)
    method, score = GuidedIG(steps=6, distance=0.3, substrate=substrate), bound(net, x, **ROWS)
    found, start = method.attribute(score, x).map, method.whole(score, x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        near(found[row], algorithm_1(net, x[image], start[image], target, 6, 0.25, 0.3), 1e-9)


@pytest.mark.parametrize("name", RECTIFIED)
def test_maps_are_those_of_algorithm_1_on_networks_of_rectifiers(name):
    net, x = case(name).net, case(name).x[:1]
    method = GuidedIG(steps=2, distance=0.4)
    found = method.attribute(bound(net, x, [1, 7], [0, 0]), x).map
    for row, target in enumerate((1, 7)):
        near(found[row], algorithm_1(net, x[0], torch.zeros_like(x[0]), target, 2, 0.25, 0.4), 1e-9)


class Dead(nn.Module):
    """One rectified unit a pixel and class, half of them shut on half the way, so that many gradients are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = images(4, 3, 6, 8, seed=3), images(4, 3, 6, 8, seed=4) / 2

    def forward(self, x):
        return torch.relu(x[:, None] * self.weight + self.bias).square().flatten(2).sum(2)


@pytest.mark.parametrize("fraction", [0.05, 0.25, 0.8])
@pytest.mark.parametrize("distance", [0.02, 0.3, 1.0])
def test_gradients_of_zero_move_together_as_in_algorithm_1(fraction, distance):
    net, x = Dead(), images(3, 3, 6, 8)
    score = bound(net, x, **ROWS)
    still = (score.gradients(torch.zeros_like(x)).grads[0] == 0).double().mean()
    assert 0.3 < still < 0.7  # far more than a fraction of 0.05, so that ties decide
    found = GuidedIG(steps=7, fraction=fraction, distance=distance).attribute(score, x).map
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        expected = algorithm_1(net, x[image], torch.zeros_like(x[image]), target, 7, fraction, distance)
        near(found[row], expected, 1e-10)


@pytest.mark.parametrize("fraction", [0.1, 0.25])
def test_equal_gradients_move_together_as_in_algorithm_1(fraction):
    """A linear model of few different weights on pictures of few different values, some of them the baseline's."""
    x = (images(3, 3, 6, 8) * 2).round() / 2
    net = Weighted((images(4, 6, 8, seed=3) * 2).round() / 2)
    assert (x == 0).sum() > 20
    points = path_of(GuidedIG(steps=5, fraction=fraction, distance=0.3), bound(net, x, **ROWS), x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        way, size = x[image], net.weight[target].abs().expand_as(x[image])
        for point in points:
            share = (point[row] / way).nan_to_num(-1)
            for one in size.unique():  # numbers alike in gradient are alike in their share of the way
                own = share[(size == one) & (way != 0)]
                assert_close(own, own[:1].expand_as(own), rtol=0, atol=1e-12)


# ---- the path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.0, 0.02, 0.15, 1.0])
@pytest.mark.parametrize("kind", [Residual, Dead])
def test_every_number_moves_towards_its_end_and_stays_near_the_straight_line(kind, distance):
    net, x = kind().double().eval() if kind is Dead else made(kind), images(3, 3, 6, 8)
    x[0, :, 2] = 0.3  # as the baseline
    method = GuidedIG(steps=8, distance=distance, value=0.3)
    points, end = path_of(method, bound(net, x, **ROWS), x), x[ROWS["image"]]
    way = end - 0.3
    share = ((points - 0.3) / way).nan_to_num(0)  # (steps, N, C, H, W)
    assert (points[0] == 0.3).all()
    assert share.diff(dim=0).min() > -1e-12
    place = torch.arange(8, dtype=torch.float64)[:, None, None, None, None] / 8
    off = (share - place)[:, way != 0]
    assert off.abs().max() < distance + 1e-12
    assert off.abs().max() > min(distance, 0.4) - 1e-12  # and uses its freedom
    assert (points[:, way == 0] == 0.3).all()
    left = (end - points).abs().sum((2, 3, 4)) / way.abs().sum((1, 2, 3))
    assert_close(left, (1 - place[:, :, 0, 0, 0]).expand_as(left), rtol=0, atol=1e-12)


def test_the_numbers_with_the_smallest_gradients_go_first_one_by_one():
    """12 numbers with ways of 1, in 4 steps without a bound: each step has room for 3 of them."""
    weight = torch.randperm(12, generator=torch.Generator().manual_seed(3)).double().view(1, 3, 4) - 5.7
    x, net = torch.ones(1, 1, 3, 4).double(), Weighted(weight)
    points = path_of(GuidedIG(steps=4, fraction=1e-6, distance=1.0), bound(net, x, [0]), x)[:, 0, 0]
    rank = weight[0].abs().flatten().argsort().argsort().view(3, 4)
    for step, point in enumerate(points):
        assert_close(point, (rank < 3 * step).double(), **EXACT)


def test_a_share_that_the_step_has_no_room_for_moves_in_proportion():
    """A step of 3 of the 12 numbers, of which 6 are a share: each goes half its way, and the others wait."""
    weight = torch.randperm(12, generator=torch.Generator().manual_seed(3)).double().view(1, 3, 4) - 5.7
    x, net = torch.ones(1, 1, 3, 4).double(), Weighted(weight)
    points = path_of(GuidedIG(steps=4, fraction=0.5, distance=1.0), bound(net, x, [0]), x)[:, 0, 0]
    rank = weight[0].abs().flatten().argsort().argsort().view(3, 4)
    low = (rank < 6).double()
    for point, expected in zip(points, (0 * low, low / 2, low, low + (1 - low) / 2)):
        assert_close(point, expected, **EXACT)


@pytest.mark.parametrize("distance", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_the_path_arrives_so_a_linear_model_is_shared_exactly(fraction, distance):
    x, weight = images(2, 3, 4, 5), images(3, 4, 5, seed=3)
    method = GuidedIG(steps=7, fraction=fraction, distance=distance, value=-0.4)
    found = method.attribute(bound(Weighted(weight), x, [2, 0, 1], [0, 0, 1]), x)
    assert_close(found.map, (x[[0, 0, 1]] + 0.4) * weight[[2, 0, 1]][:, None], **EXACT)
    assert_close(found.extras["delta"], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("substrate", ["constant", "blur", "gaussian"])
@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_without_a_distance_it_is_integrated_gradients_with_left_ends(kind, substrate, steps):
    net, x = made(kind), images(3, 3, 16, 16)
    score = bound(net, x, **ROWS)
    found = GuidedIG(distance=0.0, substrate=substrate, steps=steps).attribute(score, x)
    expected = IntegratedGradients(rule="left", substrate=substrate, steps=steps).attribute(score, x)
    assert_close(found.map, expected.map, **EXACT)
    assert_close(found.extras["delta"], expected.extras["delta"], rtol=0, atol=1e-12)


def test_one_step_is_the_gradient_at_the_baseline_whatever_the_freedom():
    net, x = made(Residual), images(3, 3, 6, 8)
    score = bound(net, x, **ROWS)
    (grads,) = score.gradients(torch.full_like(x, 0.1)).grads
    found = GuidedIG(steps=1, distance=1.0, fraction=0.1, value=0.1).attribute(score, x).map
    assert_close(found, (x - 0.1)[ROWS["image"]] * grads, **EXACT)


# ---- completeness ------------------------------------------------------------------------------------------------


def completeness_error(**options):
    net, x = made(Tokens), images(3, 3, 16, 16)
    return GuidedIG(**options).attribute(bound(net, x, **ROWS), x).extras["delta"].abs().mean()


def test_near_the_straight_line_the_error_of_completeness_falls_with_the_steps():
    errors = [completeness_error(steps=steps) for steps in (10, 40, 160)]
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 5


def test_far_from_the_line_the_error_of_completeness_falls_more_slowly_than_the_steps_grow():
    """A step of a share of few numbers is short, but not each number's way in it."""
    coarse, fine = (completeness_error(steps=steps, distance=0.3) for steps in (20, 320))
    assert 2 < coarse / fine < 16 / 3


@pytest.mark.parametrize("substrate", ["constant", "mean"])
def test_delta_is_the_sum_less_the_difference_between_the_ends(substrate):
    net, x = made(Residual), images(3, 3, 6, 8)
    found = GuidedIG(steps=4, distance=0.3, value=0.2, substrate=substrate).attribute(
        bound(net, x, **ROWS), x
    )
    start = x.mean((2, 3), keepdim=True).expand_as(x) if substrate == "mean" else torch.full_like(x, 0.2)
    gap = logits(net, x, **ROWS) - logits(net, start, **ROWS)
    assert found.extras["delta"].abs().min() > 1e-6
    assert_close(found.extras["delta"], found.map.sum((1, 2, 3)) - gap, rtol=1e-9, atol=1e-13)


def test_what_equals_the_baseline_gets_zero_and_no_nan():
    net, x = made(Residual), images(3, 3, 6, 8)
    x[1] = 0
    x[2, :, :3] = 0
    found = GuidedIG(steps=5, distance=0.3).attribute(bound(net, x, **ROWS), x)
    assert (found.map[2] == 0).all()
    assert (found.map[3, :, :3] == 0).all()
    assert (found.map[3, :, 3:] != 0).all()
    assert_close(found.extras["delta"][2].item(), 0.0, rtol=0, atol=1e-15)


# ---- rows, batches, precision ------------------------------------------------------------------------------------


def test_each_row_has_a_path_of_its_own():
    net, x = made(Residual), images(3, 3, 6, 8)
    method = GuidedIG(steps=6, distance=0.3)
    together = bound(net, x, **ROWS)
    found, points = method.attribute(together, x), path_of(method, together, x)
    assert (points[3, 0] - points[3, 1]).abs().max() > 0.1  # two classes of one image
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        alone = method.attribute(bound(net, x, [target], [image]), x)
        assert_close(found.map[row], alone.map[0], **EXACT)
        assert_close(found.extras["delta"][row], alone.extras["delta"][0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_an_image_without_rows_costs_no_pass_and_micro_batches_change_nothing(micro_batch):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    method, rows = (
        GuidedIG(steps=5, distance=0.3, substrate="gaussian"),
        {"target": [0, 1, 4], "image": [0, 0, 2]},
    )
    expected, seen = method.attribute(bound(net, x, **rows), x), []
    score = bound(net, x, **rows, micro_batch=micro_batch)
    handle = net.register_forward_pre_hook(lambda _net, given: seen.append(len(given[0])))
    found = method.attribute(score, x)
    handle.remove()
    assert sum(seen) == 3 * 5 + 2 + 2  # a path a row; both ends once an image
    assert max(seen) <= micro_batch
    assert_close(found.map, expected.map, **EXACT)


@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_single_precision_goes_nearly_the_same_way(kind):
    """A near tie may be decided otherwise, so the maps may differ by more than rounding, at a few numbers."""
    net, x = made(kind), images(3, 3, 16, 16)
    method = GuidedIG(steps=20, distance=0.1)
    expected = method.attribute(bound(net, x, **ROWS), x)
    found = method.attribute(bound(deepcopy(net).float(), x.float(), **ROWS), x.float())
    assert found.map.dtype == torch.float32
    gap = (found.map.double() - expected.map).flatten(1).norm(dim=1) / expected.map.flatten(1).norm(dim=1)
    assert gap.max() < 1e-3
    assert_close(found.extras["delta"].double(), expected.extras["delta"], rtol=1e-2, atol=1e-6)


def test_single_precision_arrives():
    x, weight = images(2, 3, 16, 16), images(2, 16, 16, seed=3)
    net = Weighted(weight).float()
    found = GuidedIG(value=0.3).attribute(bound(net, x.float(), [1, 0]), x.float())
    expected = (x - 0.3) * weight[[1, 0]][:, None]
    near(found.map.double(), expected, 1e-5)


# ---- options -----------------------------------------------------------------------------------------------------


def test_maps_to_be_trained_through_are_refused():
    net, x = made(Residual), images(1, 3, 6, 8)
    score = replace(bound(net, x, [1]), create_graph=True)
    with pytest.raises(
        ModelError, match="guided-ig gives no maps that can be trained through: its path is a choice"
    ):
        GuidedIG(steps=2).attribute(score, x)
    with pytest.raises(ModelError, match="its path is a choice"):
        xcli.explain(net, x, {"name": "guided-ig", "steps": 2}, create_graph=True)


def test_defaults_are_those_of_the_authors():
    method = build("guided-ig")
    assert (method.steps, method.fraction, method.distance, method.substrate, method.value) == (
        200,
        0.25,
        0.02,
        "constant",
        0.0,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"distance": -0.1},
        {"distance": 1.5},
        {"rule": "left"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "guided-ig", **wrong})


def test_an_image_that_is_not_finite_has_a_map_that_is_not_and_leaves_the_others_alone():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    expected = GuidedIG(steps=4).attribute(bound(net, x, [0, 1, 2]), x).map
    x[1, 0, 2, 3] = torch.nan
    found = GuidedIG(steps=4).attribute(bound(net, x, [0, 1, 2]), x).map
    assert found[1].isnan().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
