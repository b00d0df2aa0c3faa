"""The cut-off of ``low_pass: auto``: found where it is known, the same by hand, and written down by a run."""

from __future__ import annotations

import json
import logging
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from runs import photos, plain, same, written
from store_driver import columns_of
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

import xcli
import xcli.pipeline
import xcli.plan
from xcli import calibration
from xcli.calibration import best, calibrated, candidates, faithfulness, open_steps
from xcli.config import load_config
from xcli.demo import nets
from xcli.errors import ConfigError, InputError
from xcli.evaluation import evaluate_run
from xcli.images import find_images
from xcli.methods.base import Method
from xcli.methods.gradient.plain import Saliency
from xcli.methods.steps import low_passed
from xcli.metrics.faithfulness.deletion import Deletion, Insertion
from xcli.overrides import Changes
from xcli.pipeline import explain_folder
from xcli.progress import Quiet
from xcli.registry import build, options
from xcli.results import open_run
from xcli.scorecard import config_of_run

AUTO = {"low_pass": "auto", "calibration": "unused"}
SIZE = 32


# ---- candidates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 3), (7, 7), (32, 32), (48, 64), (64, 48), (224, 224), (299, 31)]
)
def test_candidates_rise_two_an_octave_and_end_with_everything(size):
    found = candidates(size)
    assert all(isinstance(one, float) for one in found)
    assert found == sorted(set(found))
    assert found[-1] == math.ceil(max(size) / math.sqrt(2))
    assert found == candidates(size[::-1])
    maps = images(2, *size)
    assert_close(low_passed(maps, found[-1]), maps, rtol=0, atol=1e-12)
    assert all(one >= 2 for one in found[:-1])
    for k in range(20):
        exact = 2 * 2 ** (k / 2)
        assert round(exact) in found or exact > found[-1] - 1
    assert len(found) <= 2 * math.log2(max(size)) + 2


def test_candidates_of_the_usual_size():
    assert candidates((224, 224)) == [2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 159]


# ---- where the best one is known --------------------------------------------------------------------------------


class Lit(nn.Module):
    """Two logits: the sum of the first colour, and nothing."""

    def forward(self, x):
        one = x[:, 0].sum((1, 2))
        return torch.stack([one, torch.zeros_like(one)], 1)


@options
class Told(Method):
    """The second colour of the image: a map that is told with the picture."""

    name: ClassVar[str] = "told"

    def attribute(self, score, x):
        return x[score.image, 1]


def slow():
    """A map of waves of one period; no two pixels are equal, and its upper half is one blob."""
    turn = 2 * math.pi / SIZE
    place = torch.arange(SIZE, dtype=torch.float64)
    return torch.cos(turn * place[:, None] + 0.3) + 0.71 * torch.cos(turn * place - 0.33)


def noisy(periods):
    """The same under a strong wave down the map."""
    place = torch.arange(SIZE, dtype=torch.float64)
    return slow() + 5 * torch.cos(2 * math.pi * periods * place / SIZE + 0.2)[:, None]


BLOB = 0.05 * (slow() > slow().median()).double()
SPREAD = images(SIZE, SIZE, seed=3) / 20
"""What each pixel brings to the logit: one blob; and numbers without any order in space."""


def told(*pairs):
    """A score on pictures (brings, map): what each pixel brings to the logit, and a map that is told with it."""
    x = torch.zeros(len(pairs), 3, SIZE, SIZE, dtype=torch.float64)
    for row, (brings, maps) in enumerate(pairs):
        x[row, 0], x[row, 1] = brings, maps
    return bound(Lit(), x, [0] * len(pairs)), x


def at(pair, cutoff):
    """The faithfulness of a map at a cut-off."""
    score, x = told(pair)
    return float(faithfulness(score, x, low_passed(x[:, 1], cutoff)))


@pytest.mark.parametrize(("periods", "known"), [(3, 2), (5, 4), (7, 6), (10, 8), (15, 11)])
def test_the_low_cut_off_wins_where_high_frequencies_are_noise(periods, known):
    """All cut-offs below the noise leave the blob alone, equally well; the highest of them is taken."""
    assert candidates((SIZE, SIZE)) == [2, 3, 4, 6, 8, 11, 16, 23]
    pair = (BLOB, noisy(periods))
    assert at(pair, 2) == at(pair, known) > at(pair, periods) + 0.1
    assert best(Told(post_process=(AUTO,)), 0, [told(pair)]) == known


def test_everything_is_kept_where_only_the_unfiltered_map_is_right():
    """What each pixel of a sum brings, without any order in space: every wave that is left out is missed."""
    pair = (SPREAD, SPREAD)
    values = [at(pair, cutoff) for cutoff in candidates((SIZE, SIZE))]
    assert all(lower < higher for lower, higher in pairwise(values))
    assert best(Told(post_process=(AUTO,)), 0, [told(pair)]) == 23


