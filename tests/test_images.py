"""Finding, decoding and batching images, most of them odd."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from unattended.hostile import bomb

from xcli.contents import LARGE
from xcli.errors import ConfigError, InputError
from xcli.images import SUFFIXES, BadImage, Batch, find_images, image_size, read_image, stream
from xcli.preprocess import Preprocess

ORIENTATION = 0x0112
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest undoes the filter of xcli.decode


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def quadrants(width=6, height=4) -> Image.Image:
    """Red in the upper left, green in the upper right, blue in the lower left, grey in the lower right."""
    picture = np.zeros((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    picture[:h, :w], picture[:h, w:], picture[h:, :w], picture[h:, w:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        128,
    )
    return Image.fromarray(picture)


def write(path, content: Image.Image | bytes | str = b"x", **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path, **options)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def shown(paths, **options) -> list[str]:
    return [source.path for source in find_images([str(path) for path in paths], **options)]


# ---------------------------------------------------------------- find


def test_folders_are_walked_in_the_order_of_raw_bytes(tmp_path):
    for name in [
        "b/z.PNG",
        "a.jpeg",
        "B.tif",
        "b/a.webp",
        "b.png",
        "notes.txt",
        ".hidden.png",
        ".git/x.png",
        "noext",
    ]:
        write(tmp_path / name)
    assert shown([tmp_path]) == ["B.tif", "a.jpeg", "b.png", "b/a.webp", "b/z.PNG"]
    assert shown([tmp_path], limit=2) == ["B.tif", "a.jpeg"]


def test_a_source_carries_size_time_and_how_to_open_it(tmp_path):
    file = write(tmp_path / "a.png", b"12345")
    (source,) = find_images([str(tmp_path)])
    assert (source.file, source.size, source.label) == (file, 5, None)
    assert source.mtime_ns == (tmp_path / "a.png").stat().st_mtime_ns


def test_whatever_is_named_like_an_image_is_listed_and_only_links_to_other_folders_are_left_out(tmp_path):
    write(tmp_path / "real.png")
    write(tmp_path / "full.png/inside.jpg")
    write(tmp_path / "texts.png/notes.txt")
    write(tmp_path / "run.png/run.json")
    write(tmp_path / "run.png/inputs.jsonl")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "loop.png").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "link.png").symlink_to("real.png")
    (tmp_path / "nested.png/empty.gif/.hidden").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    listed = find_images([str(tmp_path)])
    assert [source.path for source in listed] == [
        *("broken.png", "full.png/inside.jpg", "link.png", "loop.png", "nested.png/empty.gif", "pipe.jpg"),
        *("real.png", "self.png", "texts.png"),
    ]
    assert [source.path for source in listed if source.stamp == (0, 0)] == ["broken.png", "self.png"]
    assert shown([tmp_path / "*.png"]) == [
        *("broken.png", "link.png", "loop.png", "real.png", "self.png", "texts.png")
    ]
    with pytest.raises(InputError, match="neither a file nor a folder"):
        find_images([str(tmp_path / "pipe.jpg")])


def test_odd_names_survive_and_twins_stay_two(tmp_path):
    names = [
        "new\nline.png",
        "esc\x1b[31m.png",
        "-dash.png",
        "\u00e9.png",
        "e\u0301.png",
        os.fsdecode(b"\xff.png"),
    ]
    for name in names:
        write(tmp_path / name)
    sources = find_images([str(tmp_path)])
    assert [os.fsencode(s.path) for s in sources] == sorted(os.fsencode(name) for name in names)
    assert all(s.size == 1 for s in sources)


def test_globs(tmp_path, monkeypatch):
    for name in ["x/a.png", "x/b.txt", "x/deep/er/a.png", "y/a.png", "y/c[1].png", "x/.h/a.png"]:
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert shown(["*/a.png"]) == ["x/a.png", "y/a.png"]
    assert shown(["x/**/a.png"]) == ["a.png", "deep/er/a.png"]
    assert shown(["**"]) == ["x/a.png", "x/deep/er/a.png", "y/a.png", "y/c[1].png"]
    assert shown([f"{tmp_path}/[xy]/*"]) == ["x/a.png", "y/a.png", "y/c[1].png"]
    assert shown(["y/c[1].png"]) == ["c[1].png"]  # it exists, so it is no pattern
    with pytest.raises(InputError, match="no image found"):
        find_images(["x/*.gif"])


def test_several_inputs_are_prefixed_and_duplicates_listed_once(tmp_path, monkeypatch):
    for name in ["one/p/a.png", "two/p/a.png", "a.png"]:
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert shown(["one/p", "two/p/"]) == ["p/a.png", "p~2/a.png"]
    assert shown(["one", "one/p/a.png", "./one"]) == ["one/p/a.png"]
    assert shown(["one/p/a.png", "two/p/a.png", str(tmp_path / "a.png")])[:2] != ["a.png", "a.png"]
    assert shown(["one/p/a.png"]) == ["a.png"]


def test_lists_and_standard_input(tmp_path, monkeypatch):
    for name in ["here.png", "data/beside.png", "data/here.png"]:
        write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path / "data/list.txt",
        "# comment\n\nhere.png\r\nbeside.png\nmissing.png\n../up.png\nup.png\n/etc/x.png\n",
    )
    sources = find_images(["data/list.txt"])
    assert [s.path for s in sources] == [
        "beside.png",
        "etc/x.png",
        "here.png",
        "missing.png",
        "up.png",
        "up~2.png",
    ]
    files = {s.path: s.file for s in sources}
    assert files["here.png"] == "here.png"  # the current directory comes first
    assert files["beside.png"] == "data/beside.png"
    assert {s.path: s.size for s in sources}["missing.png"] == 0
    assert shown(["-"], stdin=io.StringIO("here.png\n")) == ["here.png"]
    raw = io.TextIOWrapper(io.BytesIO(b"here.png\n\xff.png\n"))
    assert shown(["-"], stdin=raw) == ["here.png", os.fsdecode(b"\xff.png")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [True, False])
def test_manifests_with_labels(tmp_path, monkeypatch, separator, header):
    write(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    rows = [["path", "label"]] * header + [["a.png", "cat"], ["gone.png", ""]]
    write(tmp_path / "m.csv", b"\xef\xbb\xbf" + "\n".join(separator.join(row) for row in rows).encode())
    sources = find_images(["m.csv"], labels="manifest")
    assert [(s.path, s.label) for s in sources] == [("a.png", "cat"), ("gone.png", None)]
    assert [s.label for s in find_images(["m.csv"])] == [None, None]


def test_labels_by_folder(tmp_path, monkeypatch):
    write(tmp_path / "cat/a.png")
    write(tmp_path / "dogs/dog/b.png")
    monkeypatch.chdir(tmp_path / "cat")
    assert [s.label for s in find_images([".."], labels="folder")] == ["cat", "dog"]
    assert [s.label for s in find_images(["."], labels="folder")] == ["cat"]
    assert [s.label for s in find_images(["a.png"], labels="folder")] == ["cat"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png\n", "columns path and label"),
        ("path\na.png\n", "columns path and label"),
        ("a.png,cat\na.png,dog\n", "'a.png' has two labels: 'cat' and 'dog'"),
        ("path,label\na.png\n", "lacks a path or a column"),
        ("path,label\n,cat\n", "lacks a path or a column"),
        ("a\0b", "zero bytes"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        find_images([write(tmp_path / "m.csv", content)], labels="manifest")


def test_labels_from_a_folder_that_has_no_manifest(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(InputError, match="labels: manifest"):
        find_images([str(tmp_path)], labels="manifest")


def test_a_mistyped_path_is_corrected(tmp_path):
    write(tmp_path / "photos/cat.png")
    for wrong, right in [
        ("photo", "photos"),
        ("photos/cta.png", "photos/cat.png"),
        ("fotos/x/y.png", "photos"),
    ]:
        with pytest.raises(InputError, match=f"does not exist; did you mean '{tmp_path / right}'"):
            find_images([str(tmp_path / wrong)])


def test_nothing_found_says_where_and_what_counts(tmp_path):
    with pytest.raises(InputError, match="no image found") as error:
        find_images([str(tmp_path)])
    assert str(tmp_path) in str(error.value)
    assert all(suffix in str(error.value) for suffix in SUFFIXES)
    with pytest.raises(InputError, match="empty"):
        find_images([""])


def test_an_unreadable_folder_is_not_skipped(tmp_path, monkeypatch):
    write(tmp_path / "a.png")

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        find_images([str(tmp_path)])


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_every_orientation_comes_upright(tmp_path, orientation, suffix):
    upright = quadrants(64, 32)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # how a camera held that way stores it
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    file = write(tmp_path / f"a.{suffix}", stored, exif=exif, **options)
    image = read_image(file)
    assert image.size == image_size(file) == (64, 32)
    for y, x in [(4, 4), (4, 60), (28, 4), (28, 60)]:
        assert np.abs(pixels(image)[y, x].astype(int) - pixels(upright)[y, x]).max() < 12


def test_transparency_is_laid_on_the_background(tmp_path):
    half = Image.fromarray(np.array([[[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 0, 128]]], np.uint8))
    rgba = write(tmp_path / "rgba.png", half)
    assert pixels(read_image(rgba))[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert pixels(read_image(rgba, background=(9, 8, 7)))[0, 1].tolist() == [9, 8, 7]
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 1, 2, 3])
    palette.putdata([0, 1])
    file = write(tmp_path / "p.png", palette, transparency=bytes([255, 0]))
    assert pixels(read_image(file, background=(9, 8, 7)))[0].tolist() == [[200, 10, 20], [9, 8, 7]]
    grey = write(
        tmp_path / "la.png", Image.merge("LA", [Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0)])
    )
    assert pixels(read_image(grey, background=(9, 8, 7)))[0, 0].tolist() == [9, 8, 7]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    for name in ("a.png", "a.tif"):
        assert (
            pixels(read_image(write(tmp_path / name, Image.fromarray(values))))[0, :, 0].tolist() == expected
        )
    big = write(tmp_path / "b.tif", Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes()))
    assert pixels(read_image(big))[0, :, 1].tolist() == expected
    wide = write(tmp_path / "i.tif", Image.fromarray(values.astype(np.int32)))
    assert pixels(read_image(wide))[0, :, 2].tolist() == expected
    pgm = write(tmp_path / "a.pgm", b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    assert pixels(read_image(pgm))[0, :, 0].tolist() == expected


def test_modes_without_an_8_bit_range_are_refused(tmp_path):
    real = write(tmp_path / "f.tif", Image.fromarray(np.ones((2, 2), np.float32)))
    with pytest.raises(BadImage, match=r"^unsupported mode F$"):
        read_image(real)
    wide = write(tmp_path / "i.tif", Image.fromarray(np.array([[-1, 70000]], np.int32)))
    with pytest.raises(BadImage, match=r"^unsupported mode I \(values -1..70000"):
        read_image(wide)


@pytest.mark.parametrize(
    ("image", "suffix", "colour"),
    [
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "jpg", (255, 0, 0)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "tif", (255, 0, 0)),
        (Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
        (Image.new("L", (4, 4), 77), "bmp", (77, 77, 77)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "ppm", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "bmp", (1, 2, 3)),
    ],
)
def test_other_modes_and_formats(tmp_path, image, suffix, colour):
    found = pixels(read_image(write(tmp_path / f"a.{suffix}", image)))
    assert np.abs(found.astype(int) - colour).max() <= (2 if suffix == "jpg" else 0)


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in [(255, 0, 0), (0, 255, 0)]]
    for suffix, options in [("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tif", {})]:
        file = write(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
        assert pixels(read_image(file))[0, 0].tolist() == [255, 0, 0]


def jpeg(width=64, height=48) -> bytes:
    data = io.BytesIO()
    quadrants(width, height).save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (jpeg()[:-2], "truncated"),
        (jpeg()[:300], "truncated"),
        (bomb(50, 40)[:45], "truncated"),
        (b"I\x01AT".join(bomb(50, 40).rsplit(b"IDAT", 1)), "damaged (broken PNG file (chunk b'I\\x01AT'))"),
        (bomb(12_000, 12_000), "too many pixels (12000x12000 > 89478485)"),
        (bomb(14_000, 14_000)[:200], "too many pixels (over Pillow's limit of 178956970)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_say_why(tmp_path, content, reason):
    assert len(content) < 300_000
    with pytest.raises(BadImage) as error:
        read_image(write(tmp_path / "a.jpg", content))
    assert str(error.value) == reason


def test_the_bomb_costs_no_memory_and_image_size_is_guarded_too(tmp_path):
    file = write(tmp_path / "a.png", bomb(300, 400))
    with pytest.raises(BadImage, match="too many pixels"):
        read_image(file, max_pixels=300 * 400 - 1)
    with pytest.raises(BadImage, match="too many pixels"):
        image_size(file, max_pixels=300 * 400 - 1)
    assert read_image(file, max_pixels=300 * 400).size == image_size(file) == (300, 400)


def test_what_is_no_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in [
        ("pipe.jpg", "not a file"),
        ("none.jpg", "missing"),
        ("", "not a file"),
        ("a.png/b", "missing"),
    ]:
        write(tmp_path / "a.png")
        with pytest.raises(BadImage, match=f"^{reason}$"):
            read_image(str(tmp_path / name))


def test_permission_is_named(tmp_path, monkeypatch):
    """The refusal is injected: to an administrator, as in many containers, nothing is forbidden."""
    file = write(tmp_path / "a.png", quadrants())

    def refuse(*_args, **_named):
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr("xcli.contents.os.open", refuse)
    with pytest.raises(BadImage, match=r"^permission denied$"):
        read_image(file)


def test_pillow_does_not_write_on_the_terminal(tmp_path):
    write(tmp_path / "bomb.png", bomb(10_000, 9_500))  # Pillow warns from 89 megapixels
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    write(tmp_path / "exif.jpg", quadrants(), exif=exif)
    code = (
        "import sys; from xcli.images import *\n"
        "for f in sys.argv[1:]:\n try: read_image(f, max_pixels=10**9).size; image_size(f, max_pixels=10**9)\n"
        " except BadImage: pass"
    )
    files = [str(tmp_path / "bomb.png"), str(tmp_path / "exif.jpg")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_drafted_jpeg_gives_nearly_the_same_input(tmp_path, orientation):
    """Smooth colours: the 1/4 decode differs by little, and no edge moves although 4 does not divide the size."""
    y, x = np.mgrid[:391, :517]
    picture = np.stack([x / 517 * 255, y / 391 * 255, 127 + 120 * np.sin(x / 40)], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    write(tmp_path / "a.jpg", Image.fromarray(picture), quality=95, exif=exif)
    preprocess = Preprocess(resize=48, crop=40)
    plain, drafted = (
        next(
            iter(
                stream(
                    find_images([str(tmp_path)]),
                    [0],
                    preprocess,
                    size=(40, 40),
                    batch_size=1,
                    workers=0,
                    draft=d,
                )
            )
        )
        for d in (False, True)
    )
    assert drafted.geometry == plain.geometry
    difference = drafted.pixels.int() - plain.pixels.int()
    assert 0 < difference.abs().max() <= 6
    assert difference.float().mean((0, 2, 3)).abs().max() < 0.5
    file = str(tmp_path / "a.jpg")
    small = read_image(file, draft_to=(48, 48)).size
    assert sorted(small) == [98, 130]  # 391 / 4 still is twice 48
    assert sorted(read_image(file, draft_to=(150, 150)).size) == [391, 517]
    high = read_image(file, draft_to=(120, 48)).size  # (H, W) of the upright image, not of the stored one
    assert high == ((196, 259) if orientation in (6, 8) else (517, 391))


# ---------------------------------------------------------------- stream


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, each of its own grey, of two shapes; 3 and 7 are broken."""
    for i in range(10):
        image = Image.new("RGB", (40, 30) if i % 2 else (30, 50), (i * 20, i * 20, i * 20))
        write(tmp_path / f"{i}.png", image)
    write(tmp_path / "3.png", b"")
    write(tmp_path / "7.png", b"nonsense")
    return tmp_path


