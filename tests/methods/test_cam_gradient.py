"""Gradient-weighted CAMs: against three packages, slow formulas, theorems, and derivatives of the maps themselves."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import product

import cams
import contract
import numpy as np
import pytest
import pytorch_grad_cam as grad_cam
import skimage
import torch
import torchcam.methods as torch_cam
import torchvision
from captum.attr import LayerGradCam, LayerGradientXActivation
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

from xcli.errors import ConfigError, ModelError
from xcli.forward import Forward
from xcli.hooks import frozen
from xcli.methods.cam.gradient import (
    ElementwiseGradCAM,
    GradCAM,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    SegXResCAM,
    XGradCAM,
    ratio,
)
from xcli.registry import build

GRAD_CAM_PEERS = {
    "gradcam": grad_cam.GradCAM,
    "gradcam++": grad_cam.GradCAMPlusPlus,
    "xgradcam": grad_cam.XGradCAM,
    "hirescam": grad_cam.HiResCAM,
    "gradcam-elementwise": grad_cam.GradCAMElementWise,
    "layercam": grad_cam.LayerCAM,
}
TORCH_CAM_PEERS = {
    "gradcam": torch_cam.GradCAM,
    "gradcam++": torch_cam.GradCAMpp,
    "xgradcam": torch_cam.XGradCAM,
    "layercam": torch_cam.LayerCAM,
}


@cache
def case_and_score(name):
    """A case and its score with the pass over the layer recorded, so that each method costs its formula alone."""
    case = cams.case(name)
    score = case.score
    layers = (case.layer, *case.others)
    return case, replace(score, forward=Forward(case.net, case.x, layers, score.execution, leaves=layers[:1]))


@cache
def heard_by_grad_cam(name):
    """The activations and gradients that grad-cam hears at the layer, the same for all its classes."""
    case = cams.case(name)
    with grad_cam.GradCAM(case.net, case.modules(), reshape_transform=case.reshape) as cam:
        cam(case.x, [ClassifierOutputTarget(target) for target in cams.TARGETS])
        kept = cam.activations_and_grads
        return kept.activations[0].numpy(), kept.gradients[0].numpy()


@cache
def maps_of_torch_cam(name):
    """torch-cam's maps of the layer, not scaled, of all its classes from one pass."""
    case = cams.case(name)
    how = {"input_shape": tuple(case.x.shape[1:]), "reshape_transform": case.reshape}
    with ExitStack() as undo:
        peers = {
            own: undo.enter_context(peer(case.net, case.layer, **how))
            for own, peer in TORCH_CAM_PEERS.items()
        }
        for peer in peers.values():
            peer._relu = False  # of a map below zero nothing would be left to compare
        outputs = case.net(case.x.clone().requires_grad_())
        found = {
            own: peer(cams.TARGETS, outputs, normalized=False, retain_graph=True)
            for own, peer in peers.items()
        }
    return {own: maps[0].detach() for own, maps in found.items()}


def preset(name, of, **options):
    return build({"name": name, "preset": of, **options})


def assert_same(ours, expected, rtol=1e-8):
    scale = float(expected.abs().max())
    assert scale > 0
    assert_close(ours, expected, rtol=rtol, atol=rtol * 1e-2 * scale)


# ---- three packages, on networks of each kind -------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAD_CAM_PEERS)
@pytest.mark.parametrize("network", cams.CASES)
def test_raw_maps_equal_grad_cam(name, network):
    case, score = case_and_score(network)
    peer = GRAD_CAM_PEERS[name](case.net, [])
    found = peer.get_cam_image(None, None, None, *heard_by_grad_cam(network), False)
    expected = torch.from_numpy(np.asarray(found))
    ours = preset(name, "grad-cam", layer=case.layer, relu=False).attribute(score, case.x)
    assert_same(ours, expected)


