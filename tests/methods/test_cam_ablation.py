"""Ablation-CAM against a loop of whole passes, closed forms, and the grad-cam package with its traps."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import contract
import pytest
import torch
from cams import NARROW, TARGETS, Case, grad_cam_map, narrow
from pytorch_grad_cam import AblationCAM as PeerAblationCAM
from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from test_replay import Dense
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.methods.cam.ablation import AblationCAM
from xcli.registry import build

GRAD_CAM = AblationCAM.presets["grad-cam"]
IMAGE, TARGET = [0, 0, 1, 2], [2, 0, 1, 2]


def weights(method: AblationCAM, net: nn.Module, x: Tensor, layer: str) -> Tensor:
    """w_k of every row (N, K): what the weighted channels are, divided by the channels."""
    score = bound(net, x, TARGET, IMAGE)
    (place,) = score.layers.find(layer)
    (channels,) = method.channels(score, x, [place])
    maps = place.maps(score.activations(x, [place])[0])[score.image]
    return (channels * maps).sum((2, 3)) / maps.square().sum((2, 3)).clamp_min(1e-300)


def literal(net: nn.Module, x: Tensor, layer: str, axis: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    """(y_c - y_c without channel k) / |y_c|, one pass of the whole network for every row and channel."""

    def answer(image: int, target: int, channel: int | None) -> Tensor:
        def take_out(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
            out = out.clone()
            if channel is not None:
                out.select(axis, channel).fill_(value(out))
            return out

        handle = net.get_submodule(layer).register_forward_hook(take_out)
        try:
            with torch.no_grad():
                return net(x[image][None])[0, target]
        finally:
            handle.remove()

    sizes: list[int] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *a: sizes.append(a[2].shape[axis]))
    net(x[:1])
    handle.remove()
    rows = []
    for image, target in zip(IMAGE, TARGET, strict=True):
        whole = answer(image, target, None)
        lost = torch.stack([whole - answer(image, target, k) for k in range(sizes[0])])
        rows.append(lost / whole.abs())
    return torch.stack(rows)


def nothing(out: Tensor) -> Tensor:
    return out.new_zeros(())


def below(out: Tensor) -> Tensor:
    return nothing(out) if out.min() == 0 else out.min() - 1e7


@pytest.mark.parametrize(
    ("kind", "layer", "axis"),
    [
        (Residual, "stem", 1),
        (Residual, "block", 1),
        (Residual, "last", 1),
        (Dense, "first", 1),
        (Dense, "inner.0", 1),
        (Dense, "inner.2", 1),
        (Tokens, "norm1", -1),
        (Tokens, "mlp.0", -1),
    ],
)
@pytest.mark.parametrize(("ablated", "value"), [("zero", nothing), ("below", below)])
def test_weights_equal_a_loop_of_whole_passes(kind, layer, axis, ablated, value):
    net, x = made(kind), images(3, 3, 16, 16)
    found = weights(AblationCAM(layer=layer, ablated=ablated), net, x, layer)
    expected = literal(net, x, layer, axis, value)
    assert expected.abs().amax(1).min() > 1e-6
    assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_weights_equal_a_loop_of_whole_passes_where_channels_come_last(name):
    case = narrow(name)
    found = weights(AblationCAM(layer=case.layer), case.net, case.x, case.layer)
    assert_close(found, literal(case.net, case.x, case.layer, -1, nothing), rtol=1e-8, atol=1e-10)


# ---- answers known beforehand ----------------------------------------------------------------------------------


def test_a_pooled_linear_tail_has_a_closed_form():
    """y = sum_k W_ck mean(A_k) + b_c, so that w_k = W_ck mean(A_k) / |y|."""
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    acts = net.relu(net.features(x)).detach()[IMAGE]
    share = net.head.weight.detach()[TARGET] * acts.mean((2, 3))
    score = share.sum(1) + net.head.bias.detach()[TARGET]
    parts = {"magnitude": share / score.abs()[:, None], "score": share / score[:, None], "none": share}
    assert (score < 0).any()
    assert (score > 0).any()
    for divide, weight in parts.items():
        expected = torch.einsum("nk,nkhw->nhw", weight, acts)
        method = AblationCAM(layer="relu", divide=divide, relu=False)
        assert_close(method.attribute(bound(net, x, TARGET, IMAGE), x), expected)
        rectified = AblationCAM(layer="relu", divide=divide).attribute(bound(net, x, TARGET, IMAGE), x)
        assert_close(rectified, expected.relu())


def test_the_sign_of_the_score_turns_the_published_map_but_not_ours():
    """A constant added to the logits changes no ablation; the published map turns round where the sum is negative."""
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    for preset, turns in (("paper", False), ("published", True)):
        found = []
        for bias in (100.0, -100.0):
            nn.init.constant_(net.head.bias, bias)
            method = build({"name": "ablationcam", "preset": preset, "layer": "relu", "relu": False})
            found.append(method.attribute(bound(net, x, TARGET, IMAGE), x))
        agreement = torch.nn.functional.cosine_similarity(found[0].flatten(1), found[1].flatten(1))
        assert_close(agreement, torch.full((4,), -1.0 if turns else 1.0, dtype=torch.float64))


def test_a_channel_that_the_tail_ignores_weighs_nothing():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    with torch.no_grad():
        net.head.weight[:, 3] = 0
    found = weights(AblationCAM(layer="relu"), net, x, "relu")
    assert (found[:, 3] == 0).all()
    assert (found != 0).any(0).sum() == 7


def test_a_copy_serves_all_rows_of_its_image():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, TARGET, IMAGE)
    method = AblationCAM(layer="relu")
    method.attribute(score, x)  # what the tail is like is learnt once
    seen: list[int] = []
    handle = net.head.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    method.attribute(score, x)
    handle.remove()
    assert (
        sum(seen) == len(x) + len(x) + len(x) * 8
    )  # the pass that is kept, the scores, a copy for each channel


def test_rows_that_are_not_finite_leave_the_others_alone():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    for options in ({}, {"ratio": 0.25}, {"ablated": "below"}, {"eigen_smooth": True}):
        method = AblationCAM(layer="relu", **options)
        whole = method.attribute(bound(net, x, TARGET, IMAGE), x)
        broken = x.clone()
        broken[1, 0, 0, 0] = torch.nan
        found = method.attribute(bound(net, broken, TARGET, IMAGE), broken)
        assert found[2].isnan().any()
        assert_close(found[[0, 1, 3]], whole[[0, 1, 3]])


def test_the_value_below_all_others_stays_finite_in_half_precision():
    acts = torch.tensor([[[[-1.0, 2.0]]], [[[0.0, 3.0]]]], dtype=torch.float16)
    found = AblationCAM(ablated="below").replacement(acts)
    assert found.shape == (2, 1, 1)
    assert found.flatten().tolist() == [torch.finfo(torch.float16).min, 0]
    assert AblationCAM(ablated="below").replacement(acts.double()).flatten().tolist() == [-1 - 1e7, 0]


def test_channels_are_tried_from_both_ends_of_the_overlap():
    """One place stands out. Channels on it overlap fully, those beside it not at all, constant ones are never tried."""
    maps = torch.zeros(1, 6, 2, 4, dtype=torch.float64)
    maps[0, 0, 0, 0] = 90.0  # overlap 1
    maps[0, 1, 0, 0], maps[0, 1, 1, 1] = 2.0, 0.5  # overlap 0.8
    maps[0, 2] = 3.0  # constant
    maps[0, 4, 0, 0], maps[0, 4, 1, 3] = 0.2, 0.3  # overlap 0.4
    maps[0, 5, 1, 2] = -0.1  # overlap 0
    tried = {
        ratio: AblationCAM(ratio=ratio).tried(maps)[0].nonzero()[:, 0].tolist() for ratio in (0.01, 0.2, 0.34)
    }
    assert tried == {0.01: [0, 5], 0.2: [0, 5], 0.34: [0, 1, 4, 5]}
    assert AblationCAM().tried(maps).all()


def test_channels_not_tried_weigh_nothing_and_the_others_as_ever():
    case = narrow("resnet")
    every = weights(AblationCAM(layer=case.layer), case.net, case.x, case.layer)
    some = weights(AblationCAM(layer=case.layer, ratio=0.2), case.net, case.x, case.layer)
    assert ((some != 0).sum(1) == 8).all()  # 24 channels: four of either end
    assert_close(some, torch.where(some != 0, every, 0.0))


def test_a_graph_is_refused():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, TARGET, IMAGE)
    kept = type(score)(**{**vars(score), "create_graph": True})
    with pytest.raises(ModelError, match="trained through"):
        AblationCAM(layer="relu").attribute(kept, x)


# ---- against grad-cam ------------------------------------------------------------------------------------------


def peer_map(case: Case, batch_size: int = 1, eigen_smooth: bool = False, **options: float) -> Tensor:
    own = AblationLayer() if case.reshape is None else AblationLayerVit()
    return grad_cam_map(
        PeerAblationCAM, case, (), eigen_smooth, ablation_layer=own, batch_size=batch_size, **options
    )


def our_map(case: Case, **options: object) -> Tensor:
    return AblationCAM(**{**GRAD_CAM, "layer": case.layer, "relu": False, **options}).attribute(
        case.score, case.x
    )


def assert_near(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> None:
    """Equal to ``share`` of the map's largest value: the peer keeps scores and weights in float32."""
    peak = theirs.abs().amax((1, 2), keepdim=True).double()
    assert (peak > 0).all()
    assert_close(ours / peak, theirs / peak, rtol=0, atol=share)


