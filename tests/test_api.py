"""``xcli.explain``: the caller's model comes back as it was, and the maps are the command's."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from runs import SIDE, photos, plain, written
from store_driver import columns_of
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Tokens

import xcli
from xcli.config import load_config
from xcli.demo import nets
from xcli.errors import ConfigError, ModelError
from xcli.images import find_images, read_image
from xcli.layers import survey
from xcli.methods.cam.gradient import GradCAM
from xcli.pipeline import explain_folder

Pair = namedtuple("Pair", "features logits")


class Normed(nn.Module):
    """Convolution, batch norm, dropout: what it gives depends on its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)))


class Several(nn.Module):
    """A network whose logits come among other outputs, packed as told."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = PooledLinear(), pack

    def forward(self, x: Tensor) -> Any:
        logits = self.net(x)
        return self.pack(logits[:, :2], logits)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that a caller could see."""
    return {
        "training": [part.training for part in model.modules()],
        "wanted": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "places": [parameter.data_ptr() for parameter in model.parameters()],
        "values": [value.clone() for value in model.state_dict().values()],
        "hooks": [
            [*part._forward_hooks, *part._forward_pre_hooks, *part._backward_hooks]
            for part in model.modules()
        ],
        "own": [sorted(vars(part)) for part in model.modules()],
        "modules": [id(part) for part in model.modules()],
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    now = state(model)
    for key in before:
        if key == "values":
            assert all(torch.equal(a, b) for a, b in zip(before[key], now[key], strict=True))
        elif key == "grads":
            assert all(a is b for a, b in zip(before[key], now[key], strict=True))
        else:
            assert before[key] == now[key], key


def busy() -> nn.Module:
    """A network in the middle of training: mixed modes, a frozen layer, gradients and a hook of the caller's."""
    model = seeded(Normed).train()
    model.drop.eval()
    model.conv.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.norm.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam", "eigencam", "random"])
def test_the_model_is_left_as_it_was(x: Tensor, method: str):
    model = busy()
    before, randomness = state(model), torch.random.get_rng_state()
    found = xcli.explain(model, x, method)
    assert_unchanged(before, model)
    assert torch.equal(randomness, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert not found.map.requires_grad


@pytest.mark.parametrize("where", ["forward", "method"])
def test_the_model_is_left_as_it_was_after_an_exception(
    x: Tensor, where: str, monkeypatch: pytest.MonkeyPatch
):
    model, calls = busy(), []

    def fail(*_: object) -> None:
        calls.append(1)
        if len(calls) > 1 or where == "method":  # not yet in the survey
            raise KeyError("in the middle")

    if where == "forward":
        model.head.register_forward_hook(fail)
    else:
        monkeypatch.setattr(GradCAM, "weighted", fail)
    before = state(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError, match="in the middle"):
        xcli.explain(model, x, "gradcam")
    assert_unchanged(before, model)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_model_in_training_mode_is_explained_as_in_evaluation(x: Tensor):
    model = seeded(Normed)
    expected = xcli.explain(model.eval(), x, "gradcam")
    found = xcli.explain(model.train(), x, "gradcam")
    assert torch.equal(found.map, expected.map)
    with torch.no_grad():
        assert_close(found.score, model.eval()(x).amax(1))


@pytest.mark.parametrize("kind", [Normed, Tokens])
@pytest.mark.parametrize("method", ["gradcam", "eigencam", "random"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(
    x: Tensor, kind: type[nn.Module], method: str, mode: Callable[[], Any]
):
    model = seeded(kind).eval()
    expected = xcli.explain(model, x, method)
    with mode():
        found = xcli.explain(model, x, method)
        assert not torch.is_grad_enabled()
    assert torch.equal(found.map, expected.map)


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "random"])
def test_images_made_under_inference_mode_are_explained(x: Tensor, method: str):
    model = seeded(PooledLinear).eval()
    expected = xcli.explain(model, x, method)
    with torch.inference_mode():
        images = x.clone()
        inside = xcli.explain(model, images, method)
    assert torch.equal(inside.map, expected.map)
    assert torch.equal(xcli.explain(model, images, method).map, expected.map)


def test_weights_made_under_inference_mode_are_refused_plainly(x: Tensor):
    """They can never take part in a gradient."""
    with torch.inference_mode():
        model = seeded(PooledLinear)
    before = state(model)
    with pytest.raises(ModelError, match="inference_mode"):
        xcli.explain(model, x, "gradcam")
    assert_unchanged(before, model)


def test_frozen_weights_and_images_that_ask_for_gradients(x: Tensor):
    model = seeded(PooledLinear).eval()
    expected = xcli.explain(model, x, "gradcam")
    assert torch.equal(xcli.explain(model.requires_grad_(False), x, "gradcam").map, expected.map)
    asking = x.clone().requires_grad_()
    assert torch.equal(xcli.explain(model, asking, "gradcam").map, expected.map)
    assert asking.grad is None


@pytest.mark.parametrize(
    "pack",
    [
        lambda other, logits: {"aux": other, "logits": logits},
        lambda other, logits: {"out": logits, "aux": other},
        lambda other, logits: (logits, other),
        lambda other, logits: [logits, other],
        lambda other, logits: Pair(other[:, :, None], logits),
        lambda other, logits: SimpleNamespace(hidden=other, logits=logits),
    ],
    ids=["mapping", "out", "tuple", "list", "named tuple", "object"],
)
def test_logits_are_found_among_several_outputs(x: Tensor, pack: Callable[[Tensor, Tensor], Any]):
    expected = xcli.explain(seeded(PooledLinear), x, "gradcam")
    found = xcli.explain(seeded(lambda: Several(pack)), x, "gradcam")
    assert torch.equal(found.map, expected.map)
    assert torch.equal(found.score, expected.score)


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (lambda other, logits: {"aux": other, "logits": logits}, "aux"),
        (lambda other, logits: (logits, other), "1"),
        (lambda other, logits: SimpleNamespace(hidden=other, logits=logits), "hidden"),
    ],
    ids=["mapping", "tuple", "object"],
)
def test_a_named_output_is_the_one_explained(x: Tensor, pack: Callable[[Tensor, Tensor], Any], name: str):
    model = seeded(lambda: Several(pack)).eval()
    found = xcli.explain(model, x, "gradcam", output=name)
    with torch.no_grad():
        assert_close(found.score, model.net(x)[:, :2].amax(1))
    assert int(found.target.max()) < 2
    same = xcli.explain(model.net, x, "gradcam", target=found.target)
    assert_close(found.map, same.map)


