"""ROAD: known answers, and grad-cam's and Quantus' own numbers, preset by preset."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, SumModel, bound, images, made

from xcli.imputation import TOLERANCE, impute
from xcli.metrics.faithfulness import road
from xcli.metrics.faithfulness.road import ROAD, ROADLeRF, ROADMoRF
from xcli.registry import build_metric

ALL = (ROAD, ROADMoRF, ROADLeRF)


class Spot(nn.Module):
    """The pixel (4, 4) as the only logit."""

    def forward(self, x):
        return x[:, :1, 4, 4]


def linear(inputs, labels=5):
    """Logits of some size, each from all pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, labels, bias=False)).double()
    net[1].weight.data = 0.1 * images(labels, inputs, seed=7)
    return net.eval()


def ramp(*size):
    row, column = torch.arange(float(size[0]), dtype=torch.float64)[:, None], torch.arange(float(size[1]))
    return (2 * row - column)[None, None] + torch.zeros(1, 3, 1, 1, dtype=torch.float64)


def quiet(cls, **options):
    return cls(**{"noise": 0.0, "score": "logit", **options})


# --- where the answer is known ---------------------------------------------------------------------------------


def test_a_constant_image_loses_nothing():
    x = torch.full((1, 3, 12, 12), 0.4, dtype=torch.float64)
    score, map = bound(SumModel(), x, [0]), images(1, 12, 12)
    whole = 0.4 * 3 * 144
    assert quiet(ROAD).measure(map, x, score).values.item() == pytest.approx(0, abs=1e-9)
    for cls in (ROADMoRF, ROADLeRF):
        found = quiet(cls, percentages=(0, 30, 100)).measure(map, x, score)
        assert_close(found.curve, torch.full((1, 3), whole, dtype=torch.float64))
        assert quiet(cls, report="change").measure(map, x, score).values.item() == pytest.approx(0, abs=1e-9)


def test_a_ramp_is_known_from_its_border():
    """The map ranks an inner block first: what goes comes back. It ranks a border row first: that does not."""
    x = ramp(20, 20)
    inner, border = torch.zeros(2, 1, 20, 20, dtype=torch.float64)
    inner[:, 4:14, 5:15] = images(1, 10, 10).abs() + 1  # 100 of 400 pixels
    border[:, 0] = 1  # 20 of 400 pixels
    score = bound(SumModel(), x, [0])
    found = quiet(ROADMoRF, percentages=(10, 25), report="change").measure(inner, x, score)
    assert found.curve[0].tolist() == pytest.approx([0, 0], abs=1e-8)
    assert quiet(ROADMoRF, percentages=(5,), report="change").measure(border, x, score).values.item() > 50


def test_one_pixel_becomes_the_mean_of_its_neighbours():
    """A model that reads one pixel; 1.3 % of 81 pixels are one pixel."""
    x = images(1, 1, 9, 9)
    map = torch.zeros(1, 9, 9, dtype=torch.float64)
    map[0, 4, 4] = 1
    score = bound(Spot(), x, [0])
    own, near = x[0, 0, 4, 4], x[0, 0, 3:6, 3:6]
    sides = near[0, 1] + near[1, 0] + near[1, 2] + near[2, 1]
    mean = sides / 6 + (near.sum() - own - sides) / 12
    for report, less in (("score", 0.0), ("change", own)):
        options = {"percentages": (1.3,), "report": report}
        assert_close(quiet(ROADMoRF, **options).measure(map, x, score).values[0], mean - less)
        assert_close(quiet(ROADLeRF, **options).measure(map, x, score).values[0], own - less)
    found = quiet(ROAD, percentages=(1.3,)).measure(map, x, score)
    assert_close(found.values[0], (own - mean) / 2)
    assert_close(found.extras["lerf"][0], own)
    assert_close(found.extras["morf"][0], mean)
    found = quiet(ROADMoRF, percentages=(1.3,), report="accuracy").measure(map, x, score)
    assert found.values.item() == float(mean > 0)


