"""The run directory: its contract, resuming, shards, updates, locks, errors, and reading it back."""

import json
import os
import shutil
import sys
import types
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_driver import LENGTH, inputs, part, record, run

import xcli.merge
from xcli.allocated import Allocated
from xcli.errors import ConfigError, InputError, OutputLocked, OutputUnwritable
from xcli.results import open_run
from xcli.store import Input, Part, encode, encoded, merge_run, open_store, peek

# --- what a file should hold ---------------------------------------------------------------------------------


def columns_of(path):
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        return {name: item.asstr()[...] if h5py.check_string_dtype(item.dtype) else item[...] for name, item in found.items()}


def printable(text):
    return text.replace("\udcff", "\\udcff").replace("\0", "\\x00")


def assert_holds(found, expected, images):
    """``found`` has exactly the columns of ``expected`` and the names of ``images``, bit for bit."""
    columns = {"images/path": [item.path for item in images], **expected.columns}
    assert set(found) - {"categories"} == set(columns)
    for key, column in columns.items():
        if isinstance(column, list):
            assert list(found[key]) == [printable(text) for text in column], key
        else:
            assert found[key].dtype == column.dtype, key
            np.testing.assert_array_equal(found[key], column, err_msg=key)


def assert_is_run(root, count, fingerprint="one"):
    """results.h5 equals what one part of all images would hold: merging changes nothing."""
    assert_holds(columns_of(root / "results.h5"), part(slice(0, count), fingerprint), inputs(count))


def opened(root, count=11, fingerprint="one", **options):
    return open_store(root, record(fingerprint), inputs(count), **options)


def grow(images, **changes):
    return [*images[:2], replace(images[2], **changes), *images[3:]]


# --- the contract --------------------------------------------------------------------------------------------


def test_the_layout_is_the_contract(tmp_path):
    run(tmp_path, 11)
    with h5py.File(tmp_path / "results.h5") as file:
        wanted = {"schema": "xcli/1", "created": "2026-01-02T03:04:05Z", "config": "methods: [gradcam]  # é\n", "seed": 7}
        assert {key: file.attrs[key] for key in wanted} == wanted
        assert {"versions", "model", "device"} <= set(file.attrs)
        assert set(file) == {"images", "explanations", "categories", "heatmaps", "status", "extras", "curves"}
        cam = file["heatmaps/gradcam"]
        assert (cam.dtype, cam.chunks, cam.compression, cam.compression_opts, cam.shuffle) == ("<f4", (1, 5, 6), "gzip", 1, True)
        assert file["heatmaps/rise"].chunks == (1, 3, 4, 2)
        assert dict(cam.attrs) == {"method": "gradcam", "layer": "conv5", "steps": 3, "eps": 0.5}
        assert h5py.check_string_dtype(file["images/path"].dtype).encoding == "utf-8"
        assert list(file["categories"].asstr()) == ["cat", "dög"]
        assert all(data.chunks is None for data in (file["images/label"], file["curves/gradcam/deletion"]))
    assert_is_run(tmp_path, 11)


def test_a_finished_run_leaves_only_its_files(tmp_path):
    run(tmp_path, 11)
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "inputs.jsonl", "results.h5", "locks"}


@pytest.mark.parametrize("count", [1, LENGTH, LENGTH + 1, 11, 40])
def test_cutting_into_parts_changes_nothing(tmp_path, count):
    run(tmp_path, count)
    assert_is_run(tmp_path, count)


def test_a_run_in_which_no_image_has_a_row(tmp_path):
    with open_store(tmp_path, record(), inputs(5)) as store:
        for number, rows in store.todo():
            whole = part(rows).columns
            keep = {k: v if k.startswith("images/") or k.endswith("fraction") else v[:0] for k, v in whole.items()}
            store.commit(number, Part(keep))
        store.merge()
    with open_run(tmp_path) as found:
        assert found.heatmap("gradcam").shape == (0, 5, 6)
        assert found.heatmap("rise").shape == (0, 3, 4, 2)
        assert len(found.images["path"]) == 5