def test_no_logits_are_said_with_what_there_is(x: Tensor):
    model = seeded(lambda: Several(lambda other, logits: {"a": other, "b": logits}))
    with pytest.raises(ModelError, match=r"a \(\d, 2\).*b \(\d, 5\)"):
        xcli.explain(model, x, "gradcam")
    with pytest.raises(ModelError, match="'nothing'"):
        xcli.explain(model, x, "gradcam", output="nothing")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (5, "0 to 4"),
        (-1, "0 to 4"),
        ([0, 1], "3 images"),
        ([[0], [1], [2]], "3 images"),
        ([0, 1, 9], "0 to 4"),
    ],
)
def test_a_bad_target_is_refused(x: Tensor, target: Any, said: str):
    model = seeded(PooledLinear)
    before = state(model)
    with pytest.raises(ConfigError, match=said):
        xcli.explain(model, x, "gradcam", target=target)
    assert_unchanged(before, model)


def test_targets_one_for_all_or_one_an_image(x: Tensor):
    model = seeded(PooledLinear).eval()
    with torch.no_grad():
        logits = model(x)
    assert xcli.explain(model, x, "gradcam").target.tolist() == logits.argmax(1).tolist()
    assert xcli.explain(model, x, "gradcam", target=2).target.tolist() == [2, 2, 2]
    for target in ([0, 3, 1], (0, 3, 1), torch.tensor([0, 3, 1])):
        found = xcli.explain(model, x, "gradcam", target=target)
        assert (found.target.tolist(), found.image.tolist()) == ([0, 3, 1], [0, 1, 2])
        assert_close(found.score, logits[torch.arange(3), torch.tensor([0, 3, 1])])
        assert_close(found.probability, logits.softmax(1)[torch.arange(3), torch.tensor([0, 3, 1])])


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gradcm", "did you mean 'gradcam'"),
        ({"name": "gradcam", "layr": "relu"}, "did you mean 'layer'"),
        ({"name": "gradcam", "upsampling": "cubic"}, "upsampling"),
        ({"name": "gradcam", "preset": "captun"}, "captum"),
        ({"layer": "relu"}, "there is no method ''"),
    ],
)
def test_an_unknown_method_or_option_is_refused(x: Tensor, method: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        xcli.explain(seeded(PooledLinear), x, method)


def test_a_layer_that_is_not_there_is_refused_with_the_nearest(x: Tensor):
    with pytest.raises(ModelError, match="nearest: features"):
        xcli.explain(seeded(PooledLinear), x, {"name": "gradcam", "layer": "featurs"})


def test_a_name_a_mapping_and_a_method_are_the_same(x: Tensor):
    model = seeded(PooledLinear)
    asked = {"name": "gradcam", "layer": "features.0", "relu": False}
    found = xcli.explain(model, x, asked)
    assert torch.equal(found.map, xcli.explain(model, x, GradCAM(layer="features.0", relu=False)).map)
    assert asked == {"name": "gradcam", "layer": "features.0", "relu": False}  # the caller's own
    assert torch.equal(xcli.explain(model, x).map, xcli.explain(model, x, "gradcam").map)
    assert found.map.shape == (3, 16, 16)
    assert xcli.explain(model, x, "gradcam", native=True).map.shape == (3, 8, 8)


@pytest.mark.parametrize("score", ["logit", "probability", "log-probability", "contrast"])
def test_every_unit_of_the_score_by_plain_autograd(x: Tensor, score: Any):
    model, target = seeded(PooledLinear).double().eval(), torch.tensor([0, 3, 1])
    x = x.double()
    acts = model.features(x).detach().requires_grad_()
    logits = model.head(acts.relu().mean((2, 3)))
    own = logits[torch.arange(3), target]
    others = logits.scatter(1, target[:, None], float("-inf")).amax(1)
    picked = {
        "logit": own,
        "probability": logits.softmax(1)[torch.arange(3), target],
        "log-probability": logits.log_softmax(1)[torch.arange(3), target],
        "contrast": own - others,
    }[score]
    (grads,) = torch.autograd.grad(picked.sum(), acts)
    expected = (grads.mean((2, 3), keepdim=True) * acts).sum(1).detach()
    found = xcli.explain(
        model, x, GradCAM(layer="features", relu=False), target=target, score=score, native=True
    )
    assert_close(found.map, expected, atol=1e-12, rtol=1e-10)
    assert_close(found.score, own.detach())


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "random"])
def test_micro_batch_company_and_order_change_nothing(x: Tensor, method: str):
    model, x = seeded(Normed).double().eval(), x.double()
    whole = xcli.explain(model, x, method, seed=3)
    for micro_batch in (1, 2):
        assert_close(
            xcli.explain(model, x, method, seed=3, micro_batch=micro_batch).map, whole.map, atol=1e-10, rtol=0
        )
    order = [2, 0, 1]
    assert_close(xcli.explain(model, x[order], method, seed=3).map, whole.map[order], atol=1e-10, rtol=0)
    assert_close(xcli.explain(model, x[1:2], method, seed=3).map, whole.map[1:2], atol=1e-10, rtol=0)


