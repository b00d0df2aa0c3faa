"""Scoring: in one pass or over a finished run, killed, updated, re-done: the same numbers, and nothing lost."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from PIL import Image
from runs import SIDE, Commands, photos, picture, plain, same, written
from store_driver import columns_of

import xcli
import xcli.batches
from xcli.config import load_config, recorded_config
from xcli.demo import nets
from xcli.errors import ConfigError, InputError
from xcli.evaluation import evaluate_run, missing
from xcli.images import find_images
from xcli.overrides import Changes
from xcli.progress import Quiet
from xcli.record import load
from xcli.scorecard import explain_and_score

COUNT = 10
METRICS = [{"name": "deletion", "steps": 3}, {"name": "insertion", "steps": 3}]
METHODS = ["gradcam", "random"]
KILLED = -9


@pytest.fixture(scope="module")
def xai() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as others may be computing; parts of four images, so that a small run has several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("xcli.plan.PART_IMAGES", 4)
    yield
    torch.set_num_threads(threads)


def config_of(folder: Path, place: Path, /, **sections: Any) -> dict[str, Any]:
    return plain(folder, place, **{"methods": METHODS, "metrics": METRICS, **sections})


def run(folder: Path, place: Path, /, **sections: Any) -> Path:
    """Explain and score a folder in one pass."""
    place.parent.mkdir(parents=True, exist_ok=True)
    config = load_config(written(place.parent / f"{place.name}.yaml", config_of(folder, place, **sections)))
    explain_and_score(config, find_images(config.images.paths), Quiet())
    return place


def evaluate(root: Path, **changes: Any) -> Any:
    saved = load(root)
    assert saved is not None
    config = recorded_config(saved.record.config, "run.json", Changes(**changes))
    return evaluate_run(root, config, Quiet())


SETTINGS = [f"metrics={json.dumps(METRICS)}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in ``photos``, scored in one pass in ``whole``, explained alone in ``maps``."""
    folder = tmp_path_factory.mktemp("evaluation")
    photos(folder / "photos", COUNT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xcli.plan.PART_IMAGES", 4)
        run(folder / "photos", folder / "whole")
        run(folder / "photos", folder / "maps", metrics=[])
    return folder


@pytest.fixture
def maps(place: Path, tmp_path: Path) -> Path:
    """A copy of the run that is explained and not scored."""
    return Path(shutil.copytree(place / "maps", tmp_path / "maps"))


def scores(root: Path) -> dict[str, np.ndarray]:
    groups = ("metrics/", "curves/", "summary/")
    return {key: value for key, value in columns_of(root / "results.h5").items() if key.startswith(groups)}


# --- the same numbers, whichever way they were made -----------------------------------------------------------------


def test_what_one_pass_writes_is_what_the_contract_says(place: Path):
    with h5py.File(place / "whole" / "results.h5") as file:
        rows = len(file["explanations/image"])
        for method in METHODS:
            for metric in METRICS:
                values = file[f"metrics/{method}/{metric['name']}"]
                assert (values.shape, values.dtype) == ((rows,), np.float32)
                assert values.attrs["direction"] == {"deletion": "lower"}.get(metric["name"], "higher")
                assert json.loads(values.attrs["params"])["steps"] == 3
                assert len(json.loads(values.attrs["bounds"])) == 2
                curve = file[f"curves/{method}/{metric['name']}"]
                assert curve.shape == (rows, 4)
                fraction = file[f"curves/{method}/{metric['name']}.fraction"]
                np.testing.assert_allclose(fraction, [0, 1 / 3, 2 / 3, 1], atol=1e-3)
                widths = np.diff(fraction)
                area = ((curve[:, 1:] + curve[:, :-1]) / 2 * widths).sum(1)
                np.testing.assert_allclose(values, area, rtol=1e-5)


def test_the_scores_are_those_of_the_python_interface(place: Path):
    files = sorted((place / "photos").rglob("*.*"))
    pixels = [
        np.asarray(Image.open(f).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        for f in files
    ]
    x = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    net = nets.load("shapes-cnn")
    maps = xcli.explain(net, x, {"name": "gradcam", "relu": False}).map
    with xcli.open_run(place / "whole") as found:
        gradcam = torch.from_numpy(found.heatmap("gradcam"))
        for metric in METRICS:
            expected = xcli.evaluate(net, x, gradcam, metric).values
            assert expected is not None
            np.testing.assert_allclose(found.metrics("gradcam")[str(metric["name"])], expected, atol=1e-5)
    assert len(maps) == COUNT


def test_scoring_a_finished_run_gives_the_numbers_of_one_pass(place: Path, maps: Path):
    done = evaluate(maps, overrides=SETTINGS)
    assert (done.pairs, done.images, done.failed) == (4, COUNT, {})
    same(maps, place / "whole")
    assert not (maps / "evaluation").exists()


@pytest.mark.soak
def test_the_batch_changes_no_score(place: Path, tmp_path: Path):
    """In float64, as a metric that sorts pixels takes the last bits of a float32 map for an order."""
    found = {}
    for batch in (1, 4, 16):
        root = run(
            place / "photos", tmp_path / f"{batch}", runtime={"batch_size": batch, "precision": "float64"}
        )
        found[batch] = scores(root)
    for name, values in found[4].items():
        for batch in (1, 16):
            np.testing.assert_allclose(found[batch][name], values, atol=1e-6, err_msg=name)


@pytest.mark.soak
def test_the_shards_change_no_score(place: Path, tmp_path: Path, xai: Commands):
    config = written(tmp_path / "config.yaml", config_of(place / "photos", tmp_path / "run"))
    for shard in ("1/2", "2/2"):
        ended = xai("explain", config, "--shard", shard)
        assert ended.code == 0, ended.stderr
    same(tmp_path / "run", place / "whole", 1e-5)
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_maps_stored_on_their_own_grid_are_scored_at_the_size_of_the_input(place: Path, tmp_path: Path):
    run(place / "photos", tmp_path / "run", output={"heatmap": {"size": "native"}})
    expected = scores(place / "whole")
    for name, values in scores(tmp_path / "run").items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)


def test_scores_join_a_run_that_keeps_its_parts(place: Path, tmp_path: Path):
    root = run(place / "photos", tmp_path / "run", metrics=METRICS[:1], output={"layout": "parts"})
    done = evaluate(root, overrides=SETTINGS)
    assert done.pairs == 2
    expected = scores(place / "whole")
    found = scores(root)
    assert set(found) == set(expected)
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    with xcli.open_run(root) as one, xcli.open_run(place / "whole") as other:
        np.testing.assert_array_equal(one.heatmap("gradcam"), other.heatmap("gradcam"))


# --- kills, updates, changes ----------------------------------------------------------------------------------------


@pytest.mark.soak
def test_an_evaluation_killed_again_and_again_ends_like_one_that_nothing_disturbed(
    place: Path, maps: Path, xai: Commands
):
    call = ["evaluate", maps, *(word for text in SETTINGS for word in ("--set", text)), "--json"]
    points = [
        "evaluation-half:1",
        "scores-synced:1",
        "scores-done:1",
        "scores-half:1",
        "merge-dataset:3",
        "merge-renamed:1",
        "discard-evaluation:1",
    ]
    for point in points:
        ended = xai(*call, failpoint=point)
        assert ended.code == KILLED, (point, ended)
    ended = xai(*call)
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["scored_now"] == 0, "all was there; only what was left over had to go"
    same(maps, place / "whole")
    assert sorted(path.name for path in maps.iterdir()) == sorted(
        path.name for path in (place / "whole").iterdir()
    )


@pytest.mark.soak
def test_a_one_pass_run_that_is_killed_goes_on_with_the_metrics_it_began_with(
    place: Path, tmp_path: Path, xai: Commands
):
    first = written(tmp_path / "one.yaml", config_of(place / "photos", tmp_path / "run", metrics=METRICS[:1]))
    assert xai("explain", first, failpoint="part-done:1").code == KILLED
    both = written(tmp_path / "both.yaml", config_of(place / "photos", tmp_path / "run"))
    ended = xai("explain", both)
    assert ended.code == 0, ended.stderr
    expected = scores(place / "whole")
    for name, values in scores(tmp_path / "run").items():
        np.testing.assert_allclose(values, expected[name], atol=1e-5, err_msg=name)


def test_new_images_have_no_scores_until_they_are_evaluated(tmp_path: Path):
    folder, root = tmp_path / "photos", tmp_path / "run"
    photos(folder, 5)
    run(folder, root, metrics=[])
    evaluate(root, overrides=SETTINGS)
    photos(folder, 3, start=5)
    config = load_config(written(tmp_path / "run.yaml", config_of(folder, root, metrics=[])))
    explain_and_score(config, find_images(config.images.paths), Quiet(), update=True)
    with xcli.open_run(root) as found:
        values = found.metrics("gradcam")["deletion"]
        assert np.isnan(values).sum() == 3
        assert not found.metric_attrs("gradcam", "deletion")["complete"]
    assert evaluate(root, overrides=SETTINGS).pairs == 4
    with xcli.open_run(root) as found:
        assert np.isfinite(found.metrics("gradcam")["deletion"]).all()
    assert evaluate(root, overrides=SETTINGS).pairs == 0


def test_an_update_of_a_config_with_metrics_scores_the_new_images_too(tmp_path: Path):
    folder, root = tmp_path / "photos", tmp_path / "run"
    photos(folder, 5)
    run(folder, root)
    photos(folder, 3, start=5)
    config = load_config(tmp_path / "run.yaml")
    _, card = explain_and_score(config, find_images(config.images.paths), Quiet(), update=True)
    assert card is not None
    assert card.evaluated.pairs == 0, "one pass has scored them"
    with xcli.open_run(root) as found:
        assert np.isfinite(found.metrics("gradcam")["deletion"]).all()


def test_an_image_that_changed_since_has_no_score_and_is_named(tmp_path: Path):
    folder, root = tmp_path / "photos", tmp_path / "run"
    files = photos(folder, 4)
    run(folder, root, metrics=[])
    picture(77).save(files[1])
    files[2].unlink()
    done = evaluate(root, overrides=SETTINGS)
    names = [str(file.relative_to(folder)) for file in (files[1], files[2])]
    assert sorted(done.failed) == sorted(names)
    assert "has changed" in done.failed[names[0]]
    with xcli.open_run(root) as found:
        lost = [path in names for path in found.images["path"]]
        np.testing.assert_array_equal(np.isnan(found.metrics("gradcam")["deletion"]), lost)


def test_weights_that_changed_since_are_refused(place: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "net.safetensors"
    weights = nets.load("shapes-cnn").state_dict()
    save_file(weights, file)
    root = run(place / "photos", tmp_path / "run", metrics=[], model={"weights": str(file)})
    changed = load_file(file)
    name = next(iter(changed))
    changed[name] = changed[name] + 1
    save_file(changed, file)
    with pytest.raises(ConfigError, match="weights of .* have changed"):
        evaluate(root, overrides=SETTINGS)


def test_a_metric_with_other_options_replaces_the_old_one_everywhere(maps: Path):
    evaluate(maps, overrides=SETTINGS, baselines=True)
    evaluate(maps, overrides=['metrics=[{"name": "deletion", "steps": 2}]'])
    with xcli.open_run(maps) as found:
        assert {name: sorted(found.metrics(name)) for name in found.scored} == {
            "centre": ["insertion"],
            "gradcam": ["deletion", "insertion"],
            "random": ["deletion", "insertion"],
            "sobel": ["insertion"],
        }
        assert found.curves("gradcam")["deletion"].shape[1] == 3


def test_scoring_changes_no_map_and_nothing_else(place: Path, maps: Path):
    before = columns_of(maps / "results.h5")
    evaluate(maps, overrides=SETTINGS, baselines=True)
    after = columns_of(maps / "results.h5")
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)
    with xcli.open_run(maps) as found:
        assert found.scored == ("centre", "gradcam", "random", "sobel")
        assert found.names == ("gradcam", "random"), "maps of baselines are not kept"


def test_what_the_maps_depend_on_cannot_change_over_a_finished_run(maps: Path):
    with pytest.raises(ConfigError, match="changes what the maps"):
        evaluate(maps, overrides=["methods.0.relu=false"])


def test_a_map_that_is_not_finite_has_no_score(maps: Path):
    with h5py.File(maps / "results.h5", "r+") as file:
        values = file["heatmaps/gradcam"][2]
        values[3, 3] = np.nan
        file["heatmaps/gradcam"][2] = values
    evaluate(maps, overrides=SETTINGS)
    with xcli.open_run(maps) as found:
        assert np.flatnonzero(np.isnan(found.metrics("gradcam")["deletion"])).tolist() == [2]


@pytest.mark.soak
def test_fresh_removes_the_scores_too(place: Path, tmp_path: Path, xai: Commands):
    config = written(tmp_path / "config.yaml", config_of(place / "photos", tmp_path / "run"))
    assert xai("evaluate", config).code == 0
    assert {"metrics.csv", "curves-deletion.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    again = written(tmp_path / "again.yaml", config_of(place / "photos", tmp_path / "run", metrics=[]))
    assert xai("explain", again, "--fresh").code == 0
    assert not {"metrics.csv", "curves-deletion.png"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert scores(tmp_path / "run") == {}


# --- what must not be lost, or taken for something else ---------------------------------------------------------------


def test_images_that_cannot_be_found_are_scored_once_they_are_back(tmp_path: Path):
    folder, root = tmp_path / "photos", tmp_path / "run"
    files = photos(folder, 4)
    run(folder, root, metrics=[])
    files[1].rename(tmp_path / "away")
    assert len(evaluate(root, overrides=SETTINGS).failed) == 1
    (tmp_path / "away").rename(files[1])
    again = evaluate(root, overrides=SETTINGS)
    assert (again.pairs, again.failed) == (4, {}), "a column with a hole is not complete"
    with xcli.open_run(root) as found:
        assert np.isfinite(found.metrics("gradcam")["deletion"]).all()


def test_where_no_image_can_be_found_nothing_is_written(tmp_path: Path):
    folder, root = tmp_path / "photos", tmp_path / "run"
    photos(folder, 4)
    run(folder, root, metrics=[])
    folder.rename(tmp_path / "away")
    with pytest.raises(InputError, match="none of the images"):
        evaluate(root, overrides=SETTINGS)
    assert scores(root) == {}


@pytest.mark.soak
def test_an_evaluation_that_was_killed_is_left_alone_by_others(place: Path, maps: Path, xai: Commands):
    call = ["evaluate", maps, "--set", SETTINGS[0]]
    assert xai(*call, failpoint="scores-done:2").code == KILLED
    begun = sorted((maps / "evaluation").rglob("*.h5"))
    assert begun
    other = json.dumps([{"name": "sparseness"}])
    assert xai("evaluate", maps, "--set", f"metrics={other}", "--json").code == 0
    assert xai("evaluate", maps, "--set", f"metrics={other}", "--json").code == 0  # nothing to do
    assert sorted((maps / "evaluation").rglob("*.h5")) == begun
    ended = xai(*call)
    assert ended.code == 0, ended.stderr
    expected = scores(place / "whole")
    for name, values in scores(maps).items():
        if "sparseness" not in name:
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.soak
@pytest.mark.parametrize("option", [{"score": "logit"}, {"steps": 4}])
def test_an_update_never_mixes_two_definitions_in_a_column(tmp_path: Path, option: dict[str, Any]):
    folder, root = tmp_path / "photos", tmp_path / "run"
    photos(folder, 4)
    run(folder, root)
    changed = [f"metrics={json.dumps([{**METRICS[0], **option}, METRICS[1]])}"]
    evaluate(root, overrides=changed)
    photos(folder, 3, start=4)
    config = load_config(tmp_path / "run.yaml", Changes(overrides=changed))
    _, card = explain_and_score(config, find_images(config.images.paths), Quiet(), update=True)
    assert card is not None
    whole = run(folder, tmp_path / "whole", metrics=[{**METRICS[0], **option}, METRICS[1]])
    with xcli.open_run(root) as one, xcli.open_run(whole) as other:
        order = np.argsort(one.images["path"].astype(str))
        expected = other.metrics("gradcam")["deletion"]
        np.testing.assert_allclose(one.metrics("gradcam")["deletion"][order], expected, atol=1e-5)


def test_an_update_of_a_run_that_keeps_its_parts_keeps_its_scores(tmp_path: Path):
    folder, root = tmp_path / "photos", tmp_path / "run"
    photos(folder, 5)
    run(folder, root, metrics=[], output={"layout": "parts"})
    evaluate(root, overrides=SETTINGS)
    photos(folder, 2, start=5)
    config = load_config(tmp_path / "run.yaml")
    explain_and_score(config, find_images(config.images.paths), Quiet(), update=True)
    with xcli.open_run(root) as found:
        values = found.metrics("gradcam")["deletion"]
        assert (np.isfinite(values).sum(), np.isnan(values).sum()) == (5, 2)
        assert not found.metric_attrs("gradcam", "deletion")["complete"]


def test_another_ground_truth_at_the_same_place_is_another_metric(tmp_path: Path):
    samples = Path(__file__).parents[1] / "sample_images"
    masks = Path(shutil.copytree(samples / "masks", tmp_path / "masks"))
    sections = {
        "methods": ["gradcam"], "model": {"preprocess": "auto"}, "metrics": ["iou"],
        "images": {"path": str(samples / "scenes" / "one"), "truth": str(masks / "one")},
    }  # fmt: skip
    root = run(samples, tmp_path / "run", **sections)
    assert evaluate(root).pairs == 0
    first = sorted((masks / "one").iterdir())[0]
    with Image.open(first) as mask:
        moved = Image.fromarray(np.roll(np.asarray(mask), 60, 0), "P")
    moved.save(first)
    with xcli.open_run(root) as found:
        before = found.metrics("gradcam")["iou"]
    assert evaluate(root).pairs == 1
    with xcli.open_run(root) as found:
        assert (found.metrics("gradcam")["iou"] != before).sum() == 1


def test_batches_leave_nothing_behind(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a collection of cycles, which on a GPU would come too late."""
    alive: list[weakref.ref[Any]] = []
    genuine = xcli.batches.Plan.score

    def watched(plan: Any, forward: Any, *rest: Any) -> Any:
        assert sum(one() is not None for one in alive) <= 2
        alive.append(weakref.ref(forward))
        return genuine(plan, forward, *rest)

    monkeypatch.setattr(xcli.batches.Plan, "score", watched)
    gc.collect()
    gc.disable()
    try:
        run(place / "photos", tmp_path / "run", runtime={"batch_size": 1})
    finally:
        gc.enable()
    assert len(alive) > COUNT


def test_metrics_that_a_run_has_stay_when_others_are_chosen(place: Path, maps: Path, xai: Commands):
    evaluate(maps, overrides=SETTINGS, baselines=True)
    ended = xai("evaluate", maps, "--metrics", "sparseness", "--gate", "gradcam.deletion<=1", "--json")
    assert ended.code == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert set(told["scores"]["gradcam"]) == {"deletion", "insertion", "sparseness"}
    assert told["scored_now"] == 4, "the new metric for two methods, centre and sobel"
    with xcli.open_run(maps) as found:
        assert json.loads(found.metric_attrs("gradcam", "deletion")["params"])["steps"] == 3


def test_pictures_of_one_name_and_another_size_are_not_compared(place: Path, tmp_path: Path, xai: Commands):
    folder = tmp_path / "others"
    for index, file in enumerate(photos(folder, COUNT)):
        picture(50 + index).save(file)
    other = run(folder, tmp_path / "run", target={"class": 3})
    mine = run(place / "photos", tmp_path / "mine", target={"class": 3})
    ended = xai("compare", mine, other, "--no-baselines")
    assert ended.code == 2
    assert "different pictures" in ended.stderr


# --- what metrics are given -----------------------------------------------------------------------------------------


def test_ground_truth_and_checkpoints_reach_their_metrics(tmp_path: Path):
    from safetensors.torch import save_file

    scenes = Path(__file__).parents[1] / "sample_images"
    other = nets.load("shapes-cnn")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    root = run(
        scenes / "scenes" / "two", tmp_path / "run", methods=["gradcam"], target={"top": 2},
        images={"path": str(scenes / "scenes"), "truth": str(scenes / "masks")},
        model={"checkpoints": [str(tmp_path / "other.safetensors")], "preprocess": "auto"},
        metrics=["pointing-game", "mege"], baselines=True,
    )  # fmt: skip
    with xcli.open_run(root) as found:
        hits = found.metrics("gradcam")["pointing-game"]
        assert np.nanmean(hits) > 0.9
        assert np.isnan(hits).any(), "the second class of a scene with one object is not there"
        assert found.summary("gradcam")["pointing-game"] > 0.9
        assert 0.5 < found.summary("gradcam")["mege"] < 1
        assert found.summary("centre")["mege"] == 1, "the same map from every network"
    config = recorded_config(load(root).record.config, "run.json")  # type: ignore[union-attr]
    assert missing(root, config) == ()


def test_a_ground_truth_that_is_not_there_stops_before_the_run(place: Path, tmp_path: Path, xai: Commands):
    sections = config_of(place / "photos", tmp_path / "run", metrics=["iou"])
    sections["images"]["truth"] = str(tmp_path / "nowhere")
    ended = xai("evaluate", written(tmp_path / "config.yaml", sections))
    assert ended.code == 2
    assert "nowhere" in ended.stderr
    assert not (tmp_path / "run").exists()


# --- the command ----------------------------------------------------------------------------------------------------


def test_gates_end_in_exit_code_4_and_say_why(place: Path, maps: Path, xai: Commands):
    call = ["evaluate", maps, *(word for text in SETTINGS for word in ("--set", text))]
    ended = xai(*call, "--gate", "insertion>=0", "--gate", "gradcam.deletion>=2")
    assert ended.code == 4
    lines = [line.split() for line in ended.stdout.splitlines() if line[:4] in ("pass", "FAIL")]
    assert [line[:2] for line in lines] == [["pass", "gradcam.insertion"], ["FAIL", "gradcam.deletion"]]
    told = json.loads(xai(*call, "--gate", "gradcam.deletion>=2", "--json").stdout)
    assert (told["exit_code"], told["gates"][0]["passed"]) == (4, False)
    mean = told["scores"]["gradcam"]["deletion"]["mean"]
    with xcli.open_run(maps) as found:
        assert mean == pytest.approx(found.metrics("gradcam")["deletion"].mean(), rel=1e-5)


@pytest.mark.soak
def test_a_gate_against_another_run_pairs_its_rows(place: Path, maps: Path, xai: Commands):
    call = ["evaluate", maps, *(word for text in SETTINGS for word in ("--set", text))]
    same_run = xai(*call, "--gate", "gradcam.insertion>=reference-0.001", "--against", place / "whole")
    assert same_run.code == 0, same_run.stdout + same_run.stderr
    higher = xai(*call, "--gate", "gradcam.insertion>=reference+0.001", "--against", place / "whole")
    assert higher.code == 4


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("rod>=0.1", "no metric 'rod'"),
        ("gradcam.insertoin>=0.1", "did you mean 'insertion'"),
        ("insertion>=reference", "--against"),
        ("insertion=>1", "expected"),
    ],
)
def test_a_gate_that_cannot_be_judged_stops_before_the_run(
    place: Path, tmp_path: Path, xai: Commands, gate: str, said: str
):
    config = written(tmp_path / "config.yaml", config_of(place / "photos", tmp_path / "run"))
    ended = xai("evaluate", config, "--gate", gate)
    assert ended.code == 2
    assert said in ended.stderr
    assert not (tmp_path / "run").exists()


def test_the_table_csv_and_curves_are_written(maps: Path, xai: Commands):
    ended = xai("evaluate", maps, *(word for text in SETTINGS for word in ("--set", text)), "--baselines")
    assert ended.code == 0, ended.stderr
    for name in ("gradcam", "random", "centre", "sobel", "deletion ↓", "insertion ↑"):
        assert name in ended.stdout
    lines = (maps / "metrics.csv").read_text().splitlines()
    assert lines[0] == "path,target,method,metric,value"
    assert len(lines) == 1 + COUNT * 4 * 2
    with Image.open(maps / "curves-insertion.png") as drawn:
        assert drawn.size[0] > 600


@pytest.mark.soak
def test_compare_scores_the_baselines_that_are_missing(maps: Path, xai: Commands):
    evaluate(maps, overrides=SETTINGS)
    ended = xai("compare", maps, "--no-baselines", "--json")
    assert ended.code == 0, ended.stderr
    assert "centre" not in ended.stdout
    ended = xai("compare", maps, "--json")
    assert ended.code == 0, ended.stderr
    assert "centre" in ended.stdout
    with xcli.open_run(maps) as found:
        assert found.scored == ("centre", "gradcam", "random", "sobel")


def test_a_run_is_not_evaluated_before_it_is_finished(place: Path, tmp_path: Path, xai: Commands):
    config = written(tmp_path / "config.yaml", config_of(place / "photos", tmp_path / "run"))
    assert xai("explain", config, "--shard", "1/2").code == 0
    ended = xai("evaluate", tmp_path / "run")
    assert ended.code == 2
    assert "not finished" in ended.stderr


def test_two_evaluations_at_once_are_refused(maps: Path, xai: Commands):
    from xcli.durable import locked

    with locked(maps / "locks" / "evaluation.lock"):
        ended = xai("evaluate", maps, *(word for text in SETTINGS for word in ("--set", text)))
    assert ended.code == 5
    assert yaml.safe_load(load(maps).record.config)["metrics"] == []  # type: ignore[union-attr]


# --- the scores say what they should --------------------------------------------------------------------------------


@pytest.mark.soak
def test_gradcam_beats_noise_over_200_scenes(tmp_path: Path, xai: Commands):
    """By deletion, insertion and ROAD, with p < 0.01; and by everything that knows where the objects are."""
    from xcli.demo.scenes import load_photos, write_pairs

    samples = Path(__file__).parents[1] / "sample_images"
    write_pairs(tmp_path / "pairs", 200, load_photos(samples / "photos"))
    sections = config_of(
        tmp_path / "pairs" / "scenes", tmp_path / "run", methods=["gradcam", "random"],
        model={"preprocess": "auto"}, images={"truth": str(tmp_path / "pairs" / "masks")},
        metrics=[*({"name": name, "steps": 8} for name in ("deletion", "insertion")), "road", "relevance-mass"],
        runtime={"batch_size": "auto"},
    )  # fmt: skip
    assert xai("evaluate", written(tmp_path / "config.yaml", sections)).code == 0
    with xcli.open_run(tmp_path / "run") as found:
        gradcam, noise = found.metrics("gradcam"), found.metrics("random")
    for name, sign in (("deletion", -1), ("insertion", 1), ("road", 1), ("relevance-mass", 1)):
        ahead = sign * (gradcam[name] - noise[name])
        assert scipy.stats.wilcoxon(ahead[~np.isnan(ahead)], alternative="greater").pvalue < 0.01, name
