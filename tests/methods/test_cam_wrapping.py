"""CAMs around other CAMs: against two packages on networks of each kind, and against answers known beforehand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cams import CASES, TARGETS, case, torch_cam_map
from pytorch_grad_cam import FinerCAM as PeerFinerCAM
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam import GradCAMPlusPlus as PeerGradCAMPlusPlus
from pytorch_grad_cam import LayerCAM as PeerLayerCAM
from pytorch_grad_cam import RefineCAM as PeerRefineCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.testing import assert_close
from torchcam import methods as torchcam
from toys import PooledLinear, Residual, SumModel, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.hooks import frozen
from xcli.methods.cam.gradient import GradCAM, HiResCAM, LayerCAM
from xcli.methods.cam.wrapping import FinerCAM, RefineCAM
from xcli.registry import build

BASES = {
    "gradcam": (PeerGradCAM, torchcam.GradCAM),
    "layercam": (PeerLayerCAM, torchcam.LayerCAM),
    "gradcam++": (PeerGradCAMPlusPlus, torchcam.GradCAMpp),
}


def unit(maps):
    """Each map taken to [0, 1]; an empty one stays so."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-300)


def close(ours, expected, tolerance=1e-9):
    assert expected.abs().max() > 0
    assert_close(ours, expected, rtol=1e-4, atol=tolerance * float(expected.abs().max()))


@cache
def score_of(name):
    """The score of a case; its network is surveyed once."""
    return case(name).score


# ---- Finer-CAM against the packages ----------------------------------------------------------------------------


def grad_cam_finer(base, net, x, layer, targets, reshape=None):
    """grad-cam's raw maps: it explains one class a call, so each image goes alone."""
    module = net.get_submodule(layer)
    rows, x = [], x.clone().requires_grad_()
    with frozen(net), PeerFinerCAM(net, [module], reshape, base) as cam:
        for image, target in enumerate(targets):
            cam(x[image : image + 1], target_idx=target)
            kept = cam.base_cam.activations_and_grads
            arrays = [tensors[0].detach().numpy() for tensors in (kept.activations, kept.gradients)]
            rows.append(cam.base_cam.get_cam_image(x, module, None, *arrays, False)[0])
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize(
    ("name", "base"), [*((name, "gradcam") for name in CASES), ("shapes-cnn", "layercam")]
)
def test_finercam_equals_grad_cam(name, base):
    own = case(name)
    expected = grad_cam_finer(BASES[base][0], own.net, own.x, own.layer, TARGETS, own.reshape)
    options = {"name": "finercam", "preset": "grad-cam", "base": base, "layer": own.layer, "relu": False}
    score = score_of(name)
    close(build(options).attribute(score, own.x), expected)
    if name != "vit_b_16":  # there the references are improbable, see below
        close(build({**options, "eps": 0}).attribute(score, own.x), expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "base"), [*((name, "gradcam") for name in CASES), ("shapes-cnn", "layercam")]
)
def test_finercam_equals_torch_cam(name, base):
    own = case(name)
    expected = torch_cam_map(torchcam.FinerCAM, own, base_method=BASES[base][1])
    options = {"name": "finercam", "preset": "torch-cam", "base": base, "layer": own.layer, "relu": False}
    assert expected.abs().amax((1, 2)).min() > 0
    assert_close(build(options).attribute(score_of(name), own.x), expected, rtol=1e-8, atol=1e-14)


# ---- Finer-CAM, answers known beforehand -----------------------------------------------------------------------


def finer_of_a_pooled_linear_net(net, x, targets, alpha, references):
    """The gradient of the number by hand: class j counts [j = c] - alpha w_j (1 + z_j - sum_s w_s z_s)."""
    acts = net.relu(net.features(x)).detach()
    logits = net(x).detach()
    cams = torch.einsum("lk,nkhw->nlhw", net.head.weight.detach(), acts) / acts[0, 0].numel()
    rows = []
    for image, target in enumerate(targets):
        z = logits[image].tolist()
        others = sorted((j for j in range(len(z)) if j != target), key=lambda j: abs(z[j] - z[target]))
        others = others[:references]
        power = [math.exp(z[j] - max(z[k] for k in others)) for j in others]
        weights = [one / sum(power) for one in power]
        mean = sum(w * z[j] for w, j in zip(weights, others, strict=True))
        row = cams[image, target].clone()
        for w, j in zip(weights, others, strict=True):
            row -= alpha * w * (1 + z[j] - mean) * cams[image, j]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("references", [1, 2, 3, 9])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_finercam_of_a_pooled_linear_net(alpha, references):
    net, x, targets = made(PooledLinear), images(3, 3, 8, 6), [4, 0, 2]
    expected = finer_of_a_pooled_linear_net(net, x, targets, alpha, references)
    for base in ("gradcam", "hirescam"):  # equal on such a net
        method = FinerCAM(base=base, layer="relu", relu=False, alpha=alpha, references=references)
        assert_close(method.attribute(bound(net, x, targets), x), expected)


