"""Pictures that methods compare with: which of a folder are taken, what is refused, how a run keeps to them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import photos, picture, plain, same, written
from store_driver import columns_of
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

import xcli
import xcli.pipeline
import xcli.plan
from xcli import references
from xcli.cli import app
from xcli.cli.exits import guarded
from xcli.config import load_config
from xcli.demo import nets
from xcli.errors import ConfigError, InputError, Interrupted
from xcli.evaluation import evaluate_run
from xcli.images import find_images
from xcli.methods.gradient.expected import ExpectedGradients
from xcli.methods.gradient.noise import SmoothGrad
from xcli.overrides import Changes
from xcli.pipeline import explain_folder
from xcli.plan import prepared
from xcli.progress import Quiet
from xcli.references import MOST, read, with_pictures
from xcli.scorecard import config_of_run

SMALL = {"resize": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def configured(place, name, method=None, **runtime):
    """The file of a config for the run ``name``."""
    method = method or {"name": "expected-gradients", "baselines": str(place / "others"), "samples": 3}
    sections = {
        "model": {"preprocess": SMALL},
        "methods": [method, "random"],
        "runtime": {"batch_size": 2, **runtime},
    }
    return written(place / f"{name}.yaml", plain(place / "photos", place / name, **sections))


def explain(place, name, shard=(1, 1), **runtime):
    config = load_config(configured(place, name, **runtime))
    return explain_folder(config, find_images(config.images.paths), shard=shard)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(xcli.plan, "PART_IMAGES", 2)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Pictures to explain, others to compare with, and a run."""
    folder = tmp_path_factory.mktemp("references")
    photos(folder / "photos", 6)
    photos(folder / "others", 5, start=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xcli.plan, "PART_IMAGES", 2)
        explain(folder, "whole")
    return folder


@pytest.fixture
def place(begun, tmp_path):
    """A copy that may be changed."""
    return Path(shutil.copytree(begun, tmp_path / "copy"))


@pytest.fixture(scope="module")
def plan(begun):
    """What a run on the demo network has decided."""
    config = load_config(configured(begun, "planned", {"name": "random", "as": "other"}))
    with prepared(config, find_images(config.images.paths)) as found:
        yield found


def inputs_of(files):
    """Model inputs (B, 3, 32, 32) of pictures, by Pillow alone."""
    pixels = [
        np.asarray(Image.open(f).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)) for f in files
    ]
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25