@pytest.mark.parametrize("maps", [torch.ones(SIZE, SIZE), slow()], ids=["flat", "of low waves alone"])
def test_equally_faithful_cut_offs_give_the_highest(maps):
    assert len({at((BLOB, maps), cutoff) for cutoff in candidates((SIZE, SIZE))}) == 1
    assert best(Told(post_process=(AUTO,)), 0, [told((BLOB, maps))]) == 23


def test_maps_that_are_not_finite_do_not_count():
    """Where there are no others, nothing speaks for any cut-off, and the highest is taken."""
    method, good, lost = Told(post_process=(AUTO,)), (BLOB, noisy(5)), (BLOB, noisy(5))
    lost[1][3, 4] = torch.nan
    assert math.isnan(at(lost, 4))
    assert best(method, 0, [told(good, lost)]) == 4
    assert best(method, 0, [told(lost), told(good)]) == 4
    assert best(method, 0, [told(lost), told(lost, lost)]) == 23


def test_every_row_counts_once_whatever_its_batch():
    """One row is better off with 4 than with 23, three lose less than that with 4, but more when taken together."""
    one, three = (BLOB, noisy(5)), (SPREAD, SPREAD)
    gain, loss = at(one, 4) - at(one, 23), at(three, 23) - at(three, 4)
    assert 0 < loss < gain < 3 * loss
    method = Told(post_process=(AUTO,))
    assert best(method, 0, [told(one), told(three)]) == 4
    assert best(method, 0, [told(one, three)]) == 4
    assert best(method, 0, [told(one), told(three, three, three)]) == 23
    assert best(method, 0, [told(three), told(one, three, three)]) == 23


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([AUTO], [8]),
        ([AUTO, {"low_pass": 5}], [23]),
        ([{"low_pass": 5}, AUTO], [23]),
        ([AUTO, AUTO], [8, 23]),
        ([{"resize": "nearest"}, AUTO, AUTO, {"low_pass": 12}], [8, 23]),
    ],
    ids=str,
)
def test_further_steps_count(steps, found):
    """Where another step takes the noise away, no cut-off is needed; of two that are to be found, the first is found
    without the second."""
    method = Told(post_process=tuple(steps))
    done = calibrated(method, [told((BLOB, noisy(10)))])
    left = iter(found)
    expected = [{"low_pass": next(left)} if step is AUTO else step for step in steps]
    assert list(done.post_process) == expected
    assert open_steps(done) == []
    assert [place for place, _ in open_steps(method)] == [i for i, step in enumerate(steps) if step is AUTO]
    assert replace(done, post_process=()) == replace(method, post_process=())


def test_steps_after_the_filter_are_part_of_what_is_measured():
    """A blob that is told with the wrong sign: with the step that puts it right the noise has to go, else stay."""
    pair = (BLOB, -noisy(10) - 2)
    assert best(Told(post_process=(AUTO, "absolute")), 0, [told(pair)]) == 8
    assert best(Told(post_process=(AUTO,)), 0, [told(pair)]) == 23


def test_a_method_without_open_steps_stays_as_it_is():
    method = Told(post_process=("absolute", {"low_pass": 4}))
    assert calibrated(method, [told((BLOB, noisy(5)))]) is method


# ---- the same by hand -------------------------------------------------------------------------------------------

NET, X, TARGET = made(PooledLinear), images(4, 3, 16, 12), [0, 3, 1, 2]


def by_hand(net, x, target, spec, cutoffs, **options):
    """The best cut-off, and insertion less deletion at each, from the calls that users make."""
    values = []
    for cutoff in cutoffs:
        steps = [{"low_pass": cutoff} if step is AUTO else step for step in spec["post_process"]]
        maps = xcli.explain(net, x, {**spec, "post_process": steps}, target=target).map
        maps = maps if maps.ndim == 3 else maps.sum(1)
        gain, loss = (
            xcli.evaluate(net, x, maps, {"name": name, **options}, target=target).values
            for name in ("insertion", "deletion")
        )
        values.append(round(float((gain - loss).mean()), 10))
    return max(zip(values, cutoffs, strict=True))[1], values


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "saliency", "post_process": [AUTO]},
        {"name": "saliency", "reduce": "mean", "post_process": ["absolute", AUTO, "absolute"]},
        {"name": "saliency", "absolute": False, "reduce": "none", "post_process": [AUTO]},
        {"name": "saliency", "post_process": [AUTO, {"smooth": 0.8}]},
        {"name": "gradcam", "layer": "relu", "upsampling": "bicubic", "post_process": ["positive", AUTO]},
        {"name": "random", "post_process": [{"smooth": 0.6}, AUTO]},
    ],
    ids=lambda spec: f"{spec['name']} {spec['post_process']}".replace(str(AUTO), "auto"),
)
def test_the_cut_off_is_that_of_explain_and_evaluate(spec):
    score = bound(NET, X, TARGET)
    if spec["name"] == "random":  # whose numbers belong to the key of an image
        score = replace(score, keys=xcli.api.ContentKeys(X))
    known, values = by_hand(NET, X, TARGET, spec, candidates((16, 12)))
    assert len(set(values)) > 3
    method = build(spec)
    (place,) = [place for place, _ in open_steps(method)]
    assert best(method, place, [(score, X)]) == known
    done = calibrated(method, [(score, X)])
    assert done.post_process[place] == {"low_pass": known}


