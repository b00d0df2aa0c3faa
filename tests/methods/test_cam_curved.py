"""ShapleyCAM against the grad-cam package, and against quadratic scores whose shares are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cams import CASES, TARGETS, case
from pytorch_grad_cam import ShapleyCAM as Peer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputReST, ClassifierOutputTarget
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from toys import PooledLinear, Residual, bound, images, made

from xcli.errors import ConfigError
from xcli.methods.base import resized
from xcli.methods.cam.base import fused, scaled
from xcli.methods.cam.curved import ShapleyCAM
from xcli.methods.cam.gradient import GradCAM, HiResCAM
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-13}
GOALS = {"rest": ClassifierOutputReST, "logit": ClassifierOutputTarget}


class RawPeer(Peer):
    """The package's class, its map kept before it rectifies, scales and resizes; on tokens its weights alone are
    its own, since it multiplies them with activations that it forgot to reshape."""

    def get_cam_image(self, x, layer, targets, acts, grads, eigen_smooth=False):
        reshape = self.activations_and_grads.reshape_transform
        if reshape is None:
            self.raw = super().get_cam_image(x, layer, targets, acts, grads, eigen_smooth)
        else:
            weights = self.get_cam_weights(x, layer, targets, acts, grads)[:, :, None, None]
            self.raw = (weights * reshape(acts).detach().numpy()).sum(1)
        return self.raw


def peer_maps(net, modules, x, targets, goal, reshape=None, kind=RawPeer):
    """The package's raw map of the last layer, and its finished one."""
    cam = kind(net, modules, reshape)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            finished = cam(x, [goal(target) for target in targets])
        return torch.from_numpy(cam.raw), torch.from_numpy(finished)
    finally:
        cam.activations_and_grads.gradients.clear()  # it detaches them in place, which views refuse
        cam.activations_and_grads.release()


@pytest.mark.parametrize("scale", GOALS)
@pytest.mark.parametrize("name", CASES)
def test_raw_maps_equal_grad_cam(name, scale):
    one = case(name)
    expected, _ = peer_maps(one.net, one.modules(), one.x, TARGETS, GOALS[scale], one.reshape)
    ours = ShapleyCAM(layer=one.layer, relu=False).attribute(one.score.scaled(scale), one.x)
    peak = float(expected.abs().max())
    assert peak > 0
    assert_close(ours, expected, rtol=1e-7, atol=1e-10 * peak)


def test_the_finish_of_grad_cam():
    one = case("resnet18")
    _, expected = peer_maps(one.net, one.modules(), one.x, TARGETS, ClassifierOutputReST)
    method = build({"name": "shapleycam", "preset": "grad-cam", "layer": one.layer})
    assert (method.normalise, method.fusion, method.fused_at) == ("min-max", "mean", "input")
    ours = scaled(method.attribute(one.score.scaled(method.scale), one.x), method.normalise)
    ours = scaled(resized(ours, tuple(one.x.shape[2:]), "bilinear"), method.normalise)
    assert_close(ours, expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["shapes-vit", "swin_t"])
def test_grad_cam_fails_on_every_transformer(name):
    one = case(name)
    with pytest.raises(ValueError, match="Invalid activation shape|could not be broadcast"):
        peer_maps(one.net, one.modules(), one.x, TARGETS, ClassifierOutputReST, one.reshape, Peer)


def test_grad_cam_fails_on_several_layers_where_ours_fuses_them():
    net, x = made(Residual), images(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        peer_maps(net, [net.stem, net.last], x, [1, 2], ClassifierOutputReST)
    score = bound(net, x, [1, 2]).scaled("rest")
    alone = [ShapleyCAM(layer=name).attribute(score, x) for name in ("stem", "last")]
    both = ShapleyCAM(layer=("stem", "last"), fusion="max").attribute(score, x)
    assert_close(both, fused(alone, "max"), **EXACT)


class InPlace(nn.Module):
    """A layer whose output an in-place ReLU rewrites, or not, and a product behind it."""

    def __init__(self, inplace=True) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace)
        self.mix = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.mix(self.relu(self.layer(x))).sigmoid().mean((2, 3)))


def test_grad_cam_is_misled_by_an_in_place_relu_behind_the_layer():
    net, x = made(InPlace), images(2, 3, 6, 5)
    plain = InPlace(inplace=False).double().eval()
    plain.load_state_dict(net.state_dict())
    right, _ = peer_maps(plain, [plain.layer], x, [1, 2], ClassifierOutputReST)
    wrong, _ = peer_maps(net, [net.layer], x, [1, 2], ClassifierOutputReST)
    assert (wrong - right).abs().max() > 0.01 * right.abs().max()
    for own in (net, plain):
        ours = ShapleyCAM(layer="layer", relu=False).attribute(bound(own, x, [1, 2]).scaled("rest"), x)
        assert_close(ours, right, **EXACT)


