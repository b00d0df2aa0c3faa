"""CAMs of masks made of channels against two packages, preset by preset, and written out in loops."""

from __future__ import annotations

import math

import cams
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import ScoreCAM as GradCamScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch.testing import assert_close
from torchcam import methods as torch_cam
from toys import bound

from xcli.methods.cam.base import fused, scaled
from xcli.methods.cam.masks import ISCAM, ScoreCAM
from xcli.registry import build


@pytest.fixture(scope="module", params=cams.NARROW)
def case(request):
    return cams.narrow(request.param)


def ours(case, name, preset, **options):
    method = build({"name": name, "preset": preset, "layer": case.layer, **options})
    return method.attribute(case.score, case.x)


# ---- the packages ----------------------------------------------------------------------------------------------


@pytest.fixture
def in_double():
    """The package keeps its scores in the default type, which would round them to float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_scorecam_equals_grad_cam(case, in_double):
    expected = cams.grad_cam_map(GradCamScoreCAM, case)
    found = ours(case, "scorecam", "grad-cam", relu=False)
    assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_scorecam_equals_torch_cam(case):
    expected = cams.torch_cam_map(torch_cam.ScoreCAM, case)
    assert expected.abs().amax((1, 2)).min() > 0
    assert_close(ours(case, "scorecam", "torch-cam", relu=False), expected, rtol=1e-10, atol=1e-12)


def test_the_two_packages_and_the_paper_do_not_agree():
    case = cams.narrow("resnet")
    paper, *others = (
        ours(case, "scorecam", preset) for preset in ("paper", "grad-cam", "torch-cam", "original")
    )
    for other in others:
        assert (paper - other).abs().max() > 1e-4 * paper.abs().max()


@pytest.mark.soak
def test_iscam_equals_torch_cam(case):
    expected = cams.torch_cam_map(torch_cam.ISCAM, case, num_samples=3)
    assert expected.abs().amax((1, 2)).min() > 0
    assert_close(ours(case, "is-cam", "torch-cam", samples=3, relu=False), expected, rtol=1e-10, atol=1e-12)


class Drawn:
    """In the place of torch-cam's distribution: the fields that our images draw, for all channels of each."""

    def __init__(self, score, std):
        self.score, self.std, self.sample_number = score, std, 0

    def sample(self, size):
        tag = f"ss-cam {self.sample_number}"
        self.sample_number += 1
        fields = [
            torch.randn(1, *size[2:], generator=self.score.generator(i, tag)).double() for i in range(size[0])
        ]
        return self.std * torch.stack(fields).expand(size)


@pytest.mark.parametrize("name", ["vgg", "vit"])
def test_sscam_equals_torch_cam_on_the_same_noise(name):
    case = cams.narrow(name)

    class Peer(torch_cam.SSCAM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._distrib = Drawn(case.score, self.std)

    expected = cams.torch_cam_map(Peer, case, num_samples=3, std=0.7)
    assert_close(
        ours(case, "ss-cam", "torch-cam", samples=3, std=0.7, relu=False), expected, rtol=1e-10, atol=1e-12
    )


def test_several_layers_are_fused_as_grad_cam_does():
    case = cams.narrow("resnet")
    with GradCamScoreCAM(case.net, case.modules("layer4", "layer2")) as cam:
        expected = cam(case.x, [ClassifierOutputTarget(target) for target in cams.TARGETS])
    method = build({"name": "scorecam", "preset": "grad-cam", "layer": ["layer4", "layer2"]})
    found = scaled(method.explain(case.score, case.x, (64, 64)).map, "min-max")
    assert_close(found, torch.from_numpy(expected).double(), rtol=1e-3, atol=1e-5)


def test_several_layers_are_fused_as_torch_cam_does():
    case = cams.narrow("resnet")
    with torch_cam.ScoreCAM(case.net, ["layer4", "layer2"], input_shape=(3, 64, 64)) as cam:
        case.net(case.x)
        expected = cam.fuse_cams(cam(cams.TARGETS))
    found = ours(case, "scorecam", "torch-cam", layer=["layer4", "layer2"])
    assert_close(found, expected, rtol=1e-6, atol=1e-7)
    each = [ours(case, "scorecam", "torch-cam", layer=layer) for layer in ("layer4", "layer2")]
    assert_close(found, fused(each, "max", "min-max"))


# ---- written out -----------------------------------------------------------------------------------------------


def layer_output(case, x):
    kept = []
    handle = case.net.get_submodule(case.layer).register_forward_hook(lambda *seen: kept.append(seen[2]))
    with torch.no_grad():
        case.net(x)
    handle.remove()
    return kept[0] if case.reshape is None else case.reshape(kept[0])


def stretched(channel, size):
    """One channel (h, w) at the size of the input and from 0 to 1."""
    large = F.interpolate(channel[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    constant = channel.max() == channel.min()
    return large, torch.zeros(size).to(large) if constant else (large - large.min()) / (
        large.max() - large.min()
    )


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_scorecam_equals_the_paper_written_out(name):
    """Loops over rows and channels, one image at a time, with the baseline's score; two rows of some images."""
    case, image, target = cams.narrow(name), [0, 0, 1, 2, 2], [1, 4, 7, 3, 0]
    found = ScoreCAM(layer=case.layer).attribute(
        bound(case.net, case.x, target, image, micro_batch=7), case.x
    )
    with torch.no_grad():
        for row, (i, c) in enumerate(zip(image, target, strict=True)):
            x = case.x[i : i + 1]
            acts = layer_output(case, x)[0]
            masks = [stretched(channel, x.shape[-2:])[1] for channel in acts]
            gains = [case.net(x * mask)[0, c] - case.net(torch.zeros_like(x))[0, c] for mask in masks]
            total = sum(math.exp(gain) for gain in gains)
            expected = sum(
                math.exp(gain) / total * channel for gain, channel in zip(gains, acts, strict=True)
            )
            assert_close(found[row], expected.relu(), rtol=1e-9, atol=1e-12)


def test_original_equals_the_code_of_the_authors_written_out():
    """No softmax over channels, the probability instead; up-sampled maps added; before its last ReLU."""
    case = cams.narrow("resnet")
    method = build({"name": "scorecam", "preset": "original", "layer": case.layer, "relu": False})
    found = method.explain(case.score, case.x, (64, 64)).map
    with torch.no_grad():
        for i, c in enumerate(cams.TARGETS):
            x, expected = case.x[i : i + 1], torch.zeros(64, 64, dtype=torch.float64)
            for channel in layer_output(case, x)[0]:
                large, mask = stretched(channel, (64, 64))
                expected += case.net(x * mask).softmax(1)[0, c] * large
            assert_close(found[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", ["linear", "cumulative"])
def test_iscam_equals_its_steps_written_out(path):
    case, steps = cams.narrow("densenet"), 3
    found = ISCAM(layer=case.layer, samples=steps, path=path, relu=False).attribute(case.score, case.x)
    factors = {"linear": (1 / 3, 2 / 3, 1.0), "cumulative": (1 / 3, 1.0, 2.0)}[path]
    with torch.no_grad():
        for i, c in enumerate(cams.TARGETS):
            x = case.x[i : i + 1]
            acts = layer_output(case, x)[0]
            masks = [stretched(channel, (64, 64))[1] for channel in acts]
            scores = [sum(case.net(factor * mask * x)[0, c] for factor in factors) / steps for mask in masks]
            weights = torch.stack(scores).softmax(0)
            assert_close(found[i], torch.einsum("k,khw->hw", weights, acts), rtol=1e-9, atol=1e-12)
