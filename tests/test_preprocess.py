"""Pixels to inputs as torchvision does it, and maps back to the original."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.models import ResNet50_Weights, ViT_B_16_Weights
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from xcli.errors import ConfigError, ModelError
from xcli.preprocess import INTERPOLATIONS, Preprocess

SIZES = [(64, 64), (75, 50), (50, 75), (101, 64), (33, 90), (300, 47), (20, 12), (31, 57)]  # (width, height)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("resize", "crop"), [(40, 32), (33, 28), (32, 32), (20, 25), (31, 45)])
def test_inputs_equal_the_preset_of_torchvision(size, resize, crop, interpolation):
    preset = ImageClassification(
        crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation)
    )
    preprocess = Preprocess.from_torchvision(preset)
    pixels, geometry = preprocess.apply(noise(*size))
    x = preprocess.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert_close(x[0], preset(noise(*size)), rtol=0, atol=1e-6)
    assert pixels.shape == (crop, crop, 3)
    assert geometry.input == preprocess.size_for(*size) == (crop, crop)


def test_reads_the_presets_of_weights():
    resnet = Preprocess.from_torchvision(ResNet50_Weights.IMAGENET1K_V2.transforms())
    assert (resnet.resize, resnet.crop, resnet.interpolation) == (232, 224, "bilinear")
    swag = Preprocess.from_torchvision(ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.transforms())
    assert (swag.resize, swag.crop, swag.interpolation) == (384, 384, "bicubic")


def test_refuses_other_presets():
    with pytest.raises(ModelError, match="ReLU"):
        Preprocess.from_torchvision(torch.nn.ReLU())
    box = ImageClassification(crop_size=8, interpolation=InterpolationMode.HAMMING)
    with pytest.raises(ModelError, match="'hamming'"):
        Preprocess.from_torchvision(box)


@pytest.mark.parametrize(
    ("preprocess", "size", "expected"),
    [
        (Preprocess(), None, (50, 101)),
        (Preprocess(resize=20), None, (20, 40)),
        (Preprocess(resize=(7, 9)), (7, 9), (7, 9)),
        (Preprocess(crop=(7, 9)), (7, 9), (7, 9)),
        (Preprocess(resize=30, crop=24), (24, 24), (24, 24)),
        (Preprocess(resize=30, letterbox=True), (30, 30), (30, 30)),
        (Preprocess(letterbox=True), None, (50, 101)),
    ],
)
def test_sizes(preprocess, size, expected):
    assert preprocess.size == size
    assert preprocess.size_for(101, 50) == expected
    assert preprocess.apply(noise(101, 50))[0].shape == (*expected, 3)


def test_letterbox_keeps_the_whole_image_centred_on_the_fill():
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    pixels, geometry = Preprocess(resize=(32, 32), letterbox=True, fill=(1, 2, 3)).apply(image)
    assert (pixels[8:24] == (255, 0, 0)).all()
    assert (pixels[:8] == (1, 2, 3)).all()
    assert (pixels[24:] == (1, 2, 3)).all()
    assert geometry.box == (0, 0, 40, 80)


def test_box_is_what_a_centre_crop_shows():
    _, geometry = Preprocess(resize=50, crop=40).apply(noise(200, 100))
    assert geometry.box == (10, 60, 90, 140)


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [(120, 80), (80, 120), (90, 90), (40, 25), (333, 71)], ids=str)
@pytest.mark.parametrize(("resize", "crop"), [(48, 40), ((36, 60), None), (30, 44)])
def test_a_gradient_survives_the_round_trip(size, resize, crop, letterbox):
    """A picture whose colours are its own coordinates comes back within one coarse pixel wherever it was seen."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    picture = (
        np.stack([255 * (y + 0.5) / height, 255 * (x + 0.5) / width, 0 * x], -1).round().astype(np.uint8)
    )
    pixels, geometry = Preprocess(resize, crop, letterbox=letterbox).apply(Image.fromarray(picture))
    back = geometry.to_original(torch.from_numpy(pixels).permute(2, 0, 1).double()).numpy()  # (3, H, W)
    top, left, bottom, right = geometry.box
    margin_y, margin_x = 2 * max(1, geometry.scale_y), 2 * max(1, geometry.scale_x)
    inner = (y + 0.5 > top + margin_y) & (y + 0.5 < bottom - margin_y)
    inner &= (x + 0.5 > left + margin_x) & (x + 0.5 < right - margin_x)
    assert inner.sum() > 100
    assert np.abs(back[0] * height / 255 - y - 0.5)[inner].max() < max(1, 0.5 + height / 255)
    assert np.abs(back[1] * width / 255 - x - 0.5)[inner].max() < max(1, 0.5 + width / 255)


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("size", [(120, 80), (80, 120)], ids=str)
def test_a_dot_comes_back_where_it_was(size, letterbox):
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    row, column = height // 2 - 11, width // 2 + 9
    picture[row - 1 : row + 2, column - 1 : column + 2] = 255
    pixels, geometry = Preprocess(64, 56, letterbox=letterbox).apply(Image.fromarray(picture))
    back = geometry.to_original(torch.from_numpy(pixels[..., 0]).double())
    y, x = divmod(int(back.argmax()), width)
    assert abs(y - row) <= 1
    assert abs(x - column) <= 1


def test_what_the_model_did_not_see_is_zero_even_for_nan_maps():
    _, geometry = Preprocess(resize=50, crop=40).apply(noise(200, 100))
    back = geometry.to_original(torch.full((2, 7, 7), float("nan")))
    assert back.shape == (2, 100, 200)
    assert back[:, 10:90, 60:140].isnan().all()
    assert back.nan_to_num(1).sum() == 2 * 80 * 80


def test_a_coarse_map_spreads_over_the_whole_input():
    _, geometry = Preprocess().apply(noise(8, 4))
    back = geometry.to_original(torch.tensor([[0.0, 1.0]]))  # two cells: centres at columns 2 and 6 of 8
    assert_close(back[0], torch.tensor([0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))


def test_denormalise_undoes_normalise():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    preprocess = Preprocess()
    x = preprocess.normalise(pixels)
    assert x.dtype == torch.float32
    assert_close(preprocess.denormalise(x), pixels / 255, rtol=0, atol=1e-6)
    assert preprocess.denormalise(x + 100).max() == 1
    assert preprocess.normalise(pixels, torch.float64).dtype == torch.float64


def test_half_precision_is_rounded_once():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    preprocess = Preprocess()
    assert torch.equal(preprocess.normalise(pixels, torch.float16), preprocess.normalise(pixels).half())


def test_with_size_resizes_the_whole_image_only_where_the_size_was_open():
    fixed = Preprocess(resize=20).with_size((12, 18))
    _, geometry = fixed.apply(noise(90, 40))
    assert geometry.input == (12, 18)
    assert geometry.box == (0, 0, 40, 90)
    assert Preprocess(30, 24).with_size((24, 24)) == Preprocess(30, 24)
    with pytest.raises(ConfigError, match=r"\[32, 32\].*\[24, 24\]"):
        Preprocess(30, 24).with_size((32, 32))


def test_description_is_plain_json():
    described = json.loads(json.dumps(Preprocess((3, 4), 2).describe()))
    assert described["resize"] == [3, 4]
    assert Preprocess(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
    ) == Preprocess((3, 4), 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"resize": 0},
        {"crop": (3, 0)},
        {"interpolation": "box"},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.0, 0.0)},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"preprocess: .*{next(iter(wrong))}"):
        Preprocess(**wrong)