@pytest.mark.parametrize("name", TORCH_CAM_PEERS)
@pytest.mark.parametrize("network", cams.CASES)
def test_raw_maps_equal_torch_cam(name, network):
    case, score = case_and_score(network)
    signed = preset(name, "torch-cam", layer=case.layer, relu=False).attribute(score, case.x)
    assert_same(signed, maps_of_torch_cam(network)[name])
    rectified = preset(name, "torch-cam", layer=case.layer).attribute(score, case.x)
    assert torch.equal(rectified, signed.relu())


@pytest.mark.parametrize("network", cams.CASES)
def test_raw_maps_equal_captum(network):
    case, score = case_and_score(network)
    targets, (module,) = torch.tensor(cams.TARGETS), case.modules()
    terms = LayerGradientXActivation(case.net, module).attribute(case.x, targets).detach()
    terms = terms if case.reshape is None else case.reshape(terms)
    assert_same(preset("hirescam", "torchray", layer=case.layer).attribute(score, case.x), terms.sum(1))
    if case.reshape is None:
        expected = LayerGradCam(case.net, module).attribute(case.x, targets)[:, 0].detach()
        assert_same(preset("gradcam", "captum", layer=case.layer).attribute(score, case.x), expected)


@pytest.mark.parametrize("name", [*GRAD_CAM_PEERS, "seg-xres-cam"])
def test_the_relu_alone_tells_the_default_map_from_the_signed_one(name):
    case, score = case_and_score("resnet18")
    signed = build({"name": name, "layer": case.layer, "relu": False}).attribute(score, case.x)
    assert_close(build({"name": name, "layer": case.layer}).attribute(score, case.x), signed.relu())


# ---- slow formulas, place by place ------------------------------------------------------------------------------


def two_tensors(negative=True):
    """Activations and gradients (2, 4, 3, 5) with zeros among both; one channel is silent, one has no gradient."""
    acts, grads = images(2, 4, 3, 5), images(2, 4, 3, 5, seed=1)
    acts = acts if negative else acts.relu()
    acts[:, 2], grads[:, 3], grads[0, 0, 1] = 0, 0, 0
    return acts, grads


def slow(acts, grads, alpha, gathered, normalised=False):
    """Grad-CAM++ place by place: ``alpha(a, g, i, j)`` of one channel, weights ``gathered`` over its places."""
    maps = torch.zeros_like(acts)
    for n, k in product(range(acts.shape[0]), range(acts.shape[1])):
        a, g = acts[n, k], grads[n, k]
        places = list(product(range(a.shape[0]), range(a.shape[1])))
        alphas = {place: float(alpha(a, g, *place)) for place in places}
        total = sum(alphas[place] for place in places if g[place] > 0) if normalised else 1.0
        terms = [alphas[place] / (total or 1.0) * max(float(g[place]), 0.0) for place in places]
        maps[n, k] = gathered(terms) * a
    return maps


def of_the_paper(a, g, i, j, gathered=torch.sum):
    below = 2 * g[i, j] ** 2 + gathered(a) * g[i, j] ** 3
    return g[i, j] ** 2 / below if below != 0 else 0.0


def of_products(a, g, i, j):
    below = 2 * g[i, j] ** 2 + (a * g**3).sum()
    return g[i, j] ** 2 / below if below != 0 else 0.0


def of_xplique(a, g, i, j):
    below = 2 * g[i, j] ** 2 + g[i, j] ** 3 * a.mean()
    return g[i, j] ** 2 / (below if below != 0 else 1e-4)


