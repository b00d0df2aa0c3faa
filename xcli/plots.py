"""Pictures of scores: the curves behind a metric, and the leaderboard. Drawn by matplotlib, without a display."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xcli.durable import make_folder, write_file
from xcli.intervals import places
from xcli.leaderboard import Contest, Leaderboard, as_json, csv_text
from xcli.scoretable import Column, Curve, ScoreTable, curves_of, read_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette, told apart with any kind of colour vision; without its yellow, too pale for a line."""

GREY, PALE, INK = "#7f7f7f", "#d9d9d9", "#1a1a1a"
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)))
"""When the colours are used up, they come again with the next of these."""

BASELINE_DASHES: tuple[Any, ...] = ((0, (6, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)))
MOST_BANDS = 2
"""So many methods have a band; of more, only the best: bands over bands say nothing."""

MOST_ACROSS = 4
"""Panels of the leaderboard beside one another."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


# --- curves --------------------------------------------------------------------------------------------------


def curves(scores: ScoreTable, folder: Path) -> list[Path]:
    """Draw the mean curve of every method and its quartiles, one PNG a metric: ``curves-<metric>.png``.

    Raises:
        OutputUnwritable: ``folder`` cannot be written.
    """
    paths = []
    make_folder(folder)
    for metric, methods in curves_of(scores).items():
        path = folder / f"curves-{metric}.png"
        write_file(
            path, curves_picture(scores, metric, methods), path.with_name(f"{path.name}.tmp"), "curves"
        )
        paths.append(path)
    return paths


def curves_picture(scores: ScoreTable, metric: str, methods: Sequence[str]) -> bytes:
    """The curves of one metric as PNG: the best method first in the legend, baselines grey and dashed."""
    columns = {method: scores.columns[method, metric] for method in methods}
    order = by_mean(columns, scores)
    own = [method for method in order if method not in scores.baselines]
    styles = styles_of(own, [method for method in order if method in scores.baselines])
    digits = places(mean_of(column) for column in columns.values())
    with drawing(6.8, 4.0) as figure:
        axes = figure.subplots()
        for place, method in enumerate(order):
            curve = read_curve(scores, method, metric)
            banded = method in own[: MOST_BANDS if len(own) <= MOST_BANDS else 1]
            name = f"{mean_of(columns[method]):{digits}}  {method}"
            draw_curve(axes, curve, name, styles[method], banded, height=3 - place / len(order))
        label_curves(axes, metric, columns[order[0]])
        return png(figure)


def by_mean(columns: Mapping[str, Column], scores: ScoreTable) -> list[str]:
    """Methods, best first, then baselines, best first."""
    sign = {method: -1 if column.direction == "higher" else 1 for method, column in columns.items()}
    badness = {method: sign[method] * mean_of(column) for method, column in columns.items()}
    return sorted(columns, key=lambda m: (m in scores.baselines, math.isnan(badness[m]), badness[m], m))


def mean_of(column: Column) -> float:
    """The mean of the defined rows, or the number of the run."""
    if column.values is None or np.isnan(column.values).all():
        return math.nan if column.summary is None else column.summary
    return float(np.nanmean(column.values, dtype=np.float64))


def styles_of(methods: Sequence[str], baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each line is drawn; a method has its colour by name, whichever place it takes."""
    styles: dict[str, dict[str, Any]] = {}
    for i, method in enumerate(sorted(methods)):
        dashes = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[method] = {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes, "linewidth": 1.8}
    for i, method in enumerate(sorted(baselines)):
        dashes = BASELINE_DASHES[i % len(BASELINE_DASHES)]
        styles[method] = {"color": GREY, "linestyle": dashes, "linewidth": 1.3}
    return styles


def draw_curve(
    axes: Axes, curve: Curve, name: str, style: Mapping[str, Any], banded: bool, height: float
) -> None:
    """One method: the mean over the rows that are defined throughout, and the quartiles as a band."""
    rows = curve.values[~np.isnan(curve.values).any(1)]
    if not len(rows):
        return
    axes.plot(curve.fraction, rows.mean(0, dtype=np.float64), label=name, zorder=height, **style)
    if banded:
        low, high = np.quantile(rows, [0.25, 0.75], axis=0)
        axes.fill_between(curve.fraction, low, high, color=style["color"], alpha=0.13, linewidth=0, zorder=1)


