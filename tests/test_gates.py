"""Gates: what is understood, whom they are about, and what becomes of them."""

import json

import numpy as np
import pytest
from scored_runs import NAN, scored_run

from xcli.errors import ConfigError
from xcli.gates import judge, lines, parse, resolve
from xcli.intervals import estimate
from xcli.scoretable import read_scores

# --- grammar -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("road>=0.05", ("mean", "road", ">=", 0.05, False)),
        ("gradcam.insertion >= .4", ("mean", "gradcam.insertion", ">=", 0.4, False)),
        ("  p10( gradcam++.road )  >  -1e-3 ", ("p10", "gradcam++.road", ">", -0.001, False)),
        ("median(deletion)<=0.2", ("median", "deletion", "<=", 0.2, False)),
        ("max(a.b-c_d+1.x)<2", ("max", "a.b-c_d+1.x", "<", 2.0, False)),
        ("road>=reference", ("mean", "road", ">=", 0.0, True)),
        ("road>=reference-0.02", ("mean", "road", ">=", -0.02, True)),
        ("road >= reference + 0.01", ("mean", "road", ">=", 0.01, True)),
        ("road>=reference-+1", ("mean", "road", ">=", -1.0, True)),
        ("road>=+1.", ("mean", "road", ">=", 1.0, False)),
    ],
)
def test_what_is_understood(text, expected):
    gate = parse(text)
    assert (gate.statistic, gate.name, gate.op, gate.bound, gate.reference) == expected
    assert gate.text == text.strip()
    assert parse(f"{gate.name}{gate.op}{gate.wanted}").bound == gate.bound


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "nothing is compared; expected [method.]metric OP bound"),
        ("road", "nothing is compared"),
        ("road=0.5", "= is not one of >= <= > <"),
        ("road==0.5", "== is not one of"),
        ("road=>0.5", "=> is not one of"),
        ("road!=0.5", "!= is not one of"),
        (">=0.5", "'' names no metric"),
        ("0.5<=road", "'road' is no number and no reference"),
        ("my road>=1", "'my road' names no metric"),
        ("p10(road>=1", "names no metric"),
        ("p10()>=1", "names no metric"),
        ("road>=half", "'half' is no number and no reference"),
        ("road>=", "'' is no number"),
        ("road>=5%", "'5%' is no number"),
        ("road>=nan", "is no number"),
        ("road>=1e999", "too large"),
        ("road>=reference*2", "no reference"),
        ("road>=reference-", "no reference"),
        ("road>=0.1>=0.2", "'0.1>=0.2' is no number"),
        ("avg(road)>=1", "'avg' is no statistic; there are mean, median, min, max, and p1 to p99"),
        ("p0(road)>=1", "'p0' is no statistic"),
    ],
)
def test_what_is_not_understood_says_what_is_expected(text, said):
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert str(error.value).startswith(f"gate {text!r}: ")
    assert said in str(error.value)


# --- names ---------------------------------------------------------------------------------------------------

METHODS, METRICS = ("gradcam", "gradcam++", "a.b", "random"), ("road", "road.mine", "deletion")


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("gradcam.road", [("gradcam", "road")]),
        ("gradcam++.road.mine", [("gradcam++", "road.mine")]),
        ("a.b.deletion", [("a.b", "deletion")]),
        ("random.road", [("random", "road")]),
        ("road.mine", [("gradcam", "road.mine"), ("gradcam++", "road.mine"), ("a.b", "road.mine")]),
    ],
)
def test_names_are_those_of_the_run(name, pairs):
    assert resolve(parse(f"{name}>0"), METHODS, METRICS, {"random"}) == pairs


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raod", "no metric 'raod'; did you mean 'road'?; there are road, road.mine, deletion"),
        ("gradcam.raod", "no metric 'raod'; did you mean 'road'?"),
        ("gardcam.road", "no method 'gardcam'; did you mean 'gradcam'?; there are gradcam, gradcam++"),
        ("gardcam.raod", "did you mean 'gradcam.road'?"),
        ("gradcam", "gradcam is a method; write which of its metrics, such as gradcam.road"),
        ("zzz", "no metric 'zzz'; there are"),
    ],
)
def test_unknown_names_come_with_the_nearest(name, said):
    with pytest.raises(ConfigError) as error:
        resolve(parse(f"{name}>0"), METHODS, METRICS)
    assert said in str(error.value)


def test_a_name_with_two_readings_is_refused():
    with pytest.raises(ConfigError, match="a.b.c can mean b.c of a or c of a.b; rename one"):
        resolve(parse("a.b.c>0"), ("a", "a.b"), ("c", "b.c"))
    with pytest.raises(ConfigError, match="can mean metric a.road or road of a"):
        resolve(parse("a.road>0"), ("a",), ("road", "a.road"))


