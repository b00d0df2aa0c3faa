"""FullGrad against grad-cam, against the authors' definition written out, and against answers known beforehand."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import cams
import pytest
import timm
import torch
import torch.nn.functional as F
from contract import snapshot
from pytorch_grad_cam import FullGrad as PeerFullGrad
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d
from toys import PooledLinear, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.hooks import frozen
from xcli.methods.cam.base import scaled
from xcli.methods.cam.fullgrad import FullGrad
from xcli.registry import build

GRAD_CAM = build({"name": "fullgrad", "preset": "grad-cam"})
SIMPLE = build({"name": "fullgrad", "preset": "simple"})


def stirred(net: nn.Module, seed: int = 1) -> nn.Module:
    """The network with biases and statistics that say something; fresh ones are zero."""
    generator = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(getattr(part, "bias", None), Tensor):
            part.bias.data.normal_(generator=generator).mul_(0.3)
        if isinstance(getattr(part, "running_mean", None), Tensor):
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            if part.weight is not None:
                part.weight.data.uniform_(0.3, 1.5, generator=generator)
    return net


@contextmanager
def stirred_case(case):
    """Network, images and score of a shared case, stirred inside the block."""
    kept = [(t, t.detach().clone()) for t in [*case.net.parameters(), *case.net.buffers()] if t.ndim == 1]
    try:
        stirred(case.net)
        yield case.net, case.x, bound(case.net, case.x, cams.TARGETS)
    finally:
        for tensor, before in kept:
            tensor.data.copy_(before)


def peer_map(net, x, targets):
    """grad-cam's sum over layers (N, H, W), before it scales the result."""
    kept = []

    class Peer(PeerFullGrad):
        def compute_cam_per_layer(self, *args):
            kept.append(super().compute_cam_per_layer(*args))
            return kept[0]

    with Peer(net, []) as cam:
        cam(x, [ClassifierOutputTarget(target) for target in targets])
    return torch.from_numpy(kept[0][:, 0]).to(x.dtype)


def by_loops(net, x, target, bias=True, eps=1e-6):
    """The authors' definition for one image, a layer and a channel at a time; and the sum of all shares."""
    net, seen = copy.deepcopy(net), []

    def listen(part, _inputs, out):
        out.retain_grad()
        seen.append((part, out))
        return out.clone()  # a later in-place operation is that of the clone

    for part in net.modules():
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) and part.bias is not None:
            part.register_forward_hook(listen)
    pixels = x[None].clone().requires_grad_()
    value = net(pixels * 1)[0, target]
    value.backward()

    def psi(t):
        t = t.abs() - t.abs().min()
        return t / (t.max() + eps)

    shares = (pixels * pixels.grad)[0].detach()
    found, total = sum(psi(shares)), shares.sum()
    for part, out in seen:
        own = part.bias.detach()
        if isinstance(part, nn.BatchNorm2d):
            own = own - part.running_mean * part.weight.detach() / (part.running_var + part.eps).sqrt()
        if isinstance(part, nn.Linear):
            total = total + (out.grad[0] * own).sum()
            continue
        total = total + (out.grad[0] * own[:, None, None]).sum()
        for channel in psi(out.grad[0] * own[:, None, None] if bias else out.grad[0]):
            grown = F.interpolate(channel[None, None], x.shape[1:], mode="bilinear", align_corners=True)
            found = found + grown[0, 0]
    return found, value.detach() - total


@pytest.mark.parametrize("name", cams.CASES)
def test_the_grad_cam_preset_equals_grad_cam(name):
    count = 3 if name == "shapes-cnn" else 1
    with stirred_case(cams.case(name)) as (net, x, _):
        x, targets = x[:count], cams.TARGETS[:count]
        expected = peer_map(net, x, targets)
        found = GRAD_CAM.attribute(bound(net, x, targets), x).map
    assert_close(
        found, expected, rtol=1e-5, atol=1e-5 * float(expected.max())
    )  # grad-cam's map is of float32


