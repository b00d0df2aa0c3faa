"""The engine of the perturbation family: what shares a pass, what is held at once, and when an image has had enough."""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import Residual, bound, images, made

from xcli import draws
from xcli.errors import ConfigError, MemoryExhausted
from xcli.execution import Execution
from xcli.methods.perturbation import base
from xcli.methods.perturbation.base import Design, Estimate, Sampling, asked, blended, numbered
from xcli.methods.perturbation.occlusion import FeatureAblation, Occlusion
from xcli.methods.perturbation.rise import RISE
from xcli.registry import build, options
from xcli.targets import ClassRows

EXACT = {"rtol": 1e-10, "atol": 1e-13}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 3]}
"""Rows about three of four images."""


@pytest.fixture
def as_it_is(monkeypatch):
    """Micro-batches as large as they were told to be; small pictures would all go at once."""
    monkeypatch.setattr(Execution, "part", lambda self, inputs: self)


def watched(net, run):
    """What ``run()`` gives, and the size of each pass of ``net``."""
    seen = []
    handle = net.register_forward_pre_hook(lambda _net, given: seen.append(len(given[0])))
    try:
        return run(), seen
    finally:
        handle.remove()


class Copies:
    """Images dimmed by their sample number; remembers what was made."""

    def __init__(self, x):
        self.x, self.made = x, []

    def __call__(self, image, sample):
        self.made.append(list(zip(image.tolist(), sample.tolist())))
        return self.x[image] * self.at(sample)[:, None, None, None]

    @staticmethod
    def at(sample):
        return 1 / (1 + sample.double())


# ---- numbers and blends ------------------------------------------------------------------------------------------


def test_samples_are_numbered_image_by_image():
    count = torch.tensor([2, 5, 0, 3])
    image, sample = numbered(count, torch.tensor([0, 2, 3]))
    assert image.tolist() == [0, 0, 3, 3, 3]
    assert sample.tolist() == [0, 1, 0, 1, 2]
    for none in (numbered(count, torch.tensor([2])), numbered(count, torch.zeros(0, dtype=torch.long))):
        assert [len(part) for part in none] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["none", "sides of 1", "full"])
def test_blends_go_from_the_other_picture_to_the_image_and_are_exact_at_both_ends(kind, dtype):
    x, image = images(3, 2, 4, 5).to(dtype), torch.tensor([2, 0, 2])
    other = {"none": None, "sides of 1": images(3, 2, 1, 1, seed=4), "full": images(3, 2, 4, 5, seed=4)}[kind]
    other = None if other is None else other.to(dtype)
    there = torch.zeros_like(x) if other is None else other.expand(x.shape)
    mask = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask[:, 0], mask[:, 1] = 0, 1
    found = blended(x, other, image, mask)
    assert found.dtype == dtype
    assert torch.equal(found[:, :, 0], there[image][:, :, 0])
    assert torch.equal(found[:, :, 1], x[image][:, :, 1])
    expected = x[image] * mask[:, None] + there[image] * (1 - mask[:, None])
    assert_close(found, expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6)


# ---- one table of scores ------------------------------------------------------------------------------------------


def test_copies_of_all_images_share_micro_batches(as_it_is):
    net, x = made(Residual), images(3, 3, 6, 5)
    copies, score = Copies(x), bound(net, x, [0, 1, 2], micro_batch=4)
    given = numbered(torch.full((3,), 5), torch.arange(3))
    _, sizes = watched(net, lambda: asked(score, x, *given, copies))
    assert sizes == [4, 4, 4, 3]
    assert copies.made[1] == [(0, 4), (1, 0), (1, 1), (1, 2)]
    assert [one for part in copies.made for one in part] == list(zip(*(part.tolist() for part in given)))