def test_the_cut_offs_of_several_methods_differ():
    """So that the comparison above can tell."""
    found = {
        by_hand(NET, X, TARGET, {"name": name, "post_process": [AUTO]}, candidates((16, 12)))[0]
        for name in ("saliency", "gradcam", "input-x-gradient", "random")
    }
    assert len(found) > 1


def test_faithfulness_is_insertion_less_deletion_as_both_are_by_default():
    score, maps = bound(NET, X, TARGET), images(4, 16, 12, seed=9)
    found = faithfulness(score, X, maps)
    gain, loss = (
        xcli.evaluate(NET, X, maps, name, target=TARGET).values for name in ("insertion", "deletion")
    )
    assert_close(found, gain - loss, rtol=1e-12, atol=1e-14)
    assert list(calibration.FAITHFULNESS) == [Insertion(), Deletion()]
    assert found.abs().min() > 1e-6


def test_what_was_measured_is_told(caplog):
    with caplog.at_level(logging.INFO, "xcli.calibration"):
        best(Told(post_process=(AUTO,)), 0, [told((BLOB, noisy(5)))])
    low, high = (f"{at((BLOB, noisy(5)), cutoff):.3f}" for cutoff in (2, 23))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"told: faithfulness by cut-off: 2: {low}, 3: {low}, 4: {low}, 6: {high}, ")
    assert line.endswith(f", 23: {high}")


def test_a_cut_off_to_be_found_is_refused_where_no_run_begins():
    method = {"name": "saliency", "post_process": [{"low_pass": "auto", "calibration": "photos"}]}
    with pytest.raises(ConfigError, match="low_pass: auto is found when a run begins; name a cut-off here"):
        xcli.explain(NET, X, method)


# ---- in a run ---------------------------------------------------------------------------------------------------

SMALL = {"resize": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
FEW = [2.0, 5.0, 23.0]
STEPS = 4


class Stopped(Exception):
    """What ends a run early in here."""


@contextmanager
def quick():
    """Few cut-offs, short curves, parts of two images; gives the list of what has been calibrated."""
    calls, genuine = [], calibration.calibrated

    def counted(method, batches, *rest):
        calls.append((method.name, [t for score, _ in batches for t in score.rows.target.tolist()]))
        return genuine(method, batches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "candidates", lambda _size: FEW)
        patch.setattr(calibration, "FAITHFULNESS", (Insertion(steps=STEPS), Deletion(steps=STEPS)))
        patch.setattr(calibration, "calibrated", counted)
        patch.setattr(xcli.plan, "PART_IMAGES", 2)
        yield calls


def explain(place, name, **options):
    steps = ["absolute", {"low_pass": "auto", "calibration": str(place / "others")}]
    methods = [
        {"name": "saliency", "as": "found", "post_process": steps},
        {"name": "saliency", "post_process": ["absolute"]},
    ]
    sections = {"model": {"preprocess": SMALL}, "methods": methods, "runtime": {"batch_size": 2}}
    config = load_config(written(place / f"{name}.yaml", plain(place / "photos", place / name, **sections)))
    return explain_folder(config, find_images(config.images.paths), **options)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Pictures, others to find the cut-off on, and a run; beside them what was calibrated for it."""
    folder = tmp_path_factory.mktemp("calibration")
    photos(folder / "photos", 4)
    photos(folder / "others", 3, start=40)
    with quick() as calls:
        explain(folder, "whole")
    return folder, list(calls)


@pytest.fixture
def place(begun, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(begun[0], tmp_path / "copy"))


def read(folder):
    """Model inputs of the pictures of a folder, by Pillow alone."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    pixels = [
        np.asarray(Image.open(f).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)) for f in files
    ]
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def test_a_run_finds_the_cut_off_on_the_predicted_classes_and_writes_it_down(begun):
    folder, calls = begun
    net, others = nets.load("shapes-cnn"), read(folder / "others")
    with torch.no_grad():
        predicted = net(others).argmax(1)
    assert calls == [("saliency", predicted.tolist())]
    spec = {"name": "saliency", "post_process": ["absolute", AUTO]}
    known, values = by_hand(net, others, predicted, spec, FEW, steps=STEPS)
    below, highest = sorted(values)[-2:]
    assert (known, highest > below + 0.1) == (5, True)
    expected = {"found": ["absolute", {"low_pass": known}], "saliency": ["absolute"]}
    with open_run(folder / "whole") as run:
        attrs = {name: run.heatmap_attrs(name) for name in run.names}
        assert {name: json.loads(own["params"])["post_process"] for name, own in attrs.items()} == expected
        assert "low_pass: auto" in run.config
    assert json.loads((folder / "whole" / "run.json").read_text())["resolved"]["steps"] == expected
    found = columns_of(folder / "whole" / "results.h5")
    spec = {"name": "saliency", "post_process": expected["found"]}
    maps = xcli.explain(net, read(folder / "photos"), spec).map.numpy()
    largest = np.abs(maps).max()
    np.testing.assert_allclose(found["heatmaps/found"], maps, rtol=0, atol=1e-5 * largest)
    assert np.abs(found["heatmaps/found"] - found["heatmaps/saliency"]).max() > 1e-2 * largest