def test_one_part_of_many_without_a_row(tmp_path):
    items = [Input(f"{i}", f"/{i}", 1, 1, None) for i in range(3)]
    for layout in ("parts", "merged"):
        root = tmp_path / layout
        with open_store(root, replace(record(layout=layout), part_length=1), items) as store:
            for number, _ in store.todo():
                owner = np.array([] if number == 1 else [number], np.int64)
                maps = np.full((len(owner), 2, 2), number, np.float32)
                store.commit(number, Part({"explanations/image": owner, "heatmaps/a": maps}))
            store.merge()
        with open_run(root) as found:
            assert found.heatmap("a")[:, 0, 0].tolist() == [0, 2]
            assert found.explanations["image"].tolist() == [0, 2]


@pytest.mark.parametrize("compression", ["gzip", "lzf", "none"])
def test_every_compression_reads_the_same(tmp_path, compression):
    with open_store(tmp_path, record(compression=compression), inputs(11)) as store:
        for number, rows in store.todo():
            store.commit(number, part(rows))
        store.merge()
    assert_is_run(tmp_path, 11)
    with h5py.File(tmp_path / "results.h5") as file:
        assert file["heatmaps/gradcam"].compression == {"none": None}.get(compression, compression)


def test_names_that_are_not_utf8_survive_a_resume(tmp_path):
    run(tmp_path, 11, limit=1)
    with opened(tmp_path) as store:
        assert [os.fsencode(item.path) for item in store.inputs] == [os.fsencode(item.path) for item in inputs(11)]
    run(tmp_path, 11)
    with open_run(tmp_path) as found:
        assert found.images["path"][5] == "dir/\\udcff005.png"


# --- compression ---------------------------------------------------------------------------------------------


def smooth(rows, size, seed=0):
    coarse = np.random.default_rng(seed).normal(size=(rows, size // 8, size // 8))
    return np.kron(coarse, np.ones((8, 8))).cumsum(1).cumsum(2)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", ">f4"])
@pytest.mark.parametrize("kind", ["noise", "relu", "smooth", "zeros", "nan", "ramp"])
def test_an_encoded_map_is_a_shuffled_zlib_stream(kind, dtype):
    rng = np.random.default_rng(0)
    values = {
        "noise": rng.normal(size=(64, 64)) * 40,
        "relu": np.maximum(rng.normal(size=(64, 64)), 0) * 40,
        "smooth": smooth(1, 64)[0] % 100,
        "zeros": np.zeros((64, 64)),
        "nan": np.full((64, 64), 0 if dtype == "u1" else np.nan),
        "ramp": np.linspace(0, 100, 64 * 64).reshape(64, 64),
    }[kind]
    row = np.abs(values).astype(dtype)
    plain = zlib.decompress(encode(row))
    unshuffled = np.frombuffer(plain, np.uint8).reshape(row.itemsize, -1).T.tobytes()
    assert unshuffled == row.tobytes()


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 2), (2, 3, 33, 31), (1, 224, 224)])
def test_encoded_maps_read_as_plain_hdf5(tmp_path, shape):
    maps = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    twisted = np.moveaxis(np.moveaxis(maps, 1, -1).copy(), -1, 1)              # not contiguous
    items = [Input(f"{i}", f"/{i}", 1, 1, None) for i in range(shape[0])]
    with open_store(tmp_path, record(), items) as store:
        for number, rows in store.todo():
            columns = {"explanations/image": np.arange(rows.start, rows.stop), "heatmaps/raw": twisted[rows]}
            store.commit(number, Part({**columns, "heatmaps/ready": encoded(twisted[rows])}))
        store.merge()
    with h5py.File(tmp_path / "results.h5") as file:
        np.testing.assert_array_equal(file["heatmaps/raw"][...], maps)
        np.testing.assert_array_equal(file["heatmaps/ready"][...], maps)


