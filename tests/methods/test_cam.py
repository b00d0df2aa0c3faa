"""What all CAMs share: layers and their fusion, views, principal components, sizes."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import cams
import contract
import numpy as np
import pytest
import pytorch_grad_cam as grad_cam
import torch
import torch.nn.functional as F
import torchcam.methods as torch_cam
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Tokens, bound, images, made

from xcli.demo import nets
from xcli.errors import ModelError
from xcli.forward import Forward
from xcli.hooks import frozen
from xcli.methods.base import resized
from xcli.methods.cam.base import VIEWS, fused, scaled, seen
from xcli.methods.cam.gradient import GradCAM, HiResCAM, LayerCAM
from xcli.methods.cam.spectra import first_component
from xcli.methods.cam.spectral import EigenCAM
from xcli.registry import build

GOALS = [ClassifierOutputTarget(target) for target in cams.TARGETS]
PEERS = {
    "gradcam": grad_cam.GradCAM,
    "gradcam++": grad_cam.GradCAMPlusPlus,
    "xgradcam": grad_cam.XGradCAM,
    "hirescam": grad_cam.HiResCAM,
    "gradcam-elementwise": grad_cam.GradCAMElementWise,
    "layercam": grad_cam.LayerCAM,
}


@cache
def score_of(case):
    """The score of a case with the pass over its layers recorded, so that methods cost little more."""
    score, layers = case.score, (case.layer, *case.others)
    return replace(score, forward=Forward(case.net, case.x, layers, score.execution, leaves=layers))


@cache
def heard_by_grad_cam(case):
    """The activations and gradients that grad-cam hears at the layer, the same for all its classes."""
    with grad_cam.GradCAM(case.net, case.modules(), reshape_transform=case.reshape) as cam:
        cam(case.x, GOALS)
        kept = cam.activations_and_grads
        return kept.activations[0].numpy(), kept.gradients[0].numpy()


# ---- eigen_smooth and the sign of a component -------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("network", ["resnet18", "shapes-vit", "swin_t"])
def test_eigen_smooth_equals_grad_cam_up_to_the_sign(name, network):
    case = cams.case(network)
    peer = PEERS[name](case.net, [])
    found = peer.get_cam_image(None, None, None, *heard_by_grad_cam(case), True)
    expected = torch.from_numpy(np.asarray(found)).double()  # a float32 map
    method = build(
        {"name": name, "preset": "grad-cam", "layer": case.layer, "relu": False, "eigen_smooth": True}
    )
    for rule in ("peak", "channels"):
        ours = replace(method, sign=rule).attribute(score_of(case), case.x)
        sign = (ours * expected).sum((1, 2), keepdim=True).sign()
        assert_close(ours, sign * expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        if rule == "peak":
            assert (ours.amax((1, 2)) >= -(1 - 1e-8) * ours.amin((1, 2))).all()
        else:
            sums = replace(method, eigen_smooth=False).attribute(score_of(case), case.x)
            assert ((ours * (sums - sums.mean((1, 2), keepdim=True))).sum((1, 2)) >= 0).all()


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_the_two_rules_for_a_sign_differ_where_the_peak_is_a_hole(factor):
    """Channels that all fall at one place: the peak rule turns the hole up, the other leaves it down."""
    acts = torch.zeros(1, 3, 3, 3, dtype=torch.float64)
    acts[0, :, 1, 1] = -9.0 * factor
    hole = first_component(acts, "channels")[0, 1, 1]
    assert_close(hole, acts.new_tensor(-8 * 3**0.5 * factor))
    assert_close(first_component(acts, "peak")[0, 1, 1], hole.abs())


def test_one_image_whose_channels_are_not_finite_does_not_break_the_others():
    acts = images(3, 4, 3, 5)
    spoilt = acts.clone()
    spoilt[1, 2, 0, 0] = torch.inf
    found = first_component(spoilt)
    assert found[1].isnan().all()
    assert_close(found[[0, 2]], first_component(acts)[[0, 2]])


# ---- several layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradcam", "layercam"])
@pytest.mark.parametrize("network", ["resnet18", "shapes-vit", "swin_t"])
def test_several_layers_are_fused_as_grad_cam_does(name, network):
    case = cams.case(network)
    layers = (case.layer, *case.others)
    with PEERS[name](case.net, case.modules(*layers), reshape_transform=case.reshape) as cam:
        expected = torch.from_numpy(cam(case.x, GOALS)).double()
    ours = build({"name": name, "preset": "grad-cam", "layer": list(layers)}).attribute(
        score_of(case), case.x
    )
    assert ours.shape[-2:] == case.x.shape[-2:]
    assert expected.amax((1, 2)).min() > 0.99
    assert_close(scaled(ours, "min-max"), expected, rtol=0, atol=1e-5)  # its maps are float32


@pytest.mark.parametrize("name", ["gradcam", "layercam"])
@pytest.mark.parametrize("network", ["resnet18", "densenet121"])
def test_several_layers_are_fused_as_torch_cam_does(name, network):
    case = cams.case(network)
    layers = [case.layer, *case.others]
    peer = torch_cam.GradCAM if name == "gradcam" else torch_cam.LayerCAM
    with peer(case.net, layers, input_shape=tuple(case.x.shape[1:])) as cam:
        maps = cam(cams.TARGETS, case.net(case.x.clone().requires_grad_()))
        expected = cam.fuse_cams([one.detach() for one in maps])
    method = build({"name": name, "preset": "torch-cam", "layer": layers})
    ours = method.attribute(score_of(case), case.x)
    assert_close(ours, expected, rtol=0, atol=1e-5)  # 1e-8 in its denominators


COARSE, FINE = images(2, 2, 3), images(2, 4, 6, seed=1)
SCALES = {
    "none": lambda m: m,
    "peak": lambda m: m / m.abs().max(),
    "min-max": lambda m: (m - m.min()) / (m.max() - m.min()),
    "tanh": lambda m: torch.tanh(2 * m / m.abs().max()),
    "min-max-tanh": lambda m: torch.tanh(2 * (m - m.min()) / (m.max() - m.min())),
}
FUSIONS = {"mean": lambda a, b: (a + b) / 2, "max": torch.maximum, "product": lambda a, b: a * b}


@pytest.mark.parametrize("size", [None, (8, 12)])
@pytest.mark.parametrize("how", FUSIONS)
@pytest.mark.parametrize("normalise", SCALES)
def test_each_map_is_scaled_then_brought_to_one_grid_then_fused(normalise, how, size):
    expected = []
    for coarse, fine in zip(COARSE, FINE):
        grown = [
            F.interpolate(SCALES[normalise](m)[None, None], size or (4, 6), mode="bilinear")[0, 0]
            for m in (coarse, fine)
        ]
        expected.append(FUSIONS[how](*grown))
    assert_close(fused([COARSE, FINE], how, normalise, size), torch.stack(expected))
    assert_close(fused([FINE, COARSE], how, normalise, size), torch.stack(expected))


def test_fused_known_answers():
    coarse = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    fine = torch.zeros(1, 4, 4)
    fine[0, 0, 0] = 100.0
    for how in FUSIONS:
        both = fused([coarse, fine], how)
        assert both.shape == (1, 4, 4)
        assert both[0, 0, 0] == 1
    assert fused([coarse, fine], "product")[0, 1, 1] == 0
    assert_close(fused([coarse, fine], "mean")[0, 0, 1], coarse.new_tensor(0.375))
    assert fused([coarse], "mean") is coarse


@pytest.mark.parametrize("normalise", SCALES)
def test_a_map_of_zeros_stays_one_and_spoils_no_other(normalise):
    maps = torch.stack([torch.zeros(3, 3), torch.arange(9.0).view(3, 3) + 1])
    found = scaled(maps, normalise)
    assert (found[0] == 0).all()
    assert_close(found[1], SCALES[normalise](maps[1]))


def test_layercam_fuses_by_the_maximum_of_tanh_and_the_others_by_the_mean_of_peaks():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score, layers = bound(net, x, [0, 1]), ("features.0", "relu")
    for method, how in ((LayerCAM, ("max", "tanh")), (GradCAM, ("mean", "peak"))):
        singles = [method(layer=layer).attribute(score, x) for layer in layers]
        assert_close(method(layer=layers).attribute(score, x), fused(singles, *how))


def test_a_list_a_wildcard_and_both_name_the_same_layers():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [0, 1])
    listed = GradCAM(layer=("features.0", "features.2")).attribute(score, x)
    assert listed.shape == (2, 8, 6)
    assert_close(GradCAM(layer="features.[02]").attribute(score, x), listed)
    assert_close(GradCAM(layer=("features.0", "features.[02]", "features.2")).attribute(score, x), listed)
    names = [layer.name for layer in GradCAM(layer="*").looks_at(score.layers)]
    assert "head" not in names
    assert set(names) == {"features", "features.0", "features.1", "features.2", "relu"}
    with pytest.raises(ModelError, match="matches no module"):
        GradCAM(layer="feature.*").attribute(score, x)


def test_pinned_layers_are_those_that_were_found():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [0, 1])
    method = GradCAM(layer="features.[02]")
    pinned = method.pinned(score.layers)
    assert pinned.layer == ("features.0", "features.2")
    assert_close(pinned.attribute(score, x), method.attribute(score, x))
    assert method.pinned(score.layers, ("relu",)).layer == ("relu",)


def test_the_default_layer_of_a_transformer_is_one_that_gets_gradients():
    net, x = made(Tokens), images(2, 3, 16, 16)
    assert bound(net, x, [1, 3]).layers.default.name == "norm1"
    assert GradCAM(relu=False).attribute(bound(net, x, [1, 3]), x).abs().amax((1, 2)).min() > 0


def test_a_map_keeps_its_scale_which_grad_cam_takes_off():
    """Twice the evidence is twice the map; a package that scales every map to [0, 1] shows both alike."""
    case, rows = cams.case("resnet18"), {"target": [1, 7], "image": [0, 1]}
    louder = copy.deepcopy(case.net)
    louder.fc.weight.data[1] *= 2
    maps = [
        GradCAM(layer="layer4").attribute(bound(net, case.x[:2], **rows), case.x[:2])
        for net in (case.net, louder)
    ]
    assert maps[0].amax((1, 2)).min() > 0
    assert_close(maps[1], maps[0] * torch.tensor([2.0, 1.0]).double()[:, None, None])
    goals = [ClassifierOutputTarget(target) for target in rows["target"]]
    peers = []
    for net in (case.net, louder):
        with grad_cam.GradCAM(net, [net.layer4]) as cam:
            peers.append(torch.from_numpy(cam(case.x[:2], goals)))
    assert_close(*peers)


def test_the_order_of_scaling_and_resizing_changes_what_grad_cam_fuses_and_ours_is_said():
    """T1: each layer's map scaled on its own grid and then grown is not the map grown and then scaled."""
    case = cams.case("resnet18")
    layers, size = [case.layer, case.others[0]], tuple(case.x.shape[2:])
    signed = [GradCAM(layer=layer).attribute(case.score, case.x) for layer in layers]
    before = torch.stack([resized(scaled(one, "min-max"), size, "bilinear") for one in signed]).mean(0)
    after = torch.stack([scaled(resized(one, size, "bilinear"), "min-max") for one in signed]).mean(0)
    with grad_cam.GradCAM(case.net, case.modules(*layers)) as cam:
        peer = torch.from_numpy(cam(case.x, GOALS)).double()
    assert (scaled(after, "min-max") - peer).abs().max() > 0.005
    assert_close(scaled(before, "min-max"), peer, rtol=0, atol=2e-5)
    ours = build({"name": "gradcam", "preset": "grad-cam", "layer": layers}).attribute(case.score, case.x)
    assert_close(ours, before)


