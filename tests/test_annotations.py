"""Ground truth on disk, brought to the grid of the input: every format, every geometry, damaged files."""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw

from xcli.annotations import Annotations, TruthSpec, truth
from xcli.demo.nets import CATEGORIES
from xcli.errors import ConfigError, InputError
from xcli.inputs import Source, find_images
from xcli.preprocess import Geometry, Preprocess
from xcli.readers.coco import inflated
from xcli.readers.grid import Grid
from xcli.readers.masks import read_indices
from xcli.readers.voc import read_voc

SAMPLES = Path(__file__).parents[1] / "sample_images"
CLASSES = ("cat", "dog", "bird")
SIZE = (40, 60)  # (H, W) of the pictures made here
PLAIN = Geometry(1, 1, 0, 0, SIZE, SIZE)


def source(path, folder="images"):
    return Source(path, f"{folder}/{path}", 1, 0, None)


def opened(path, sources, categories=CLASSES, **spec):
    return Annotations.open(TruthSpec(str(path), **spec), sources, categories)


def geometry_of(preprocess, size=SIZE):
    return preprocess.apply(Image.new("RGB", size[::-1]))[1]


def box_mask(left, top, right, bottom, size=SIZE):
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def one(annotations, shown, label, geometry=PLAIN):
    """The mask of one class, and whether it is known."""
    masks, known = annotations.of(shown, geometry, [label])
    assert masks.shape == (1, *geometry.input)
    assert masks.dtype == bool
    return masks[0], bool(known[0])


# ---- the geometry --------------------------------------------------------------------------------------------------

GEOMETRIES = {
    "plain": PLAIN,
    "shrunk": geometry_of(Preprocess(resize=(20, 30))),
    "grown and cropped": geometry_of(Preprocess(resize=80, crop=64)),
    "cropped": geometry_of(Preprocess(crop=(30, 20))),
    "padded by the crop": geometry_of(Preprocess(crop=(50, 90))),
    "letterbox": geometry_of(Preprocess(crop=(64, 64), letterbox=True)),
    "uneven": geometry_of(Preprocess(resize=(33, 47))),
}


