"""CAMs against two independent packages, on networks of each kind, and against answers known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from captum.attr import LayerGradCam, LayerGradientXActivation
from pytorch_grad_cam import EigenCAM as PeerEigenCAM
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam import HiResCAM as PeerHiResCAM
from pytorch_grad_cam import LayerCAM as PeerLayerCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Tokens, bound, images, made

from xcli.demo import nets
from xcli.methods.cam.base import fused
from xcli.methods.cam.gradient import GradCAM, HiResCAM, LayerCAM
from xcli.methods.cam.spectra import first_component
from xcli.methods.cam.spectral import EigenCAM

PEERS = {GradCAM: PeerGradCAM, HiResCAM: PeerHiResCAM, LayerCAM: PeerLayerCAM}


def tokens_to_map(grid):
    return lambda t: t[:, 1:].reshape(len(t), *grid, -1).permute(0, 3, 1, 2)


def built(name):
    """Network, pictures, target layer, and the peer's reshape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        match name:
            case "shapes-cnn":
                return nets.load(name), (64, 48), "stages", None
            case "shapes-vit":
                net = nets.load(name)
                return net, (128, 128), f"blocks.{len(net.blocks) - 1}.norm1", tokens_to_map(net.grid)
            case "resnet18":
                return torchvision.models.resnet18(), (64, 96), "layer4", None
            case "vit_b_16":
                net = torchvision.models.vit_b_16(image_size=64)
                nn.init.normal_(net.heads.head.weight)
                return net, (64, 64), "encoder.layers.encoder_layer_11.ln_1", tokens_to_map((4, 4))
            case "swin_t":
                net = torchvision.models.swin_t()
                return net, (64, 64), "features.7.1.norm2", lambda t: t.permute(0, 3, 1, 2)


@pytest.fixture(scope="module", params=["shapes-cnn", "shapes-vit", "resnet18", "vit_b_16", "swin_t"])
def case(request):
    net, size, layer, reshape = built(request.param)
    return net.double().eval(), images(3, 3, *size), layer, reshape


def peer_map(peer, net, x, layer, targets, reshape):
    """The peer's raw map, before it rectifies, scales and resizes."""
    with peer(net, [net.get_submodule(layer)], reshape_transform=reshape) as cam:
        goals = [ClassifierOutputTarget(target) for target in targets]
        cam(x, goals)
        kept = cam.activations_and_grads
        acts = kept.activations[0].detach().numpy()
        grads = kept.gradients[0].detach().numpy() if kept.gradients else None
        return torch.from_numpy(np.asarray(cam.get_cam_image(x, None, goals, acts, grads, False)))


@pytest.mark.parametrize("method", PEERS, ids=lambda m: m.name)
def test_raw_maps_equal_grad_cam(method, case):
    net, x, layer, reshape = case
    targets = [1, 7, 3]
    expected = peer_map(PEERS[method], net, x, layer, targets, reshape)
    ours = method(layer=layer, relu=False).attribute(bound(net, x, targets), x)
    assert expected.abs().max() > 0
    assert_close(ours, expected, rtol=1e-4, atol=1e-7 * float(expected.abs().max()))
    rectified = method(layer=layer).attribute(bound(net, x, targets), x)
    assert_close(rectified, expected.clamp_min(0), rtol=1e-4, atol=1e-7 * float(expected.abs().max()))


def test_raw_maps_equal_captum(case):
    net, x, layer, reshape = case
    targets = torch.tensor([1, 7, 3])
    score = bound(net, x, targets.tolist())
    product = LayerGradientXActivation(net, net.get_submodule(layer)).attribute(x, targets)
    product = product if reshape is None else reshape(product)
    assert_close(
        HiResCAM(layer=layer, relu=False).attribute(score, x), product.sum(1).detach(), rtol=1e-4, atol=1e-10
    )
    if reshape is None:
        expected = LayerGradCam(net, net.get_submodule(layer)).attribute(x, targets)[:, 0].detach()
        assert_close(GradCAM(layer=layer, relu=False).attribute(score, x), expected, rtol=1e-4, atol=1e-10)