@pytest.mark.parametrize(("method", "bias"), [(FullGrad(), True), (SIMPLE, False)], ids=["paper", "simple"])
@pytest.mark.parametrize("name", ["shapes-cnn", "resnet", "vgg", "densenet", "convnext"])
def test_the_default_and_simple_equal_the_authors_definition_written_out(name, method, bias):
    with stirred_case(cams.case(name) if name == "shapes-cnn" else cams.narrow(name)) as (net, x, score):
        found = method.attribute(score, x)
        for row, target in enumerate(cams.TARGETS):
            expected, delta = by_loops(net, x[row], target, bias)
            assert_close(found.map[row], expected, rtol=1e-9, atol=1e-9)
            assert_close(found.extras["delta"][row], delta, rtol=0, atol=1e-10)


def test_the_definitions_differ():
    with stirred_case(cams.case("shapes-cnn")) as (_, x, score):
        found = [one.attribute(score, x).map for one in (FullGrad(), GRAD_CAM, SIMPLE)]
    assert all(
        (a - b).abs().max() > 0.1 * b.abs().max() for a, b in zip(found, found[1:] + found[:1], strict=True)
    )


# ---- completeness ----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A ReLU network with pooling, additions and concatenation as functions, in place, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.plain = nn.BatchNorm2d(6, affine=False)
        self.grow = nn.Conv2d(6, 4, 3, padding=1)
        self.twice = nn.Conv2d(10, 10, 1)
        self.up = nn.ConvTranspose2d(10, 5, 2, stride=2)
        self.still = FrozenBatchNorm2d(5)
        self.within = nn.Linear(5, 5)
        self.hidden, self.flat, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        early = F.relu_(self.norm(self.stem(x)))
        mixed = F.max_pool2d(torch.cat([self.plain(early), F.leaky_relu(self.grow(early))], 1), 2)
        mixed = self.twice(mixed).relu_() + self.twice(mixed)
        mixed += F.avg_pool2d(mixed.clone(), 3, 1, 1)
        late = self.still(self.up(mixed))
        late = self.within(late.permute(0, 2, 3, 1)).relu().mean((1, 2))
        return self.head(self.flat(self.hidden(late)).relu())


def functional() -> nn.Module:
    return stirred(made(Functional))


def complete(net, x, targets):
    score = bound(net, x, targets)
    values, delta = score(x), FullGrad().attribute(score, x).extras["delta"]
    assert (values.abs() > 1e-3).all()
    return delta.abs().max() < 1e-10


def test_pixels_and_biases_make_up_the_whole_score_of_relu_networks():
    assert complete(functional(), images(3, 3, 10, 8), [0, 2, 3])
    assert complete(made(PooledLinear), images(3, 3, 9, 8), [0, 1, 4])
    for case in (cams.case("shapes-cnn"), *map(cams.narrow, ("resnet", "vgg", "densenet"))):
        with stirred_case(case) as (net, x, _):
            assert complete(net, x, cams.TARGETS), case.name


def test_what_is_left_of_the_score_shows_where_the_decomposition_does_not_hold():
    assert not complete(made(Tokens), images(2, 3, 16, 16), [0, 2])
    bent = made(PooledLinear)
    bent.relu = nn.GELU()
    assert not complete(bent, images(2, 3, 8, 8), [0, 2])


def test_a_norm_that_activates_is_seen_before_its_activation():
    net = timm.models.densenet.DenseNet(growth_rate=4, block_config=(2, 2), num_classes=5)
    assert type(net.features.norm0) is not nn.BatchNorm2d
    assert complete(stirred(net.double().eval()), images(2, 3, 64, 64), [0, 3])


# ---- answers known beforehand ----------------------------------------------------------------------------------


def test_a_linear_model_without_biases_is_input_times_gradient():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 30, 2, bias=False)
    ).double()
    x = images(2, 3, 5, 6)
    weight = torch.einsum(
        "lkhw,kc->lchw", net[2].weight.unflatten(1, (4, 5, 6)), net[0].weight[:, :, 0, 0]
    ).detach()
    shares = (weight[[1, 0]] * x).abs()
    least, most = shares.flatten(1).aminmax(dim=1)
    expected = (shares - least[:, None, None, None]) / (most - least + 1e-6)[:, None, None, None]
    found = FullGrad().attribute(bound(net, x, [1, 0]), x)
    assert_close(found.map, expected.sum(1))
    assert_close(found.extras["delta"], torch.zeros(2).double(), rtol=0, atol=1e-12)