def test_baselines_alone_are_no_methods():
    with pytest.raises(ConfigError, match="no method but baselines; name one, such as random.road"):
        resolve(parse("road>0"), ("random",), ("road",), {"random"})
    with pytest.raises(ConfigError, match="there are none"):
        resolve(parse("road>0"), (), ())


# --- verdicts ------------------------------------------------------------------------------------------------


@pytest.fixture
def scores(tmp_path):
    random = np.random.default_rng(0)
    draw = {
        method: {"road": random.normal(level, 0.1, 24)}
        for method, level in (("gradcam", 0.3), ("eigencam", -0.1), ("random", 0))
    }
    draw["gradcam"]["road"][3] = NAN
    draw["gradcam"]["empty"] = np.full(24, NAN)
    image = np.repeat(np.arange(12), 2)
    scalars = {"gradcam": {"mege": 0.75}, "eigencam": {"mege": 0.5}}
    run = scored_run(
        tmp_path / "run", draw, image=image, target=np.arange(24) % 2, baselines=("random",), scalars=scalars
    )
    return read_scores(run)


def one(text, *runs):
    (verdict,) = judge(parse(text), *runs)
    return verdict


def test_a_verdict_has_the_number_its_interval_and_its_rows(scores):
    verdict = one("gradcam.road>=0.2", scores)
    found = estimate(scores.columns["gradcam", "road"].values, scores.image)
    assert (verdict.value, verdict.low, verdict.high, verdict.n) == (
        found.value,
        found.low,
        found.high,
        23,
    )
    assert verdict.passed
    interval = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    assert verdict.line() == f"pass  gradcam.road  mean {interval} of 23 rows (1 undefined) >= 0.2"
    assert not one("gradcam.road<0.2", scores).passed


def test_a_gate_without_a_method_is_about_all_but_baselines(scores):
    verdicts = judge(parse("road > 0"), scores)
    assert [(verdict.method, verdict.passed) for verdict in verdicts] == [
        ("eigencam", False),
        ("gradcam", True),
    ]
    said = lines(verdicts)
    assert said[0].startswith("FAIL  eigencam.road  mean -0.")
    assert said[1].startswith("pass  gradcam.road   mean 0.")
    assert one("random.road<1", scores).passed


def test_the_statistic_is_the_gates(scores):
    values = scores.columns["eigencam", "road"].values
    verdict = one("p10(eigencam.road)>0", scores)
    assert verdict.value == np.percentile(values.astype(float), 10)
    assert verdict.line().startswith(f"FAIL  eigencam.road  p10 {verdict.value:.3f} [")
    assert one("min(eigencam.road)>-9", scores).line() == (
        f"pass  eigencam.road  min {values.min():.3f} of 24 rows > -9"
    )


def test_no_defined_value_fails_and_says_so(scores):
    verdict = one("gradcam.empty>=-100", scores)
    assert not verdict.passed
    assert verdict.line() == "FAIL  gradcam.empty  no value is defined in 24 rows; wanted mean >= -100"
    eigencam, gradcam = judge(parse("empty<=1"), scores)
    assert eigencam.line() == "FAIL  eigencam.empty  no value is defined at all; wanted mean <= 1"
    assert json.loads(json.dumps(gradcam.as_json()))["value"] is None


def test_one_number_a_run_is_judged_as_it_is(scores):
    eigencam, gradcam = judge(parse("mege>=0.6"), scores)
    assert gradcam.line() == "pass  gradcam.mege  one number a run 0.750 >= 0.6"
    assert eigencam.line() == "FAIL  eigencam.mege  one number a run 0.500 >= 0.6"
    assert (gradcam.n, gradcam.as_json()["low"]) == (0, None)


def test_values_are_compared_as_precisely_as_they_are_stored(tmp_path):
    scores = read_scores(scored_run(tmp_path, {"m": {"k": [0.1, 0.1, 0.1]}}))
    for text, passed in (("k<=0.1", True), ("k>=0.1", True), ("k<0.1", False), ("max(k)>0.1", False)):
        assert one(text, scores).passed is passed, text


def test_a_value_near_its_bound_looks_different_from_it(tmp_path):
    scores = read_scores(scored_run(tmp_path, {"m": {"k": [0.04999, 0.04999]}}))
    assert one("k>=0.05", scores).line() == "FAIL  m.k  mean 0.04999 [0.04999, 0.04999] of 2 rows >= 0.05"


# --- against a reference -------------------------------------------------------------------------------------


