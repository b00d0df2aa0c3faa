"""Any function of pictures is a model: explained by methods that only look at scores, refused by the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from runs import Commands, photos
from torch import nn
from torch.testing import assert_close

import xcli
from xcli.errors import ModelError
from xcli.factory import BlackBox

CODE = """
import numpy as np

KEYS = {"resize": 32, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
WEIGHT = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype("float32")

def linear():
    return lambda x: np.einsum("nchw,lchw->nl", x.numpy(), WEIGHT), KEYS

def lists():
    return lambda x: [[float(one.sum()), 1.0] for one in x], KEYS

def one_number():
    return lambda x: x.sum((1, 2, 3)), KEYS

def broken():
    return lambda x: x.no_such_thing, KEYS

def nothing():
    return 3

def small():
    def predict(x):
        if len(x) > 2:
            raise RuntimeError("out of memory")
        return np.einsum("nchw,lchw->nl", x.numpy(), WEIGHT)
    return predict, KEYS
"""
"""What a user may have written."""


@pytest.fixture(scope="module")
def xai() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture
def config(tmp_path):
    photos(tmp_path / "photos", 5)
    (tmp_path / "boxes.py").write_text(CODE)
    path = tmp_path / "box.yaml"
    path.write_text(
        f"""
model: {{source: factory, name: "{tmp_path}/boxes.py:linear"}}
images: {{path: {tmp_path}/photos}}
score: logit
methods: [{{name: feature-ablation, segments: "grid:4"}}]
output: {{path: {tmp_path}/out, png: []}}
"""
    )
    return path


def changed(config: Path, function: str) -> list[str]:
    return ["--set", f"model.name={config.parent}/boxes.py:{function}"]


def maps(config: Path) -> np.ndarray:
    with h5py.File(config.parent / "out" / "results.h5") as file:
        return file["heatmaps/feature-ablation"][:]


def test_a_numpy_function_is_explained_exactly(config, xai):
    assert xai("explain", config, "--limit", "2").code == 0
    found = maps(config)
    sums = found.reshape(2, 4, 8, 4, 8)[:, :, 0, :, 0].sum((1, 2))
    with h5py.File(config.parent / "out" / "results.h5") as file:
        score = file["explanations/score"][:]
    assert_close(sums, score, rtol=1e-4, atol=1e-3)  # linear, and 0 for a picture without content


def test_lists_do_as_well(config, xai):
    assert xai("explain", config, "--limit", "2", *changed(config, "lists")).code == 0
    assert np.isfinite(maps(config)).all()


def test_a_function_that_runs_out_of_memory_gets_smaller_batches(config, xai):
    assert xai("explain", config, "--limit", "5").code == 0
    whole = maps(config)
    assert xai("explain", config, "--limit", "5", "--fresh", *changed(config, "small")).code == 0
    assert_close(maps(config), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "methods.0=saliency"], "the model gives no gradient: it is a black box"),
        (["--set", "methods.0=gradcam"], "no layer before the head has a spatial map"),
    ],
)
def test_methods_that_need_more_than_scores_are_refused(config, xai, arguments, said):
    found = xai("explain", config, "--limit", "2", *arguments)
    assert found.code == 2
    assert said in found.stderr


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("one_number", "has to return (1, L), a row of L numbers a picture"),
        ("broken", "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
        ("nothing", "returned a int, not an nn.Module or a function of pictures"),
    ],
)
def test_a_function_that_is_none_is_told_what_it_has_to_be(config, xai, function, said):
    found = xai("explain", config, "--limit", "2", *changed(config, function))
    assert found.code == 2
    assert said in found.stderr
    assert "Traceback" not in found.stderr


def test_in_python_a_function_is_wrapped_by_hand():
    weight = np.random.default_rng(0).normal(size=(4, 3, 16, 16))
    net = BlackBox(lambda x: np.einsum("nchw,lchw->nl", x.numpy(), weight), "mine")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = xcli.explain(net, x, {"name": "kernel-shap", "segments": "grid:3"}, target=1, native=True)
    terms = (x * torch.from_numpy(weight[1])).sum(1)
    # pixel 5 has its middle at 5.5 * 3 / 16 = 1.03: the first cell is 5 pixels wide
    assert_close(found.map[:, 0, 0], terms[:, :5, :5].sum((1, 2)), rtol=1e-8, atol=1e-8)
    with pytest.raises(ModelError, match="no gradient"):
        xcli.explain(net, x, "input-x-gradient", target=1)


def test_a_network_that_cuts_its_graph_off_is_told_so_too():
    class Cut(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.detach().flatten(1)[:, :4]

    with pytest.raises(ModelError, match="no gradient"):
        xcli.explain(Cut(), torch.randn(1, 3, 8, 8), "saliency", target=1)
