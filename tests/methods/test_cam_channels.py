"""CAMs that weigh channels without gradients: CAM where it holds and its refusals elsewhere, FEM, random weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import cams
import numpy as np
import pytest
import torch
import torchvision
from pytorch_grad_cam import fem, random_cam
from torch import nn
from torch.testing import assert_close
from torchcam.methods import activation
from toys import PooledLinear, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.methods.cam.channels import FEM, ClassActivationMap, RandomCAM
from xcli.methods.cam.gradient import GradCAM
from xcli.registry import build


def assert_same(ours, theirs):
    assert float(theirs.abs().max()) > 0
    assert_close(ours, theirs.to(ours), rtol=1e-6, atol=1e-7 * float(theirs.abs().max()))


def at(name, layer):
    return replace(cams.case(name), layer=layer)


# ---- CAM -----------------------------------------------------------------------------------------------------------

POOLED = {
    "shapes-cnn": ("stages", None),
    "resnet18": ("layer4", "fc"),
    "vgg11_bn": ("features", "classifier"),
    "swin_t": ("norm", "head"),
}
"""Layers that are averaged right before the last linear layer, and that layer."""


@pytest.mark.parametrize("name", POOLED)
def test_cam_equals_torch_cam_and_adds_up_to_the_logit(name):
    layer, head = POOLED[name]
    case = at(name, layer)
    ours = ClassActivationMap(layer=layer).attribute(case.score, case.x)
    assert_same(ours, cams.torch_cam_map(activation.CAM, case, fc_layer=head))
    head = [part for part in case.net.modules() if isinstance(part, nn.Linear)][-1]
    assert_close(ours.mean((1, 2)) + head.bias.detach()[cams.TARGETS], case.score(case.x))


@pytest.mark.parametrize("label", range(5))
def test_cam_is_gradcam_times_the_number_of_places_on_a_pooled_linear_net(label):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [label, label])
    acts = net.relu(net.features(x)).detach()
    expected = torch.einsum("k,nkhw->nhw", net.head.weight[label].detach(), acts)
    found = ClassActivationMap(layer="relu").attribute(score, x)
    assert_close(found, expected)
    assert_close(found, GradCAM(layer="relu", relu=False).attribute(score, x) * (4 * 3))
    assert_close(ClassActivationMap(layer="relu", relu=True).attribute(score, x), expected.relu())
    assert not found.requires_grad


NOT_POOLED = {
    "shapes-vit": None,  # a class token
    "vit_b_16": None,
    "convnext_tiny": None,  # a norm after the pooling
    "densenet121": "features",  # a ReLU that is no module
    "vgg11_bn": None,  # max pooling follows
    "resnet18": "layer3",  # more layers follow
}


@pytest.mark.parametrize(("name", "layer"), NOT_POOLED.items())
def test_cam_refuses_a_layer_that_is_not_averaged_right_before_the_head(name, layer):
    case = at(name, layer or cams.case(name).layer)
    why = f"cam: the score is no linear function of the mean of layer '{case.layer}' over .*; use gradcam, or"
    with pytest.raises(ModelError, match=why):
        ClassActivationMap(layer=case.layer).attribute(case.score, case.x)
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    with pytest.raises(
        ModelError, match="cam: no linear layer makes logits of .* 'features.0' .*; use gradcam"
    ):
        ClassActivationMap(layer="features.0").attribute(bound(net, x, [0, 1]), x)


def test_torch_cam_gives_a_map_that_adds_up_to_another_number_there():
    case = cams.case("vgg11_bn")
    wrong = cams.torch_cam_map(activation.CAM, case)
    sums = wrong.mean((1, 2)) + case.net.classifier.bias.detach()[cams.TARGETS]
    assert (sums - case.score(case.x)).abs().max() > 0.05  # of logits of 0.2


def test_torch_cam_reads_another_layer_than_it_was_told_where_a_relu_is_in_place():
    """In a DenseNet of torchvision the ReLU after ``features`` rewrites what torch-cam has kept of it."""
    case = at("densenet121", "features")
    (acts,) = case.score.activations(case.x, case.score.layers.find("features"))
    weight = case.net.classifier.weight.detach()[cams.TARGETS]
    theirs = cams.torch_cam_map(activation.CAM, case)
    assert_same(torch.einsum("nk,nkhw->nhw", weight, acts.relu()), theirs)
    assert (torch.einsum("nk,nkhw->nhw", weight, acts) - theirs).abs().max() > 0.1


def test_cam_refuses_the_hidden_layers_of_a_vgg():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.VGG(torchvision.models.vgg.make_layers([8, "M", 16, "M"], True), 10)
        net.classifier = nn.Sequential(nn.Linear(16 * 49, 16), nn.ReLU(True), nn.Linear(16, 10))
    net, x = net.double().eval(), images(2, 3, 28, 28)
    with pytest.raises(ModelError, match="cam: the score is no linear function of .*'features'"):
        ClassActivationMap(layer="features").attribute(bound(net, x, [3, 4]), x)


class Pooled(nn.Module):
    """A layer, a pooling, a head; ``heads`` more of the same shape, of which only the first counts."""

    def __init__(self, head, pool=lambda maps: maps.mean((2, 3)), output=lambda out: out):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.head, self.pool, self.output = head, pool, output

    def forward(self, x):
        return self.output(self.head(self.pool(self.layer(x))))


def pooled(make, *options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pooled(make(), *options).double().eval()


def closed(net, x, weight):
    return torch.einsum("k,nkhw->nhw", weight.detach().flatten(), net.layer(x).detach())


def test_cam_on_heads_of_other_shapes():
    x = images(2, 3, 5, 4)
    binary = pooled(lambda: nn.Linear(6, 1))
    unbiased = pooled(lambda: nn.Linear(6, 3, bias=False))
    point = pooled(
        lambda: nn.Conv2d(6, 3, 1), lambda maps: maps.mean((2, 3), keepdim=True), lambda out: out.flatten(1)
    )
    late = pooled(lambda: nn.Conv2d(6, 3, 1), lambda maps: maps, lambda out: out.mean((2, 3)))
    for net, target in ((binary, 0), (unbiased, 2), (point, 2), (late, 2)):
        found = ClassActivationMap(layer="layer").attribute(bound(net, x, [target, target]), x)
        assert_close(found, closed(net, x, net.head.weight[target]))


def test_cam_finds_the_head_among_others_of_the_same_shape():
    class Two(Pooled):
        def forward(self, x):
            means = self.pool(self.layer(x))
            return {"logits": self.head(means), "other": self.other(means)}

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Two(nn.Linear(6, 3))
        net.other = nn.Linear(6, 4)
    net, x = net.double().eval(), images(2, 3, 5, 4)
    found = ClassActivationMap(layer="layer").attribute(bound(net, x, [1, 1]), x)
    assert_close(found, closed(net, x, net.head.weight[1]))


@pytest.mark.parametrize(
    "net",
    {
        "max": lambda: pooled(lambda: nn.Linear(6, 3), lambda maps: maps.amax((2, 3))),
        "sum": lambda: pooled(lambda: nn.Linear(6, 3), lambda maps: maps.sum((2, 3))),
        "hidden": lambda: pooled(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))),
        "squashed": lambda: pooled(lambda: nn.Linear(6, 3), lambda m: m.mean((2, 3)), torch.tanh),
        "rectified": lambda: pooled(lambda: nn.Linear(6, 3), lambda maps: maps.sigmoid().mean((2, 3))),
    }.values(),
)
def test_cam_refuses_other_poolings_and_what_is_not_linear(net):
    net, x = net(), images(2, 3, 5, 4)
    with pytest.raises(ModelError, match="cam: the score is no linear function"):
        ClassActivationMap(layer="layer").attribute(bound(net, x, [1, 2]), x)


def test_one_image_that_does_not_agree_is_enough_to_refuse():
    """A ReLU on the logits changes nothing as long as they are positive."""
    net = pooled(lambda: nn.Linear(6, 1), lambda maps: maps.mean((2, 3)), torch.relu)
    x = images(8, 3, 5, 4)
    with torch.no_grad():
        net.head.bias.zero_()
        raw = net.head(net.pool(net.layer(x)))[:, 0]
        net.head.bias.fill_(-raw.median())
    positive, one = x[raw > raw.median() + 1e-3], x[raw < raw.median() - 1e-3][:1]
    found = ClassActivationMap(layer="layer").attribute(bound(net, positive, [0] * len(positive)), positive)
    assert_close(found, closed(net, positive, net.head.weight[0]))
    both = torch.cat([positive, one])
    with pytest.raises(ModelError, match="cam: "):
        ClassActivationMap(layer="layer").attribute(bound(net, both, [0] * len(both)), both)


def test_cam_explains_logits_alone():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [0, 1])
    for scale in ("probability", "log-probability", "contrast"):
        with pytest.raises(ModelError, match="or explain the logit"):
            ClassActivationMap(layer="relu").attribute(score.scaled(scale), x)


def test_an_image_that_is_not_finite_refuses_nobody():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    spoilt = x.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    for method in (ClassActivationMap(layer="relu"), FEM(layer="relu"), RandomCAM(layer="relu")):
        found = method.attribute(bound(net, spoilt, [0, 1, 2]), spoilt)
        assert found[1].isnan().any()
        assert_close(found[[0, 2]], method.attribute(bound(net, x, [0, 1, 2]), x)[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cam_allows_for_the_precision_of_the_run(dtype):
    case = cams.case("resnet18")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18().eval()
    x = case.x.float()
    score = bound(net, x, cams.TARGETS)
    if dtype == torch.bfloat16:
        score = replace(score, execution=Execution(2, precision=dtype))
    found = ClassActivationMap(layer="layer4").attribute(score, x)
    exact = ClassActivationMap(layer="layer4").attribute(case.score, case.x)
    error = 1e-4 if dtype == torch.float32 else 0.05
    assert_close(found.double(), exact, rtol=0, atol=error * float(exact.abs().max()))


@pytest.mark.parametrize(("name", "layer"), [("densenet121", "features"), ("vgg11_bn", None)])
@pytest.mark.parametrize("image", [0, 1, 2])
def test_a_lower_precision_makes_no_map_where_there_is_none(name, layer, image):
    case = at(name, layer or cams.case(name).layer)
    net, x = copy.deepcopy(case.net).float(), case.x[image : image + 1].float()
    score = bound(net, x, [cams.TARGETS[image]])
    score = replace(score, execution=Execution(2, precision=torch.bfloat16))
    with pytest.raises(ModelError, match="cam: the score is no linear function"):
        ClassActivationMap(layer=case.layer).attribute(score, x)


# ---- FEM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cams.CASES)
def test_fem_with_the_preset_of_grad_cam_equals_it(name):
    case = cams.case(name)
    sigmas = 2.0 if name in ("shapes-cnn", "resnet18") else 1.0  # 2x2 places are never 2 deviations above
    ours = build({"name": "fem", "preset": "grad-cam", "layer": case.layer, "sigmas": sigmas, "relu": False})
    peer = cams.grad_cam_map(fem.FEM, case, k=sigmas)
    assert_same(ours.attribute(case.score, case.x), peer)
    assert_same(replace(ours, relu=True).attribute(case.score, case.x), peer.clamp_min(0))


def literal(channels, sigmas, reaches):
    """The sum over channels of their mean, where they are above it by some standard deviations; (K, h, w)."""
    found = np.zeros(channels.shape[1:])
    for channel in channels:
        mean = channel.sum() / channel.size
        sigma = np.sqrt(((channel - mean) ** 2).sum() / channel.size)
        for place, value in np.ndenumerate(channel):
            found[place] += mean if reaches(value, mean + sigmas * sigma) else 0
    return found


@pytest.mark.parametrize("sigmas", [0.5, 2.0])
def test_fem_is_the_sum_of_the_means_of_the_channels_that_stand_out(sigmas):
    case = cams.case("shapes-cnn")
    score = bound(case.net, case.x, [1, 2, 3, 4], [0, 0, 1, 2])
    (acts,) = score.activations(case.x, score.layers.find(case.layer))
    expected = [torch.from_numpy(literal(one.numpy(), sigmas, np.greater)) for one in acts]
    found = FEM(layer=case.layer, sigmas=sigmas).attribute(score, case.x)
    assert found.abs().max() > 0
    assert_close(found, torch.stack(expected)[[0, 0, 1, 2]])  # no class in it
    xplique = build({"name": "fem", "preset": "xplique", "layer": case.layer, "sigmas": sigmas})
    assert_close(xplique.attribute(score, case.x), found)  # no place is exactly at the threshold
    assert xplique.upsampling == "bicubic"


def test_fem_by_hand():
    acts = torch.zeros(1, 3, 2, 3, dtype=torch.float64)
    acts[0, 0, 0, 1] = 6  # mean 1, deviation sqrt(5): 6 is above 1 + 2 sqrt(5) = 5.47
    acts[0, 1] = 4  # constant: nowhere above its mean
    acts[0, 2] = torch.tensor([[2.0, 0.0, 2.0], [0.0, 2.0, 0.0]])  # mean 1, deviation 1
    assert FEM().map(acts)[0].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert FEM(sigmas=1).map(acts)[0].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert build({"name": "fem", "preset": "xplique"}).map(acts)[0].tolist() == [[4, 5, 4], [4, 4, 4]]
    reached = build({"name": "fem", "preset": "xplique", "sigmas": 1.0}).map(acts)
    assert reached[0].tolist() == [[5, 5, 5], [4, 5, 4]]
    peer = build({"name": "fem", "preset": "grad-cam", "sigmas": 0.5}).map(acts)
    assert_close(peer[0], acts[0, 0] / 6 + acts[0, 2] / 2)


@pytest.mark.parametrize(("places", "count"), [(4, 0), (5, 0), (6, 1)])
def test_fem_needs_more_than_five_places_at_two_deviations(places, count):
    acts = torch.zeros(1, 1, 1, places, dtype=torch.float64)
    acts[..., 0] = 1
    assert int((FEM().map(acts) > 0).sum()) == count
    assert int((FEM().map(acts.square() + images(1, 1, 1, places) * 1e-3) != 0).sum()) == count


# ---- random weights ------------------------------------------------------------------------------------------------


def weights(method, score, x, layer):
    """The weights (N, K) it drew, from its weighted channels."""
    (channels,) = method.channels(score, x, score.layers.find(layer))
    (acts,) = score.activations(x, score.layers.find(layer))
    return channels.sum((2, 3)) / score.layers.find(layer)[0].maps(acts)[score.image].sum((2, 3))


@pytest.mark.parametrize("name", ["swin_t", "shapes-vit"])
def test_random_cam_equals_grad_cam_with_the_same_draws(name, monkeypatch):
    case = cams.case(name)
    drawn = weights(RandomCAM(), case.score, case.x, case.layer).numpy()
    monkeypatch.setattr(
        np.random, "uniform", lambda low, high, size: {(-1, 1, drawn.shape): drawn}[low, high, size]
    )
    peer = cams.grad_cam_map(random_cam.RandomCAM, case)
    assert_same(RandomCAM(layer=case.layer, relu=False).attribute(case.score, case.x), peer)
    rectified = build({"name": "random-cam", "preset": "grad-cam", "layer": case.layer})
    assert_same(rectified.attribute(case.score, case.x), peer.clamp_min(0))


def test_random_weights_are_uniform_and_one_draw_an_image_and_layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = nn.Conv2d(3, 384, 2, stride=2), nn.Conv2d(384, 768, 2, stride=2)
        net = nn.Sequential(*stages, nn.Flatten(), nn.Linear(768 * 4, 5))
    net, x = net.double().eval(), images(3, 3, 8, 8)
    score = bound(net, x, [1, 2, 3, 4], [0, 0, 1, 2])
    deep = weights(RandomCAM(), score, x, "1")  # (4, 768)
    assert_close(deep[0], deep[1])
    assert_close(deep[2:], weights(RandomCAM(), bound(net, x, [0, 0, 0]), x, "1")[1:])
    for one, other in ((0, 2), (0, 3), (2, 3)):
        assert (deep[one] - deep[other]).abs().max() > 0.5
    assert -1 <= deep.min() < -0.98 < 0.98 < deep.max() <= 1
    assert deep[1:].mean().abs() < 4 * (1 / 3 / 2304) ** 0.5
    assert abs(float(deep[1:].var()) - 1 / 3) < 4 * (4 / 45 / 2304) ** 0.5
    shallow = weights(RandomCAM(), score, x, "0")
    assert (shallow - deep[:, :384]).abs().max() > 0.5
    assert (weights(RandomCAM(), replace(score, seed=1), x, "1") - deep).abs().max() > 0.5


@pytest.mark.parametrize("method", [FEM, RandomCAM])
def test_the_class_token_is_left_out(method):
    net, x = made(Tokens), images(2, 3, 16, 16)
    score = bound(net, x, [1, 3])
    assert method(layer="norm1").attribute(score, x).shape == (2, 4, 4)


@pytest.mark.parametrize("method", [ClassActivationMap, FEM, RandomCAM])
def test_maps_can_be_differentiated_by_the_images(method):
    net, x, step = made(PooledLinear), images(2, 3, 8, 6), 1e-6 * images(2, 3, 8, 6, seed=1)
    score, asked = replace(bound(net, x, [0, 3]), create_graph=True), method(layer="relu", relu=False)
    pixels = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(asked.attribute(score, pixels).square().sum(), pixels)
    up, down = (asked.attribute(score, x + way * step).square().sum() for way in (1, -1))
    assert_close((grad * step).sum(), (up - down).detach() / 2, rtol=1e-6, atol=0)