def batches(folder, rows=range(10), preprocess=None, **options) -> list[Batch]:
    settings = {"size": (16, 16), "batch_size": 4, "workers": 2, **options}
    return list(stream(find_images([str(folder)]), rows, preprocess or Preprocess(20, 16), **settings))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_order_is_kept_and_failures_are_named(folder, workers):
    found = batches(folder, workers=workers)
    assert [batch.rows for batch in found] == [[0, 1, 2], [4, 5, 6], [8, 9]]
    assert [batch.failed for batch in found] == [[(3, "empty file")], [(7, "not an image")], []]
    for batch in found:
        assert batch.pixels.shape == (len(batch.rows), 3, 16, 16)
        assert batch.pixels.dtype == torch.uint8
        assert batch.pixels.is_contiguous()
        assert batch.pixels[:, 1, 8, 8].tolist() == [20 * row for row in batch.rows]
        assert [g.original for g in batch.geometry] == [
            (30, 40) if row % 2 else (50, 30) for row in batch.rows
        ]
        assert batch.originals == [None] * len(batch.rows)


def test_any_rows_in_any_order_and_a_batch_without_good_images(folder):
    found = batches(folder, [9, 0, 3, 7], batch_size=2, keep_original=True, pin=True)
    assert [batch.rows for batch in found] == [[9, 0], []]
    assert found[1].pixels.shape == (0, 3, 16, 16)
    assert [image.size for image in found[0].originals] == [(40, 30), (30, 50)]


