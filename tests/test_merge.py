"""Joining parts: shards, gaps, damage, memory, and the index of kept parts."""

import os
import shutil
import tracemalloc
from dataclasses import replace

import h5py
import numpy as np
import pytest
from store_driver import assert_is_run, inputs, opened, record, run

from xcli.errors import ConfigError, InputError
from xcli.results import open_run
from xcli.store import Input, Part, encode, merge_run, open_store, peek

# --- shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_own_every_third_part_and_join_to_the_same_run(tmp_path, order):
    for shard in order:
        with opened(tmp_path, 30, shard=(shard, 3)) as store:
            assert [number % 3 for number, _ in store.todo()] == [shard - 1] * len(store.todo())
        run(tmp_path, 30, shard=(shard, 3))
        assert (tmp_path / "results.h5").exists() == (shard == order[-1])
    assert_is_run(tmp_path, 30)


def test_gaps_are_refused_and_named(tmp_path):
    run(tmp_path, 30, shard=(1, 3))
    run(tmp_path, 30, shard=(2, 3), limit=1)
    with pytest.raises(ConfigError, match=r"missing: 2, 4, 5, 7 \(of the shards 2/3, 3/3\)"):
        merge_run(tmp_path)
    assert not (tmp_path / "results.h5").exists()
    with pytest.raises(InputError, match="not finished"):
        open_run(tmp_path)


def test_merging_twice_changes_nothing(tmp_path):
    for layout in ("parts", "merged"):
        root = tmp_path / layout
        run(root, 11, merge=False)
        path = merge_run(root, layout)
        before = (path.stat().st_ino, path.stat().st_mtime_ns)
        assert merge_run(root, layout) == path
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
        assert_is_run(root, 11)


def test_merge_of_no_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        merge_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_another_run_is_not_merged(tmp_path):
    run(tmp_path / "a", 11, merge=False)
    run(tmp_path / "b", 11, fingerprint="other", merge=False)
    shutil.copy(tmp_path / "b/parts/00001.h5", tmp_path / "a/parts/00001.h5")
    with pytest.raises(ConfigError, match=r"00001\.h5 does not belong"):
        merge_run(tmp_path / "a")
    shutil.copy(tmp_path / "a/parts/00000.h5", tmp_path / "a/parts/00001.h5")
    with pytest.raises(ConfigError, match=r"00001\.h5 does not belong"):
        merge_run(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_part_is_named_and_can_be_made_again(tmp_path, keep):
    run(tmp_path, 11, merge=False)
    damaged = tmp_path / "parts/00001.h5"
    os.truncate(damaged, keep)
    with pytest.raises(ConfigError, match=r"00001\.h5 cannot be read"):
        merge_run(tmp_path)
    damaged.unlink()
    run(tmp_path, 11)
    assert_is_run(tmp_path, 11)


def test_parts_that_differ_in_shape_are_refused(tmp_path):
    items = [Input(f"{i}", f"/{i}", 1, 1, None) for i in range(2)]
    with open_store(tmp_path, replace(record(), part_length=1), items) as store:
        for number, size in enumerate((4, 5)):
            columns = {
                "explanations/image": np.array([number]),
                "heatmaps/a": np.zeros((1, size, size), np.float32),
            }
            store.commit(number, Part(columns))
        with pytest.raises(ConfigError, match=r"00001\.h5: heatmaps/a is float32"):
            store.merge()


def test_merging_holds_one_map_at_a_time_and_compresses_nothing_again(tmp_path):
    maps = np.random.default_rng(0).normal(size=(256, 64, 64)).astype(np.float32)  # 4 MB a part
    items = [Input(f"{i}", f"/{i}", 1, 1, None) for i in range(512)]
    with open_store(tmp_path, replace(record(), part_length=256), items) as store:
        for number, rows in store.todo():
            store.commit(
                number, Part({"explanations/image": np.arange(rows.start, rows.stop), "heatmaps/a": maps})
            )
        with h5py.File(tmp_path / "parts/00001.h5") as file:
            chunk = file["heatmaps/a"].id.read_direct_chunk((3, 0, 0))
        tracemalloc.start()
        store.merge()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    with h5py.File(tmp_path / "results.h5") as file:
        assert file["heatmaps/a"].id.read_direct_chunk((259, 0, 0)) == chunk == (0, encode(maps[3]))
    assert peak < 1_500_000


# --- kept parts ---------------------------------------------------------------------------------------------


def test_an_index_of_parts_survives_a_move(tmp_path, monkeypatch):
    run(tmp_path / "here", 11, layout="parts")
    shutil.move(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir("/")
    assert_is_run(tmp_path / "there", 11)
    with h5py.File(tmp_path / "there/results.h5") as file:
        assert file["heatmaps/gradcam"].is_virtual
        assert file["heatmaps/gradcam"].attrs["layer"] == "conv5"
        assert {source.file_name for source in file["heatmaps/gradcam"].virtual_sources()} == {
            f"parts/{number:05d}.h5" for number in range(3)
        }


def test_a_part_missing_under_an_index_is_seen(tmp_path):
    run(tmp_path, 11, layout="parts")
    (tmp_path / "parts/00001.h5").unlink()
    with h5py.File(tmp_path / "results.h5") as file:
        assert np.isnan(file["heatmaps/gradcam"][...]).any()  # never zeros that look like a map
    with pytest.raises(InputError, match=r"gone: parts/00001\.h5"):
        open_run(tmp_path)
    assert peek(tmp_path, "one", inputs(11)).kind == "unfinished"
    run(tmp_path, 11, layout="parts")
    assert_is_run(tmp_path, 11)


def test_an_index_can_be_turned_into_one_file(tmp_path):
    run(tmp_path, 11, layout="parts")
    merge_run(tmp_path, "merged")
    assert not (tmp_path / "parts").exists()
    assert_is_run(tmp_path, 11)
    merge_run(tmp_path, "parts")  # and it stays one
    assert_is_run(tmp_path, 11)
