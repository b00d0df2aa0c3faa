"""A folder of pictures in, results.h5 and PNGs out: what is written, and that nothing incidental changes a number."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from runs import PREPROCESS, SIDE, photos, picture, plain, same, written
from store_driver import columns_of
from torch import Tensor

import xcli.merge
import xcli.pipeline
import xcli.plan
from xcli import open_run
from xcli.config import load_config
from xcli.demo import nets
from xcli.errors import ConfigError, Interrupted
from xcli.execution import Execution
from xcli.images import find_images
from xcli.models import ModelSpec, load_model
from xcli.pipeline import Summary, explain_folder
from xcli.provenance import git_revision
from xcli.store import merge_run
from xcli.weights import weights_hash

COUNT = 14
NAMES = ["eigencam", "gradcam", "random"]


class Stopped(Exception):
    """What ends a run early in here."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as others may be computing; parts of four images, so that a small run has several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(xcli.plan, "PART_IMAGES", 4)
    yield
    torch.set_num_threads(threads)


def explain(folder: Path, output: Path, sections: dict[str, Any] | None = None, **options: Any) -> Summary:
    output.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(
        written(output.parent / f"{output.name}.yaml", plain(folder, output, **(sections or {})))
    )
    return explain_folder(config, find_images(config.images.paths, labels=config.images.labels), **options)


