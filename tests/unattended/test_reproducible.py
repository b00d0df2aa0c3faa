"""The same command gives the same bytes; what only says how it is computed changes no number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import Commands, photos, plain, same, written
from store_driver import columns_of

import xcli

METHODS = [
    {"name": "gradcam", "relu": False},
    {"name": "rise", "masks": 12},
    {"name": "smoothgrad", "samples": 3},
    "random",
]
DRAWING = {"rise", "smoothgrad", "random"}
METRICS = [{"name": "deletion", "steps": 3}, {"name": "infidelity", "samples": 3}]
SAME = (
    "the same command twice, the recorded config, other batches, shards and workers",
    "the same results",
    "0",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, xai: Commands) -> Path:
    """A folder of pictures, a config, and its run."""
    place = tmp_path_factory.mktemp("same")
    photos(place / "photos", 6)
    sections: dict[str, Any] = {"methods": METHODS, "metrics": METRICS, "runtime": {"batch_size": 3}}
    written(place / "config.yaml", plain(Path("photos"), Path("run"), **sections))
    assert xai("evaluate", "config.yaml", folder=str(place)).code == 0
    return place


@pytest.mark.soak
@pytest.mark.case(*SAME)
def test_the_same_command_gives_the_same_bytes(
    place: Path, tmp_path: Path, xai: Commands, ends: Callable[[int], None]
):
    ends(xai("evaluate", "config.yaml", "--output", tmp_path / "run", folder=str(place)).code)
    same(tmp_path / "run", place / "run")


@pytest.mark.soak
@pytest.mark.case(*SAME)
def test_the_config_that_a_run_wrote_down_gives_the_same_bytes(
    place: Path, tmp_path: Path, xai: Commands, ends: Callable[[int], None]
):
    """Also where the command line had changed the first one."""
    photos(place / "others", 3, start=20)
    methods = "methods=[{name: smoothgrad, samples: 3}, eigencam]"
    changes = ("--input", "others", "--set", methods, "--set", "target={top: 2}")
    ended = xai("evaluate", "config.yaml", "--output", tmp_path / "run", *changes, folder=str(place))
    assert ended.code == 0, ended.stderr
    with xcli.open_run(tmp_path / "run") as run:
        (tmp_path / "again.yaml").write_text(run.config)
    again = ("evaluate", tmp_path / "again.yaml", "--output", tmp_path / "again")
    ends(xai(*again, folder=str(place)).code)
    same(tmp_path / "again", tmp_path / "run")
    assert len(columns_of(tmp_path / "run" / "results.h5")["explanations/image"]) == 6


@pytest.mark.soak
@pytest.mark.case(*SAME)
@pytest.mark.parametrize(
    ("change", "part_images"),
    [
        (["runtime.workers=0"], 4),
        (["runtime.batch_size=1"], 4),
        (["runtime.batch_size=6"], 6),
        (["runtime.batch_size=auto"], 256),
    ],
    ids=str,
)
def test_batches_parts_and_workers_change_no_number(
    place: Path,
    tmp_path: Path,
    xai: Commands,
    ends: Callable[[int], None],
    change: list[str],
    part_images: int,
):
    arguments = ["evaluate", "config.yaml", "--output", tmp_path / "run", "--set", *change]
    ends(xai(*arguments, folder=str(place), part_images=part_images).code)
    same(tmp_path / "run", place / "run", 0.0 if "workers" in change[0] else 1e-5)


@pytest.mark.soak
@pytest.mark.case(*SAME)
def test_shards_change_no_number(place: Path, tmp_path: Path, xai: Commands, ends: Callable[[int], None]):
    for shard in ("2/2", "1/2"):
        arguments = ("explain", "config.yaml", "--output", tmp_path / "run", "--shard", shard)
        ends(xai(*arguments, folder=str(place)).code)
    same(tmp_path / "run", place / "run", 1e-5)


@pytest.mark.soak
def test_the_seed_changes_what_is_drawn_and_nothing_else(place: Path, tmp_path: Path, xai: Commands):
    arguments = ("evaluate", "config.yaml", "--output", tmp_path / "run", "--set", "runtime.seed=1")
    assert xai(*arguments, folder=str(place)).code == 0
    found, base = columns_of(tmp_path / "run" / "results.h5"), columns_of(place / "run" / "results.h5")
    changed = {name for name in base if base[name].tobytes() != found[name].tobytes()}
    names = {method["name"] if isinstance(method, dict) else method for method in METHODS}
    assert {f"heatmaps/{name}" for name in DRAWING} == {
        name for name in changed if name.startswith("heatmaps/")
    }
    assert {f"metrics/{name}/infidelity" for name in names} <= changed
    unmoved = {
        "heatmaps/gradcam",
        "metrics/gradcam/deletion",
        "curves/gradcam/deletion",
        "explanations/score",
    }
    assert not unmoved & changed
    assert unmoved <= set(base)
