"""Pixels flipped, regions, patches and segments removed: by hand, and against Quantus."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import quantus
import torch
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, SumModel, Weighted, bound, images, made

from xcli.errors import ConfigError
from xcli.metrics.faithfulness.flipping import (
    PixelFlipping,
    RegionPerturbation,
    RegionPerturbationLeRF,
    Selectivity,
    patch_places,
)
from xcli.metrics.faithfulness.irof import IROF, segment_places, superpixels
from xcli.registry import build_metric

pytestmark = pytest.mark.filterwarnings("ignore:The settings for perturbing")

QUIET = {"disable_warnings": True, "return_aggregate": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # Quantus computes in float32


def found(metric, net, x, map, target=None, image=None):
    score = bound(net, x, [0] * len(x) if target is None else target, image)
    return metric.measure(map=map, x=x, score=score)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def blocks(count, colours, size, cells=4):
    """Pictures of a few plain fields, which SLIC finds; noise it takes for one."""
    fields = images(count, colours, cells, cells, seed=3)
    return fields.repeat_interleave(size // cells, 2).repeat_interleave(size // cells, 3)


def network(colours):
    """A small network, sure enough of itself that a curve moves."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(colours, 6, 3, padding=1)
        net = nn.Sequential(first, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    net[-1].weight.data *= 5
    return net.eval()


def peer(metric, net, x, maps, targets):
    """What Quantus makes of the same maps."""
    given = {"x_batch": x.numpy(), "y_batch": np.array(targets), "a_batch": maps[:, None].numpy()}
    with torch.no_grad():
        return torch.tensor(np.array(metric(model=net, channel_first=True, **given)), dtype=torch.float32)


@pytest.fixture
def trapz(monkeypatch):
    """Give NumPy 2.4 the function back that Quantus calls."""
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)


# --- pixel flipping ------------------------------------------------------------------------------------------


def test_a_flipped_pixel_is_its_opposite():
    x = torch.tensor([[[[4.0, 1.0], [3.0, 2.0]]]], dtype=torch.float64)
    got = found(PixelFlipping(steps=4), SumModel(), x, x[:, 0])
    assert_close(got.curve, row(10, 2, -4, -8, -10))
    assert_close(got.values, row((10 / 2 + 2 - 4 - 8 - 10 / 2) / 4)[0])


@pytest.mark.parametrize("pixels", [1, 6])
def test_preset_quantus_of_pixel_flipping_on_one_channel(pixels, trapz):
    net, x, maps, targets = network(1), images(2, 1, 6, 7).float(), images(2, 6, 7, seed=1).float(), [1, 3]
    metric = build_metric({"name": "pixel-flipping", "preset": "quantus", "pixels": pixels})
    got = found(metric, net, x, maps, targets)
    theirs = quantus.PixelFlipping(features_in_step=pixels, **QUIET)
    assert_close(got.curve[:, 1:], peer(theirs, net, x, maps, targets), **CLOSE)
    area = quantus.PixelFlipping(features_in_step=pixels, return_auc_per_sample=True, **QUIET)
    assert_close(got.values, peer(area, net, x, maps, targets), **CLOSE)


def test_quantus_flips_one_colour_at_a_time():
    """Its features are pixels times colours: a third of an RGB image's first pixel goes where ours goes whole."""
    net, x = network(3), images(1, 3, 4, 4).float()
    maps = images(1, 4, 4, seed=1).float()
    seen = []
    with net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())) as _:
        peer(quantus.PixelFlipping(features_in_step=1, **QUIET), net, x, maps, [1])
    changed = (seen[0] != x)[0].flatten(1).sum(1)
    assert sorted(changed.tolist()) == [0, 0, 1]
    metric = build_metric({"name": "pixel-flipping", "preset": "quantus"})
    removed = torch.zeros(1, 4, 4, dtype=torch.bool)
    removed[0, 1, 2] = True
    ours = metric.remover(bound(net, x, [1]), x)(torch.tensor([0]), removed)
    assert (ours != x)[0].flatten(1).sum(1).tolist() == [1, 1, 1]


# --- regions and patches -------------------------------------------------------------------------------------


