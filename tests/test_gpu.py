"""On a GPU: the same maps as on the CPU, the same from run to run, and the whole command. ``pytest -n0 -m gpu``."""

from __future__ import annotations

from pathlib import Path

import contract
import metric_contract
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import xcli
from xcli.config import load_config
from xcli.demo import nets
from xcli.hooks import frozen
from xcli.images import find_images
from xcli.overrides import Changes
from xcli.pipeline import explain_folder
from xcli.registry import methods, metrics
from xcli.tuning import exact

pytestmark = pytest.mark.gpu
SCENES = Path(__file__).parents[1] / "sample_images" / "scenes"


@pytest.mark.parametrize(
    ("name", "network"),
    [
        (name, net)
        for name in sorted(methods())
        for net in contract.NETWORKS
        if (name, net) not in contract.REFUSED
    ],
)
def test_a_gpu_gives_the_maps_of_the_cpu(name, network):
    """In float64 where a method optimises or sorts: it takes the last bits of a gradient for a direction."""
    dtype = torch.float64 if name in ("opti-cam", "guided-ig", "extremal-perturbation") else torch.float32
    x = contract.pictures((128, 128)).to(dtype)
    cls = methods()[name]
    method = cls(**cls.small)
    told = {"target": [6, 1, 7, 0, 2], "pictures": contract.Others(x.shape[2:])}
    with exact():
        net = nets.load(network).to(dtype)
        expected = xcli.explain(net, x, method, **told)
        found = xcli.explain(net.cuda(), x.cuda(), method, **told)
        again = xcli.explain(net, x.cuda(), method, **told)
    assert found.map.device.type == "cuda"
    assert_close(found.map.cpu(), expected.map, rtol=1e-4, atol=1e-4 * float(expected.map.abs().max()))
    assert torch.equal(found.map, again.map)


@pytest.mark.parametrize("name", sorted(metrics()))
def test_a_gpu_gives_the_scores_of_the_cpu(name):
    """In float64, as a metric that sorts pixels takes the last bits of a map for an order."""
    cls = metrics()[name]
    metric, x = cls(**cls.small), metric_contract.scenes()
    with exact(), frozen(nets.load("shapes-cnn").double()) as net:
        expected = metric_contract.given(metric, net, x, *contract.ROWS)
        values = metric_contract.parts_of(metric.measure(**expected))
    with exact(), frozen(nets.load("shapes-cnn").double().cuda()) as net:
        found = metric_contract.measured(metric, net, x.cuda(), *contract.ROWS)
    parts = metric_contract.parts_of(found)
    assert all(part.device.type == "cuda" for part in parts)
    for one, other in zip(parts, values, strict=True):
        assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_running_out_of_gpu_memory_halves_the_micro_batch():
    net = nets.load("shapes-cnn").cuda()
    x = contract.pictures((128, 128)).float().cuda().repeat(40, 1, 1, 1)
    expected = xcli.explain(net, x, "gradcam", target=3, micro_batch=8).map
    free = torch.cuda.mem_get_info()[0]
    hoard = torch.empty(max(0, free - (300 << 20)), dtype=torch.uint8, device="cuda")
    try:
        found = xcli.explain(net, x, "gradcam", target=3, micro_batch=200).map
    finally:
        del hoard
        torch.cuda.empty_cache()
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def run(out: Path, device: str, *overrides: str) -> dict[str, np.ndarray]:
    config = load_config(
        None,
        Changes(
            inputs=[str(SCENES)], output=str(out), device=device, overrides=["output.png=[]", *overrides]
        ),
    )
    explain_folder(config, find_images([str(SCENES)]))
    with xcli.open_run(out) as found:
        return {name: found.heatmap(name) for name in found.names}


def test_the_command_gives_on_a_gpu_what_it_gives_on_the_cpu(tmp_path: Path):
    cpu, gpu = run(tmp_path / "cpu", "cpu"), run(tmp_path / "gpu", "cuda")
    for name, maps in cpu.items():
        np.testing.assert_allclose(
            gpu[name], maps, rtol=1e-4, atol=1e-4 * float(np.abs(maps).max()), err_msg=name
        )


def test_two_gpu_runs_are_equal_to_the_bit(tmp_path: Path):
    one, two = run(tmp_path / "one", "cuda"), run(tmp_path / "two", "cuda")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    half = run(tmp_path / "half", "cuda", "runtime.precision=bfloat16")
    assert np.isfinite(half["gradcam"]).all()


def test_pictures_are_made_on_the_gpu(tmp_path: Path):
    config = load_config(None, Changes(inputs=[str(SCENES)], output=str(tmp_path / "run"), device="cuda"))
    summary = explain_folder(config, find_images([str(SCENES)]))
    panels = list((tmp_path / "run" / "panels").rglob("*.png"))
    assert len(panels) == summary.images == 24
