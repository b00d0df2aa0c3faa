"""The shape of the code: who may import whom, how long a file is, where exceptions are caught, what the README says."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

import xcli
from xcli.cli import app

PACKAGE = Path(xcli.__path__[0])
ROOT = Path(__file__).parents[1]
LONGEST = 350

FAMILIES, METRICS = "methods/*", "metrics/*"
"""Every file of a family; a new one needs no entry."""

ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors", "visible", "__init__"),
    ("registry", "yamlfile"),
    ("precision", "draws", "kinds", "operations", "attention", "rectifiers", "hooks", "execution", "forward"),
    ("preprocess", "contents", "decode", "inputs", "images"),
    ("demo/__init__", "demo/nets"),
    ("factory", "weights", "programs", "sources", "models"),
    ("grids", "trace", "layers"),
    ("keys", "copies", "targets", "replay", "prefix", "backward", "score"),
    ("linear", "multigrid", "imputation", "baselines", "segments"),
    ("methods/__init__", "methods/steps", "methods/base", "methods/nested"),
    ("methods/cam/__init__", "methods/cam/spectra", "methods/cam/base"),
    ("methods/gradient/__init__", "methods/gradient/base"),
    ("methods/perturbation/__init__", "methods/perturbation/base"),
    ("methods/propagation/__init__", "methods/propagation/rules", "methods/propagation/base"),
    ("methods/transformer/__init__",),
    (FAMILIES,),
    ("metrics/__init__", "metrics/base", "metrics/order", "metrics/correlation"),
    ("metrics/faithfulness/__init__", "metrics/curves", "metrics/similarity"),
    (METRICS,),
    ("readers/__init__", "readers/grid", "readers/matching"),
    ("readers/coco", "readers/masks", "readers/table", "readers/voc", "annotations"),
    ("intervals", "gates"),
    (
        "modelsection",
        "sections",
        "complaints",
        "crosschecks",
        "overrides",
        "entries",
        "config",
        "template",
        "schema",
    ),
    ("signals", "durable"),
    ("render", "panels", "pictures"),
    (
        "breadcrumbs",
        "parts",
        "record",
        "survey",
        "allocated",
        "merge",
        "store",
        "results",
        "soundness",
        "recordcheck",
        "summaries",
    ),
    ("scoretable", "scoretext", "leaderboard", "joining", "plots"),
    (
        "tuning",
        "choices",
        "scoring",
        "references",
        "calibration",
        "plan",
        "batches",
        "collect",
        "provenance",
        "summary",
        "progress",
        "pipeline",
        "checkup",
    ),
    ("scoreparts", "evaluation", "scorecard"),
    ("api",),
    ("demo/drawing", "demo/scenes", "demo/train", "demo/localise"),
    (
        *("cli/__init__", "cli/exits", "cli/options", "cli/streams"),
        *(
            "cli/check",
            "cli/compare",
            "cli/describe",
            "cli/evaluate",
            "cli/explain",
            "cli/init",
            "cli/layers",
        ),
        *("cli/merge", "cli/methods", "cli/metrics", "cli/schema"),
        "__main__",
    ),
)
"""A file imports only from its own room or from rooms above it. A new file is given its place here."""

PLACED = {name: height for height, room in enumerate(ROOMS) for name in room}
LAZY = {"__init__": {"api", "results"}}
"""Names that a file hands out without importing them itself (PEP 562)."""


def files() -> list[str]:
    return sorted(str(file.relative_to(PACKAGE).with_suffix("")) for file in PACKAGE.rglob("*.py"))


def height(name: str) -> int:
    """The room of a file, counted from the top."""
    family = {"methods": FAMILIES, "metrics": METRICS}.get(name.split("/")[0], name)
    return PLACED[name if name in PLACED else family]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))


def for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Every statement, those inside functions too, but for what only a type checker sees."""
    for node in nodes:
        if for_types_only(node):
            yield from statements(node.orelse)  # type: ignore[attr-defined]
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)
        for case in getattr(node, "cases", []):
            yield from statements(case.body)


