"""Pictures of scores: what is drawn, and that it can be."""

import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from scored_runs import NAN, scored_run

from xcli import plots
from xcli.leaderboard import compared
from xcli.scoretable import read_scores

RANDOM = np.random.default_rng(0)
STEPS = np.linspace(0, 1, 5)
BASELINES = ("random", "centre", "sobel")


def run_with_curves(folder, methods, metric="deletion", fraction=STEPS, **options):
    values = {m: RANDOM.random((6, len(fraction))) for m in (*methods, *BASELINES)}
    scores = {m: {metric: curve.mean(1) + i} for i, (m, curve) in enumerate(values.items())}
    curves = {m: {metric: (curve, fraction)} for m, curve in values.items()}
    run = scored_run(folder, scores, curves=curves, baselines=BASELINES, **options)
    return read_scores(run), values


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is made into a PNG."""
    seen, png = [], plots.png

    def kept(figure):
        seen.append(figure)
        return png(figure)

    monkeypatch.setattr(plots, "png", kept)
    return seen


def drawn(figure):
    """label without its number -> line"""
    return {line.get_label().split(maxsplit=1)[1]: line for line in figure.axes[0].get_lines()}


# --- curves --------------------------------------------------------------------------------------------------


def test_a_png_for_each_metric_with_curves(tmp_path):
    scores, _ = run_with_curves(tmp_path / "run", ("gradcam",))
    (path,) = plots.curves(scores, tmp_path / "new" / "plots")
    assert path == tmp_path / "new" / "plots" / "curves-deletion.png"
    with Image.open(path) as picture:
        assert picture.size == (1020, 600)
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_curves_are_means_with_quartiles_and_baselines_grey_and_dashed(tmp_path, figures):
    scores, values = run_with_curves(tmp_path, ("gradcam", "layercam"), lower=("deletion",))
    plots.curves(scores, tmp_path)
    axes, lines = figures[0].axes[0], drawn(figures[0])
    assert list(lines) == ["gradcam", "layercam", "random", "centre", "sobel"]  # best first, then baselines
    np.testing.assert_allclose(lines["gradcam"].get_ydata(), values["gradcam"].mean(0), atol=1e-6)
    np.testing.assert_allclose(lines["gradcam"].get_xdata(), STEPS)
    assert lines["gradcam"].get_label() == f"{values['gradcam'].mean():.3f}  gradcam"
    for name, line in lines.items():
        assert (line.get_color() == plots.GREY) == (name in BASELINES)
        assert line.is_dashed() == (name in BASELINES)
    bands = axes.collections
    assert len(bands) == 2  # of the methods
    top = {round(float(y), 5) for y in bands[0].get_paths()[0].vertices[:, 1]}
    assert top >= {round(float(y), 5) for y in np.quantile(values["gradcam"].astype(np.float32), 0.75, 0)}
    assert axes.get_xlabel() == "share of pixels removed"
    assert axes.get_title("left") == "deletion  (lower is better)"


def test_the_axis_says_what_happens(tmp_path, figures):
    params = {"insertion": {"score": "logit"}}
    plots.curves(run_with_curves(tmp_path / "a", ("m",), "insertion", params=params)[0], tmp_path)
    plots.curves(run_with_curves(tmp_path / "b", ("m",), "sensitivity-n", np.arange(4.0))[0], tmp_path)
    assert [figure.axes[0].get_xlabel() for figure in figures] == ["share of pixels inserted", "step"]
    assert [figure.axes[0].get_ylabel() for figure in figures] == ["logit", "score"]


def test_many_methods_stay_apart(tmp_path, figures):
    scores, _ = run_with_curves(tmp_path, [f"method-{i}" for i in range(20)])
    plots.curves(scores, tmp_path)
    lines = drawn(figures[0])
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines.values()}
    assert len(looks) == len(lines) == 23
    assert len(figures[0].axes[0].collections) == 1  # the band of the best alone


def test_rows_without_a_curve_are_left_out(tmp_path, figures):
    curve = np.array([[1, 0.5, 0.0], [NAN, NAN, NAN], [0.5, 0.5, 0.5]])
    scores = {"a": {"k": [0.5, NAN, 0.5]}, "b": {"k": [NAN, NAN, NAN]}}
    curves = {"a": {"k": (curve, [0, 0.5, 1])}, "b": {"k": (np.full((3, 3), NAN), [0, 0.5, 1])}}
    run = read_scores(scored_run(tmp_path, scores, curves=curves))
    plots.curves(run, tmp_path)
    assert list(drawn(figures[0])) == ["a"]
    np.testing.assert_allclose(drawn(figures[0])["a"].get_ydata(), [0.75, 0.5, 0.25])
    nothing = scored_run(tmp_path / "none", {"b": {"k": [NAN] * 3}}, curves={"b": curves["b"]})
    assert len(plots.curves(read_scores(nothing), tmp_path / "none")) == 1


def test_a_curve_without_an_abscissa_is_not_drawn(tmp_path):
    import h5py

    scores, _ = run_with_curves(tmp_path, ("m",))
    with h5py.File(tmp_path / "results.h5", "a") as file:
        for method in file["curves"]:
            del file[f"curves/{method}/deletion.fraction"]
    assert plots.curves(scores, tmp_path) == []


# --- the leaderboard -----------------------------------------------------------------------------------------


def board_of(tmp_path, metrics=("deletion", "road"), methods=("gradcam", "layercam")):
    scores = {
        m: {metric: RANDOM.normal(-i, 0.1, 8) for metric in metrics}
        for i, m in enumerate((*methods, *BASELINES))
    }
    return compared([scored_run(tmp_path, scores, baselines=BASELINES)])


def test_a_panel_for_each_metric_and_a_dot_for_each_method(tmp_path, figures):
    board = board_of(tmp_path)
    picture = plots.leaderboard_picture(board)
    assert Image.open(io.BytesIO(picture)).size[0] > 500
    panels = figures[0].axes
    assert [panel.get_title("left") for panel in panels] == ["deletion ↑", "road ↑"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["gradcam", "layercam", *BASELINES]
    for panel, contest in zip(panels, board.contests):
        dots = {line.get_ydata()[0]: line for line in panel.get_lines() if line.get_marker() == "o"}
        bars = [tuple(line.get_xdata()) for line in panel.get_lines() if line.get_linewidth() == 1.6]
        assert len(dots) == len(bars) == 5
        assert {(one.mean.low, one.mean.high) for one in contest.standings} == set(bars)
        assert dots[0].get_xdata()[0] == contest.standings[0].mean.value
        assert dots[0].get_color() == plots.COLOURS[0]
        hollow = {y for y, dot in dots.items() if dot.get_markerfacecolor() == "white"}
        assert hollow == {-2, -3, -4}


def test_many_metrics_take_several_rows_of_panels(tmp_path, figures):
    plots.leaderboard_picture(board_of(tmp_path, metrics=[f"k{i}" for i in range(6)]))
    assert [panel.get_visible() for panel in figures[0].axes] == [True] * 6 + [False] * 2


def test_one_number_a_run_has_a_dot_alone(tmp_path):
    run = scored_run(tmp_path, {"a": {"k": [1, 2]}}, scalars={"a": {"mege": 0.5}})
    assert plots.leaderboard_picture(compared([run]))


def test_names_are_drawn_as_they_are(tmp_path):
    """A dollar sign is no formula, an underscore hides nothing."""
    runs = [scored_run(tmp_path / name, {"_m": {"k": [1, 2]}}) for name in (r"$\nothing{$", "b")]
    assert plots.leaderboard_picture(compared(runs))


def test_the_settings_of_the_process_stay(tmp_path):
    before = dict(mpl.rcParams)
    picture = plots.leaderboard_picture(board_of(tmp_path))
    assert dict(mpl.rcParams) == before
    assert plots.leaderboard_picture(compared([tmp_path])) == picture  # the same bytes again
