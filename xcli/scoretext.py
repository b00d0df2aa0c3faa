"""Scores for a reader: tables on a terminal or in a log."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from rich.box import Box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from xcli.intervals import Estimate, places, with_interval
from xcli.leaderboard import Contest, Leaderboard, Standing, standings
from xcli.scoretable import ScoreTable
from xcli.visible import shown

LOG_WIDTH = 100
"""Columns where the output is no terminal and COLUMNS does not say."""

RULED = Box("    \n    \n ── \n    \n ── \n ── \n    \n    \n")
MOST_NOTES = 5


@dataclass(frozen=True)
class Field:
    """One column of a table: its heading and a cell a line, some of them the best."""

    heading: str
    cells: Sequence[str]
    best: frozenset[int] = frozenset()


def console(stream: TextIO) -> Console:
    """Where tables go: as wide as the terminal, 100 columns in a log."""
    free = stream.isatty() or "COLUMNS" in os.environ
    return Console(file=stream, width=None if free else LOG_WIDTH, highlight=False)


# --- one run -------------------------------------------------------------------------------------------------


def table(scores: ScoreTable, out: Console) -> None:
    """Print methods x metrics: the mean of each with its interval, an arrow for the better direction.

    The best method is bold, baselines are dim and below a line; metrics that do not fit beside one another go into
    further tables.
    """
    found = {metric: standings(scores, metric) for metric in scores.metrics}
    fields, starred = [], not out.is_terminal
    for metric, own in found.items():
        by_method = {one.method: one for one in own}
        lines = [by_method.get(method) for method in scores.methods]
        heading = f"{metric} {arrow(scores.direction(metric), out)}"
        fields += numbers(heading, f"{metric} (run)", lines, starred)
    grid(out, scores.methods, fields, baselines=sum(method in scores.baselines for method in scores.methods))
    say(
        out,
        f"mean [95 % interval] of {size(scores)}{legend(found.values(), starred)}",
        *undefined(found, scores),
    )


def numbers(heading: str, of_run: str, lines: Sequence[Standing | None], starred: bool) -> list[Field]:
    """A metric's means with their intervals, a mark where a baseline does as well; and the numbers of the run.

    Args:
        starred: mark the best by a star too, where nothing is bold.
    """
    there = [one for one in lines if one is not None]
    digits = digits_of(there)
    lead = min((one.rank for one in there if one.rank is not None), default=None)
    best = {i for i, one in enumerate(lines) if one is not None and one.rank is not None and one.rank == lead}
    texts = ["-" if one is None else interval(one.mean, digits) for one in lines]
    marks = [
        "!" if one is not None and one.beaten else "*" if starred and i in best else " "
        for i, one in enumerate(lines)
    ]
    cells = [text + mark for text, mark in zip(texts, marks, strict=True)] if {*marks} > {" "} else texts
    fields = [Field(heading, cells, frozenset(best))]
    if any(one.summary is not None and not one.scalar for one in there):
        values = [None if one is None else one.summary for one in lines]
        fields.append(Field(of_run, ["-" if value is None else f"{value:{digits}}" for value in values]))
    return fields


def digits_of(found: Iterable[Standing]) -> str:
    """How the numbers of a metric are formatted."""
    return places(number for one in found for number in (one.mean.value, one.mean.low, one.mean.high))


def interval(found: Estimate, digits: str) -> str:
    """``0.123 [0.101, 0.145]``, or ``-`` where nothing is defined."""
    return "-" if math.isnan(found.value) else with_interval(found.value, found.low, found.high, digits)


# --- the leaderboard -----------------------------------------------------------------------------------------


def show(board: Leaderboard, out: Console) -> None:
    """Print the leaderboard: a table a metric, then the ranks of all."""
    for contest in board.contests:
        show_contest(contest, out)
    if len(board.contests) > 1:
        show_ranks(board, out)
    found = {contest.metric: contest.standings for contest in board.contests}
    say(
        out,
        f"{size(board.scores)}; [95 % interval]; difference: to the best, with p of Wilcoxon's signed-rank test "
        f"after Holm{legend(found.values(), starred=False)}",
        *board.notes,
        *undefined(found, board.scores),
    )


def show_contest(contest: Contest, out: Console) -> None:
    """Print one metric: rank, mean, difference to the best and its p; in a narrow place less of it."""
    own = contest.standings
    title = f"{contest.metric} {arrow(contest.direction, out)}"
    for brief in (False, True):
        made = ruled(
            out,
            [one.method for one in own],
            [
                *numbers("mean", "run", own, starred=False),
                Field("difference", differences(contest, brief)),
                Field("p", [probability(one.p_holm) for one in own]),
            ],
            sum(one.baseline for one in own),
            title,
            ["" if one.rank is None else f"{one.rank:g}" for one in own],
        )
        if wide(out, made) <= out.width:
            break
    out.print(made)
    out.print()


def differences(contest: Contest, brief: bool) -> list[str]:
    """The difference of each to the best, with its interval where there is room."""
    digits = digits_of(contest.standings)
    return [
        "best"
        if one.method == contest.best
        else ""
        if one.difference is None
        else f"{one.difference.value:{digits}}"
        if brief
        else interval(one.difference, digits)
        for one in contest.standings
    ]


def show_ranks(board: Leaderboard, out: Console) -> None:
    """Print the rank of every method in every metric, and the mean of those that all methods have."""
    ranks = {c.metric: {one.method: one.rank for one in c.standings} for c in board.contests}
    methods = [method for method in board.scores.methods if method not in board.scores.baselines]
    methods.sort(key=lambda method: (board.overall.get(method, math.inf), method))
    fields = [Field("mean rank", [f"{board.overall[m]:.2f}" if m in board.overall else "-" for m in methods])]
    for metric, found in ranks.items():
        shown = [found.get(method) for method in methods]
        lead = min((rank for rank in shown if rank is not None), default=None)
        fields.append(
            Field(
                metric + ("" if metric in board.counted else " (not counted)"),
                ["-" if rank is None else f"{rank:g}" for rank in shown],
                frozenset(i for i, rank in enumerate(shown) if rank is not None and rank == lead),
            )
        )
    if methods:
        grid(out, methods, fields, title="ranks")


def probability(p: float) -> str:
    """``0.012``, ``<0.001``; empty for NaN."""
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


# --- printing ------------------------------------------------------------------------------------------------


def grid(
    out: Console, names: Sequence[str], fields: Sequence[Field], baselines: int = 0, title: str = ""
) -> None:
    """Print lines called ``names`` with these fields, in as many tables as the width asks for.

    Args:
        baselines: how many lines at the end are dim and below a line.
    """
    left = list(fields)
    while left:
        count = len(left)
        while count > 1 and wide(out, ruled(out, names, left[:count], baselines, title)) > out.width:
            count -= 1
        out.print(ruled(out, names, left[:count], baselines, title))
        out.print()
        left = left[count:]


def wide(out: Console, made: Table) -> int:
    """The columns a table takes where nothing is folded."""
    return Measurement.get(out, out.options.update(max_width=10_000), made).maximum


def ruled(
    out: Console,
    names: Sequence[str],
    fields: Sequence[Field],
    baselines: int = 0,
    title: str = "",
    ranks: Sequence[str] = (),
) -> Table:
    """One table; only names are folded where it is too wide."""
    made = Table(box=RULED, show_edge=False, pad_edge=False, header_style="none")
    if ranks:
        made.add_column("", justify="right", no_wrap=True)
    made.add_column(Text(fitting(title or "method", out), style="bold" if title else ""), overflow="fold")
    for each in fields:
        made.add_column(Text(fitting(each.heading, out)), justify="right", no_wrap=True)
    first_baseline = len(names) - baselines
    for i, name in enumerate(names):
        style = "dim" if i >= first_baseline else ""
        cells = [Text(one.cells[i], style="bold" if i in one.best else style) for one in fields]
        lead = [Text(ranks[i], style=style)] if ranks else []
        last = i == first_baseline - 1 and baselines > 0
        made.add_row(*lead, Text(fitting(name, out), style=style), *cells, end_section=last)
    return made


def say(out: Console, *lines: str) -> None:
    """Print lines of text."""
    for line in lines:
        out.print(Text(fitting(line, out)))


def fitting(text: str, out: Console) -> str:
    """``text`` as the console's encoding can take it."""
    return shown(text).encode(out.encoding, "backslashreplace").decode(out.encoding)