def test_a_random_method_follows_its_seed(x: Tensor):
    model = seeded(PooledLinear)
    assert torch.equal(
        xcli.explain(model, x, "random", seed=1).map, xcli.explain(model, x, "random", seed=1).map
    )
    assert not torch.equal(
        xcli.explain(model, x, "random", seed=1).map, xcli.explain(model, x, "random", seed=2).map
    )


def test_the_maps_are_those_of_the_command(tmp_path: Path):
    photos(tmp_path / "photos", 6)
    methods = ["gradcam", "hirescam", "layercam", "eigencam"]
    sections = plain(tmp_path / "photos", tmp_path / "run", methods=methods, target={"class": [1, 8]})
    config = load_config(written(tmp_path / "config.yaml", sections))
    sources = find_images(config.images.paths)
    explain_folder(config, sources)
    stored = columns_of(tmp_path / "run" / "results.h5")
    preprocess = config.model_spec().preprocess
    assert not isinstance(preprocess, str)
    pixels = np.stack([preprocess.apply(read_image(source.file))[0] for source in sources])
    images = preprocess.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert images.shape == (6, 3, SIDE, SIDE)
    for name in methods:
        for place, target in enumerate((1, 8)):
            found = xcli.explain(nets.load("shapes-cnn"), images, name, target=target)
            expected = stored[f"heatmaps/{name}"][place::2]
            largest = max(float(np.abs(expected).max()), 1e-6)
            np.testing.assert_allclose(found.map, expected, rtol=0, atol=1e-5 * largest, err_msg=name)
            np.testing.assert_allclose(
                found.score, stored["explanations/score"][place::2], rtol=1e-4, atol=1e-5
            )


