"""A hostile folder: every good image is explained as it would be alone, every other one is recorded with its reason."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from runs import Commands, Ended, photos, picture, plain, written
from unattended import hostile
from unattended.hostile import Kind, kinds

from xcli import contents, decode
from xcli.contents import BadImage, Stamp
from xcli.decode import image_size, read_image
from xcli.parts import printable

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest undoes the filter of xcli.decode

GOOD = 12
TWO = {"methods": ["gradcam", "eigencam"]}


@pytest.fixture(scope="module")
def xai() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


def stored(root: Path) -> dict[str, str]:
    """The reason of each image of a run, empty where it was explained."""
    with h5py.File(root / "results.h5") as file:
        paths, found = file["images/path"].asstr()[...], file["images/error"].asstr()[...]
        assert [bool(reason) for reason in found] == file["images/status"][...].astype(bool).tolist()
    return dict(zip(paths, found, strict=True))


def maps(root: Path) -> dict[str, np.ndarray]:
    """The maps of each explained image of a run, (methods, H, W)."""
    with h5py.File(root / "results.h5") as file:
        paths = file["images/path"].asstr()[...]
        both = np.stack([file[f"heatmaps/{name}"][...] for name in ("gradcam", "eigencam")], 1)
        return {paths[image]: both[row] for row, image in enumerate(file["explanations/image"][...])}


def expected(made: list[Kind], folder: Path) -> dict[str, str | None]:
    """The path that results.h5 has for each kind, and its reason."""
    names = [os.fsdecode(kind.name.removeprefix(os.fsencode(folder) + b"/")) for kind in made]
    return dict(zip(printable(names), (kind.reason for kind in made), strict=True))


def unlike(found: dict[str, str], wanted: dict[str, str | None]) -> dict[str, tuple[str | None, str | None]]:
    """What became of some images otherwise than it should: the reason wanted and found."""
    return {
        path: (reason, found.get(path))
        for path, reason in wanted.items()
        if path not in found or not re.fullmatch(reason or "", found[path])
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good images, which are also in a folder of their own, among every kind of other ones."""
    root = tmp_path_factory.mktemp("hostile")
    photos(root / "good", GOOD)
    photos(root / "mixed", GOOD)
    for kind in kinds(root / "mixed", root / "good/a/000.png"):
        kind.make(kind.name)
    return root


@pytest.fixture(scope="module")
def ran(place: Path, xai: Commands) -> Ended:
    """The run on the mixture."""
    config = plain(
        place / "mixed", place / "run", **TWO, output={"path": str(place / "run"), "png": ["overlay"]}
    )
    return xai("explain", written(place / "mixed.yaml", config), seconds=120, obeys=True, part_images=64)


@pytest.mark.case(
    "139 kinds of bad or odd file among good images",
    "the good are explained, each other has its reason in results.h5",
    "3",
)
def test_every_good_image_is_explained_and_every_bad_one_has_its_reason(request, place, ran, ends):
    ends(ran.code)
    assert "Traceback" not in ran.stderr
    made = kinds(place / "mixed", place / "good/a/000.png")
    assert request.node.get_closest_marker("case").args[0].startswith(f"{len(made)} kinds")
    found = stored(place / "run")
    assert unlike(found, expected(made, place / "mixed")) == {}
    assert len(found) == GOOD + len(made)


def test_the_good_images_are_explained_as_they_are_alone(place, ran, xai):
    config = written(place / "good.yaml", plain(place / "good", place / "alone", **TWO))
    assert xai("explain", config, seconds=60).code == 0
    alone, among = maps(place / "alone"), maps(place / "run")
    assert len(alone) == GOOD
    for path, both in alone.items():
        np.testing.assert_allclose(among[path], both, rtol=0, atol=1e-5 * np.abs(both).max(), err_msg=path)


def test_each_explained_image_has_its_own_picture_inside_the_output(place, ran):
    explained = [path for path, reason in stored(place / "run").items() if not reason]
    for name in ("gradcam", "eigencam"):
        folder = place / "run/overlays" / name
        pictures = [file for file in folder.rglob("*") if not file.is_dir()]
        assert len(pictures) == len(explained)
        assert all(file.is_file() and file.suffix == ".png" for file in pictures)
        assert all(str(file.relative_to(folder)).isprintable() for file in pictures)
        assert len({str(file).lower() for file in pictures}) == len(explained)
    assert {entry.name for entry in place.iterdir()} <= {
        "good",
        "mixed",
        "run",
        "alone",
        "mixed.yaml",
        "good.yaml",
    }


def test_the_run_can_be_scored_and_what_failed_stays_failed(place, ran, xai):
    before = stored(place / "run")
    ended = xai("evaluate", place / "run", "--metrics", "average-drop", seconds=60, obeys=True)
    assert ended.code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert stored(place / "run") == before
    with h5py.File(place / "run/results.h5") as file:
        scores, flat = file["metrics/gradcam/average-drop"][...], file["status/gradcam"][...]
    assert len(scores) == sum(not reason for reason in before.values())
    assert np.isfinite(scores[flat == 0]).all()
    assert (flat == 0).sum() > GOOD


# ---- files that change ----------------------------------------------------------------------------------------------

CHANGES = {"vanish": "missing", "grow": "has changed", "touch": "has changed", "replace": "has changed"}


