"""Several commands on one output: side by side where they may, refused at once where not; and what the dead leave."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Commands, photos, plain, same, written
from store_driver import assert_is_run, opened, record, run

from xcli.durable import locked
from xcli.errors import ConfigError, OutputUnwritable
from xcli.store import open_store

COUNT = 10
KILLED = -9
Ends = Callable[[int], None]

second = pytest.mark.case("a second run on the same output", "it ends at once and says who is there", "5")
stale = pytest.mark.case("a lock left by a dead process", "it is taken over", "0")
shards = pytest.mark.case(
    "shards side by side; merge with gaps, overlaps or other configs",
    "joined to the run of one process; refused with what to do",
    "0, 2",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures."""
    folder = tmp_path_factory.mktemp("company")
    photos(folder / "photos", COUNT)
    return folder


def config_of(place: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    sections = plain(place / "photos", folder / "run", methods=["gradcam", "random"])
    return written(folder / "config.yaml", sections)


# --- one alone -----------------------------------------------------------------------------------------------


@second
@pytest.mark.parametrize("lock", ["1-of-1", "2-of-2", "evaluation"])
def test_what_needs_the_run_alone_says_who_is_there(
    place: Path, tmp_path: Path, xai: Commands, lock: str, ends: Ends
):
    """Explaining beside explaining, beside another number of shards, starting over beside scoring."""
    call = ["explain", config_of(place, tmp_path), *(["--fresh"] if lock == "evaluation" else [])]
    with locked(tmp_path / "run" / "locks" / f"{lock}.lock"):
        ended = xai(*call)
        ends(ended.code)
    assert f"in use by process {os.getpid()} on {os.uname().nodename}, started 20" in ended.stderr
    assert f"lock {lock}.lock" in ended.stderr
    assert not (tmp_path / "run" / "run.json").exists()


@stale
@pytest.mark.parametrize(
    "content", [b"", b"\xff\0", b"[]", b'{"pid": 1, "host": "\\u001b[31m", "started": "now"}']
)
def test_a_lock_file_without_its_process_is_no_lock(
    place: Path, tmp_path: Path, xai: Commands, content: bytes, ends: Ends
):
    """Whatever it says: the kernel freed the lock when its process died."""
    run(tmp_path / "run", 3)
    (tmp_path / "run" / "locks" / "record.lock").write_bytes(content)
    ends(xai("merge", tmp_path / "run").code)


@stale
@pytest.mark.soak
def test_the_lock_of_a_run_that_was_killed_is_taken_over(
    place: Path, tmp_path: Path, xai: Commands, ends: Ends
):
    call = ["explain", config_of(place, tmp_path)]
    assert xai(*call, failpoint="part-half:2").code == KILLED
    assert b"pid" in (tmp_path / "run" / "locks" / "1-of-1.lock").read_bytes()
    ends(xai(*call).code)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputUnwritable, match="no locks.*choose another output.path"), opened(tmp_path):
        pass
    assert not (tmp_path / "run.json").exists()


# --- shards --------------------------------------------------------------------------------------------------


@shards
@pytest.mark.soak
def test_two_shards_at_the_same_time_are_joined_to_the_run_of_one_process(
    place: Path, tmp_path: Path, xai: Commands, ends: Ends
):
    """Each waits in the middle of its work until the other is there."""
    call = ["explain", config_of(place, tmp_path)]
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    with Commands() as other:
        xai.start(*call, "--shard", "1/2", wait_at=[2, here, there])
        other.start(*call, "--shard", "2/2", wait_at=[1, there, here])
        for ended in (xai.ended(), other.ended()):
            assert ended.code == 0, ended
    ended = xai("merge", tmp_path / "run")
    ends(ended.code)
    assert xai("explain", config_of(place, tmp_path / "alone")).code == 0
    same(tmp_path / "run", tmp_path / "alone" / "run")


def gap(root: Path) -> str:
    run(root, 30, shard=(1, 3))
    run(root, 30, shard=(2, 3), limit=1)
    return "missing: 2, 4, 5, 7 (of the shards 2/3, 3/3)"


def two_counts(root: Path) -> str:
    run(root, 30, shard=(1, 2))
    run(root, 30, shard=(2, 3))
    return "missing: 3, 5; finish it with `xai explain`"


def overlap(root: Path) -> str:
    run(root, 11, merge=False)
    shutil.copy(root / "parts/00000.h5", root / "parts/00001.h5")
    return "00001.h5 does not belong to this run"


def another_config(root: Path) -> str:
    run(root, 11, merge=False)
    run(root.with_name("other"), 11, fingerprint="other", merge=False)
    shutil.copy(root.with_name("other") / "parts/00001.h5", root / "parts/00001.h5")
    return "00001.h5 does not belong to this run"


def another_list(root: Path) -> str:
    run(root, 11, merge=False)
    with opened(root) as store:
        images = store.inputs[::-1]
    with open_store(root.with_name("other"), record(), images) as store:
        from store_driver import part

        for number, rows in store.todo():
            store.commit(number, part(rows))
    shutil.copy(root.with_name("other") / "parts/00001.h5", root / "parts/00001.h5")
    return "00001.h5 does not belong to this run"


@shards
@pytest.mark.parametrize("made", [gap, two_counts, overlap, another_config, another_list])
def test_parts_that_do_not_make_one_run_are_refused(
    tmp_path: Path, xai: Commands, made: Callable[[Path], str], ends: Ends
):
    said = made(tmp_path / "run")
    ended = xai("merge", tmp_path / "run")
    ends(ended.code)
    assert ended.code == 2
    assert said in ended.stderr
    assert not (tmp_path / "run" / "results.h5").exists()


def test_shards_of_a_list_that_grew_say_so_and_go_on_with_update(tmp_path: Path):
    run(tmp_path, 7, shard=(1, 2))
    with pytest.raises(ConfigError, match=r"4 new images .*--update"):
        run(tmp_path, 11, shard=(2, 2))
    run(tmp_path, 11, shard=(2, 2), update=True)
    run(tmp_path, 11, shard=(1, 2))
    assert_is_run(tmp_path, 11)


def test_a_shard_without_a_part_is_through_at_once(place: Path, tmp_path: Path, xai: Commands):
    call = ["explain", config_of(place, tmp_path), "--shard"]
    ended = xai(*call, "5/5", "--json")
    assert ended.code == 0
    assert '"status": "shard done"' in ended.stdout
    assert '"images": 0' in ended.stdout
