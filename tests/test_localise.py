"""Maps sit on the object they explain: two-object scenes with known masks, each object explained by its own class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import xcli
from xcli.demo import nets
from xcli.demo.localise import localisation, pairs
from xcli.demo.scenes import load_photos

PHOTOS = Path(__file__).parents[1] / "sample_images" / "photos"


@pytest.fixture(scope="module")
def scenes():
    return pairs(200, load_photos(PHOTOS))


@pytest.fixture(scope="module")
def cnn():
    return nets.load("shapes-cnn")


def test_gradcam_is_on_the_explained_object_and_not_on_the_other(cnn, scenes):
    found, floor = localisation(cnn, "gradcam", *scenes), localisation(cnn, "random", *scenes)
    assert found.own >= 5 * floor.own
    assert found.own >= 10 * found.other
    assert found.pointing >= 0.7


def test_the_transformer_prefers_the_explained_object_too(scenes):
    x, kinds, masks = (part[:50] for part in scenes)
    found = localisation(nets.load("shapes-vit"), "gradcam", x, kinds, masks)
    assert found.own > 2 * found.other


def test_noise_covers_objects_by_their_area(cnn, scenes):
    x, kinds, masks = scenes
    found = localisation(cnn, "random", x, kinds, masks)
    assert found.own == pytest.approx(float(masks.float().mean()), rel=0.05)
    assert found.own == pytest.approx(found.other, rel=0.05)


def test_a_map_of_the_other_class_is_on_the_other_object(cnn, scenes):
    """The measure itself can fail: explained by each other's class, the shares change places."""
    x, kinds, masks = (part[:50] for part in scenes)
    right, wrong = (localisation(cnn, "gradcam", x, own, masks) for own in (kinds, kinds.flip(1)))
    assert wrong.own == pytest.approx(right.other, abs=1e-6)
    assert wrong.other == pytest.approx(right.own, abs=1e-6)


def test_an_untrained_network_does_not_localise(scenes):
    x, kinds, masks = (part[:50] for part in scenes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.shapes_cnn().eval()
        nn.init.normal_(net.head.weight)
    found = localisation(net, "gradcam", x, kinds, masks)
    assert found.own < 2 * max(found.other, 1e-3)


def test_a_flat_map_has_no_energy(cnn, scenes):
    x = scenes[0][:1]
    found = xcli.explain(cnn, torch.zeros_like(x), "gradcam", target=0)
    assert torch.isfinite(found.map).all()
