"""Expected gradients against captum with the same draws, closed forms, their expectation with its rate, and delta."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import GradientShap as Captum
from pixels import NETWORKS, TARGETS, case
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, Weighted, bound, images, made

import xcli
from xcli.errors import ConfigError
from xcli.methods.gradient.expected import ExpectedGradients
from xcli.methods.gradient.paths import quadrature
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
FOLDER = "a/folder"


def compared(score, pictures):
    """``score`` with pictures to compare with, and the same number explained."""
    return replace(score, pictures={FOLDER: pictures})


def expected_gradients(**options):
    return ExpectedGradients(baselines=FOLDER, **options)


def near(found, expected, share):
    """Equal up to a share of the largest number."""
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(found, expected, rtol=0, atol=share * peak)


def drawn(method, score, x, pictures):
    """What the method draws for each of B images: x with its noise, the picture, the place, (B * samples, ...)."""
    image = torch.arange(len(x)).repeat_interleave(method.samples)
    sample = torch.arange(method.samples).repeat(len(x))
    return method.drawn(x, pictures, score.seeds(image, method.name), image, sample)


def which(start, pictures):
    """The index of each picture drawn (M, C, H, W)."""
    same = (start[:, None] == pictures).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def captum_map(monkeypatch, net, method, score, x, pictures, target):
    """GradientShap's map with the pictures, places and noise that the method draws; ``target`` one an image."""
    end, start, place = drawn(method, score, x, pictures)
    noise = end - x.repeat_interleave(method.samples, 0)

    def choice(count, size):
        assert (count, size) == (len(pictures), len(start))
        return which(start, pictures).numpy()

    with monkeypatch.context() as patch:
        patch.setattr(np.random, "choice", choice)
        patch.setattr(np.random, "uniform", lambda low, high, size: place.numpy())
        patch.setattr(torch, "normal", lambda mean, deviation: noise)
        found = Captum(net).attribute(
            x, baselines=pictures, target=target, n_samples=method.samples, stdevs=method.noise
        )
    return found.detach()


# ---- captum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_raw_maps_equal_captum_with_the_same_draws_on_every_network(name, monkeypatch):
    one = case(name)
    x, pictures = one.x[:1], one.x[1:]
    score, method = (
        compared(bound(one.net, x, TARGETS[:1]), pictures),
        expected_gradients(samples=2, noise=0.4),
    )
    expected = captum_map(monkeypatch, one.net, method, score, x, pictures, TARGETS[:1])
    near(method.attribute(score, x).map, expected, 1e-9)


@pytest.mark.parametrize("noise", [0.0, 1.5])
@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_several_images_equal_captum_with_the_same_draws(kind, noise, monkeypatch):
    net, x, pictures, target = made(kind), images(3, 3, 16, 16), images(5, 3, 16, 16, seed=9), [1, 0, 2]
    score, method = compared(bound(net, x, target), pictures), expected_gradients(samples=7, noise=noise)
    expected = captum_map(monkeypatch, net, method, score, x, pictures, target)
    near(method.attribute(score, x).map, expected, 1e-10)


def test_the_presets_are_what_the_packages_do_when_left_alone(monkeypatch):
    net, x, pictures = made(Residual), images(2, 3, 8, 6), images(3, 3, 8, 6, seed=9)
    score = compared(bound(net, x, [1, 2]), pictures)
    captum, shap = (
        build({"name": "expected-gradients", "preset": name, "baselines": FOLDER})
        for name in ("captum", "shap")
    )
    _, start, place = drawn(captum, score, x, pictures)
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "choice", lambda count, size: which(start, pictures).numpy())
        patch.setattr(np.random, "uniform", lambda low, high, size: place.numpy())
        expected = Captum(net).attribute(x, baselines=pictures, target=[1, 2]).detach()
    near(captum.explain(score, x).map, expected, 1e-10)
    assert (shap.samples, shap.noise) == (200, 0)


# ---- known answers -----------------------------------------------------------------------------------------------