@pytest.mark.parametrize("name", NARROW)
def test_raw_maps_equal_grad_cam(name):
    assert_near(our_map(narrow(name)), peer_map(narrow(name)))


@pytest.mark.parametrize("ratio", [0.15, 0.4])
@pytest.mark.parametrize("name", ["densenet", "convnext", "vit", "swin"])
def test_raw_maps_of_some_channels_equal_grad_cam(name, ratio):
    assert_near(our_map(narrow(name), ratio=ratio), peer_map(narrow(name), ratio_channels_to_ablate=ratio))


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_grad_cam_spends_its_ratio_on_dead_channels():
    """Their overlap is 0 / 0, which it sorts above all others."""
    case = narrow("resnet")
    score, (layer,) = case.score, case.score.layers.find(case.layer)
    maps = layer.maps(score.activations(case.x, [layer])[0])
    dead = maps.flatten(2).amax(2) == 0
    ours = AblationCAM(ratio=0.2).tried(maps)
    assert dead.any(1).all()
    for image, channels in enumerate(maps):
        theirs = AblationLayer().activations_to_be_ablated(channels.numpy(), 0.2)
        lost = dead[image].nonzero()[:, 0].tolist()
        assert len(set(lost) & set(theirs[:4].tolist())) == min(len(lost), 4)
        assert not ours[image, lost].any()
        assert len(ours[image].nonzero()) == 8


