"""The shipped networks name held-out scenes, and the scenes and their training are what they claim to be."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xcli.demo.nets import CATEGORIES, NETS, SIZE, load, weights_path
from xcli.demo.scenes import load_photos, scene, scene_at, scenes
from xcli.demo.train import accuracy, logits_of, render, save, train

SAMPLES = Path(__file__).parent.parent / "sample_images"
PICTURES = sorted((SAMPLES / "scenes").rglob("*.jpg"))
SEED = 31
"""Neither a seed of the training scenes nor one the shipped weights were chosen by."""


@pytest.fixture(scope="module")
def photos():
    return load_photos(SAMPLES / "photos")


def kinds_in(path: Path) -> set[int]:
    return {CATEGORIES.index(kind) for kind in path.stem.split("-")[:-1]}


def as_batch(path: Path) -> torch.Tensor:
    small = Image.open(path).resize((SIZE[1], SIZE[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "objects", "least"), [("shapes-cnn", 1, 0.96), ("shapes-cnn", 2, 0.92), ("shapes-vit", 1, 0.88)]
)
def test_shipped_network_names_held_out_scenes(name, objects, least, photos):
    pictures = render(200, SEED + objects, (objects,), photos)
    assert accuracy(load(name), pictures, objects) >= least


@pytest.mark.parametrize("name", sorted(NETS))
def test_weights_are_small_and_half_precision(name):
    from safetensors.torch import load_file

    assert weights_path(name).stat().st_size <= 1.5e6
    floats = [w for w in load_file(str(weights_path(name))).values() if w.is_floating_point()]
    assert {w.dtype for w in floats} == {torch.float16}
    assert all(bool(torch.isfinite(w).all()) for w in floats)
    assert {p.dtype for p in load(name).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", sorted(NETS))
def test_loading_leaves_the_random_state_alone(name):
    before = torch.random.get_rng_state()
    load(name)
    assert torch.equal(before, torch.random.get_rng_state())


def test_cnn_takes_any_size_and_vit_refuses():
    with torch.no_grad():
        assert load("shapes-cnn")(torch.zeros(1, 3, 32, 72)).shape == (1, len(CATEGORIES))
    with pytest.raises(ValueError, match="128x128 pixels, got 64x96"):
        load("shapes-vit")(torch.zeros(1, 3, 64, 96))


def test_cnn_logits_are_the_head_on_the_mean_of_the_last_stage():
    model, x = load("shapes-cnn"), torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.stages(model.stem(x))
        assert maps.shape == (2, 96, 16, 16)
        assert float(maps.min()) >= 0
        torch.testing.assert_close(model(x), model.head(maps.mean((2, 3))))


def test_scene_depends_on_seed_and_index_alone(photos):
    few, many = list(scenes(3, SEED, photos=photos)), list(scenes(6, SEED, photos=photos))
    for first, second in zip(few, many, strict=False):
        assert np.array_equal(first.image, second.image)
        assert np.array_equal(first.masks, second.masks)
        assert first.kinds == second.kinds
    assert np.array_equal(many[5].image, scene_at(5, SEED, photos=photos).image)
    assert not np.array_equal(many[0].image, next(scenes(1, SEED + 1, photos=photos)).image)


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_scene_has_distinct_kinds_with_masks_that_do_not_overlap(objects):
    for index in range(20):
        drawn = scene(np.random.default_rng([SEED, index]), objects, size=96)
        assert drawn.image.shape == (96, 96, 3)
        assert drawn.image.dtype == np.uint8
        assert len(set(drawn.kinds)) == len(drawn.masks) == objects
        assert drawn.masks.sum(axis=0).max() == 1
        assert drawn.masks.sum(axis=(1, 2)).min() > 0.003 * 96 * 96


def test_fill_contrasts_with_what_is_around_the_object():
    luminance = np.array([0.30, 0.59, 0.11])
    contrasts = []
    for drawn in scenes(60, SEED, objects=(1,)):
        gray, inside = drawn.image @ luminance, drawn.masks[0]
        contrasts.append(abs(gray[inside].mean() - gray[~inside].mean()))
    assert np.mean(np.array(contrasts) > 30) > 0.9


@pytest.mark.soak
def test_rendering_in_processes_equals_rendering_here(photos):
    pictures = render(520, SEED, (1, 2), photos[:1])
    for index in (0, 255, 519):
        drawn = scene_at(index, SEED, (1, 2), photos[:1])
        assert np.array_equal(pictures.images[index].permute(1, 2, 0).numpy(), drawn.image)
        assert set(pictures.present[index].nonzero().flatten().tolist()) == set(drawn.kinds)


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(NETS))
def test_training_is_set_by_its_seed(name, tmp_path):
    pictures = render(64, SEED, (1, 2))
    runs = [train(name, pictures, epochs=1, rate=1e-3, decay=0.05, seed=seed) for seed in (0, 0, 1)]
    first, second, other = (run.state_dict() for run in runs)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    save(runs[0], tmp_path / "w.safetensors")
    read_back = load(name, tmp_path / "w.safetensors")
    assert torch.equal(read_back.head.weight, first["head.weight"].half().float())


def test_samples_show_every_kind_with_one_and_with_two_objects():
    for part, objects in (("one", 1), ("two", 2)):
        paths = [path for path in PICTURES if path.parent.name == part]
        assert len(paths) >= 12
        assert {len(kinds_in(path)) for path in paths} == {objects}
        assert set().union(*(kinds_in(path) for path in paths)) == set(range(len(CATEGORIES)))


def test_sample_masks_match_their_pictures():
    assert len(list((SAMPLES / "masks").rglob("*.png"))) == len(PICTURES)
    for path in PICTURES:
        mask = Image.open(SAMPLES / "masks" / path.relative_to(SAMPLES / "scenes").with_suffix(".png"))
        assert mask.mode == "P"
        assert mask.size == Image.open(path).size
        assert set(np.unique(np.array(mask)).tolist()) == {0} | {1 + kind for kind in kinds_in(path)}


def test_csv_lists_every_sample_once_with_its_first_kind():
    with (SAMPLES / "scenes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == [p.relative_to(SAMPLES).as_posix() for p in PICTURES]
    assert all(Path(row["path"]).name.startswith(row["label"]) for row in rows)


def test_cnn_is_right_on_every_sample():
    model = load("shapes-cnn")
    for path in PICTURES:
        kinds = kinds_in(path)
        top = logits_of(model, as_batch(path))[0].topk(len(kinds)).indices
        assert set(top.tolist()) == kinds, path.name


def test_photographs_are_small_and_their_licences_recorded():
    licences = (SAMPLES / "photos" / "LICENSES.md").read_text(encoding="utf-8")
    paths = sorted((SAMPLES / "photos").glob("*.jpg"))
    assert len(paths) >= 5
    for path in paths:
        assert f"`{path.name}`" in licences
        assert path.stat().st_size <= 60 * 1024
        assert max(Image.open(path).size) <= 400
