"""A run killed at every step of its writing: what was committed stays, and the same command finishes the work."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import h5py
import numpy as np
import pytest
import store_driver
from store_driver import assert_holds, assert_is_run, columns_of, inputs, part, record

import xcli
from xcli.store import open_store, peek

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


@pytest.fixture
def place(tmp_path):
    """A folder in memory where there is one: a kill, unlike a power cut, does not ask what is on disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


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
    assert not (root / "overlays").exists()  # only a run that was replaced had pictures


def passes(root, options, monkeypatch):
    """How often every fail-point is passed when the run in ``root`` goes on; it does."""
    names = []
    with monkeypatch.context() as patched:
        patched.setenv("XCLI_FAILPOINT", "none:1")
        patched.setattr("xcli.durable.fnmatchcase", lambda name, _: names.append(name))
        store_driver.run(root, **options)
    return Counter(names)


def sweep(children, place, options, monkeypatch, *, prepare=None, check=None, only="*", every=False):
    """Kill the run at the first and last (or ``every``) passing of all fail-points; returns the number of kills."""
    before, trial, fingerprint = place / "before", place / "trial", options.get("fingerprint", "one")
    before.mkdir()
    if prepare:
        prepare(before)
    shutil.copytree(before, trial)
    counts = passes(trial, options, monkeypatch)
    plan = [(name, n) for name, last in counts.items() for n in (range(1, last + 1) if every else {1, last})]
    plan = [(name, n) for name, n in plan if any(fnmatchcase(name, pattern) for pattern in only.split("|"))]
    for name, n in plan:
        root, journal = place / "run", place / "journal"
        shutil.rmtree(root, ignore_errors=True)
        journal.unlink(missing_ok=True)
        shutil.copytree(before, root)
        assert children.run(root, f"{name}:{n}", journal=str(journal), **options) == KILLED, (name, n)
        assert_committed_is_kept(root, journal, fingerprint)
        if check:
            check(root)
        assert children.run(root, **options) == 0, children.errors.read_text()[-2000:]
        assert_is_run(root, options["count"], fingerprint)
        assert peek(root, fingerprint, inputs(options["count"])).kind == "done"
        assert_clean(root)
    return len(plan)


def old_or_new(old, new):
    """A check that results.h5 is there all the time, whole, and one of two."""

    def check(root):
        with h5py.File(root / "results.h5") as file:
            assert_is_run(root, len(file["images/path"]))
            assert len(file["images/path"]) in (old, new)

    return check  # fmt: skip


NEW, UPDATE, OVER = {"count": 11}, {"count": 11, "update": True}, {"count": 11, "fresh": True}
KEPT = {"layout": "parts"}


def finished(children, **options):
    """A preparation: the run of the first seven images."""

    def prepare(root):
        assert children.run(root, count=7, **options) == 0

    return prepare  # fmt: skip


def another(children):
    """A preparation: an unfinished run with another config, and a picture."""

    def prepare(root):
        assert children.run(root, count=11, fingerprint="another", merge=False) == 0
        (root / "overlays/gradcam").mkdir(parents=True)
        (root / "overlays/gradcam/a.png").write_bytes(b"x")

    return prepare  # fmt: skip


def another_goes_on(children):
    """A check that half-removed leavings of the other run are still that run, and no part of the new one."""

    def check(root):
        if (root / "run.json").exists() and "another" in (root / "run.json").read_text():
            twin = root.with_name("twin")
            shutil.rmtree(twin, ignore_errors=True)
            shutil.copytree(root, twin)
            assert children.run(twin, count=11, fingerprint="another") == 0
            assert_is_run(twin, 11, "another")

    return check  # fmt: skip


@pytest.mark.soak
def test_a_new_run_killed_at_every_step(children, place, monkeypatch):
    assert sweep(children, place, NEW, monkeypatch) > 35


def test_a_run_that_keeps_its_parts_killed_while_merging(children, place, monkeypatch):
    assert sweep(children, place, NEW | KEPT, monkeypatch, only="merge-*") >= 8


@pytest.mark.soak
def test_an_update_killed_at_every_step_of_its_own(children, place, monkeypatch):
    own = "base-*|inputs-*|record-*|merge-*|remove-*"
    counted = sweep(
        children, place, UPDATE, monkeypatch, prepare=finished(children), check=old_or_new(7, 11), only=own
    )
    assert counted > 25


@pytest.mark.soak
def test_an_update_of_kept_parts_killed_while_it_begins(children, place, monkeypatch):
    before = finished(children, **KEPT)
    own = "inputs-*|record-*|merge-*ed"
    assert (
        sweep(children, place, UPDATE | KEPT, monkeypatch, prepare=before, check=old_or_new(7, 11), only=own)
        > 12
    )