def test_patches_by_hand():
    maps = torch.zeros(1, 5, 4, dtype=torch.float64)
    maps[0, 0, 3], maps[0, 2, 0], maps[0, 4, 1] = 1.0, 3.0, 2.0
    place, total = patch_places(maps, 3)  # a row is missing below and two columns, one on either side
    assert total == 4
    a, b, c, d = 2, 1, 0, 3  # upper left and right, lower left and right
    assert place.tolist() == [[[c, c, a, a]] * 3 + [[b, b, d, d]] * 2]


def test_aopc_by_hand():
    x = torch.arange(16, dtype=torch.float64).view(1, 1, 4, 4)
    scores = row(120, 70, 28, 10, 0)  # patches of 50, 42, 18 and 10
    metric = RegionPerturbation(patch=2, substrate="constant")
    got = found(metric, SumModel(), x, x[:, 0])
    assert_close(got.curve, scores)
    assert_close(got.fraction, row(0, 0.25, 0.5, 0.75, 1)[0])
    assert_close(got.values, (120 - scores).mean(1))
    got = found(RegionPerturbation(patch=2, regions=2, substrate="constant"), SumModel(), x, x[:, 0])
    assert_close(got.curve, scores[:, :3])
    assert_close(got.fraction, row(0, 0.25, 0.5)[0])
    assert_close(got.values, (120 - scores[:, :3]).mean(1))
    got = found(RegionPerturbationLeRF(patch=2, substrate="constant"), SumModel(), x, x[:, 0])
    assert_close(got.curve, row(120, 110, 92, 50, 0))


def test_selectivity_by_hand():
    x = torch.arange(16, dtype=torch.float64).view(1, 1, 4, 4)
    got = found(Selectivity(patch=2), SumModel(), x, x[:, 0])
    assert_close(got.curve, row(120, 70, 28, 10, 0))
    assert_close(got.values, row((120 / 2 + 70 + 28 + 10) / 4)[0])


@pytest.mark.parametrize("metric", [RegionPerturbation, Selectivity, IROF, PixelFlipping])
def test_the_true_contributions_beat_their_opposite(metric):
    x = blocks(3, 1, 12).abs() + 1
    options = {"segments": 8} if metric is IROF else {"steps": 8} if metric is PixelFlipping else {"patch": 4}
    options |= {"score": "logit", "substrate": "constant"}
    good, bad = (found(metric(**options), SumModel(), x, sign * x[:, 0]).values for sign in (1, -1))
    assert (good > bad if metric.direction == "higher" else good < bad).all()


def test_noise_is_within_the_range_of_the_image():
    net, x = made(PooledLinear), images(1, 3, 18, 18)
    seen = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found(RegionPerturbation(), net, x, images(1, 18, 18, seed=1))
    copies = torch.cat(seen)
    changed = (copies != x).any(1).flatten(1).sum(1)
    assert sorted(changed.tolist())[-5:] == [0, 81, 162, 243, 324]
    assert (copies.amax((2, 3)) <= x.amax((2, 3))).all()
    assert (copies.amin((2, 3)) >= x.amin((2, 3))).all()


@pytest.mark.parametrize("size", [(16, 24), (19, 13)])
@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_preset_quantus_of_region_perturbation(order, size):
    net, x, maps, targets = network(3), images(2, 3, *size).float(), images(2, *size, seed=1).float(), [1, 3]
    name = "region-perturbation" if order == "morf" else "region-perturbation-lerf"
    got = found(build_metric({"name": name, "preset": "quantus"}), net, x, maps, targets)
    drops = peer(quantus.RegionPerturbation(order=order, **QUIET), net, x, maps, targets)
    assert_close(got.curve[:, :1] - got.curve[:, 1:], drops, **CLOSE)
    assert_close(got.values, drops.sum(1) / (drops.shape[1] + 1), **CLOSE)


def test_quantus_says_lower_is_better_of_a_loss_that_a_good_map_makes_large():
    assert quantus.RegionPerturbation(**QUIET).score_direction.value == "lower"
    assert RegionPerturbation.direction == "higher"
    x = images(1, 1, 16, 16).abs() + 1
    good, bad = (
        found(RegionPerturbation(substrate="constant"), SumModel(), x, s * x[:, 0]).values for s in (1, -1)
    )
    assert good > bad


