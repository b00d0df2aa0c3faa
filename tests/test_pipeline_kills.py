"""The whole command killed by SIGKILL: the same command again ends with the numbers of an uninterrupted run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Commands, photos, plain, same, written

KILLED = -9


@pytest.fixture(scope="module")
def xai() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, xai: Commands) -> Path:
    """The pictures, and a run on them that nothing disturbed."""
    place = tmp_path_factory.mktemp("kills")
    photos(place / "photos", 14)
    config = written(
        place / "whole.yaml", plain(place / "photos", place / "whole", output={"png": ["heatmap"]})
    )
    ended = xai("explain", config)
    assert ended.code == 0, ended.stderr
    return place / "whole"


def command(expected: Path, folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    sections = plain(expected.parent / "photos", folder / "run", output={"png": ["heatmap"]})
    return ["explain", str(written(folder / "config.yaml", sections))]


def pictures(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*.png")}


@pytest.mark.soak
def test_a_run_killed_seven_times_ends_like_one_that_nothing_disturbed(
    expected: Path, tmp_path: Path, xai: Commands
):
    points = [
        "record-written:1",
        "part-start:1",
        "part-half:2",
        "part-synced:1",
        "part-done:1",
        "merge-dataset:3",
        "remove-part:2",
    ]
    again = command(expected, tmp_path / "killed")
    for point in points:
        ended = xai(*again, failpoint=point)
        assert ended.code == KILLED, (point, ended)
    ended = xai(*again)
    assert ended.code == 0, ended.stderr
    run = tmp_path / "killed" / "run"
    same(run, expected)
    assert pictures(run) == pictures(expected)
    assert not list(run.rglob("*.tmp"))
    assert not (run / "parts").exists()


@pytest.mark.soak
def test_what_was_committed_before_a_kill_is_not_computed_again(
    expected: Path, tmp_path: Path, xai: Commands
):
    again = command(expected, tmp_path / "killed")
    assert xai(*again, failpoint="part-done:2").code == KILLED
    run = tmp_path / "killed" / "run"
    kept = {file.name: file.stat().st_mtime_ns for file in (run / "parts").glob("*.h5")}
    assert sorted(kept) == ["00000.h5", "00001.h5"]
    assert xai(*again, failpoint="merge-start:1").code == KILLED
    for name, changed in kept.items():
        assert (run / "parts" / name).stat().st_mtime_ns == changed
    ended = xai(*again)
    assert ended.code == 0, ended.stderr
    same(run, expected)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["inputs", "record", "part", "merge"])
@pytest.mark.parametrize("step", ["start", "half", "written", "synced", "renamed", "done"])
def test_a_kill_at_any_step_of_any_file_loses_nothing(
    expected: Path, tmp_path: Path, xai: Commands, name: str, step: str
):
    steps = {"merge": ("start", "written", "synced", "renamed", "done")}
    if step not in steps.get(name, (step,)):
        step = "allocated"
    again = command(expected, tmp_path / "killed")
    for turn in range(1, 5 if name == "part" else 2):
        assert xai(*again, failpoint=f"{name}-{step}:{turn if step == 'done' else 1}").code in (KILLED, 0)
    ended = xai(*again)
    assert ended.code == 0, ended.stderr
    same(tmp_path / "killed" / "run", expected)


@pytest.mark.soak
@pytest.mark.parametrize("nth", range(1, 12))
def test_a_kill_at_the_nth_point_of_all_loses_nothing(
    expected: Path, tmp_path: Path, xai: Commands, nth: int
):
    again = command(expected, tmp_path / "killed")
    assert xai(*again, failpoint=f"*:{5 * nth}").code == KILLED
    assert xai(*again, failpoint=f"*:{3 * nth}").code in (KILLED, 0)
    ended = xai(*again)
    assert ended.code == 0, ended.stderr
    same(tmp_path / "killed" / "run", expected)
    assert pictures(tmp_path / "killed" / "run") == pictures(expected)