def test_an_open_size_is_filled_by_the_whole_image(folder):
    (batch,) = batches(folder, [0, 1], Preprocess(resize=20), size=(12, 18))
    assert batch.pixels.shape == (2, 3, 12, 18)
    assert [g.box for g in batch.geometry] == [(0, 0, 50, 30), (0, 0, 30, 40)]
    with pytest.raises(ConfigError, match="contradicts"):
        batches(folder, [0], size=(8, 8))


def test_a_thin_strip_does_not_explode_in_the_resize(tmp_path):
    write(tmp_path / "strip.png", Image.new("L", (20_000, 1)))
    (batch,) = batches(tmp_path, [0], Preprocess(256, 224), size=(224, 224))
    assert batch.failed == [(0, "too many pixels once resized (5120000x256)")]


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("xai-decode")]


def test_closing_early_leaves_no_thread_and_reads_little_ahead(folder, monkeypatch):
    taken = []
    rows = (taken.append(i) or i % 10 for i in range(10**9))
    running = stream(
        find_images([str(folder)]), rows, Preprocess(20, 16), size=(16, 16), batch_size=4, workers=2
    )
    assert len(list(islice(running, 3))) == 3
    assert len(taken) <= 3 * 4 + 4 + 2 * 2 + 1
    assert decoders()
    running.close()
    assert not decoders()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_in_a_worker_ends_the_stream_and_its_threads(folder, monkeypatch, error):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr("xcli.images.decode", fail)
    with pytest.raises(error):
        batches(folder)
    assert not decoders()