@pytest.mark.soak
def test_starting_over_killed_at_every_step_of_the_removal(children, place, monkeypatch):
    before, check = another(children), another_goes_on(children)
    own = "fresh-*|remove-*|*-start"
    assert sweep(children, place, OVER, monkeypatch, prepare=before, check=check, only=own) > 10


def test_one_shard_killed_while_the_other_finishes(children, place):
    for point in (
        "inputs-renamed:1",
        "record-half:1",
        "record-done:1",
        "part-half:2",
        "part-renamed:2",
        "part-done:2",
    ):
        root = place / point
        assert children.run(root, point, count=11, shard=[1, 2]) == KILLED
        assert children.run(root, count=11, shard=[2, 2]) == 0
        assert not (root / "results.h5").exists() or point == "part-done:2" or point == "part-renamed:2"
        assert children.run(root, count=11, shard=[1, 2]) == 0
        assert_is_run(root, 11)
        assert_clean(root)


def test_killed_again_and_again_until_done(children, place):
    """Each try gets only a little further than the commit of one part."""
    root, tries = place / "run", 0
    while children.run(root, "*-*:17", count=41, merge=False) == KILLED:
        tries += 1
        assert tries < 20
    assert tries >= 3
    assert children.run(root, count=41) == 0
    assert_is_run(root, 41)


@pytest.mark.parametrize("point", ["part-half", "part-written", "part-synced"])
def test_a_part_is_nothing_before_its_rename(children, place, point):
    assert children.run(place, f"{point}:2", count=11) == KILLED
    assert [path.name for path in (place / "parts").glob("*.h5")] == ["00000.h5"]
    assert len(list((place / "parts").glob("*.tmp"))) == 1


def test_the_lock_of_a_killed_run_is_free(children, place):
    assert children.run(place, "part-half:1", count=11) == KILLED
    assert (place / "locks/1-of-1.lock").stat().st_size > 0
    assert children.run(place, count=11) == 0


def test_a_second_process_is_refused_while_the_first_lives(children, place):
    with open_store(place, record(), inputs(11)):
        assert children.run(place, count=11) == 5
        assert f"process {os.getpid()} on" in children.errors.read_text()
    assert children.run(place, count=11) == 0


# --- full disks ----------------------------------------------------------------------------------------------


def test_a_full_disk_at_any_size_never_crashes_and_keeps_the_parts(children, place):
    """The limit on file sizes stands for the disk: first parts fail, then the merge, then nothing."""
    ends = []
    for size in [1_000, 3_000, 10_000, 20_000, *range(30_000, 800_000, 60_000)]:
        root, journal = place / str(size), place / f"journal-{size}"
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
    assert ends.count(6) > 5
    assert ends[-1] == 0
    assert "MB" in children.errors.read_text()


def test_a_disk_that_fills_during_the_merge_leaves_the_old_results(children, place):
    assert children.run(place, count=7) == 0
    assert children.run(place, count=11, update=True, merge=False) == 0
    assert children.run(place, count=11, file_size=100_000) == 6
    old_or_new(7, 7)(place)
    assert children.run(place, count=11) == 0
    assert_is_run(place, 11)


# --- longer --------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.case(
    "SIGKILL at every fail-point of explain, evaluate and merge (500+ kills)",
    "what was reported as written is there; the same command ends as if nothing had been",
    "",
)
@pytest.mark.parametrize(
    ("options", "before", "check"),
    [
        (NEW, None, None),
        (NEW | KEPT, None, None),
        (UPDATE, finished, old_or_new(7, 11)),
        (UPDATE | KEPT, lambda children: finished(children, **KEPT), old_or_new(7, 11)),
        (OVER, another, another_goes_on),
    ],
)
def test_killed_at_every_passing_of_every_point(children, place, monkeypatch, options, before, check):
    check = check(children) if check is another_goes_on else check
    prepare = before and before(children)
    assert sweep(children, place, options, monkeypatch, prepare=prepare, check=check, every=True) > 100


@pytest.mark.soak
def test_a_longer_run_killed_at_random_points_until_done(children, place):
    rng = np.random.default_rng(0)
    for attempt in range(60):
        root, journal = place / str(attempt), place / f"journal-{attempt}"
        while children.run(root, f"*:{rng.integers(20, 3000)}", count=41, journal=str(journal)) == KILLED:
            assert_committed_is_kept(root, journal)
        assert_is_run(root, 41)
        assert_clean(root)
        shutil.rmtree(root)
