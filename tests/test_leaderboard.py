"""Scores as tables, as CSV, and as the leaderboard of one or more runs."""

import csv
import io
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from scored_runs import NAN, scored_run

from xcli.cli.exits import guarded
from xcli.errors import ConfigError, InputError
from xcli.intervals import estimate, holm
from xcli.joining import distinct_names
from xcli.leaderboard import as_json, compared, csv_text, leaderboard
from xcli.scoretable import read_scores, write_csv
from xcli.scoretext import console, show, table


def normal(seed=0, rows=30, **levels):
    random = np.random.default_rng(seed)
    return {method: random.normal(level, 0.1, rows) for method, level in levels.items()}


def by_metric(**metrics):
    """metric -> method -> values, turned around."""
    methods = {method for values in metrics.values() for method in values}
    return {
        method: {metric: values[method] for metric, values in metrics.items() if method in values}
        for method in sorted(methods)
    }


LEVELS = {"gradcam": 0.5, "layercam": 0.45, "eigencam": 0.1, "random": 0.0, "centre": 0.2}
BASELINES = ("random", "centre")


@pytest.fixture
def run(tmp_path):
    scores = by_metric(road=normal(1, **LEVELS), deletion=normal(2, **{m: -v for m, v in LEVELS.items()}))
    scores["eigencam"]["road"][[3, 4]] = NAN
    return scored_run(
        tmp_path / "run",
        scores,
        image=np.repeat(np.arange(15), 2),
        target=np.arange(30) % 2,
        lower=("deletion",),
        baselines=BASELINES,
        scalars={"gradcam": {"mege": 0.7}, "layercam": {"mege": 0.6}, "eigencam": {"road": 0.9}},
    )


def printed(draw, what, width=100, terminal=False):
    out = io.StringIO()
    draw(what, Console(file=out, width=width, force_terminal=terminal, highlight=False))
    return out.getvalue()


# --- reading -------------------------------------------------------------------------------------------------


def test_scores_are_read_from_where_the_contract_has_them(run):
    with h5py.File(run / "results.h5", "a") as file:
        file["metrics/gradcam/road.delta"] = np.zeros(30)  # belongs to road
    scores = read_scores(run)
    assert (scores.name, scores.attrs["model"]) == ("run", "demo:shapes-cnn")
    assert scores.methods == ("eigencam", "gradcam", "layercam", "centre", "random")
    assert scores.baselines == {"centre", "random"}
    assert scores.metrics == ("deletion", "mege", "road")
    assert (scores.direction("road"), scores.direction("deletion")) == ("higher", "lower")
    road = scores.columns["eigencam", "road"]
    assert (np.isnan(road.values).sum(), road.summary) == (2, pytest.approx(0.9))
    assert scores.columns["gradcam", "mege"].values is None
    assert set(scores.of("mege")) == {"gradcam", "layercam"}
    assert read_scores(run / "results.h5").columns.keys() == scores.columns.keys()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        read_scores(tmp_path)


# --- CSV -----------------------------------------------------------------------------------------------------