@pytest.mark.parametrize("size", [(16, 24), (19, 13)])
def test_preset_quantus_of_selectivity(size, trapz):
    net, x, maps, targets = network(3), images(2, 3, *size).float(), images(2, *size, seed=1).float(), [1, 3]
    got = found(build_metric({"name": "selectivity", "preset": "quantus"}), net, x, maps, targets)
    theirs = quantus.Selectivity(**QUIET)
    assert_close(got.curve[:, 1:], peer(theirs, net, x, maps, targets), **CLOSE)
    assert got.values.mean().item() == pytest.approx(theirs.get_auc_score, rel=1e-4)


# --- segments ------------------------------------------------------------------------------------------------

QUARTERS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 3], [2, 2, 2, 3]])


@pytest.fixture
def quarters(monkeypatch):
    """Segments of 4, 4, 6 and 2 pixels."""
    monkeypatch.setattr(
        "xcli.metrics.faithfulness.irof.superpixels", lambda x, *_: QUARTERS.expand(len(x), -1, -1)
    )


def test_segments_go_by_their_mean():
    maps = torch.zeros(1, 4, 4)
    maps[0, 2:, :3], maps[0, 2:, 3], maps[0, 0, 0] = 1.0, 2.0, 3.0  # sums 3, 0, 6, 4; means 0.75, 0, 1, 2
    place, total = segment_places(maps, QUARTERS[None])
    assert total.tolist() == [4]
    assert place[0].tolist() == [[2, 2, 3, 3]] * 2 + [[1, 1, 1, 0]] * 2


def test_irof_by_hand(quarters):
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    maps = -QUARTERS[None].double()
    got = found(IROF(score="logit", substrate="constant"), SumModel(), x, maps)
    scores = np.array([16, 12, 8, 2, 0]) / 16
    assert got.values.item() == pytest.approx(1 - (scores[:-1] + scores[1:]).sum() / 2 / 4)
    assert got.extras["segments"].tolist() == [4]
    summed = found(IROF(score="logit", substrate="constant", area="sum"), SumModel(), x, maps)
    assert summed.values.item() == pytest.approx(4 - (scores[1:-1] + scores[2:]).sum() / 2)


def test_irof_is_not_defined_where_the_score_is_not_positive(quarters):
    x = torch.stack(
        [torch.ones(1, 4, 4), torch.zeros(1, 4, 4), -torch.ones(1, 4, 4), torch.ones(1, 4, 4)]
    ).double()
    maps = -QUARTERS.double().repeat(4, 1, 1)
    maps[3, 0, 0] = torch.nan
    got = found(IROF(score="logit", substrate="constant"), SumModel(), x, maps)
    assert got.values.isnan().tolist() == [False, True, True, True]


def test_a_score_that_never_falls_loses_nothing(quarters, trapz):
    class Sure(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 2)

    net, x, maps = Sure().eval(), images(1, 3, 4, 4).float(), images(1, 4, 4, seed=1).float()
    theirs = build_metric({"name": "irof", "preset": "quantus"})
    assert found(IROF(), net, x, maps).values.item() == pytest.approx(0)
    assert found(theirs, net, x, maps).values.item() == pytest.approx(1)
    x, maps = blocks(1, 1, 16), images(1, 16, 16)
    assert peer(quantus.IROF(**QUIET), net, x, maps, [0]).item() == pytest.approx(1)


def test_superpixels_are_numbered_without_gaps():
    x = blocks(2, 3, 24).float()
    labels = superpixels(x, 20, 10.0)
    assert labels.shape == (2, 24, 24)
    assert labels.max() > 8
    for own in labels:
        assert own.unique().tolist() == list(range(int(own.max()) + 1))
    assert torch.equal(superpixels(x[1:], 20, 10.0)[0], labels[1])


@pytest.mark.parametrize("width", [1, 4])
def test_any_number_of_colours_is_segmented(width):
    assert superpixels(blocks(1, width, 16), 8, 10.0).max() > 0
    assert superpixels(torch.zeros(1, width, 16, 16), 4, 10.0).shape == (1, 16, 16)