# ---- views ------------------------------------------------------------------------------------------------------


def peer_of_views(case, layers):
    with grad_cam.GradCAM(case.net, case.modules(*layers), reshape_transform=case.reshape) as cam:
        return torch.from_numpy(cam(case.x, GOALS, aug_smooth=True)).double()


@pytest.mark.soak
@pytest.mark.parametrize("network", ["resnet18", "shapes-vit"])
def test_aug_smooth_of_two_layers_equals_grad_cam(network):
    case = cams.case(network)
    layers = [case.layer, case.others[0]]
    method = build({"name": "gradcam", "preset": "grad-cam", "layer": layers, "aug_smooth": True})
    ours = method.attribute(score_of(case), case.x)
    plain = scaled(replace(method, aug_smooth=False).attribute(score_of(case), case.x), "min-max")
    assert_close(ours, peer_of_views(case, layers), rtol=0, atol=2e-5)  # its maps are float32
    assert (ours - plain).abs().max() > 0.01


@pytest.mark.soak
@pytest.mark.parametrize("network", ["resnet18", "vgg11_bn"])
def test_aug_smooth_of_one_layer_equals_grad_cam(network):
    case = cams.case(network)
    method = build({"name": "gradcam", "preset": "grad-cam", "layer": case.layer, "aug_smooth": True})
    ours = method.attribute(score_of(case), case.x)
    assert ours.shape[1:] == case.x.shape[2:]  # it scales once more at the input's size
    assert_close(ours, peer_of_views(case, [case.layer]), rtol=0, atol=2e-5)