def mean(terms):
    return sum(terms) / len(terms)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("method", "alpha", "gathered", "normalised"),
    [
        (GradCAMPlusPlus(), of_the_paper, sum, False),
        (preset("gradcam++", "original"), of_the_paper, sum, True),
        (preset("gradcam++", "xplique"), of_xplique, mean, False),
        (GradCAMPlusPlus(denominator="products"), of_products, sum, False),
        (preset("gradcam++", "torch-cam"), lambda a, g, i, j: g[i, j] ** 2, sum, False),
    ],
    ids=["paper", "original", "xplique", "products", "torch-cam"],
)
def test_gradcam_plus_plus_place_by_place(method, alpha, gathered, normalised, negative):
    acts, grads = two_tensors(negative)
    found = method.weighted(acts, grads)
    assert_same(found, slow(acts, grads, alpha, gathered, normalised))
    assert found.isfinite().all()


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(
    ("of", "eps"), [("paper", 0.0), ("original", 1e-6), ("grad-cam", 1e-7), ("torch-cam", 1e-8)]
)
def test_xgradcam_channel_by_channel(of, eps, negative):
    acts, grads = two_tensors(negative)
    expected = torch.zeros_like(acts)
    for n, k in product(range(2), range(4)):
        below = acts[n, k].sum() + eps
        expected[n, k] = 0 if below == 0 else (acts[n, k] * grads[n, k]).sum() / below * acts[n, k]
    assert_same(preset("xgradcam", of).weighted(acts, grads), expected, rtol=1e-12)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("pool", [1, 2, 3, 4, 9])
def test_seg_xres_cam_window_by_window(pool, pooling):
    acts, grads = two_tensors()
    expected = torch.zeros_like(acts)
    for i, j in product(range(3), range(5)):
        top, left = i // pool * pool, j // pool * pool
        window = grads[:, :, top : top + pool, left : left + pool]
        own = window.amax((2, 3)) if pooling == "max" else window.mean((2, 3))
        expected[:, :, i, j] = own * acts[:, :, i, j]
    assert_same(SegXResCAM(pool=pool, pooling=pooling).weighted(acts, grads), expected, rtol=1e-12)


@pytest.mark.parametrize(("pooling", "peer"), [("max", np.max), ("mean", np.mean)])
def test_seg_xres_cam_is_that_of_the_authors_where_windows_fit(pooling, peer):
    acts, grads = images(1, 3, 6, 8), images(1, 3, 6, 8, seed=1)
    pooled = skimage.measure.block_reduce(grads[0].numpy(), (1, 2, 2), peer)
    spread = skimage.transform.resize(pooled.transpose(1, 2, 0), (6, 8), order=0).transpose(2, 0, 1)
    found = SegXResCAM(pool=2, pooling=pooling).weighted(acts, grads)
    assert_same(found[0], torch.from_numpy(spread) * acts[0], rtol=1e-6)


def test_a_quotient_by_zero_is_zero_and_so_is_its_derivative():
    above = torch.tensor([1.0, 0.0, 6.0], requires_grad=True)
    below = torch.tensor([0.0, 0.0, 3.0], requires_grad=True)
    found = ratio(above, below)
    assert found.tolist() == [0, 0, 2]
    grads = torch.autograd.grad(found.sum(), (above, below))
    assert_close(grads[0], torch.tensor([0, 0, 1 / 3]))
    assert_close(grads[1], torch.tensor([0, 0, -2 / 3]))


# ---- answers known beforehand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", range(5))
def test_gradcam_equals_cam_on_a_pooled_linear_net(label):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    acts = net.relu(net.features(x)).detach()
    cam = torch.einsum("k,nkhw->nhw", net.head.weight[label].detach(), acts) / (acts.shape[2] * acts.shape[3])
    score = bound(net, x, [label, label])
    assert_close(GradCAM(layer="relu").attribute(score, x), cam.relu())
    for method in (GradCAM, HiResCAM, XGradCAM):  # the gradient is the same at all places
        assert_close(method(layer="relu", relu=False).attribute(score, x), cam)
    assert_close(SegXResCAM(layer="relu", relu=False).attribute(score, x), cam)


@pytest.mark.parametrize("label", range(5))
def test_gradcam_plus_plus_has_a_closed_form_on_a_pooled_linear_net(label):
    """G = W / hw everywhere, so alpha = 1 / (2 + S W / hw), and hw of them are summed: w = ReLU(W) / (2 + W mean A)."""
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    acts, weight = net.relu(net.features(x)).detach(), net.head.weight[label].detach()[:, None, None]
    means = acts.mean((2, 3), keepdim=True)
    expected = (weight.relu() / (2 + weight * means) * acts).sum(1)
    found = GradCAMPlusPlus(layer="relu").attribute(bound(net, x, [label, label]), x)
    assert_close(found, expected)
    spread = preset("gradcam++", "original", layer="relu").attribute(bound(net, x, [label, label]), x)
    places = acts.shape[2] * acts.shape[3]
    assert_close(spread, (weight.relu() * acts).sum(1) / places)  # equal alphas, normalised: their mean