@pytest.mark.case(
    "an image vanishes, grows or is replaced in a run", "it fails, never another picture in its place", "3"
)
def test_an_image_that_changed_since_the_list_was_made_is_not_explained(tmp_path, xai, ends):
    files = photos(tmp_path / "in", 6)
    picture(9).save(f"{files[3]}.new", "PNG")
    changes = [[what, str(file)] for what, file in zip(CHANGES, files)]
    config = plain(
        tmp_path / "in", tmp_path / "run", output={"path": str(tmp_path / "run"), "png": ["overlay"]}
    )
    ended = xai("explain", written(tmp_path / "run.yaml", config), changes=changes, seconds=60)
    ends(ended.code)
    names = [str(file.relative_to(tmp_path / "in")) for file in files]
    since = {"missing": "missing", "has changed": "has changed since the run began"}
    reasons = [since[reason] for reason in CHANGES.values()]
    assert stored(tmp_path / "run") == dict(zip(names, [*reasons, "", ""]))
    assert len(list((tmp_path / "run/overlays/gradcam").rglob("*.png"))) == 2


@pytest.mark.parametrize("change", ["cut", "emptied", "longer", "removed"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_file_that_changes_while_it_is_read_gives_an_image_or_a_reason(tmp_path, monkeypatch, kind, change):
    """It is changed between the first read and the next one, and once more before its pixels are decoded."""
    file = tmp_path / "a.img"
    file.write_bytes(
        hostile.encoded(kind, compression="tiff_lzw") if kind == "TIFF" else hostile.encoded(kind)
    )
    found = file.stat()
    listed = Stamp(found.st_size, found.st_mtime_ns)
    read = os.read

    def changed() -> None:
        if change == "removed":
            file.unlink(missing_ok=True)
        elif change == "longer":
            with file.open("ab") as end:
                end.write(b"more" * 1000)
        else:
            os.truncate(file, 0 if change == "emptied" else 500)

    def some(descriptor: int, size: int) -> bytes:
        data = read(descriptor, min(size, 400))
        changed()
        return data

    monkeypatch.setattr(contents.os, "read", some)
    opened = decode.Image.open

    def opened_then_changed(*given, **named):
        image = opened(*given, **named)
        changed()
        return image

    monkeypatch.setattr(decode.Image, "open", opened_then_changed)
    try:
        assert read_image(str(file)).size == (50, 40)
    except BadImage as error:
        assert re.fullmatch("truncated|not an image|damaged .*", str(error))  # noqa: PT017
        assert change in ("cut", "emptied")
    if change != "removed":
        os.utime(file, ns=(0, listed.mtime_ns + 1))
        with pytest.raises(BadImage, match="^has changed since the run began$"):
            read_image(str(file), listed=listed)


def test_a_device_is_not_even_opened(tmp_path, monkeypatch):
    """Opening alone can rewind a tape or wait for a line."""
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    monkeypatch.setattr(contents.os, "open", lambda *_: pytest.fail("it was opened"))
    for look in (read_image, image_size):
        with pytest.raises(BadImage, match="^not a file$"):
            look(str(tmp_path / "zero.png"))


@pytest.mark.soak
def test_a_folder_of_nothing_but_bad_files_ends_without_a_crash(tmp_path, xai):
    for kind in kinds(tmp_path / "in", tmp_path / "no.png"):
        if kind.reason is not None:
            (tmp_path / "in").mkdir(exist_ok=True)
            kind.make(kind.name)
    config = written(tmp_path / "run.yaml", plain(tmp_path / "in", tmp_path / "run", **TWO))
    ended = xai("explain", config, seconds=60, obeys=True, part_images=64)
    assert ended.code == 3, ended.stderr
    assert all(stored(tmp_path / "run").values())


# ---- thousands ------------------------------------------------------------------------------------------------------


def multiplied(folder: Path, times: int) -> None:
    """The same entries again in folders beside it, as links where that is possible."""
    for number in range(times):
        target = folder.with_name(f"{folder.name}{number}")
        for here, folders, files in os.walk(os.fsencode(folder)):
            there = os.fsencode(target) + here.removeprefix(os.fsencode(folder))
            os.makedirs(there, exist_ok=True)  # noqa: PTH103
            for name in (*files, *(name for name in folders if os.path.islink(here + b"/" + name))):  # noqa: PTH114
                os.link(here + b"/" + name, there + b"/" + name, follow_symlinks=False)


@pytest.mark.soak
@pytest.mark.case("thousands of bad files", "the same, and memory stays flat", "3")
def test_thousands_of_bad_files_take_no_more_memory_than_some(tmp_path, xai, ends):
    photos(tmp_path / "all/in", 4)
    for kind in kinds(tmp_path / "all/in", tmp_path / "all/in/a/000.png"):
        kind.make(kind.name)
    few = written(tmp_path / "few.yaml", plain(tmp_path / "all", tmp_path / "few", methods=["eigencam"]))
    first = xai("explain", few, seconds=100, obeys=True, part_images=64)
    ends(first.code)
    known = {path.partition("/")[2]: reason for path, reason in stored(tmp_path / "few").items()}
    multiplied(tmp_path / "all/in", 21)
    many = written(tmp_path / "many.yaml", plain(tmp_path / "all", tmp_path / "many", methods=["eigencam"]))
    ended = xai("explain", many, seconds=300, obeys=True, part_images=64)
    ends(ended.code)
    assert "Traceback" not in ended.stderr
    found = stored(tmp_path / "many")
    assert len(found) == 22 * len(known) > 3_000
    assert {path: reason for path, reason in found.items() if known[path.partition("/")[2]] != reason} == {}
    assert ended.peak - first.peak < 40 << 20