class Overlap(nn.Module):
    """Convolutions with no mirror symmetry, pooled by place, so that every view has a map of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(5, 6, 3, stride=2, padding=1), nn.Tanh())
        self.head = nn.Linear(6 * 4 * 3, 4)

    def forward(self, x):
        return self.head(self.two(self.one(x)).flatten(1))


VIEWED = [
    GradCAM(layer="one", aug_smooth=True),
    HiResCAM(layer="two", relu=False, aug_smooth=True, eigen_smooth=True),
    LayerCAM(layer=("one", "two"), aug_smooth=True),
    EigenCAM(layer="two", aug_smooth=True, normalise="min-max"),
    build({"name": "gradcam", "preset": "grad-cam", "layer": ["one", "two"], "aug_smooth": True}),
]


@pytest.mark.parametrize("method", VIEWED)
def test_aug_smooth_view_by_view_with_rows_unevenly_spread(method):
    net, x = made(Overlap), images(4, 3, 8, 6)
    rows, targets = [0, 0, 0, 2, 3, 3], [3, 1, 0, 2, 2, 1]  # the second image has none
    score = bound(net, x, targets, rows, micro_batch=5)
    expected = 0
    for mirror in (False, True):
        for factor in (0.9, 1.0, 1.1):
            view = (x.flip(3) if mirror else x) * factor
            one = replace(method, aug_smooth=False).attribute(score, view)
            one = torch.stack([SCALES[method.normalise](m) for m in one])
            expected = expected + (one.flip(2) if mirror else one) / 6
    found = method.attribute(score, x)
    assert found.abs().amax((1, 2)).min() > 0
    assert_close(found, expected)
    for row, (image, target) in enumerate(zip(rows, targets)):
        alone = bound(net, x[image : image + 1], [target])
        assert_close(method.attribute(alone, x[image : image + 1])[0], found[row])


def test_views_are_six_and_the_second_of_them_is_the_picture():
    x = images(1, 3, 2, 4)
    assert len(VIEWS) == 6
    assert_close(seen(x, *VIEWS[1]), x)
    assert_close(seen(x, *VIEWS[5])[0, 0, :, 0], 1.1 * x[0, 0, :, 3])


SHARED = [
    {"name": "gradcam", "aug_smooth": True},
    {"name": "layercam", "aug_smooth": True, "eigen_smooth": True, "relu": False, "sign": "channels"},
    {"name": "xgradcam", "preset": "grad-cam", "aug_smooth": True},
]


@pytest.mark.soak
@pytest.mark.parametrize("spec", SHARED, ids=lambda spec: spec["name"])
@pytest.mark.parametrize(
    "promise",
    [
        contract.batch_and_micro_batch_do_not_matter,
        contract.order_and_company_do_not_matter,
        contract.running_out_of_memory_changes_nothing,
    ],
    ids=lambda promise: promise.__name__,
)
def test_views_and_layers_keep_the_promises(promise, spec):
    net = nets.load("shapes-cnn").double()
    with frozen(net):
        promise(build({**spec, "layer": "stages.[01]"}), net, contract.pictures((64, 48)))


# ---- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("layer", ["relu", ("features.0", "relu")])
def test_the_size_is_the_layer_s_own_or_the_one_that_is_asked_for(layer, mode):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score, method = bound(net, x, [0, 1]), GradCAM(layer=layer, relu=False, upsampling=mode)
    native = method.explain(score, x).map
    assert native.shape[-2:] == ((4, 3) if layer == "relu" else (8, 6))
    assert_close(native, method.attribute(score, x))
    for size in ((8, 6), (13, 7), (4, 3)):
        grown = F.interpolate(native[:, None], size, mode=mode)[:, 0]
        assert_close(method.explain(score, x, size).map, grown)


def test_fused_at_the_input_is_of_its_size_and_the_finest_is_not():
    net, x = made(Overlap), images(2, 3, 8, 6)
    net.one[0] = nn.Conv2d(3, 5, 3, padding=1, stride=2).double()
    net.two[0] = nn.Conv2d(5, 6, 1).double()
    score = bound(net, x, [0, 1])
    for where, size in (("finest", (4, 3)), ("input", (8, 6))):
        assert GradCAM(layer=("one", "two"), fused_at=where).attribute(score, x).shape[-2:] == size
