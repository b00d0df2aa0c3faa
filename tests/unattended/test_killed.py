"""The command killed or interrupted at every step; an image that kills it: the same command goes on to the same end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import Commands, photos, plain, same, written
from store_driver import columns_of, run

from xcli.breadcrumbs import Breadcrumbs, Decoding, Trial, breadcrumbs, crashing, forget
from xcli.decode import image_size
from xcli.durable import locked
from xcli.errors import Interrupted
from xcli.images import find_images
from xcli.preprocess import Preprocess
from xcli.signals import interruptible

KILLED = -9
COUNT = 14
METRICS = [{"name": "deletion", "steps": 2}, "sparseness"]
WITH_METRICS = {"methods": ["gradcam", "random"], "metrics": METRICS}
DECODING = Decoding(Preprocess(resize=(16, 16)), (255, 255, 255), 10**6, True)


def config_of(place: Path, folder: Path, **sections: Any) -> Path:
    """A config in ``folder`` for the pictures of ``place``; its run goes to ``folder/run``."""
    folder.mkdir(exist_ok=True)
    laid = {**WITH_METRICS, "output": {"png": ["heatmap"]}, **sections}
    return written(folder / "config.yaml", plain(place / "photos", folder / "run", **laid))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, xai: Commands) -> Path:
    """Pictures; in ``maps/run`` a run that explained them, and nothing disturbed it."""
    folder = tmp_path_factory.mktemp("killed")
    photos(folder / "photos", COUNT)
    done(xai("explain", config_of(folder, folder / "maps", metrics=[])))
    return folder


@pytest.fixture(scope="module")
def scored(place: Path, xai: Commands) -> Path:
    """That run, scored afterwards."""
    folder = Path(shutil.copytree(place / "maps", place / "scored"))
    done(xai(*evaluation(folder / "run")))
    return folder / "run"


def done(ended: Any) -> None:
    assert ended.code == 0, ended


def evaluation(root: Path) -> list[object]:
    return ["evaluate", root, "--set", f"metrics={json.dumps(METRICS)}"]


def alike(found: Path, expected: Path) -> None:
    """The same files, with the same columns, pictures and lines in them."""
    same(found, expected)
    left, right = files(found), files(expected)
    assert set(left) == set(right)
    for name, content in right.items():
        assert left[name] == content, name


def files(run: Path) -> dict[str, bytes]:
    """What is in a run beside results.h5 and what says when and where it was made; leftovers would be here too."""
    found = {str(file.relative_to(run)): file for file in run.rglob("*") if file.is_file()}
    apart = ("results.h5", "run.json", "inputs.jsonl")
    return {
        name: file.read_bytes()
        for name, file in found.items()
        if name not in apart and not name.endswith(".lock")
    }


ONCE = ("evaluation-done", "record-done", "merge-done", "csv-done")
"""Passed only by the command that has made the file; a kill right before leaves it made."""


def points_of(xai: Commands, folder: Path, call: list[object]) -> list[str]:
    """The names of all fail-points that the command passes, in their order; one image stands for all."""
    journal = folder / "points"
    done(xai(*call, points=str(journal)))
    names = ["decode-*" if name.startswith("decode-") else name for name in journal.read_text().splitlines()]
    return list(dict.fromkeys(names))


def sweep(xai: Commands, folder: Path, prepare: Callable[[Path], list[object]], expected: Path) -> int:
    """Kill what ``prepare`` begins in a folder at every fail-point, in turn, and let it end; returns how many kills."""
    names = points_of(xai, folder, prepare(folder / "first"))
    alike(folder / "first" / "run", expected)
    chains = [[name for name in names if name not in ONCE], *([name] for name in names if name in ONCE)]
    for number, chain in enumerate(chains):
        call = prepare(folder / str(number))
        root = folder / str(number) / "run"
        for name in chain:
            assert xai(*call, failpoint=f"{name}:1").code == KILLED, name
            if (root / "results.h5").exists():
                columns_of(root / "results.h5")  # old or new, never half
        done(xai(*call))
        alike(root, expected)
    return len(names)


every_point = pytest.mark.case(
    "SIGKILL at every fail-point of explain, evaluate and merge (500+ kills)",
    "what was reported as written is there; the same command ends as if nothing had been",
    "",
)


@pytest.mark.soak
@every_point
def test_scoring_a_run_killed_at_every_step(place: Path, scored: Path, tmp_path: Path, xai: Commands):
    def begun(folder: Path) -> list[object]:
        shutil.copytree(place / "maps", folder)
        return evaluation(folder / "run")

    assert sweep(xai, tmp_path, begun, scored) > 25


@pytest.mark.soak
@every_point
def test_explaining_and_scoring_killed_at_every_step(place: Path, tmp_path: Path, xai: Commands):
    def begun(folder: Path) -> list[object]:
        return ["evaluate", config_of(place, folder)]

    config = config_of(place, tmp_path / "whole")
    done(xai("evaluate", config))
    assert sweep(xai, tmp_path, begun, tmp_path / "whole" / "run") > 25


@pytest.mark.soak
@every_point
@pytest.mark.parametrize("layout", ["merged", "parts"])
def test_a_merge_of_shards_killed_at_every_step(place: Path, tmp_path: Path, xai: Commands, layout: str):
    sections = {"metrics": [], "output": {"png": [], "layout": layout}}
    done(xai("explain", config_of(place, tmp_path / "whole", **sections)))
    call = ["explain", config_of(place, tmp_path / "shards", **sections)]
    done(xai(*call, "--shard", "1/2"))
    assert xai(*call, "--shard", "2/2", failpoint="merge-start:1").code == KILLED

    def begun(folder: Path) -> list[object]:
        shutil.copytree(tmp_path / "shards", folder)
        return ["merge", folder / "run"]

    assert sweep(xai, tmp_path, begun, tmp_path / "whole" / "run") >= 9


@pytest.mark.soak
def test_what_was_committed_before_a_kill_is_not_computed_again(place: Path, tmp_path: Path, xai: Commands):
    call = ["explain", config_of(place, tmp_path, metrics=[])]
    assert xai(*call, failpoint="part-done:2").code == KILLED
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "parts").glob("*.h5")}
    assert sorted(file.name for file in kept) == ["00000.h5", "00001.h5"]
    assert xai(*call, failpoint="merge-start:1").code == KILLED
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    done(xai(*call))
    alike(tmp_path / "run", place / "maps" / "run")


def test_a_table_of_scores_goes_when_the_results_change(tmp_path: Path):
    """It is made again by what scores the run, and never speaks of other results."""
    run(tmp_path, 7)
    made = [tmp_path / name for name in ("metrics.csv", "curves-road.png", "curves-road.png.tmp")]
    for path in (*made, tmp_path / "metrics.csv.mine"):
        path.write_text("old")
    run(tmp_path, 7)
    assert all(path.exists() for path in made)
    run(tmp_path, 11, update=True)
    assert not any(path.exists() for path in made)
    assert (tmp_path / "metrics.csv.mine").exists()


@pytest.mark.soak
@pytest.mark.parametrize("nth", [2, 5, 8])
def test_a_kill_at_the_nth_point_of_all_loses_nothing(place: Path, tmp_path: Path, xai: Commands, nth: int):
    call = ["explain", config_of(place, tmp_path, metrics=[])]
    assert xai(*call, failpoint=f"[!d]*:{5 * nth}").code == KILLED
    assert xai(*call, failpoint=f"[!d]*:{3 * nth}").code in (KILLED, 0)
    done(xai(*call))
    alike(tmp_path / "run", place / "maps" / "run")


@pytest.mark.soak
@pytest.mark.parametrize("point", ["csv-synced:1", "curves-half:1", "merge-renamed:1"])
def test_the_table_of_scores_is_never_that_of_before(scored: Path, tmp_path: Path, xai: Commands, point: str):
    """Killed before metrics.csv is new, the old one must not stand for it, as nothing is left to score."""
    root = Path(shutil.copytree(scored, tmp_path / "run"))
    more = json.dumps([*METRICS, {"name": "insertion", "steps": 2}])
    call = ["evaluate", root, "--set", f"metrics={more}"]
    assert xai(*call, failpoint=point).code == KILLED
    done(xai(*call))
    assert "insertion" in (root / "metrics.csv").read_text()
    assert (root / "curves-insertion.png").exists()
    assert not list(root.rglob("*.tmp"))


# --- asked to stop -------------------------------------------------------------------------------------------

stopped = pytest.mark.case(
    "SIGINT, SIGTERM, SIGHUP", "progress is kept; the same command goes on", "129, 130, 143"
)
Ends = Callable[[int], None]


def interrupted(xai: Commands, number: int, point: str, call: list[object], ends: Ends) -> None:
    """The command, stopped by a signal at a fail-point."""
    ended = xai(*call, failpoint=point, signal=int(number))
    assert ended.code == 128 + number, ended
    assert "finished parts are kept" in ended.stderr
    assert "Traceback" not in ended.stderr
    ends(ended.code)


@stopped
@pytest.mark.parametrize(
    ("number", "point"),
    [
        (signal.SIGTERM, "part-half:2"),
        pytest.param(signal.SIGINT, "merge-dataset:3", marks=pytest.mark.soak),
        pytest.param(signal.SIGHUP, "decode-*:9", marks=pytest.mark.soak),
    ],
)
def test_explaining_is_stopped_and_goes_on(
    place: Path, tmp_path: Path, xai: Commands, number: int, point: str, ends: Ends
):
    call = ["explain", config_of(place, tmp_path, metrics=[])]
    interrupted(xai, number, point, call, ends)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.reading"))
    done(xai(*call))
    alike(tmp_path / "run", place / "maps" / "run")


@pytest.mark.soak
@stopped
@pytest.mark.parametrize(
    ("number", "point"),
    [
        (signal.SIGHUP, "scores-half:2"),
        (signal.SIGINT, "hdf5:7"),
        (signal.SIGTERM, "curves-half:1"),
        (signal.SIGINT, "csv-synced:1"),
    ],
)
def test_scoring_is_stopped_and_goes_on(
    place: Path, scored: Path, tmp_path: Path, xai: Commands, number: int, point: str, ends: Ends
):
    shutil.copytree(place / "maps" / "run", tmp_path / "run")
    interrupted(xai, number, point, evaluation(tmp_path / "run"), ends)
    assert not list(tmp_path.rglob("*.tmp"))
    done(xai(*evaluation(tmp_path / "run")))
    alike(tmp_path / "run", scored)


@stopped
@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, *(pytest.param(n, marks=pytest.mark.soak) for n in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_merge_is_finished_before_the_command_stops(
    place: Path, tmp_path: Path, xai: Commands, number: int, ends: Ends
):
    call = ["explain", config_of(place, tmp_path, metrics=[])]
    assert xai(*call, failpoint="merge-start:1").code == KILLED
    interrupted(xai, number, "merge-dataset:3", ["merge", tmp_path / "run"], ends)
    same(tmp_path / "run", place / "maps" / "run")
    done(xai("merge", tmp_path / "run"))
    alike(tmp_path / "run", place / "maps" / "run")


FACTORY = """
import os, signal
from xcli.demo import nets

