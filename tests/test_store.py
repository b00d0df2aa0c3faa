"""The run directory: its contract, going on, updates, starting over."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_driver import LENGTH, assert_is_run, inputs, opened, part, record, run

import xcli.merge
from xcli.errors import ConfigError, InputError
from xcli.results import open_run
from xcli.store import Input, Part, open_store, peek

# --- the contract -------------------------------------------------------------------------------------------


def test_the_layout_is_the_contract(tmp_path):
    run(tmp_path, 11)
    with h5py.File(tmp_path / "results.h5") as file:
        wanted = {
            "schema": "xcli/1",
            "created": "2026-01-02T03:04:05Z",
            "config": "methods: [gradcam]  # é\n",
            "seed": 7,
        }
        assert {key: file.attrs[key] for key in wanted} == wanted
        assert {"versions", "model", "device"} <= set(file.attrs)
        assert set(file) == {"images", "explanations", "categories", "heatmaps", "status", "extras", "curves"}
        cam = file["heatmaps/gradcam"]
        assert (cam.dtype, cam.chunks, cam.compression, cam.compression_opts, cam.shuffle) == (
            "<f4",
            (1, 5, 6),
            "gzip",
            1,
            True,
        )
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
            keep = {
                k: v if k.startswith("images/") or k.endswith("fraction") else v[:0] for k, v in whole.items()
            }
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
        assert [os.fsencode(item.path) for item in store.inputs] == [
            os.fsencode(item.path) for item in inputs(11)
        ]
    run(tmp_path, 11)
    with open_run(tmp_path) as found:
        assert found.images["path"][5] == "dir/\\udcff005.png"


# --- going on -----------------------------------------------------------------------------------------------


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


def grow(images, **changes):
    return [*images[:2], replace(images[2], **changes), *images[3:]]


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


# --- updates ------------------------------------------------------------------------------------------------


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
            assert "summary" not in file  # numbers of a run that is no more


# --- starting over ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_fresh_removes_the_run_and_nothing_else(tmp_path, finished):
    run(tmp_path, 11, merge=finished)
    for name in ("overlays/gradcam/a.png", "panels/a.png", "heatmaps/x/a.png", "mine/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    run(tmp_path, 9, fingerprint="other", fresh=True)
    assert_is_run(tmp_path, 9, "other")
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "inputs.jsonl",
        "results.h5",
        "locks",
        "mine",
    }


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


def test_the_store_does_not_load_torch():
    code = "import sys, xcli.store, xcli.results; assert 'torch' not in sys.modules"
    root = Path(xcli.merge.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_the_list_of_images_is_plain_json_lines(tmp_path):
    run(tmp_path, 3, merge=False)
    lines = [json.loads(line) for line in (tmp_path / "inputs.jsonl").read_text("ascii").splitlines()]
    assert [set(line) for line in lines] == [{"path", "file", "size", "mtime_ns", "label"}] * 3
