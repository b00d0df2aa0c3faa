"""An unfinished run goes on only with all that its numbers depend on as it was; else it says what has changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Commands, longer, photos, picture, plain, same, written

import xcli
from xcli import provenance
from xcli.demo import nets
from xcli.provenance import definitions, factory_source

COUNT = 6
CHANGED = (
    "config, weights, an image, a named file or the version changed since the unfinished part",
    "it says which and does nothing, unless --fresh",
    "2",
)
FACTORY = """
from xcli.demo import nets

def net():
    return nets.load("shapes-cnn")
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, xai: Commands) -> Path:
    """A folder with all that a config can name, and a run of it of which one part of three is done; and, in another, a
    run that nothing stopped."""
    place = tmp_path_factory.mktemp("resume")
    files = photos(place / "photos", COUNT)
    lines = [f"{file.relative_to(place)},{nets.CATEGORIES[0]}\n" for file in files]
    (place / "list.csv").write_text("path,label\n" + "".join(lines))
    (place / "net.py").write_text(FACTORY)
    (place / "names.txt").write_text("\n".join(nets.CATEGORIES))
    np.save(place / "cells.npy", np.repeat(np.arange(64), 64).reshape(64, 64) // 16)
    torch.save(nets.load("shapes-cnn").state_dict(), place / "weights.pt")
    config = plain(
        Path("list.csv"),
        Path("run"),
        model={"source": "factory", "name": "net.py:net", "weights": "weights.pt", "categories": "names.txt"},
        images={"labels": "manifest"},
        methods=["gradcam", {"name": "lime", "segments": "cells.npy", "samples": 8}],
        runtime={"batch_size": 2, "workers": 1},
    )
    written(place / "config.yaml", config)
    assert xai("explain", "config.yaml", "--output", "whole", folder=str(place), part_images=2).code == 0
    ended = xai("explain", "config.yaml", folder=str(place), part_images=2, failpoint="part-done:1")
    assert ended.code == -9, ended.stderr
    assert len(list((place / "run" / "parts").iterdir())) < 3
    return place


@pytest.fixture
def place(begun: Path, tmp_path: Path) -> Path:
    """A copy of it, to change something in."""
    return shutil.copytree(begun, tmp_path / "place")


def replaced(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def larger(place: Path) -> None:
    picture(99).resize((100, 100)).save(place / "photos" / "a" / "000.png")


def later(place: Path) -> None:
    file = place / "photos" / "a" / "000.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def other_weights(place: Path) -> None:
    state = nets.load("shapes-cnn").state_dict()
    state["head.bias"] += 1
    torch.save(state, place / "weights.pt")


def recorded(place: Path, key: str, value: str) -> None:
    """As if ``key`` had been another when the run began."""
    record = json.loads((place / "run" / "run.json").read_text())
    if key in record["attrs"]:
        record["attrs"][key] = value
    else:
        versions = json.loads(record["attrs"]["versions"])
        record["attrs"]["versions"] = json.dumps({**versions, key: value})
    (place / "run" / "run.json").write_text(json.dumps(record))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (
        lambda place: replaced(place / "config.yaml", "samples: 8", "samples: 9"),
        "samples was 8, now 9",
    ),
    "weights": (other_weights, "the weights of net.py:net have changed"),
    "size of an image": (larger, "1 of the images of the run in run changed or vanished: photos/a/000.png "),
    "time of an image": (later, "photos/a/000.png was written again"),
    "an image that is gone": (
        lambda place: replaced(place / "list.csv", "photos/a/000.png,disc\n", ""),
        "photos/a/000.png is not there",
    ),
    "label of an image": (
        lambda place: replaced(place / "list.csv", "000.png,disc", "000.png,star"),
        "photos/a/000.png label 'disc' -> 'star'",
    ),
    "source of the network": (
        lambda place: replaced(place / "net.py", "return", "return  "),
        "net.py:net: changed",
    ),
    "label map": (lambda place: np.save(place / "cells.npy", np.zeros((64, 64), int)), "cells.npy: changed"),
    "label map that is gone": (lambda place: (place / "cells.npy").unlink(), "cells.npy"),
    "names of classes": (lambda place: replaced(place / "names.txt", "star", "sun"), "names.txt: changed"),
    "version of torch": (
        lambda place: recorded(place, "torch", "2.0.1"),
        f"torch 2.0.1 -> {version('torch')}",
    ),
    "version of xcli": (lambda place: recorded(place, "xcli", "0.0.9"), f"xcli 0.0.9 -> {xcli.__version__}"),
    "definitions": (lambda place: recorded(place, "definitions", "0"), "with other source files"),
    "device": (lambda place: recorded(place, "device", "cuda"), "began on cuda, this is cpu"),
}


QUICK = ["time of an image", "source of the network", "definitions", "weights"]


@pytest.mark.case(*CHANGED)
@pytest.mark.parametrize("what", [*QUICK, *longer(*(what for what in CHANGES if what not in QUICK))])
def test_what_changed_since_the_unfinished_part_is_named_and_nothing_is_done(
    place: Path, xai: Commands, ends: Callable[[int], None], what: str
):
    change, said = CHANGES[what]
    change(place)
    before = {file: file.stat().st_mtime_ns for file in (place / "run").rglob("*") if file.is_file()}
    ended = xai("explain", "config.yaml", folder=str(place), part_images=2)
    ends(ended.code)
    assert said in ended.stderr
    assert "--fresh" in ended.stderr or what == "label map that is gone"
    after = {file: file.stat().st_mtime_ns for file in (place / "run").rglob("*") if file.is_file()}
    assert {f: t for f, t in after.items() if f.suffix != ".lock"} == {
        f: t for f, t in before.items() if f.suffix != ".lock"
    }


@pytest.mark.soak
def test_with_all_as_it_was_the_run_goes_on_and_ends_like_any_other(place: Path, xai: Commands):
    (place / "net.pyc").write_bytes(b"what nobody named may change")
    ended = xai("explain", "config.yaml", folder=str(place), part_images=2)
    assert ended.code == 0, ended.stderr
    same(place / "run", place / "whole")
    recorded(place, "torch", "2.0.1")
    ended = xai("explain", "config.yaml", folder=str(place))
    assert ended.code == 0, "a finished run stays done"
    assert "already done" in ended.stderr
    photos(place / "photos", 1, start=COUNT)
    (place / "list.csv").open("a").write("photos/b/006.png,disc\n")
    listed = (place / "run" / "inputs.jsonl").read_bytes()
    ended = xai("explain", "config.yaml", "--update", folder=str(place))
    assert ended.code == 2
    assert "torch 2.0.1 -> " in ended.stderr
    assert (place / "run" / "inputs.jsonl").read_bytes() == listed


@pytest.mark.soak
def test_fresh_begins_again_whatever_has_changed(place: Path, xai: Commands):
    larger(place)
    other_weights(place)
    recorded(place, "definitions", "0")
    ended = xai("explain", "config.yaml", "--fresh", folder=str(place), part_images=2)
    assert ended.code == 0, ended.stderr


@pytest.mark.soak
def test_scores_begun_by_other_definitions_are_made_again_with_a_line(place: Path, xai: Commands):
    choice = ["--set", 'metrics=[{"name":"deletion","steps":2}]']
    options = {"folder": str(place), "part_images": 2}
    assert xai("evaluate", "whole", *choice, failpoint="scores-done:2", **options).code == -9
    (mine,) = (place / "whole" / "evaluation").iterdir()
    mine.rename(mine.with_name("0123456789abcdef"))  # what names it depends on who made it
    ended = xai("evaluate", "whole", *choice, **options)
    assert ended.code == 0, ended.stderr
    assert "scores that other versions or another device began are made again" in ended.stderr
    assert not (place / "whole" / "evaluation").exists()


def test_definitions_are_the_files_that_a_number_may_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(
        xcli.__path__[0], tmp_path / "xcli", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__")
    )
    monkeypatch.setattr(provenance.xcli, "__path__", [str(tmp_path / "xcli")])
    first = definitions.__wrapped__()
    for quiet in ("cli/explain.py", "progress.py", "demo/train.py"):
        (tmp_path / "xcli" / quiet).write_text("# changed")
    assert definitions.__wrapped__() == first
    for name in ("methods/cam/gradient.py", "plan.py", "demo/nets.py"):
        text = (tmp_path / "xcli" / name).read_text()
        (tmp_path / "xcli" / name).write_text(text + "#")
        assert definitions.__wrapped__() != first
        (tmp_path / "xcli" / name).write_text(text)
    assert definitions.__wrapped__() == first
    assert all((Path(xcli.__file__).parent / f"{name}.py").exists() or (Path(xcli.__file__).parent / name).is_dir()
               for name in provenance.TALKING)  # fmt: skip


def test_the_source_of_a_factory_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "house" / "room").mkdir(parents=True)
    for name in ("house/__init__.py", "house/room/__init__.py", "house/room/net.py"):
        (tmp_path / name).write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    assert factory_source("house.room.net:make") == tmp_path / "house" / "room" / "net.py"
    assert factory_source("house.room:make") == tmp_path / "house" / "room" / "__init__.py"
    assert factory_source("some/net.py:make") == Path("some/net.py")
    assert factory_source("house.cellar.net:make") is None
    assert factory_source("nowhere:make") is None