@pytest.mark.parametrize("weights", ["softmax", "mean"])
def test_without_comparison_it_is_its_base(weights):
    net, x = made(Residual), images(2, 3, 8, 6)
    score = bound(net, x, [0, 2, 1], [0, 0, 1])
    for base in (LayerCAM(layer="block", eigen_smooth=True), GradCAM(layer="block")):
        spec = {"name": base.name, "eigen_smooth": base.eigen_smooth}
        found = FinerCAM(base=spec, layer="block", alpha=0, weights=weights).attribute(score, x)
        assert_close(found, base.attribute(score, x))


def test_of_two_classes_it_explains_the_contrast():
    net = PooledLinear(2).double().eval()
    x = images(2, 3, 8, 6)
    score = bound(net, x, [1, 0])
    for scale in ("logit", "log-probability"):  # their differences are equal
        found = FinerCAM(layer="relu").attribute(score.scaled(scale), x)
        assert_close(found, GradCAM(layer="relu").attribute(score.scaled("contrast"), x))


def test_every_row_is_compared_with_classes_of_its_own():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    image, targets = [0, 0, 0, 1, 2, 2], [4, 1, 0, 2, 3, 0]
    found = FinerCAM(layer="relu", relu=False).attribute(bound(net, x, targets, image, micro_batch=2), x)
    assert_close(found, finer_of_a_pooled_linear_net(net, x[image], targets, 1.0, 3))


def test_classes_can_be_named_and_the_explained_one_does_not_count():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [4, 1])
    z = net(x).detach()
    for weights in ("softmax", "mean"):
        method = FinerCAM(layer="relu", against=(1, 3, 1), weights=weights)
        pair = z[0, [1, 3]].softmax(0) if weights == "softmax" else torch.tensor([0.5, 0.5])

        def number(rows, outputs, copy, row, pair=pair, weights=weights):
            first = outputs[:, [1, 3]]
            mixed = (first.softmax(1) if weights == "softmax" else pair) * first
            both = torch.stack([outputs[:, 4] - mixed.sum(1), outputs[:, 1] - outputs[:, 3]], 1)
            return both[copy, row]

        expected = GradCAM(layer="relu").attribute(score.reading(number), x)
        assert_close(method.attribute(score, x), expected)


def test_a_row_whose_own_class_is_all_there_is_to_compare_is_lost_and_no_other():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [1, 4, 1], [0, 0, 1])
    for weights in ("softmax", "mean"):
        found = FinerCAM(layer="relu", against=(1,), weights=weights).attribute(score, x)
        assert found[[0, 2]].isnan().all()
        alone = FinerCAM(layer="relu", against=(1,), weights=weights).attribute(bound(net, x, [4], [0]), x)
        assert_close(found[1:2], alone)


@pytest.mark.parametrize(
    "base",
    [
        "layercam",
        "shapleycam",
        {"name": "scorecam", "weights": "probability"},
        "ablationcam",
        "smooth-gradcam++",
    ],
)
def test_without_a_comparison_it_is_its_base_in_the_unit_of_the_base(base):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    method, inner = FinerCAM(base=base, layer="relu", relu=False, alpha=0), build(base)
    score = bound(net, x, [4, 1]).scaled(method.scale)
    expected = replace(inner, layer="relu", relu=False).attribute(score, x)
    assert expected.abs().max() > 0
    assert_close(method.attribute(score, x), expected)


def test_another_unit_is_compared_in_that_unit():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [4, 1])
    method = FinerCAM(layer="relu", relu=False, against=(0, 2), weights="mean", alpha=0.5)

    def number(rows, outputs, copy, row):
        chance = outputs.softmax(1)[copy]
        own = chance.gather(1, score.rows.target[row][:, None])[:, 0]
        return own - 0.25 * chance[:, 0] - 0.25 * chance[:, 2]

    expected = GradCAM(layer="relu", relu=False).attribute(score.reading(number), x)
    assert_close(method.attribute(score.scaled("probability"), x), expected)