def test_a_perfect_map_is_as_good_as_its_opposite_is_bad():
    """The opposite map names the same pixels from the other end, so that MoRF and LeRF change places."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(100, 1, bias=False)).double()
    net[1].weight.data = torch.where(torch.arange(100) < 30, 1.0, 0.0).double()[None]
    x = images(1, 1, 10, 10).abs()
    x[0, 0, 3:] = 0  # all that counts lies in the first three rows
    perfect = (x * net[1].weight.view(1, 1, 10, 10))[:, 0] - 1e-3 * torch.arange(100.0).view(1, 10, 10)
    score = bound(net, x, [0])
    good, bad = (quiet(ROAD).measure(sign * perfect, x, score) for sign in (1, -1))
    assert good.values.item() > 3
    assert_close(bad.values, -good.values)
    assert_close(bad.extras["morf"], good.extras["lerf"])
    found = quiet(ROADLeRF, percentages=(20, 60), report="change").measure(perfect, x, score)
    assert_close(found.values, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-9)


def test_accuracy_is_whether_the_target_still_wins():
    x, net = images(6, 3, 10, 10), linear(300)
    map, targets = images(6, 10, 10, seed=1), net(x).argmax(1).tolist()
    score = bound(net, x, targets)
    found = ROADMoRF(percentages=(2, 10, 90), report="accuracy", noise=0).measure(map, x, score)
    for column, share in enumerate((0.02, 0.1, 0.9)):
        removed = map.flatten(1).argsort(dim=1, descending=True).argsort(1) < int(share * 100)
        wins = net(impute(x, removed.view(6, 10, 10))[0]).argmax(1) == torch.tensor(targets)
        assert found.curve[:, column].tolist() == wins.double().tolist()
    assert found.curve.unique().tolist() == [0, 1]


# --- noise, levels, sharing ------------------------------------------------------------------------------------


def test_noise_falls_on_removed_pixels_alone_and_is_the_images_own():
    x = torch.zeros(2, 1, 100, 100, dtype=torch.float64)
    seen = []

    class Watch(SumModel):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    map = torch.arange(10000.0, 0, -1).view(1, 100, 100).double().expand(2, 100, 100)
    score = bound(Watch(), x, [0, 0])
    seen.clear()
    ROADMoRF(percentages=(20, 60), score="logit").measure(map, x, score)
    first, second, other, _ = torch.cat(seen)[:, 0]
    assert first[:20].std().item() == pytest.approx(0.01, rel=0.05)
    assert first[20:].abs().max() == 0
    assert torch.equal(first[:20], second[:20])
    assert second[60:].abs().max() == 0
    assert not torch.isclose(first[:20], other[:20]).any()


@pytest.mark.parametrize("least", [False, True])
def test_percentiles_are_numpys_with_ties_and_without(least):
    maps = torch.stack([images(15, 11), images(15, 11).round(), images(15, 11).relu(), torch.ones(15, 11)])
    percentages = (0, 7, 20, 37.5, 50, 80, 100)
    found = ROAD(convention="percentile", percentages=percentages)
    levels, share = found.levels()
    assert levels == sorted(percentages, reverse=True)
    assert_close(share, torch.tensor([0, 0.2, 0.5, 0.625, 0.8, 0.93, 1], dtype=torch.float64))
    wanted = [
        [int((own >= np.percentile(own, p)).sum()) for p in levels]
        for own in (-maps if least else maps).numpy()
    ]
    assert found.counts(maps, least=least).tolist() == wanted


def test_three_metrics_impute_once(monkeypatch):
    x, net, map = images(2, 3, 10, 10), made(PooledLinear), images(3, 10, 10)
    seen = []
    monkeypatch.setattr(road, "impute", lambda *given: seen.append(len(given[0])) or impute(*given))
    score = bound(net, x, [0, 3, 1], [0, 0, 1])
    found = [cls().measure(map, x, score) for cls in ALL]
    assert sum(seen) == 3 * 4 * 2
    assert_close(found[0].values, (found[2].values - found[1].values) / 2)
    assert_close(found[0].curve, (found[2].curve - found[1].curve) / 2)
    assert_close(found[0].extras["morf"], found[1].values)
    ROADMoRF(report="change").measure(map, x, score)
    assert sum(seen) == 24, "another report of the same scores"
    ROADMoRF().measure(map.clone(), x, score)
    assert sum(seen) == 36, "another map"
    ROADMoRF(noise=0).measure(map, x, score)
    assert sum(seen) == 48, "another noise"


@pytest.mark.parametrize(("solver", "most"), [("exact", 1e-12), ("multigrid", TOLERANCE)])
def test_the_output_says_how_exact_it_is(solver, most):
    x, map = images(2, 3, 24, 24), images(2, 24, 24)
    score = bound(made(PooledLinear), x, [0, 1], micro_batch=3)
    for cls in ALL:
        found = cls(solver=solver).measure(map, x, score)
        assert found.extras["residual"].shape == (2,)
        assert (found.extras["residual"] > 0).all()
        assert (found.extras["residual"] <= most).all()
        exact = cls(solver="exact").measure(map, x, score)
        assert_close(found.curve, exact.curve, rtol=0, atol=1e-5)
        assert found.fraction.tolist() == [0.2, 0.4, 0.6, 0.8]


def test_a_map_that_is_not_finite_has_no_value():
    x, map = images(2, 3, 8, 8), images(2, 8, 8)
    map[1, 2, 3] = torch.nan
    for cls in ALL:
        for report in ("score", "change", "accuracy"):
            found = cls(report=report).measure(map, x, bound(made(PooledLinear), x, [0, 1]))
            assert found.values.isnan().tolist() == [False, True]


# --- grad-cam --------------------------------------------------------------------------------------------------


@pytest.fixture
def grad_cam(monkeypatch):
    """Its metrics without noise, on pictures, maps in [0, 1] and a network in float32."""
    from pytorch_grad_cam.metrics import road as theirs
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    class Quiet(theirs.NoisyLinearImputer):
        def __init__(self):
            super().__init__(noise=0)

    monkeypatch.setattr(theirs, "NoisyLinearImputer", Quiet)
    net, x, targets = linear(3 * 14 * 17).float(), images(2, 3, 14, 17).float(), [1, 4]
    maps = images(2, 14, 17, seed=3)
    maps[1] = maps[1].round(decimals=1)  # ties
    maps = (
        (maps - maps.amin((1, 2), keepdim=True)) / (maps.amax((1, 2)) - maps.amin((1, 2)))[:, None, None]
    ).float()

    def run(metric):
        goals = [ClassifierOutputSoftmaxTarget(target) for target in targets]
        return torch.from_numpy(metric(x, maps.numpy(), goals, net))

    return SimpleNamespace(theirs=theirs, run=run, given=(maps, x, bound(net, x, targets)))


def ours(grad_cam, name, **options):
    metric = build_metric({"name": name, "preset": "grad-cam", "noise": 0, **options})
    return metric.measure(*grad_cam.given).values


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("p", [20, 50, 90])
def test_single_percentiles_of_grad_cam(grad_cam, p):
    morf = grad_cam.run(grad_cam.theirs.ROADMostRelevantFirst(p))
    lerf = grad_cam.run(grad_cam.theirs.ROADLeastRelevantFirst(p))
    assert morf.abs().min() > 5e-4
    assert_close(ours(grad_cam, "road-morf", percentages=[p]), morf, rtol=0, atol=1e-6)
    assert_close(ours(grad_cam, "road-lerf", percentages=[p]), lerf, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_averages_of_grad_cam(grad_cam):
    theirs = grad_cam.theirs
    for name, metric in (
        ("road-morf", theirs.ROADMostRelevantFirstAverage()),
        ("road-lerf", theirs.ROADLeastRelevantFirstAverage()),
        ("road", theirs.ROADCombined()),
    ):
        assert_close(ours(grad_cam, name), grad_cam.run(metric), rtol=0, atol=1e-6)
    combined = grad_cam.run(theirs.ROADCombined([20, 40, 60, 80]))
    assert_close(ours(grad_cam, "road", percentages=[20, 40, 60, 80]), combined, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_map_with_many_zeros_empties_the_image(grad_cam):
    """Its 20th percentile is its lowest value, at which all pixels are: grad-cam solves a singular system, and gives
    whatever comes of it; ours is the image's mean colour."""
    maps, x, score = grad_cam.given
    maps = (maps - 0.5).relu()
    assert (maps == 0).flatten(1).double().mean(1).min() > 0.2
    metric = ROADMoRF(convention="percentile", percentages=(20,), noise=0)
    assert metric.counts(maps, least=False).tolist() == [[238], [238]]
    mean = x.mean((2, 3), keepdim=True).expand(x.shape)
    assert_close(metric.measure(maps, x, score).values, score.scaled("probability")(mean))
    theirs = grad_cam.theirs.RemoveMostRelevantFirst(20, grad_cam.theirs.NoisyLinearImputer())(x[0], maps[0])
    assert not torch.isclose(theirs, mean[0], rtol=0, atol=1e-3).any()


