"""Outputs that are full, read-only or not there: one message with what to do, and the same command goes on later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import Commands, Ended, photos, plain, same, written

COUNT = 10
METRICS = [{"name": "deletion", "steps": 2}]
Ends = Callable[[int], None]

full = pytest.mark.case(
    "the disk full, the output read-only",
    "one message says what is needed; what was written stays; the same command goes on",
    "6",
)


def config_of(place: Path, folder: Path, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    laid = {"methods": ["gradcam", "random"], "output": {"png": ["heatmap"]}, **sections}
    return written(folder / "config.yaml", plain(place / "photos", folder / "run", **laid))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, xai: Commands) -> Path:
    """Pictures, and a finished run of them in ``whole/run``."""
    folder = tmp_path_factory.mktemp("disk")
    photos(folder / "photos", COUNT)
    ended = xai("explain", config_of(folder, folder / "whole"))
    assert ended.code == 0, ended
    return folder


def pictures(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.png")}


def refused(ended: Ended, run: Path, ends: Ends) -> None:
    """Exit code 6 with words about the place, and nothing half-written."""
    ends(ended.code)
    assert "Traceback" not in ended.stderr
    assert "cannot write" in ended.stderr
    assert str(run) in ended.stderr
    assert not list(run.rglob("*.tmp"))


@full
@pytest.mark.parametrize(
    "sizes", [[2_000, 200_000], pytest.param([4_000, 20_000, 60_000, 160_000], marks=pytest.mark.soak)]
)
def test_explaining_goes_on_once_there_is_room(
    place: Path, tmp_path: Path, xai: Commands, sizes: list[int], ends: Ends
):
    """A limit on files stands for the disk: the record fails, pictures, parts, the merge."""
    call = ["explain", config_of(place, tmp_path)]
    run, parts = tmp_path / "run", dict[str, bytes]()
    for size in sizes:
        ended = xai(*call, file_size=size)
        refused(ended, run, ends)
        assert "free at least 1 MB there" in ended.stderr
        assert "run the same command to go on" in ended.stderr
        now = {file.name: file.read_bytes() for file in run.glob("parts/*.h5")}
        assert now.items() >= parts.items()
        parts = now
    assert len(parts) == 3  # only the merge was left to do
    assert xai(*call).code == 0
    same(run, place / "whole" / "run")
    assert pictures(run) == pictures(place / "whole" / "run")


@full
@pytest.mark.soak
def test_scoring_goes_on_once_there_is_room(place: Path, tmp_path: Path, xai: Commands, ends: Ends):
    run = Path(shutil.copytree(place / "whole" / "run", tmp_path / "run"))
    call = ["evaluate", run, "--set", f"metrics={json.dumps(METRICS)}", "--json"]
    for size in (2_000, 10_000, 100_000):
        ended = xai(*call, file_size=size)
        refused(Ended(ended.code, "", ended.stderr), run, ends)
        assert json.loads(ended.stdout)["exit_code"] == 6
        same(run, place / "whole" / "run")  # as before
    assert xai(*call).code == 0
    shutil.copytree(place / "whole" / "run", tmp_path / "whole")
    assert xai("evaluate", tmp_path / "whole", *call[2:]).code == 0
    same(run, tmp_path / "whole")
    assert pictures(run) == pictures(tmp_path / "whole")
    assert (run / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


@pytest.mark.soak
def test_a_table_that_cannot_be_written_is_written_by_the_same_command_later(
    place: Path, tmp_path: Path, xai: Commands
):
    run = Path(shutil.copytree(place / "whole" / "run", tmp_path / "run"))
    call = ["evaluate", run, "--metrics", "sparseness"]
    assert xai(*call, failpoint="csv-synced:1").code == -9  # all is scored, the table is missing
    (run / "metrics.csv.tmp").unlink()
    (run / "metrics.csv.tmp").mkdir()
    ended = xai(*call)
    assert ended.code == 6
    assert "metrics.csv" in ended.stderr
    (run / "metrics.csv.tmp").rmdir()
    assert xai(*call).code == 0
    assert "sparseness" in (run / "metrics.csv").read_text()


@full
def test_joining_goes_on_once_there_is_room(place: Path, tmp_path: Path, xai: Commands, ends: Ends):
    call = ["explain", config_of(place, tmp_path)]
    assert xai(*call, failpoint="merge-start:1").code == -9
    run = tmp_path / "run"
    refused(xai("merge", run, file_size=50_000), run, ends)
    assert len(list((run / "parts").glob("*.h5"))) == 3
    assert xai("merge", run).code == 0
    same(run, place / "whole" / "run")


@pytest.fixture
def locked_up(place: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of all that is in ``place``, which may be read and not written."""
    folder = Path(shutil.copytree(place, tmp_path / "all"))
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in paths:
        path.chmod(0o755)


@full
@pytest.mark.parametrize("what", ["a new run", "a finished run", "a score"])
def test_a_read_only_output_is_refused_before_any_work(locked_up: Path, xai: Commands, what: str, ends: Ends):
    config, run = locked_up / "whole" / "config.yaml", locked_up / "whole" / "run"
    call: list[object] = {
        "a new run": ["explain", config, "--output", locked_up / "new"],
        "a finished run": ["explain", config, "--output", run, "--fresh"],
        "a score": ["evaluate", run, "--metrics", "sparseness"],
    }[what]
    before = {path: path.stat().st_mtime_ns for path in locked_up.rglob("*")}
    ended = xai(*call, obeys=True)
    refused(ended, locked_up, ends)
    assert "make it writable or choose another output.path" in ended.stderr
    assert {path: path.stat().st_mtime_ns for path in locked_up.rglob("*")} == before


# --- nobody listens ------------------------------------------------------------------------------------------


def test_a_run_does_not_end_for_want_of_somebody_who_reads_its_messages(
    place: Path, tmp_path: Path, xai: Commands
):
    call = ["explain", config_of(place, tmp_path)]
    assert xai(*call, stderr="/dev/full").code == 0
    same(tmp_path / "run", place / "whole" / "run")
    ended = xai(*call, "--json", stderr=None)
    assert (ended.code, json.loads(ended.stdout)["status"]) == (0, "already done")


def test_results_that_cannot_be_printed_are_an_error_and_no_traceback(place: Path, xai: Commands):
    call = ["explain", config_of(place, place / "whole"), "--json"]
    ended = xai(*call, stdout="/dev/full")
    assert ended.code == 6
    assert "cannot write to standard output" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert xai(*call, stdout=None).code == 0