@pytest.mark.parametrize("base", ["scorecam", "ablationcam"])
def test_the_classes_stay_while_the_base_perturbs(base):
    net, x = made(PooledLinear, 33), images(1, 3, 8, 6, seed=33)
    score, (z,) = bound(net, x, [3]), net(x).detach()
    others = sorted((j for j in range(5) if j != 3), key=lambda j: abs(z[j] - z[3]))
    method = FinerCAM(base=base, layer="relu", relu=False, references=1)
    named = [replace(method, against=(j,)).attribute(score, x) for j in others]
    found = method.attribute(score, x)
    assert_close(found, named[0])
    assert not any(torch.allclose(found, other) for other in named[1:])


def test_another_class_is_nearest_in_copies():
    """The test above could not see classes that are chosen anew for each copy, were the nearest always the same."""
    net, x = made(PooledLinear, 33), images(1, 3, 8, 6, seed=33)
    masks = unit(F.interpolate(net.relu(net.features(x)), size=(8, 6), mode="bilinear")[0])
    z = net(x * masks[:, None]).detach()
    assert len(set((z - z[:, 3:4]).abs().argsort(1)[:, 1].tolist())) > 1


def test_of_equal_distances_the_first_class_counts_whatever_the_batch():
    net, x = made(PooledLinear), images(4, 3, 8, 6)
    net.head.weight.data[[1, 2, 3]] = net.head.weight.data[[0]]
    net.head.bias.data[[1, 2, 3]] = net.head.bias.data[[0]]
    others, _ = FinerCAM(references=2).compared(bound(net, x, [4] * 4), x)
    assert others.tolist() == [[0, 1]] * 4


# ---- Finer-CAM: what grad-cam gets wrong -----------------------------------------------------------------------


def test_grad_cam_explains_probabilities_where_the_references_are_improbable():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    net.head.weight.data *= 1e5
    targets = net(x).argmin(1).tolist()
    assert net(x).softmax(1).topk(2).values[:, 1].max() < 1e-9
    score, options = bound(net, x, targets), {"name": "finercam", "layer": "relu", "relu": False}
    theirs = grad_cam_finer(PeerGradCAM, net, x, "relu", targets)
    right = finer_of_a_pooled_linear_net(net, x, targets, 1.0, 3)
    assert_close(build(options).attribute(score, x), right)
    assert_close(build({**options, "preset": "grad-cam"}).attribute(score, x), theirs, rtol=1e-6, atol=1e-12)
    assert (theirs - right).abs().amax((1, 2)).min() > 0.5 * right.abs().max()