def slow(geometry, contains):
    """The truth pixel by pixel: is the centre, in the original, in the picture and in the object?"""
    found = np.zeros(geometry.input, dtype=bool)
    (height, width), (rows, columns) = geometry.original, geometry.input
    for i in range(rows):
        for j in range(columns):
            y = geometry.scale_y * (i + 0.5) + geometry.offset_y
            x = geometry.scale_x * (j + 0.5) + geometry.offset_x
            found[i, j] = 0 <= y < height and 0 <= x < width and contains(y, x)
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(
    "box", [(10, 5, 31, 22), (0, 0, 60, 40), (-5, -5, 8, 100), (50.5, 30.25, 58, 39.5), (70, 5, 80, 9)]
)
def test_boxes_polygons_and_masks_land_where_they_should(geometry, box):
    left, top, right, bottom = box
    expected = slow(geometry, lambda y, x: top <= y < bottom and left <= x < right)
    grid = Grid.of(geometry)
    assert np.array_equal(grid.box(box), expected)
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=float)
    assert np.array_equal(grid.polygon(corners), expected)
    assert np.array_equal(grid.polygon(corners[::-1]), expected)
    picture = np.random.default_rng(0).random(SIZE) < 0.3
    expected = slow(geometry, lambda y, x: picture[int(y), int(x)])
    assert 0 < expected.sum() < expected.size
    assert np.array_equal(grid.raster(picture), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_annotations_of_a_scaled_picture_land_in_the_same_place(geometry):
    """Masks often come at another resolution than the image."""
    large, grid = box_mask(20, 10, 62, 44, (80, 120)), Grid.of(geometry)
    assert np.array_equal(grid.on((80, 120), "big.png").raster(large), grid.box((10, 5, 31, 22)))
    assert np.array_equal(grid.on((80, 120), "big.png").box((20, 10, 62, 44)), grid.box((10, 5, 31, 22)))


@pytest.mark.parametrize("size", [(60, 40), (40, 64), (44, 60), (0, 60), (1, 2000)])
def test_a_picture_of_other_proportions_is_refused(size):
    with pytest.raises(InputError, match=r"m\.png: made for an image of \d+x\d+ pixels; the image has 60x40"):
        Grid.of(PLAIN).on(size, "m.png")


@pytest.mark.parametrize("size", [(20, 30), (400, 600), (13, 20), (14, 20), (67, 100)])
def test_rounded_proportions_are_taken(size):
    assert Grid.of(PLAIN).on(size, "m.png").size == size


def test_the_truth_agrees_with_the_picture_that_the_model_sees():
    """A box painted into the picture and taken through the same preprocessing covers its truth."""
    picture = Image.new("RGB", (300, 200))
    ImageDraw.Draw(picture).rectangle((60, 40, 149, 119), fill=(255, 255, 255))
    for preprocess in (
        Preprocess(resize=100, crop=90),
        Preprocess(crop=(128, 128), letterbox=True),
        Preprocess(resize=(77, 55)),
    ):
        pixels, geometry = preprocess.apply(picture)
        seen = pixels[..., 0] > 127
        mask = Grid.of(geometry).box((60, 40, 150, 120))
        assert seen.any()
        assert (seen ^ mask).mean() < 0.01


def test_a_polygon_is_its_inside_by_the_even_odd_rule():
    star = np.array([[30, 2], [42, 38], [10, 15], [50, 15], [18, 38]], dtype=float)
    grid = Grid.of(PLAIN)
    centre, arm, outside = (17 + 4, 30), (8, 30), (3, 10)
    found = grid.polygon(star)
    assert (found[centre], found[arm], found[outside]) == (False, True, False)
    triangle = np.array([[5, 5], [45, 5], [5, 35]], dtype=float)
    assert grid.polygon(triangle).sum() == pytest.approx(40 * 30 / 2, rel=0.03)
    grid = Grid.of(GEOMETRIES["grown and cropped"])
    centres = np.stack(np.meshgrid(grid.x, grid.y), -1).reshape(-1, 2)
    for seed in range(20):
        draw = np.random.default_rng(seed)
        turn = np.sort(draw.uniform(0, 2 * np.pi, draw.integers(3, 15)))
        reach = draw.uniform(5, 60, len(turn))
        corners = np.stack([30 + reach * np.cos(turn), 20 + reach * np.sin(turn)], -1)
        inside = Outline(corners).contains_points(centres).reshape(grid.inside.shape)
        assert np.array_equal(grid.polygon(corners), inside & grid.inside)


# ---- masks ---------------------------------------------------------------------------------------------------------


def samples():
    return find_images([str(SAMPLES / "scenes")])


def test_the_sample_masks_cover_the_shapes_of_every_scene():
    sources = samples()
    annotations = opened(SAMPLES / "masks", sources, CATEGORIES)
    assert annotations.matched == len(sources) == 24
    for shown in sources:
        names = Path(shown.path).stem.split("-")[:-1]
        classes = [CATEGORIES.index(name) for name in names]
        with Image.open(shown.file) as image:
            pixels, geometry = Preprocess(resize=(96, 96)).apply(image.convert("RGB"))
        masks, known = annotations.of(shown, geometry, [*classes, CATEGORIES.index("flower")])
        assert known.tolist() == [*[True] * len(names), "flower" in names]
        with Image.open(SAMPLES / "masks" / Path(shown.path).with_suffix(".png")) as stored:
            whole = np.asarray(stored)
        for mask, label in zip(masks, classes):
            assert mask.mean() == pytest.approx((whole == label + 1).mean(), abs=0.01)
            inside = pixels[mask].astype(float)
            beside = np.roll(mask, 12, 0) & ~masks.any(0)
            assert np.abs(inside.mean(0) - pixels[beside].mean(0)).max() > 10, "the mask is on something else"


def test_sample_truth_reaches_the_highest_pixels_of_a_perfect_map():
    from xcli.metrics.localisation import LocalisationAUC, PointingGame

    sources = samples()[-6:]
    annotations = opened(SAMPLES / "masks", sources, CATEGORIES)
    geometry = geometry_of(Preprocess(resize=(64, 64)), (256, 256))
    classes = [CATEGORIES.index(Path(shown.path).stem.split("-")[0]) for shown in sources]
    found = truth(
        annotations, sources, [geometry] * 6, torch.arange(6), torch.tensor(classes), (64, 64), "cpu"
    )
    assert found.known.all()
    assert found.pixel.tolist() == [[4.0, 4.0]] * 6
    assert PointingGame().measure(found.mask.double(), found).values.tolist() == [1] * 6
    assert LocalisationAUC().measure(found.mask.double(), found).values.tolist() == [1] * 6


def saved(folder, name, values, mode="P"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if mode == "P":
        picture.putpalette([200, 30, 30] * 256)
    else:
        picture = picture.convert(mode)
    picture.save(file)
    return file


@pytest.mark.parametrize("mode", ["P", "L"])
def test_what_pixel_values_mean(tmp_path, mode):
    picture = np.zeros(SIZE, dtype=np.uint8)
    picture[:10, :10], picture[20:30, :5], picture[0, 50] = 1, 2, 255
    saved(tmp_path, "a.png", picture, mode)
    shown = source("a.jpg")
    by = {
        values: opened(tmp_path, [shown], values=values) for values in ("class-plus-one", "class", "object")
    }
    for label in range(2):
        mask, known = one(by["class-plus-one"], shown, label)
        assert known
        assert np.array_equal(mask, picture == label + 1)
        assert np.array_equal(one(by["class"], shown, label)[0], picture == label)
    assert one(by["class-plus-one"], shown, 2) == (pytest.approx(np.zeros(SIZE)), False)
    assert not one(by["class"], shown, 255)[1], "255 is void"
    for label in (0, 2, 700):
        assert np.array_equal(one(by["object"], shown, label)[0], picture != 0)
    saved(tmp_path, "a.png", picture * 0, mode)
    assert not one(by["object"], shown, 0)[1]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3])