def test_eigencam_equals_grad_cam_up_to_the_sign_which_is_fixed(case):
    net, x, layer, reshape = case
    expected = peer_map(PeerEigenCAM, net, x, layer, [1, 7, 3], reshape)
    ours = EigenCAM(layer=layer).attribute(bound(net, x, [1, 7, 3]), x)
    sign = (ours * expected).sum((1, 2), keepdim=True).sign()
    assert_close(ours, sign * expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert (ours.amax((1, 2)) >= -ours.amin((1, 2))).all()


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
    found = [HiResCAM(layer=layer, relu=False).attribute(bound(own, x, [1, 7]), x) for own in (net, plain)]
    acts = [
        bound(own, x, [1, 7]).activations(x, bound(own, x, [1, 7]).layers.find(layer))[0]
        for own in (net, plain)
    ]
    assert (acts[0] < 0).any()
    assert_close(acts[0], acts[1])
    assert_close(found[0], found[1])


# ---- answers known beforehand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", range(5))
def test_gradcam_equals_cam_on_a_pooled_linear_net(label):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    acts = net.relu(net.features(x)).detach()
    cam = torch.einsum("k,nkhw->nhw", net.head.weight[label].detach(), acts) / (acts.shape[2] * acts.shape[3])
    score = bound(net, x, [label, label])
    assert_close(GradCAM(layer="relu").attribute(score, x), cam.relu())
    assert_close(GradCAM(layer="relu", relu=False).attribute(score, x), cam)
    assert_close(HiResCAM(layer="relu", relu=False).attribute(score, x), cam)


class LinearTail(nn.Module):
    """A layer whose output is flattened into one linear map without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4 * 6 * 5, 3, bias=False)

    def forward(self, x):
        return self.head(self.layer(x).flatten(1))


def test_hirescam_sums_to_the_score_on_a_linear_tail():
    net, x = made(LinearTail), images(2, 3, 6, 5)
    score = bound(net, x, [2, 0])
    assert_close(HiResCAM(layer="layer", relu=False).attribute(score, x).sum((1, 2)), score(x))


def test_layercam_drops_places_that_speak_against_the_class():
    net, x = made(LinearTail), images(2, 3, 6, 5)
    weight = net.head.weight.detach()[[2, 0]].view(2, 4, 6, 5)
    expected = (weight.relu() * net.layer(x).detach()).sum(1)
    assert_close(LayerCAM(layer="layer").attribute(bound(net, x, [2, 0]), x), expected)


@pytest.mark.parametrize("channels", [3, 40])
def test_eigencam_of_a_rank_one_map_is_its_pattern(channels):
    """A_k = v_k * p has one component: the centred pattern times the length of v; both Gram matrices give it."""
    pattern = images(1, 1, 4, 5)
    weights = images(1, channels, 1, 1, seed=1)
    centred = pattern - pattern.mean()
    expected = (centred * weights.norm())[0]
    expected = expected if expected.max() >= -expected.min() else -expected
    assert_close(first_component(pattern * weights), expected)
    assert_close(first_component(-pattern * weights), expected)


def test_eigencam_equals_a_plain_singular_value_decomposition():
    acts = images(2, 7, 5, 3)
    rows = acts.flatten(2).transpose(1, 2)
    rows = rows - rows.mean(1, keepdim=True)
    left, power, _ = torch.linalg.svd(rows, full_matrices=False)
    expected = left[:, :, 0] * power[:, :1]
    expected = expected * expected.gather(1, expected.abs().argmax(1, keepdim=True)).sign()
    assert_close(first_component(acts), expected.view(2, 5, 3))


def test_eigencam_of_a_constant_layer_is_zero():
    assert (first_component(torch.ones(2, 4, 3, 3)) == 0).all()


def test_the_class_token_is_left_out_and_the_rest_is_a_map():
    net, x = made(Tokens), images(2, 3, 16, 16)
    score = bound(net, x, [1, 3])
    (acts,), (grads,), _ = score.gradients(x, at=score.layers.find("norm1"))
    expected = (acts * grads).sum(2)[:, 1:].view(2, 4, 4)
    assert acts.shape == (2, 17, 8)
    assert_close(HiResCAM(layer="norm1", relu=False).attribute(score, x), expected)


def test_the_default_layer_of_a_transformer_is_one_that_gets_gradients():
    net, x = made(Tokens), images(2, 3, 16, 16)
    assert bound(net, x, [1, 3]).layers.default.name == "norm1"
    assert GradCAM(relu=False).attribute(bound(net, x, [1, 3]), x).abs().amax((1, 2)).min() > 0


def test_several_layers_are_scaled_before_they_are_fused():
    coarse = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
    fine = torch.zeros(1, 4, 4)
    fine[0, 0, 0] = 100.0
    for how, corner in {"mean": 1.0, "max": 1.0, "product": 1.0}.items():
        both = fused([coarse, fine], how)
        assert both.shape == (1, 4, 4)
        assert both[0, 0, 0] == corner
    assert fused([coarse, fine], "product")[0, 1, 1] == 0
    assert_close(fused([coarse, fine], "mean")[0, 0, 1], fused([coarse], "mean").new_tensor(0.375))
    assert fused([coarse], "mean") is coarse


def test_a_list_and_a_wildcard_name_the_same_layers():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [0, 1])
    listed = GradCAM(layer=("features.0", "features.2")).attribute(score, x)
    assert listed.shape == (2, 8, 6)
    assert_close(GradCAM(layer="features.[02]").attribute(score, x), listed)