def build():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except {caught}:
        {then}
    return nets.load("shapes-cnn")
"""


@stopped
def test_a_model_that_takes_everything_for_an_error_of_its_own_is_stopped_too(
    place: Path, tmp_path: Path, xai: Commands, ends: Ends
):
    (tmp_path / "net.py").write_text(FACTORY.format(caught="Exception", then="pass"))
    model = {"source": "factory", "name": f"{tmp_path / 'net.py'}:build"}
    ended = xai("explain", config_of(place, tmp_path, model=model))
    assert "interrupted by signal 15" in ended.stderr
    assert not (tmp_path / "run").exists()  # not at the end of it all
    ends(ended.code)


def test_a_second_signal_ends_the_command_at_once(place: Path, tmp_path: Path, xai: Commands):
    again = "os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "net.py").write_text(FACTORY.format(caught="BaseException", then=again))
    model = {"source": "factory", "name": f"{tmp_path / 'net.py'}:build"}
    assert xai("explain", config_of(place, tmp_path, model=model)).code == -signal.SIGINT


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch):
    """As after ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_within_a_block_that_waits_for_one_inside_ends_both():
    through = []
    with pytest.raises(Interrupted) as seen, interruptible():
        with interruptible(at_end=True):
            os.kill(os.getpid(), signal.SIGTERM)
            through.append("inside")
        through.append("outside")
    assert (seen.value.exit_code, through) == (143, ["inside"])


