"""What a run says where nobody looks: one line an event, with time and level."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Commands, photos, plain, written

from xcli.progress import listen

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) (.+)")


@pytest.fixture(scope="module")
def xai() -> Iterator[Commands]:
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good pictures and two bad ones, one with a line break in its name."""
    place = tmp_path_factory.mktemp("logs")
    photos(place / "photos", 5)
    (place / "photos" / "empty.png").touch()
    (place / "photos" / "two\nlines.png").write_text("text")
    return written(place / "config.yaml", plain(place / "photos", place / "run", methods=["gradcam"]))


def events(text: str) -> list[tuple[str, str]]:
    """Level and text of every line, each of which must be an event."""
    found = [(line, LINE.fullmatch(line)) for line in text.splitlines()]
    assert all(match for _, match in found), [line for line, match in found if not match]
    return [(match[1], match[2]) for _, match in found if match]


@pytest.mark.case("standard error that is no terminal", "one line an event with time and level", 3)
def test_every_line_is_an_event(xai: Commands, config: Path, tmp_path: Path, ends):
    ended = xai("explain", config, "--output", tmp_path / "run")
    ends(ended.code)
    said = events(ended.stderr)
    assert ("WARNING", "empty.png failed: empty file") in said
    assert ("WARNING", "two\\nlines.png failed: not an image") in said
    assert {level for level, _ in said} == {"INFO", "WARNING"}
    assert said[-1][1].endswith("results.h5")
    (told,) = [text for _, text in said if text.startswith("2 of 7 images failed")]
    assert "--fresh" in told  # what to do next


def test_decisions_are_told_where_asked_for(xai: Commands, config: Path, tmp_path: Path):
    ended = xai("explain", config, "--output", tmp_path / "run", "-v")
    decided = "\n".join(text for level, text in events(ended.stderr) if level == "DEBUG")
    for part in ("input 64x64", "preprocessing", "batches of 4", "gradcam: logit at stages"):
        assert part in decided


def test_quiet_tells_problems_alone(xai: Commands, config: Path, tmp_path: Path):
    ended = xai("explain", config, "--output", tmp_path / "run", "-q")
    said = events(ended.stderr)
    assert [level for level, _ in said] == ["WARNING"] * 3
    assert ended.stdout == ""


def test_an_error_is_an_event_and_the_places_of_faults_begin_lines(xai: Commands, config: Path):
    (one,) = events(xai("explain", config, "--input", "nowhere").stderr)
    assert one[0] == "ERROR"
    two = xai("explain", config, "--set", "foo=1", "--set", "bar=1").stderr.splitlines()
    assert two[0].endswith(" ERROR")
    assert [line.split(":")[0] for line in two[1:]] == ["--set foo", "--set bar"]


@pytest.fixture
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undoes what ``listen`` does to this process."""
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in
              (logging.getLogger("xcli"), logging.getLogger("py.warnings"))]  # fmt: skip
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    yield
    logging.captureWarnings(False)
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_warnings_of_libraries_are_events_too(logging_as_before: None, capsys: pytest.CaptureFixture[str]):
    listen(quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("one\ntwo", UserWarning, stacklevel=1)
    assert events(capsys.readouterr().err) == [("WARNING", "UserWarning: one\\ntwo")]


def test_a_terminal_gets_the_text_alone(
    logging_as_before: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    listen()
    logging.getLogger("xcli.somewhere").warning("[red]%s[/] %s", "a\x1b[2Jb", "x" * 200)
    logging.getLogger("xcli.somewhere").debug("unheard")
    said = capsys.readouterr().err
    assert "[red]a\\x1b[2Jb[/] " + "x" * 200 in said.replace("\x1b[33m", "").replace("\x1b[0m", "")