def test_csv_has_a_line_for_every_row_and_metric(run, monkeypatch):
    monkeypatch.setattr("xcli.scoretable.CSV_ROWS", 7)
    scores = read_scores(run)
    write_csv(scores, run / "scores.csv")
    with (run / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 30 * 5 * 2  # not the numbers of the whole run
    assert [path.name for path in run.iterdir() if path.suffix == ".tmp"] == []
    found = {
        (line["path"], int(line["target"]), line["method"], line["metric"]): line["value"] for line in lines
    }
    for row in (0, 3, 29):
        key = (f"dir/{row // 2:03d}.png", row % 2, "eigencam", "road")
        value = scores.columns["eigencam", "road"].values[row]
        assert found[key] == ("" if np.isnan(value) else str(value))
        assert np.float32(found[key] or "nan") == value or np.isnan(value)


def test_csv_names_what_is_not_utf8_or_has_commas(tmp_path):
    paths = ['a,"b".png', "dir/\\udcff0.png", "zeilen\numbruch.png"]
    run = scored_run(tmp_path, {"m": {"k": [1, 2, 3]}}, paths=paths)
    write_csv(read_scores(run), tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        assert [line["path"] for line in csv.DictReader(file)] == paths


def test_a_full_disk_is_one_plain_error(run):
    """In a process of its own, whose files may hold 1 kB."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from xcli.errors import OutputUnwritable
from xcli.scoretable import read_scores, write_csv
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
scores = read_scores({str(run)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_csv(scores, Path({str(run)!r}) / "scores.csv")
except OutputUnwritable as error:
    sys.exit("free some space" not in str(error))
sys.exit("nothing was raised")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert [path.name for path in run.iterdir()] == ["results.h5"]


# --- the table of a run --------------------------------------------------------------------------------------


def test_the_table_has_means_intervals_arrows_and_baselines_below_a_line(run):
    scores = read_scores(run)
    text = printed(table, scores)
    head, rule, *lines = text.splitlines()
    assert head.split() == ["method", "deletion", "↓", "mege", "↑", "road", "↑", "road", "(run)"]
    assert set(rule) == {"─"}
    assert [line.split()[0] for line in lines[:3]] == ["eigencam", "gradcam", "layercam"]
    assert set(lines[3]) == {"─"}
    assert [line.split()[0] for line in lines[4:6]] == ["centre", "random"]
    found = estimate(scores.columns["gradcam", "road"].values, scores.image)
    assert f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]*" in lines[1]
    assert "]!" in lines[0]  # eigencam, below centre
    assert "0.900" in lines[0]
    assert "mean [95 % interval] of 30 rows of 15 images; * best; ! no better than a baseline" in text
    assert "undefined rows, left out: eigencam.road 2" in text


def test_the_best_is_bold_and_baselines_are_dim_on_a_terminal(run):
    text = printed(table, read_scores(run), terminal=True)
    assert text.count("\x1b[1m") == 3  # the best of each metric
    assert "\x1b[2mcentre" in text
    assert "* best" not in text


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_metrics_that_do_not_fit_go_into_further_tables(tmp_path, width):
    labels = [f"metric-number-{i}" for i in range(9)]
    scores = {m: dict.fromkeys(labels, np.arange(4.0)) for m in ("gradcam", "integrated-gradients")}
    text = printed(table, read_scores(scored_run(tmp_path, scores)), width)
    assert max(map(len, text.splitlines())) <= width
    heads = [line for line in text.splitlines() if line.startswith("method")]
    assert [word for line in heads for word in line.split() if word in labels] == labels
    assert len(heads) == -(-9 // ((width - 20 - 3) // 23))


def test_long_names_are_folded_not_cut(tmp_path):
    name = "m" * 100
    text = printed(table, read_scores(scored_run(tmp_path, {name: {"k": [1.0, 2.0]}})), 60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("m") >= 100


def test_brackets_are_text_and_plain_encodings_suffice(tmp_path):
    run = scored_run(tmp_path / "rün [bold]", {"m": {"k": [1.0, 2.0]}}, lower=("k",))
    raw = io.BytesIO()
    out = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True), width=80, highlight=False)
    table(read_scores(run), out)
    show(compared([run]), out)
    assert b"k v" in raw.getvalue()


def test_a_log_is_100_columns_wide_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(io.StringIO()).width == 100
    monkeypatch.setenv("COLUMNS", "61")
    assert console(io.StringIO()).width == 61


# --- the leaderboard -----------------------------------------------------------------------------------------


def standings(board, metric):
    (contest,) = [contest for contest in board.contests if contest.metric == metric]
    return {one.method: one for one in contest.standings}


def test_one_metric_by_hand(run):
    board = compared([run])
    scores = read_scores(run)
    found = standings(board, "deletion")
    values = {m: scores.columns[m, "deletion"].values.astype(float) for m in scores.methods}
    assert list(found) == ["gradcam", "layercam", "eigencam", "centre", "random"]
    assert [one.rank for one in found.values()] == [1, 2, 3, None, None]
    assert found["gradcam"].difference is None
    others = ("eigencam", "layercam", "centre", "random")
    p = []
    for method in others:
        difference = values[method] - values["gradcam"]
        assert found[method].difference == estimate(difference, scores.image)
        p.append(stats.wilcoxon(difference.reshape(15, 2).mean(1)).pvalue)
        assert found[method].p == pytest.approx(p[-1])
    assert [found[method].p_holm for method in others] == pytest.approx(holm(p))
    assert [one.method for one in found.values() if one.beaten] == ["eigencam"]
    assert found["gradcam"].mean == estimate(values["gradcam"], scores.image)


def test_ranks_are_averaged_over_the_metrics_that_all_methods_have(run):
    board = compared([run])
    assert board.counted == ("deletion", "road")
    assert list(board.overall) == ["gradcam", "layercam", "eigencam"]
    assert board.overall["gradcam"] == 1
    mege = standings(board, "mege")
    assert [one.rank for one in mege.values()] == [1, 2]
    assert all(one.scalar and one.difference is None for one in mege.values())


def test_equal_means_share_a_rank(tmp_path):
    run = scored_run(tmp_path, {m: {"k": v} for m, v in (("a", [1, 2]), ("b", [2, 1]), ("c", [0, 0]))})
    found = standings(compared([run]), "k")
    assert [(m, one.rank) for m, one in found.items()] == [("a", 1.5), ("b", 1.5), ("c", 3)]


def test_undefined_methods_come_last_without_a_rank(tmp_path):
    run = scored_run(tmp_path, {"a": {"k": [NAN, NAN]}, "b": {"k": [1, 2]}})
    board = compared([run])
    assert [(m, one.rank) for m, one in standings(board, "k").items()] == [("b", 1), ("a", None)]
    assert board.overall == {}
    assert "undefined rows, left out: a.k 2" in printed(show, board)


def test_metrics_and_baselines_can_be_left_out(run):
    board = compared([run], metrics=["deletion"], baselines=False)
    assert [contest.metric for contest in board.contests] == ["deletion"]
    assert set(standings(board, "deletion")) == {"gradcam", "layercam", "eigencam"}
    with pytest.raises(ConfigError, match="no metric 'delition'; did you mean 'deletion'"):
        compared([run], metrics=["delition"])


def test_the_printed_leaderboard(run):
    text = printed(show, compared([run]))
    blocks = text.split("\n\n")
    assert blocks[0].split()[:5] == ["deletion", "↓", "mean", "difference", "p"]
    assert " best" in blocks[0]
    assert blocks[0].splitlines()[2].startswith("1   gradcam")
    assert blocks[3].splitlines()[0].split()[:3] == ["ranks", "mean", "rank"]
    assert "mege (not counted)" in blocks[3]
    for width in (60, 80, 140):
        assert max(map(len, printed(show, compared([run]), width).splitlines())) <= width


def test_csv_and_json_hold_the_same_numbers(run):
    board = compared([run])
    document = json.loads(json.dumps(as_json(board), allow_nan=False))
    lines = list(csv.DictReader(io.StringIO(csv_text(board))))
    told = [(c["metric"], one) for c in document["metrics"] for one in c["standings"]]
    assert len(lines) == len(told) == 5 + 2 + 5
    for line, (metric, one) in zip(lines, told):
        assert (line["metric"], line["method"]) == (metric, one["method"])
        for key in ("mean", "low", "p_holm", "difference"):
            assert (float(line[key]) if line[key] else None) == one[key]
    assert document["mean_rank"]["gradcam"] == 1
    assert document["runs"][0]["rows"] == document["rows"] == 30


# --- several runs --------------------------------------------------------------------------------------------


def pair(tmp_path, first=None, second=None, **options):
    """Two runs of two methods and a baseline over six images, with what is different."""
    made = []
    for i, own in enumerate((first or {}, second or {})):
        scores = by_metric(k=normal(0, 6, gradcam=0.5, random=0), j=normal(3, 6, gradcam=0.5, random=0))
        scores["gradcam"]["k"] = scores["gradcam"]["k"] + i
        arguments = {"scores": scores, "baselines": ("random",), **options, **own}
        made.append(scored_run(tmp_path / "ab"[i], **arguments))
    return made


def test_methods_of_several_runs_are_named_by_their_run(tmp_path):
    board = compared(pair(tmp_path))
    assert board.scores.methods == ("a/gradcam", "b/gradcam", "random")  # the same noise: once
    found = standings(board, "k")
    assert [(method, one.rank) for method, one in found.items()] == [
        ("b/gradcam", 1),
        ("a/gradcam", 2),
        ("random", None),
    ]
    assert found["a/gradcam"].difference.value == pytest.approx(-1, abs=1e-6)


def test_rows_are_aligned_by_path_and_target(tmp_path):
    flipped = {"image": np.arange(6)[::-1]}
    runs = pair(tmp_path, second=flipped)
    scores = compared(runs).scores
    first, second = (read_scores(run).columns["gradcam", "j"].values for run in runs)
    np.testing.assert_array_equal(scores.columns["a/gradcam", "j"].values, first)
    np.testing.assert_array_equal(scores.columns["b/gradcam", "j"].values, second[::-1])
    assert {"a/random", "b/random"} <= set(scores.methods)  # not the same any more


def test_unlike_runs_are_refused_with_what_to_do(tmp_path):
    runs = pair(tmp_path / "model", second={"weights": "def"})
    with pytest.raises(ConfigError, match=r"different models: .*\(weights abc\) in a.*--match path"):
        compared(runs)
    assert compared(runs, by_path=True).rows == 6
    runs = pair(tmp_path / "rows", second={"target": [0, 0, 0, 1, 1, 1]})
    with pytest.raises(ConfigError, match="a has 6, b has 6, of which 3 are shared; --match path"):
        compared(runs)
    board = compared(runs, by_path=True)
    assert (board.rows, board.images) == (3, 3)
    assert board.notes == ("3 rows are in all runs; left out are 3 of a, 3 of b",)
    runs = pair(tmp_path / "none", second={"paths": [f"other/{i}.png" for i in range(6)]})
    with pytest.raises(ConfigError, match="0 are shared; nothing can be compared"):
        compared(runs)
    with pytest.raises(ConfigError, match="share no row"):
        compared(runs, by_path=True)


def test_a_metric_with_other_options_is_refused_by_name(tmp_path):
    runs = pair(
        tmp_path, {"params": {"k": {"steps": 32, "score": "logit"}}}, {"params": {"k": {"steps": 10}}}
    )
    for by_path in (False, True):
        with pytest.raises(ConfigError) as error:
            compared(runs, by_path=by_path)
        assert "k is not the same metric in a and b: score logit and None, steps 32 and 10" in str(
            error.value
        )
        assert "--metrics" in str(error.value)
    assert [contest.metric for contest in compared(runs, metrics=["j"]).contests] == ["j"]


def test_numbers_of_whole_runs_are_left_out_where_rows_are(tmp_path):
    scalars = {"scalars": {"gradcam": {"mege": 0.5, "k": 0.7}}}
    whole = compared(pair(tmp_path / "whole", **scalars))
    assert standings(whole, "k")["a/gradcam"].summary == pytest.approx(0.7)
    assert "mege" in whole.scores.metrics
    part = compared(pair(tmp_path / "part", second={"target": [0, 0, 0, 0, 0, 1]}, **scalars), by_path=True)
    assert part.scores.metrics == ("j", "k")
    assert standings(part, "k")["a/gradcam"].summary is None
    assert part.notes[1] == "one number a run, over other rows, hence left out: mege"


def test_a_metric_that_one_run_lacks_is_not_counted(tmp_path):
    runs = pair(tmp_path)
    with h5py.File(runs[1] / "results.h5", "a") as file:
        del file["metrics/gradcam/j"], file["metrics/random/j"]
    board = compared(runs, metrics=["j", "k"])
    assert board.counted == ("k",)
    assert set(standings(board, "j")) == {"a/gradcam", "a/random"}


def test_a_run_without_metrics_says_what_to_do(tmp_path):
    run = scored_run(tmp_path / "bare", {}, image=[0, 1])
    with pytest.raises(ConfigError, match="bare holds no metric: run `xai evaluate .*bare` first"):
        compared([run])


def test_baselines_alone_are_ranked_by_nothing(tmp_path):
    run = scored_run(tmp_path, {"random": {"k": [1, 2]}, "centre": {"k": [2, 3]}}, baselines=BASELINES)
    board = leaderboard([read_scores(run)])
    assert board.contests[0].best == "centre"
    assert board.overall == {}
    printed(show, board)
    with pytest.raises(ConfigError, match="only baselines were scored"):
        compared([run], baselines=False)


def test_names_are_as_short_as_they_can_be(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert distinct_names(paths) == ["x/run", "y/run"]
    assert distinct_names([tmp_path / "x" / "a", tmp_path / "y" / "b"]) == ["a", "b"]
    with pytest.raises(ConfigError, match="given twice"):
        distinct_names([tmp_path / "x", tmp_path / "y" / ".." / "x"])
    run = scored_run(tmp_path / "z", {"m": {"k": [1]}})
    assert distinct_names([run / "results.h5"]) == ["z"]


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def xai(capfd):
    import xcli.cli.compare  # noqa: F401
    from xcli.cli import app

    def call(*arguments):
        capfd.readouterr()
        code = guarded(lambda: app([str(one) for one in arguments], prog_name="xai"))
        return code, *capfd.readouterr()

    return call


def test_the_command_prints_a_table_or_one_json_document(xai, run, tmp_path):
    code, out, _ = xai("compare", run, "--metrics", "road, deletion", "--no-baselines")
    assert code == 0
    assert out.splitlines()[0].split()[:2] == ["deletion", "↓"]
    assert "random" not in out
    code, out, err = xai("compare", run, "--json", "--no-baselines", "--output", tmp_path / "board")
    assert code == 0
    assert json.loads(out)["runs"][0]["name"] == "run"
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == [
        "leaderboard.csv",
        "leaderboard.json",
        "leaderboard.png",
    ]
    assert json.loads((tmp_path / "board" / "leaderboard.json").read_text()) == json.loads(out)
    assert "leaderboard.png" in err


def test_the_command_refuses_in_one_line(xai, run, tmp_path):
    code, out, err = xai("compare", run, "--match", "image", "--no-baselines")
    assert (code, out) == (2, "")
    assert "the one thing to match by is path" in err
    code, _, err = xai("compare", tmp_path / "nothing", "--no-baselines")
    assert code == 2
    assert "holds no run" in err


def test_a_method_is_held_against_the_baselines_of_its_own_run(tmp_path):
    """The noise of another model may score higher than a method of this one."""
    rows = np.ones(6)
    a = scored_run(
        tmp_path / "a", {"gradcam": {"k": 0.9 * rows}, "random": {"k": 0.4 * rows}}, baselines=["random"]
    )
    b = scored_run(
        tmp_path / "b",
        {"gradcam": {"k": 0.3 * rows}, "random": {"k": 0.1 * rows}},
        baselines=["random"],
        weights="d",
    )
    found = standings(compared([a, b], by_path=True), "k")
    assert set(found) == {"a/gradcam", "b/gradcam", "a/random", "b/random"}
    assert not any(one.beaten for one in found.values())