def upsampled(rows, size, cells=16):
    """Maps like those of a CAM: random cells, interpolated."""
    coarse = np.random.default_rng(0).normal(size=(rows, cells, cells))
    at = np.linspace(0, cells - 1, size)
    weights = np.array([np.interp(at, np.arange(cells), unit) for unit in np.eye(cells)])              # (cells, size)
    return np.einsum("nij,ia,jb->nab", coarse, weights, weights).astype(np.float32)


@pytest.mark.parametrize("floor", [-np.inf, 0])
def test_maps_shrink_about_as_much_as_with_plain_gzip(tmp_path, floor):
    maps = np.maximum(upsampled(4, 128), floor)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        plain = file.create_dataset("a", data=maps, chunks=(1, 128, 128), compression="gzip", compression_opts=1, shuffle=True)
        assert sum(map(len, encoded(maps).chunks)) < 1.15 * plain.id.get_storage_size()
    assert len(encode(np.zeros((224, 224), np.float32))) < 1000


# --- going on ------------------------------------------------------------------------------------------------


def test_resuming_leaves_committed_parts_alone(tmp_path):
    run(tmp_path, 11, limit=1)
    first = (tmp_path / "parts/00000.h5").stat()
    with opened(tmp_path) as store:
        assert store.todo() == [(1, slice(4, 8)), (2, slice(8, 11))]
        assert not store.complete()
        assert (tmp_path / "parts/00000.h5").stat() == first
    run(tmp_path, 11)
    assert_is_run(tmp_path, 11)


def test_the_record_of_the_start_stays(tmp_path):
    run(tmp_path, 11, limit=1)
    later = replace(record(size=224), part_length=3, created="later")
    with open_store(tmp_path, later, inputs(11)) as store:
        assert store.record == record()


def test_peek_names_the_three_states_and_writes_nothing(tmp_path):
    root = tmp_path / "run"
    assert peek(root, "one", inputs(11)).kind == "new"
    assert not root.exists()
    run(root, 11, limit=1)
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    state = peek(root, "one", inputs(11))
    assert (state.kind, state.record) == ("unfinished", record())
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before
    run(root, 11, merge=False)
    assert peek(root, "one", inputs(11)).kind == "unfinished"
    run(root, 11)
    assert peek(root, "one", inputs(11)).kind == "done"
    with opened(root) as store:
        assert store.todo() == []
        assert store.complete()


def test_images_that_moved_together_are_the_same(tmp_path):
    run(tmp_path, 11, limit=1)
    moved = inputs(11, root="/elsewhere")[::-1]
    assert peek(tmp_path, "one", moved).kind == "unfinished"
    with open_store(tmp_path, record(), moved) as store:
        assert [item.path for item in store.inputs] == [item.path for item in inputs(11)]
        assert all(item.file.startswith("/elsewhere") for item in store.inputs)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("fingerprint", "images", "words"),
    [
        ("other", inputs(11), ["another config", "--fresh", "output.path"]),
        ("one", inputs(13), ["2 new", "--fresh", "--update"]),
        ("one", inputs(9), ["2 of the images", "vanished", "--fresh"]),
        ("one", grow(inputs(11), size=5), ["changed", "dir/002.png", "--fresh"]),
        ("one", grow(inputs(11), mtime_ns=5), ["changed", "--fresh"]),
        ("one", grow(inputs(11), label="dog"), ["changed", "--fresh"]),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path, finished, fingerprint, images, words):
    run(tmp_path, 11, merge=finished, limit=None if finished else 1)
    before = {path.name for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError) as seen:
        peek(tmp_path, fingerprint, images)
    assert all(word in str(seen.value) for word in words)
    with pytest.raises(ConfigError, match="--fresh"), open_store(tmp_path, record(fingerprint), images):
        pass
    assert {path.name for path in tmp_path.rglob("*")} == before