# --- an image that kills -------------------------------------------------------------------------------------


@pytest.mark.case(
    "an image that crashes the decoder",
    "the next run tries it apart, records that it crashes and explains the others",
    "3",
)
def test_an_image_that_kills_the_run_is_left_out_of_the_next(
    place: Path, tmp_path: Path, xai: Commands, ends: Ends
):
    call = ["explain", config_of(place, tmp_path, metrics=[])]
    evil = "decode-*005.jpg:1"
    assert xai(*call, failpoint=evil).code == KILLED
    ended = xai(*call, failpoint=evil)
    ends(ended.code)
    assert "005.jpg" in ended.stderr
    found, expected = columns_of(tmp_path / "run/results.h5"), columns_of(place / "maps/run/results.h5")
    (row,) = np.flatnonzero(found["images/status"])
    assert found["images/path"][row].endswith("005.jpg")
    assert found["images/error"][row] == "the decoder crashes on it (SIGKILL)"
    others = expected["explanations/image"] != row
    np.testing.assert_array_equal(found["explanations/image"], expected["explanations/image"][others])
    np.testing.assert_allclose(found["heatmaps/gradcam"], expected["heatmaps/gradcam"][others], atol=1e-5)
    assert not list(tmp_path.rglob("*.reading"))


@pytest.mark.soak
def test_an_image_that_only_was_there_when_the_run_was_killed_is_explained(
    place: Path, tmp_path: Path, xai: Commands
):
    call = ["explain", config_of(place, tmp_path, metrics=[])]
    assert xai(*call, failpoint="decode-*:7").code == KILLED
    assert any((tmp_path / "run/locks/1-of-1.reading").read_bytes())
    done(xai(*call))
    alike(tmp_path / "run", place / "maps" / "run")