def test_one_picture_and_a_linear_model_are_exact_with_a_single_sample():
    x, weight, picture = images(2, 3, 4, 5), images(3, 4, 5, seed=3), images(1, 3, 4, 5, seed=9)
    score = compared(bound(Weighted(weight), x, [2, 0, 1], [0, 0, 1]), picture)
    found = expected_gradients(samples=1).attribute(score, x)
    assert_close(found.map, (x[[0, 0, 1]] - picture) * weight[[2, 0, 1]][:, None], **EXACT)
    assert_close(found.extras["delta"], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_linear_model_shares_the_difference_to_the_mean_of_the_pictures_drawn():
    x, weight, pictures = images(2, 3, 4, 5), images(2, 4, 5, seed=3), images(4, 3, 4, 5, seed=9)
    score, method = compared(bound(Weighted(weight), x, [1, 0]), pictures), expected_gradients(samples=9)
    mean = drawn(method, score, x, pictures)[1].unflatten(0, (2, 9)).mean(1)
    assert_close(method.attribute(score, x).map, (x - mean) * weight[[1, 0]][:, None], **EXACT)


def test_the_picture_itself_as_the_folder_leaves_nothing_to_explain():
    net, x = made(Residual), images(1, 3, 8, 6)
    found = expected_gradients(samples=4).attribute(compared(bound(net, x, [1]), x), x)
    assert (found.map == 0).all()
    assert_close(found.extras["delta"], torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-13)


def test_delta_is_the_gap_to_the_mean_score_over_the_pictures():
    net, x, pictures = made(Residual), images(3, 3, 8, 6), images(5, 3, 8, 6, seed=9)
    for scale, number in (("logit", lambda out: out), ("probability", lambda out: out.softmax(1))):
        score = compared(bound(net, x, **ROWS), pictures).scaled(scale)
        found = expected_gradients(samples=3, noise=0.2).attribute(score, x)
        with torch.no_grad():
            own = number(net(x))[ROWS["image"], ROWS["target"]]
            others = number(net(pictures)).mean(0)[ROWS["target"]]
        gap = found.map.sum((1, 2, 3)) - (own - others)
        assert gap.abs().min() > 1e-6
        assert_close(found.extras["delta"], gap, rtol=1e-9, atol=1e-13)


def mean_of_paths(net, x, pictures, target):
    """Integrated gradients from each picture to one image (C, H, W), by Gauss and Legendre, and their mean."""
    total = torch.zeros_like(x)
    for start in pictures:
        for place, weight in zip(*quadrature("gauss-legendre", 24)):
            point = (start + place * (x - start))[None].requires_grad_()
            total += (x - start) * torch.autograd.grad(net(point)[0, target], point)[0][0] * weight
    return total / len(pictures)


def test_many_samples_approach_the_mean_of_integrated_gradients_with_their_square_root():
    net, x, pictures = made(Tokens), images(1, 3, 16, 16), images(3, 3, 16, 16, seed=9)
    expected, errors = mean_of_paths(net, x[0], pictures, 1), {}
    for samples in (8, 128):
        found = [
            expected_gradients(samples=samples).attribute(
                replace(compared(bound(net, x, [1]), pictures), seed=seed), x
            )
            for seed in range(16)
        ]
        maps = torch.stack([one.map[0] for one in found])
        errors[samples] = float((maps - expected).square().mean().sqrt())
        gap = torch.stack([one.extras["delta"] for one in found]).square().mean().sqrt()
        errors["delta", samples] = float(gap)
    assert 2.8 < errors[8] / errors[128] < 5.7
    assert 2.4 < errors["delta", 8] / errors["delta", 128] < 6.7
    assert (maps.mean(0) - expected).square().mean().sqrt() < 0.5 * errors[
        128
    ]  # of 16 seeds: a quarter, or so


def test_the_noise_on_the_image_leaves_a_linear_model_alone_but_for_its_own_mean():
    x, weight, picture = images(1, 3, 4, 5), images(1, 4, 5, seed=3), images(1, 3, 4, 5, seed=9)
    score, method = (
        compared(bound(Weighted(weight), x, [0]), picture),
        expected_gradients(samples=400, noise=0.5),
    )
    end, _, place = drawn(method, score, x, picture)
    noise = end - x
    assert_close(method.attribute(score, x).map, (x + noise.mean(0) - picture) * weight[:, None], **EXACT)
    assert_close(noise.mean().item(), 0.0, rtol=0, atol=0.02)
    assert_close(noise.std().item(), 0.5, rtol=0.02, atol=0)
    noise = noise.flatten(1).T[:9]
    for numbers in ([place, *noise], [(place - 0.5).abs(), *noise.square()]):  # and no word is used twice
        alike = torch.corrcoef(torch.stack(numbers))
        assert (alike - torch.eye(10)).abs().max() < 0.2


# ---- draws -------------------------------------------------------------------------------------------------------


def test_pictures_and_places_are_drawn_evenly_and_apart():
    x, pictures, method = images(2, 1, 1, 2), images(5, 1, 1, 2, seed=9), expected_gradients(samples=4000)
    score = bound(made(Residual), images(2, 3, 8, 6), [0, 0])
    _, start, place = drawn(method, score, x, pictures)
    index = which(start, pictures)
    share = torch.bincount(index, minlength=5) / len(index)
    assert_close(share, torch.full((5,), 0.2), rtol=0, atol=0.02)
    assert 0 < place.min() < 0.002
    assert 0.998 < place.max() < 1
    assert_close(place.mean().item(), 0.5, rtol=0, atol=0.015)
    assert_close(place.var().item(), 1 / 12, rtol=0.04, atol=0)
    by_picture = torch.stack([place[index == one].mean() for one in range(5)])
    assert_close(by_picture, torch.full_like(by_picture, 0.5), rtol=0, atol=0.03)
    assert abs(float(torch.corrcoef(torch.stack([place[:4000], place[4000:]]))[0, 1])) < 0.06  # of two images


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_draws_belong_to_the_seed_the_image_and_the_sample_and_to_nothing_else(noise):
    net, x, pictures = made(Residual), images(3, 3, 8, 6), images(40, 3, 8, 6, seed=9)
    score, method = bound(net, x, **ROWS), expected_gradients(samples=4, noise=noise)
    first = drawn(method, score, x, pictures)

    def same(other, rows=slice(None)):
        return all(torch.equal(a, b[rows]) for a, b in zip(other, first))

    longer = drawn(replace(method, samples=9), score, x, pictures)
    assert same([part.unflatten(0, (3, 9))[:, :4].flatten(0, 1) for part in longer])
    alone = replace(bound(net, x[2:], [0]), keys=["image-2"])
    assert same(drawn(method, alone, x[2:], pictures), slice(8, None))
    assert same(drawn(method, score.retarget(torch.tensor([0, 0, 0, 0])), x, pictures))
    for other in (replace(score, seed=1), replace(score, keys=["a", "b", "c"])):
        _, start, place = drawn(method, other, x, pictures)
        assert (place != first[2]).all()
        assert (which(start, pictures) != which(first[1], pictures)).double().mean() > 0.8
    assert len(set(first[2].tolist())) == 12


def test_the_map_is_the_mean_over_draws_of_the_gradient_between():
    net, x, pictures = made(Residual), images(3, 3, 8, 6), images(4, 3, 8, 6, seed=9)
    score, method = compared(bound(net, x, **ROWS), pictures), expected_gradients(samples=5, noise=0.1)
    found = method.attribute(score, x).map
    end, start, place = (part.unflatten(0, (3, 5)) for part in drawn(method, score, x, pictures))
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"])):
        total = torch.zeros_like(x[0])
        for one, other, t in zip(end[image], start[image], place[image]):
            point = ((1 - t) * other + t * one)[None].requires_grad_()
            total += (one - other) * torch.autograd.grad(net(point)[0, target], point)[0][0]
        assert_close(found[row], total / 5, **EXACT)


# ---- passes and batches ------------------------------------------------------------------------------------------


def sizes_of_passes(net, run):
    seen = []
    handle = net.register_forward_pre_hook(lambda _net, given: seen.append(len(given[0])))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_the_rows_of_an_image_share_its_passes_and_the_pictures_run_once(micro_batch):
    net, x, pictures = made(PooledLinear), images(3, 3, 8, 6), images(4, 3, 8, 6, seed=9)
    score = compared(bound(net, x, [0, 1, 2, 4], [0, 0, 0, 2], micro_batch=micro_batch), pictures)
    first = sizes_of_passes(net, lambda: expected_gradients(samples=5).attribute(score, x))
    assert sum(first) == 2 * (5 + 1) + 4  # the image in the middle has no rows
    assert max(first) <= micro_batch
    again = sizes_of_passes(net, lambda: expected_gradients(samples=2).attribute(score, x))
    assert sum(again) == 2 * 2


def test_micro_batches_and_company_do_not_change_the_map():
    net, x, pictures = made(Residual), images(3, 3, 8, 6), images(4, 3, 8, 6, seed=9)
    method = expected_gradients(samples=5, noise=0.3)
    whole = method.attribute(compared(bound(net, x, **ROWS), pictures), x)
    for micro_batch in (1, 3, 7):
        found = method.attribute(compared(bound(net, x, **ROWS, micro_batch=micro_batch), pictures), x)
        assert_close(found.map, whole.map, **EXACT)
        assert_close(found.extras["delta"], whole.extras["delta"], rtol=0, atol=1e-13)
    alone = replace(compared(bound(net, x[2:], [2]), pictures), keys=["image-2"])
    assert_close(method.attribute(alone, x[2:]).map, whole.map[3:], **EXACT)


def test_single_precision_draws_the_same_pictures_and_places():
    net, x, pictures = made(Tokens), images(3, 3, 16, 16), images(4, 3, 16, 16, seed=9)
    method = expected_gradients(samples=5, noise=0.3)
    expected = method.attribute(compared(bound(net, x, **ROWS), pictures), x).map
    single = compared(bound(deepcopy(net).float(), x.float(), **ROWS), pictures)
    found = method.attribute(single, x.float()).map
    assert found.dtype == torch.float32
    near(found.double(), expected, 1e-5)


def test_maps_can_be_differentiated_by_pixels_and_weights():
    net, x, pictures = made(Tokens), images(2, 3, 16, 16).requires_grad_(), images(4, 3, 16, 16, seed=9)
    method = expected_gradients(samples=3, noise=0.2)
    score = replace(compared(bound(net, x.detach(), [0, 1, 2], [0, 0, 1]), pictures), create_graph=True)
    step, weight = images(2, 3, 16, 16, seed=5), net.patches.weight
    along = images(*weight.shape, seed=6)

    def loss(score, pixels):
        return method.attribute(score, pixels).map.square().mean()

    by_pixels, by_weight = torch.autograd.grad(loss(score, x), (x, weight))
    ends, others = [], []
    for sign in (1, -1):
        ends.append(loss(score, x.detach() + sign * 1e-6 * step).detach())
        other = deepcopy(net)
        other.patches.weight.data += sign * 1e-6 * along
        others.append(loss(score.using(other), x.detach()).detach())
    assert by_pixels.abs().max() > 0
    assert_close((by_pixels * step).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-12)
    assert_close((by_weight * along).sum(), (others[0] - others[1]) / 2e-6, rtol=1e-6, atol=1e-12)


# ---- the pictures ------------------------------------------------------------------------------------------------


def test_explain_takes_the_pictures_by_name():
    net, x, pictures = made(Residual), images(2, 3, 8, 6), images(3, 3, 8, 6, seed=9)
    spec = {"name": "expected-gradients", "baselines": "mine", "samples": 6, "reduce": "none"}
    found = xcli.explain(net, x, spec, target=[1, 2], pictures={"mine": pictures, "other": x})
    score = replace(bound(net, x, [1, 2]), pictures={"mine": pictures})
    keyed = replace(score, keys=xcli.api.ContentKeys(x))
    expected = build(spec).attribute(keyed, x)
    assert_close(found.map, expected.map, **EXACT)
    assert_close(found.extras["delta"], expected.extras["delta"], rtol=0, atol=1e-13)
    summed = xcli.explain(net, x, {**spec, "reduce": "sum"}, target=[1, 2], pictures={"mine": pictures})
    assert_close(summed.map, expected.map.sum(1), **EXACT)


def test_pictures_that_were_not_handed_over_are_asked_for():
    net, x = made(Residual), images(1, 3, 8, 6)
    for pictures in (None, {"yours": x}):
        with pytest.raises(
            ConfigError, match=r"'mine' stands for pictures.* pass pictures=\{'mine': \.\.\.\}"
        ):
            xcli.explain(net, x, {"name": "expected-gradients", "baselines": "mine"}, pictures=pictures)
    with pytest.raises(ConfigError, match="`baselines` has to name the pictures to compare with"):
        xcli.explain(net, x, "expected-gradients", pictures={"yours": x})


def test_the_folder_is_what_the_method_draws_from():
    assert expected_gradients().draws_from() == (FOLDER,)
    assert ExpectedGradients().draws_from() == ("",)


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"noise": -0.1}, {"noise": float("nan")}, {"baselines": 3}], ids=str
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "expected-gradients", **wrong})


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (torch.zeros(0, 3, 8, 6), r"pictures\['others'\]: a float tensor .*; got \(0, 3, 8, 6\)"),
        (torch.zeros(3, 8, 6), r"got \(3, 8, 6\)"),
        ([[1.0]], "got list"),
        (torch.zeros(2, 3, 1, 1), r"are \(3, 1, 1\), the images \(3, 8, 6\); they have to be of one size"),
        (torch.zeros(2, 1, 8, 6), r"are \(1, 8, 6\), the images"),
    ],
)
def test_what_is_no_set_of_pictures_of_the_images_size_is_refused(pictures, told):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    with pytest.raises(ConfigError, match=told):
        xcli.explain(
            net,
            x,
            {"name": "expected-gradients", "baselines": "others", "samples": 2},
            pictures={"others": pictures},
        )
