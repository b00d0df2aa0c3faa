"""Maps to colour: each number is known before the code runs."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from xcli.errors import ConfigError
from xcli.preprocess import Geometry
from xcli.render import (
    UNSEEN,
    colormap_names,
    colour_table,
    colourise,
    from_image,
    heatmap_image,
    levels,
    normalise,
    overlay,
    overlay_original,
    to_images,
)


def maps_of(*rows):
    """One 1 x P map a row."""
    return torch.tensor([[row] for row in rows])


def random_batch(n=5, height=7, width=6):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)
    return pixels, torch.rand(n, height, width, generator=generator)


@pytest.mark.parametrize("name", ["jet", "viridis", "turbo", "coolwarm", "magma_r"])
def test_colours_are_matplotlibs_bytes(name):
    values = torch.cat([torch.linspace(0, 1, 1021), torch.rand(5000, generator=torch.manual_seed(0))])
    ours = colourise(values[None, None], colour_table(name))[0, :, 0].T
    theirs = matplotlib.colormaps[name](values.numpy(), bytes=True)[:, :3]
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("jet", (0, 0, 127), (127, 0, 0)),
        ("viridis", (68, 1, 84), (253, 231, 36)),
        ("gray", (0, 0, 0), (255, 255, 255)),
    ],
)
def test_end_points_of_the_tables(name, low, high):
    table = colour_table(name)
    assert (table.shape, table.dtype) == ((256, 3), torch.uint8)
    assert table[0].tolist() == pytest.approx(low, abs=1)
    assert table[255].tolist() == pytest.approx(high, abs=1)


def test_a_short_colour_map_still_has_256_rows():
    table = colour_table("tab10")
    assert len(table) == 256
    assert len({tuple(row) for row in table.tolist()}) == 10


def test_the_table_is_made_once():
    assert colour_table("turbo") is colour_table("turbo", torch.device("cpu"))


@pytest.mark.parametrize(
    ("wrong", "right"), [("jett", "'jet'"), ("Viridis", "'viridis'"), ("cool warm", "'coolwarm'")]
)
def test_an_unknown_colour_map_is_refused_with_the_nearest(wrong, right):
    with pytest.raises(ConfigError, match=right):
        colour_table(wrong)
    assert right.strip("'") in colormap_names()


def test_a_name_like_nothing_known_gets_examples():
    with pytest.raises(ConfigError, match=r"unknown colour map '\?\?\?\?'; for example jet"):
        colour_table("????")


@pytest.mark.parametrize(
    ("signed", "raw", "expected"),
    [
        ("auto", [0.0, 1.0, 4.0], [0, 0.25, 1]),  # zero is the floor
        ("auto", [2.0, 3.0, 4.0], [0.5, 0.75, 1]),  # also where no value reaches it
        ("auto", [-1.0, 0.0, 3.0], [0, 0.25, 1]),  # min-max
        ("auto", [-4.0, -3.0, -1.0], [0, 0.25, 0.75]),  # nothing speaks for: the top colour is not reached
        ("auto", [0.0, 0.0, 0.0], [0, 0, 0]),
        (False, [-4.0, 1.0, 2.0], [0, 0.5, 1]),
        (False, [-4.0, -1.0, -2.0], [0, 0, 0]),
        (True, [-4.0, 0.0, 2.0], [0, 0.5, 0.75]),
        (True, [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]),
        ("auto", [float("nan"), float("inf"), 2.0], [0, 0, 1]),
        ("auto", [float("nan")] * 3, [0, 0, 0]),
        ("auto", [1e-42, 0.0, 5e-43], [1, 0, 0.5]),  # subnormal
        ("auto", [3e38, -3e38, 0.0], [1, 0, 0.5]),  # the span overflows
    ],
)
def test_normalise_follows_its_rule(signed, raw, expected):
    assert normalise(maps_of(raw), signed)[0, 0].tolist() == pytest.approx(expected, abs=1e-3)


def test_normalise_is_float32_whatever_comes_in():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scaled = normalise(maps_of([0.0, 1.0, 2.0]).to(dtype))
        assert (scaled.dtype, scaled[0, 0].tolist()) == (torch.float32, [0, 0.5, 1])
    huge = torch.tensor([[[0.0, 5e299, 1e300]]], dtype=torch.float64)  # infinite as float32
    assert normalise(huge)[0, 0].tolist() == [0, 0.5, 1]


def test_a_hair_below_zero_moves_the_picture_by_a_hair():
    clean, noisy = maps_of([0.0, 1.0, 2.0]), maps_of([-1e-6, 1.0, 2.0])
    assert torch.allclose(normalise(clean), normalise(noisy), atol=1e-5)


def test_clip_removes_one_outlier_at_each_end():
    body = torch.linspace(-1, 1, 98)
    raw = torch.cat([torch.tensor([-1e6]), body, torch.tensor([1e6])])[None, None]  # 100 pixels
    scaled = normalise(raw, clip=1)[0, 0]
    assert scaled[1:-1].tolist() == pytest.approx(((body + 1) / 2).tolist(), abs=1e-2)
    assert (scaled[0], scaled[-1]) == (0, 1)
    assert normalise(raw)[0, 0, 1:-1].std() < 1e-4  # without it the outliers take all colours


def test_clip_keeps_a_map_of_one_spark():
    raw = torch.zeros(1, 10, 10)
    raw[0, 3, 3] = 7
    assert torch.equal(normalise(raw, clip=5), raw / 7)
    dark = torch.full((1, 10, 10), -1.0)
    dark[0, 0, 0], dark[0, 5, 5] = 0, 1
    assert normalise(dark, clip=5)[0, [0, 5, 9], [0, 5, 9]].tolist() == [0.5, 1, 0]


@pytest.mark.parametrize("clip", [-1, 100])
def test_clip_is_a_percentage(clip):
    with pytest.raises(ConfigError, match="clip"):
        normalise(torch.ones(1, 2, 2), clip=clip)


def test_normalise_leaves_the_raw_map_alone():
    raw = torch.tensor([[[float("inf"), -1.0, 3.0]]], requires_grad=True)
    before = raw.detach().clone()
    assert not normalise(raw, signed=False, clip=40).requires_grad
    assert torch.equal(raw, before)


def test_levels_outside_the_range_take_the_end_colours():
    values = torch.tensor([-1.0, 0.0, 0.00390625, 0.5, 0.99999, 1.0, 7.0, float("nan"), float("inf")])
    assert levels(values).tolist() == [0, 0, 1, 128, 255, 255, 255, 0, 255]


def test_overlay_by_hand():
    table = torch.zeros(256, 3, dtype=torch.uint8)
    table[255] = torch.tensor([255, 100, 0])
    pixels = torch.tensor([10, 20, 31], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 1, 2)
    picture = overlay(pixels, torch.tensor([[[1.0, 0.0]]]), table)
    assert picture[0, :, 0, 0].tolist() == [133, 60, 16]  # (265, 120, 31) / 2, halves up
    assert picture[0, :, 0, 1].tolist() == [5, 10, 16]
    quarter = overlay(pixels, torch.tensor([[[1.0, 0.0]]]), table, alpha=0.25)
    assert quarter[0, :, 0, 0].tolist() == [71, 40, 23]  # 71.25, 40, 23.25


def test_overlay_at_its_ends_is_the_image_and_the_colours():
    (pixels, maps), table = random_batch(), colour_table("jet")
    assert torch.equal(overlay(pixels, maps, table, 0.0), pixels)
    assert torch.equal(overlay(pixels, maps, table, 1.0), colourise(maps, table))


def test_overlay_of_white_on_white_does_not_overflow():
    white = torch.full((256, 3), 255, dtype=torch.uint8)
    for alpha in (0, 0.3, 0.5, 1):
        picture = overlay(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8), torch.ones(1, 2, 2), white, alpha)
        assert picture.unique().tolist() == [255]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(alpha):
    pixels, maps = random_batch()
    with pytest.raises(ConfigError, match="alpha"):
        overlay(pixels, maps, colour_table("jet"), alpha)


def test_the_batch_never_changes_a_picture():
    (pixels, maps), table = random_batch(), colour_table("turbo")
    raw = maps - 0.3
    whole = overlay(pixels, normalise(raw, clip=10), table)
    alone = [overlay(p[None], normalise(m[None], clip=10), table) for p, m in zip(pixels, raw, strict=True)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.gpu
def test_pictures_are_the_same_bytes_on_the_gpu():
    pixels, maps = random_batch(8, 224, 224)
    here = overlay(pixels, maps, colour_table("jet"))
    there = overlay(pixels.cuda(), maps.cuda(), colour_table("jet", "cuda"))
    assert torch.equal(there.cpu(), here)
    assert torch.allclose(normalise(maps.cuda()).cpu(), normalise(maps), atol=1e-6)


def test_images_go_out_and_come_back():
    pixels, _ = random_batch()
    images = to_images(pixels)
    assert [image.size for image in images] == [(6, 7)] * 5
    assert images[2].getpixel((4, 1)) == tuple(pixels[2, :, 1, 4].tolist())
    assert torch.equal(torch.cat([from_image(image) for image in images]), pixels)


def test_a_heatmap_is_a_palette_image_that_reads_back_as_levels():
    _, maps = random_batch()
    table = colour_table("viridis")
    image = heatmap_image(levels(maps)[0], table)
    assert (image.mode, image.size) == ("P", (6, 7))
    assert np.array_equal(np.asarray(image), levels(maps)[0].numpy())
    assert torch.equal(from_image(image), colourise(maps[:1], table))


def test_the_original_is_covered_where_the_model_saw_it_and_dimmed_elsewhere():
    geometry = Geometry(2.0, 2.0, 0.0, 4.0, original=(8, 16), input=(4, 4))  # the middle half of the width
    table = colour_table("jet")
    picture = from_image(
        overlay_original(Image.new("RGB", (16, 8), (200, 100, 50)), torch.ones(4, 4), geometry, table)
    )[0]
    covered = [(v + c + 1) // 2 for v, c in zip((200, 100, 50), table[255].tolist(), strict=True)]
    assert (picture[:, :, 4:12] == torch.tensor(covered)[:, None, None]).all()
    dimmed = torch.tensor([round(v * UNSEEN) for v in (200, 100, 50)])[:, None, None]
    assert (picture[:, :, :4] == dimmed).all()
    assert (picture[:, :, 12:] == dimmed).all()


def test_an_image_seen_whole_is_overlaid_whole():
    pixels, maps = random_batch(1)
    whole = Geometry(1.0, 1.0, 0.0, 0.0, original=(7, 6), input=(7, 6))
    table = colour_table("jet")
    picture = overlay_original(to_images(pixels)[0], maps[0], whole, table)
    assert torch.equal(from_image(picture), overlay(pixels, maps, table))