class LinearTail(nn.Module):
    """A layer whose output is flattened into one linear map without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4 * 6 * 5, 3, bias=False)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1))


@pytest.mark.parametrize("method", [HiResCAM, XGradCAM])
def test_these_sum_to_the_score_on_a_linear_tail(method):
    net, x = made(LinearTail), images(2, 3, 6, 5)
    score = bound(net, x, [2, 0])
    assert_close(method(layer="layer", relu=False).attribute(score, x).sum((1, 2)), score(x))
    assert (GradCAM(layer="layer", relu=False).attribute(score, x).sum((1, 2)) - score(x)).abs().min() > 1e-3


def test_layercam_drops_places_that_speak_against_the_class():
    net, x = made(LinearTail), images(2, 3, 6, 5)
    weight = net.head.weight.detach()[[2, 0]].view(2, 4, 6, 5)
    expected = (weight.relu() * net.layer(x).detach()).sum(1)
    score = bound(net, x, [2, 0])
    assert_close(LayerCAM(layer="layer").attribute(score, x), expected)
    # activations are not negative, so that the positive products are those of positive gradients
    assert_close(ElementwiseGradCAM(layer="layer").attribute(score, x), expected)


@pytest.mark.parametrize("network", ["resnet18", "vit_b_16"])
def test_nothing_taken_off_is_at_least_what_is_left(network):
    case, score = case_and_score(network)
    element = ElementwiseGradCAM(layer=case.layer).attribute(score, case.x)
    whole = HiResCAM(layer=case.layer).attribute(score, case.x)
    assert (element >= whole).all()
    if network == "vit_b_16":  # activations of both signs: not LayerCAM
        layer = LayerCAM(layer=case.layer, relu=False).attribute(score, case.x)
        assert (element - layer).abs().max() > 1e-3 * element.max()


def test_seg_xres_cam_goes_from_hirescam_to_gradcam():
    case, score = case_and_score("vit_b_16")

    def found(method):
        return replace(method, layer=case.layer, relu=False).attribute(score, case.x)

    assert_same(found(SegXResCAM(pool=1)), found(HiResCAM()))
    assert_same(found(SegXResCAM(pool=99, pooling="mean")), found(GradCAM()))
    assert (found(HiResCAM()) - found(GradCAM())).abs().max() > 0.01 * found(HiResCAM()).abs().max()


def test_a_layer_that_is_silent_for_one_image_gives_zeros_there_and_nothing_else_changes():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    with torch.no_grad():
        net.features[2].bias.fill_(-0.1)
        x[1] = 0
        net.features[0].bias.zero_()
    score, pair = bound(net, x, [0, 1, 2]), bound(net, x[[0, 2]], [0, 2])
    for name in [*GRAD_CAM_PEERS, "seg-xres-cam"]:
        method = build({"name": name, "layer": "relu", "relu": False})
        found = method.attribute(score, x)
        assert (found[1] == 0).all()
        assert_close(found[[0, 2]], method.attribute(pair, x[[0, 2]]))


# ---- traps of the packages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-5])
def test_grad_cam_plus_plus_with_an_epsilon_loses_small_gradients(factor):
    """With S = 0, w = sum ReLU(G) / 2, in the unit of the score; grad-cam's 1e-6 makes it sum G^2 ReLU(G) / 1e-6."""
    acts, grads = images(1, 2, 4, 4), images(1, 2, 4, 4, seed=1) * factor
    acts = acts - acts.mean((2, 3), keepdim=True)
    peer = grad_cam.GradCAMPlusPlus(nn.Conv2d(1, 1, 1), [])
    theirs = peer.get_cam_weights(None, None, None, acts.numpy(), grads.numpy())
    theirs = torch.from_numpy(theirs)[..., None, None] * acts
    expected = grads.relu().sum((2, 3), keepdim=True) / 2 * acts
    assert_same(GradCAMPlusPlus().weighted(acts, grads), expected)
    assert_same(preset("gradcam++", "grad-cam").weighted(acts, grads), theirs)
    if factor == 1e-5:
        assert theirs.abs().max() < 1e-3 * expected.abs().max()