# --- Quantus ---------------------------------------------------------------------------------------------------


def quantus_road(net, x, targets, maps, batch_size=64):
    import quantus

    metric = quantus.ROAD(noise=0, normalise=False, disable_warnings=True)
    return metric(
        model=net,
        x_batch=x.numpy(),
        y_batch=np.array(targets),
        a_batch=maps[:, None].numpy(),
        batch_size=batch_size,
    )


@pytest.mark.filterwarnings("ignore")
def test_the_curve_of_quantus_on_gray_images():
    x, maps, net = images(4, 1, 12, 12).float(), images(4, 12, 12, seed=1).float(), linear(144).float()
    targets = net(x).argmax(1).tolist()
    theirs = quantus_road(net, x, targets, maps)
    metric = build_metric({"name": "road-morf", "preset": "quantus", "noise": 0})
    found = metric.measure(maps, x, bound(net, x, targets))
    assert list(theirs) == [round(100 * share) for share in found.fraction.tolist()]
    curve = found.curve.mean(0).tolist()
    assert curve == pytest.approx([float(value) for value in theirs.values()])
    assert len(set(curve)) > 2


@pytest.mark.filterwarnings("ignore")
def test_quantus_counts_the_first_batch_alone_and_takes_no_colours():
    x, maps, net = images(4, 1, 12, 12).float(), images(4, 12, 12, seed=1).float(), linear(144).float()
    targets = net(x).argmax(1).tolist()
    in_parts = quantus_road(net, x, targets, maps, batch_size=2)
    assert in_parts == quantus_road(net, x[:2], targets[:2], maps[:2])
    assert in_parts != quantus_road(net, x, targets, maps)
    colours, net = images(4, 3, 12, 12).float(), linear(432).float()
    with pytest.raises(IndexError):
        quantus_road(net, colours, targets, maps)
    found = ROADMoRF(report="accuracy").measure(maps, colours, bound(net, colours, targets))
    assert found.values.isfinite().all()