# ---- answers known beforehand ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Logit l is b_l . a + a' M_l a / 2 of a layer's output a, M symmetric."""

    def __init__(self, labels: int = 3, channels: int = 4, cells: int = 3 * 5) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, channels, 3, padding=1)
        size = channels * cells
        square = torch.randn(labels, size, size) / size
        self.b = nn.Parameter(torch.randn(labels, size))
        self.m = nn.Parameter(square + square.mT)

    def forward(self, x):
        a = self.layer(x).flatten(1)
        return a @ self.b.T + torch.einsum("ni,lij,nj->nl", a, self.m, a) / 2


def quadratic():
    """The network, its input, two rows of one image and one of the next, and U = b + M a / 2 of each row."""
    net, x = made(Quadratic), images(2, 3, 3, 5)
    score = bound(net, x, [2, 0, 1], [0, 0, 1])
    acts = net.layer(x).detach()[[0, 0, 1]]
    pulled = torch.einsum("nij,nj->ni", net.m.detach()[[2, 0, 1]], acts.flatten(1))
    return net, x, score, acts, (net.b.detach()[[2, 0, 1]] + pulled / 2).view_as(acts)


def test_every_form_on_a_quadratic_score():
    _, x, score, acts, shares = quadratic()
    expected = {
        "mean": (shares.mean((2, 3), keepdim=True) * acts).sum(1),
        "hires": (shares * acts).sum(1),
        "element": (shares * acts).clamp_min(0).sum(1),
    }
    for form, one in expected.items():
        assert_close(ShapleyCAM(layer="layer", relu=False, form=form).attribute(score, x), one, **EXACT)
        assert_close(ShapleyCAM(layer="layer", form=form).attribute(score, x), one.clamp_min(0), **EXACT)
    (channels,) = ShapleyCAM(form="hires").channels(score, x, score.layers.find("layer"))
    assert_close(channels, shares * acts, **EXACT)


def test_shares_sum_to_a_quadratic_score():
    _, x, score, _, _ = quadratic()
    maps = ShapleyCAM(layer="layer", relu=False, form="hires").attribute(score, x)
    assert_close(maps.sum((1, 2)), score.clean(x), **EXACT)


@pytest.mark.parametrize("layer", ["features", "relu"])
def test_the_logit_of_a_piecewise_linear_tail_gives_gradcam_and_hirescam(layer):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [4, 0, 3], [0, 1, 1])
    for form, other in (("mean", GradCAM), ("hires", HiResCAM)):
        found = ShapleyCAM(layer=layer, relu=False, form=form).attribute(score, x)
        assert_close(found, other(layer=layer, relu=False).attribute(score, x), rtol=0, atol=0)
        rest = ShapleyCAM(layer=layer, relu=False, form=form).attribute(score.scaled("rest"), x)
        assert (rest - found).abs().max() > 0.1 * found.abs().max()


def test_the_residual_softmax_on_a_pooled_linear_net():
    """With m the mean of A and S = diag p - p p', the weights are 2 W_c - W'p + W'S W m / 2, over hw."""
    assert ShapleyCAM.scale == "rest"
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    acts = net.relu(net.features(x)).detach()
    weight, p = net.head.weight.detach(), net(x).detach().softmax(1)
    spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    bend = torch.einsum("lk,nlm,mj,nj->nk", weight, spread, weight, acts.mean((2, 3)))
    gain = (2 * weight[[4, 0]] - p @ weight + bend / 2) / acts[0, 0].numel()
    score = bound(net, x, [4, 0]).scaled("rest")
    expected = torch.einsum("nk,nkhw->nhw", gain, acts)
    assert_close(ShapleyCAM(layer="relu", relu=False).attribute(score, x), expected, **EXACT)


def test_maps_can_be_differentiated_by_image_and_weights():
    net, x = made(Residual), images(2, 3, 6, 5).requires_grad_()
    score = replace(bound(net, x.detach(), [1, 2]).scaled("rest"), create_graph=True)
    weight, step, turn = net.head.weight, images(2, 3, 6, 5, seed=3), images(4, 6, seed=4)

    def loss(pixels):
        return ShapleyCAM(layer="last", relu=False).attribute(score, pixels).square().sum()

    by_image, by_weight = torch.autograd.grad(loss(x), (x, weight))
    ahead, behind = [loss(x.detach() + sign * 1e-5 * step).detach() for sign in (1, -1)]
    assert_close((by_image * step).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-12)
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-5 * turn
        slopes.append(loss(x).detach())
        with torch.no_grad():
            weight -= sign * 1e-5 * turn
    assert_close((by_weight * turn).sum(), (slopes[0] - slopes[1]) / 2e-5, rtol=1e-6, atol=1e-12)


def test_an_unknown_form_is_refused():
    with pytest.raises(ConfigError, match="form"):
        build({"name": "shapleycam", "form": "sum"})
