"""Opti-CAM: against the search written out on the whole network, and against answers known beforehand."""

from __future__ import annotations

import math
from dataclasses import replace

import cams
import contract
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Tokens, bound, images, made

import xcli
from xcli.demo import nets
from xcli.errors import ModelError
from xcli.hooks import frozen
from xcli.methods.base import FLAT, map_status
from xcli.methods.cam.gradient import GradCAM
from xcli.methods.cam.opti import OptiCAM, mask
from xcli.registry import build

ROWS = ([1, 7, 3, 0, 2], [0, 0, 1, 2, 2])
"""Class and image of each row: two images have two."""


# ---- written out -----------------------------------------------------------------------------------------------


def layer_output(net, layer, x, reshape=None):
    kept = []
    handle = net.get_submodule(layer).register_forward_hook(lambda *seen: kept.append(seen[2]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return kept[0] if reshape is None else reshape(kept[0])


def masked(x, maps):
    """An image (1, C, H, W) behind one map (h, w), up-sampled and min-max scaled."""
    large = F.interpolate(maps[None, None], size=x.shape[2:], mode="bilinear", align_corners=False)
    return x * (large - large.min()) / (large.max() - large.min())


def written_out(net, x, acts, target, steps, rate, objective="score"):
    """One row: Adam of PyTorch on the whole network; the map (h, w) and the objective at every step."""
    u = torch.full(acts.shape[:1], 0.5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([u], lr=rate)
    before, values = net(x)[0, target].detach(), []
    for _ in range(steps):
        after = net(masked(x, torch.einsum("k,khw->hw", u.softmax(0), acts)))[0, target]
        loss = before - after if objective == "score" else (before - after).abs()
        values.append(-loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.einsum("k,khw->hw", u.softmax(0), acts).detach(), values


LAYERS = {"vit": "encoder.layers.encoder_layer_0", "swin": "features.2"}
"""Instead of layer norms: those of an untrained network make channels whose mean is zero everywhere."""


@pytest.mark.soak
@pytest.mark.parametrize("objective", ["score", "difference"])
@pytest.mark.parametrize("name", cams.NARROW)
def test_it_equals_the_search_written_out_row_by_row(name, objective):
    case = cams.narrow(name)
    layer = LAYERS.get(name, case.layer)
    (targets, of), method = ROWS, OptiCAM(layer=layer, steps=5, rate=0.3, objective=objective)
    with frozen(case.net):
        score = bound(case.net, case.x, targets, of, micro_batch=2)
        found = method.attribute(score, case.x)
        for row, (target, image) in enumerate(zip(targets, of, strict=True)):
            x = case.x[image : image + 1]
            acts = layer_output(case.net, layer, x, case.reshape)[0]
            expected, _ = written_out(case.net, x, acts, target, 5, 0.3, objective)
            assert_close(found[row], expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
        equal = replace(method, steps=1, rate=1e-12).attribute(score, case.x)
    assert (found - equal).abs().max() > 1e-2 * equal.abs().max()  # the search went somewhere


def as_published(net, x, acts, targets, steps, rate, objective):
    """The published program's loop over a batch: maps (N, h, w) and the step at which it ended.

    Positive parts, half of each weight to begin with, and an end for all where the sum of the losses has grown.
    """
    acts, rows = acts.relu(), torch.arange(len(x))
    w = torch.full((*acts.shape[:2], 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    adam, last = torch.optim.Adam([w], lr=rate), 1e10
    before = net(x)[rows, targets].detach()
    for step in range(steps):
        maps = (w.softmax(1) * acts).sum(1)
        seen = torch.cat([masked(own[None], one) for own, one in zip(x, maps, strict=True)])
        losses = before - net(seen)[rows, targets]
        loss = losses.sum() if objective == "score" else losses.abs().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % (steps // 10) == 0:
            if loss.item() > last:
                return maps.detach(), step
            last = loss.item()
    return (w.softmax(1) * acts).sum(1).detach(), steps


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "objective"), [("resnet", "score"), ("densenet", "score"), ("densenet", "difference")]
)
def test_the_preset_of_the_authors_equals_their_program_image_by_image(name, objective):
    """Theirs ends a batch where its sum falls, so that company decides over a map; here every row ends by itself."""
    case, targets, (steps, rate) = cams.narrow(name), torch.tensor(cams.TARGETS), (40, 1.0)
    options = {"layer": case.layer, "steps": steps, "rate": rate, "objective": objective}
    acts = layer_output(case.net, case.layer, case.x)
    with frozen(case.net):
        found = build({"name": "opti-cam", "preset": "original", **options}).attribute(case.score, case.x)
        alone = [
            as_published(case.net, *(t[i : i + 1] for t in (case.x, acts, targets)), steps, rate, objective)
            for i in range(3)
        ]
        together, ended = as_published(case.net, case.x, acts, targets, steps, rate, objective)
    ends = [end for _, end in alone]
    assert len(set(ends)) > 1, ends  # the images end at different steps
    assert min(ends) < steps
    assert_close(found, torch.cat([maps for maps, _ in alone]), rtol=1e-8, atol=1e-10)
    assert any(end != ended for end in ends)
    assert (together - found).abs().max() > 1e-3 * found.abs().max()  # the trap


@pytest.mark.soak
def test_it_stops_no_row_that_only_rises_and_saves_the_passes_of_those_that_fall():
    case = cams.narrow("resnet")
    runs = []
    for rate, stop in ((1e-3, True), (1e-3, False), (1.0, True), (1.0, False)):
        passes, largest = counted(case.net)
        method = OptiCAM(layer=case.layer, steps=20, rate=rate, stop=stop)
        maps = method.attribute(bound(case.net, case.x, *ROWS, micro_batch=2), case.x)
        passes.remove()
        runs.append((maps, sum(largest), max(largest)))
    assert_close(runs[0][0], runs[1][0], rtol=0, atol=0)
    assert [most for *_, most in runs] == [2] * 4
    survey, every = 1, 3 + 20 * 5  # inputs: of the survey, then of the layer's maps, and a step's rows
    assert runs[1][1] == runs[0][1] == runs[3][1] == survey + every
    assert runs[2][1] < survey + every


def counted(net):
    """A hook to remove, and the sizes of the batches that the network is given."""
    sizes = []
    return net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))), sizes


# ---- answers known beforehand ----------------------------------------------------------------------------------


class Shown(nn.Module):
    """Channels that are given; logit l adds up the pixels of the first colour, weighed with ``evidence[l]``."""

    def __init__(self, planes, evidence):
        super().__init__()
        self.register_buffer("planes", planes)
        self.register_buffer("evidence", evidence)
        self.layer = nn.Identity()

    def forward(self, x):
        own = self.layer(self.planes.expand(len(x), -1, -1, -1))  # (N, K, h, w), the same for every image
        return torch.einsum("nhw,lhw->nl", x[:, 0], self.evidence) + 0 * own.sum((1, 2, 3))[:, None]


def spots(*cells, grid=4):
    """One channel a cell: 1 there, 0 elsewhere. (K, grid, grid)"""
    planes = torch.zeros(len(cells), grid * grid, dtype=torch.float64)
    planes[range(len(cells)), list(cells)] = 1
    return planes.view(-1, grid, grid)


def evidence_of(planes, size):
    """What speaks for a class in the cell of its channel, and against it in all others, (L, H, W)."""
    return F.interpolate(2 * planes[:, None] - 1, size=size, mode="nearest")[:, 0]


def test_the_channel_that_covers_the_evidence_wins():
    planes = spots(5, 10, 0, 15)
    net = Shown(planes, evidence_of(planes, (16, 16))).eval()
    x = torch.ones(2, 3, 16, 16, dtype=torch.float64)
    score = bound(net, x, [0, 2, 1, 3], [0, 0, 1, 1])
    found = OptiCAM(layer="layer", steps=200, rate=0.2).attribute(score, x)
    for row, channel in enumerate((0, 2, 1, 3)):
        weights = (found[row] * planes).sum((1, 2))  # every channel has a cell of its own
        assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
        assert weights.argmax() == channel
        assert weights[channel] > 0.95
    assert (found[0] - found[1]).abs().max() > 0.5  # two rows of one image


def test_the_first_step_of_adam_is_the_sign_of_the_slope():
    planes = spots(5, 10, 0) * torch.tensor([1.0, 0.8, 0.6]).view(3, 1, 1)
    net = Shown(planes, images(2, 16, 16)).eval()
    x = images(1, 3, 16, 16, seed=1)

    def value(u):
        return net(masked(x, torch.einsum("k,khw->hw", u.softmax(0), planes)))[0, 1]

    steps = 1e-6 * torch.eye(3, dtype=torch.float64)
    signs = torch.stack([(value(step) - value(-step)).sign() for step in steps])
    assert len(set(signs.tolist())) == 2
    found = OptiCAM(layer="layer", steps=1, rate=0.25).attribute(bound(net, x, [1]), x)
    weights = (0.25 * signs).softmax(0)
    assert_close(found[0], torch.einsum("k,khw->hw", weights, planes), rtol=1e-6, atol=1e-12)


def test_constant_channels_keep_their_weight_and_change_no_mask():
    """u of a constant channel stays exactly 0, whatever its value, in float32 as well."""
    planes = torch.cat([spots(5, 10), torch.tensor([0.1, -3.0]).view(2, 1, 1).expand(2, 4, 4)])
    x = torch.ones(1, 3, 17, 13)
    net = Shown(planes.float(), evidence_of(spots(5, 10), (17, 13)).float()).eval()
    own = (planes - planes.amin((1, 2), keepdim=True)).float().expand(2, -1, -1, -1)
    score = bound(net, x, [0, 1], [0, 0])
    u = OptiCAM(layer="layer", steps=9).search(score, x, own)
    assert (u[:, 2:] == 0).all()
    assert (u[:, :2].abs() > 0.5).all()
    assert_close(OptiCAM(layer="layer", steps=9).search(score, x, own[:, :2]), u[:, :2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["all constant", "constant in sum"])
def test_where_no_mask_can_be_made_the_map_is_the_mean_of_the_channels(name, dtype):
    if name == "all constant":
        planes = torch.tensor([0.1, 0.7, 0.0], dtype=dtype).view(3, 1, 1).expand(3, 5, 5)
    else:  # x and 1 - x, which do not add up to one number in floating point
        half = torch.linspace(0, 1, 25, dtype=dtype).view(5, 5) / 3
        planes = torch.stack([half, 1 - half])
    x = torch.ones(2, 3, 17, 13, dtype=dtype)
    net = Shown(planes, torch.ones(2, 17, 13, dtype=dtype)).eval()
    u = torch.zeros(1, len(planes), dtype=dtype)
    low = (planes - planes.amin((1, 2), keepdim=True))[None]
    assert (mask(u, low, (17, 13)) == 0).all()
    score = bound(net, x, [0, 1])
    found = OptiCAM(layer="layer", steps=5).attribute(score, x)
    assert_close(found, planes.mean(0).expand(2, -1, -1))
    assert (map_status(found) == FLAT).all()


def test_the_layer_norm_of_an_untrained_network_gives_flat_maps():
    """The channels of each place add up to zero but for rounding, of which the published program makes a mask."""
    case = cams.narrow("vit")
    found = OptiCAM(layer=case.layer, steps=3).attribute(case.score, case.x)
    assert (map_status(found) == FLAT).all()
    acts = layer_output(case.net, case.layer, case.x, case.reshape)
    assert acts.abs().amax() > 1
    assert acts.mean(1).abs().amax() < 1e-14
    noise = masked(case.x[:1], acts[0].mean(0))
    assert noise.abs().amax() > 0.1  # the trap


def test_the_mask_is_that_of_the_softmax_at_any_size():
    for size in ((20, 17), (9, 30), (3, 4)):
        u, planes = 3 * images(5, 6), images(5, 6, 3, 4, seed=1)
        maps = torch.einsum("nk,nkhw->nhw", u.softmax(1), planes)
        expected = torch.cat([masked(torch.ones(1, 1, *size, dtype=torch.float64), one) for one in maps])
        low = planes - planes.amin((2, 3), keepdim=True)
        assert_close(mask(u, low, size), expected, rtol=1e-10, atol=1e-12)
        assert_close(mask(u + 900, low, size), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", ["score", "difference"])
@pytest.mark.parametrize("sign", [1, -1])
def test_it_finds_the_best_of_all_weights_of_two_channels(sign, objective):
    """A spot and a ramp, on a picture whose pixels all speak for the class, or all against it."""
    planes = torch.cat([spots(5), torch.linspace(0, 1, 16, dtype=torch.float64).view(1, 4, 4)])
    x = torch.ones(1, 3, 16, 16, dtype=torch.float64)
    net = Shown(planes, sign * torch.ones(1, 16, 16, dtype=torch.float64) / 256).eval()

    def value(share):
        after = net(masked(x, (1 - share) * planes[0] + share * planes[1]))
        return -(net(x) - after).abs() if objective == "difference" else after

    shares = torch.linspace(0, 1, 201, dtype=torch.float64)
    best = shares[torch.cat([value(share) for share in shares]).argmax()]
    found = OptiCAM(layer="layer", objective=objective, steps=300, rate=0.03).attribute(bound(net, x, [0]), x)
    assert_close(found[0, 3, 3], best, rtol=0, atol=0.02)  # where the spot is not
    assert (best < 0.05) == (sign < 0 and objective == "score")


# ---- on networks that have learned something -------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize(("name", "size"), [("shapes-cnn", (64, 48)), ("shapes-vit", (128, 128))])
def test_the_score_of_the_masked_image_rises(name, size):
    x = contract.pictures(size)
    targets, of = contract.ROWS[1], contract.ROWS[0]
    with frozen(nets.load(name).double()) as net:
        score = bound(net, x, targets, of)

        def kept(method):
            maps = method.attribute(score, x)
            seen = [masked(x[image : image + 1], one) for one, image in zip(maps, of, strict=True)]
            return score(torch.cat(seen))

        start = kept(OptiCAM(steps=1, rate=1e-12))
        values = torch.stack([start, *(kept(OptiCAM(steps=steps)) for steps in (4, 12))])
        assert (values[2] > start + 0.01).all()
        assert (values[1] > start).float().mean() > 0.8
        assert (values[2] > kept(GradCAM(relu=False))).float().mean() > 0.7
        one, other = OptiCAM(steps=4).attribute(score, x)[:2]
        assert (one - other).abs().max() > 1e-2 * one.abs().max()  # two classes of one image


def test_each_of_several_layers_has_a_search_of_its_own():
    case = cams.case("shapes-cnn")
    layers = case.score.layers.find((case.layer, *case.others))
    method = OptiCAM(layer=tuple(layer.name for layer in layers), steps=2)
    both = list(method.maps(case.score, case.x, layers))
    for layer, maps in zip(layers, both, strict=True):
        assert_close(maps, OptiCAM(layer=layer.name, steps=2).attribute(case.score, case.x))
    assert (
        method.attribute(case.score, case.x).shape
        == both[layers.index(case.score.layers.find("stages.0")[0])].shape
    )


def test_an_image_that_is_not_finite_spoils_no_other():
    net, x = made(PooledLinear), images(3, 3, 12, 10)
    broken = x.clone()
    broken[1, 0, 3, 3] = math.nan
    for method in (OptiCAM(layer="relu", steps=4), OptiCAM(layer="relu", steps=20, rate=1.0, stop=True)):
        clean = method.attribute(bound(net, x, [0, 1, 2, 3], [0, 1, 1, 2]), x)
        found = method.attribute(bound(net, broken, [0, 1, 2, 3], [0, 1, 1, 2]), broken)
        assert_close(found[[0, 3]], clean[[0, 3]], rtol=1e-10, atol=1e-12)
        assert found[1:3].isnan().flatten(1).any(1).all()


def test_a_row_without_a_score_has_no_map_even_where_its_channels_are_finite():
    net, x = Shown(spots(5, 10), images(2, 16, 16)).eval(), images(2, 3, 16, 16)
    x[1, 0, 2, 3] = math.nan
    found = OptiCAM(layer="layer", steps=4, stop=True).attribute(bound(net, x, [0, 1]), x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_the_caller_may_be_in_no_grad_and_the_images_may_ask_for_gradients():
    net, x = made(Tokens), images(2, 3, 16, 16)
    method = OptiCAM(layer="norm1", steps=3)
    expected = method.attribute(bound(net, x, [0, 1]), x)
    with torch.no_grad():
        assert_close(method.attribute(bound(net, x, [0, 1]), x), expected, rtol=0, atol=0)
    found = method.attribute(bound(net, x, [0, 1]), x.clone().requires_grad_())
    assert_close(found.detach(), expected, rtol=0, atol=0)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


def test_its_maps_cannot_be_trained_through_and_it_says_so_at_once():
    net, x = made(PooledLinear), images(2, 3, 12, 10)
    score = replace(bound(net, x, [0, 1]), create_graph=True)
    handle, sizes = counted(net)
    with pytest.raises(ModelError, match="opti-cam gives no maps that can be trained through"):
        OptiCAM(layer="relu").attribute(score, x)
    handle.remove()
    assert sizes == []
    with pytest.raises(ModelError, match="trained through"):
        xcli.explain(net, x, OptiCAM(layer="relu", steps=1), target=1, create_graph=True)


def test_a_network_that_fails_during_the_search_is_left_as_found():
    net, x = made(PooledLinear), images(2, 3, 12, 10)
    before, seen = contract.snapshot(net), []

    class Stop(Exception):
        pass

    def fails(*_):
        seen.append(None)
        if len(seen) == 4:  # the layer's maps, then two steps
            raise Stop

    with frozen(net):
        score = bound(net, x, [0, 1])
    handle = net.head.register_forward_hook(fails)
    with pytest.raises(Stop), frozen(net):
        OptiCAM(layer="relu", steps=9).attribute(score, x)
    handle.remove()
    assert contract.snapshot(net) == before


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"rate": math.inf}, {"objective": "logit"}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        OptiCAM(**wrong)