@pytest.mark.parametrize("alone", [True, False])
def test_preset_quantus_of_irof(alone, trapz):
    """Alone, the numbers agree; in company, Quantus gives the image with fewer segments half of its last share less."""
    net, targets = network(1), [1, 3]
    x = torch.cat([blocks(1, 1, 48), blocks(1, 1, 48, cells=8)]).float()
    maps = images(2, 48, 48, seed=1).float()
    options = {"preset": "quantus", "substrate": "constant", "value": 0.25}
    got = found(build_metric({"name": "irof", **options}), net, x, maps, targets)
    theirs = quantus.IROF(perturb_baseline=0.25, **QUIET)
    if alone:
        there = torch.cat(
            [peer(theirs, net, x[i : i + 1], maps[i : i + 1], targets[i : i + 1]) for i in (0, 1)]
        )
        assert_close(got.values, there, **CLOSE)
        return
    there = peer(theirs, net, x, maps, targets)
    fewer = int(got.extras["segments"].argmin())
    assert got.extras["segments"][fewer] < got.extras["segments"][1 - fewer]
    score = bound(net, x, targets).scaled("probability")
    last = score(torch.full_like(x, 0.25)) / score.clean(x)
    assert_close(there[1 - fewer], got.values[1 - fewer], **CLOSE)
    assert_close(got.values[fewer] - there[fewer], last[fewer] / 2, rtol=1e-3, atol=0)


def test_quantus_cannot_remove_segments_of_more_than_one_colour(trapz):
    x, maps = blocks(1, 3, 24).float(), images(1, 24, 24, seed=1).float()
    with pytest.raises(AssertionError, match="same as the mask shape"):
        peer(quantus.IROF(**QUIET), network(3), x, maps, [1])
    assert found(IROF(rows="all"), network(3), x, maps, [1]).values.isfinite().all()


def test_quantus_takes_the_mean_of_the_batch_and_of_what_is_left(trapz):
    """So its number for an image depends on the others; ours is the image's own mean colour throughout."""
    net, maps, targets = network(1), images(2, 24, 24, seed=1).float(), [1, 3]
    x = blocks(2, 1, 24).float() + torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    whole = peer(quantus.IROF(**QUIET), net, x, maps, targets)
    alone = peer(quantus.IROF(**QUIET), net, x[:1], maps[:1], targets[:1])
    assert (whole[0] - alone[0]).abs() > 0.05
    metric = build_metric({"name": "irof", "preset": "quantus"})
    ours = found(metric, net, x, maps, targets).values
    assert_close(found(metric, net, x[:1], maps[:1], targets[:1]).values[0], ours[0])
    removed = torch.ones(1, 24, 24, dtype=torch.bool)
    assert_close(
        metric.remover(bound(net, x, targets), x)(torch.tensor([1]), removed)[0].unique(), x[1].mean()[None]
    )


def test_without_scikit_image_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("xcli.metrics.faithfulness.irof.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'xcli\[segments\]'"):
        build_metric("irof")
    assert importlib.util.find_spec("skimage") is not None


# --- what is spent -------------------------------------------------------------------------------------------


def test_ends_are_shared_between_metrics():
    seen = []
    net, x, maps = made(PooledLinear), blocks(2, 3, 16), images(3, 16, 16, seed=1)
    score = bound(net, x, [0, 1, 2], image=[0, 0, 1])
    net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    Selectivity(patch=8).measure(map=maps, x=x, score=score)
    assert sum(seen) == 3 * 3 + 2 + 1  # inner steps, the images, the one emptied image
    seen.clear()
    RegionPerturbation(patch=8, substrate="constant").measure(map=maps, x=x, score=score)
    assert sum(seen) == 3 * 3
    seen.clear()
    got = IROF(rows="all", segments=8, score="logit", substrate="constant").measure(
        map=maps, x=x, score=score
    )
    assert sum(seen) == int(got.extras["segments"].sum()) - 3
    assert len(seen) == 1


def test_irof_says_nothing_of_a_class_that_is_not_predicted(quarters):
    """One row with a score near zero would be millions, and with it the mean of a run."""
    x, maps = images(1, 3, 4, 4).abs(), torch.rand(2, 4, 4, dtype=torch.float64)
    net = Weighted(torch.stack([torch.ones(4, 4), -torch.ones(4, 4)]).double())
    score = bound(net, x, [0, 1], [0, 0])
    got = IROF().measure(map=maps, x=x, score=score).values
    assert got[0].isfinite()
    assert got[1].isnan()
    assert IROF(rows="all").measure(map=maps, x=x, score=score).values.isfinite().all()
