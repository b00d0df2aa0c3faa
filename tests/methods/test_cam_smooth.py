"""Smooth Grad-CAM++ against torch-cam with the same noise, against grad-cam without any, and against plain loops."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cams import CASES, case, grad_cam_map, torch_cam_map
from pytorch_grad_cam import GradCAMPlusPlus as PeerPlusPlus
from torch import nn
from torch.testing import assert_close
from torchcam.methods import SmoothGradCAMpp as Peer
from toys import PooledLinear, Residual, Tokens, bound, images, made

from xcli.errors import ConfigError
from xcli.methods.cam.gradient import GradCAMPlusPlus
from xcli.methods.cam.smooth import SmoothGradCAMpp
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}


def noisy(one, preset, **options):
    """The method of a case by a preset, and torch-cam's map with the noise that it draws."""
    options = {"samples": 2, **options}
    method = build({"name": "smooth-gradcam++", "preset": preset, "layer": one.layer, **options})

    def peer(*args, **rest):
        cam, calls = Peer(*args, num_samples=method.samples, std=method.noise, **rest), iter(range(99))
        cam._distrib = SimpleNamespace(sample=lambda _size: method.drawn(one.score, one.x, next(calls)))
        return cam

    return method, torch_cam_map(peer, one)


@pytest.mark.parametrize("name", CASES)
def test_raw_maps_equal_torch_cam_with_the_same_noise(name):
    one = case(name)
    method, expected = noisy(one, "torch-cam", relu=False)
    assert (method.noise, method.eps, method.fusion) == (0.3, 1e-8, "max")
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(method.attribute(one.score, one.x), expected, rtol=1e-7, atol=1e-9 * peak)


def test_torch_cam_draws_the_last_noisy_copy_and_spreads_the_products():
    """With A of the image itself, which it says it takes, or with the paper's denominator, the map is another."""
    one = case("shapes-vit")
    method, expected = noisy(one, "torch-cam", samples=3)
    for other in (replace(method, last=False), replace(method, denominator="paper")):
        ours = other.attribute(one.score, one.x)
        assert (ours - expected).abs().max() > 1e-3 * expected.max()


@pytest.mark.parametrize("name", ["shapes-cnn", "shapes-vit", "resnet18"])
def test_without_noise_it_is_gradcam_plus_plus(name):
    one = case(name)
    options = {"layer": one.layer, "relu": False}
    expected = grad_cam_map(PeerPlusPlus, one)
    still = SmoothGradCAMpp(noise=0, samples=1, eps=1e-6, **options)
    assert_close(
        still.attribute(one.score, one.x), expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max())
    )
    three = SmoothGradCAMpp(noise=0, samples=3, **options).attribute(one.score, one.x)
    assert_close(three, GradCAMPlusPlus(**options).attribute(one.score, one.x), rtol=1e-9, atol=1e-12)


def literal(net, layer, x, noise, target, first, products):
    """The definition in loops, for one image (C, H, W) and its noise (M, C, H, W)."""

    def seen(pixels):
        kept = []
        handle = net.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output: kept.append(output) or output.clone()
        )
        value = net(pixels[None])[0, target]
        handle.remove()
        return kept[0][0].detach(), torch.autograd.grad(value, kept[0])[0][0]

    acts = seen(x)[0]
    grads = [seen(x + one)[1] for one in noise]
    total = torch.zeros(acts.shape[1:], dtype=acts.dtype)
    for k in range(acts.shape[0]):
        weight = 0.0
        for i in range(acts.shape[1]):
            for j in range(acts.shape[2]):
                d1, d2, d3 = (sum(float(g[k, i, j]) ** p for g in grads) / len(grads) for p in (1, 2, 3))
                beside = sum(
                    float(acts[k, a, b])
                    * (sum(float(g[k, a, b]) ** 3 for g in grads) / len(grads) if products else d3)
                    for a in range(acts.shape[1])
                    for b in range(acts.shape[2])
                )
                below = 2 * d2 + beside
                weight += (d1 if first else d2) / below * max(d1, 0.0) if below else 0.0
        total += weight * acts[k]
    return total


@pytest.mark.parametrize(
    ("options", "first", "products"),
    [({}, False, False), ({"preset": "printed"}, True, False), ({"denominator": "products"}, False, True)],
)
def test_the_definition_in_loops(options, first, products):
    net, x = made(Residual), images(3, 3, 4, 5)
    score = bound(net, x, **ROWS)
    method = build({"name": "smooth-gradcam++", "layer": "last", "samples": 3, "relu": False, **options})
    found = method.attribute(score, x)
    for row, (target, image) in enumerate(zip(ROWS["target"], ROWS["image"], strict=True)):
        noise = [
            torch.randn(3, 4, 5, generator=score.generator(row, f"smooth-gradcam++ {sample}")) * 0.3
            for sample in range(3)
        ]
        expected = literal(net, "last", x[image], torch.stack(noise).double(), target, first, products)
        assert_close(found[row], expected, rtol=1e-9, atol=1e-12)


class LinearTail(nn.Module):
    """A layer that is followed by a linear map alone, so that no noise changes a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4 * 6 * 5, 3)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1))


@pytest.mark.parametrize(("preset", "first"), [("paper", False), ("printed", True)])
def test_a_linear_tail_has_a_closed_form_whatever_the_noise(preset, first):
    net, x = made(LinearTail), images(2, 3, 6, 5)
    acts, g = net.layer(x).detach(), net.head.weight.detach()[[2, 0]].view(2, 4, 6, 5)
    alpha = 1 / (2 + g * acts.sum((2, 3), keepdim=True)) * (1 / g if first else 1)
    expected = ((alpha * g.relu()).sum((2, 3), keepdim=True) * acts).sum(1)
    spec = {"name": "smooth-gradcam++", "preset": preset, "layer": "layer", "relu": False, "noise": 5.0}
    for samples in (1, 4):
        found = build({**spec, "samples": samples}).attribute(bound(net, x, [2, 0]), x)
        assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Square(nn.Module):
    """Half the sum of squares of the pixels; the layer is the image, and so is the gradient there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(x).square().sum((1, 2, 3))[:, None] / 2


