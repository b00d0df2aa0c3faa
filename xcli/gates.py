"""Gates: what must hold of a run's metrics, such as ``road>=0.05`` or ``p10(gradcam.deletion) <= reference+0.02``.

    [method.]metric OP bound              the mean of the rows
    statistic([method.]metric) OP bound   mean, median, min, max, p1 to p99

OP is one of >= > <= <; the bound is a number, or ``reference``, ``reference+number``, ``reference-number``, where the
reference is the same statistic of another run over the rows that both have. The labels of methods and metrics may
themselves hold dots: what a name means is decided against those that there are.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xcli.errors import ConfigError
from xcli.intervals import MEAN, Indices, check_statistic, estimate, places, statistic, with_interval
from xcli.registry import nearest

if TYPE_CHECKING:
    from xcli.scoretable import Column, ScoreTable

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
EXPECTED = "expected [method.]metric OP bound, such as road>=0.05 or p10(gradcam.road) > reference-0.02"

NAN = float("nan")
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SIDES = re.compile(r"([^<>=!]*)([<>=!]+)(.*)", re.DOTALL)
_LEFT = re.compile(rf"(?:(\w+)\s*\(\s*({_NAME})\s*\)|({_NAME}))")
_RIGHT = re.compile(rf"(?:({_NUMBER})|reference(?:\s*([+-])\s*({_NUMBER}))?)")


@dataclass(frozen=True)
class Gate:
    """One gate.

    Attributes:
        text: as it was written.
        name: ``metric`` or ``method.metric``; ``resolve`` tells which.
        op: one of ``OPERATORS``.
        bound: the number; with ``reference``, what is added to the reference's.
    """

    text: str
    statistic: str
    name: str
    op: str
    bound: float
    reference: bool

    def holds(self, value: float, bound: float) -> bool:
        """Whether ``value`` keeps to ``bound``, both taken to float32, as results.h5 has its numbers; never where one
        is not finite."""
        with np.errstate(over="ignore"):
            kept = bool(OPERATORS[self.op](np.float32(value), np.float32(bound)))
        return kept and math.isfinite(value) and math.isfinite(bound)

    @property
    def wanted(self) -> str:
        """The bound as text: ``0.05``, ``reference-0.02``."""
        if not self.reference:
            return f"{self.bound:.12g}"
        return f"reference{self.bound:+.12g}" if self.bound else "reference"


def parse(text: str) -> Gate:
    """The gate that ``text`` says. Raises ``ConfigError`` with what is expected."""
    sides = _SIDES.fullmatch(text.strip())
    if sides is None:
        raise ConfigError(f"gate {text!r}: nothing is compared; {EXPECTED}")
    left, op, right = (side.strip() for side in sides.groups())
    if op not in OPERATORS:
        raise ConfigError(f"gate {text!r}: {op} is not one of {' '.join(OPERATORS)}; {EXPECTED}")
    named, bound = _LEFT.fullmatch(left), _RIGHT.fullmatch(right)
    if named is None:
        raise ConfigError(f"gate {text!r}: {left!r} names no metric; {EXPECTED}")
    if bound is None:
        raise ConfigError(f"gate {text!r}: {right!r} is no number and no reference; {EXPECTED}")
    if named[1]:
        _known_statistic(text, named[1])
    number, sign, offset = bound.groups()
    value = float(number) if number else float(offset or 0) * (-1 if sign == "-" else 1)
    if not math.isfinite(value):
        raise ConfigError(f"gate {text!r}: {right!r} is too large")
    return Gate(text.strip(), named[1] or MEAN, named[2] or named[3], op, value, reference=number is None)


def _known_statistic(text: str, name: str) -> None:
    try:
        check_statistic(name)
    except ConfigError as error:
        raise ConfigError(f"gate {text!r}: {error}") from None


# --- names ---------------------------------------------------------------------------------------------------


def resolve(
    gate: Gate, methods: Sequence[str], metrics: Sequence[str], baselines: Collection[str] = ()
) -> list[tuple[str, str]]:
    """The (method, metric) pairs that ``gate`` is about; names alone decide.

    Args:
        baselines: those of ``methods`` that a gate is about only where it names them.
    Raises:
        ConfigError: a name is not known, or can be read in two ways, or nothing is left.
    """
    name = gate.name
    cuts = [place for place, letter in enumerate(name) if letter == "."]
    splits = [(name[:cut], name[cut + 1 :]) for cut in cuts]
    pairs = [(method, metric) for method, metric in splits if method in methods and metric in metrics]
    if len(pairs) + (name in metrics) > 1:
        readings = [f"metric {name}"] * (name in metrics) + [f"{b} of {a}" for a, b in pairs]
        raise ConfigError(
            f"gate {gate.text!r}: {name} can mean {' or '.join(readings)}; rename one of them with as:"
        )
    if name not in metrics and not pairs:
        raise ConfigError(f"gate {gate.text!r}: {_unknown(name, splits, methods, metrics)}")
    if name in metrics:
        pairs = [(method, name) for method in methods if method not in baselines]
    if not pairs:
        example = f"; name one, such as {methods[0]}.{name}" if methods else ""
        raise ConfigError(f"gate {gate.text!r}: there is no method but baselines{example}")
    return pairs


def _unknown(
    name: str, splits: Sequence[tuple[str, str]], methods: Sequence[str], metrics: Sequence[str]
) -> str:
    """That nothing is called ``name``, as near to what was meant as can be told."""
    for method, metric in splits:
        if method in methods:
            return f"no metric {metric!r}{nearest(metric, list(metrics))}; there are {_listed(metrics)}"
        if metric in metrics:
            return f"no method {method!r}{nearest(method, list(methods))}; there are {_listed(methods)}"
    if name in methods:
        example = f"{name}.{metrics[0]}" if metrics else f"{name}.METRIC"
        return f"{name} is a method; write which of its metrics, such as {example}"
    full = [f"{method}.{metric}" for method in methods for metric in metrics] if splits else []
    return f"no metric {name!r}{nearest(name, [*metrics, *full])}; there are {_listed(metrics)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# --- verdicts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What became of a gate for one method.

    Attributes:
        value: the statistic; NaN where nothing is defined, and the gate then fails.
        low, high: its 95 % interval; with a reference that of the mean difference to it. NaN where there is none.
        n: rows that count; rows: those there are, both runs' common ones with a reference. 0: one number a run.
        bound: what the value must keep to; with a reference that run's value and the gate's number.
        reference: that run's value; ``None`` where there is none.
        unpaired: rows of either run that the other lacks.
        broken: rows, of either run, in which what is explained, the map or the number is not finite: none may be.
    """

    gate: Gate
    method: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    rows: int
    bound: float
    passed: bool
    reference: float | None = None
    unpaired: int = 0
    broken: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}.{self.metric}"

    def line(self, width: int = 0) -> str:
        """``pass  gradcam.road  mean 0.123 [0.101, 0.145] of 24 rows >= 0.05``; names take ``width`` letters."""
        return f"{'pass' if self.passed else 'FAIL'}  {self.name:<{width}}  {self._found()}"

    def _found(self) -> str:
        statistic, op, digits = self.gate.statistic, self.gate.op, self._digits()
        if self.broken:
            rows = f"{self.broken} row{'s'[: self.broken > 1]}"
            either = "" if self.reference is None else ", here or in the reference"
            return f"a score, map or value is not finite in {rows}{either}; wanted {statistic} {op} {self.gate.wanted}"
        if math.isnan(self.value) or math.isnan(self.bound):
            of = f"in {self.rows} rows" if self.rows else "at all"
            return f"no value is defined {of}; wanted {statistic} {op} {self.gate.wanted}"
        left = f", {self.unpaired} row{'s'[: self.unpaired > 1]} unpaired" if self.unpaired else ""
        if not self.n:
            return f"one number a run {self.value:{digits}} {op} {self._bound(digits)}{left}"
        holed = f" ({self.rows - self.n} undefined)" if self.rows > self.n else ""
        if self.reference is None:
            value = with_interval(self.value, self.low, self.high, digits)
            return f"{statistic} {value} of {self.n} rows{holed} {op} {self._bound(digits)}"
        change = with_interval(self.value - self.reference, self.low, self.high, digits)
        value = f"{self.value:{digits}} of {self.n} paired rows{holed}"
        return f"{statistic} {value} {op} {self._bound(digits)}, difference {change}{left}"

    def _bound(self, digits: str) -> str:
        """``0.05``, or ``0.110 (reference-0.02, which has 0.130)``."""
        if self.reference is None:
            return self.gate.wanted
        return f"{self.bound:{digits}} ({self.gate.wanted}, which has {self.reference:{digits}})"

    def _digits(self) -> str:
        """How to show the numbers, such that the value and the bound look as different as they are."""
        numbers = [self.value, self.bound]
        usual = places(numbers)
        for digits in (usual, *(f".{count}g" for count in range(4, 18))):
            shown = [float(f"{number:{digits}}") for number in numbers]
            if self.gate.holds(*shown) == self.passed:
                return digits
        return usual

    def as_json(self) -> dict[str, Any]:
        """The verdict as plain data; NaN as null."""
        told: dict[str, Any] = {
            "gate": self.gate.text, "method": self.method, "metric": self.metric,
            "statistic": self.gate.statistic, "value": self.value, "low": self.low, "high": self.high,
            "n": self.n, "rows": self.rows, "op": self.gate.op, "bound": self.bound, "passed": self.passed,
            "reference": self.reference, "unpaired": self.unpaired, "broken": self.broken,
        }  # fmt: skip
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in told.items()}


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each verdict, below one another."""
    width = max((len(verdict.name) for verdict in verdicts), default=0)
    return [verdict.line(width) for verdict in verdicts]


def judge(gate: Gate, scores: ScoreTable, reference: ScoreTable | None = None) -> list[Verdict]:
    """Whether ``gate`` holds, for each method that it is about.

    Args:
        reference: the run that ``reference`` means; its methods and metrics have the same labels.
    Raises:
        ConfigError: a name is not known, or the reference lacks it or measured it with other options, or no row is
            in both runs.
    """
    pairs = resolve(gate, scores.methods, scores.metrics, scores.baselines)
    if not gate.reference:
        return [_judged(gate, scores, method, metric) for method, metric in pairs]
    if reference is None:
        raise ConfigError(f"gate {gate.text!r}: which run is the reference? name it by --against RUN")
    mine, theirs = scores.rows_shared_with(reference)
    if not len(mine):
        raise ConfigError(
            f"gate {gate.text!r}: no row (image path and target) of {scores.name} is in the reference {reference.name}"
        )
    unpaired = len(scores.image) + len(reference.image) - 2 * len(mine)
    verdicts = []
    for pair in pairs:
        first, second = _columns(gate, (scores, reference), *pair)
        both = (None if first is None else first.take(mine), second.take(theirs))
        broken = _broken(first) + _broken(both[1])  # a row without a class is in no other run, and counts
        verdicts.append(_against(gate, both, scores.image[mine], (unpaired, broken), pair))
    return verdicts


def _judged(gate: Gate, scores: ScoreTable, method: str, metric: str) -> Verdict:
    column = scores.columns.get((method, metric))
    broken = _broken(column)
    if column is None or column.values is None:
        value = _scalar(column)
        passed = gate.holds(value, gate.bound) and not broken
        return Verdict(gate, method, metric, value, NAN, NAN, 0, 0, gate.bound, passed, broken=broken)
    found, rows = estimate(column.values, scores.image, gate.statistic), len(scores.image)
    passed = gate.holds(found.value, gate.bound) and not broken
    return Verdict(
        gate,
        method,
        metric,
        found.value,
        found.low,
        found.high,
        found.n,
        rows,
        gate.bound,
        passed,
        broken=broken,
    )


def _broken(column: Column | None) -> int:
    """In how many rows something is not finite."""
    return 0 if column is None or column.wrong is None else int(column.wrong.sum())


def _scalar(column: Column | None) -> float:
    """The one number of the run; NaN where there is none."""
    return NAN if column is None or column.summary is None else column.summary


def _against(
    gate: Gate,
    columns: tuple[Column | None, Column],
    image: Indices,
    left_out: tuple[int, int],
    pair: tuple[str, str],
) -> Verdict:
    """The verdict of columns over the same rows, this run's and the reference's, and how many rows are unpaired, how
    many broken."""
    mine, theirs = columns
    if mine is None or mine.values is None or theirs.values is None:
        value, other, change = _scalar(mine), _scalar(theirs), None
    else:
        a, b = (np.asarray(values, np.float64) for values in (mine.values, theirs.values))
        with np.errstate(invalid="ignore"):  # between infinite values
            difference = a - b
        change = estimate(difference, image)
        value, other = (statistic(values[~np.isnan(difference)], gate.statistic) for values in (a, b))
    bound = other + gate.bound
    low, high = (change.low, change.high) if change and gate.statistic == MEAN else (NAN, NAN)
    n, rows = (change.n, len(image)) if change else (0, 0)
    passed = gate.holds(value, bound) and not left_out[1]
    return Verdict(gate, *pair, value, low, high, n, rows, bound, passed, other, *left_out)


def _columns(
    gate: Gate, runs: tuple[ScoreTable, ScoreTable], method: str, metric: str
) -> tuple[Column | None, Column]:
    """The column in this run and in the reference, which must have it."""
    mine, other = (run.columns.get((method, metric)) for run in runs)
    if other is None:
        raise ConfigError(f"gate {gate.text!r}: the reference {runs[1].name} has no {metric} of {method}")
    if mine is not None and mine.differs_from(other):
        raise ConfigError(
            f"gate {gate.text!r}: {metric} is not the same metric in the reference: {mine.differs_from(other)}"
        )
    return mine, other