def below(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


# ---- which pictures ---------------------------------------------------------------------------------------------


def numbered(folder, count):
    """Pictures of one colour that tells their number; the names are sorted as the numbers are."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (6, 5), (number // 16, 8 * (number % 16), 200)).save(folder / f"{number:04d}.png")
    return str(folder)


def numbers(pictures):
    pixels = (pictures * 0.25 + 0.5) * 255
    red, green, blue = pixels.round().long().amax((2, 3)).unbind(1)
    assert (blue == 200).all()
    return (16 * red + green // 8).tolist()


@pytest.mark.parametrize("count", [1, 5, 127, 128])
def test_of_a_small_folder_all_pictures_are_taken_in_the_order_of_their_names(plan, tmp_path, count):
    pictures, _ = read(plan, numbered(tmp_path / "many", count))
    assert pictures.shape == (count, 3, 32, 32)
    assert numbers(pictures) == list(range(count))


@pytest.mark.parametrize("count", [129, 200, 256, 300])
def test_of_a_larger_folder_128_are_taken_spread_evenly_over_the_list(plan, tmp_path, count):
    pictures, _ = read(plan, numbered(tmp_path / "many", count))
    found = numbers(pictures)
    assert MOST == len(found) == len(set(found)) == 128
    assert found == [place * count // 128 for place in range(128)]
    assert set(np.diff([*found, count])) <= {count // 128, -(-count // 128)}


def test_pictures_are_read_as_those_that_are_explained(plan, begun):
    found, _ = read(plan, str(begun / "others"))
    expected = inputs_of(below(begun / "others"))
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_list_and_a_glob_name_pictures_too(plan, begun, tmp_path):
    files = below(begun / "others")
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files[:3]))
    some, _ = read(plan, str(tmp_path / "list.txt"))
    assert_close(some, inputs_of(files[:3]), rtol=0, atol=1e-6)
    pngs, _ = read(plan, str(begun / "others" / "**" / "*.png"))
    assert_close(pngs, inputs_of([file for file in files if file.suffix == ".png"]), rtol=0, atol=1e-6)


def test_unreadable_pictures_are_left_out_and_named_in_the_log(plan, begun, tmp_path, caplog):
    folder = Path(shutil.copytree(begun / "others", tmp_path / "others"))
    files = below(folder)
    files[1].write_bytes(b"no picture")
    files[3].write_bytes(b"")
    with caplog.at_level(logging.WARNING, "xcli.references"):
        found, digest = read(plan, str(folder))
    kept = [files[0], files[2], files[4]]
    assert_close(found, inputs_of(kept), rtol=0, atol=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: {files[1].relative_to(folder)}: left out: not an image",
        f"{folder}: {files[3].relative_to(folder)}: left out: empty file",
    ]
    for file in (files[1], files[3]):
        file.unlink()
    assert read(plan, str(folder))[1] == digest


def test_the_digest_is_of_the_pixels_that_the_model_sees(plan, begun, tmp_path):
    folder = Path(shutil.copytree(begun / "others", tmp_path / "others"))
    _, before = read(plan, str(begun / "others"))
    assert read(plan, str(folder))[1] == before
    first = below(folder)[0]
    os.utime(first, (0, 0))
    with Image.open(first) as image:
        image.save(first, compress_level=1)  # other bytes of the same picture
    assert read(plan, str(folder))[1] == before
    with Image.open(first) as image:
        changed = np.asarray(image.convert("RGB")).copy()
    changed[:8, :8] ^= 255
    Image.fromarray(changed).save(first)
    assert read(plan, str(folder))[1] != before


def test_a_folder_that_two_methods_name_is_read_once(plan, begun, monkeypatch):
    names, genuine = [], references.read

    def counted(plan, name):
        names.append(name)
        return genuine(plan, name)

    monkeypatch.setattr(references, "read", counted)
    one, two = str(begun / "others"), str(begun / "photos")
    methods = [ExpectedGradients(baselines=name, samples=n) for n, name in enumerate((one, two, one), 1)]
    specs = [replace(plan.methods[0], label=str(n), method=method) for n, method in enumerate(methods)]
    found = with_pictures(replace(plan, methods=(*plan.methods, *specs)), {})
    assert names == [one, two]
    assert list(found.pictures) == list(found.digests) == [one, two]
    assert [len(pictures) for pictures in found.pictures.values()] == [5, 6]
    assert found.resolved()["pictures"] == found.digests
    assert with_pictures(plan, {}).pictures == {}


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.fixture
def xai(capfd, monkeypatch):
    """The command in this process: its exit code and what it said."""
    monkeypatch.setattr("xcli.tuning.keep_freed_memory", lambda: True)  # a setting of the whole process

    def run(*arguments):
        capfd.readouterr()
        code = guarded(lambda: app([str(one) for one in arguments], prog_name="xai"))
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return code, said.err

    return run


BROKEN = {
    "not there": "others",
    "empty": "no image found in",
    "no readable one": "none of its 2 images can be read",
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "within smoothgrad"])
def test_without_a_readable_picture_nothing_is_begun(place, xai, broken, within):
    shutil.rmtree(place / "others")
    if broken != "not there":
        (place / "others").mkdir()
    if broken == "no readable one":
        for name in ("a.png", "b.jpg"):
            (place / "others" / name).write_bytes(b"no picture")
    base = {"name": "expected-gradients", "baselines": str(place / "others")}
    method = {"name": "smoothgrad", "samples": 2, "base": base} if within else base
    code, said = xai("explain", configured(place, "run", method))
    assert code == 2
    assert str(place / "others") in said
    assert BROKEN[broken] in said
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("expected-gradients", "expected-gradients"),
        ("{name: expected-gradients, samples: 3}", "expected-gradients"),
        ("{name: smoothgrad, base: expected-gradients}", "smoothgrad"),
        ("{name: guided-gradcam, base: {name: expected-gradients, samples: 2}}", "guided-gradcam"),
    ],
)
def test_a_method_without_its_pictures_is_refused_at_its_place(tmp_path, method, name):
    file = tmp_path / "my.yaml"
    file.write_text(f"model: {{source: demo}}\nimages: {{path: x}}\nmethods:\n  - random\n  - {method}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(error.value) == (
        f"{file}:5:5: methods[1]: {name} compares with other pictures; name their folder by baselines:"
    )


# ---- over a run -------------------------------------------------------------------------------------------------


def repainted(place):
    file = below(place / "others")[2]
    picture(77).save(file, quality=95)


def half_way(place, name, monkeypatch):
    """A run that a signal ends in its third batch."""
    genuine, batches = xcli.pipeline.explained, []

    def explained(plan, batch, sources):
        batches.append(batch)
        if len(batches) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return genuine(plan, batch, sources)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(xcli.pipeline, "explained", explained)
        explain(place, name)
    parts = [part.name for part in (place / name / "parts").iterdir()]
    assert 0 < len(parts) < 3


def test_the_run_says_which_pictures_it_compared_with(begun, plan):
    resolved = json.loads((begun / "whole" / "run.json").read_text())["resolved"]
    name = str(begun / "others")
    assert resolved["pictures"] == {name: read(plan, name)[1]}


def test_maps_are_those_of_the_python_interface_with_the_same_pictures(begun):
    found = columns_of(begun / "whole" / "results.h5")
    net, files = nets.load("shapes-cnn"), below(begun / "photos")
    x, others = inputs_of(files), inputs_of(below(begun / "others"))
    keys = [str(file.relative_to(begun / "photos")) for file in files]
    with torch.no_grad():
        target = net(x).argmax(1).tolist()
    score = replace(bound(net, x, target), keys=keys, pictures={"others": others})
    expected = ExpectedGradients(baselines="others", samples=3).explain(score, x)
    largest = float(expected.map.abs().max())
    maps = torch.from_numpy(found["heatmaps/expected-gradients"])
    assert_close(maps, expected.map, rtol=0, atol=1e-5 * largest)
    delta = torch.from_numpy(found["extras/expected-gradients/delta"])
    assert_close(delta, expected.extras["delta"], rtol=0, atol=1e-4)
    other = ExpectedGradients(baselines="x", samples=3).explain(replace(score, pictures={"x": x}), x).map
    assert (other - expected.map).abs().max() > 1e-2 * largest


def test_an_interrupted_run_goes_on_and_ends_byte_equal(place, monkeypatch):
    half_way(place, "run", monkeypatch)
    assert explain(place, "run").status == "done"
    same(place / "run", place / "whole")


@pytest.mark.parametrize("change", ["repainted", "added", "removed"])
def test_a_run_does_not_go_on_with_other_pictures(place, xai, monkeypatch, change):
    half_way(place, "run", monkeypatch)
    before = {file: file.read_bytes() for file in below(place / "run") if file.suffix == ".h5"}
    if change == "repainted":
        repainted(place)
    elif change == "added":
        picture(78).save(place / "others" / "zz.png")
    else:
        below(place / "others")[0].unlink()
    code, said = xai("explain", place / "run.yaml")
    assert code == 2
    assert f"{place / 'others'}: its pictures are others than when this run began" in said.replace("\n", " ")
    assert "--fresh" in said
    assert before == {file: file.read_bytes() for file in below(place / "run") if file.suffix == ".h5"}
    assert xai("explain", place / "run.yaml", "--fresh")[0] == 0
    maps = {
        name: columns_of(place / name / "results.h5")["heatmaps/expected-gradients"]
        for name in ("run", "whole")
    }
    assert np.abs(maps["run"] - maps["whole"]).max() > 1e-3 * np.abs(maps["whole"]).max()


def test_a_finished_run_does_not_ask_for_its_pictures(place):
    explain(place, "run")
    repainted(place)
    assert explain(place, "run").status == "already done"


@pytest.mark.parametrize("runtime", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 6}], ids=str)
def test_batches_change_nothing(place, runtime):
    explain(place, "run", **runtime)
    same(place / "run", place / "whole", 1e-5)


def test_shards_change_not_a_byte(place):
    assert explain(place, "run", shard=(2, 2)).status == "shard done"
    assert explain(place, "run", shard=(1, 2)).status == "done"
    same(place / "run", place / "whole")


def test_a_second_shard_does_not_begin_with_other_pictures(place):
    assert explain(place, "run", shard=(2, 2)).status == "shard done"
    repainted(place)
    with pytest.raises(
        InputError, match="others than when this run began; put them back, or start over with --fresh"
    ):
        explain(place, "run", shard=(1, 2))


# ---- in Python --------------------------------------------------------------------------------------------------

NET, X = made(PooledLinear), images(4, 3, 10, 8)
OTHERS = images(3, 3, 10, 8, seed=5)
METHOD = {"name": "expected-gradients", "baselines": "elsewhere", "samples": 5}


def test_pictures_are_handed_over_by_the_name_that_the_option_has():
    found = xcli.explain(NET, X, METHOD, target=1, pictures={"elsewhere": OTHERS, "unused": X})
    score = replace(bound(NET, X, [1, 1, 1, 1]), keys=xcli.api.ContentKeys(X), pictures={"elsewhere": OTHERS})
    expected = ExpectedGradients(baselines="elsewhere", samples=5).explain(score, X)
    assert_close(found.map, expected.map, rtol=1e-12, atol=1e-14)
    assert_close(found.extras["delta"], expected.extras["delta"], rtol=1e-12, atol=1e-12)
    swapped = xcli.explain(NET, X, METHOD, target=1, pictures={"elsewhere": X, "unused": OTHERS}).map
    assert (swapped - found.map).abs().max() > 1e-2 * found.map.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("handed", [torch.float32, torch.float64])
def test_one_picture_on_a_linear_network_gives_the_difference_to_it(dtype, handed):
    """Whatever is drawn, as the gradient is the same everywhere; in the type of the images."""
    weight = images(3, 10, 8, seed=6)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(240, 3)).to(dtype)
    with torch.no_grad():
        net[1].weight[2], net[1].bias[:] = weight.flatten().to(dtype), 0.5
    spec = {**METHOD, "reduce": "none"}
    found = xcli.explain(net, X.to(dtype), spec, target=2, pictures={"elsewhere": OTHERS[:1].to(handed)})
    close = 1e-12 if dtype == handed == torch.float64 else 1e-6
    assert found.map.dtype == dtype
    assert_close(found.map.double(), weight * (X - OTHERS[0]), rtol=0, atol=close)
    assert found.extras["delta"].abs().max() < 10 * close


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_neither_company_nor_micro_batches_change_the_map(micro_batch):
    given = {"target": 1, "pictures": {"elsewhere": OTHERS}}
    whole = xcli.explain(NET, X, METHOD, **given).map
    found = xcli.explain(NET, X, METHOD, micro_batch=micro_batch, **given).map
    assert_close(found, whole, rtol=1e-10, atol=1e-13)
    alone = [xcli.explain(NET, one, METHOD, micro_batch=micro_batch, **given).map for one in X.split(1)]
    assert_close(torch.cat(alone), whole, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("spec", "pictures", "message"),
    [
        ("expected-gradients", None, "the option `baselines` has to name the pictures to compare with"),
        (
            METHOD,
            None,
            r"'elsewhere' stands for pictures .*pass pictures=\{'elsewhere': \.\.\.\}, a float tensor",
        ),
        (
            METHOD,
            {"others": OTHERS},
            r"'elsewhere' stands for pictures .*pass pictures=\{'elsewhere': \.\.\.\}",
        ),
        (
            {"name": "smoothgrad", "samples": 2, "base": METHOD},
            {},
            r"pass pictures=\{'elsewhere': \.\.\.\}, a float tensor \(R, C, H, W\), preprocessed as the images are",
        ),
    ],
)
def test_pictures_that_are_not_handed_over_are_asked_for(spec, pictures, message):
    with pytest.raises(ConfigError, match=message):
        xcli.explain(NET, X, spec, target=1, pictures=pictures)


def test_metrics_that_explain_further_images_are_given_the_pictures_too():
    maps = xcli.explain(NET, X, METHOD, target=1, pictures={"elsewhere": OTHERS}).map
    given = {"metric": "random-logit", "target": 1, "method": METHOD}
    found = xcli.evaluate(NET, X, maps, pictures={"elsewhere": OTHERS}, **given)
    other = xcli.evaluate(NET, X, maps, pictures={"elsewhere": 1 + X}, **given)
    assert found.values.isfinite().all()
    assert (other.values - found.values).abs().max() > 1e-2
    with pytest.raises(ConfigError, match=r"pass pictures=\{'elsewhere': \.\.\.\}"):
        xcli.evaluate(NET, X, maps, **given)


def test_stored_maps_are_scored_without_the_pictures_they_were_made_with(place):
    """The method does not run; a metric that explains further images with it does ask for them."""
    explain(place, "mine")
    shutil.rmtree(place / "others")
    run = place / "mine"
    config = config_of_run(run, Changes(overrides=["metrics=[{name: deletion, steps: 2}]"]))
    evaluated = evaluate_run(run, config, Quiet())
    assert (evaluated.pairs, evaluated.failed) == (2, {})
    config = config_of_run(run, Changes(overrides=["metrics=[{name: max-sensitivity, samples: 1}]"]))
    with pytest.raises(InputError, match="others"):
        evaluate_run(run, config, Quiet())


def test_graphs_of_the_first_pass_are_let_go_before_methods_that_do_not_need_them(place, monkeypatch):
    """Whatever the order of the config; maps come out in that order all the same."""
    seen = []

    def attribute(method, score, x):
        seen.append((score.forward.pixels, bool(score.forward.leaves)))
        return x.new_zeros(len(score.image), *x.shape[2:]) + torch.arange(x.shape[-1])

    monkeypatch.setattr(SmoothGrad, "attribute", attribute)
    methods = ["smoothgrad", "saliency", "random", "gradcam"]
    config = load_config(
        written(
            place / "order.yaml",
            plain(place / "photos", place / "order", model={"preprocess": SMALL}, methods=methods),
        )
    )
    explain_folder(config, find_images(config.images.paths))
    assert seen[0] == (True, True)  # when the plan is tried, all are still there
    assert set(seen[1:]) == {(False, False)}
    with xcli.open_run(place / "order") as run:
        assert sorted(run.names) == sorted(methods)
