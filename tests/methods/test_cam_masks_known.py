"""CAMs of masks made of channels: answers known beforehand, passes and memory, options."""

from __future__ import annotations

import math

import cams
import contract
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

from xcli.hooks import frozen
from xcli.methods.cam.masks import ISCAM, SSCAM, ScoreCAM, most_varied
from xcli.methods.cam.spectra import first_component
from xcli.registry import build


def maps_of(case):
    """The channels (N, K, h, w) of the case's layer."""
    (layer,) = case.score.layers.find(case.layer)
    (acts,) = case.score.activations(case.x, at=[layer])
    return layer.maps(acts)


class Quarters(nn.Module):
    """Channels that show the four quarters of the picture; logit l adds up ``strength`` times the pixels of one."""

    def __init__(self, strength=1.0, bias=0.0):
        super().__init__()
        self.pool = nn.AvgPool2d(4)
        self.layer = nn.Identity()
        self.strength, self.bias = (
            nn.Parameter(torch.tensor(strength, dtype=torch.float64)),
            nn.Parameter(torch.tensor(bias)),
        )

    def forward(self, x):
        cells = self.pool(x[:, :1])  # (N, 1, 2, 2)
        own = self.layer(cells * torch.eye(4, dtype=x.dtype).view(4, 2, 2))  # channel k shows quarter k
        return self.strength * 16 * cells.flatten(1) + self.bias + 0 * own.flatten(1)[:, :1]


def quarters(**how):
    return Quarters(**how).double().eval(), torch.ones(2, 3, 8, 8, dtype=torch.float64)


def test_a_channel_weighs_as_much_as_its_mask_lets_through():
    """On a picture of ones, class l scores its quarter of mask k: s_kl = strength * sum of H_k there."""
    net, x = quarters(strength=0.1)
    found = ScoreCAM(layer="layer").attribute(bound(net, x, [0, 3]), x)
    planes = torch.eye(4, dtype=torch.float64).view(4, 2, 2)
    masks = F.interpolate(planes[:, None], size=(8, 8), mode="bilinear")[:, 0]
    masks = (masks - masks.amin((1, 2), keepdim=True)) / (masks.amax((1, 2)) - masks.amin((1, 2)))[
        :, None, None
    ]
    passed = 0.1 * F.avg_pool2d(masks[:, None], 4).flatten(1) * 16  # (K, quarter)
    for row, label in enumerate((0, 3)):
        assert_close(found[row], torch.einsum("k,khw->hw", passed[:, label].softmax(0), planes))


@pytest.mark.parametrize("label", range(4))
def test_a_channel_that_dominates_is_the_map(label):
    net, x = quarters(strength=40.0)
    found = ScoreCAM(layer="layer").attribute(bound(net, x, [label, label]), x)
    assert_close(found, torch.eye(4, dtype=torch.float64)[label].view(1, 2, 2).expand(2, 2, 2))


@pytest.mark.parametrize("method", [ScoreCAM(), SSCAM(samples=2), ISCAM(samples=2)], ids=lambda m: m.name)
def test_a_constant_network_gives_the_mean_of_the_channels(method):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    nn.init.zeros_(net.head.weight)
    acts = net.relu(net.features(x)).detach()
    found = type(method)(**{**vars(method), "layer": "relu"}).attribute(bound(net, x, [1, 3]), x)
    assert_close(found, acts.mean(1))


def test_a_constant_channel_is_a_mask_of_zeros_however_it_is_rounded():
    """Up-sampling 0.1 in float32 is no constant any more; scaling it would make a mask out of rounding."""
    flat = torch.full((1, 1, 7, 7), 0.1)
    large = F.interpolate(flat, size=(50, 50), mode="bilinear", align_corners=False)
    assert large.amax() > large.amin()  # the trap
    for method in (ScoreCAM(), ScoreCAM(scaled_at="layer"), ScoreCAM(align_corners=True, eps=1e-8)):
        assert (method.masks(method.planes(flat), (50, 50)) == 0).all()