def label_curves(axes: Axes, metric: str, column: Column) -> None:
    """What is drawn, in words."""
    taken = "inserted" if "insertion" in column.kind else "removed"
    axes.set_xlabel(f"share of pixels {taken}" if axes.get_xlim()[1] < 1.1 else "step")
    axes.set_ylabel(str(column.params.get("score", "score")))
    axes.set_title(f"{metric}  ({column.direction} is better)", loc="left", fontsize=10, color=INK)
    axes.margins(x=0.01)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_lines():
        axes.legend(
            title="mean of the metric;\nband: quartiles of the rows", title_fontsize=8, alignment="left",
            loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.4,
        )  # fmt: skip


# --- the leaderboard -----------------------------------------------------------------------------------------


def save_leaderboard(board: Leaderboard, folder: Path) -> list[Path]:
    """Write leaderboard.csv, .json and .png into ``folder``; their paths.

    Raises:
        OutputUnwritable: ``folder`` cannot be written.
    """
    document = json.dumps(as_json(board), indent=1)
    made = {
        "csv": csv_text(board).encode(),
        "json": f"{document}\n".encode(),
        "png": leaderboard_picture(board),
    }
    return [save(folder / f"leaderboard.{kind}", data) for kind, data in made.items()]


def leaderboard_picture(board: Leaderboard) -> bytes:
    """The leaderboard as PNG: a panel a metric, a line a method, dots with their intervals.

    Methods are in the order of their mean rank, baselines below them, hollow; a dotted line marks the best baseline.
    """
    methods = lines_of(board)
    across = min(MOST_ACROSS, len(board.contests))
    down = -(-len(board.contests) // across)
    longest = max(len(method) for method in methods)
    width = 2.1 * across + 0.075 * longest + 0.3
    with drawing(width, (0.22 * len(methods) + 0.75) * down) as figure:
        panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
        for panel, contest in zip(panels, board.contests, strict=False):
            draw_contest(panel, contest, methods)
        for panel in panels[len(board.contests) :]:
            panel.set_visible(False)
        bar = "; dotted: the best baseline" if board.scores.baselines else ""
        caption = f"mean and 95 % interval; blue: the best{bar}"
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color=GREY)
        return png(figure)


def lines_of(board: Leaderboard) -> list[str]:
    """The methods from the top to the bottom of the picture."""
    first = {one.method: i for i, one in enumerate(board.contests[0].standings)}
    return sorted(
        board.scores.methods,
        key=lambda m: (
            m in board.scores.baselines,
            board.overall.get(m, math.inf),
            first.get(m, math.inf),
            m,
        ),
    )


def draw_contest(axes: Axes, contest: Contest, methods: Sequence[str]) -> None:
    """One metric."""
    height = {method: -place for place, method in enumerate(methods)}
    floor = [one.mean.value for one in contest.standings if one.baseline and not math.isnan(one.mean.value)]
    if floor:
        best = max(floor) if contest.direction == "higher" else min(floor)
        axes.axvline(best, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for one in contest.standings:
        first = one.method == contest.best and not one.baseline
        colour = GREY if one.baseline else COLOURS[0] if first else INK
        y = height[one.method]
        axes.plot([one.mean.low, one.mean.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        fill = "white" if one.baseline else colour
        axes.plot(one.mean.value, y, "o", markersize=5, color=colour, markerfacecolor=fill, zorder=3)
    arrow = "↑" if contest.direction == "higher" else "↓"
    axes.set_title(f"{contest.metric} {arrow}", loc="left", fontsize=9.5, color=INK)
    axes.set_yticks(list(height.values()), list(height))
    axes.set_ylim(0.6 - len(methods), 0.6)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


# --- figures -------------------------------------------------------------------------------------------------


@contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """An empty figure, inches, in this file's style; the settings of the process stay."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        FigureCanvasAgg(figure)
        yield figure


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=DPI, metadata={"Software": None})
    return memory.getvalue()


def save(path: Path, data: bytes) -> Path:
    """Replace ``path`` by ``data`` in one step."""
    make_folder(path.parent)
    write_file(path, data, path.with_name(f"{path.name}.{os.getpid()}.tmp"), "picture")
    return path
