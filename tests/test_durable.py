"""Locks, and outputs that cannot be written."""

import errno
import os
from contextlib import suppress
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from store_driver import assert_is_run, inputs, opened, part, record, run

import xcli.merge
from xcli.allocated import Allocated
from xcli.errors import ConfigError, OutputLocked, OutputUnwritable
from xcli.store import Input, Part, merge_run, open_store, peek

# --- locks --------------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_is_there(tmp_path):
    with opened(tmp_path), pytest.raises(OutputLocked) as seen, opened(tmp_path):
        pass
    assert f"process {os.getpid()} on {os.uname().nodename}, started 20" in str(seen.value)
    with opened(tmp_path):
        pass


def test_shards_of_one_count_run_side_by_side_and_of_two_do_not(tmp_path):
    with opened(tmp_path, shard=(1, 3)), opened(tmp_path, shard=(3, 3)):
        for other in ((1, 1), (1, 2), (3, 3)):
            with pytest.raises(OutputLocked), opened(tmp_path, shard=other):
                pass


@pytest.mark.parametrize("options", [{"fresh": True}, {"update": True, "count": 12}])
def test_what_changes_the_run_needs_it_alone(tmp_path, options):
    with opened(tmp_path, shard=(1, 2)) as store:
        with pytest.raises(OutputLocked), opened(tmp_path, shard=(2, 2), **options):
            pass
        assert (tmp_path / "run.json").exists()
        assert len(store.todo()) == 2


def test_a_start_does_not_wait_for_ever_for_a_merge(tmp_path, monkeypatch):
    monkeypatch.setattr("xcli.store.OPEN_WAIT", 0.0)
    with xcli.merge.locked(tmp_path / "locks/record.lock"), pytest.raises(OutputLocked), opened(tmp_path):
        pass


def test_the_sweep_takes_only_left_overs_of_the_dead(tmp_path):
    with opened(tmp_path, shard=(1, 2)) as store:
        store.commit(0, part(slice(0, 4)))
        folder = tmp_path / "parts"
        for name in ("00002.h5.1-of-2.tmp", "00001.h5.2-of-2.tmp", "00001.h5.3-of-7.tmp", "mine.tmp"):
            (folder / name).write_bytes(b"half")
        with opened(tmp_path, shard=(2, 2)):
            assert {path.name for path in folder.iterdir()} == {"00000.h5", "00002.h5.1-of-2.tmp", "mine.tmp"}


@pytest.mark.parametrize("shard", [(0, 1), (3, 2), (-1, 2)])
def test_shards_that_do_not_exist(tmp_path, shard):
    with pytest.raises(ConfigError, match="I/N"), opened(tmp_path, shard=shard):
        pass


# --- outputs that cannot be written -------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("a file")
    for call in (lambda: peek(tmp_path / "run", "one", inputs(3)), lambda: run(tmp_path / "run", 3)):
        with pytest.raises(OutputUnwritable, match=r"output\.path"):
            call()
    with pytest.raises(OutputUnwritable, match=r"run/below/locks.*output\.path"):
        run(tmp_path / "run" / "below", 3)


@pytest.mark.parametrize(
    "name", ["locks", "parts", "run.json.tmp", "parts/00000.h5.1-of-1.tmp", "results.h5.tmp"]
)
def test_something_in_the_way_of_a_write(tmp_path, name):
    if "." in name:
        (tmp_path / name).mkdir(parents=True)
    else:
        (tmp_path / name).write_text("a file")
    with pytest.raises(OutputUnwritable, match="cannot write"):
        run(tmp_path, 3)


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT"])
@pytest.mark.parametrize("call", ["fsync", "pwrite", "posix_fallocate"])
def test_an_error_of_any_write_is_exit_code_6_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, call, code
):
    run(tmp_path, 11, merge=False, limit=1)
    number = getattr(errno, code)

    def broken(*_):
        raise OSError(number, os.strerror(number))

    for step in (lambda: run(tmp_path, 11, merge=False), lambda: merge_run(tmp_path)):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, broken)
            if call == "posix_fallocate" and not (tmp_path / "parts/00002.h5").exists():
                step()  # parts do not need it
            else:
                with pytest.raises(OutputUnwritable) as seen:
                    step()
                assert os.strerror(number) in str(seen.value)
                assert ("MB" in str(seen.value)) >= (code == "ENOSPC" and call == "posix_fallocate")
        assert not [path for path in tmp_path.rglob("*.tmp") if path.parent.name != "locks"]
        run(tmp_path, 11, merge=False)
    run(tmp_path, 11)
    assert_is_run(tmp_path, 11)


@pytest.mark.parametrize("after", range(0, 400, 23))
def test_a_disk_that_breaks_its_promise_in_the_merge(tmp_path, monkeypatch, after):
    """No reservation (as on some file systems), and the n-th write fails inside HDF5: still a clean error."""
    run(tmp_path, 11, merge=False)
    real, left = os.pwrite, iter(range(after, -1, -1))

    def failing(descriptor, data, offset):
        if next(left, 0) <= 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", unsupported)
        patched.setattr(os, "pwrite", failing)
        if after < 100:
            with pytest.raises(OutputUnwritable, match="cannot write"):
                merge_run(tmp_path)
            assert not (tmp_path / "results.h5").exists()
        else:
            with suppress(OutputUnwritable):
                merge_run(tmp_path)
    assert not (tmp_path / "results.h5.tmp").exists()
    merge_run(tmp_path)
    assert_is_run(tmp_path, 11)


class Watched(Allocated):
    """Keeps the size that was reserved."""

    bounds: ClassVar[list[int]] = []

    def __init__(self, path, size):
        self.bounds.append(size)
        super().__init__(path, size)


def many_columns(owner):
    columns = {f"extras/a/{i}": np.zeros(len(owner)) for i in range(20)}
    columns |= {f"heatmaps/{i}": np.zeros((len(owner), 3, 3, 3), np.float32) for i in range(8)}
    return {**columns, "explanations/error": ["e" * (2100 + i % 5) for i in owner]}


def many_small_maps(owner):
    return {f"heatmaps/{i}": np.zeros((len(owner), 1, 1, 1), np.float32) for i in range(4)}


@pytest.mark.parametrize("layout", ["merged", "parts"])
@pytest.mark.parametrize(
    ("content", "images", "length", "name"), [(many_columns, 300, 30, 3000), (many_small_maps, 6000, 1500, 9)]
)
def test_the_reserved_space_is_enough(tmp_path, monkeypatch, layout, content, images, length, name):
    """Many columns, parts or chunks, texts of awkward lengths: HDF5 never takes more than the bound."""
    monkeypatch.setattr(xcli.merge, "Allocated", Watched)
    items = [Input("p" * (1 + i * 7 % name), f"/{i}", 1, 1, None) for i in range(images)]
    start = replace(record(layout=layout, compression="none"), part_length=length)
    with open_store(tmp_path, start, items) as store:
        for number, rows in store.todo():
            owner = np.arange(rows.start, rows.stop)
            store.commit(number, Part({**content(owner), "explanations/image": owner}))
        size = store.merge().stat().st_size
    assert size <= Watched.bounds[-1] < 4 * size + 2_000_000