def test_a_list_with_the_same_image_twice(tmp_path):
    twice = [inputs(1)[0], inputs(1)[0]]
    with open_store(tmp_path, record(), twice) as store:
        assert len(store.inputs) == 2
    assert peek(tmp_path, "one", twice).kind == "unfinished"
    with pytest.raises(ConfigError, match="vanished"):
        peek(tmp_path, "one", twice[:1])


def test_foreign_files_are_no_run_but_results_without_a_record_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert peek(tmp_path, "one", inputs(3)).kind == "new"
    (tmp_path / "results.h5").write_bytes(b"mine")
    for call in (lambda: peek(tmp_path, "one", inputs(3)), lambda: run(tmp_path, 3)):
        with pytest.raises(ConfigError, match=r"no run\.json"):
            call()
    assert (tmp_path / "results.h5").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"schema": "xcli/9"}', b"\xff\xfe"])
def test_a_damaged_record_names_fresh(tmp_path, damage):
    run(tmp_path, 3, merge=False)
    (tmp_path / "run.json").write_bytes(damage)
    with pytest.raises(ConfigError, match="--fresh"):
        peek(tmp_path, "one", inputs(3))
    run(tmp_path, 3, fresh=True)
    assert_is_run(tmp_path, 3)


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_list_of_images_names_fresh(tmp_path, damage):
    run(tmp_path, 3, merge=False)
    path = tmp_path / "inputs.jsonl"
    text = path.read_text()
    path.unlink()
    if damage == "change":
        path.write_text(text.replace("001", "007"))
    with pytest.raises(ConfigError, match="--fresh"):
        peek(tmp_path, "one", inputs(3))


def test_no_image_is_an_input_error(tmp_path):
    with pytest.raises(InputError), open_store(tmp_path, record(), []):
        pass


def test_a_part_must_fit(tmp_path):
    good = part(slice(4, 8)).columns
    with opened(tmp_path, shard=(2, 2)) as store:
        for number, columns, words in [
            (0, good, "another shard"),
            (1, part(slice(0, 4)).columns, "leaves the rows"),
            (1, {**good, "images/label": np.zeros(3)}, "images/label has 3 rows, expected 4"),
            (1, {**good, "status/gradcam": np.zeros(1)}, "status/gradcam has 1 rows"),
            (1, {**good, "images/path": ["a"] * 4}, "added by the store"),
            (1, {key: value for key, value in good.items() if key != "explanations/image"}, "needs explanations/image"),
        ]:
            with pytest.raises(ValueError, match=words):
                store.commit(number, Part(columns))
        with pytest.raises(ValueError, match="not there"):
            store.commit(1, Part(good, {"heatmaps/none": {"a": 1}}))
        assert not (tmp_path / "parts").exists() or not list((tmp_path / "parts").iterdir())


# --- shards --------------------------------------------------------------------------------------------------


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
            columns = {"explanations/image": np.array([number]), "heatmaps/a": np.zeros((1, size, size), np.float32)}
            store.commit(number, Part(columns))
        with pytest.raises(ConfigError, match=r"00001\.h5: heatmaps/a is float32"):
            store.merge()


def test_merging_holds_one_map_at_a_time(tmp_path):
    """The survey and the copy never read a whole column of maps: the allocations stay far below the file."""
    import tracemalloc

    maps = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)                      # 1 MB a part
    items = [Input(f"{i}", f"/{i}", 1, 1, None) for i in range(64 * 8)]
    with open_store(tmp_path, replace(record(), part_length=64), items) as store:
        for number, rows in store.todo():
            store.commit(number, Part({"explanations/image": np.arange(rows.start, rows.stop), "heatmaps/a": maps}))
        tracemalloc.start()
        store.merge()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "results.h5").stat().st_size > 6_000_000
    assert peak < 1_500_000