def test_the_authors_leave_constant_channels_out_and_the_paper_does_not():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    with torch.no_grad():
        net.features[2].weight[:4] = 0
        net.features[2].bias[:4] = 0.5  # four channels of 0.5 everywhere
    score = bound(net, x, [0, 2])
    found = build({"name": "scorecam", "preset": "original", "layer": "relu"}).attribute(score, x)
    acts = net.relu(net.features(x)).detach()
    assert (acts[:, :4] == 0.5).all()
    scores = ScoreCAM(layer="relu", weights="probability").scores(score, x, acts)[:, 0]
    blank = net(torch.zeros_like(x)).softmax(1)
    assert_close(scores[:, :4], torch.stack([blank[0, 0], blank[1, 2]])[:, None].expand(2, 4).detach())
    assert_close(found, torch.einsum("nk,nkhw->nhw", scores[:, 4:], acts[:, 4:]).relu())
    paper = ScoreCAM(layer="relu").scores(score, x, acts)[:, 0].softmax(1)
    assert_close(ScoreCAM(layer="relu").attribute(score, x), torch.einsum("nk,nkhw->nhw", paper, acts).relu())
    assert (paper[:, :4] > 0).all()


def test_masks_run_from_zero_to_one_and_eps_is_added_to_their_range():
    planes = images(5, 3, 3, 4)
    method = ScoreCAM()
    masks = method.masks(method.planes(planes).flatten(0, 1)[:, None], (20, 17))
    assert (masks.amin((2, 3)) == 0).all()
    assert (masks.amax((2, 3)) == 1).all()
    small = ScoreCAM(eps=1.0)
    span = F.interpolate(planes, size=(20, 17), mode="bilinear").flatten(2).aminmax(dim=2)
    span = (span.max - span.min).view(15, 1, 1, 1)
    assert_close(
        small.masks(small.planes(planes).flatten(0, 1)[:, None], (20, 17)), masks * span / (span + 1)
    )


def test_without_noise_and_with_one_step_they_are_scorecam():
    case = cams.narrow("vgg")
    plain = ScoreCAM(layer=case.layer).attribute(case.score, case.x)
    for same in (
        SSCAM(layer=case.layer, std=0.0, samples=2),
        ISCAM(layer=case.layer, samples=1),
        ISCAM(layer=case.layer, samples=1, path="cumulative"),
    ):
        assert_close(same.attribute(case.score, case.x), plain)
    assert not torch.allclose(SSCAM(layer=case.layer, samples=2).attribute(case.score, case.x), plain)


def test_noise_cancels_on_a_linear_network():
    """f(x (H_k + d)) = f(x H_k) + (f(x d) - f(0)): the same for every channel, for they share the field d."""
    net, x = quarters(strength=0.2, bias=3.0)
    score = bound(net, x, [1, 2])
    smooth = SSCAM(layer="layer", samples=3, std=5.0).attribute(score, x)
    assert_close(smooth, ScoreCAM(layer="layer").attribute(score, x))


@pytest.mark.parametrize(("path", "factor"), [("linear", 5 / 8), ("cumulative", 30 / 24)])
def test_iscam_on_a_linear_network_is_scorecam_of_a_weaker_or_stronger_one(path, factor):
    """f(c x) = c f(x), so the mean over S = 4 steps is f times (S + 1) / 2 S, or (S + 1) (S + 2) / 6 S."""
    net, x = quarters(strength=0.2)
    other, _ = quarters(strength=0.2 * factor)
    found = ISCAM(layer="layer", samples=4, path=path).attribute(bound(net, x, [1, 2]), x)
    assert_close(found, ScoreCAM(layer="layer").attribute(bound(other, x, [1, 2]), x))


def test_noise_is_of_the_image_and_the_sample_alone():
    net, x = quarters()
    score, method = bound(net, x, [0, 1, 2], [0, 0, 1]), SSCAM(std=1.5)
    masks, image, turn = (
        torch.zeros(6, 1, 40, 50),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([0, 0, 1, 0, 1, 1]),
    )
    fields = method.varied(masks, score, image, turn)[:, 0]
    assert_close(fields[0], fields[1])  # two channels
    assert_close(fields[4], fields[5])
    different = fields[[0, 2, 3, 4]].flatten(1)
    assert different.corrcoef().triu(1).abs().max() < 0.1
    assert_close(different.std(1), torch.full((4,), 1.5), rtol=0.05, atol=0)
    some = torch.tensor([2, 4])
    assert_close(method.varied(masks[some], score, image[some], turn[some])[:, 0], fields[some])


# ---- passes, memory, options -----------------------------------------------------------------------------------


def batches_of(net, run):
    seen = []
    handle = net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize(("method", "passes"), [(ScoreCAM, 8), (SSCAM, 24), (ISCAM, 24)])