def test_class_numbers_survive_every_bit_depth(tmp_path, bits, colour):
    """Pillow spreads grey pixels of 2 and 4 bits over 0..255; palette entries it does not."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    values = [0, 1, 1, 0, 1, 0, 0, 0] if bits == 1 else [0, 1, 2, 3] if bits == 2 else [0, 1, 7, 12]
    row = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(len(values) * bits // 8, "big")
    head = len(values).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    palette = chunk(b"PLTE", bytes(range(48)) if bits > 1 else bytes(6)) if colour == 3 else b""
    data = chunk(b"IHDR", head) + palette + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    file = tmp_path / "m.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert read_indices(str(file)).astype(int).tolist() == [values]


def test_wide_masks_have_no_void(tmp_path):
    Image.fromarray(np.full(SIZE, 255, dtype=np.uint16)).save(tmp_path / "a.png")
    assert one(opened(tmp_path, [source("a.jpg")], values="class"), source("a.jpg"), 255)[1]


def test_coloured_pictures_are_masks_of_the_object_alone(tmp_path):
    picture = np.zeros((*SIZE, 3), dtype=np.uint8)
    picture[5:9, 5:9] = (0, 200, 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    shown = source("a.jpg")
    assert np.array_equal(one(opened(tmp_path, [shown], values="object"), shown, 0)[0], box_mask(5, 5, 9, 9))
    with pytest.raises(
        InputError, match=r"a\.png: a mask holds class numbers in palette or grey pixels; this one is RGB"
    ):
        one(opened(tmp_path, [shown]), shown, 0)


def test_a_class_that_was_cropped_away_is_known_and_empty(tmp_path):
    saved(tmp_path, "a.png", box_mask(0, 0, 4, 4))
    mask, known = one(opened(tmp_path, [source("a.jpg")]), source("a.jpg"), 0, GEOMETRIES["cropped"])
    assert known
    assert not mask.any()


def test_a_missing_mask_is_unknown(tmp_path):
    saved(tmp_path, "one/a.png", box_mask(0, 0, 4, 4))
    sources = [source("one/a.jpg"), source("two/a.jpg"), source("one/b.jpg")]
    annotations = opened(tmp_path, sources)
    assert [one(annotations, shown, 0)[1] for shown in sources] == [True, False, False]
    assert annotations.matched == 1


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        (["one/a.jpg", "two/a.jpg"], ["one/a", "two/a"], ["one/a", "two/a"]),
        (["scenes/one/a.jpg", "photos/b.jpg"], ["one/a", "b"], ["one/a", "b"]),  # several inputs
        (["a.jpg"], ["one/a", "two/b"], ["one/a"]),  # a single file as input
        (["a.jpg"], ["one/a", "two/a"], [None]),  # which one?
        (["two/a.jpg"], ["one/a"], [None]),  # another image's
        (["a.jpg", "a.png"], ["a"], ["a", "a"]),
        (["a.jpg", "thumbs/a.jpg"], ["a"], ["a", None]),  # taken by its own image
        (["x.y.jpg"], ["x.y", "x"], ["x.y"]),
    ],
)
def test_which_mask_belongs_to_which_image(tmp_path, images, masks, expected):
    for number, name in enumerate([*masks, "other/other"]):
        saved(tmp_path, f"{name}.png", np.full(SIZE, number + 1))
    sources = [source(path) for path in [*images, "other/other.jpg"]]
    annotations = opened(tmp_path, sources)
    for shown, name in zip(sources, expected):
        known = [one(annotations, shown, label)[1] for label in range(len(masks))]
        assert known == [mask == name for mask in masks]


def test_a_mask_that_fits_two_images_is_refused(tmp_path):
    saved(tmp_path, "a.png", box_mask(0, 0, 4, 4))
    with pytest.raises(
        ConfigError, match=r"'a' fits both images 'one/a\.jpg' and 'two/a\.jpg'; keep annotations"
    ):
        opened(tmp_path, [source("one/a.jpg"), source("two/a.jpg")])


# ---- VOC -----------------------------------------------------------------------------------------------------------


def voc(folder, name, *objects, size=SIZE, text=None):
    items = "".join(
        f"<object><name>{label}</name><difficult>{int(difficult)}</difficult><part><name>head</name>"
        "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
        f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2), difficult in objects
    )
    shape = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>" if size else ""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text if text is not None else f"<annotation>{shape}{items}</annotation>")


@pytest.fixture
def voc_folder(tmp_path):
    boxes = [("Dog", (11, 6, 30, 20), False), ("dog", (41, 1, 60, 40), True), ("person", (1, 1, 5, 5), False)]
    voc(tmp_path, "Annotations/000001.xml", *boxes)
    voc(tmp_path, "Annotations/000002.xml", ("cat", (1, 1, 1, 1), True))
    voc(tmp_path, "Annotations/000003.xml")
    return tmp_path / "Annotations"


VOC_SOURCES = [source(f"JPEGImages/00000{number}.jpg") for number in (1, 2, 3, 4)]


def test_voc_boxes_count_pixels_from_one_and_end_inclusive(voc_folder):
    annotations = opened(voc_folder, VOC_SOURCES, difficult="leave-out")
    assert annotations.matched == 3
    mask, known = one(annotations, VOC_SOURCES[0], 1)
    assert known
    assert np.array_equal(mask, box_mask(10, 5, 30, 20))
    masks, known = annotations.of(VOC_SOURCES[0], PLAIN, [1, 0, 2])
    assert known.tolist() == [True, False, False]
    assert masks.any((1, 2)).tolist() == [True, False, False]


def test_difficult_objects_count_with_others_or_always_or_never(voc_folder):
    usual = opened(voc_folder, VOC_SOURCES)
    every = opened(voc_folder, VOC_SOURCES, difficult="count")
    easy = opened(voc_folder, VOC_SOURCES, difficult="leave-out")
    both = box_mask(10, 5, 30, 20) | box_mask(40, 0, 60, 40)
    assert np.array_equal(one(usual, VOC_SOURCES[0], 1)[0], both), "the class has an easy object beside it"
    assert np.array_equal(one(every, VOC_SOURCES[0], 1)[0], both)
    assert np.array_equal(one(easy, VOC_SOURCES[0], 1)[0], box_mask(10, 5, 30, 20))
    assert not one(usual, VOC_SOURCES[1], 0)[1], "all of them are difficult"
    assert not one(easy, VOC_SOURCES[1], 0)[1]
    mask, known = one(every, VOC_SOURCES[1], 0)
    assert known
    assert np.array_equal(mask, box_mask(0, 0, 1, 1))
    assert not one(every, VOC_SOURCES[2], 0)[1]
    assert not one(every, VOC_SOURCES[3], 0)[1]


def test_voc_objects_of_any_class(voc_folder):
    annotations = opened(voc_folder, VOC_SOURCES, categories=("x",), values="object", difficult="leave-out")
    assert np.array_equal(
        one(annotations, VOC_SOURCES[0], 7)[0], box_mask(10, 5, 30, 20) | box_mask(0, 0, 5, 5)
    )


def test_voc_boxes_through_a_crop_and_at_another_size(voc_folder):
    annotations = opened(voc_folder, VOC_SOURCES, difficult="leave-out")
    geometry = GEOMETRIES["letterbox"]
    expected = slow(geometry, lambda y, x: 5 <= y < 20 and 10 <= x < 30)
    assert np.array_equal(one(annotations, VOC_SOURCES[0], 1, geometry)[0], expected)
    doubled = Geometry(1, 1, 0, 0, (80, 120), (80, 120))
    assert np.array_equal(
        one(annotations, VOC_SOURCES[0], 1, doubled)[0], box_mask(20, 10, 60, 40, (80, 120))
    )


BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'
    "<annotation><object><name>&b;</name></object></annotation>"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no element found"),
        ("<annotation><object>", "no element found"),
        ("<html/>", "its root is <html>"),
        (BOMB, "declares a document type"),
        (BOMB.encode("utf-16").decode("latin-1"), "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation><object><name>dog</name></object></annotation>", "an object 'dog' lacks"),
        (
            "<annotation><object><name>dog</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax>"
            "</bndbox></object></annotation>",
            "an object 'dog' lacks",
        ),
        (
            "<annotation><object><name>dog</name><bndbox><xmin>a</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax>"
            "</bndbox></object></annotation>",
            "could not convert",
        ),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', "encoding"),
    ],
)
def test_damaged_voc_files_are_the_fault_of_their_image(voc_folder, text, reason):
    (voc_folder / "000001.xml").write_bytes(text.encode("latin-1"))
    annotations = opened(voc_folder, VOC_SOURCES)  # the other file has a cat
    assert one(annotations, VOC_SOURCES[1], 0)[1] is False
    with pytest.raises(InputError, match=f"000001.xml: not a readable VOC annotation .*{reason}"):
        annotations.of(VOC_SOURCES[0], PLAIN, [1])


def test_a_voc_file_of_another_picture_is_refused(voc_folder):
    with pytest.raises(
        InputError, match=r"000001\.xml: made for an image of 60x40 pixels; the image has 40x60"
    ):
        one(opened(voc_folder, VOC_SOURCES), VOC_SOURCES[0], 1, Geometry(1, 1, 0, 0, (60, 40), (60, 40)))


def test_voc_sizes_of_zero_are_taken_for_none(tmp_path):
    voc(tmp_path, "a.xml", ("dog", (1, 1, 2, 2), False), size=(0, 0))
    assert read_voc(str(tmp_path / "a.xml"))[0] is None


# ---- COCO ----------------------------------------------------------------------------------------------------------

RUNS = box_mask(1, 2, 5, 7, (9, 7))  # then a hole and a dot
RUNS[3, 3], RUNS[8, 6] = False, True
PRESSED = ";5400LM232?L"  # as pycocotools writes it
ELLIPSE = (  # of pycocotools too; its numbers take several characters, and differences have both signs
    "cS13T12N2N2O0O2O000O2O0O2O00000O2O00000O2O0000000O2O0000000O2O000000000O2O0000000000000O2O0000000000000O2O0000"
    "000000000000000O2O000000000000000000000000000O2O0000000000000000000000000000000000000000000O2O0000000000000000"
    "0000000000000000000000000000000000000000000000000000000000000000000000000001N1000000000000000000000000000000000"
    "00000000001N10000000000000000000000000001N100000000000000000001N100000000000001N100000000000001N10000000001N10"
    "0000001N100000001N1000001N1000001N101N10001N101N2N2NVQ1"
)


def coco(file, annotations, images=None, names=CLASSES, size=SIZE):
    """A COCO file with category ids that are no indices."""
    shape = {"height": size[0], "width": size[1]} if size else {}
    images = images or ["a.jpg"]
    content = {
        "images": [{"id": 100 + i, "file_name": name, **shape} for i, name in enumerate(images)],
        "annotations": [{"id": i, "image_id": 100, **one} for i, one in enumerate(annotations)],
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(names)],
    }
    file.write_text(json.dumps(content))
    return file


def runs_of(mask):
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    return np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"bbox": [10, 5, 20, 15]}, box_mask(10, 5, 30, 20)),
        ({"bbox": [0, 0, 1, 1], "segmentation": [[10, 5, 30, 5, 30, 20, 10, 20]]}, box_mask(10, 5, 30, 20)),
        ({"bbox": [10, 5, 20, 15], "segmentation": []}, box_mask(10, 5, 30, 20)),
        (
            {"segmentation": [[10, 5, 30, 5, 30, 20, 10, 20], [25, 10, 50, 10, 50, 30, 25, 30]]},
            box_mask(10, 5, 30, 20) | box_mask(25, 10, 50, 30),
        ),
        (
            {"iscrowd": 1, "segmentation": {"size": list(SIZE), "counts": runs_of(box_mask(3, 4, 9, 30))}},
            box_mask(3, 4, 9, 30),
        ),
        ({"bbox": [10.5, 5.4, 2, 2]}, box_mask(10, 5, 12, 7)),
    ],
)
def test_coco_shapes(tmp_path, shape, expected):
    file = coco(tmp_path / "c.json", [{"category_id": 20, **shape}])
    annotations = opened(file, [source("a.jpg")])
    mask, known = one(annotations, source("a.jpg"), 1)
    assert known
    assert np.array_equal(mask, expected)
    assert not one(annotations, source("a.jpg"), 0)[1]


def test_compressed_run_lengths_are_read():
    assert inflated(PRESSED) == runs_of(RUNS)
    y, x = np.mgrid[:40, :300]
    assert inflated(ELLIPSE) == runs_of((y - 20) ** 2 / 300 + (x - 150) ** 2 / 15000 < 1)


def test_compressed_run_lengths_make_a_mask(tmp_path):
    shape = {"segmentation": {"size": [9, 7], "counts": PRESSED}}
    file = coco(tmp_path / "c.json", [{"category_id": 10, **shape}], size=(9, 7))
    geometry = Geometry(0.5, 0.5, 0, 0, (9, 7), (18, 14))
    mask, _ = one(opened(file, [source("a.jpg")]), source("a.jpg"), 0, geometry)
    assert np.array_equal(mask, RUNS.repeat(2, 0).repeat(2, 1))


def test_objects_of_a_class_are_united_and_others_left_out(tmp_path):
    shapes = [(10, [0, 0, 5, 5]), (30, [20, 20, 5, 5]), (10, [3, 3, 5, 5])]
    file = coco(tmp_path / "c.json", [{"category_id": kind, "bbox": box} for kind, box in shapes])
    annotations = opened(file, [source("a.jpg")])
    masks, known = annotations.of(source("a.jpg"), PLAIN, [2, 0, 1, 0])
    cats = box_mask(0, 0, 5, 5) | box_mask(3, 3, 8, 8)
    assert known.tolist() == [True, True, False, True]
    assert np.array_equal(masks, [box_mask(20, 20, 25, 25), cats, np.zeros(SIZE, bool), cats])
    anything = opened(file, [source("a.jpg")], categories=(), values="object")
    assert np.array_equal(one(anything, source("a.jpg"), 5)[0], cats | box_mask(20, 20, 25, 25))


@pytest.mark.parametrize(
    ("names", "images", "expected"),
    [
        (["val/a.jpg", "b.jpg"], ["val/a.jpg"], True),
        (["a.jpg", "b.jpg"], ["val/a.jpg"], True),
        (["val/a.jpg", "b.jpg"], ["a.jpg"], True),
        (["./val\\a.jpg", "b.jpg"], ["val/a.jpg"], True),
        (["coco/a.jpg", "b.jpg"], ["mine/a.jpg"], True),  # the name is unique in both
        (["coco/a.jpg", "other/a.jpg"], ["mine/a.jpg", "b.jpg"], False),
        (["coco/a.jpg", "b.jpg"], ["mine/a.jpg", "his/a.jpg", "b.jpg"], False),
    ],
)
def test_which_coco_image_is_which(tmp_path, names, images, expected):
    file = coco(tmp_path / "c.json", [{"category_id": 10, "bbox": [0, 0, 5, 5]}], images=[*names, "z.jpg"])
    annotations = opened(file, [source(path) for path in [*images, "z.jpg"]])
    assert one(annotations, source(images[0]), 0)[1] is expected


@pytest.mark.parametrize(
    "shape",
    [
        {"bbox": [1, 2, 3]},
        {"bbox": None},
        {},
        {"bbox": ["a", 1, 1, 1]},
        {"segmentation": [[1, 2, 3]]},
        {"segmentation": [["a", "b", "c", "d"]]},
        {"segmentation": [[1, 2, float("nan"), 4, 5, 6]]},
        {"segmentation": 7},
        {"segmentation": {"size": [2, 2], "counts": [4]}},
        {"segmentation": {"size": [40, 60], "counts": [5]}},
        {"segmentation": {"size": [40, 60], "counts": [-1, 2401]}},
        {"segmentation": {"size": [40, 60], "counts": [10**30]}},
        {"segmentation": {"size": [40, 60], "counts": "~~~"}},
        {"segmentation": {"size": [40, 60], "counts": "l"}},
        {"segmentation": {"counts": []}},
        {"category_id": 999, "bbox": [1, 1, 1, 1]},
        {"category_id": None, "bbox": [1, 1, 1, 1]},
    ],
)
def test_damaged_coco_annotations_are_the_fault_of_their_image(tmp_path, shape):
    file = coco(tmp_path / "c.json", [{"category_id": 10, **shape}], images=["a.jpg", "b.jpg"])
    annotations = opened(file, [source("a.jpg"), source("b.jpg")])
    with pytest.raises(InputError, match=r"c\.json: damaged annotation of a\.jpg"):
        annotations.of(source("a.jpg"), PLAIN, [0])
    assert not one(annotations, source("b.jpg"), 0)[1]


def test_a_coco_image_of_other_proportions_is_refused(tmp_path):
    file = coco(tmp_path / "c.json", [{"category_id": 10, "bbox": [0, 0, 5, 5]}], size=(60, 40))
    with pytest.raises(InputError, match=r"c\.json, a\.jpg: made for an image of 40x60 pixels"):
        one(opened(file, [source("a.jpg")]), source("a.jpg"), 0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a readable JSON file"),
        ("[1, 2", "not a readable JSON file"),
        ("[" * 200_000, "not a readable JSON file"),
        ("[]", "needs images, annotations and categories"),
        ('{"images": []}', "needs images, annotations and categories"),
        ('{"images": [{}], "annotations": [], "categories": []}', "an entry lacks 'file_name'"),
        ('{"images": [3], "annotations": [], "categories": []}', "not a COCO annotation file"),
        ('{"images": 3, "annotations": [], "categories": []}', "not a COCO annotation file"),
    ],
)
def test_a_damaged_coco_file_is_refused_at_once(tmp_path, text, reason):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        opened(tmp_path / "c.json", [source("a.jpg")])


# ---- tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Three pictures on disk as the run lists them, beside an empty table."""
    for name in ("a", "b", "c"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "photos" / f"{name}.jpg")
    return find_images([str(tmp_path / "photos")])