# --- kept parts ----------------------------------------------------------------------------------------------


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
        assert np.isnan(file["heatmaps/gradcam"][...]).any()                   # never zeros that look like a map
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
    merge_run(tmp_path, "parts")                                               # and it stays one
    assert_is_run(tmp_path, 11)


# --- updates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["merged", "parts"])
@pytest.mark.parametrize("first", [3, 4, 7])
def test_an_update_does_only_the_new_images(tmp_path, first, layout):
    run(tmp_path, first, layout=layout)
    for count in (11, 13):
        assert peek(tmp_path, "one", inputs(count), update=True).kind == "unfinished"
        with open_store(tmp_path, record(), inputs(count), update=True) as store:
            done = sorted(row for _, rows in store.todo() for row in range(rows.start, rows.stop))
            assert done == list(range(first if count == 11 else 11, count))
            with open_run(tmp_path) as old:
                assert len(old.images["path"]) == (first if count == 11 else 11)
        run(tmp_path, count, layout=layout)
        assert_is_run(tmp_path, count)
        assert peek(tmp_path, "one", inputs(count)).kind == "done"


def test_an_update_of_an_unfinished_run_goes_on_with_both(tmp_path):
    run(tmp_path, 7, limit=1)
    run(tmp_path, 11, update=True)
    assert_is_run(tmp_path, 11)


def test_an_update_puts_new_images_last_whatever_their_name(tmp_path):
    old = inputs(5)
    new = Input("aaa.png", "/photos/aaa.png", 1, 2, None)
    run(tmp_path, 5)
    with open_store(tmp_path, record(), [new, *old], update=True) as store:
        assert store.inputs == (*old, new)
        assert store.todo() == [(1, slice(5, 6))]
        store.commit(1, part(slice(5, 6)))
        store.merge()
    assert peek(tmp_path, "one", [new, *old]).kind == "done"


def test_an_update_with_nothing_new_is_done(tmp_path):
    run(tmp_path, 5)
    before = (tmp_path / "results.h5").stat()
    run(tmp_path, 5, update=True)
    assert (tmp_path / "results.h5").stat() == before


def test_an_update_of_an_evaluated_run_leaves_its_metrics_open(tmp_path):
    run(tmp_path, 5)
    with h5py.File(tmp_path / "results.h5", "a") as file:
        rows = len(file["explanations/image"])
        file.create_dataset("metrics/gradcam/road", data=np.ones(rows, np.float32))
        file.create_dataset("summary/gradcam/mege", data=0.5)
    run(tmp_path, 9, update=True)
    with open_run(tmp_path) as found:
        road = found.metrics("gradcam")["road"]
        assert (road[:rows] == 1).all()
        assert np.isnan(road[rows:]).all()
        assert len(road) > rows
        with h5py.File(tmp_path / "results.h5") as file:
            assert "summary" not in file                                       # numbers of a run that is no more


# --- starting over -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_fresh_removes_the_run_and_nothing_else(tmp_path, finished):
    run(tmp_path, 11, merge=finished)
    for name in ("overlays/gradcam/a.png", "panels/a.png", "heatmaps/x/a.png", "mine/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    run(tmp_path, 9, fingerprint="other", fresh=True)
    assert_is_run(tmp_path, 9, "other")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "inputs.jsonl", "results.h5", "locks", "mine"}


def test_fresh_without_a_run_leaves_pictures_that_are_not_its_own(tmp_path):
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays/holiday.png").write_bytes(b"x")
    run(tmp_path, 3, fresh=True)
    assert (tmp_path / "overlays/holiday.png").exists()


def test_fresh_removes_a_link_and_not_what_it_points_to(tmp_path):
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run(root, 3)
    elsewhere.mkdir()
    (elsewhere / "a.png").write_bytes(b"x")
    (root / "overlays").symlink_to(elsewhere)
    run(root, 3, fresh=True)
    assert not (root / "overlays").exists()
    assert (elsewhere / "a.png").exists()


