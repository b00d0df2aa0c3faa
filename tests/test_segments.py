"""How pictures are cut into features: grids, superpixels, label maps from files and Python, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import segmentation
from toys import PooledLinear, bound, images, made

from xcli import segments
from xcli.errors import ConfigError
from xcli.registry import build
from xcli.segments import grid, label_map, segmented

KINDS = ("grid:4", "slic:12", "quickshift:2", "felzenszwalb:30")
SPOTS = np.random.default_rng(0).integers(0, 6, (12, 10))
"""A label map whose labels are 0 to 5."""


def smooth(count=3, height=24, width=20, channels=3):
    """Pictures with regions, as superpixels need them."""
    coarse = images(count, channels, 5, 4)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")


def score_of(x, **pictures):
    net = made(PooledLinear)
    return replace(
        bound(net, images(1, 3, 8, 8), [0]), keys=[f"{i}" for i in range(len(x))], pictures=pictures
    )


def cut(spec, x, **pictures):
    return segmented(score_of(x, **pictures), x, spec)


def same_regions(found, expected):
    """Whether two label maps cut a picture alike, whatever their numbers; those of ``found`` are in order."""
    pairs = torch.stack([found.flatten(), torch.as_tensor(expected).long().flatten()]).unique(dim=1)
    return pairs[0].tolist() == list(range(len(pairs[0]))) and (pairs[1].diff() > 0).all()


# ---- what all kinds promise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [*KINDS, "spots.png", "spots.npy", "given:one", "given:each"])
def test_labels_are_whole_numbers_from_zero_without_gaps(spec, dtype, tmp_path):
    Image.fromarray(SPOTS.astype(np.uint8) * 50).save(tmp_path / "spots.png")
    np.save(tmp_path / "spots.npy", SPOTS * 50 - 100)
    each = torch.from_numpy(np.random.default_rng(1).integers(-9, 9, (3, 1, 24, 20)) * 7)
    each[1] = 5
    x = smooth().to(dtype)
    labels, count = cut(
        str(tmp_path / spec) if spec.startswith("spots") else spec, x, one=each[:1], each=each
    )
    assert labels.shape == (3, 24, 20)
    assert labels.dtype == count.dtype == torch.int64
    assert labels.device == x.device
    assert count.device.type == "cpu"
    for own, features in zip(labels, count.tolist()):
        assert own.unique().tolist() == list(range(features))
    assert count.max() > 1
    if spec in ("slic:12", "quickshift:2", "felzenszwalb:30", "given:each"):
        assert len(set(count.tolist())) > 1
    assert torch.equal(
        cut(str(tmp_path / spec) if spec.startswith("spots") else spec, x, one=each[:1], each=each)[0], labels
    )


@pytest.mark.parametrize("spec", KINDS)
def test_the_features_of_an_image_do_not_depend_on_its_company(spec):
    x = smooth()
    labels, count = cut(spec, x)
    for image in range(3):
        alone, own = cut(spec, x[image : image + 1])
        assert torch.equal(alone[0], labels[image])
        assert own.tolist() == [count[image]]


def test_a_picture_is_cut_once_for_all_that_ask(monkeypatch):
    x, calls = smooth(), []
    plain = segments.superpixels
    monkeypatch.setattr(segments, "superpixels", lambda *given: calls.append(given[1:]) or plain(*given))
    score = score_of(x)
    first = segmented(score, x, "slic:12")
    assert segmented(score, x, "slic:12")[0] is first[0]
    segmented(score, x, "slic:5")
    segmented(score, x.clone(), "slic:12")
    assert calls == [("slic", 12.0)] * 3 + [("slic", 5.0)] * 3 + [("slic", 12.0)] * 3


# ---- grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (13, 9), (16, 5), (3, 31), (224, 224)])
@pytest.mark.parametrize("cells", [1, 2, 3, 7, 14])
def test_cells_of_a_grid_are_rectangles_as_equal_as_pixels_allow_row_by_row(size, cells):
    labels, (down, right) = grid(size, cells), (min(cells, side) for side in size)
    assert labels.unique().tolist() == list(range(down * right))
    heights, widths = [], []
    for row in range(down):
        for column in range(right):
            where = (labels == row * right + column).nonzero()
            low, high = where.amin(0), where.amax(0)
            assert len(where) == (high - low + 1).prod()  # a full rectangle
            heights.append(int(high[0] - low[0]) + 1)
            widths.append(int(high[1] - low[1]) + 1)
    for sides, length, number in ((heights, size[0], down), (widths, size[1], right)):
        assert set(sides) <= {length // number, -(-length // number)}
    assert labels[0, 0] == 0
    assert labels[-1, -1] == down * right - 1
    assert (labels.diff(dim=0) >= 0).all()
    assert (labels.diff(dim=1) >= 0).all()


def test_a_grid_finer_than_the_picture_has_a_cell_a_pixel():
    x = images(2, 3, 3, 5)
    labels, count = cut("grid:99", x)
    assert torch.equal(labels[1], torch.arange(15).view(3, 5))
    assert count.tolist() == [15, 15]


# ---- superpixels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_superpixels_are_those_of_scikit_image_on_the_picture_from_0_to_1(scale):
    x = scale * smooth() - 3
    found = {spec: cut(spec, x)[0] for spec in KINDS[1:]}
    for i, image in enumerate(x):
        shown = ((image - image.min()) / (image.max() - image.min())).permute(1, 2, 0).numpy()
        assert same_regions(found["slic:12"][i], segmentation.slic(shown, n_segments=12, compactness=10))
        expected = segmentation.quickshift(shown, kernel_size=2, max_dist=200, ratio=0.2, rng=0)
        assert same_regions(found["quickshift:2"][i], expected)
        assert same_regions(found["felzenszwalb:30"][i], segmentation.felzenszwalb(shown, scale=30))


@pytest.mark.filterwarnings("ignore:Got image with third dimension")
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("spec", KINDS)
def test_pictures_of_other_than_three_colours_are_cut_too(spec, channels):
    labels, count = cut(spec, smooth(2, channels=channels))
    assert labels.shape == (2, 24, 20)
    assert count.max() > 1


@pytest.mark.parametrize("spec", KINDS)
def test_a_picture_of_one_colour_is_cut(spec):
    labels, count = cut(spec, torch.full((1, 3, 24, 20), 0.3, dtype=torch.float64))
    assert labels.unique().tolist() == list(range(int(count)))


# ---- label maps in files ------------------------------------------------------------------------------------------


def palette(path):
    picture = Image.fromarray(SPOTS.astype(np.uint8))
    picture.putpalette([5, 5, 5] * 256)  # all of one colour: the numbers count
    picture.save(path)


COLOURS = np.array([[9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 9, 0], [0, 0, 0], [9, 9, 9]], dtype=np.uint8)
WRITERS = {
    "palette.png": palette,
    "grey.png": lambda path: Image.fromarray((40 * SPOTS).astype(np.uint8)).save(path),
    "deep.png": lambda path: Image.fromarray((9000 * SPOTS).astype(np.uint16)).save(path),
    "colours.png": lambda path: Image.fromarray(COLOURS[SPOTS]).save(path),
    "clear.png": lambda path: Image.fromarray(
        np.concatenate([COLOURS[SPOTS // 2], 9 * (SPOTS[..., None] % 2)], 2).astype(np.uint8)
    ).save(path),
    "LOUD.PNG": lambda path: Image.fromarray(SPOTS.astype(np.uint8)).save(path),
    "whole.npy": lambda path: np.save(path, SPOTS.astype(np.int64) * 10**12 - 5),
    "bytes.npy": lambda path: np.save(path, SPOTS.astype(np.uint8)),
    "turned.npy": lambda path: np.save(path, np.asfortranarray(SPOTS).astype(">i4")),
    "colours.npy": lambda path: np.save(path, COLOURS[SPOTS]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_every_kind_cut_alike(name, tmp_path):
    WRITERS[name](tmp_path / name)
    found = label_map(str(tmp_path / name), SPOTS.shape)
    assert found.unique().tolist() == list(range(6))
    pairs = torch.stack([found.flatten(), torch.from_numpy(SPOTS).flatten()]).unique(dim=1)
    assert pairs.shape[1] == 6
    if "colours" not in name and name != "clear.png":
        assert torch.equal(found, torch.from_numpy(SPOTS))  # in the order of the numbers
    labels, count = cut(str(tmp_path / name), images(2, 3, *SPOTS.shape))
    assert torch.equal(labels, found.expand(2, -1, -1))
    assert count.tolist() == [6, 6]


def test_black_and_white_is_two_features(tmp_path):
    Image.fromarray(SPOTS > 2).save(tmp_path / "two.png")
    np.save(tmp_path / "two.npy", SPOTS > 2)
    for name in ("two.png", "two.npy"):
        assert torch.equal(label_map(str(tmp_path / name), SPOTS.shape), torch.from_numpy(SPOTS > 2).long())


@pytest.mark.parametrize("size", [(24, 20), (6, 5), (36, 10), (17, 23), (1, 1), (5, 31)])
def test_a_map_of_another_size_is_brought_to_the_picture_by_its_nearest_pixels(size, tmp_path):
    np.save(tmp_path / "spots.npy", np.arange(120).reshape(12, 10))
    found = label_map(str(tmp_path / "spots.npy"), size)
    expected = [
        [(r * 12 // size[0]) * 10 + c * 10 // size[1] for c in range(size[1])] for r in range(size[0])
    ]
    kept = sorted({one for row in expected for one in row})
    assert found.tolist() == [[kept.index(one) for one in row] for row in expected]
    assert found.unique().tolist() == list(range(len(kept)))  # labels that fell away leave no gap


def archive(path):
    with path.open("wb") as file:
        np.savez(file, a=SPOTS)


BROKEN = {
    "none.png": lambda path: None,
    "none.npy": lambda path: None,
    "empty.png": lambda path: path.touch(),
    "empty.npy": lambda path: path.touch(),
    "folder.png": lambda path: path.mkdir(),
    "folder.npy": lambda path: path.mkdir(),
    "text.png": lambda path: path.write_text("a label map"),
    "text.npy": lambda path: path.write_text("a label map"),
    "zip.npy": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
    "archive.npy": archive,
    "objects.npy": lambda path: np.save(path, np.array([[None, 1]]), allow_pickle=True),
    "floats.npy": lambda path: np.save(path, SPOTS / 2),
    "colours.npy": lambda path: np.save(path, COLOURS[SPOTS] / 2),
    "texts.npy": lambda path: np.save(path, np.array([["a", "b"]])),
    "line.npy": lambda path: np.save(path, SPOTS[0]),
    "number.npy": lambda path: np.save(path, SPOTS[0, 0]),
    "stack.npy": lambda path: np.save(path, SPOTS[None, None]),
    "nothing.npy": lambda path: np.save(path, SPOTS[:0]),
    "colourless.npy": lambda path: np.save(path, SPOTS[..., None][..., :0]),
    "bomb.png": lambda path: Image.new("1", (100, 99)).save(path),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_label_map_is_named_with_what_is_wrong(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    BROKEN[name](tmp_path / name)
    with pytest.raises(
        ConfigError,
        match=f"segments: .*{name} (cannot be read as a label map: .+|holds .* not whole numbers)",
    ):
        cut(str(tmp_path / name), smooth())


@pytest.mark.parametrize("name", ["grey.png", "colours.png", "bytes.npy"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(name, tmp_path):
    WRITERS[name](tmp_path / name)
    whole, draw, refused = (tmp_path / name).read_bytes(), random.Random(0), 0
    for attempt in range(200):
        data = bytearray(whole[: draw.randrange(len(whole))] if attempt % 2 else whole)
        for _ in range(draw.randrange(1, 4)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / name).write_bytes(data)
        try:
            assert label_map(str(tmp_path / name), (12, 10)).shape == (12, 10)
        except ConfigError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), OSError("truncated"), ValueError("odd")])
def test_whatever_the_reader_of_pictures_raises_is_a_refusal(error, tmp_path, monkeypatch):
    """Which depends on where the file breaks."""
    WRITERS["grey.png"](tmp_path / "a.png")

    def fail(_picture):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ConfigError, match=f"a.png cannot be read as a label map: {error}"):
        label_map(str(tmp_path / "a.png"), (12, 10))


# ---- label maps from Python ---------------------------------------------------------------------------------------


def test_one_map_serves_all_images_and_several_are_one_each():
    x, given = images(3, 3, 12, 10), torch.from_numpy(SPOTS)
    each = torch.stack([given, given.flip(0), given // 3])[:, None] * 11 - 4
    labels, count = cut("given:parts", x, parts=each)
    assert torch.equal(labels, torch.stack([given, given.flip(0), given // 3]))
    assert count.tolist() == [6, 6, 2]
    labels, count = cut("given:parts", x, parts=each[2:])
    assert torch.equal(labels, (given // 3).expand(3, -1, -1))
    assert count.tolist() == [2, 2, 2]
    floats = cut("given:parts", x, parts=each.double())[0]
    assert torch.equal(floats[0], given)


@pytest.mark.parametrize("shape", [(2, 1, 12, 10), (3, 3, 12, 10), (1, 1, 10, 12), (3, 1, 24, 20)])
def test_maps_of_another_shape_are_refused_with_the_shape_that_fits(shape):
    x = images(3, 3, 12, 10)
    with pytest.raises(
        ConfigError, match=r"label maps are \(.*have to be \(1, 1, 12, 10\), or one for each of the 3"
    ):
        cut("given:parts", x, parts=torch.zeros(shape))
    with pytest.raises(ConfigError, match=r"'other' stands for pictures that were not handed over"):
        cut("given:other", x, parts=torch.zeros(shape))


# ---- what can be asked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "grid:1",
            "grid:7",
            "slic:50",
            "quickshift:4",
            "quickshift:1",
            "quickshift:2.5",
            "felzenszwalb:100",
        ),
        *("felzenszwalb:0.5", "a/parts.png", "PARTS.NPY", "given:parts", "given:parts.png", "grid:7.png"),
        "slic:a.npy",
    ],
)
def test_specs_that_are_known(spec):
    assert build({"name": "feature-ablation", "segments": spec}).segments == spec


def test_a_file_is_a_file_whatever_its_name_begins_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = images(1, 3, *SPOTS.shape)
    for name in ("grid:7.npy", "slic:a.npy"):
        np.save(name, SPOTS)
        assert torch.equal(cut(name, x)[0][0], torch.from_numpy(SPOTS))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "grid:7, slic:50, quickshift:4, felzenszwalb:100, or a label map"),
        ("gird:7", "grid:7, slic:50, quickshift:4, felzenszwalb:100, or a label map"),
        ("parts.jpg", r"or a label map \(.png, .npy\)"),
        ("given:", "or a label map"),
        ("grid", "grid: needs .* number .*behind it, such as grid:7"),
        ("grid:", "grid: needs .* number .*behind it, such as grid:7"),
        ("grid:0", "grid: needs .* number .*behind it"),
        ("grid:-3", "grid: needs .* number .*behind it"),
        ("grid:2.5", "grid: needs .* number .*behind it"),
        ("slic:many", "slic: needs .* number .*behind it"),
        ("slic:0", "slic: needs .* number .*behind it"),
        ("slic:1000000", "slic: needs .* number .*behind it"),
        ("quickshift:0", "quickshift: needs .* number .*behind it"),
        ("quickshift:0.5", "quickshift: needs .* number .*behind it"),
        ("quickshift:nan", "quickshift: needs .* number .*behind it"),
        ("felzenszwalb:inf", "felzenszwalb: needs a positive number behind it"),
        ("felzenszwalb:0", "felzenszwalb: needs a positive number behind it"),
        (7, "Input should be a valid string"),
    ],
)
def test_specs_that_are_not_say_what_would_be(spec, message):
    with pytest.raises(ConfigError, match=f"^feature-ablation: segments: .*{message}"):
        build({"name": "feature-ablation", "segments": spec})


def test_without_scikit_image_superpixels_are_refused_and_the_rest_works(monkeypatch):
    monkeypatch.setattr(segments, "find_spec", lambda name: None if name == "skimage" else 1)
    for kind in ("slic:50", "quickshift:4", "felzenszwalb:100"):
        with pytest.raises(ConfigError, match=r"needs scikit-image: pip install 'xcli\[segments\]'"):
            build({"name": "feature-ablation", "segments": kind})
    for spec in ("grid:7", "parts.png", "given:parts"):
        assert build({"name": "feature-ablation", "segments": spec}).segments == spec