class ChannelMeans(nn.Module):
    """Class c is the mean of channel c."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, bias=False)
        self.layer.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x):
        return self.layer(x).mean((2, 3))


def test_grad_cam_takes_another_class_where_logits_are_equal():
    net = ChannelMeans().double().eval()
    x = torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4)
    x = torch.cat([x, 0 * x, x.flip(3)], 1)  # classes 0 and 2 have the same logit
    ours = FinerCAM(layer="layer", relu=False, references=1).attribute(bound(net, x, [2]), x)
    assert_close(ours, (x[:, 2] - x[:, 0]) / 16)
    options = {"name": "finercam", "preset": "grad-cam", "layer": "layer", "relu": False, "references": 1}
    assert_close(build(options).attribute(bound(net, x, [2]), x), ours)
    with PeerFinerCAM(net, [net.layer]) as cam:
        cam(x, target_idx=2, comparison_categories=[1])
        kept = cam.base_cam.activations_and_grads
        arrays = [tensors[0].detach().numpy() for tensors in (kept.activations, kept.gradients)]
        theirs = torch.from_numpy(cam.base_cam.get_cam_image(x, net.layer, None, *arrays, False))
    assert_close(theirs, -ours)


# ---- Finer-CAM: what cannot be compared ------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["eigencam", "kpca-cam"])
def test_a_base_that_looks_at_no_class_is_refused(base):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    with pytest.raises(ModelError, match=f"finercam: {base} looks at no class.*another base"):
        FinerCAM(base=base, layer="relu").attribute(bound(net, x, [0, 1]), x)


class OneLogit(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = PooledLinear(1)

    def forward(self, x):
        return self.net(x)


def test_what_cannot_be_compared_is_said_in_words():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [0, 1])
    with pytest.raises(ModelError, match=r"there is no class 7; the model has 5"):
        FinerCAM(layer="relu", against=(2, 7)).attribute(score, x)
    with pytest.raises(ModelError, match="these explanations are of no class"):
        FinerCAM(layer="relu").attribute(score.reading(lambda rows, outputs, copy, row: outputs[copy, 0]), x)
    single = made(OneLogit)
    with pytest.raises(ModelError, match="finercam: the model has a single logit"):
        FinerCAM(layer="net.relu").attribute(bound(single, x, [0, 0]), x)
    assert FinerCAM().needs == {"layer", "gradients"}
    with pytest.raises(ModelError):
        FinerCAM().looks_at(bound(SumModel().double(), x, [0, 0]).layers)


def test_an_image_that_is_not_finite_leaves_the_others_alone():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    whole = FinerCAM(layer="relu").attribute(bound(net, x, [0, 1, 2]), x)
    broken = x.clone()
    broken[1, 0, 0, 0] = torch.nan
    found = FinerCAM(layer="relu").attribute(bound(net, x, [0, 1, 2]), broken)
    assert_close(found[[0, 2]], whole[[0, 2]])
    refined = RefineCAM(layer=("features.0", "relu"))
    assert_close(
        refined.attribute(bound(net, x, [0, 1, 2]), broken)[[0, 2]],
        refined.attribute(bound(net, x, [0, 1, 2]), x)[[0, 2]],
    )


# ---- RefineCAM against the packages ----------------------------------------------------------------------------


def several(own):
    return (*reversed(own.others), own.layer)


@pytest.mark.parametrize(
    ("name", "base"),
    [*((name, "layercam") for name in CASES), ("resnet18", "gradcam"), ("shapes-cnn", "gradcam++")],
)
def test_refinecam_equals_grad_cam(name, base):
    own = case(name)
    with frozen(own.net):
        peer = PeerRefineCAM(own.net, own.modules(*several(own)), own.reshape, BASES[base][0])
        targets = [ClassifierOutputTarget(target) for target in TARGETS]
        expected = torch.from_numpy(peer(own.x.clone().requires_grad_(), targets))
    spec = {"name": base, "preset": "grad-cam"} if base == "gradcam++" else base
    method = build({"name": "refinecam", "preset": "grad-cam", "base": spec, "layer": several(own)})
    found = method.attribute(score_of(name), own.x)
    assert found.shape[1:] == own.x.shape[2:]
    assert_close(unit(found).float(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "base"),
    [*((name, "layercam") for name in CASES), ("resnet18", "gradcam"), ("shapes-cnn", "gradcam++")],
)
def test_refinecam_equals_torch_cam(name, base):
    own, peer = case(name), BASES[base][1]
    size = tuple(own.x.shape[1:])
    with torchcam.RefineCAM(
        own.net, list(several(own)), size, base_method=peer, reshape_transform=own.reshape
    ) as cam:
        (expected,) = cam(TARGETS, own.net(own.x.clone().requires_grad_()), normalized=False)
    spec = {"name": base, "preset": "torch-cam"} if base == "gradcam++" else base
    score = score_of(name)
    for preset in ("torch-cam", "paper"):
        method = build({"name": "refinecam", "preset": preset, "base": spec, "layer": several(own)})
        close(method.attribute(score, own.x), expected.detach(), 1e-6)


# ---- RefineCAM, answers known beforehand -----------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "size"), [("paper", (8, 6)), ("original", (16, 12))])
def test_refinecam_is_the_product_of_maps_from_0_to_1(preset, size):
    net, x = made(PooledLinear), images(2, 3, 16, 12)
    net.features[0].stride = (2, 2)
    score, layers = bound(net, x, [1, 0]), ("features.0", "relu")
    parts = [LayerCAM(layer=layer).attribute(score, x) for layer in layers]  # 8x6 and 4x3
    assert [tuple(part.shape[1:]) for part in parts] == [(8, 6), (4, 3)]
    grown = [F.interpolate(unit(part)[:, None], size=size, mode="bilinear")[:, 0] for part in parts]
    options = {"name": "refinecam", "preset": preset, "base": "layercam", "layer": layers}
    assert_close(build(options).attribute(score, x), grown[0] * grown[1])


def test_with_one_layer_it_is_its_base():
    net, x = made(Tokens), images(2, 3, 16, 16)
    score = bound(net, x, [1, 3])
    for preset in ("paper", "grad-cam", "torch-cam", "original"):
        for relu in (True, False):
            options = {
                "name": "refinecam",
                "preset": preset,
                "base": "hirescam",
                "relu": relu,
                "layer": "norm1",
            }
            assert_close(
                build(options).attribute(score, x), HiResCAM(layer="norm1", relu=relu).attribute(score, x)
            )


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ("layer2", "layer3", "layer4")),
        ("shapes-cnn", ("stem", "stages.0", "stages")),
        ("vgg11_bn", ("features.20", "features.27", "features")),
        ("vit_b_16", tuple(f"encoder.layers.encoder_layer_{i}.ln_1" for i in (9, 10, 11))),
    ],
)
def test_by_default_it_looks_at_three_layers(name, layers):
    own = case(name)
    score = score_of(name)
    assert tuple(layer.name for layer in RefineCAM().looks_at(score.layers)) == layers
    assert RefineCAM().pinned(score.layers).layer == layers
    found = RefineCAM(base="gradcam").attribute(score, own.x)
    assert_close(found, RefineCAM(base="gradcam", layer=layers).attribute(score, own.x))


def test_it_combines_finer_maps_too():
    own, score, layers = case("resnet18"), score_of("resnet18"), ("layer3", "layer4")
    finer = {"name": "finercam", "base": "layercam", "references": 2}
    found = RefineCAM(base=finer, layer=layers).attribute(score, own.x)
    same = FinerCAM(
        base="layercam", references=2, layer=layers, fusion="product", normalise="min-max"
    ).attribute(score, own.x)
    assert_close(found, same)
    assert found.amax((1, 2)).min() > 0


def test_the_number_explained_and_the_needs_are_those_of_the_base():
    assert (RefineCAM().scale, RefineCAM(base="shapleycam").scale) == ("logit", "rest")
    assert RefineCAM(base="shapleycam", layer="auto").scale == "rest"
    assert FinerCAM(base="shapleycam").scale == "rest"
    assert RefineCAM(base="eigencam").needs == {"layer"}
    assert replace(RefineCAM(), base="eigencam").needs == {"layer"}
    assert RefineCAM.needs == RefineCAM().needs == {"layer", "gradients"}


def test_maps_keep_their_graph():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    net.head.weight.requires_grad_()
    score = replace(bound(net, x, [1, 0]), create_graph=True)
    for method in (
        FinerCAM(layer="relu", relu=False),
        RefineCAM(base="gradcam", layer=("features.0", "relu")),
    ):
        (grad,) = torch.autograd.grad(method.attribute(score, x).square().sum(), net.head.weight)
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0


# ---- RefineCAM: what grad-cam throws away ----------------------------------------------------------------------


class Signed:
    """A base of grad-cam's kind with maps that are neither positive nor scaled."""

    def __init__(self, _net, layers, _reshape):
        self.layer = layers[0]

    def __call__(self, *_):
        return self.layer