# --- locks ---------------------------------------------------------------------------------------------------


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


# --- outputs that cannot be written --------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("a file")
    for call in (lambda: peek(tmp_path / "run", "one", inputs(3)), lambda: run(tmp_path / "run", 3)):
        with pytest.raises(OutputUnwritable, match=r"output\.path"):
            call()
    with pytest.raises(OutputUnwritable, match=r"run/below/locks.*output\.path"):
        run(tmp_path / "run" / "below", 3)


@pytest.mark.parametrize("name", ["locks", "parts", "run.json.tmp", "parts/00000.h5.1-of-1.tmp", "results.h5.tmp"])
def test_something_in_the_way_of_a_write(tmp_path, name):
    if "." in name:
        (tmp_path / name).mkdir(parents=True)
    else:
        (tmp_path / name).write_text("a file")
    with pytest.raises(OutputUnwritable, match="cannot write"):
        run(tmp_path, 3)


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES", "EIO", "EDQUOT"])
@pytest.mark.parametrize("call", ["fsync", "pwrite", "posix_fallocate"])
def test_an_error_of_any_write_is_exit_code_6_and_leaves_nothing_half_written(tmp_path, monkeypatch, call, code):
    import errno

    run(tmp_path, 11, merge=False, limit=1)
    number = getattr(errno, code)

    def broken(*_):
        raise OSError(number, os.strerror(number))

    for step in (lambda: run(tmp_path, 11, merge=False), lambda: merge_run(tmp_path)):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, broken)
            if call == "posix_fallocate" and not (tmp_path / "parts/00002.h5").exists():
                step()                                                         # parts do not need it
            else:
                with pytest.raises(OutputUnwritable) as seen:
                    step()
                assert os.strerror(number) in str(seen.value)
                assert ("MB" in str(seen.value)) >= (code == "ENOSPC" and call == "posix_fallocate")
        assert not [path for path in tmp_path.rglob("*.tmp") if path.parent.name != "locks"]
        run(tmp_path, 11, merge=False)
    run(tmp_path, 11)
    assert_is_run(tmp_path, 11)


@pytest.mark.parametrize("after", range(0, 400, 7))
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
        try:
            merge_run(tmp_path)
        except OutputUnwritable as error:
            assert "MB" in str(error) or after == 0
            assert not (tmp_path / "results.h5").exists()
        else:
            assert after > 100
    assert not (tmp_path / "results.h5.tmp").exists()
    merge_run(tmp_path)
    assert_is_run(tmp_path, 11)


@pytest.mark.parametrize("layout", ["merged", "parts"])
def test_the_reserved_space_is_enough(tmp_path, monkeypatch, layout):
    """Many columns, many parts, texts of awkward lengths: the bound is never below what HDF5 takes."""
    bounds = []

    class Watched(Allocated):
        def __init__(self, path, size):
            bounds.append(size)
            super().__init__(path, size)

    monkeypatch.setattr(xcli.merge, "Allocated", Watched)
    items = [Input("p" * (i % 3000), f"/{i}", 1, 1, None) for i in range(600)]
    with open_store(tmp_path, replace(record(layout=layout), part_length=25), items) as store:
        for number, rows in store.todo():
            owner = np.arange(rows.start, rows.stop)
            columns = {f"extras/a/{i}": np.zeros(len(owner)) for i in range(30)}
            columns |= {f"heatmaps/{i}": np.zeros((len(owner), 3, 3, 3), np.float32) for i in range(20)}
            texts = ["e" * (2100 + i % 5) for i in owner]
            store.commit(number, Part({**columns, "explanations/image": owner, "explanations/error": texts}))
        size = store.merge().stat().st_size
    assert size <= bounds[0] < 4 * size + 2_000_000