def arrow(direction: str, out: Console) -> str:
    """Up where higher is better."""
    up, down = ("^", "v") if out.options.ascii_only else ("↑", "↓")
    return up if direction == "higher" else down


def legend(found: Iterable[Sequence[Standing]], starred: bool) -> str:
    """What the marks mean that there are."""
    beaten = any(one.beaten for own in found for one in own)
    return ("; * best" if starred else "") + ("; ! no better than a baseline" if beaten else "")


def undefined(found: Mapping[str, Sequence[Standing]], scores: ScoreTable) -> list[str]:
    """Which means are over fewer rows than there are."""
    rows = len(scores.image)
    holes = [
        f"{one.method}.{metric} {rows - one.mean.n}"
        for metric, own in found.items()
        for one in own
        if not one.scalar and one.mean.n < rows
    ]
    more = f", and {len(holes) - MOST_NOTES} more" if len(holes) > MOST_NOTES else ""
    return [f"undefined rows, left out: {', '.join(holes[:MOST_NOTES])}{more}"] if holes else []


def size(scores: ScoreTable) -> str:
    """``36 rows of 24 images``"""
    rows, images = len(scores.image), len(np.unique(scores.image))
    return f"{rows:,} row{'s'[: rows != 1]} of {images:,} image{'s'[: images != 1]}"
