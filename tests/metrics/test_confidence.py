"""Images multiplied with their maps: answers known by hand, and the packages' definitions, preset by preset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM as PeerGradCAM
from pytorch_grad_cam.metrics.arcc import Coherency, Complexity
from pytorch_grad_cam.metrics.cam_mult_image import (
    CamMultImageConfidenceChange,
    DropInConfidence,
    IncreaseInConfidence,
)
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget
from scipy.stats import pearsonr
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, SumModel, bound, images, made

from xcli.methods.cam.gradient import GradCAM
from xcli.registry import build_metric

FAMILY = [
    "average-drop",
    "average-gain",
    "confidence-change",
    "drop-in-confidence",
    "increase-in-confidence",
]
TARGETS, IMAGE = [4, 1, 4, 2, 4], [0, 0, 1, 2, 2]


class Wild(PooledLinear):
    """Probabilities that move with the image, and no activation overwritten after a hook has seen it."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        with torch.no_grad():
            self.head.bias -= super().forward(torch.full((1, 3, 12, 12), 0.5))[0]

    def forward(self, x):
        return 60 * super().forward(x)


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def value(name, x, map, net=None, **options):
    metric = build_metric({"name": name, **options})
    return metric.measure(map=map, x=x, score=bound(net or SumModel(), x, [0] * len(x)))


def scene(rows=5, size=(12, 10), flat=None):
    net, x, map = made(Wild), images(3, 3, *size), images(rows, *size, seed=1)
    if flat is not None:
        map[flat] = 0.7
    return net, x, map


# --- known answers -------------------------------------------------------------------------------------------

X = torch.tensor([[[[4.0, 2.0], [3.0, -1.0]]]], dtype=torch.float64)  # sums up to 8
MAP = torch.tensor(
    [[[5.0, 3.0], [4.0, 1.0]]], dtype=torch.float64
)  # n = 1, 0.5, 0.75, 0: leaves 4 + 1 + 2.25


@pytest.mark.parametrize(
    ("name", "x", "map", "expected"),
    [
        ("average-drop", X, MAP, 0.75 / 8),
        ("drop-in-confidence", X, MAP, 0.75),
        ("confidence-change", X, MAP, -0.75),
        ("increase-in-confidence", X, MAP, 0),
        ("increase-in-confidence", -X, MAP, 1),
        ("drop-in-confidence", -X, MAP, 0),
        ("confidence-change", -X, MAP, 0.75),
        ("average-gain", -X, MAP, 0.75 / 9),
        ("average-gain", X / 10, -MAP, 0),  # n = 0, 0.5, 0.25, 1
    ],
)
def test_a_sum_model_loses_what_the_map_hides(name, x, map, expected):
    assert_close(value(name, x, map, score="logit").values, row(expected))


def test_probabilities_are_watched_unless_told_otherwise():
    before, after = torch.sigmoid(row(0.8)), torch.sigmoid(row(0.725))
    assert_close(value("average-drop", X / 10, MAP).values, (before - after) / before)
    gain = (torch.sigmoid(row(-0.725)) - torch.sigmoid(row(-0.8))) / torch.sigmoid(row(0.8))
    assert_close(value("average-gain", -X / 10, MAP).values, gain)


def test_the_inverse_keeps_what_the_map_does_not_show():
    found = value("confidence-change", X, MAP, score="logit")
    assert_close(found.extras["inverse"], row(-7.25))


def test_magnitude_scales_the_absolute_map():
    map = row(1.0, -5.0, 3.0, 2.0).view(1, 2, 2)  # |.| scaled: 0, 1, 0.5, 0.25
    assert_close(value("confidence-change", X, map, score="logit", magnitude=True).values, row(3.25 - 8))


def test_a_flat_map_has_no_answer_unless_it_keeps_nothing():
    for flat in (torch.full_like(MAP, 3.0), torch.zeros_like(MAP)):
        assert value("average-drop", X, flat).values.isnan().all()
        assert_close(value("average-drop", X, flat, score="logit", flat="nothing").values, row(1))
        change = value("confidence-change", X, flat, score="logit", preset="grad-cam")
        assert_close(torch.cat([change.values, change.extras["inverse"]]), row(-8, 0))
        assert value("confidence-change", X, flat).extras["inverse"].isnan().all()


@pytest.mark.parametrize("name", FAMILY)
def test_no_number_is_made_up_for_a_map_that_is_not_finite(name):
    bad = MAP.clone()
    bad[0, 0, 1] = torch.nan
    assert value(name, X, bad).values.isnan().all()
    assert value(name, X, bad, flat="nothing").values.isnan().all()