def test_a_table_of_masks(tmp_path, photos):
    saved(tmp_path, "shapes/first.png", box_mask(0, 0, 4, 4))
    saved(tmp_path, "shapes/second.png", box_mask(10, 10, 14, 14) * 1 + box_mask(20, 20, 24, 24) * 2)
    lines = [
        "path;label;mask",
        "photos/a.jpg;cat;shapes/first.png",
        f"{photos[0].file};cat;shapes/second.png",
        "photos/b.jpg;dog;",
        "photos/c.jpg;dog;shapes/gone.png",
        "photos/other.jpg;dog;shapes/first.png",
    ]
    (tmp_path / "truth.csv").write_text("\n".join(lines))
    annotations = opened(tmp_path / "truth.csv", photos)
    masks, known = annotations.of(photos[0], PLAIN, [0, 1, 2])
    assert known.tolist() == [True, True, False]
    assert np.array_equal(masks[0], box_mask(0, 0, 4, 4) | box_mask(10, 10, 14, 14))
    assert np.array_equal(masks[1], box_mask(20, 20, 24, 24))
    assert not one(annotations, photos[1], 0)[1]
    with pytest.raises(InputError, match=r"gone\.png: missing"):
        annotations.of(photos[2], PLAIN, [0])


def test_a_table_of_boxes(tmp_path, photos):
    lines = [
        "Image,label,xmin,ymin,xmax,ymax",
        "photos/a.jpg,Cat,10,5,30,20",
        "photos/a.jpg,cat,0,0,2.5,3",
        "photos/a.jpg,dog,50,30,60,40",
        "photos/b.jpg,,1,1,5,5",
        "photos/c.jpg,,,,,",
    ]
    (tmp_path / "truth.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    annotations = opened(tmp_path / "truth.csv", photos)
    masks, known = annotations.of(photos[0], PLAIN, [0, 1, 2])
    assert known.tolist() == [True, True, False]
    assert np.array_equal(masks[0], box_mask(10, 5, 30, 20) | box_mask(0, 0, 2, 3))
    assert np.array_equal(masks[1], box_mask(50, 30, 60, 40))
    assert np.array_equal(one(annotations, photos[1], 2)[0], box_mask(1, 1, 5, 5)), "of every class"
    assert not one(annotations, photos[2], 2)[1]
    anything = opened(tmp_path / "truth.csv", photos, values="object", categories=())
    assert one(anything, photos[0], 2)[0].sum() == masks.any(0).sum()


def test_paths_of_a_table_are_first_from_the_current_directory(tmp_path, photos, monkeypatch):
    elsewhere = tmp_path / "tables"
    elsewhere.mkdir()
    (elsewhere / "truth.csv").write_text("path,xmin,ymin,xmax,ymax\nphotos/a.jpg,0,0,9,9\n")
    with pytest.raises(ConfigError, match="holds no annotation of any image"):
        opened(elsewhere / "truth.csv", photos)
    monkeypatch.chdir(tmp_path)
    assert opened(elsewhere / "truth.csv", photos).matched == 1
    assert opened(elsewhere / "truth.csv", find_images(["photos"])).matched == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "needs a first line that names the columns"),
        ("path,label\nphotos/a.jpg,cat\n", "needs a first line that names the columns"),
        ("mask\nx.png\n", "needs a first line that names the columns"),
        ("path,xmin,ymin,xmax\nphotos/a.jpg,1,2,3\n", "needs a first line that names the columns"),
        ("path,mask\nphotos/a.jpg\n", "lacks a column"),
        ("path,xmin,ymin,xmax,ymax\nphotos/a.jpg,1,2,3,x\n", "no box with xmin < xmax"),
        ("path,xmin,ymin,xmax,ymax\nphotos/a.jpg,3,2,3,9\n", "no box with xmin < xmax"),
        ("path,xmin,ymin,xmax,ymax\nphotos/a.jpg,1,2,nan,9\n", "no box with xmin < xmax"),
        (
            "path,mask\nphotos/z.jpg,m.png\n",
            r"holds no annotation of any image, such as 'a\.jpg'; it has 'photos/z\.jpg'",
        ),
        ("path,label,xmin,ymin,xmax,ymax\nphotos/a.jpg,zebra,1,1,2,2\n", r"no annotated class \('zebra'\)"),
    ],
)
def test_a_wrong_table_is_refused_at_once(tmp_path, photos, text, reason):
    (tmp_path / "truth.csv").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        opened(tmp_path / "truth.csv", photos)


