"""Out of memory: fewer at once, the same results, and a note; what does not fit alone says so with the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import Commands, longer, photos, plain, same, written
from store_driver import columns_of

from xcli.execution import Execution, numbers_of

NETWORKS = Path(__file__).with_name("odd_networks.py")
METHODS = ["saliency", {"name": "gradcam", "relu": False}, {"name": "rise", "masks": 12}, "random"]
METRICS = [{"name": "deletion", "steps": 4}]
HALVED = (
    "out of memory",
    "smaller batches, the same results, a note; an image that does not fit alone fails",
    "0, 3",
)
NUMBERS = "2147 MB more were asked for, 537 MB are free, of 8590 MB in all"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("memory") / "photos"
    photos(place, 6)
    return place


@pytest.fixture(scope="module")
def roomy(folder: Path, xai: Commands) -> Path:
    """A run with memory enough."""
    ended = xai("evaluate", config_of(folder, folder.parent / "roomy"))
    assert ended.code == 0, ended.stderr
    return folder.parent / "roomy"


def config_of(folder: Path, output: Path, /, **network: Any) -> Path:
    model = {"source": "factory", "name": f"{NETWORKS}:large", "args": network}
    sections = {"model": model, "methods": METHODS, "metrics": METRICS, "runtime": {"batch_size": 6}}
    return written(output.parent / f"{output.name}.yaml", plain(folder, output, **sections))


@pytest.mark.soak
@pytest.mark.case(*HALVED)
@pytest.mark.parametrize("says", ["gpu", "cpu", "backward"])
def test_where_memory_runs_out_batches_are_halved_and_the_results_are_the_same(
    folder: Path, roomy: Path, tmp_path: Path, xai: Commands, ends: Callable[[int], None], says: str
):
    ended = xai("evaluate", config_of(folder, tmp_path / "run", most=2, says=says), "--json", part_images=6)
    ends(ended.code)
    assert json.loads(ended.stdout)["halved"] == [6, 1]
    assert ended.stderr.count("out of memory: ") == 1
    same(tmp_path / "run", roomy, 1e-5)


@pytest.mark.soak
def test_a_run_with_memory_enough_says_nothing_of_it(folder: Path, tmp_path: Path, xai: Commands):
    ended = xai("explain", config_of(folder, tmp_path / "run"), "--json")
    assert json.loads(ended.stdout)["halved"] is None
    assert "out of memory" not in ended.stderr


@pytest.mark.case(*HALVED)
def test_an_image_that_does_not_fit_alone_fails_with_the_numbers(
    tmp_path: Path, xai: Commands, ends: Callable[[int], None]
):
    photos(tmp_path / "photos", 3)
    Image.new("RGB", (64, 64), (255, 255, 255)).save(tmp_path / "photos" / "a" / "white.png")
    ended = xai("explain", config_of(tmp_path / "photos", tmp_path / "run", white=True), "--json")
    ends(ended.code)
    assert ended.code == 3
    found = columns_of(tmp_path / "run" / "results.h5")
    failed = dict(zip(found["images/path"], found["images/error"], strict=True))
    assert NUMBERS in failed.pop("a/white.png")
    assert not any(failed.values())
    assert len(found["explanations/image"]) == 3


@pytest.mark.case("a model too large for one image", "nothing is run; it says so with the numbers", "2")
@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"most": 0}, NUMBERS),
        *longer(
            ({"most": 0, "says": "cpu"}, "(18014398509 MB more were asked for)"),
            ({"most": 0, "says": "backward"}, NUMBERS),
        ),
    ],
    ids=["a pass", "a pass on the CPU", "a gradient"],
)
def test_a_model_that_is_too_large_for_one_image_says_so(
    folder: Path,
    tmp_path: Path,
    xai: Commands,
    ends: Callable[[int], None],
    network: dict[str, Any],
    said: str,
):
    ended = xai("explain", config_of(folder, tmp_path / "run", **network))
    ends(ended.code)
    (line,) = [line for line in ended.stderr.splitlines() if "memory" in line]
    assert "odd_networks.py:large" in line
    assert said in line
    assert ("saliency on one image of 64x64" in line) == (network.get("says") == "backward")
    assert "use a smaller input size or another device" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("said", "numbers"),
    [
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 7.00 "
            "MiB is free. Process 1 has 79.14 GiB memory in use.",
            " (21 MB more were asked for, 7 MB are free, of 84987 MB in all)",
        ),
        (
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
            "to allocate 250000000 bytes. Error code 12 (Cannot allocate memory)",
            " (250 MB more were asked for)",
        ),
        ("CUDNN_STATUS_ALLOC_FAILED", ""),
    ],
)
def test_the_numbers_are_those_that_the_allocator_says(said: str, numbers: str):
    assert numbers_of(RuntimeError(said)) == numbers


def test_what_was_halved_is_noted_from_the_first_to_the_last():
    execution = Execution(16)
    assert execution.halved is None
    execution.halve(16)
    execution.halve(8)
    assert (execution.micro_batch, execution.halved) == (4, (16, 4))


def test_what_was_halved_in_a_part_of_the_network_is_noted_where_the_whole_was_not():
    execution, inputs = Execution(16), torch.zeros(1, 2**20)
    execution.part(inputs).halve(16)
    assert (execution.micro_batch, execution.halved) == (16, (16, 8))
    execution.halve(8)
    assert execution.halved == (8, 4)