def test_torch_cam_never_divides_by_its_denominator():
    case, score = case_and_score("resnet18")
    theirs = maps_of_torch_cam("resnet18")["gradcam++"]
    meant = GradCAMPlusPlus(layer=case.layer, denominator="products", eps=1e-8).attribute(score, case.x)
    paper = GradCAMPlusPlus(layer=case.layer).attribute(score, case.x)
    for other in (meant, paper):
        assert (theirs / theirs.max() - other / other.max()).abs().max() > 0.05


def test_grad_cam_changes_mode_and_gradients_and_these_do_not():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    targets = [ClassifierOutputTarget(0), ClassifierOutputTarget(1)]
    net.train()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = contract.snapshot(net)
    with frozen(net):
        for name in [*GRAD_CAM_PEERS, "seg-xres-cam"]:
            build({"name": name, "layer": "relu"}).attribute(bound(net, x, [0, 1]), x)
    assert contract.snapshot(net) == before
    with grad_cam.GradCAM(net, [net.relu]) as cam:
        cam(x, targets)
    assert not net.training
    assert (net.head.weight.grad != 0.5).any()


def test_grad_cam_mistakes_a_second_call_for_the_next_layer_and_these_refuse_to():
    net, x = made(Residual), images(2, 3, 8, 8)
    targets = [ClassifierOutputTarget(0), ClassifierOutputTarget(1)]
    score = bound(net, x, [0, 1])
    (last,) = score.activations(x, score.layers.find("last"))
    with grad_cam.GradCAM(net, [net.twice, net.last]) as cam:
        cam(x, targets)
        second = cam.activations_and_grads.activations[1]  # what it pairs with ``last``
        assert len(cam.activations_and_grads.activations) == 4
    assert (second - last).abs().max() > 0.1
    with pytest.raises(ModelError, match="runs 3 times"):
        GradCAM(layer=("twice", "last")).attribute(score, x)


def test_an_in_place_relu_after_the_layer_does_not_rewrite_what_was_captured():
    net = torchvision.models.resnet18().double().eval()
    nn.init.normal_(net.layer4[0].bn1.bias)
    x = images(2, 3, 64, 64)
    plain = torchvision.models.resnet18().double().eval()
    plain.load_state_dict(net.state_dict())
    for part in plain.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    layer = "layer4.0.bn1"  # an in-place ReLU comes next
    scores = [bound(own, x, [1, 7]) for own in (net, plain)]
    found = [HiResCAM(layer=layer, relu=False).attribute(score, x) for score in scores]
    acts = [score.activations(x, score.layers.find(layer))[0] for score in scores]
    assert (acts[0] < 0).any()
    assert_close(acts[0], acts[1])
    assert_close(found[0], found[1])


# ---- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "gradcam++", "eps": -1.0},
        {"name": "gradcam++", "denominator": "inside"},
        {"name": "xgradcam", "eps": -1.0},
        {"name": "seg-xres-cam", "pool": 0},
        {"name": "gradcam", "preset": "original"},
    ],
)
def test_what_an_option_does_not_allow_is_refused(wrong):
    with pytest.raises(ConfigError):
        build(wrong)


# ---- maps that are differentiated in turn -----------------------------------------------------------------------