# --- reading -------------------------------------------------------------------------------------------------


def test_reading_a_run(tmp_path):
    run(tmp_path, 11)
    whole = part(slice(0, 11)).columns
    for path in (tmp_path, str(tmp_path / "results.h5")):
        with open_run(path) as found:
            assert found.names == ("gradcam", "rise")
            assert found.categories == ("cat", "dög")
            assert found.config.startswith("methods")
            assert found.attrs["seed"] == 7
            assert found.images["path"][1] == "dir/001.png"
            np.testing.assert_array_equal(found.explanations["image"], whole["explanations/image"])
            np.testing.assert_array_equal(found.status("gradcam"), whole["status/gradcam"])
            np.testing.assert_array_equal(found.extras("rise")["delta"], whole["extras/rise/delta"])
            assert found.extras("gradcam") == found.metrics("rise") == {}
            assert found.heatmap_attrs("gradcam")["layer"] == "conv5"


@pytest.mark.parametrize(
    "rows", [None, 3, -1, slice(2, 9, 3), [5, 1, 1, -2], np.array([7, 0]), [], np.arange(14) % 3 == 0]
)
def test_heatmaps_of_chosen_rows(tmp_path, rows):
    run(tmp_path, 11)
    maps = part(slice(0, 11)).columns["heatmaps/rise"]
    assert len(maps) == 14
    chosen = slice(None) if rows is None else np.asarray(rows, dtype=int) if isinstance(rows, list) else rows
    with open_run(tmp_path) as found:
        np.testing.assert_array_equal(found.heatmap("rise", rows), maps[chosen])


def test_reading_errors_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path)
    run(tmp_path, 11, limit=1)
    with pytest.raises(InputError, match="xai merge"):
        open_run(tmp_path)
    run(tmp_path, 11)
    with open_run(tmp_path) as found:
        with pytest.raises(InputError, match="it has gradcam, rise"):
            found.heatmap("gradcan")
        with pytest.raises(InputError, match="no status of rise"):
            found.status("rise")
    (tmp_path / "other.h5").write_bytes(b"no")
    with pytest.raises(InputError, match="as HDF5"):
        open_run(tmp_path / "other.h5")
    with h5py.File(tmp_path / "foreign.h5", "w"):
        pass
    with pytest.raises(InputError, match="not a xcli/1"):
        open_run(tmp_path / "foreign.h5")


def test_xarray_gets_dimensions_that_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", types.SimpleNamespace(Dataset=lambda data, attrs: (data, attrs)))
    run(tmp_path, 11)
    with open_run(tmp_path) as found:
        data, attrs = found.to_xarray()
    assert attrs["schema"] == "xcli/1"
    assert data["gradcam"][0] == ("explanation", "y", "x")
    assert data["rise"][0] == ("explanation", "channel", "y_rise", "x_rise")
    assert data["images/label"][0] == ("image",)
    assert all(len(dims) == values.ndim for dims, values in data.values())


def test_xarray_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    run(tmp_path, 3)
    with open_run(tmp_path) as found, pytest.raises(ImportError, match="pip install"):
        found.to_xarray()


def test_real_xarray(tmp_path):
    pytest.importorskip("xarray")
    run(tmp_path, 3)
    with open_run(tmp_path) as found:
        assert found.to_xarray(["gradcam"])["gradcam"].sizes["explanation"] == len(found.explanations["image"])


def test_the_store_does_not_load_torch():
    import subprocess

    code = "import sys, xcli.store, xcli.results; assert 'torch' not in sys.modules"
    root = Path(xcli.merge.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_list_of_images_is_plain_json_lines(tmp_path):
    run(tmp_path, 3, merge=False)
    lines = [json.loads(line) for line in (tmp_path / "inputs.jsonl").read_text("ascii").splitlines()]
    assert [set(line) for line in lines] == [{"path", "file", "size", "mtime_ns", "label"}] * 3