def test_there_is_no_share_of_nothing():
    assert value("average-drop", -X, MAP, score="logit").values.isnan().all()  # f(x) = -8
    assert value("average-gain", X, MAP, score="logit").values.isnan().all()  # f(x) = 8, above 1
    assert value("average-gain", 1000 * X, MAP).values.isnan().all()  # a probability of exactly 1


def test_metrics_that_multiply_share_their_passes():
    net, x, map = scene(rows=3)
    score, seen = bound(net, x, [0, 1, 2]), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    for name in FAMILY:
        build_metric(name).measure(map=map, x=x, score=score)
    assert seen == [3, 3, 3]  # the images, times the map, times its inverse
    build_metric("average-drop").measure(map=map.clone(), x=x, score=score)
    assert seen == [3, 3, 3, 3]  # another map is another map


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*FAMILY, "adcc"])
def test_numbers_come_in_the_type_of_the_images(name, dtype):
    net, x, map = scene()
    net, x, map = net.to(dtype), x.to(dtype), map.to(dtype)
    metric = build_metric(name)
    given = {"map": map, "x": x, "score": bound(net, x, TARGETS, IMAGE), "method": lambda score, x: map}
    found = metric.measure(**{name: given[name] for name in metric.consumes})
    assert {part.dtype for part in (found.values, *found.extras.values())} == {dtype}


# --- grad-cam ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["probability", "logit"])
@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("confidence-change", CamMultImageConfidenceChange),
        ("drop-in-confidence", DropInConfidence),
        ("increase-in-confidence", IncreaseInConfidence),
    ],
)
def test_the_grad_cam_presets_equal_grad_cam(name, peer, scale):
    net, x, map = scene(flat=3)
    chosen = {"probability": ClassifierOutputSoftmaxTarget, "logit": ClassifierOutputTarget}[scale]
    goals = [chosen(target) for target in TARGETS]
    cams = np.stack([(one - one.min()) / (1e-7 + (one - one.min()).max()) for one in map.numpy()])
    expected = peer()(x[IMAGE], cams, goals, net)
    metric = build_metric({"name": name, "preset": "grad-cam", "score": scale})
    found = metric.measure(map=map, x=x, score=bound(net, x, TARGETS, IMAGE))
    assert len(set(expected.tolist())) > 1
    assert_close(found.values, torch.from_numpy(expected).double(), rtol=1e-5, atol=1e-5)
    if name == "confidence-change":
        inverse = peer()(x[IMAGE], 1 - cams, goals, net)
        assert_close(found.extras["inverse"], torch.from_numpy(inverse).double(), rtol=1e-5, atol=1e-5)


def test_grad_cam_does_not_divide_the_drop():
    net, x, map = scene()
    score = bound(net, x, TARGETS, IMAGE)
    ours = build_metric("average-drop").measure(map=map, x=x, score=score).values
    theirs = build_metric("drop-in-confidence").measure(map=map, x=x, score=score).values
    assert_close(ours, theirs / score.scaled("probability").clean(x))
    assert (ours - theirs).abs().max() > 0.05


# --- Xplique and torch-cam, written out ----------------------------------------------------------------------


def xplique(net, x, map, target):
    """|map|, min-max with 1e-8, one image at a time: average drop, increase, gain."""
    mask = map.abs()
    mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
    base, after = (net(one[None]).softmax(1)[0, target] for one in (x, x * mask))
    return [(base - after).relu() / (base + 1e-8), after > base, (after - base).relu() / (1 - base + 1e-8)]


def torchcam(net, x, map, target):
    """The map min-max scaled, NaN replaced by 0: average drop, increase."""
    mask = ((map - map.min()) / (map.max() - map.min())).nan_to_num(0)
    base, after = (net(one[None]).softmax(1)[0, target] for one in (x, x * mask))
    return [(base - after).relu() / (base + 1e-7), base < after]


@pytest.mark.parametrize(
    ("preset", "peer", "names"),
    [
        ("xplique", xplique, ["average-drop", "increase-in-confidence", "average-gain"]),
        ("torch-cam", torchcam, ["average-drop", "increase-in-confidence"]),
    ],
)
def test_presets_equal_their_package_written_out(preset, peer, names):
    net, x, map = scene(flat=2)
    with torch.no_grad():
        rows = [peer(net, x[i], map[r], t) for r, (i, t) in enumerate(zip(IMAGE, TARGETS))]
    for name, expected in zip(names, zip(*rows)):
        metric = build_metric({"name": name, "preset": preset})
        found = metric.measure(map=map, x=x, score=bound(net, x, TARGETS, IMAGE)).values
        assert_close(found, torch.stack(expected).double(), rtol=1e-5, atol=1e-7)
        plain = build_metric(name).measure(map=map, x=x, score=bound(net, x, TARGETS, IMAGE)).values
        assert plain.isnan().tolist() == [False, False, True, False, False]


# --- ADCC ----------------------------------------------------------------------------------------------------