def crumbs_of(locks: Path, name: str = "1-of-1") -> Any:
    locks.mkdir(exist_ok=True)
    photos(locks.parent / "photos", 4)
    return breadcrumbs(locks, name, find_images([str(locks.parent / "photos")]), DECODING)


def left(locks: Path, rows: list[int], name: str = "1-of-1") -> None:
    """What a killed run leaves that was reading ``rows``."""
    with crumbs_of(locks, name) as crumbs:
        for slot, row in enumerate(rows):
            Breadcrumbs.note(crumbs, slot, row + 1)
        kept = (locks / f"{name}.reading").read_bytes()
    (locks / f"{name}.reading").write_bytes(kept)


def test_a_verdict_is_kept_and_whose_rows_are_read_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def guilty(suspects: dict[int, Any], _: Decoding) -> Trial:
        asked.append(list(suspects))
        rows = list(suspects)
        return Trial(rows[: rows.index(2) + 1], "it crashes") if 2 in rows else Trial(rows)

    monkeypatch.setattr("xcli.breadcrumbs.tried", guilty)
    locks = tmp_path / "locks"
    left(locks, [0, 2, 3])
    for _ in range(2):
        with crumbs_of(locks) as crumbs:
            assert crumbs.refused == {2: "it crashes"}
            with crumbs.reading(1), crumbs.reading(3):
                assert (locks / "1-of-1.reading").read_bytes() == b"\2" + b"\0" * 7 + b"\4" + b"\0" * 7
            assert not any((locks / "1-of-1.reading").read_bytes())
    assert asked == [[0, 2, 3], [3]]
    forget(locks)
    assert list(locks.iterdir()) == []


def test_what_a_dead_shard_was_reading_is_looked_into_by_others_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("xcli.breadcrumbs.tried", lambda suspects, _: Trial([min(suspects)], "it crashes"))
    locks = tmp_path / "locks"
    left(locks, [1], "2-of-3")
    left(locks, [2], "3-of-3")
    with locked(locks / "3-of-3.lock"), crumbs_of(locks, "1-of-3") as crumbs:
        assert crumbs.refused == {1: "it crashes"}
        assert (locks / "3-of-3.reading").exists()


def suspects_of(folder: Path) -> dict[int, Any]:
    photos(folder / "photos", 3)
    (folder / "photos" / "a" / "000.png").write_bytes(b"no picture")
    return dict(enumerate(find_images([str(folder / "photos")])))