class Smooth(nn.Module):
    """Two layers with a smooth, not linear tail, so that maps have a second derivative everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Softplus())
        self.two = nn.Sequential(nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.Softplus())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.two(self.one(x)).square().mean((2, 3)).sqrt()).sinh()


DIFFERENTIATED = {
    "gradcam": GradCAM(),
    "gradcam++": GradCAMPlusPlus(),
    "gradcam++ original": preset("gradcam++", "original"),
    "gradcam++ products": GradCAMPlusPlus(denominator="products"),
    "xgradcam": XGradCAM(),
    "hirescam": HiResCAM(),
    "gradcam-elementwise": ElementwiseGradCAM(),
    "layercam": LayerCAM(),
    "seg-xres-cam": SegXResCAM(),
    "seg-xres-cam mean": SegXResCAM(pooling="mean"),
    "gradcam, eigen_smooth": GradCAM(eigen_smooth=True),
    "gradcam, aug_smooth of two layers": GradCAM(aug_smooth=True, layer=("one", "two")),
    "layercam of two layers": LayerCAM(layer=("one", "two")),
}


def smooth_case():
    return made(Smooth), images(2, 3, 8, 6)


def test_the_table_of_differentiated_methods_misses_none():
    assert {method.name for method in DIFFERENTIATED.values()} == {*GRAD_CAM_PEERS, "seg-xres-cam"}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_derivative_of_a_map_in_pixels_and_weights_is_that_of_central_differences(name):
    net, x = smooth_case()
    method = replace(DIFFERENTIATED[name], relu=False)
    method = replace(method, layer="two") if method.layer == "auto" else method
    rows = ([0, 2, 1], [0, 0, 1])  # two rows of the first image
    lens = images(3, 8 if "two layers" in name else 4, 6 if "two layers" in name else 3, seed=3)
    weight = net.one[0].weight

    def loss(pixels, graph=False):
        score = replace(bound(net, pixels.detach(), *rows), create_graph=graph)
        return (method.attribute(score, pixels) * lens).sum()

    pixels = x.clone().requires_grad_()
    found = torch.autograd.grad(loss(pixels, graph=True), (pixels, weight))
    step = 1e-5
    along = images(*x.shape, seed=5), images(*weight.shape, seed=6)
    numeric = (loss(x + step * along[0]) - loss(x - step * along[0])) / (2 * step)
    assert_close((found[0] * along[0]).sum(), numeric, rtol=1e-5, atol=1e-8)
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * along[1]
        sides.append(loss(x))
        with torch.no_grad():
            weight -= sign * step * along[1]
    assert_close((found[1] * along[1]).sum(), (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-8)
    assert min(float(grad.abs().max()) for grad in found) > 1e-6


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_one_step_of_descent_lowers_the_energy_outside_a_mask(name):
    net, x = smooth_case()
    method = replace(DIFFERENTIATED[name], relu=False)
    method = replace(method, layer="two") if method.layer == "auto" else method

    def outside():
        score = replace(bound(net, x, [0, 1]), create_graph=True)
        maps = method.explain(score, x, (8, 6)).map
        energy = maps.square()
        return 1 - (energy[:, 2:6, 1:4].sum((1, 2)) / energy.sum((1, 2))).mean()

    descent = torch.optim.SGD(net.parameters(), lr=1e-2)
    before = outside()
    before.backward()
    descent.step()
    assert 0 < outside().item() < before.item() - 1e-6


def test_without_being_asked_a_map_keeps_no_graph():
    net, x = smooth_case()
    found = GradCAM(layer="two").attribute(bound(net, x, [0, 1]), x.requires_grad_())
    assert not found.requires_grad


# ---- tokens -----------------------------------------------------------------------------------------------------


def test_the_class_token_is_left_out_and_the_rest_is_a_map():
    net, x = made(Tokens), images(2, 3, 16, 16)
    score = bound(net, x, [1, 3])
    (acts,), (grads,), _ = score.gradients(x, at=score.layers.find("norm1"))
    expected = (acts * grads).sum(2)[:, 1:].view(2, 4, 4)
    assert acts.shape == (2, 17, 8)
    assert_close(HiResCAM(layer="norm1", relu=False).attribute(score, x), expected)
