"""A run killed at every step of its writing: what was committed stays, and the same command finishes the work."""

import json
import os
import shutil
import subprocess
import sys
from itertools import count as counting
from pathlib import Path

import h5py
import numpy as np
import pytest
import store_driver
from store_driver import inputs, part
from test_store import assert_holds, assert_is_run, columns_of

import xcli
from xcli.store import peek

KILLED = -9


class Children:
    """Runs of ``store_driver``, each in a process of its own."""

    def __init__(self, errors):
        environment = {**os.environ, "PYTHONPATH": str(Path(xcli.__path__[0]).parent)}
        self.errors = errors
        self.server = subprocess.Popen(
            [sys.executable, store_driver.__file__], text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors.open("w"),
        )  # fmt: skip

    def run(self, root, point=None, **options):
        self.server.stdin.write(json.dumps([str(root), options, point]) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    found = Children(tmp_path_factory.mktemp("children") / "stderr")
    yield found
    found.server.stdin.close()
    found.server.wait()


def journaled(path):
    return [tuple(map(int, line.split())) for line in path.read_text().splitlines()] if path.exists() else []


def assert_committed_is_kept(root, journal, fingerprint="one"):
    merged = root / "results.h5"
    for start, stop, number in journaled(journal):
        path = root / "parts" / f"{number:05d}.h5"
        if path.exists():
            assert_holds(columns_of(path), part(slice(start, stop), fingerprint), inputs(stop)[start:])
        else:
            with h5py.File(merged) as file:
                assert len(file["images/path"]) >= stop


def assert_clean(root):
    assert not list(root.rglob("*.tmp"))


def sweep(children, tmp_path, options, *, prepare=None, check=None, stride=1, start=1, point="any"):
    """Kill the run at every passing of a fail-point in turn; returns how many kills there were."""
    before = tmp_path / "before"
    if prepare:
        prepare(before)
    for kills, passing in enumerate(counting(start, stride)):
        root, journal = tmp_path / "run", tmp_path / "journal"
        shutil.rmtree(root, ignore_errors=True)
        journal.unlink(missing_ok=True)
        if prepare:
            shutil.copytree(before, root, symlinks=True)
        ended = children.run(root, f"{point}:{passing}", journal=str(journal), **options)
        if ended == 0:
            return kills
        assert ended == KILLED, children.errors.read_text()[-2000:]
        assert_committed_is_kept(root, journal, options.get("fingerprint", "one"))
        if check:
            check(root)
        assert children.run(root, **options) == 0, children.errors.read_text()[-2000:]
        assert_is_run(root, options["count"], options.get("fingerprint", "one"))
        assert peek(root, options.get("fingerprint", "one"), inputs(options["count"])).kind == "done"
        assert_clean(root)
    return None


def old_or_new(old, new):
    """A check that results.h5 is there all the time, whole, and one of two."""
    def check(root):
        with h5py.File(root / "results.h5") as file:
            assert_is_run(root, len(file["images/path"]))
            assert len(file["images/path"]) in (old, new)
    return check  # fmt: skip


def test_a_new_run_killed_at_every_point(children, tmp_path):
    assert sweep(children, tmp_path, {"count": 11}) > 100


def test_a_run_that_keeps_its_parts_killed_at_every_third_point(children, tmp_path):
    assert sweep(children, tmp_path, {"count": 11, "layout": "parts"}, stride=3) > 25


def test_an_update_killed_at_every_third_point(children, tmp_path):
    def finished(root):
        assert children.run(root, count=7) == 0

    options = {"count": 11, "update": True}
    assert sweep(children, tmp_path, options, prepare=finished, check=old_or_new(7, 11), stride=3) > 25


def test_an_update_of_kept_parts_killed_at_every_third_point(children, tmp_path):
    def finished(root):
        assert children.run(root, count=7, layout="parts") == 0

    options = {"count": 11, "update": True, "layout": "parts"}
    assert sweep(children, tmp_path, options, prepare=finished, check=old_or_new(7, 11), stride=3) > 20


def test_starting_over_killed_at_every_point_of_the_removal(children, tmp_path):
    def unfinished_other(root):
        assert children.run(root, count=11, fingerprint="another", merge=False) == 0
        (root / "overlays/gradcam").mkdir(parents=True)
        (root / "overlays/gradcam/a.png").write_bytes(b"x")

    def other_goes_on(root):
        if (root / "run.json").exists() and "another" in (root / "run.json").read_text():
            twin = root.with_name("twin")
            shutil.rmtree(twin, ignore_errors=True)
            shutil.copytree(root, twin)
            assert children.run(twin, count=11, fingerprint="another") == 0
            assert_is_run(twin, 11, "another")

    options = {"count": 11, "fresh": True}
    assert sweep(children, tmp_path, options, prepare=unfinished_other, check=other_goes_on, stride=2) > 50


def test_one_shard_killed_while_the_other_finishes(children, tmp_path):
    passing = 0
    for passing in counting(1, 2):
        root = tmp_path / str(passing)
        if children.run(root, f"any:{passing}", count=11, shard=[1, 2]) == 0:
            break
        assert children.run(root, count=11, shard=[2, 2]) == 0
        assert children.run(root, count=11, shard=[1, 2]) == 0
        assert_is_run(root, 11)
        assert_clean(root)
    assert passing > 20


def test_killed_again_and_again_until_done(children, tmp_path):
    """Each try gets only a little further than the commit of one part."""
    root, tries = tmp_path / "run", 0
    while children.run(root, "any:9", count=11, merge=False) == KILLED:
        tries += 1
        assert tries < 20
    assert tries >= 3
    assert children.run(root, count=11) == 0
    assert_is_run(root, 11)


@pytest.mark.parametrize("point", ["part-half", "part-written", "part-synced"])
def test_a_part_is_nothing_before_its_rename(children, tmp_path, point):
    assert children.run(tmp_path, f"{point}:2", count=11) == KILLED
    assert [path.name for path in (tmp_path / "parts").glob("*.h5")] == ["00000.h5"]
    assert len(list((tmp_path / "parts").glob("*.tmp"))) == 1


def test_the_lock_of_a_killed_run_is_free(children, tmp_path):
    assert children.run(tmp_path, "part-half:1", count=11) == KILLED
    assert (tmp_path / "locks/1-of-1.lock").stat().st_size > 0
    assert children.run(tmp_path, count=11) == 0


# --- full disks ----------------------------------------------------------------------------------------------


def test_a_full_disk_at_any_size_never_crashes_and_keeps_the_parts(children, tmp_path):
    """The limit on file sizes stands for the disk: first parts fail, then the merge, then nothing."""
    ends = []
    for size in range(1_000, 700_000, 12_000):
        root, journal = tmp_path / str(size), tmp_path / f"journal-{size}"
        ends.append(children.run(root, count=11, journal=str(journal), file_size=size))
        if ends[-1]:
            assert ends[-1] == 6, (size, children.errors.read_text()[-2000:])
            assert_committed_is_kept(root, journal)
            assert_clean(root)
            assert not (root / "results.h5").exists()
            assert children.run(root, count=11) == 0
        assert_is_run(root, 11)
        if ends[-1] == 0:
            break
    assert ends.count(6) > 10
    assert ends[-1] == 0
    assert "MB" in children.errors.read_text()


def test_a_disk_that_fills_during_the_merge_leaves_the_old_results(children, tmp_path):
    assert children.run(tmp_path, count=7) == 0
    assert children.run(tmp_path, count=11, update=True, merge=False) == 0
    assert children.run(tmp_path, count=11, file_size=100_000) == 6
    old_or_new(7, 7)(tmp_path)
    assert children.run(tmp_path, count=11) == 0
    assert_is_run(tmp_path, 11)


# --- longer --------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("layout", ["merged", "parts"])
def test_updates_killed_at_every_point(children, tmp_path, layout):
    def finished(root):
        assert children.run(root, count=14, layout=layout) == 0

    options = {"count": 41, "update": True, "layout": layout}
    assert sweep(children, tmp_path, options, prepare=finished, check=old_or_new(14, 41)) > 150


@pytest.mark.soak
def test_a_longer_run_killed_at_random_points_until_done(children, tmp_path):
    rng = np.random.default_rng(0)
    for attempt in range(150):
        root, journal = tmp_path / str(attempt), tmp_path / f"journal-{attempt}"
        while children.run(root, f"any:{rng.integers(20, 400)}", count=41, journal=str(journal)) == KILLED:
            assert_committed_is_kept(root, journal)
        assert_is_run(root, 41)
        assert_clean(root)
        shutil.rmtree(root)
