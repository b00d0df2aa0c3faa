"""Numbers gone wrong: what is not finite is recorded with its reason, never painted, and lets no gate pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from runs import SIDE, Commands, longer, photos, plain, written
from scored_runs import scored_run
from store_driver import columns_of

from xcli.gates import judge, parse
from xcli.scoretable import read_scores
from xcli.targets import Classes, Predicted, Top, resolve

NETWORKS = Path(__file__).with_name("odd_networks.py")
COUNT = 6
METHODS = ["gradcam", "eigencam", "random"]
PICTURES = {"png": ["overlay", "heatmap", "panel"]}
METRICS = [{"name": "deletion", "steps": 2}, "sparseness"]
WRONG = "NaN or infinite scores or maps", "recorded row by row with the reason, never painted", "0"
GATE = "a gate over NaN", "fails, and says in how many rows", "4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("numbers") / "photos"
    photos(place, COUNT)
    return place


@pytest.fixture(scope="module")
def healthy(folder: Path, xai: Commands) -> Path:
    ended = xai("explain", config_of(folder, folder.parent / "healthy", "no", output=PICTURES))
    assert ended.code == 0, ended.stderr
    return folder.parent / "healthy"


@pytest.fixture(scope="module")
def lost(folder: Path, healthy: Path) -> np.ndarray:
    """Which pictures are a little brighter than grey."""
    means = []
    for path in columns_of(healthy / "results.h5")["images/path"]:
        small = Image.open(folder / path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        means.append(np.asarray(small).mean() / 255 - 0.5)
    bright = np.array(means) > 0.02
    assert np.abs(np.array(means) - 0.02).min() > 0.005, "no picture is in doubt"
    assert 1 < bright.sum() < COUNT - 1
    return bright


def config_of(folder: Path, output: Path, how: str, by: float = 1.0, /, **sections: Any) -> Path:
    model = {"source": "factory", "name": f"{NETWORKS}:odd", "args": {"how": how, "by": by}}
    config = plain(folder, output, **{"model": model, "methods": METHODS, **sections})
    return written(output.parent / f"{output.name}.yaml", config)


def painted(output: Path, kind: str, method: str) -> list[str]:
    place = output / kind / method
    return sorted(str(file.relative_to(place)) for file in place.rglob("*.png"))


def pictures_of(output: Path, rows: np.ndarray) -> list[str]:
    return sorted(f"{path}.png" for path in columns_of(output / "results.h5")["images/path"][rows])


# --- scores --------------------------------------------------------------------------------------------------


@pytest.mark.case(*WRONG)
@pytest.mark.parametrize("how", ["one infinite", *longer("nan", "one nan")])
def test_without_finite_scores_there_is_no_class_no_map_and_no_picture(
    folder: Path,
    healthy: Path,
    lost: np.ndarray,
    tmp_path: Path,
    xai: Commands,
    ends: Callable[[int], None],
    how: str,
):
    ended = xai("explain", config_of(folder, tmp_path / "run", how, output=PICTURES), "--json")
    ends(ended.code)
    told = json.loads(ended.stdout)
    assert told["scores_not_finite"] == lost.sum()
    assert told["not_finite"] == dict.fromkeys(METHODS, lost.sum())
    found, whole = columns_of(tmp_path / "run" / "results.h5"), columns_of(healthy / "results.h5")
    np.testing.assert_array_equal(found["explanations/status"], np.where(lost, 2, 0))
    np.testing.assert_array_equal(
        found["explanations/target"], np.where(lost, -1, whole["explanations/target"])
    )
    shown = "inf" if how == "one infinite" else "nan"
    reasons = [f"not finite: the score is {shown}, its probability nan" if bad else "" for bad in lost]
    assert list(found["explanations/error"]) == reasons
    for name in METHODS:
        np.testing.assert_array_equal(found[f"status/{name}"], np.where(lost, 2, whole[f"status/{name}"]))
        assert np.isnan(found[f"heatmaps/{name}"][lost]).all()
        np.testing.assert_array_equal(found[f"heatmaps/{name}"][~lost], whole[f"heatmaps/{name}"][~lost])
        for kind in ("overlays", "heatmaps"):
            assert painted(tmp_path / "run", kind, name) == pictures_of(healthy, ~lost)
        assert ended.stderr.count(f"{lost.sum()} maps of {name} are not finite") == 1, "once, with a count"
    assert ended.stderr.count(f"{lost.sum()} explanations have no finite score") == 1


@pytest.mark.soak
def test_a_class_that_is_asked_for_stays_the_target(
    folder: Path, lost: np.ndarray, tmp_path: Path, xai: Commands
):
    target = [{"class": [1, 3]}, {"top": 2}]
    config = config_of(folder, tmp_path / "run", "one infinite", methods=["random"], target=target)
    assert xai("explain", config).code == 0
    found = columns_of(tmp_path / "run" / "results.h5")
    for image, bad in enumerate(lost):
        own = found["explanations/image"] == image
        targets, status = found["explanations/target"][own].tolist(), found["explanations/status"][own]
        assert targets == [1, 3, -1] if bad else len(targets) >= 2
        assert (status == (2 if bad else 0)).all()


def test_where_no_class_can_be_told_the_predicted_one_is_none():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[1.0, 2, 0], [nan, 2, 0], [inf, 2, 0], [-inf, 2, 0], [-inf, -inf, -inf]])
    labels = torch.full((5,), -1)
    rows = resolve([Predicted()], logits, labels)
    assert rows.target.tolist() == [1, -1, -1, 1, -1]
    assert rows.decided().target.tolist() == [1, 0, 0, 1, 0]
    rows = resolve([Classes((2,)), Top(2)], logits, labels)
    assert [rows.target[rows.image == i].tolist() for i in range(5)] == [
        [2, 1, 0],
        [2, -1],
        [2, -1],
        [2, 1],
        [2, -1],
    ]


@pytest.mark.soak
def test_images_of_which_nothing_can_be_told_are_explained_whichever_are_asked_for(
    folder: Path, lost: np.ndarray, tmp_path: Path, xai: Commands
):
    only = {"path": str(folder), "only": {"probability_below": 0.0}}
    config = config_of(folder, tmp_path / "run", "nan", methods=["random"], images=only)
    assert xai("explain", config).code == 0
    found = columns_of(tmp_path / "run" / "results.h5")
    np.testing.assert_array_equal(found["explanations/image"], np.flatnonzero(lost))
    assert (found["explanations/status"] == 2).all()


# --- maps ----------------------------------------------------------------------------------------------------


@pytest.mark.case(*WRONG)
def test_a_map_that_is_not_finite_is_not_painted_and_no_old_picture_stays(
    folder: Path,
    healthy: Path,
    lost: np.ndarray,
    tmp_path: Path,
    xai: Commands,
    ends: Callable[[int], None],
):
    for kind in ("overlays", "heatmaps"):
        for path in pictures_of(healthy, lost | True):
            (tmp_path / "run" / kind / "gradcam" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / kind / "gradcam" / path).write_bytes(b"an old one")
    ended = xai("explain", config_of(folder, tmp_path / "run", "gradients", output=PICTURES), "--json")
    ends(ended.code)
    told = json.loads(ended.stdout)
    assert told["not_finite"] == {"gradcam": lost.sum(), "eigencam": 0, "random": 0}
    assert told["scores_not_finite"] == 0
    found, whole = columns_of(tmp_path / "run" / "results.h5"), columns_of(healthy / "results.h5")
    np.testing.assert_array_equal(found["status/gradcam"] == 2, lost)
    np.testing.assert_array_equal(found["heatmaps/eigencam"], whole["heatmaps/eigencam"])
    for kind in ("overlays", "heatmaps"):
        assert painted(tmp_path / "run", kind, "gradcam") == pictures_of(healthy, ~lost)
        assert painted(tmp_path / "run", kind, "eigencam") == pictures_of(healthy, lost | True)
    first = str(columns_of(healthy / "results.h5")["images/path"][lost][0])
    panels = [np.asarray(Image.open(run / "panels" / f"{first}.png")) for run in (tmp_path / "run", healthy)]
    cells = [panel[70:-20, 16 + 264 : 16 + 2 * 264 - 8] for panel in panels]  # beside the picture itself
    assert [len(np.unique(cell.reshape(-1, 3), axis=0)) > 500 for cell in cells] == [False, True]
    assert "maps of gradcam are not finite" in ended.stderr
    assert "maps of eigencam" not in ended.stderr


@pytest.mark.soak
@pytest.mark.parametrize(
    ("sections", "by", "status"),
    [
        ({"runtime": {"precision": "float16"}, "methods": ["random"]}, 1e5, "explanations/status"),
        ({"runtime": {"precision": "bfloat16"}}, 1e38, "explanations/status"),
        (
            {"output": {"heatmap": {"dtype": "float16"}}, "methods": [{"name": "gradcam", "relu": False}]},
            1e9,
            "status/gradcam",
        ),
    ],
    ids=["float16", "bfloat16", "maps in float16"],
)
def test_numbers_beyond_a_type_are_marked(
    folder: Path,
    lost: np.ndarray,
    tmp_path: Path,
    xai: Commands,
    sections: dict[str, Any],
    by: float,
    status: str,
):
    ended = xai("explain", config_of(folder, tmp_path / "run", "scaled", by, **sections))
    assert ended.code == 0, ended.stderr
    found = columns_of(tmp_path / "run" / "results.h5")
    np.testing.assert_array_equal(found[status] == 2, lost)
    assert "not finite" in ended.stderr or "no finite score" in ended.stderr


# --- metrics and gates ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(folder: Path, lost: np.ndarray, xai: Commands) -> Path:
    """A run in which some scores are not finite, scored in one pass with its baselines."""
    output = folder.parent / "scored"
    ended = xai(
        "evaluate",
        config_of(folder, output, "nan", methods=["gradcam"], metrics=METRICS, baselines=True),
    )
    assert ended.code == 0, ended.stderr
    return output


@pytest.mark.soak
def test_what_has_no_finite_score_is_not_measured_in_one_pass_or_later(
    folder: Path, lost: np.ndarray, scored: Path, tmp_path: Path, xai: Commands
):
    assert xai("explain", config_of(folder, tmp_path / "run", "nan", methods=["gradcam"])).code == 0
    choice = ("--set", f"metrics={json.dumps(METRICS)}", "--set", "baselines=true")
    ended = xai("evaluate", tmp_path / "run", *choice, "--json")
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["scores"]["gradcam"]["sparseness"]["n"] == (~lost).sum()
    found, once = (columns_of(run / "results.h5") for run in (tmp_path / "run", scored))
    names = [name for name in once if name.startswith("metrics/")]
    assert {name.split("/")[1] for name in names} == {"gradcam", "random", "centre", "sobel"}
    for name in names:
        np.testing.assert_array_equal(np.isnan(found[name]), np.isnan(once[name]), err_msg=name)
        assert np.isnan(once[name][lost]).all(), name


@pytest.mark.case(*GATE)
@pytest.mark.parametrize(
    "gate",
    ["sparseness>=-9", *longer("p10(gradcam.sparseness)<9", "max(random.sparseness)<9", "deletion<9")],
)
def test_a_gate_over_rows_that_are_not_finite_fails(
    lost: np.ndarray, scored: Path, xai: Commands, ends: Callable[[int], None], gate: str
):
    ended = xai("evaluate", scored, "--gate", gate, "--json")
    ends(ended.code)
    (verdict,) = json.loads(ended.stdout)["gates"]
    assert (verdict["passed"], verdict["broken"]) == (False, lost.sum())


@pytest.mark.soak
@pytest.mark.case(*GATE)
@pytest.mark.parametrize("way", ["here", "there"])
def test_a_gate_against_a_reference_fails_whichever_of_the_two_is_not_finite(
    folder: Path,
    lost: np.ndarray,
    scored: Path,
    tmp_path: Path,
    xai: Commands,
    ends: Callable[[int], None],
    way: str,
):
    """In the other run these rows have a class, so that they are in it alone."""
    config = config_of(folder, tmp_path / "run", "no", methods=["gradcam"], metrics=METRICS)
    assert xai("evaluate", config).code == 0
    runs = [scored, tmp_path / "run"] if way == "here" else [tmp_path / "run", scored]
    ended = xai("evaluate", runs[0], "--gate", "sparseness>=reference-9", "--against", runs[1], "--json")
    (verdict,) = json.loads(ended.stdout)["gates"]
    assert verdict["unpaired"] == 2 * lost.sum()
    if way == "here":
        ends(ended.code)
        assert verdict["broken"] == lost.sum()
    else:  # rows that only the reference has do not count
        assert (ended.code, verdict["broken"]) == (0, 0)
        ends(xai("evaluate", runs[0], "--gate", "sparseness>=reference+9", "--against", runs[1]).code)


@pytest.mark.soak
@pytest.mark.case(*GATE)
def test_a_gate_over_no_rows_at_all_fails(tmp_path: Path, xai: Commands, ends: Callable[[int], None]):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "bad.png").write_text("no picture")
    config = config_of(tmp_path / "photos", tmp_path / "run", "no", methods=["gradcam"], metrics=METRICS)
    ended = xai("evaluate", config, "--gate", "sparseness>=0")
    ends(ended.code)
    assert "no value is defined" in ended.stdout


@pytest.mark.parametrize(
    ("value", "status", "passes"),
    [
        (0.5, 0, True),
        (np.nan, 0, True),
        (np.inf, 0, False),
        (-np.inf, 0, False),
        (0.5, 2, False),
        (0.5, 3, False),
    ],
)
def test_a_gate_fails_over_what_is_infinite_or_without_a_map_not_over_what_is_undefined(
    tmp_path: Path, value: float, status: int, passes: bool
):
    values = np.array([0.25, value, 0.75, 0.5])
    run = scored_run(tmp_path / "run", {"gradcam": {"road": values}}, scalars={"gradcam": {"mege": 0.5}})
    with h5py.File(run / "results.h5", "r+") as file:
        file["status/gradcam"] = np.array([0, status, 1, 0], np.uint8)
    scores = read_scores(run)
    for text in ("road>=-9", "road<=9", "median(road)>=-9", "p10(road)<=9"):
        (verdict,) = judge(parse(text), scores)
        assert (verdict.passed, verdict.broken) == (passes, int(not passes)), text
        assert ("not finite in 1 row; wanted" in verdict.line()) != passes
    (verdict,) = judge(parse("road>=reference-9"), scores, scores)
    assert verdict.passed == passes
    (verdict,) = judge(parse("mege>=0"), scores)
    assert verdict.passed == (status == 0), "one number a run"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gate_over_one_number_a_run_that_is_not_finite_fails(tmp_path: Path, value: float):
    run = scored_run(tmp_path / "run", {"gradcam": {"road": [0.5]}}, scalars={"gradcam": {"mege": value}})
    for text in ("mege>=-9", "mege<=9"):
        (verdict,) = judge(parse(text), read_scores(run))
        assert not verdict.passed
        assert verdict.line().startswith("FAIL")


def test_a_gate_fails_where_a_step_to_the_value_was_not_a_number(tmp_path: Path):
    """The picture has a score and a map; with part of it removed, the network gave NaN."""
    curve = [[1, 0.5, 0.2], [1, np.nan, 0.2], [np.nan] * 3]  # the third row was not measured
    found = read_scores(
        scored_run(
            tmp_path / "run",
            {"a": {"deletion": [0.1, np.nan, np.nan]}},
            lower=["deletion"],
            curves={"a": {"deletion": (curve, [0, 0.5, 1])}},
        )
    )
    (verdict,) = judge(parse("deletion<=0.3"), found)
    assert (verdict.passed, verdict.broken) == (False, 1)