# ---- opening -------------------------------------------------------------------------------------------------------


def test_the_format_is_told_by_what_is_there(tmp_path, voc_folder, photos):
    saved(tmp_path, "m/sub/a.PNG", box_mask(0, 0, 4, 4))
    shown = [source("sub/a.jpg")]
    assert type(opened(tmp_path / "m", shown).reader).__name__ == "Masks"
    assert type(opened(voc_folder, VOC_SOURCES).reader).__name__ == "Voc"
    assert type(opened(coco(tmp_path / "c.json", []), [source("a.jpg")]).reader).__name__ == "Coco"
    (tmp_path / "t.tsv").write_text("path\tmask\nphotos/a.jpg\tm/sub/a.PNG\n")
    assert one(opened(tmp_path / "t.tsv", photos), photos[0], 0)[1]
    (tmp_path / "t.txt").write_text("path,mask\nphotos/a.jpg,m/sub/a.PNG\n")
    assert opened(tmp_path / "t.txt", photos, format="manifest").matched == 1


def test_what_cannot_be_opened_says_why(tmp_path, voc_folder):
    shown = [source("a.jpg")]
    saved(tmp_path / "both", "a.png", box_mask(0, 0, 4, 4))
    voc(tmp_path / "both", "a.xml", ("zebra", (1, 1, 2, 2), False))
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("x")
    cases = {
        "needs a path": (None, {}),
        "'.*gone' does not exist": (tmp_path / "gone", {}),
        "both .png and .xml; say which: format: masks": (tmp_path / "both", {}),
        "no .png and no .xml": (tmp_path / "empty", {}),
        "holds no .png$": (tmp_path / "empty", {"format": "masks"}),
        "holds no .xml$": (tmp_path / "empty", {"format": "voc"}),
        "not known by its suffix": (tmp_path / "t.txt", {}),
        "of the format voc is a folder": (tmp_path / "t.txt", {"format": "voc"}),
        "of the format coco is a file": (tmp_path / "empty", {"format": "coco"}),
        r"no annotated class \('zebra'\) is a category of the model; the model's are 'cat'": (
            tmp_path / "both",
            {"format": "voc"},
        ),
        r"such as 'a\.jpg'; it has '000001\.xml'|it has '00000": (voc_folder, {}),
    }
    for reason, (path, how) in cases.items():
        with pytest.raises(ConfigError, match=reason):
            Annotations.open(TruthSpec(None if path is None else str(path), **how), shown, CLASSES)
    with pytest.raises(ConfigError, match=r"no annotated class \('zebra'.*the model has no names"):
        opened(coco(tmp_path / "c.json", [], names=["zebra"]), shown, categories=())