def test_grad_cam_neither_rectifies_nor_scales_what_it_multiplies():
    coarse, fine = np.array([[[-4.0, 1.0], [0.0, 2.0]]]), np.array([[[-3.0, 1.0], [5.0, 1.0]]])
    theirs = PeerRefineCAM(None, [coarse, fine], base_method=Signed)(None, None)
    assert theirs.argmax() == 0  # two places against the class make the strongest one for it
    meant = [np.maximum(one, 0) / one.max() for one in (coarse, fine)]
    assert (meant[0] * meant[1]).argmax() == 3
    net = made(PooledLinear)
    maps = [torch.from_numpy(one) for one in (coarse, fine)]
    for normalise in ("peak", "min-max"):  # both ours, in place of a base's
        method = RefineCAM(base="gradcam", layer=("features.0", "relu"), normalise=normalise)
        method.inner.__dict__["maps"] = lambda *_: maps
        x = images(1, 3, 8, 6)
        assert_close(method.attribute(bound(net, x, [0]), x).numpy(), meant[0] * meant[1])


def test_divided_by_the_peak_the_weakest_place_counts_and_taken_to_0_it_does_not():
    net, x = made(ChannelMeans), images(1, 3, 4, 4).square() + 1
    net = nn.Sequential(net.layer, nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    net[1].weight.data, net[1].bias.data = torch.eye(3).double()[:, :, None, None], torch.zeros(3).double()
    score, expected = bound(net, x, [0]), x[:, 0] / x[:, 0].max()
    peak = RefineCAM(base="gradcam", layer=("0", "1"), normalise="peak").attribute(score, x)
    assert_close(peak, expected.square())
    assert peak.min() > 0
    assert RefineCAM(base="gradcam", layer=("0", "1")).attribute(score, x).min() == 0