def imports(name: str) -> set[str]:
    """The files of the package that a file imports anywhere in it."""
    found: set[str] = set()
    for node in statements(tree(name).body):
        if isinstance(node, ast.Import):
            found |= {
                home(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "xcli"
            }
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "xcli":
                found |= {home([*parts, alias.name]) for alias in node.names}
    return found


def home(parts: list[str]) -> str:
    """The file that ``xcli.a.b`` or ``from xcli.a import b`` reads."""
    for length in (len(parts), len(parts) - 1):
        path = "/".join(parts[1:length])
        for name in (path, f"{path}/__init__".lstrip("/")):
            if (PACKAGE / f"{name}.py").is_file():
                return name
    raise AssertionError(".".join(parts))


def test_every_file_has_its_place_and_every_place_its_file():
    assert len(PLACED) == sum(len(room) for room in ROOMS), "a file is in two rooms"
    families = {PLACED[FAMILIES], PLACED[METRICS]}
    assert set(PLACED) - {FAMILIES, METRICS} == {name for name in files() if height(name) not in families}


@pytest.mark.parametrize("name", files())
def test_a_file_imports_only_from_its_own_room_or_from_rooms_above(name: str):
    below = {other for other in imports(name) - LAZY.get(name, set()) if height(other) > height(name)}
    assert not below


def test_imports_are_seen_wherever_they_are():
    """So that the test above can tell."""
    assert {"errors", "config", "scorecard", "tuning", "progress", "images"} <= imports(
        "cli/explain"
    )  # in a function
    assert "cli/__init__" in imports("cli/explain")
    assert "methods/base" not in imports("registry")  # for types only
    assert {"targets", "models"} <= imports("config")
    assert "demo/nets" in imports("sources")


@pytest.mark.parametrize("name", [name for name in files() if name.startswith(("methods/", "metrics/"))])
def test_methods_and_metrics_know_nothing_of_files_and_runs(name: str):
    lowest = PLACED[FAMILIES if name.startswith("methods/") else METRICS]
    forbidden = {n for n, place in PLACED.items() if place > lowest}
    forbidden |= {"images", "inputs", "decode", "models", "sources", "weights", "factory"}
    forbidden |= {"hooks", "execution", "forward"}  # the model is reached through a Score
    assert {"pipeline", "store", "plan", "config"} <= forbidden
    assert not imports(name) & forbidden


@pytest.mark.parametrize("name", files())
def test_a_file_is_short(name: str):
    assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= LONGEST


def broad(name: str) -> list[int]:
    """The lines that catch every exception and do not raise it again."""
    lines = []
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        named = ast.walk(node.type) if node.type else [ast.Name("BaseException")]
        caught = {one.id for one in named if isinstance(one, ast.Name)}
        again = bool(node.body) and isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        if caught & {"Exception", "BaseException"} and not again:
            lines.append(node.lineno)
    return lines


def test_every_exception_is_caught_in_two_places_alone():
    """The end of the program, and around the code of the user's factory; elsewhere an error is named."""
    found = {name: len(lines) for name in files() if (lines := broad(name))}
    assert found == {"cli/exits": 1, "factory": 1}


# --- what is written for users -------------------------------------------------------------------------------


def lines_to_paste() -> list[tuple[str, str]]:
    """Every ``xai ...`` line of the README's code blocks and of the comments on top of the configs."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found = [("README.md", line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        for line in config.read_text(encoding="utf-8").splitlines():
            if line.startswith("#     "):
                found.append((config.name, line.removeprefix("#")))
    cleaned = [(where, line.strip().removeprefix("$ ")) for where, line in found]
    return [(where, line) for where, line in cleaned if line.startswith("xai ")]


def test_readme_and_every_config_say_how_they_are_run():
    said = {where for where, _ in lines_to_paste()}
    assert said == {"README.md", *(config.name for config in (ROOT / "configs").glob("*.yaml"))}


@pytest.mark.parametrize(("where", "line"), lines_to_paste())
def test_every_command_that_users_are_shown_exists(where: str, line: str):
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for call in re.split(r"&&|\|", line):
        words = shlex.split(call, comments=True)
        words = words[: next((i for i, word in enumerate(words) if word in (">", ">>")), len(words))]
        if words[:1] != ["xai"]:
            continue
        assert words[1] in {*commands, "--version", "--help"}, f"{where}: {line}"
        if words[1] in commands:
            commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize(("where", "line"), lines_to_paste())
def test_every_config_that_users_are_shown_is_there(where: str, line: str):
    for path in re.findall(r"\bconfigs/[\w.-]+\.yaml", line):
        assert (ROOT / path).is_file(), f"{where}: {line}"
