"""One thread for all tests: their networks are tiny, and two threads wait for each other where others compute too.

Wide networks are for the long tests: what a method gives on them is held to a reference there, and in a plain run on
``shapes-cnn``, ``shapes-vit``, ``resnet18`` and ``vgg11``.

``pytest tests/unattended -m "soak or not soak" --table`` prints what a run survives, as measured: each test marked
``case(what, happens, exit)`` belongs to a row, and its fixture ``ends`` holds the exit code to the one of the row.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import FAILED, table

torch.set_num_threads(1)

METHODS = Path(__file__).with_name("methods")
WIDE = re.compile(r"\b(densenet121|convnext_tiny|swin_t|vit_b_16)\b")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", action="store_true", help="print what was survived, as the README has it")


@pytest.hookimpl(tryfirst=True)  # before what is not asked for is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _, bracket, parameters = item.name.partition("[")
        if bracket and METHODS in item.path.parents and WIDE.search(parameters):
            item.add_marker(pytest.mark.soak)
        if case := item.get_closest_marker("case"):
            item.user_properties.append(("case", [item.path.name, *map(str, case.args)]))


@pytest.fixture(autouse=True)
def heard() -> None:
    """What the package says reaches ``caplog``, whatever a command did to its logger before."""
    logger = logging.getLogger("xcli")
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    """Call it with the exit code of a command: it must be (one of) that of the test's case."""
    wanted = str(request.node.get_closest_marker("case").args[2]).split(", ")
    seen = []

    def check(code: int) -> None:
        seen.append(code)
        assert str(code) in wanted

    yield check
    assert seen, "a case with an exit code ends a command"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(config))


class Table:
    """Gathers the outcomes of the cases and prints them as a table in Markdown."""

    def __init__(self, config: pytest.Config) -> None:
        self.wanted = config.getoption("--table")
        self.rows: list[list[str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = dict(report.user_properties).get("case")
        if case is not None and (report.when == "call" or report.failed):
            file, what, happens, code = case
            self.rows.append([file, what, FAILED if report.failed else happens, code])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.wanted:
            terminalreporter.write_line("\n" + "\n".join(table(self.rows)))