def test_small_pictures_go_more_at_once_than_the_micro_batch_of_the_network():
    net, x = made(Residual), images(3, 3, 6, 5)
    score = bound(net, x, [0, 1, 2], micro_batch=4)
    given = numbered(torch.full((3,), 5), torch.arange(3))
    assert watched(net, lambda: asked(score, x, *given, Copies(x)))[1] == [15]
    assert score.execution.micro_batch == 4


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_the_table_has_the_score_of_each_sample_for_each_row_and_zero_where_nothing_was_asked(
    micro_batch, as_it_is
):
    net, x = made(Residual), images(4, 3, 6, 5)
    score, count = bound(net, x, **ROWS, micro_batch=micro_batch), torch.tensor([3, 1, 2, 5])
    table = asked(score, x, *numbered(count, torch.tensor([0, 1, 3])), Copies(x))
    expected = torch.zeros(4, 5, dtype=torch.float64)
    with torch.no_grad():
        for row, (target, image) in enumerate(zip(*ROWS.values())):
            for sample in range(int(count[image])):
                expected[row, sample] = net(x[image : image + 1] / (1 + sample))[0, target]
    assert_close(table, expected, **EXACT)
    some = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 3])  # not every sample
    table = asked(score, x, *some, Copies(x))
    assert (table != 0).nonzero().tolist() == [[0, 2], [1, 2], [2, 0], [2, 3]]
    assert_close(table[:2, 2], expected[:2, 2], **EXACT)


def test_a_pass_of_a_copy_serves_all_rows_of_its_image(as_it_is):
    net, x = made(Residual), images(2, 3, 6, 5)
    given, seen = numbered(torch.tensor([5, 5]), torch.arange(2)), {}
    for rows in (1, 4):
        score = bound(net, x, list(range(rows)) * 2, [0] * rows + [1] * rows, micro_batch=4)
        table, seen[rows] = watched(net, lambda score=score: asked(score, x, *given, Copies(x)))
        assert table.shape == (2 * rows, 5)
    assert seen[1] == seen[4] == [4, 4, 2]


def test_images_without_rows_cost_nothing():
    net, x = made(Residual), images(4, 3, 6, 5)
    copies, score = Copies(x), bound(net, x, **ROWS)
    table, sizes = watched(
        net, lambda: asked(score, x, *numbered(torch.full((4,), 3), torch.arange(4)), copies)
    )
    assert sum(sizes) == 9
    assert {image for part in copies.made for image, _ in part} == {0, 1, 3}
    assert table.shape == (4, 3)
    for method, passes in (
        (Occlusion(patch=3, stride=3), 3 * 4 + 3),
        (FeatureAblation(segments="grid:2"), 3 * 4 + 3),
        (RISE(masks=7), 3 * 7),
        (RISE(masks=7, until={"stable": 0.5}), 3 * 7),
    ):
        score = bound(net, x, **ROWS)
        found, sizes = watched(net, lambda method=method, score=score: method.attribute(score, x))
        assert sum(sizes) == passes
        assert found.map.shape == (4, 6, 5)
    nothing = torch.zeros(0, dtype=torch.long)
    blank = replace(score, rows=ClassRows(nothing, nothing))
    for method in (RISE(masks=7), RISE(masks=7, until={"stable": 0.5})):
        found, sizes = watched(net, lambda method=method: method.attribute(blank, x))
        assert (sizes, tuple(found.map.shape)) == ([], (0, 6, 5))


def test_nothing_asked_is_an_empty_table():
    net, x = made(Residual), images(2, 3, 6, 5)
    nothing = torch.zeros(0, dtype=torch.long)
    score = bound(net, x, [0, 1])
    table, sizes = watched(net, lambda: asked(score, x, nothing, nothing, Copies(x)))
    assert (tuple(table.shape), sizes) == ((2, 0), [])


def test_passes_run_in_inference_mode_and_leave_no_graph():
    net, x, modes = made(Residual), images(2, 3, 6, 5).requires_grad_(), []
    given, score = numbered(torch.tensor([2, 2]), torch.arange(2)), bound(net, x, [0, 1])
    handle = net.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    table = asked(score, x, *given, Copies(x))
    maps = [method.attribute(score, x).map for method in (RISE(masks=5), Occlusion(patch=3))]
    handle.remove()
    assert set(modes) == {True}
    for found in (table, *maps):
        assert not found.requires_grad
        assert not found.is_inference()  # or it could be used in no training