def test_a_second_batch_does_not_survey_the_model_again(monkeypatch):
    from xcli import api

    net, images = nets.load("shapes-cnn"), torch.rand(2, 3, 64, 64)
    seen = []
    monkeypatch.setattr(api, "survey", lambda *given: seen.append(1) or survey(*given))
    first = xcli.explain(net, images, target=1).map
    assert torch.equal(xcli.explain(net, images, target=1).map, first)
    assert len(seen) == 1
    xcli.explain(net, images[..., :48], target=1)
    with torch.no_grad():
        net.head.weight.mul_(-1)
    xcli.explain(net, images, target=1)
    net.stages[2] = nn.Identity()
    with pytest.raises(RuntimeError):
        xcli.explain(net, images, target=1)
    assert len(seen) == 4


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "eigencam"])
def test_maps_can_be_trained_through_on_request(x: Tensor, method: str):
    model = seeded(Normed).train()
    model.conv.weight.requires_grad_(False)
    pixels = x.clone().requires_grad_()
    found = xcli.explain(model, pixels, method, target=1, create_graph=True)
    found.map.square().sum().backward()
    assert model.training
    assert model.conv.weight.grad is None
    assert pixels.grad.abs().sum() > 0
    assert model.norm.weight.grad.abs().sum() > 0
    plain = xcli.explain(model, x, method, target=1)
    assert not plain.map.requires_grad
    torch.testing.assert_close(found.map, plain.map)


def test_a_method_without_a_graph_says_so(x: Tensor):
    with pytest.raises(ModelError, match="random gives no maps that can be trained through"):
        xcli.explain(seeded(Normed), x, "random", create_graph=True)
    with pytest.raises(ModelError, match="neither the images nor a weight"):
        xcli.explain(seeded(Normed).requires_grad_(False), x, "gradcam", create_graph=True)


@pytest.mark.parametrize("method", ["gradcam", "fullgrad", "scorecam"])
def test_images_made_under_inference_mode_are_explained_as_others(x: Tensor, method: str):
    model = seeded(Normed)
    expected = xcli.explain(model, x, method).map
    with torch.inference_mode():
        frozen_images = x.clone()
        found = xcli.explain(model, frozen_images, method).map
    torch.testing.assert_close(found.clone(), expected)