def test_smoothed_maps_equal_grad_cam_up_to_the_sign_which_is_fixed():
    ours, theirs = our_map(narrow("resnet"), eigen_smooth=True), peer_map(narrow("resnet"), eigen_smooth=True)
    assert_near(ours, theirs * (ours * theirs).sum((1, 2), keepdim=True).sign())


def test_finished_maps_of_several_layers_equal_grad_cam():
    case, layers = (
        narrow("resnet"),
        ("layer2", "layer4"),
    )  # in the order in which they run: the peer pairs them by that
    goals = [ClassifierOutputTarget(target) for target in TARGETS]
    with PeerAblationCAM(
        case.net, case.modules(*layers), ablation_layer=AblationLayer(), batch_size=1
    ) as cam:
        theirs = torch.from_numpy(cam(case.x, goals)).double()
    ours = AblationCAM(**{**GRAD_CAM, "layer": layers}).attribute(case.score, case.x)
    low = ours.amin((1, 2), keepdim=True)
    assert_close((ours - low) / (ours.amax((1, 2), keepdim=True) - low), theirs, rtol=0, atol=1e-5)


class Unrectified(nn.Module):
    """A linear tail of a layer with negative activations: nothing saturates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean((2, 3)))


def test_grad_cams_numbers_depend_on_its_batch_size_where_activations_are_negative():
    """Its value is less than the smallest activation *of the batch so far*, so that it sinks with every copy."""
    case = Case("unrectified", made(Unrectified), images(3, 3, 8, 8), "layer")
    acts = case.net.layer(case.x).detach()
    low = acts.amin((1, 2, 3))[:, None]

    def closed(depth: Tensor) -> Tensor:
        part = case.net.head.weight[TARGETS] * (acts.mean((2, 3)) - (low - depth * 1e7))
        return torch.einsum("nk,nkhw->nhw", (part / case.score(case.x)[:, None]).detach(), acts)

    assert (low < 0).all()
    assert_near(our_map(case), closed(torch.ones(4)))
    assert_near(peer_map(case), closed(torch.ones(4)))
    assert_near(peer_map(case, batch_size=2), closed(torch.tensor([1.0, 2, 1, 2])))
    assert_near(peer_map(case, batch_size=4), closed(torch.tensor([1.0, 2, 3, 4])))


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_grad_cam_forgets_channels_where_a_ratio_above_one_half_names_some_twice():
    case = narrow("resnet")
    theirs, all_of_them = peer_map(case, ratio_channels_to_ablate=0.75), peer_map(case)
    assert (theirs - all_of_them).abs().max() > 0.1 * all_of_them.abs().max()
    assert_near(our_map(case, ratio=0.75), all_of_them)


def test_an_exception_leaves_grad_cams_network_altered_and_ours_as_found():
    case = narrow("vgg")
    net, x = deepcopy(case.net), case.x
    layer = net.get_submodule(case.layer)
    first, second = PeerAblationCAM(net, [layer]), PeerAblationCAM(net, [layer])
    assert first.ablation_layer is second.ablation_layer  # one object for all that name none

    class Stop(Exception):
        pass

    calls: list[int] = []

    def explode(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:  # the pass that is kept, the scores themselves, copies
            raise Stop

    ours = deepcopy(case.net)
    score = bound(ours, x, TARGETS, micro_batch=4)
    AblationCAM(layer=case.layer).attribute(score, x)
    before = contract.snapshot(ours)
    handle = ours.classifier[2].register_forward_pre_hook(explode)
    with pytest.raises(Stop):
        AblationCAM(layer=case.layer).attribute(score, x)
    handle.remove()
    assert contract.snapshot(ours) == before

    calls.clear()
    handle = net.classifier[2].register_forward_pre_hook(explode)
    with pytest.raises(Stop):
        first(x, [ClassifierOutputTarget(target) for target in TARGETS])
    handle.remove()
    assert net.get_submodule(case.layer) is first.ablation_layer
    with pytest.raises(AssertionError):
        assert_close(net(x), case.net(x))