def test_many_copies_meet_the_moments_of_a_normal_distribution():
    """G = x + e, so D1 = x, D2 = x^2 + s^2 and D3 = x^3 + 3 x s^2 in the limit."""
    net, x = Square(), images(1, 2, 3, 4) + 1
    score, s = bound(net, x, [0]), 0.5
    gain = (
        x.relu() * (x**2 + s**2) / (2 * (x**2 + s**2) + (x**3 + 3 * x * s**2) * x.sum((2, 3), keepdim=True))
    )
    expected = (gain.sum((2, 3), keepdim=True) * x).sum(1)
    found = SmoothGradCAMpp(layer="layer", samples=600, noise=s, relu=False).attribute(score, x)
    assert_close(found, expected, rtol=0.02, atol=0)
    still = SmoothGradCAMpp(layer="layer", noise=0, relu=False).attribute(score, x)
    assert (still - expected).abs().max() > 0.04 * expected.abs().max()


# ---- noise -----------------------------------------------------------------------------------------------------


def test_noise_is_drawn_for_an_image_a_copy_and_a_seed_and_for_nothing_else():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    method, score = SmoothGradCAMpp(), bound(net, x, **ROWS)
    noise = method.drawn(score, x, 0)
    assert_close(SmoothGradCAMpp(samples=9, layer="relu").drawn(score, x, 0), noise, **EXACT)
    assert_close(method.drawn(score, x.float(), 0), noise.float(), rtol=0, atol=0)
    alone = bound(net, x[2:], [2])
    assert_close(method.drawn(replace(alone, keys=["image-2"]), x[2:], 0)[0], noise[2], **EXACT)
    draws = [method.drawn(score, x, 1), method.drawn(replace(score, seed=1), x, 0), noise.roll(1, 0)]
    assert all((other - noise).abs().amax((1, 2, 3)).min() > 0.1 for other in draws)
    many = torch.stack([method.drawn(score, x, sample) for sample in range(200)])
    assert abs(many.mean()) < 0.005
    assert abs(many.std() - 0.3) < 0.005


def test_relative_noise_is_a_share_of_the_range_of_each_image():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    x[1] *= 7
    score = bound(net, x, **ROWS)
    plain = SmoothGradCAMpp(noise=1.0).drawn(score, x, 0)
    share = SmoothGradCAMpp(noise=0.15, relative=True).drawn(score, x, 0)
    for image in range(3):
        assert_close(share[image], plain[image] * 0.15 * (x[image].max() - x[image].min()), rtol=1e-6, atol=0)


def test_images_without_a_row_cost_no_noise_and_change_nothing():
    net, x = made(PooledLinear), images(4, 3, 8, 6)
    score = bound(net, x, [1, 2], [1, 3], micro_batch=2)
    assert (SmoothGradCAMpp().drawn(score, x, 0)[[0, 2]] == 0).all()
    whole = bound(net, x, [0, 1, 0, 2])
    found = SmoothGradCAMpp(layer="relu").attribute(score, x)
    assert_close(found, SmoothGradCAMpp(layer="relu").attribute(whole, x)[[1, 3]], **EXACT)


@pytest.mark.parametrize("samples", [1, 3])
def test_a_copy_serves_every_row_of_its_image(samples):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score, seen = bound(net, x, [0, 1, 2, 3, 4], [0, 0, 0, 1, 2], micro_batch=2), []
    handle = net.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    SmoothGradCAMpp(layer=("features", "relu"), samples=samples).attribute(score, x)
    handle.remove()
    assert sum(seen) == 3 * (samples + 1)
    assert max(seen) == 2


def test_a_row_that_is_not_finite_leaves_the_others_alone():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    expected = SmoothGradCAMpp(layer="relu").attribute(bound(net, x, [1, 2]), x)
    x[1, 0, 0, 0] = torch.nan
    found = SmoothGradCAMpp(layer="relu").attribute(bound(net, x, [1, 2]), x)
    assert_close(found[0], expected[0], **EXACT)
    assert found[1].isnan().any()


@pytest.mark.parametrize(("kind", "layer"), [(Residual, "last"), (Tokens, "norm1")])
@pytest.mark.parametrize("preset", ["paper", "printed", "torch-cam"])
def test_maps_can_be_differentiated(kind, layer, preset):
    net, x = made(kind), images(2, 3, 16, 16).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 1, 2], [0, 0, 1]), create_graph=True)
    method = build(
        {
            "name": "smooth-gradcam++",
            "preset": preset,
            "layer": layer,
            "samples": 2,
            "relu": False,
            "eps": 1e-3,
        }
    )

    def loss(pixels):
        return method.attribute(score, pixels).square().mean()

    (slope,) = torch.autograd.grad(loss(x), x)
    step = images(2, 3, 16, 16, seed=5)
    ahead, behind = [loss(x.detach() + sign * 1e-6 * step).detach() for sign in (1, -1)]
    assert slope.abs().max() > 0
    assert_close((slope * step).sum(), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"noise": -0.1}, {"eps": -1.0}, {"numerator": "third"}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build({"name": "smooth-gradcam++", **wrong})