def test_a_constant_gradient_leaves_no_trace_in_single_precision():
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(64, 8)

        def forward(self, x):
            return 1e4 * self.head(self.conv(x).mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = Averaged().eval(), images(2, 3, 6, 6).float()
    alone = copy.deepcopy(net)
    nn.init.zeros_(alone.conv.bias)
    found = [GRAD_CAM.attribute(bound(own, x, [1, 7]), x).map for own in (net, alone)]
    assert torch.equal(*found)  # every channel is flat, so none has a map


def test_scaled_channel_by_channel_biases_matter_only_by_not_being_zero():
    sizes, factor = images(2, 5, 4, 3).abs(), torch.tensor([1.0, 2, 3, 4, 0]).double()
    same = torch.tensor([1.0, 1, 1, 1, 0]).double()
    assert_close(GRAD_CAM.summed(sizes, factor), GRAD_CAM.summed(sizes, same), rtol=1e-5, atol=1e-5)
    assert (FullGrad().summed(sizes, factor) - FullGrad().summed(sizes, same)).abs().max() > 0.1


def test_one_large_channel_decides_the_scale_of_its_layer_but_not_of_others_channels():
    sizes = torch.tensor([[[[0.0, 1.0]], [[0.0, 100.0]]]])
    one = torch.ones(2)
    assert_close(FullGrad(eps=1e-9).summed(sizes, one), torch.tensor([[[0.0, 1.01]]]))
    assert_close(FullGrad(eps=1e-9, rescale="channel").summed(sizes, one), torch.tensor([[[0.0, 2.0]]]))
    assert_close(FullGrad(eps=1e-9).summed(sizes, torch.tensor([100.0, 1.0])), torch.tensor([[[0.0, 2.0]]]))
    assert_close(FullGrad(eps=1.0).summed(sizes + 1, one), torch.tensor([[[0.0, 1.0 + 100.0]]]) / 101)


def test_scores_that_are_twice_as_large_give_the_same_map():
    case = cams.case("shapes-cnn")
    score = case.score
    double = score.reading(lambda rows, outputs, copy, row: 2 * rows.values(outputs, copy, row))
    maps = [FullGrad(eps=1e-30).attribute(one, case.x).map for one in (score, double)]
    assert_close(*maps)


def test_the_map_of_several_calls_is_the_sum_of_theirs_where_grad_cam_pairs_the_wrong_layers():
    class Twice(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.second = self.first if shared else copy.deepcopy(self.first)
            self.last = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.last(self.second(self.first(x).relu()).relu()).relu().mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        apart = Twice(shared=False).double().eval()
    shared, x = Twice(shared=True).double().eval(), images(2, 3, 6, 5)
    shared.load_state_dict(apart.state_dict())
    maps = [GRAD_CAM.attribute(bound(net, x, [0, 2]), x) for net in (shared, apart)]
    assert_close(maps[0].map, maps[1].map)
    assert maps[0].extras["delta"].abs().max() < 1e-12
    assert_close(maps[1].map, peer_map(apart, x, [0, 2]), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # the peer counts more gradients than layers
        peer_map(shared, x, [0, 2])


def test_layers_that_grad_cam_pairs_by_the_order_of_definition():
    class Backwards(nn.Module):
        """Layers of the same width, defined the other way round than they run."""

        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.second(self.first(x).relu()).relu().mean((2, 3))

    class Forwards(Backwards):
        def __init__(self) -> None:
            super().__init__()
            self.second = self._modules.pop("second")

    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrong, right = Backwards().double().eval(), Forwards().double().eval()
    nn.init.zeros_(wrong.second.bias)
    right.load_state_dict(wrong.state_dict())
    x = images(2, 3, 6, 5)
    ours = [GRAD_CAM.attribute(bound(net, x, [0, 2]), x) for net in (wrong, right)]
    assert_close(ours[0].map, ours[1].map)
    assert ours[0].extras["delta"].abs().max() < 1e-12
    theirs = [peer_map(net, x, [0, 2]) for net in (wrong, right)]
    assert_close(ours[1].map, theirs[1], rtol=1e-5, atol=1e-5)
    assert (theirs[0] - theirs[1]).abs().max() > 0.1


def test_rows_that_are_not_finite_stand_alone():
    case = cams.case("shapes-cnn")
    x = case.x.clone()
    x[1, 0, 5, 5] = torch.nan
    found = FullGrad().attribute(case.score, x)
    clean = FullGrad().attribute(case.score, case.x)
    assert found.map[1].isnan().any()
    assert_close(found.map[[0, 2]], clean.map[[0, 2]])
    assert_close(found.extras["delta"][[0, 2]], clean.extras["delta"][[0, 2]], rtol=0, atol=1e-10)


def test_maps_can_be_differentiated():
    net, x = functional(), images(2, 3, 8, 8).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 2, 1], [0, 0, 1]), create_graph=True)
    probe = images(2, 3, 8, 8, seed=4)

    def loss(pixels):
        return FullGrad(eps=0.1).attribute(score, pixels).map.square().sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    step = 1e-6
    with torch.no_grad():
        moved = [x + step * probe, x - step * probe]
    rate = (loss(moved[0].requires_grad_()) - loss(moved[1].requires_grad_())).item() / (2 * step)
    assert grad.abs().max() > 0
    assert (grad * probe).sum().item() == pytest.approx(rate, rel=1e-5)