@pytest.mark.parametrize("lost", ["nothing", "the pictures it was found on"])
def test_a_run_that_goes_on_takes_the_cut_off_again(place, monkeypatch, lost):
    with quick() as calls:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(xcli.pipeline.Store, "merge", lambda *_, **__: (_ for _ in ()).throw(Stopped))
            explain(place, "run")
        assert len(calls) == 1
        (place / "run" / "parts" / "00001.h5").unlink()
        if lost != "nothing":
            shutil.rmtree(place / "others")
        assert explain(place, "run").status == "done"
        assert len(calls) == 1
    same(place / "run", place / "whole")


def test_a_second_shard_takes_the_cut_off_of_the_first(place):
    with quick() as calls:
        assert explain(place, "run", shard=(2, 2)).status == "shard done"
        assert explain(place, "run", shard=(1, 2)).status == "done"
        assert len(calls) == 1
    same(place / "run", place / "whole")


def test_scoring_a_finished_run_takes_its_cut_off(place, monkeypatch):
    """Also in a metric that explains further images."""
    explained, genuine = [], Saliency.explain

    def explain(method, *given):
        explained.append(method.post_process)
        return genuine(method, *given)

    run = place / "whole"
    with open_run(run) as opened:
        known = json.loads(opened.heatmap_attrs("found")["params"])["post_process"]
    monkeypatch.setattr(Saliency, "explain", explain)
    changes = Changes(overrides=["metrics=[{name: max-sensitivity, samples: 1}]"])
    with quick() as calls:
        evaluated = evaluate_run(run, config_of_run(run, changes), Quiet())
    assert calls == []
    assert (evaluated.pairs, evaluated.failed) == (2, {})
    assert set(map(str, explained)) == {str(tuple(known)), str(("absolute",))}


@pytest.mark.parametrize("broken", ["not there", "empty", "not one picture"])
def test_without_pictures_to_find_it_on_nothing_is_begun(place, broken):
    shutil.rmtree(place / "others")
    if broken != "not there":
        (place / "others").mkdir()
    if broken == "not one picture":
        (place / "others" / "a.png").write_bytes(b"no picture")
    found = r"others: none of its 1 images" if broken == "not one picture" else r"methods\[0\]: .*others'"
    with quick() as calls, pytest.raises((InputError, ConfigError), match=found):
        explain(place, "run")
    assert calls == []
    assert not (place / "run").exists()


def explained(place: Path, *entries: dict[str, object]) -> None:
    """Run a config with these methods on the pictures of ``place``."""
    sections = {"model": {"preprocess": SMALL}, "methods": list(entries)}
    config = load_config(written(place / "run.yaml", plain(place / "photos", place / "run", **sections)))
    with quick():
        explain_folder(config, find_images(config.images.paths))


def test_the_cut_off_is_found_for_the_number_that_the_entry_explains(place, monkeypatch):
    seen, genuine = set(), Saliency.attribute

    def attribute(self, score, x):
        seen.add(score.rows.scale)
        return genuine(self, score, x)

    monkeypatch.setattr(Saliency, "attribute", attribute)
    steps = [{"low_pass": "auto", "calibration": str(place / "others")}]
    explained(place, {"name": "saliency", "score": "probability", "post_process": steps})
    assert seen == {"probability"}


def test_each_step_is_found_on_the_images_that_it_names(place, monkeypatch):
    names, genuine = [], calibration.read
    monkeypatch.setattr(calibration, "read", lambda plan, name: names.append(name) or genuine(plan, name))
    folders = [str(place / "others"), str(place / "others"), str(place / "photos")]
    steps = [{"low_pass": "auto", "calibration": folder} for folder in folders]
    explained(place, {"name": "saliency", "post_process": steps})
    assert names == folders[1:]