def test_rows_share_passes_and_images_share_micro_batches(method, passes):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    options = {} if method is ScoreCAM else {"samples": 3}
    one = bound(net, x, [0, 1, 2], micro_batch=5)
    several = bound(net, x, [0, 1, 2, 0, 4], [0, 0, 1, 2, 2], micro_batch=5)
    counts = [
        batches_of(net, lambda score=score: method(layer="relu", **options).attribute(score, x))
        for score in (one, several)
    ]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 3 + 3 * passes
    assert len(counts[0]) == 1 + math.ceil(3 * passes / 5)  # full but for the last, across images


def test_masked_copies_keep_the_layout_of_the_images():
    net, x = made(PooledLinear), images(3, 3, 8, 6).contiguous(memory_format=torch.channels_last)
    seen = []
    score = bound(net, x, [0, 1, 2])
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ScoreCAM(layer="relu").attribute(score, x)
    assert len(seen) == 2
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


def test_eigen_smooth_takes_the_first_component_of_the_weighted_channels():
    case = cams.narrow("swin")
    acts = maps_of(case)
    weights = ScoreCAM(layer=case.layer).scores(case.score, case.x, acts)[:, 0].softmax(1)
    found = ScoreCAM(layer=case.layer, eigen_smooth=True, relu=False).attribute(case.score, case.x)
    assert_close(found, first_component(weights[:, :, None, None] * acts))


def test_the_channels_that_vary_most_are_chosen_image_by_image():
    maps = images(2, 5, 6, 6)
    maps = maps * torch.tensor([[1, 5, 2, 0, 4], [3, 0, 1, 2, 9]], dtype=torch.float64)[:, :, None, None]
    assert_close(most_varied(maps, 2), torch.stack([maps[0, [1, 4]], maps[1, [0, 4]]]))
    assert most_varied(maps, 5) is maps
    assert most_varied(maps, None) is maps


def test_fewer_channels_are_scorecam_of_a_smaller_layer():
    case = cams.narrow("resnet")
    acts = most_varied(maps_of(case), 6)
    weights = ScoreCAM().scores(case.score, case.x, acts)[:, 0].softmax(1)
    found = ScoreCAM(layer=case.layer, most=6).attribute(case.score, case.x)
    assert_close(found, torch.einsum("nk,nkhw->nhw", weights, acts).relu())
    everything = ScoreCAM(layer=case.layer, most=1000).attribute(case.score, case.x)
    assert_close(everything, ScoreCAM(layer=case.layer).attribute(case.score, case.x))


@pytest.mark.parametrize("method", [ScoreCAM(), SSCAM(samples=2), ISCAM(samples=2)], ids=lambda m: m.name)
def test_an_image_that_is_not_finite_spoils_its_own_rows_only(method):
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    good = method.attribute(bound(net, x, [0, 1, 2]), x)
    x[1, 0, 2, 2] = math.nan
    found = method.attribute(bound(net, x, [0, 1, 2]), x)
    assert found[1].isnan().all()
    assert_close(found[[0, 2]], good[[0, 2]])


def test_an_exception_among_the_masks_leaves_the_network_as_found():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    before, passes = contract.snapshot(net), []

    def explode(*_):
        passes.append(None)
        if len(passes) > 3:
            raise RuntimeError("stop")

    with frozen(net):
        score = bound(net, x, [0, 1], micro_batch=3)
        handle = net.head.register_forward_pre_hook(explode)
        with pytest.raises(RuntimeError, match="stop"):
            ScoreCAM(layer="relu").attribute(score, x)
        handle.remove()
    assert contract.snapshot(net) == before


def test_maps_can_be_trained_through():
    """The derivative of the map by the strength of Quarters, against a difference quotient."""

    def total(strength, **how):
        net, x = quarters(strength=strength)
        score = bound(net, x, [0, 3])
        score = type(score)(**{**vars(score), **how})
        return net, (ScoreCAM(layer="layer").attribute(score, x)[:, 0] ** 2).sum()

    net, value = total(0.1, create_graph=True)
    (slope,) = torch.autograd.grad(value, net.strength)
    step = 1e-5
    quotient = (total(0.1 + step)[1] - total(0.1 - step)[1]) / (2 * step)
    assert_close(slope, quotient.detach(), rtol=1e-6, atol=1e-10)