def unfinished(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
    """A run whose parts are all there, stopped before they are joined."""

    def stop(*_: object, **__: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(xcli.pipeline.Store, "merge", stop)
        explain(folder, output, sections)


def inputs_of(files: list[Path]) -> Tensor:
    """Model inputs (B, 3, H, W) of pictures, by Pillow alone."""
    pixels = [
        np.asarray(Image.open(f).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        for f in files
    ]
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def logits_of(files: list[Path]) -> Tensor:
    with torch.no_grad():
        return nets.load("shapes-cnn")(inputs_of(files))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in ``photos`` and a plain run on them in ``base``."""
    folder = tmp_path_factory.mktemp("pipeline")
    photos(folder / "photos", COUNT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xcli.plan, "PART_IMAGES", 4)
        explain(folder / "photos", folder / "base")
    return folder


def listed(folder: Path) -> list[Path]:
    return sorted(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: os.fsencode(f.relative_to(folder))
    )


# --- what is written -----------------------------------------------------------------------------------------


def test_results_h5_is_what_the_contract_says_for_a_reader_with_h5py_alone(place: Path):
    with h5py.File(place / "base" / "results.h5") as file:
        assert file.attrs["schema"] == "xcli/1"
        assert {"created", "config", "versions", "model", "device", "seed"} <= set(file.attrs)
        expected = {
            "path": (COUNT, "O"), "label": (COUNT, "i"), "width": (COUNT, "i"), "height": (COUNT, "i"),
            "status": (COUNT, "u"), "error": (COUNT, "O"), "bytes": (COUNT, "i"),
        }  # fmt: skip
        assert {
            key: (len(file["images"][key]), file["images"][key].dtype.kind) for key in file["images"]
        } == expected
        expected = {
            "image": (COUNT, "i"), "target": (COUNT, "i"), "score": (COUNT, "f"), "probability": (COUNT, "f"),
            "status": (COUNT, "u"), "error": (COUNT, "O"),
        }  # fmt: skip
        rows = file["explanations"]
        assert {key: (len(rows[key]), rows[key].dtype.kind) for key in rows} == expected
        assert list(file["categories"].asstr()) == list(nets.CATEGORIES)
        assert list(file["heatmaps"]) == list(file["status"]) == NAMES
        for name in NAMES:
            maps = file["heatmaps"][name]
            assert (maps.shape, maps.dtype) == ((COUNT, SIDE, SIDE), np.float32)
            assert (maps.chunks, maps.compression, maps.compression_opts, maps.shuffle) == (
                (1, SIDE, SIDE),
                "gzip",
                1,
                True,
            )
            assert {"method", "params", "layer", "preset", "source"} <= set(maps.attrs)
            assert (file["status"][name].shape, file["status"][name].dtype) == ((COUNT,), np.uint8)
        assert file["heatmaps/gradcam"].attrs["layer"] == "stages"
        assert json.loads(file["heatmaps/gradcam"].attrs["params"])["relu"] is False


def test_images_are_listed_in_the_order_of_their_names_with_their_sizes(place: Path):
    files = listed(place / "photos")
    found = columns_of(place / "base" / "results.h5")
    assert list(found["images/path"]) == [str(file.relative_to(place / "photos")) for file in files]
    assert list(zip(found["images/width"], found["images/height"], strict=True)) == [
        Image.open(f).size for f in files
    ]
    assert set(found["images/label"]) == {-1}
    assert not found["images/status"].any()


def test_numbers_and_maps_are_those_of_the_network_by_hand(place: Path):
    files = listed(place / "photos")
    net, x = nets.load("shapes-cnn"), inputs_of(files)
    acts = net.stages(net.stem(x)).detach().requires_grad_()
    logits = net.head(net.pool(acts).flatten(1))
    best = logits.argmax(1)
    (grads,) = torch.autograd.grad(logits.amax(1).sum(), acts)
    maps = (grads.mean((2, 3), keepdim=True) * acts).sum(1, keepdim=True)
    maps = torch.nn.functional.interpolate(maps, (SIDE, SIDE), mode="bilinear")[:, 0].detach().numpy()
    found = columns_of(place / "base" / "results.h5")
    assert list(found["explanations/image"]) == list(range(COUNT))
    assert list(found["explanations/target"]) == best.tolist()
    np.testing.assert_allclose(found["explanations/score"], logits.amax(1).detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found["explanations/probability"], logits.softmax(1).amax(1).detach(), rtol=1e-4
    )
    np.testing.assert_allclose(found["heatmaps/gradcam"], maps, rtol=0, atol=1e-5 * np.abs(maps).max())


def test_the_run_says_where_its_numbers_come_from(place: Path):
    with open_run(place / "base") as run:
        again = written(place / "again.yaml", {})
        again.write_text(run.config)
        config = load_config(again)
        assert (
            config.fingerprint() == load_config(place / "base.yaml").fingerprint() == run.attrs["fingerprint"]
        )
        versions = json.loads(run.attrs["versions"])
        assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
        assert {"xcli", "python", "torchvision", "numpy", "h5py", "pillow"} <= set(versions)
        assert json.loads(run.attrs["size"]) == [SIDE, SIDE]
        assert json.loads(run.attrs["preprocess"])["mean"] == PREPROCESS["mean"]
        assert (run.attrs["model"], run.attrs["device"], run.attrs["seed"]) == ("demo:shapes-cnn", "cpu", 0)
        unfolded = load_model(ModelSpec("demo", "shapes-cnn")).module
        assert run.attrs["weights_sha256"] == weights_hash(unfolded)
        with torch.no_grad():
            unfolded.head.bias[0] += 1e-3
        assert run.attrs["weights_sha256"] != weights_hash(unfolded)


def test_the_git_revision_is_that_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert git_revision() is None
    commit = [
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "commit",
        "-q",
        "--allow-empty",
        "-m",
        "one",
    ]
    for command in (["git", "init", "-q"], commit):
        subprocess.run(command, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert head.startswith(git_revision() or "none")


def test_flat_maps_are_counted(place: Path, tmp_path: Path):
    summary = explain(
        place / "photos", tmp_path / "run", {"methods": ["gradcam", "random"], "target": {"class": [0, 1]}}
    )
    found = columns_of(tmp_path / "run" / "results.h5")
    maps = found["heatmaps/gradcam"].reshape(2 * COUNT, -1)
    flat = maps.max(1) == maps.min(1)
    assert 0 < flat.sum() < 2 * COUNT  # else this shows nothing
    np.testing.assert_array_equal(found["status/gradcam"], flat)
    assert summary.flat == {"gradcam": flat.sum(), "random": 0}
    assert summary.not_finite == {"gradcam": 0, "random": 0}


def test_maps_that_are_not_finite_are_counted_and_others_unaffected(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from xcli.methods.cam.gradient import GradCAM

    genuine = GradCAM.weighted
    base = columns_of(place / "base" / "results.h5")
    limit = float(
        np.median(base["heatmaps/gradcam"][:, 0, 0])
    )  # the corner of a map survives its up-sampling

    def broken(self: GradCAM, acts: Tensor, grads: Tensor) -> Tensor:
        channels = genuine(self, acts, grads)
        channels[channels.sum(1)[:, 0, 0] > limit, :, 0, 0] = torch.nan
        return channels

    monkeypatch.setattr(GradCAM, "weighted", broken)
    summary = explain(place / "photos", tmp_path / "run")
    found = columns_of(tmp_path / "run" / "results.h5")
    odd = np.isnan(found["heatmaps/gradcam"]).any((1, 2))
    assert 0 < odd.sum() < COUNT
    np.testing.assert_array_equal(found["status/gradcam"] == 2, odd)
    assert (summary.not_finite["gradcam"], summary.exit_code) == (odd.sum(), 0)
    np.testing.assert_array_equal(found["heatmaps/gradcam"][~odd], base["heatmaps/gradcam"][~odd])
    np.testing.assert_array_equal(found["heatmaps/eigencam"], base["heatmaps/eigencam"])


@pytest.mark.parametrize(("size", "shape"), [("native", (8, 8)), ("input", (SIDE, SIDE))])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_maps_are_stored_in_the_size_and_type_asked_for(
    place: Path, tmp_path: Path, size: str, shape: tuple, dtype: str
):
    sections = {
        "methods": [{"name": "gradcam", "relu": False}],
        "output": {"heatmap": {"size": size, "dtype": dtype}},
    }
    explain(place / "photos", tmp_path / "run", sections)
    maps = columns_of(tmp_path / "run" / "results.h5")["heatmaps/gradcam"]
    assert (maps.shape, maps.dtype) == ((COUNT, *shape), np.dtype(dtype))
    whole = torch.from_numpy(maps.astype(np.float32))[:, None]
    grown = torch.nn.functional.interpolate(whole, (SIDE, SIDE), mode="bilinear")[:, 0].numpy()
    base = columns_of(place / "base" / "results.h5")["heatmaps/gradcam"]
    close = {"float16": 2e-3, "float32": 1e-6}[dtype] * np.abs(base).max()
    np.testing.assert_allclose(grown, base, rtol=0, atol=close)


# --- pictures ------------------------------------------------------------------------------------------------


def names_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_no_picture_is_written_where_none_is_asked_for(place: Path):
    assert sorted(entry.name for entry in (place / "base").iterdir()) == [
        "inputs.jsonl",
        "locks",
        "results.h5",
        "run.json",
    ]


def test_pictures_mirror_the_folder_of_the_images(place: Path, tmp_path: Path):
    sections = {"methods": ["gradcam", "random"], "output": {"png": ["overlay", "heatmap", "panel"]}}
    explain(place / "photos", tmp_path / "run", sections)
    wanted = [f"{file.relative_to(place / 'photos')}.png" for file in listed(place / "photos")]
    for folder in ("overlays/gradcam", "overlays/random", "heatmaps/gradcam", "heatmaps/random", "panels"):
        assert names_below(tmp_path / "run" / folder) == sorted(wanted), folder
    for kind in ("overlays", "heatmaps"):
        assert Image.open(tmp_path / "run" / kind / "gradcam" / wanted[0]).size == (SIDE, SIDE)
    seen, heat = (
        Image.open(tmp_path / "run" / kind / "random" / wanted[0]) for kind in ("overlays", "heatmaps")
    )
    assert len(np.unique(np.asarray(heat.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    assert np.abs(np.asarray(seen.convert("RGB")).astype(int) - np.asarray(heat.convert("RGB"))).mean() > 10


def test_pictures_of_several_rows_carry_their_target(place: Path, tmp_path: Path):
    files = listed(place / "photos")
    sections = {
        "methods": ["gradcam"],
        "target": {"top": 2},
        "output": {"png": ["overlay", "heatmap", "panel"]},
    }
    explain(place / "photos", tmp_path / "run", sections)
    top = logits_of(files).topk(2, 1).indices.tolist()
    shown = [str(file.relative_to(place / "photos")) for file in files]
    wanted = [
        f"{path}.{c}-{nets.CATEGORIES[c]}.png" for path, two in zip(shown, top, strict=True) for c in two
    ]
    assert names_below(tmp_path / "run" / "overlays" / "gradcam") == sorted(wanted)
    assert names_below(tmp_path / "run" / "heatmaps" / "gradcam") == sorted(wanted)
    assert names_below(tmp_path / "run" / "panels") == sorted(f"{path}.png" for path in shown)


def test_an_overlay_on_the_original_has_its_size(place: Path, tmp_path: Path):
    explain(
        place / "photos",
        tmp_path / "run",
        {"output": {"png": ["overlay"], "overlay_on": "original", "alpha": 0.0}},
    )
    for file in listed(place / "photos"):
        drawn = Image.open(
            tmp_path / "run" / "overlays" / "gradcam" / f"{file.relative_to(place / 'photos')}.png"
        )
        original = Image.open(file).convert("RGB")
        assert drawn.size == original.size
        off = np.abs(np.asarray(drawn.convert("RGB")).astype(int) - np.asarray(original))
        assert off.max() <= 1  # no weight for the colour leaves the photograph


# --- nothing incidental changes a number -----------------------------------------------------------------------


def test_two_fresh_runs_are_byte_equal(place: Path, tmp_path: Path):
    explain(place / "photos", tmp_path / "run")
    same(tmp_path / "run", place / "base")


@pytest.mark.parametrize(
    "runtime",
    [
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 64},
        {"batch_size": "auto"},
        {"fold": False},
        {"channels_last": False},
    ],
    ids=str,
)
def test_batches_and_layout_change_nothing(place: Path, tmp_path: Path, runtime: dict):
    explain(place / "photos", tmp_path / "run", {"runtime": runtime})
    same(tmp_path / "run", place / "base", 1e-5)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_workers_change_not_a_byte(place: Path, tmp_path: Path, workers: int):
    explain(place / "photos", tmp_path / "run", {"runtime": {"workers": workers}})
    same(tmp_path / "run", place / "base")


def test_the_length_of_parts_changes_not_a_byte(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(xcli.plan, "PART_IMAGES", 256)
    explain(place / "photos", tmp_path / "run")
    same(tmp_path / "run", place / "base")


@pytest.mark.parametrize("compression", ["lzf", "none"])
def test_compression_changes_not_a_byte(place: Path, tmp_path: Path, compression: str):
    explain(place / "photos", tmp_path / "run", {"output": {"compression": compression}})
    same(tmp_path / "run", place / "base")


def test_parts_with_an_index_read_like_one_file(place: Path, tmp_path: Path):
    summary = explain(place / "photos", tmp_path / "run", {"output": {"layout": "parts"}})
    assert summary.status == "done"
    assert len(list((tmp_path / "run" / "parts").glob("*.h5"))) == 4
    same(tmp_path / "run", place / "base")
    assert (
        explain(place / "photos", tmp_path / "run", {"output": {"layout": "parts"}}).status == "already done"
    )


@pytest.mark.parametrize("merged", ["by the last shard", "by hand"])
def test_shards_give_the_run_of_one_process(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merged: str
):
    first = explain(place / "photos", tmp_path / "run", shard=(2, 2))
    assert (first.status, first.results) == ("shard done", None)
    assert not (tmp_path / "run" / "results.h5").exists()
    with pytest.raises(ConfigError, match="1/2"):
        merge_run(tmp_path / "run")
    if merged == "by hand":
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(xcli.pipeline.Store, "merge", lambda _self, **_: (_ for _ in ()).throw(Stopped))
            explain(place / "photos", tmp_path / "run", shard=(1, 2))
        merge_run(tmp_path / "run")
    else:
        assert explain(place / "photos", tmp_path / "run", shard=(1, 2)).status == "done"
    same(tmp_path / "run", place / "base")


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    genuine, refused = Execution.run, []

    def run(self: Execution, module: Any, *inputs: Tensor) -> Any:
        if len(inputs[0]) > 1:
            refused.append(len(inputs[0]))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return genuine(self, module, *inputs)

    monkeypatch.setattr(Execution, "run", run)
    assert explain(place / "photos", tmp_path / "run").failed == 0
    assert refused == [4, 4, 2]  # with the graphs kept, then without, then halved; once and for all
    same(tmp_path / "run", place / "base", 1e-5)


def test_an_image_that_does_not_fit_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photos(tmp_path / "photos", 6)
    Image.new("RGB", (60, 50), (255, 255, 255)).save(tmp_path / "photos" / "a" / "000.png")
    genuine = Execution.run

    def run(self: Execution, module: Any, *inputs: Tensor) -> Any:
        if (inputs[0].flatten(1).amin(1) > 1.9).any():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return genuine(self, module, *inputs)

    explain(tmp_path / "photos", tmp_path / "base")
    monkeypatch.setattr(Execution, "run", run)
    summary = explain(tmp_path / "photos", tmp_path / "run")
    assert (summary.failed, summary.explanations, summary.exit_code) == (1, 5, 3)
    found, base = columns_of(tmp_path / "run" / "results.h5"), columns_of(tmp_path / "base" / "results.h5")
    assert "memory" in found["images/error"][0]
    assert list(found["explanations/image"]) == [1, 2, 3, 4, 5]
    for name in NAMES:
        whole = base[f"heatmaps/{name}"][1:]
        np.testing.assert_allclose(found[f"heatmaps/{name}"], whole, rtol=0, atol=1e-5 * np.abs(whole).max())


# --- going on ------------------------------------------------------------------------------------------------


def test_the_same_command_again_finds_nothing_to_do(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    explain(place / "photos", tmp_path / "run")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "run").glob("*.*")}
    monkeypatch.setattr(xcli.pipeline, "prepared", None)  # no model is loaded
    summary = explain(place / "photos", tmp_path / "run")
    assert (summary.status, summary.exit_code, summary.images) == ("already done", 0, COUNT)
    assert before == {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "run").glob("*.*")
    }


def test_lost_parts_of_an_unfinished_run_are_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    unfinished(place / "photos", tmp_path / "run", monkeypatch)
    parts = sorted((tmp_path / "run" / "parts").glob("*.h5"))
    assert len(parts) == 4
    for part in (parts[0], parts[2]):
        part.unlink()
    kept = {part: part.stat().st_mtime_ns for part in (parts[1], parts[3])}
    merge = xcli.pipeline.Store.merge

    def merged(store: Any, **_: Any) -> Path:
        assert kept == {part: part.stat().st_mtime_ns for part in kept}
        return merge(store)

    monkeypatch.setattr(xcli.pipeline.Store, "merge", merged)
    assert explain(place / "photos", tmp_path / "run").status == "done"
    same(tmp_path / "run", place / "base")


def test_what_was_decided_at_the_start_holds_when_the_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    auto = {"runtime": {"batch_size": "auto"}, "methods": [{"name": "gradcam", "relu": False}]}
    with monkeypatch.context() as patch:
        patch.setattr(xcli.plan, "fitting_batch", lambda *_: 2)
        explain(place / "photos", tmp_path / "whole", auto)
        unfinished(place / "photos", tmp_path / "run", patch, **auto)
    part = tmp_path / "run" / "parts" / "00001.h5"
    part.unlink()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["resolved"]["batch_size"], record["resolved"]["layers"]) == (2, {"gradcam": ["stages"]})
    plans = []
    genuine = xcli.pipeline.explained

    def explained(plan: Any, batch: Any, sources: Any) -> Any:
        plans.append((plan.batch_size, plan.at, len(batch.rows)))
        return genuine(plan, batch, sources)

    monkeypatch.setattr(xcli.pipeline, "explained", explained)
    monkeypatch.setattr(xcli.plan, "fitting_batch", lambda *_: 4)
    monkeypatch.setattr(
        "xcli.layers.Layers.default", property(lambda _self: pytest.fail("the layer was decided anew"))
    )
    explain(place / "photos", tmp_path / "run", auto)
    assert plans == [(2, ("stages",), 2)] * 2
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_keeps_what_was_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    genuine, batches = xcli.pipeline.explained, []

    def explained(plan: Any, batch: Any, sources: Any) -> Any:
        batches.append(batch)
        if len(batches) == 4:
            os.kill(os.getpid(), number)
        return genuine(plan, batch, sources)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(xcli.pipeline, "explained", explained)
        explain(place / "photos", tmp_path / "run")
    assert stopped.value.exit_code == code
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert {"00000.h5", "00001.h5"} <= {part.name for part in (tmp_path / "run" / "parts").iterdir()}
    assert explain(place / "photos", tmp_path / "run").status == "done"
    same(tmp_path / "run", place / "base")


def test_a_signal_while_the_parts_are_joined_waits_until_they_are(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill = xcli.merge._fill

    def filled(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        fill(*given)

    monkeypatch.setattr(xcli.merge, "_fill", filled)
    with pytest.raises(Interrupted) as stopped:
        explain(place / "photos", tmp_path / "run")
    assert stopped.value.exit_code == 143
    same(tmp_path / "run", place / "base")
    assert explain(place / "photos", tmp_path / "run").status == "done"  # what was left over is gone now
    assert explain(place / "photos", tmp_path / "run").status == "already done"


def test_a_run_does_not_go_on_with_other_weights(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    net = nets.load("shapes-cnn")
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    model = {"model": {"weights": str(tmp_path / "weights.pt")}}
    unfinished(place / "photos", tmp_path / "run", monkeypatch, **model)
    (tmp_path / "run" / "parts" / "00001.h5").unlink()
    with torch.no_grad():
        net.head.bias += 1
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="weights.*--fresh"):
        explain(place / "photos", tmp_path / "run", model)
    assert explain(place / "photos", tmp_path / "run", model, fresh=True).status == "done"


def test_new_images_are_refused_without_update_and_appended_with_it(tmp_path: Path):
    photos(tmp_path / "photos", 6)
    explain(tmp_path / "photos", tmp_path / "run")
    before = columns_of(tmp_path / "run" / "results.h5")
    photos(tmp_path / "photos", 5, start=6)
    with pytest.raises(ConfigError, match="--update.*--fresh"):
        explain(tmp_path / "photos", tmp_path / "run")
    explain(tmp_path / "photos", tmp_path / "run", update=True)
    explain(tmp_path / "photos", tmp_path / "whole")
    found, whole = columns_of(tmp_path / "run" / "results.h5"), columns_of(tmp_path / "whole" / "results.h5")
    for name in ("images/path", "heatmaps/gradcam", "heatmaps/random", "explanations/score"):
        np.testing.assert_array_equal(found[name][:6], before[name])
    order = [list(found["images/path"]).index(path) for path in whole["images/path"]]
    assert sorted(order) == list(range(11))
    for name in ("heatmaps/gradcam", "heatmaps/random", "explanations/score", "images/width"):
        largest = np.abs(whole[name]).max()
        np.testing.assert_allclose(found[name][order], whole[name], rtol=0, atol=1e-5 * largest, err_msg=name)


def test_an_update_of_an_unfinished_run_ends_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photos(tmp_path / "photos", 6)
    unfinished(tmp_path / "photos", tmp_path / "run", monkeypatch)
    (tmp_path / "run" / "parts" / "00001.h5").unlink()  # of two images: less than a batch
    photos(tmp_path / "photos", 5, start=6)
    summary = explain(tmp_path / "photos", tmp_path / "run", update=True)
    assert (summary.status, summary.images, summary.failed) == ("done", 11, 0)
    explain(tmp_path / "photos", tmp_path / "whole")
    found, whole = columns_of(tmp_path / "run" / "results.h5"), columns_of(tmp_path / "whole" / "results.h5")
    order = [list(found["images/path"]).index(path) for path in whole["images/path"]]
    for name in ("heatmaps/gradcam", "heatmaps/random", "explanations/score", "images/width"):
        largest = np.abs(whole[name]).max()
        np.testing.assert_allclose(found[name][order], whole[name], rtol=0, atol=1e-5 * largest, err_msg=name)


def test_another_config_is_refused_and_fresh_replaces_the_run(place: Path, tmp_path: Path):
    explain(place / "photos", tmp_path / "run", {"methods": ["random"]})
    with pytest.raises(ConfigError, match="--fresh"):
        explain(place / "photos", tmp_path / "run")
    explain(place / "photos", tmp_path / "run", fresh=True)
    same(tmp_path / "run", place / "base")


# --- images and targets --------------------------------------------------------------------------------------


def test_bad_images_become_rows_and_leave_the_others_alone(tmp_path: Path):
    files = photos(tmp_path / "photos", 9)
    explain(tmp_path / "photos", tmp_path / "base")
    bad = sorted([files[0], files[5], files[8]])
    bad[0].write_bytes(b"")
    bad[1].write_bytes(b"this is no picture")
    content = bad[2].read_bytes()
    bad[2].write_bytes(content[: len(content) // 2])
    summary = explain(tmp_path / "photos", tmp_path / "run")
    assert (summary.images, summary.failed, summary.explanations, summary.exit_code) == (9, 3, 6, 3)
    shown = [str(file.relative_to(tmp_path / "photos")) for file in bad]
    found, base = columns_of(tmp_path / "run" / "results.h5"), columns_of(tmp_path / "base" / "results.h5")
    rows = [list(found["images/path"]).index(path) for path in shown]
    assert [row for row, status in enumerate(found["images/status"]) if status] == rows
    assert [found["images/error"][row] for row in rows] == ["empty file", "not an image", "truncated"]
    good = np.setdiff1d(np.arange(9), rows)
    assert list(found["explanations/image"]) == list(good)
    assert not any(found["images/error"][good])
    for name in NAMES:
        whole = base[f"heatmaps/{name}"][good]
        np.testing.assert_allclose(found[f"heatmaps/{name}"], whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    assert explain(tmp_path / "photos", tmp_path / "run").exit_code == 0  # finished and unchanged


def test_a_folder_of_bad_images_alone_is_finished_too(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for name in ("x.png", "y.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"no picture")
    summary = explain(tmp_path / "photos", tmp_path / "run", {"output": {"png": ["overlay", "panel"]}})
    assert (summary.failed, summary.explanations, summary.exit_code) == (2, 0, 3)
    assert columns_of(tmp_path / "run" / "results.h5")["heatmaps/gradcam"].shape == (0, SIDE, SIDE)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders named after classes; the network is right about every second one."""
    folder = tmp_path_factory.mktemp("classes")
    files = photos(folder / "loose", 8)
    for index, (file, best) in enumerate(zip(files, logits_of(files).argmax(1).tolist(), strict=True)):
        home = folder / nets.CATEGORIES[best if index % 2 else (best + 1) % 10]
        home.mkdir(exist_ok=True)
        file.rename(home / file.name)
    for kind in "ab":
        (folder / "loose" / kind).rmdir()
    (folder / "loose").rmdir()
    (folder / "neither").mkdir()
    picture(50).save(folder / "neither" / "050.png")
    return folder


def labels_of(files: list[Path]) -> list[int]:
    return [
        nets.CATEGORIES.index(file.parent.name) if file.parent.name != "neither" else -1 for file in files
    ]


@pytest.mark.parametrize("only", ["all", "wrong", "correct"])
def test_only_right_or_wrong_images_are_explained(classes: Path, tmp_path: Path, only: str):
    explain(classes, tmp_path / "run", {"images": {"labels": "folder", "only": only}})
    files = listed(classes)
    labels, best = np.array(labels_of(files)), logits_of(files).argmax(1).numpy()
    found = columns_of(tmp_path / "run" / "results.h5")
    np.testing.assert_array_equal(found["images/label"], labels)
    known = labels >= 0
    wanted = {"all": known | True, "wrong": known & (best != labels), "correct": known & (best == labels)}[
        only
    ]
    assert wanted.sum() == {"all": 9, "wrong": 4, "correct": 4}[only]
    assert list(found["explanations/image"]) == list(np.flatnonzero(wanted))
    assert not found["images/status"].any()  # left out is not failed


def test_only_unsure_images_are_explained(place: Path, tmp_path: Path):
    probability = logits_of(listed(place / "photos")).softmax(1).amax(1).numpy()
    limit = float(np.sort(probability)[5:7].mean())
    explain(place / "photos", tmp_path / "run", {"images": {"only": {"probability_below": limit}}})
    found = columns_of(tmp_path / "run" / "results.h5")
    assert list(found["explanations/image"]) == list(np.flatnonzero(probability < limit))
    assert (found["explanations/probability"] < limit).all()
    assert len(found["explanations/image"]) == 6


def rows_of(run: Path) -> list[tuple[int, int]]:
    found = columns_of(run / "results.h5")
    return list(zip(found["explanations/image"].tolist(), found["explanations/target"].tolist(), strict=True))


def test_the_label_as_target_and_no_row_for_an_image_without_one(classes: Path, tmp_path: Path):
    explain(
        classes, tmp_path / "run", {"images": {"labels": "folder"}, "target": "label", "methods": ["gradcam"]}
    )
    wanted = [(row, label) for row, label in enumerate(labels_of(listed(classes))) if label >= 0]
    assert rows_of(tmp_path / "run") == wanted


def test_classes_by_name_and_index_and_the_predicted_one_once_each(place: Path, tmp_path: Path):
    explain(
        place / "photos",
        tmp_path / "run",
        {"target": [{"class": ["star", 1]}, "predicted"], "methods": ["gradcam"]},
    )
    best = logits_of(listed(place / "photos")).argmax(1).tolist()
    wanted = [
        (row, one)
        for row, own in enumerate(best)
        for one in dict.fromkeys([nets.CATEGORIES.index("star"), 1, own])
    ]
    assert rows_of(tmp_path / "run") == wanted


@pytest.mark.parametrize("above", [0.2, "the median"])
def test_the_most_probable_classes_above_a_bound(place: Path, tmp_path: Path, above: float | str):
    """The first one always."""
    probabilities = logits_of(listed(place / "photos")).softmax(1)
    bound = above if isinstance(above, float) else float(probabilities.amax(1).median()) + 1e-3
    explain(
        place / "photos", tmp_path / "run", {"target": {"top": 3, "above": bound}, "methods": ["gradcam"]}
    )
    wanted, extra = [], 0
    for row, probability in enumerate(probabilities):
        first, *others = probability.argsort(descending=True)[:3].tolist()
        kept = [one for one in others if probability[one] >= bound]
        wanted += [(row, one) for one in (first, *kept)]
        extra += len(kept)
    if above == 0.2:
        assert 0 < extra < 2 * COUNT  # else the bound does nothing here
    else:
        assert (probabilities.amax(1) < bound).any()
    assert rows_of(tmp_path / "run") == wanted


# --- long ----------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
def test_memory_stays_flat_over_two_hundred_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photos(tmp_path / "photos", 8)
    manifest = tmp_path / "many.txt"
    for index in range(200):
        for file in listed(tmp_path / "photos"):
            link = tmp_path / "links" / f"{index:03d}" / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(file)
    manifest.write_text("\n".join(str(file) for file in listed(tmp_path / "links")))
    monkeypatch.setattr(xcli.plan, "PART_IMAGES", 40)
    genuine, seen = xcli.pipeline.explained, []

    def explained(plan: Any, batch: Any, sources: Any) -> Any:
        seen.append(resident())
        return genuine(plan, batch, sources)

    monkeypatch.setattr(xcli.pipeline, "explained", explained)
    sections = {"runtime": {"batch_size": 8}, "output": {"png": ["overlay", "panel"]}}
    summary = explain(manifest, tmp_path / "run", sections)
    assert (summary.images, summary.failed, len(seen)) == (1600, 0, 200)
    assert max(seen[150:]) - max(seen[40:60]) < 16 << 20