def test_only_a_crash_is_a_crash(tmp_path: Path):
    """Bad images, and those that are read without trouble, are left to the run."""
    assert crashing(suspects_of(tmp_path), DECODING) == {}


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("kill -SEGV $$", "crashes on it (SIGSEGV)"),
        ("kill -INT $$", ""),
        ("exit 1", ""),
        ("kill -KILL $$", ""),
    ],
)
def test_a_process_that_dies_names_the_image_it_had_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
):
    crasher = tmp_path / "python"
    crasher.write_text(f"#!/bin/sh\ncat > /dev/null\nif test -e {tmp_path}/once; then exit 0; fi\n"
                       f"touch {tmp_path}/once\necho 0\necho 1\n{does}\n")  # fmt: skip
    crasher.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crasher))
    assert crashing(suspects_of(tmp_path), DECODING) == ({1: f"the decoder {said}"} if said else {})


LATE, KILL = None, -int(signal.SIGKILL)


@pytest.mark.parametrize(
    ("ends", "verdicts"),
    [
        ([(b"0", LATE), (b"0", LATE), (b"1 2", 0)], {0: "the decoder does not end on it (60 s)"}),
        ([(b"0", LATE), (b"0", 0), (b"1 2", 0)], {}),
        ([(b"0 1", KILL), (b"1", KILL), (b"2", 0)], {1: "the decoder crashes on it (SIGKILL)"}),
        ([(b"0 1", KILL), (b"", KILL), (b"2", 0)], {}),
        ([(b"0", 1), (b"1", -int(signal.SIGTERM)), (b"2", -int(signal.SIGSEGV))],
         {2: "the decoder crashes on it (SIGSEGV)"}),
        ([(b"", KILL)], {}),
    ],
    ids=["late", "late once", "killed", "killed once", "other ends", "not begun"],
)  # fmt: skip
def test_what_may_come_from_elsewhere_must_happen_twice_and_the_others_are_still_tried(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: list[tuple[bytes, int | None]],
    verdicts: dict[int, str],
):
    def run_once(call: list[str], **_: Any) -> Any:
        begun, code = ends[len(calls)]
        calls.append(call)
        if code is LATE:
            raise subprocess.TimeoutExpired(call, 60, output=begun)
        return subprocess.CompletedProcess(call, code, begun)

    calls: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", run_once)
    assert crashing(suspects_of(tmp_path), DECODING) == verdicts
    assert len(calls) == len(ends)


def test_the_notes_of_a_shard_that_begins_meanwhile_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    locks = tmp_path / "locks"
    locks.mkdir()
    for number in (2, 3, 4):
        (locks / f"{number}-of-4.reading").write_bytes(bytes([number - 1, *[0] * 7]))
    with ExitStack() as others:

        def slow(suspects: dict[int, Any], _: Decoding) -> Trial:
            others.enter_context(locked(locks / "2-of-4.lock"))  # its own notes are not made yet
            (locks / "3-of-4.reading").unlink()
            (locks / "3-of-4.reading").write_bytes(b"\1" + bytes(7))  # it has begun, and died again
            return Trial(list(suspects))

        monkeypatch.setattr("xcli.breadcrumbs.tried", slow)
        with crumbs_of(locks, "1-of-4"):
            found = sorted(path.name for path in locks.glob("*.reading"))
    assert found == ["1-of-4.reading", "2-of-4.reading", "3-of-4.reading"]


def test_the_input_size_is_found_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A decoder that crashes there would take every run with it, before anything is noted."""
    files = []
    for turn in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = turn
        for kind in ("png", "tif"):
            files.append(tmp_path / f"{turn}.{kind}")
            Image.new("RGB", (30, 20)).save(files[-1], exif=exif, compression="tiff_lzw")
    late = files[2].read_bytes()  # the orientation, behind the pixels
    start = late.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(late[start : start + 4], "big")
    files[2].write_bytes(late[:start] + late[stop:-12] + late[start:stop] + late[-12:])
    for kind in ("ImageFile.ImageFile", "TiffImagePlugin.TiffImageFile"):
        monkeypatch.setattr(f"PIL.{kind}.load", lambda _: pytest.fail("decoded"))
    assert [image_size(str(file)) for file in files] == [(30, 20), (30, 20), (20, 30), (20, 30)]
