"""Extremal perturbation against its definition with autograd, torch.optim and a sort, and against known answers."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, Weighted, bound, images, made

import xcli
from xcli.errors import ConfigError, ModelError
from xcli.methods.perturbation import extremal, smoothmax
from xcli.methods.perturbation.extremal import ExtremalPerturbation, Pyramid, Target, softened
from xcli.methods.perturbation.smoothmax import SmoothMask
from xcli.registry import build

EXACT = {"rtol": 0, "atol": 1e-10}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
POOLINGS = ("softmax", "sum", "sigmoid")
GEOMETRIES = [
    ((11, 10), 4, 6.0),
    ((9, 14), 3, 3.5),
    ((15, 15), 5, 12.0),
    ((8, 7), 1, 1.5),
    ((14, 21), 7, 7.0),
]
"""Sizes, steps and sigmas, the mask of which covers the picture by the formula of the authors."""


def strong(kind=Residual, factor=40.0):
    """A network whose logits are large enough to weigh against the area."""
    net = made(kind)
    with torch.no_grad():
        net.head.weight.mul_(factor)
    return net


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*shape, seed=0):
    """Numbers of masks, some of them 0 and 1 themselves."""
    return (random(*shape, seed=seed) * 1.4 - 0.2).clamp(0, 1)


# ---- the definition ----------------------------------------------------------------------------------------------


def literal_mask(p, size, step, sigma, pooling):
    """The mask with its margin (H', W') of numbers p (h, w), pixel by pixel from its coordinates."""
    radius, padding = 1 + math.ceil(sigma / step), 1 + math.ceil(2 * sigma / step)
    outer, points, apart = [], [], []
    for side in size:
        cells = max(
            math.ceil(side / step) + 2 * padding - 2 * radius, math.ceil((round(sigma) + side - 1) / step) + 1
        )
        pixel = torch.arange(step * (cells - 1) + 1)
        point = pixel[:, None] // step + torch.arange(2 * radius + 1) - padding
        outer.append(len(pixel))
        points.append(point)
        apart.append(pixel[:, None].double() - sigma - step * point)
    distance = (apart[0][:, None, :, None] ** 2 + apart[1][None, :, None, :] ** 2).sqrt()
    kernel = torch.exp(-2 * (distance / sigma - 0.5).clamp(min=0) ** 2).to(p)
    room = F.pad(p, (padding + radius,) * 2 + (padding + radius,) * 2)
    rows, columns = (point + padding + radius for point in points)
    rows, columns = rows.clamp_max(len(room) - 1), columns.clamp_max(room.shape[1] - 1)
    values = (kernel * room[rows[:, None, :, None], columns[None, :, None, :]]).flatten(2)
    match pooling:
        case "softmax":
            mask = (values * torch.softmax(20 * values, 2)).sum(2)
        case "sum":
            mask = values.sum(2)
        case _:
            mask = torch.sigmoid(20 * values.sum(2) - 3)
    return torch.where(
        (mask < 0) | (mask > 1), mask.detach().clamp(0, 1), mask
    )  # passes gradients at 0 and 1


def literal_blur(x, sigma):
    """A picture (C, H, W) through two one-dimensional convolutions, zeros beyond the border."""
    reach = math.ceil(4 * sigma)
    place = torch.arange(-reach, reach + 1).double()
    kernel = torch.exp(-(place**2) / (2 * sigma**2)) if sigma else torch.ones(1).double()
    kernel = (kernel / kernel.sum()).to(x)
    x = F.conv2d(x[:, None], kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(x, kernel.view(1, 1, 1, -1), padding=(0, reach))[:, 0]


def literal_pyramid(x, method):
    """The levels (L, C, H, W) of a picture (C, H, W)."""
    shares = [level / (method.levels - 1) for level in range(method.levels)]
    if method.perturbation == "fade":
        return torch.stack([x * share for share in shares])
    return torch.stack([literal_blur(x, method.max_blur * (1 - share)) for share in shares])


def literal_seen(pyramid, mask):
    """The picture (C, H, W) through a mask (H, W)."""
    place = mask * (len(pyramid) - 1)
    level = place.detach().floor()
    ahead, level = place - level, level.long()
    index = level.expand(1, *pyramid.shape[1:])
    above = (index + 1).clamp(max=len(pyramid) - 1)
    return (1 - ahead) * pyramid.gather(0, index)[0] + ahead * pyramid.gather(0, above)[0]


def literal(net, x, target, area, method):
    """The search for one picture (C, H, W), one class and one area: mask, reward, and mean of the mask with margin."""
    size = tuple(x.shape[1:])
    grid = [math.ceil(side / method.step) for side in size]
    p = torch.ones(grid, dtype=x.dtype, requires_grad=True)
    margin = round(method.sigma)
    descent = torch.optim.SGD([p], lr=0.01, momentum=0.9, dampening=0.9)
    pyramid, weight = literal_pyramid(x, method), 300.0

    def reward_of(mask, mirrored):
        seen = literal_seen(pyramid, mask)
        logits = net((seen.flip(2) if mirrored else seen)[None])[0]
        if method.reward == "simple":
            return logits[target]
        return logits[target] - max(logit for label, logit in enumerate(logits) if label != target)

    for iteration in range(method.iterations):
        whole = literal_mask(p, size, method.step, method.sigma, method.pooling)
        mask = whole[margin : margin + size[0], margin : margin + size[1]]
        mirrored = method.jitter and iteration % 2 == 0
        kept = reward_of(mask, mirrored) if method.variant != "delete" else 0.0
        lost = reward_of(1 - mask, mirrored) if method.variant != "preserve" else 0.0
        flat = whole.flatten()
        wanted = torch.ones_like(flat)
        wanted[: int(len(flat) * (1 - area))] = 0
        # What is equal by symmetry differs by rounding, which is not to decide.
        order = (flat.detach() * 2**16).round().sort(stable=True).indices
        energy = kept - lost - weight * (flat[order] - wanted).square().mean()
        descent.zero_grad()
        (-energy).backward()
        descent.step()
        p.data.clamp_(0, 1)
        weight *= 1.0035
    return mask.detach(), float((kept - lost).detach()), float(whole.detach().mean())


CASES = list(itertools.product(("preserve", "delete", "dual"), ("simple", "contrastive"), ("blur", "fade")))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("variant", "reward", "perturbation"), CASES)
def test_maps_are_those_of_the_definition(variant, reward, perturbation, pooling):
    """``sum`` and ``sigmoid`` start at 1 almost everywhere and stay there, unless numbers reach less than a step."""
    net, x = strong(), images(1, 3, 24, 20)
    method = ExtremalPerturbation(
        areas=(0.2,),
        iterations=7,
        step=5,
        sigma=8.0 if pooling == "softmax" else 3.0,
        pooling=pooling,
        perturbation=perturbation,
        max_blur=4.0,
        levels=5,
        variant=variant,
        reward=reward,
    )
    found = method.attribute(bound(net, x, [2]), x)
    mask, value, area = literal(net, x[0], 2, 0.2, method)
    assert mask.max() - mask.min() > 0.05
    assert_close(found.map[0], mask, **EXACT)
    assert_close(found.extras["reward"].item(), value, rtol=0, atol=1e-9)
    assert_close(found.extras["area"].item(), area, **EXACT)


@pytest.mark.parametrize("kind", [PooledLinear, Tokens])
@pytest.mark.parametrize("jitter", [False, True])
def test_maps_are_those_of_the_definition_with_other_options_and_networks(kind, jitter):
    net, x = strong(kind), images(1, 3, 16, 16)
    method = ExtremalPerturbation(
        areas=(0.4,), iterations=12, step=3, sigma=4.5, levels=2, max_blur=3.0, jitter=jitter
    )
    found = method.attribute(bound(net, x, [1]), x)
    mask, *_ = literal(net, x[0], 1, 0.4, method)
    assert mask.max() - mask.min() > 0.1
    assert_close(found.map[0], mask, **EXACT)


def test_the_first_map_is_the_mask_of_ones_and_the_last_step_is_not_seen():
    net, x = strong(), images(1, 3, 12, 10)
    method = ExtremalPerturbation(iterations=1, step=4, sigma=6.0)
    margin, whole = 6, literal_mask(torch.ones(3, 3).double(), (12, 10), 4, 6.0, "softmax")
    found = method.attribute(bound(net, x, [2]), x)
    assert_close(found.map[0], whole[margin : margin + 12, margin : margin + 10], **EXACT)
    assert_close(found.extras["area"][0], whole.mean(), **EXACT)
    assert 0.5 < found.map.min() < found.map.max() < 1


# ---- smooth masks ------------------------------------------------------------------------------------------------


def smooth_mask(size, step, sigma, pooling="softmax"):
    return SmoothMask(size, step, sigma, pooling, torch.device("cpu"))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("size", "step", "sigma"), [*GEOMETRIES, ((11, 13), 6, 2.0), ((10, 10), 5, 6.4)])
def test_masks_and_their_gradients_are_those_of_the_definition(size, step, sigma, pooling):
    smooth = smooth_mask(size, step, sigma, pooling)
    p = numbers(3, *smooth.grid) * (1.0 if pooling == "softmax" else 0.15)
    p[2] = 0
    p.requires_grad_()
    expected = torch.stack([literal_mask(one, size, step, sigma, pooling) for one in p])
    pooled = smooth.masks(p.detach())
    assert_close(pooled.mask, expected, rtol=0, atol=1e-13)
    grad = images(*expected.shape, seed=5)
    (wanted,) = torch.autograd.grad(expected, p, grad)
    assert wanted.abs().max() > 0.1
    assert_close(smooth.pull_back(p.detach(), pooled, grad), wanted, **EXACT)


@pytest.mark.parametrize(("size", "step", "sigma"), GEOMETRIES)
def test_a_mask_has_the_grid_and_the_margin_of_the_authors(size, step, sigma):
    smooth = smooth_mask(size, step, sigma)
    assert smooth.grid == tuple(-(-side // step) for side in size)
    after = 2 * math.ceil(2 * sigma / step) - 2 * math.ceil(sigma / step)
    assert smooth.outer == tuple(step * (points + after - 1) + 1 for points in smooth.grid)


@pytest.mark.parametrize("sigma", [0.3, 2.0, 3.6, 7.3, 8.4, 11.0])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_mask_covers_the_picture_whatever_the_step_and_reach(step, sigma):
    smooth = smooth_mask((9, 13), step, sigma)
    p = numbers(2, *smooth.grid)
    whole = smooth.masks(p).mask
    assert whole.shape[1:] == smooth.outer
    cropped = smooth.cropped(whole)
    assert cropped.shape == (2, 9, 13)
    grad = images(2, 9, 13)
    assert_close((smooth.padded(grad) * whole).sum(), (grad * cropped).sum(), rtol=1e-12, atol=0)


def test_a_single_number_shows_its_kernel_around_its_place():
    """v = k(d / 6) where d is the distance to pixel (8, 4) of the picture, and 80 neighbours at most add to D."""
    smooth = smooth_mask((17, 13), 4, 6.0)
    p = torch.zeros(1, *smooth.grid).double()
    p[0, 2, 1] = 1
    found = smooth.cropped(smooth.masks(p).mask)[0]
    y, x = torch.meshgrid(torch.arange(17.0).double(), torch.arange(13.0).double(), indexing="ij")
    value = torch.exp(-2 * (((y - 8) ** 2 + (x - 4) ** 2).sqrt() / 6 - 0.5).clamp(min=0) ** 2)
    neighbours = (2 * (1 + math.ceil(6 / 4)) + 1) ** 2 - 1
    near = found > 1e-3
    expected = value * torch.exp(20 * value) / (torch.exp(20 * value) + neighbours)
    assert near.sum() > 40
    assert_close(found[near], expected[near], rtol=1e-12, atol=0)
    assert found[8, 4] > 0.999


def test_the_soft_maximum_lies_between_the_mean_and_the_maximum_of_what_is_near():
    smooth = smooth_mask((20, 20), 4, 8.0)
    low, high = (smooth.masks(numbers(1, *smooth.grid) * factor).mask for factor in (0.5, 1.0))
    assert (low <= high).all()
    assert high.max() <= 1
    flat = smooth.cropped(smooth.masks(torch.ones(1, *smooth.grid).double()).mask)
    assert flat.min() > 0.9


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("name", "value"), [("TABLE", 1), ("TABLE", 3 * 2 * 8 * 90 * 9), ("CACHED", 1)])
def test_the_size_of_the_pieces_does_not_matter(name, value, pooling, monkeypatch):
    smooth = smooth_mask((12, 10), 4, 6.0, pooling)
    p, grad = numbers(7, *smooth.grid), images(7, *smooth.outer)
    pooled = smooth.masks(p)
    gradient = smooth.pull_back(p, pooled, grad)
    monkeypatch.setattr(smoothmax, name, value)
    again = smooth.masks(p)
    assert len(again.raw) > 1 or name == "CACHED"
    assert_close(again.mask, pooled.mask, rtol=0, atol=1e-14)
    assert_close(smooth.pull_back(p, again, grad), gradient, rtol=0, atol=1e-12)


def test_single_precision_masks_are_nearly_those_of_double_precision():
    smooth = smooth_mask((24, 20), 4, 8.0)
    p, grad = numbers(5, *smooth.grid), images(5, *smooth.outer)
    pooled, single = smooth.masks(p), smooth.masks(p.float())
    assert single.mask.dtype == torch.float32
    assert_close(single.mask.double(), pooled.mask, rtol=0, atol=2e-6)
    gradient = smooth.pull_back(p, pooled, grad)
    found = smooth.pull_back(p.float(), single, grad.float()).double()
    assert_close(found, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_the_tables_of_a_geometry_are_made_once():
    smoothmax.tables.cache_clear()
    x, net = images(1, 3, 16, 16), made(Residual)
    for _ in range(2):
        ExtremalPerturbation(iterations=3, step=4, sigma=4).attribute(bound(net, x, [0]), x)
    assert smoothmax.tables.cache_info().misses == 1


# ---- the area ----------------------------------------------------------------------------------------------------


def sorted_gradient(mask, areas):
    """The gradient of the sum of mean((sort(m) - r)^2) by autograd, the areas in turn."""
    mask = mask.clone().requires_grad_()
    total = 0.0
    for number, one in enumerate(mask):
        flat = one.flatten().sort(stable=True).values
        wanted = torch.ones_like(flat)
        wanted[: int(len(flat) * (1 - areas[number % len(areas)]))] = 0
        total = total + (flat - wanted).square().mean()
    return torch.autograd.grad(total, mask)[0]


@pytest.mark.parametrize("areas", [(0.1,), (0.3, 0.05), (1.0, 0.5, 1e-9), (1.0,)], ids=str)
@pytest.mark.parametrize("values", ["different", "few", "equal", "zero"])
def test_the_area_term_has_the_gradient_of_a_stable_sort(values, areas):
    mask = random(6, 13, 11)
    mask = {
        "different": mask,
        "few": (mask * 4).round() / 4,
        "equal": torch.full_like(mask, 0.7),
        "zero": mask * 0,
    }[values]
    target = ExtremalPerturbation(areas=areas).target(13 * 11)
    assert_close(target.gradient(mask), sorted_gradient(mask, areas), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_rounding_does_not_decide_which_of_equal_pixels_are_to_be_one(dtype, noise):
    mask = (random(4, 500) * 3).round() / 3 * 0.9
    clean = Target(500, (450, 300)).ones(mask.to(dtype))
    rough = Target(500, (450, 300)).ones((mask + noise * (random(4, 500, seed=1) - 0.5)).to(dtype))
    assert torch.equal(clean, rough)
    assert clean.sum(1).tolist() == [50, 200, 50, 200]


def test_of_equal_pixels_the_last_are_to_be_one():
    mask = torch.tensor([[0.5, 0.2, 0.5, 0.5, 0.9, 0.5, 0.1]]).double()
    assert Target(7, (4,)).ones(mask)[0].tolist() == [False, False, False, True, True, True, False]


# ---- the perturbed picture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.4, 2.5, 20.0])
def test_a_blur_is_a_convolution_with_zeros_beyond_the_border(sigma):
    x = images(2, 3, 12, 19)
    expected = torch.stack([literal_blur(one, sigma) for one in x])
    assert_close(softened(x, sigma), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("levels", [2, 3, 8])
@pytest.mark.parametrize("perturbation", ["blur", "fade"])
def test_a_picture_through_a_mask_and_its_slope_are_those_of_the_definition(perturbation, levels):
    """At 0, at 1 and at the levels themselves too: the slope is that to the next level, and 0 at the last."""
    method = ExtremalPerturbation(perturbation=perturbation, levels=levels, max_blur=3.0)
    x, image = images(3, 3, 6, 8), torch.tensor([2, 0, 2])
    mask = numbers(3, 6, 8)
    mask[1, 2] = (torch.arange(8) % levels) / (levels - 1)
    found, slope = Pyramid.of(method, x, image).seen(mask)
    for own, one, copy, rise in zip(image, mask, found, slope):
        one = one.clone().requires_grad_()
        expected = literal_seen(literal_pyramid(x[own], method), one)
        assert_close(copy, expected.detach(), rtol=0, atol=1e-12)
        weight = images(3, 6, 8, seed=3)
        (wanted,) = torch.autograd.grad((expected * weight).sum(), one)
        assert_close((rise * weight).sum(0), wanted, rtol=0, atol=1e-11)
    assert_close(found[mask.eq(1)[:, None].expand_as(found)], x[image][mask.eq(1)[:, None].expand_as(found)])
    assert (slope[mask.eq(1)[:, None].expand_as(found)] == 0).all()


# ---- rows, areas, batches ----------------------------------------------------------------------------------------


def small(**options):
    return ExtremalPerturbation(
        **{"areas": (0.3,), "iterations": 5, "step": 4, "sigma": 6.0, "max_blur": 4.0, **options}
    )


@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
def test_several_pictures_classes_and_areas_together_are_each_as_alone(variant):
    net, x, areas = strong(), images(3, 3, 16, 20), (0.3, 0.6, 0.2)
    found = small(areas=areas, variant=variant).attribute(bound(net, x, **ROWS), x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        alone = [
            small(areas=(area,), variant=variant).attribute(
                bound(net, x[image][None], [target]), x[image][None]
            )
            for area in areas
        ]
        assert_close(found.map[row], sum(one.map[0] for one in alone), **EXACT)
        for name in ("reward", "area"):
            expected = torch.stack([one.extras[name][0] for one in alone]).mean()
            assert_close(found.extras[name][row], expected, rtol=1e-9, atol=1e-10)
    assert (found.map[0] - found.map[1]).abs().max() > 1e-3


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_several_areas_become_one_map(combine):
    net, x = strong(), images(2, 3, 16, 20)
    parts = [small(areas=(area,)).attribute(bound(net, x, [1, 2]), x).map for area in (0.2, 0.4)]
    found = small(areas=(0.2, 0.4), combine=combine).attribute(bound(net, x, [1, 2]), x).map
    assert_close(found, (parts[0] + parts[1]) / (1 if combine == "sum" else 2), **EXACT)


@pytest.mark.parametrize("variant", ["preserve", "dual"])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_micro_batches_change_nothing_and_pictures_without_rows_cost_nothing(micro_batch, variant):
    net, x = strong(), images(4, 3, 12, 10)
    rows = {"target": [0, 1, 3], "image": [0, 0, 2]}
    method = small(areas=(0.2, 0.4), variant=variant, iterations=4)
    expected, seen = method.attribute(bound(net, x, **rows), x), []
    score = bound(net, x, **rows, micro_batch=micro_batch)
    handle = net.register_forward_pre_hook(lambda _net, given: seen.append(len(given[0])))
    found = method.attribute(score, x)
    handle.remove()
    assert sum(seen) == found.extras["forwards"].sum() == 3 * 2 * 4 * (2 if variant == "dual" else 1)
    assert max(seen) <= micro_batch
    assert_close(found.map, expected.map, **EXACT)
    assert_close(found.extras["reward"], expected.extras["reward"], **EXACT)


def test_running_out_of_memory_on_the_way_changes_nothing():
    net, x = strong(), images(3, 3, 12, 10)
    expected, calls = small().attribute(bound(net, x, **ROWS), x).map, []

    def limited(_net, given):
        calls.append(len(given[0]))
        if len(calls) > 2 and len(given[0]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    score = bound(net, x, **ROWS)
    handle = net.register_forward_pre_hook(limited)
    found = small().attribute(score, x).map
    handle.remove()
    assert calls[:5] == [4, 4, 4, 2, 2]
    assert_close(found, expected, **EXACT)


def test_pictures_in_channels_last_give_the_same_and_the_network_sees_that_layout():
    net, x = strong(), images(3, 3, 16, 20)
    expected, layouts = small(areas=(0.2, 0.4)).attribute(bound(net, x, **ROWS), x).map, set()
    last = x.contiguous(memory_format=torch.channels_last)

    def look(_net, given):
        layouts.add(given[0].is_contiguous(memory_format=torch.channels_last))

    for pictures, told in ((x, False), (last, True)):
        handle = net.register_forward_pre_hook(look)
        found = small(areas=(0.2, 0.4), jitter=False).attribute(bound(net, pictures, **ROWS), pictures).map
        mirrored = small(areas=(0.2, 0.4)).attribute(bound(net, pictures, **ROWS), pictures).map
        handle.remove()
        assert layouts == {told}
        layouts.clear()
        assert_close(mirrored, expected, **EXACT)
        assert (found - expected).abs().max() > 1e-6


def test_a_picture_that_is_not_finite_has_a_map_that_is_not_and_leaves_the_others_alone():
    net, x = strong(), images(3, 3, 12, 10)
    expected = small().attribute(bound(net, x, [0, 1, 2]), x).map
    x[1, 0, 2, 3] = torch.nan
    found = small().attribute(bound(net, x, [0, 1, 2]), x).map
    assert found[1].isnan().any()
    assert_close(found[[0, 2]], expected[[0, 2]], **EXACT)


# ---- known answers -----------------------------------------------------------------------------------------------


def region_case(size=32):
    """A model that sees only a square of 10 pixels for each of two classes, on a picture of ones."""
    weight = torch.zeros(2, size, size)
    weight[0, 6:16, 14:24] = 0.4
    weight[1, 20:30, 2:12] = 0.4
    return Weighted(weight), torch.ones(1, 3, size, size), weight > 0


@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
def test_the_mask_lies_where_the_network_looks(variant):
    net, x, where = region_case()
    method = ExtremalPerturbation(
        iterations=100, step=4, sigma=4.0, perturbation="fade", variant=variant, jitter=False
    )
    found = method.attribute(bound(net, x, [0, 1], [0, 0]), x).map
    for mask, own, other in zip(found, where, where.flip(0)):
        assert mask[own].mean() > 0.95
        assert mask[other].mean() < 0.02
        assert mask[own].sum() > 0.38 * mask.sum()  # of a tenth of the picture, in steps of 4 pixels


def test_jitter_also_finds_the_mirror_image_of_what_the_network_looks_at():
    net, x, where = region_case()
    method = ExtremalPerturbation(areas=(0.2,), iterations=100, step=4, sigma=4.0, perturbation="fade")
    mask = method.attribute(bound(net, x, [0], [0]), x).map[0]
    mirror = where[0].flip(1)
    assert mask[where[0]].mean() > 0.9
    assert mask[mirror].mean() > 0.9
    assert mask[~where[0] & ~mirror].mean() < 0.3


@pytest.mark.parametrize("area", [0.05, 0.15, 0.4])
def test_the_area_of_a_mask_approaches_what_was_asked(area):
    net, x = made(PooledLinear).float(), images(1, 3, 32, 32).float()
    method = ExtremalPerturbation(areas=(area,), step=4, sigma=4.0, max_blur=4.0)
    few, many = (
        replace(method, iterations=count).attribute(bound(net, x, [1]), x).extras["area"].item()
        for count in (10, 100)
    )
    assert abs(many - area) < 0.03
    assert abs(many - area) < 0.2 * abs(few - area)


# ---- options and precision ---------------------------------------------------------------------------------------


def test_single_precision_finds_nearly_the_same():
    net, x = strong(), images(3, 3, 16, 20)
    expected = small(areas=(0.2, 0.4)).attribute(bound(net, x, **ROWS), x)
    found = small(areas=(0.2, 0.4)).attribute(bound(deepcopy(net).float(), x.float(), **ROWS), x.float())
    assert found.map.dtype == torch.float32
    assert_close(found.map.double(), expected.map, rtol=0, atol=1e-3)
    assert_close(found.extras["reward"].double(), expected.extras["reward"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pictures_have_masks_of_single_precision_inside(dtype):
    """e^20 is beyond float16."""
    net, x = strong(), images(1, 3, 16, 20)
    expected = small().attribute(bound(net, x, [1]), x).map
    found = small().attribute(bound(deepcopy(net).to(dtype), x.to(dtype), [1]), x.to(dtype)).map
    assert found.dtype == dtype
    assert_close(found.double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("scale", ["logit", "probability", "contrast"])
def test_a_contrastive_reward_is_that_whatever_the_unit_of_the_score(scale):
    net, x = strong(), images(1, 3, 12, 10)
    score = bound(net, x, [1])
    expected = small(reward="contrastive").attribute(score, x)
    found = small(reward="contrastive").attribute(score.scaled(scale), x)
    assert_close(found.map, expected.map, **EXACT)
    simple = small().attribute(score.scaled(scale), x)
    assert (scale == "contrast") == torch.allclose(simple.map, expected.map, rtol=0, atol=1e-9)


class Affine(nn.Module):
    """One logit: the sum of a half of the picture."""

    def forward(self, x):
        return x[..., :5].flatten(1).sum(1, keepdim=True)


def test_a_single_logit_stands_for_its_own_contrast():
    net, x = Affine(), images(1, 3, 12, 10)
    found = [
        small(reward=reward).attribute(bound(net, x, [0]), x).map for reward in ("simple", "contrastive")
    ]
    assert_close(found[0], found[1], **EXACT)


def test_the_method_does_not_keep_the_graph_of_the_pictures_pass():
    assert ExtremalPerturbation.needs == {"gradients"}
    net, x = strong(), images(1, 3, 12, 10)
    assert not ExtremalPerturbation().looks_at(bound(net, x, [0]).layers)
    assert not small().attribute(bound(net, x, [0]), x).map.requires_grad


def test_maps_to_be_trained_through_are_refused():
    net, x = made(Residual), images(1, 3, 6, 8)
    with pytest.raises(ModelError, match="extremal-perturbation gives no maps that can be trained through"):
        small().attribute(replace(bound(net, x, [1]), create_graph=True), x)
    with pytest.raises(ModelError, match="the end of a search"):
        xcli.explain(net, x, {"name": "extremal-perturbation", "iterations": 2}, create_graph=True)


def test_defaults_are_those_of_the_authors():
    method = build("extremal-perturbation")
    told = (method.areas, method.iterations, method.step, method.sigma, method.levels, method.max_blur)
    assert told == ((0.1,), 800, 7, 21.0, 8, 20.0)
    assert (method.variant, method.reward, method.perturbation) == ("preserve", "simple", "blur")
    assert (method.pooling, method.jitter) == ("softmax", True)
    assert (extremal.RATE, extremal.MOMENTUM, extremal.WEIGHT, extremal.GROWTH) == (0.01, 0.9, 300, 1.0035)
    assert method.target(1000).zeros == (900,)


def test_the_preset_of_the_pointing_game_sums_four_areas_and_smooths():
    method = build({"name": "extremal-perturbation", "preset": "pointing-game", "iterations": 2, "step": 4})
    assert method.areas == (0.025, 0.05, 0.1, 0.2)
    net, x = made(Residual), images(1, 3, 16, 20)
    raw = replace(method, post_process=()).explain(bound(net, x, [1]), x).map
    assert raw.max() > 3
    assert method.explain(bound(net, x, [1]), x).map.std() < raw.std()


@pytest.mark.parametrize(
    "wrong",
    [
        {"areas": []},
        {"areas": [0.0]},
        {"areas": [0.1, 1.1]},
        {"areas": 0.1},
        {"iterations": 0},
        {"step": 0},
        {"sigma": 0.0},
        {"levels": 1},
        {"max_blur": 0.0},
        {"pooling": "max"},
        {"perturbation": "noise"},
        {"variant": "keep"},
        {"reward": "best"},
        {"combine": "max"},
        {"jitter": 3},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "extremal-perturbation", **wrong})