@pytest.mark.parametrize("broken", ["cut", "empty", "text", "folder", "jpeg", "bomb"])
def test_a_damaged_mask_names_its_file(tmp_path, broken, monkeypatch):
    file = saved(tmp_path, "a.png", np.random.default_rng(0).integers(0, 3, SIZE))
    match broken:
        case "cut":
            file.write_bytes(file.read_bytes()[:-400])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("no picture")
        case "folder":
            file.unlink()
            file.mkdir()
        case "jpeg":
            Image.new("L", (60, 40)).save(file, format="JPEG")
        case "bomb":
            monkeypatch.setattr("xcli.readers.masks.MAX_PIXELS", 2399)
    with pytest.raises(InputError, match=r"a\.png: "):
        read_indices(str(file))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mask_with_flipped_bytes_is_read_or_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("fuzz") / "a.png"
    saved(file.parent, file.name, np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 5)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        found = read_indices(str(file), colours=True)
    except InputError as error:
        refused = str(error)
    else:
        assert found.ndim == 2
        return
    assert refused.startswith(str(file))


# ---- a batch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 3])
def test_the_truth_of_a_batch(voc_folder, threads):
    annotations = opened(voc_folder, VOC_SOURCES, difficult="count")
    geometries = [geometry_of(Preprocess(resize=(16, 16)), size) for size in (SIZE, SIZE, (80, 120), SIZE)]
    image, target = torch.tensor([0, 0, 1, 3]), torch.tensor([1, 2, 0, 1])
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = truth(
            annotations,
            VOC_SOURCES,
            geometries,
            image,
            target,
            (16, 16),
            "cpu",
            pool=pool if threads else None,
        )
    assert found.known.tolist() == [True, False, True, False]
    assert found.mask.shape == (4, 16, 16)
    assert found.mask.dtype == torch.bool
    for row in range(4):
        mask, known = one(annotations, VOC_SOURCES[image[row]], int(target[row]), geometries[image[row]])
        assert bool(found.known[row]) == known
        assert np.array_equal(found.mask[row].numpy(), mask)
    torch.testing.assert_close(found.pixel, torch.tensor([[2.5, 3.75]] * 4))