HALF = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
UPPER = torch.tensor([[[[2.0, 1.0], [0.0, 0.0]]]], dtype=torch.float64)  # nothing to lose below


def adcc(x, map, again, net=None):
    score = bound(net or SumModel(), x, [0] * len(x))
    return build_metric("adcc").measure(map=map, x=x, score=score, method=lambda score, x: again)


def test_half_a_map_that_repeats_itself_and_loses_nothing():
    found = adcc(UPPER, HALF, 3 * HALF + 1)
    assert_close(torch.stack(list(found.extras.values())), row(1, 0.5, 0)[:, None])
    assert list(found.extras) == ["coherency", "complexity", "drop"]
    assert_close(found.values, row(3 / (1 + 2 + 1)))


def test_the_worst_of_one_is_the_worst_of_all():
    assert_close(adcc(UPPER, HALF, -HALF).values, row(0))
    assert_close(adcc(1e4 * UPPER - 5e3, 1 - HALF, 1 - HALF).values, row(0))  # all is lost


def test_a_flat_map_or_repetition_has_no_coherency():
    assert adcc(UPPER, HALF, torch.zeros_like(HALF)).values.isnan().all()
    assert adcc(UPPER, torch.ones_like(HALF), HALF).values.isnan().all()


def test_each_row_is_explained_on_its_own_image():
    net, x, map = scene()
    seen = []

    def method(score, images):
        seen.append((score, images))
        return map.flip(0)

    build_metric("adcc").measure(map=map, x=x, score=bound(net, x, TARGETS, IMAGE), method=method)
    ((score, masked),) = seen
    scaled = torch.stack([(one - one.min()) / (one.max() - one.min()) for one in map])
    assert_close(masked, x[IMAGE] * scaled[:, None])
    assert_close(score(masked), net(masked)[range(5), TARGETS])
    assert list(score.keys) == [f"image-{i}" for i in IMAGE]


def cam_case():
    net, x = made(Wild), images(4, 3, 12, 16)
    target = net(x).argmax(1).tolist()
    score, method = bound(net, x, target), GradCAM(layer="features")

    def explain(score, x):
        return method.explain(score, x, (12, 16)).map

    return net, x, target, score, explain


def authors(net, x, map, again, target=None):
    """The code of the paper for one image: the class is the most probable, the map is scaled already."""
    out = net(x).softmax(1)
    masked = net(x * map).softmax(1)
    best = out.max(1)[0].item()
    target = out.max(1)[1].item() if target is None else target
    drop = max(0.0, best - masked[0, target].item()) / best
    coherency = (pearsonr(map.flatten(), again.flatten())[0] + 1) / 2
    complexity = (map.abs().sum() / map.numel()).item()
    return 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))


def scaled_one_by_one(maps):
    return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in maps])


def test_adcc_equals_the_authors_on_the_predicted_class():
    net, x, _target, score, explain = cam_case()
    map = explain(score, x)
    found = build_metric("adcc").measure(map=map, x=x, score=score, method=explain).values
    scaled = scaled_one_by_one(map)
    again = explain(score, x * scaled[:, None])
    with torch.no_grad():
        expected = [authors(net, x[i : i + 1], scaled[i], again[i]) for i in range(len(x))]
    assert_close(found, row(*expected))


def test_the_authors_compare_another_class_with_the_highest_probability():
    net, x, target, _score, _explain = cam_case()
    other = (target[0] + 1) % 5
    map = scaled_one_by_one(images(1, 12, 16, seed=4))
    found = build_metric("adcc").measure(
        map=map, x=x[:1], score=bound(net, x[:1], [other]), method=lambda *_: map
    )
    with torch.no_grad():
        before, after = (net(one).softmax(1)[0, other] for one in (x[:1], x[:1] * map))
        theirs = authors(net, x[:1], map[0], map[0], other)
    drop = (before - after).relu() / before
    assert_close(found.values[0], 3 / (1 + 1 / (1 - map.mean()) + 1 / (1 - drop)))
    assert abs(found.values[0].item() - theirs) > 0.01


def test_coherency_and_complexity_equal_grad_cam():
    net, x, target, score, explain = cam_case()
    map = explain(score, x)
    found = build_metric("adcc").measure(map=map, x=x, score=score, method=explain).extras
    scaled = scaled_one_by_one(map).float().numpy()
    goals = [ClassifierOutputTarget(t) for t in target]
    with PeerGradCAM(net, [net.features]) as cam:
        coherency = Coherency()(x, scaled, goals, net, cam)
    assert_close(found["coherency"], torch.from_numpy(coherency).double(), rtol=1e-4, atol=1e-4)
    assert_close(found["complexity"], torch.from_numpy(Complexity()(scaled)).double(), rtol=1e-5, atol=1e-5)