def runs(tmp_path, mine, theirs, **others):
    a = scored_run(tmp_path / "a", {"gradcam": {"road": mine[1]}}, image=mine[0], model="new")
    b = scored_run(tmp_path / "b", {"gradcam": {"road": theirs[1]}}, image=theirs[0], model="old", **others)
    return read_scores(a), read_scores(b)


def test_rows_are_paired_by_path_and_target(tmp_path):
    mine = (np.arange(8), np.linspace(0.1, 0.8, 8))
    theirs = (np.array([9, 5, 4, 3, 2, 1]), np.array([0.0, 0.65, 0.5, 0.45, NAN, 0.2]))
    new, old = runs(tmp_path, mine, theirs)
    verdict = one("road>=reference-0.02", new, old)
    a, b = mine[1][[1, 3, 4, 5]], np.array([0.2, 0.45, 0.5, 0.65])
    assert verdict.value == pytest.approx(a.mean(), abs=1e-6)
    assert verdict.bound == pytest.approx(b.mean() - 0.02, abs=1e-6)
    assert (verdict.n, verdict.rows, verdict.unpaired) == (4, 5, 4)
    change = estimate((a - b).astype(np.float32).astype(float), np.arange(4))
    assert (verdict.low, verdict.high) == pytest.approx((change.low, change.high), abs=1e-6)
    assert verdict.line() == (
        "pass  gradcam.road  mean 0.425 of 4 paired rows (1 undefined) >= 0.430 (reference-0.02, which has 0.450)"
        f", difference -0.025 [{change.low:.3f}, {change.high:.3f}], 4 rows unpaired"
    ).replace("pass", "FAIL")
    assert not verdict.passed
    assert one("road>=reference-0.03", new, old).passed


def test_a_run_holds_against_itself(tmp_path):
    rows = (np.arange(6), np.random.default_rng(0).normal(size=6))
    new, old = runs(tmp_path, rows, rows)
    for text in ("road>=reference", "road<=reference", "p30(road)>=reference", "max(road)<=reference"):
        assert one(text, new, old).passed, text
    assert not one("road>reference", new, old).passed
    assert np.isnan(one("median(road)>reference", new, old).low)  # the interval is that of a mean difference


def test_rows_of_one_image_and_target_are_paired_in_their_order(tmp_path):
    new, old = runs(tmp_path, ([0, 0, 1], [1.0, 2, 3]), ([0, 0], [1.5, 2.5]))
    verdict = one("road>=reference", new, old)
    assert (verdict.value, verdict.bound, verdict.n, verdict.unpaired) == (1.5, 2.0, 2, 1)


def test_numbers_of_a_run_are_held_against_one_another(tmp_path):
    new = read_scores(
        scored_run(tmp_path / "a", {"m": {"k": [1, 2]}}, scalars={"m": {"mege": 0.5}}, model="new")
    )
    old = read_scores(
        scored_run(tmp_path / "b", {"m": {"k": [1, 2, 3]}}, scalars={"m": {"mege": 0.625}}, model="old")
    )
    verdict = one("mege>=reference-0.25", new, old)
    assert verdict.line() == (
        "pass  m.mege  one number a run 0.500 >= 0.375 (reference-0.25, which has 0.625), 1 row unpaired"
    )


def test_a_reference_that_does_not_fit_is_refused(tmp_path, scores):
    gate = parse("gradcam.road>=reference")
    with pytest.raises(ConfigError, match="which run is the reference"):
        judge(gate, scores)
    new, old = runs(tmp_path, ([0, 1], [1.0, 2]), ([5, 6], [1.0, 2]))
    with pytest.raises(ConfigError, match="no row .* of a is in the reference b"):
        judge(gate, new, old)
    new, old = runs(tmp_path, ([0, 1], [1.0, 2]), ([0, 1], [1.0, 2]), params={"road": {"steps": 3}})
    with pytest.raises(ConfigError, match="not the same metric in the reference: steps None and 3"):
        judge(gate, new, old)
    new = read_scores(scored_run(tmp_path / "c", {"layercam": {"road": [1, 2]}}))
    with pytest.raises(ConfigError, match="the reference b has no road of layercam"):
        judge(parse("road>=reference"), new, old)


def test_verdicts_are_plain_data(scores):
    told = json.loads(json.dumps(one("gradcam.road>=0.2", scores).as_json()))
    assert told["gate"] == "gradcam.road>=0.2"
    assert (told["method"], told["metric"], told["statistic"], told["op"]) == (
        "gradcam",
        "road",
        "mean",
        ">=",
    )
    assert told["passed"] is True