@pytest.mark.parametrize("method", [RISE(masks=6), Occlusion(patch=3), FeatureAblation(segments="grid:2")])
def test_where_graphs_are_asked_for_maps_can_be_differentiated_by_the_weights(method):
    net, x = made(Residual), images(2, 3, 6, 5)
    score = replace(bound(net, x, [0, 1, 2], [0, 0, 1]), create_graph=True)
    weight, step = net.stem.weight, images(6, 3, 3, 3, seed=3)
    (slope,) = torch.autograd.grad(method.explain(score, x).map.square().sum(), weight)

    def loss(by):
        with torch.no_grad():
            weight.add_(by * step)
            found = method.explain(bound(net, x, [0, 1, 2], [0, 0, 1]), x).map.square().sum()
            weight.sub_(by * step)
        return found

    expected = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert expected.abs() > 1e-4
    assert_close((slope * step).sum(), expected, rtol=1e-5, atol=1e-9)


# ---- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 4, 16])
def test_only_the_copies_of_one_micro_batch_are_made_at_once(micro_batch, as_it_is, monkeypatch):
    from xcli.methods.perturbation.rise import Masks

    sizes, plain = [], Masks.altered

    def altered(self, image, sample):
        sizes.append(len(image))
        return plain(self, image, sample)

    monkeypatch.setattr(Masks, "altered", altered)
    net, x = made(Residual), images(3, 3, 6, 5)
    RISE(masks=50).attribute(bound(net, x, [0, 1, 2], micro_batch=micro_batch), x)
    assert sizes == [micro_batch] * (150 // micro_batch) + [150 % micro_batch] * (150 % micro_batch > 0)


@pytest.mark.parametrize(
    "method", [RISE(masks=90), Occlusion(patch=2, stride=1), FeatureAblation(segments="grid:9")]
)
def test_what_is_held_does_not_grow_with_the_passes_that_have_been(method, as_it_is):
    net, x, held = made(Residual), images(2, 3, 13, 11), []
    score = bound(net, x, [0, 1, 2], [0, 0, 1], micro_batch=4)

    def count(_net, _given):
        held.append(
            sum(one.numel() for one in gc.get_objects() if type(one) is Tensor and one.shape[-2:] == (13, 11))
            if len(held) in (3, 30)
            else 0
        )

    handle = net.register_forward_pre_hook(count)
    method.attribute(score, x)
    handle.remove()
    assert len(held) > 31
    assert held[30] == held[3] > 0


def limited(most):
    def refuse(_net, given):
        if len(given[0]) > most:
            raise torch.OutOfMemoryError("out of memory")

    return refuse


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize(
    "method", [RISE(masks=30), RISE(masks=150, until={"stable": 0.5}), Occlusion(patch=2), FeatureAblation()]
)
def test_where_memory_runs_out_the_micro_batch_is_halved_and_nothing_changes(method, most, as_it_is):
    net, x = made(Residual), images(3, 3, 6, 5)
    expected = method.attribute(bound(net, x, [0, 1, 2], micro_batch=16), x)
    score = bound(net, x, [0, 1, 2], micro_batch=16)
    handle = net.register_forward_pre_hook(limited(most))
    found, sizes = watched(net, lambda: method.attribute(score, x))
    handle.remove()
    assert score.execution.micro_batch == {1: 1, 2: 2, 5: 4}[most]
    assert max(sizes[3:]) <= most
    assert_close(found.map, expected.map, rtol=1e-10, atol=1e-12)
    assert torch.equal(found.extras["forwards"], expected.extras["forwards"])


def test_copies_are_made_again_where_memory_ran_out_and_a_single_one_that_does_not_fit_is_said(as_it_is):
    net, x = made(Residual), images(2, 3, 6, 5)
    given = numbered(torch.tensor([4, 4]), torch.arange(2))
    copies, score = Copies(x), bound(net, x, [0, 1], micro_batch=8)
    handle = net.register_forward_pre_hook(limited(4))
    asked(score, x, *given, copies)
    handle.remove()
    assert [len(part) for part in copies.made] == [8, 4, 4]
    assert copies.made[0] == copies.made[1] + copies.made[2]
    handle = net.register_forward_pre_hook(limited(0))
    with pytest.raises(MemoryExhausted, match="out of memory with a single input"):
        asked(score, x, *given, copies)
    handle.remove()


# ---- sampling -----------------------------------------------------------------------------------------------------


@options
class Dimmed(Sampling):
    """The mean score of an image whose green is dimmed by random numbers, times a ramp from 0 to 1; unlike RISE, each
    image may have a count of its own."""

    name: ClassVar[str] = "dimmed"
    most: tuple[int, ...] = (1000, 1000, 1000)
    unit: int = 1

    def design(self, score, x):
        seeds = score.seeds(torch.arange(len(x)), self.name)
        return Numbers(x, seeds, score.image, torch.tensor(self.most)[: len(x)], self.unit)


@dataclass
class Numbers(Design):
    x: Tensor
    seeds: Tensor
    image: Tensor
    count: Tensor
    unit: int

    def altered(self, image, sample):
        copies = self.x[image]
        copies[:, 1] *= draws.uniform(draws.sampled(self.seeds[image], sample), 1)[:, :, None]
        return copies

    def estimate(self, row, scores):
        maps, errors = [], []
        for own, image in zip(scores, self.image[row].tolist()):
            own = own[: int(self.count[image])]
            maps.append(own.mean() * ramp())
            errors.append(own.std() / math.sqrt(len(own)) * ramp().square().mean().sqrt())
        return Estimate(torch.stack(maps), torch.stack(errors))


def ramp():
    return torch.linspace(0, 1, 30, dtype=torch.float64).view(6, 5)


class Known(nn.Module):
    """Logit 0 is always 0, logit 1 the mean of the pixels plus a number of the image, logit 2 that number alone."""

    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([0 * mean, mean, 0 * mean + 0.7123], 1)


LOOKS = [128, 256, 384, 512, 640, 800, 1000, 1250]


def shown():
    """Red images whose upper left is green, each more so than the last."""
    x = torch.zeros(3, 3, 6, 5, dtype=torch.float64)
    x[:, 0] = 1
    x[:, 1, :3, :2] = torch.tensor([4.0, 8.0, 30.0])[:, None, None]
    return x


def dimmed(score, x, image, most):
    """The first scores of logit 1 that ``Dimmed`` meets."""
    own = score.seeds(torch.tensor([image]), "dimmed").expand(most)
    by = draws.uniform(draws.sampled(own, torch.arange(most)), 1)[:, 0]
    return (x[image, 0].sum() + by * x[image, 1].sum()) / 90


def stops(score, x, image, stable, most=1000):
    """After how many samples the mean is known well enough."""
    number, rms = dimmed(score, x, image, most), float(ramp().square().mean().sqrt())
    for look in LOOKS:
        seen = number[:look]
        if float(seen.std()) / math.sqrt(len(seen)) * rms <= stable * float(seen.mean()) or look >= most:
            return min(look, most)
    raise AssertionError


def test_the_first_look_is_after_128_passes_and_16_units_and_the_next_a_quarter_later_in_whole_units():
    done, looks = 0, []
    for _ in LOOKS:
        done = base.next_look(done, 1)
        looks.append(done)
    assert looks == LOOKS
    assert [base.next_look(done, 3) for done in (0, 129, 1500)] == [129, 258, 1875]
    assert [base.next_look(done, 50) for done in (0, 800, 1000)] == [800, 1000, 1250]


@pytest.mark.parametrize("stable", [0.007, 0.01, 0.014])
def test_an_image_stops_at_the_first_look_at_which_its_error_is_the_share_asked_for(stable):
    x, seen = shown(), set()
    for seed in range(4):
        score = replace(bound(Known(), x, [1, 1, 1]), seed=seed)
        found = Dimmed(until={"stable": stable}).attribute(score, x)
        expected = [stops(score, x, image, stable) for image in range(3)]
        assert found.extras["forwards"].tolist() == expected
        enough = found.extras["standard_error"] <= stable * found.map.amax((1, 2))
        assert (enough | (found.extras["forwards"] == 1000)).all()
        seen.update(expected)
    assert len(seen) > 2


@pytest.mark.parametrize("method", [Dimmed(until={"stable": 0.01}), RISE(masks=600, until={"stable": 0.03})])
def test_a_constant_score_stops_at_the_first_look_and_a_moving_one_goes_on(method):
    net, x = Known(), shown()
    score = bound(net, x, [0, 1, 0])
    found, sizes = watched(net, lambda: method.attribute(score, x))
    forwards = found.extras["forwards"]
    assert forwards.tolist()[::2] == [128, 128]
    assert 128 < forwards[1] <= 1000
    assert sum(sizes) == forwards.sum()
    assert (found.map[::2] == 0).all()
    assert (found.extras["standard_error"][::2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0, 2])
def test_a_map_that_is_flat_but_for_rounding_stops_at_the_first_look(target, dtype):
    """Under coverage the map of a constant score is that constant."""
    net, x = Known().to(dtype), shown().to(dtype)
    for seed in range(3):
        score = replace(bound(net, x, [target] * 3), seed=seed)
        found = RISE(masks=600, normalise="coverage", until={"stable": 0.01}).attribute(score, x)
        assert found.extras["forwards"].tolist() == [128] * 3


def test_a_row_that_moves_keeps_its_image_going():
    net, x = Known(), shown()
    method = Dimmed(until={"stable": 0.01})
    score = bound(net, x, [0, 0, 1, 1], [0, 1, 1, 2])
    found, sizes = watched(net, lambda: method.attribute(score, x))
    alone = method.attribute(bound(net, x, [0, 1, 1]), x)
    forwards = found.extras["forwards"]
    assert forwards.tolist() == alone.extras["forwards"][[0, 1, 1, 2]].tolist()
    assert forwards[0] == 128 < forwards[1]
    assert sum(sizes) == forwards[[0, 1, 3]].sum()  # once for both rows
    assert torch.equal(found.map[2:], alone.map[1:])


@pytest.mark.parametrize(
    ("method", "same"),
    [
        (Dimmed(until={"stable": 0.008}), lambda n: Dimmed(most=(n,))),
        (RISE(masks=900, cells=3, until={"stable": 0.12}), lambda n: RISE(masks=n, cells=3)),
        (
            RISE(masks=900, cells=3, normalise="coverage", until={"stable": 0.1}),
            lambda n: RISE(masks=n, cells=3, normalise="coverage"),
        ),
    ],
)
def test_the_map_at_stopping_is_that_of_a_run_of_so_many_samples(method, same):
    net, x = Known(), shown()
    found = method.attribute(bound(net, x, [1, 1, 1]), x)
    counts = [int(count) for count in found.extras["forwards"]]
    assert len(set(counts)) > 1
    for image, count in enumerate(counts):
        score = replace(bound(net, x[image : image + 1], [1]), keys=[f"image-{image}"])
        alone = same(count).attribute(score, x[image : image + 1])
        assert alone.extras["forwards"].tolist() == [count]
        assert_close(found.map[image], alone.map[0], **EXACT)
        assert_close(found.extras["standard_error"][image], alone.extras["standard_error"][0], **EXACT)


@pytest.mark.parametrize(
    "method", [Dimmed(until={"stable": 0.008}), RISE(masks=900, cells=3, until={"stable": 0.12})]
)
def test_neither_company_nor_order_nor_micro_batches_change_when_an_image_stops(method, as_it_is):
    net, x = Known(), shown()
    score = bound(net, x, [1, 1, 0, 1], [0, 1, 2, 2])
    whole = method.attribute(score, x)
    counts = whole.extras["forwards"].tolist()
    assert len(set(counts)) > 1
    for micro_batch in (50, 200):
        small = method.attribute(bound(net, x, [1, 1, 0, 1], [0, 1, 2, 2], micro_batch=micro_batch), x)
        assert small.extras["forwards"].tolist() == counts
        assert_close(small.map, whole.map, **EXACT)
    turned = replace(bound(net, x.flip(0), [0, 1, 1, 1], [0, 0, 1, 2]), keys=score.keys[::-1])
    turned = method.attribute(turned, x.flip(0))
    assert turned.extras["forwards"][[3, 2, 0, 1]].tolist() == counts
    assert_close(turned.map[[3, 2, 0, 1]], whole.map, **EXACT)
    for image, rows in enumerate(([0], [1], [2, 3])):
        alone = bound(net, x[image : image + 1], [[1], [1], [0, 1]][image], [0] * len(rows))
        alone = method.attribute(replace(alone, keys=[f"image-{image}"]), x[image : image + 1])
        assert alone.extras["forwards"].tolist() == [counts[row] for row in rows]
        assert_close(alone.map, whole.map[rows], **EXACT)


@pytest.mark.parametrize("until", [None, {"stable": 1e-9}, {"stable": 0.01}])
def test_no_image_has_more_samples_than_its_own_count(until):
    net, x = Known(), shown()
    method = Dimmed(most=(50, 300, 1000), until=until)
    score = bound(net, x, [1, 1, 1])
    found, sizes = watched(net, lambda: method.attribute(score, x))
    counts = found.extras["forwards"].tolist()
    if until is None or until["stable"] < 1e-6:
        assert counts == [50, 300, 1000]
    else:
        assert counts == [50, stops(score, x, 1, 0.01, 300), stops(score, x, 2, 0.01)]
        assert counts[2] < 1000
    assert sum(sizes) == sum(counts)
    for image, count in enumerate(map(int, counts)):
        assert_close(found.map[image], dimmed(score, x, image, count).mean() * ramp(), **EXACT)


def test_looks_fall_on_whole_units():
    for unit, first in ((1, 128), (6, 132), (30, 480)):
        method = Dimmed(unit=unit, until={"stable": 0.03})
        found = method.attribute(bound(Known(), shown(), [0, 0, 0]), shown())
        assert found.extras["forwards"].tolist() == [first] * 3


def test_an_error_that_is_no_number_does_not_count_as_settled():
    found = Estimate(torch.zeros(3, 2, 2), torch.tensor([0.0, torch.nan, 0.0]))
    image = torch.tensor([0, 2, 2])
    assert base.settled(found, 0.5, image, torch.tensor([0, 2])).tolist() == [True, False]
    x = shown()
    x[1] = torch.nan
    counts = Dimmed(until={"stable": 0.5}).attribute(bound(Known(), x, [1, 1, 1]), x).extras["forwards"]
    assert counts.tolist() == [128, 1000, 128]


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ({"stable": 0}, "rise: until: Input should be greater than 0"),
        ({"stable": 1}, "rise: until: Input should be less than 1"),
        ({"stable": float("nan")}, "rise: until: "),
        ({"stabel": 0.1}, "rise: until: "),
        ({}, "rise: until: Dictionary should have at least 1 item"),
        ({"stable": 0.1, "most": 3}, "rise: until: Input should be 'stable'"),
        (0.1, "rise: until: "),
    ],
)
def test_until_says_what_it_takes(until, message):
    with pytest.raises(ConfigError, match=message):
        build({"name": "rise", "until": until})
    assert build({"name": "rise", "until": {"stable": 0.01}}).until == {"stable": 0.01}
    assert build("rise").until is None