def test_memory_stays_flat_over_many_images(folder):
    sources = find_images([str(folder)])
    rows = (i % 3 for i in range(2_000))
    running = stream(sources, rows, Preprocess(20, 16), size=(16, 16), batch_size=16, workers=2)
    list(islice(running, 20))
    tracemalloc.start()
    try:
        seen = sum(len(batch.rows) for batch in running)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == 2_000 - 320
    assert peak < 1_000_000  # 2 000 inputs would be 1.5 MB, their futures and geometries another 2


def test_finding_is_quick(tmp_path):
    """Nothing is opened: 5 000 empty files are listed in a fraction of a second."""
    for i in range(5_000):
        (tmp_path / f"{i}.jpg").touch()
    start = time.perf_counter()
    assert len(find_images([str(tmp_path)])) == 5_000
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------- good files with odd contents


def test_a_film_behind_a_picture_is_no_scan_of_it(tmp_path):
    file = write(tmp_path / "moving.jpg", quadrants(64, 48))
    plain = pixels(read_image(file))
    with Path(file).open("ab") as more:
        more.write(b"\xff\xda\x00\x02" * 500)
    assert (pixels(read_image(file)) == plain).all()


@pytest.mark.parametrize("most", [99, 4095])
def test_a_grey_map_of_any_depth_is_read_pixel_by_pixel(tmp_path, most):
    values = np.arange(500 * 450, dtype=np.uint32).reshape(450, 500) % (most + 1)
    content = b"P5\n500 450\n%d\n" % most + values.astype(">u2" if most > 255 else "u1").tobytes()
    assert read_image(write(tmp_path / "grey.pgm", content)).size == (500, 450)


def test_large_files_are_let_go_good_or_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("xcli.contents.SLACK", 100)
    file = write(tmp_path / "large.png", quadrants(64, 48))
    for _ in range(3):
        read_image(file)
        with pytest.raises(BadImage):
            read_image(write(tmp_path / "bad.png", b"x" * 200))
    assert not LARGE.locked()