def test_each_image_is_read_once_however_many_rows_it_has(voc_folder, monkeypatch):
    annotations, calls = opened(voc_folder, VOC_SOURCES), []
    monkeypatch.setattr("xcli.readers.voc.read_voc", lambda file: calls.append(file) or read_voc(file))
    image, target = torch.tensor([0, 0, 0, 2]), torch.tensor([0, 1, 2, 0])
    truth(annotations, VOC_SOURCES, [PLAIN] * 4, image, target, SIZE, "cpu")
    assert [Path(file).name for file in calls] == ["000001.xml", "000003.xml"]


def test_a_batch_goes_on_without_an_annotation_that_cannot_be_read(voc_folder):
    annotations = opened(voc_folder, VOC_SOURCES, difficult="count")
    (voc_folder / "000001.xml").write_text("<annotation>")
    image, target, told = torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0]), {}
    given_all = (annotations, VOC_SOURCES, [PLAIN] * 4, image, target, SIZE, "cpu")
    with pytest.raises(InputError, match=r"000001\.xml"):
        truth(*given_all)
    found = truth(*given_all, on_error=told.__setitem__)
    assert found.known.tolist() == [False, False, True]
    assert list(told) == [0]
    assert "000001.xml" in str(told[0])


def test_a_batch_without_rows(voc_folder):
    annotations, none = opened(voc_folder, VOC_SOURCES), torch.zeros(0, dtype=torch.long)
    found = truth(annotations, VOC_SOURCES, [PLAIN] * 4, none, none, (16, 20), "cpu")
    assert (found.mask.shape, found.known.shape, found.pixel.shape) == ((0, 16, 20), (0,), (0, 2))