# ---- refusals, restoration -------------------------------------------------------------------------------------


def test_a_batch_norm_without_statistics_is_refused():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1)
    )
    net = nn.Sequential(net, nn.Flatten()).double().eval()
    x = images(2, 3, 8, 8)
    with pytest.raises(ModelError, match=r"fullgrad: batch norm '0\.1' has no running statistics.*; "):
        FullGrad().attribute(bound(net, x, [0, 1]), x)


def test_a_network_without_biases_gives_the_term_of_the_input():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    x = images(2, 3, 8, 8)
    found = FullGrad().attribute(bound(net, x, [0, 1]), x)
    assert found.map.shape == (2, 8, 8)
    assert found.extras["delta"].abs().max() < 1e-12


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_the_network_as_found(where):
    net = made(PooledLinear)
    x = images(2, 3, 8, 8)
    score = bound(net, x, [0, 1])

    class Broken(FullGrad):
        def summed(self, sizes, factor):
            raise ZeroDivisionError

    def explode(*_):
        raise ZeroDivisionError

    handle = net.head.register_forward_pre_hook(explode) if where == "forward" else None
    with frozen(net):
        before = snapshot(net)
        with pytest.raises(ZeroDivisionError):
            (FullGrad if handle else Broken)().attribute(score, x)
        assert snapshot(net) == before
    if handle:
        handle.remove()


class Sequence(nn.Module):
    """A linear layer on the columns of the picture, columns before images, as transformers of text have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.inner(self.conv(x).mean(2).permute(2, 0, 1)).relu().mean(0))


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_the_gap_is_not_a_number_where_a_layer_mixes_up_images(count):
    net, x = made(Sequence), images(count, 3, 4, 4)
    found = FullGrad().attribute(bound(net, x, [1] * count), x)
    assert found.extras["delta"].isnan().all()
    alone = FullGrad().attribute(bound(net, x[:1], [1]), x[:1])
    assert_close(found.map[:1], alone.map)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["resnet18", "shapes-cnn"])
def test_views_and_components_equal_grad_cam(name):
    case = cams.case(name)
    goals = [ClassifierOutputTarget(target) for target in cams.TARGETS]
    with PeerFullGrad(copy.deepcopy(case.net).float(), []) as cam:
        views = torch.from_numpy(cam(case.x.float(), goals, aug_smooth=True))
        component = torch.from_numpy(cam(case.x.float(), goals, eigen_smooth=True))
    ours = replace(GRAD_CAM, aug_smooth=True).attribute(case.score, case.x).map
    assert_close(ours, views.double(), rtol=0, atol=2e-4)
    ours = replace(GRAD_CAM, eigen_smooth=True).attribute(case.score, case.x).map
    scaled_ours, other = scaled(ours, "min-max"), scaled(-ours, "min-max")
    gap = torch.minimum((scaled_ours - component).abs().amax((1, 2)), (other - component).abs().amax((1, 2)))
    assert gap.max() < 2e-3  # its sign is left to chance
