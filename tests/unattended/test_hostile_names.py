"""Names that command a terminal, a log or a spreadsheet, and paths that point outside: shown, and nothing else.

There is no HTML in this version, so nothing to escape for it; results.h5 keeps names as they are.
"""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console
from runs import Commands, photos, picture, plain, written
from scored_runs import scored_run

from xcli.durable import refuse_links
from xcli.errors import OutputUnwritable
from xcli.leaderboard import compared
from xcli.pictures import PictureWriter
from xcli.results import open_run
from xcli.scoreparts import tidy
from xcli.scoretable import read_scores, write_csv
from xcli.scoretext import show, table
from xcli.visible import shown

NAMES = "names with terminal escapes, markup or formulas"
OUTSIDE = "input paths, names and classes that point outside the output"
LINKS = "links that somebody put inside the output folder"

HOSTILE = [
    "\x1b]0;taken\x07\x1b[2J.png",
    "two\nlines\r.png",
    "2026-01-01T00:00:00+00:00 INFO all is well\n.png",
    "[red]red[link=https:x]x[bold].png",
    "\u202egnp.exe.png",
    "c1\x9b31m\x85.png",
    "line\u2028line.png",
    "=HYPERLINK(1).png",
    "-rf.png",
    "@SUM(1).png",
    'quo"te,comma;semi.png',
    "<img src=x onerror=alert(1)>.png",
    "$HOME `id` %s {0} $x_1$.png",
    "~",
    "...",
    "con.png",
    os.fsdecode(b"stray\xff.png"),
]
CLASSES = ["\x1b[31mred", "../../class", "a/b", "[bold]b[/]", "\u202e", "=1+1", "-", "~", "...", "c\u2028d"]
ACTS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@pytest.fixture(scope="module")
def xai():
    with Commands() as commands:
        yield commands


def tree(root: Path, but: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below ``root`` but ``but``: mode, size and time of change."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(folder, name) != but]
        for name in (*folders, *files):
            path = Path(folder, name)
            if path.is_dir() and not path.is_symlink() and path == but.parent:
                continue
            status = path.lstat()
            found[os.fsdecode(path)] = (
                status.st_mode,
                status.st_size if path.is_file() else 0,
                status.st_mtime_ns,
            )
    return found


class Sandbox:
    """A folder with hostile names, run through the command."""

    def __init__(self, xai: Commands, root: Path) -> None:
        self.out = root / "work" / "out"
        images = root / "work" / "in"
        (images / "a" / "b..").mkdir(parents=True)
        for index, name in enumerate(HOSTILE):
            file = images / ("a/b.." if index % 2 else "") / name
            picture(index).save(file, format="PNG")
        (images / f"bad{HOSTILE[0]}").write_bytes(b"no")
        photos(root / "elsewhere", 2)
        (images / "linked").symlink_to(root / "elsewhere")
        (images / "link.png").symlink_to(root / "elsewhere/a/000.png")
        manifest = root / "work" / "list.csv"
        listed = [
            str(root / "elsewhere/a/000.png"),
            "../elsewhere/a/001.jpg",
            "~/x.png",
            "../../../../etc/passwd",
        ]
        listed += [str(path) for path in images.rglob("*") if path.is_file() and "\n" not in path.name]
        with manifest.open("w", newline="", errors="surrogateescape") as file:
            csv.writer(file).writerows([["path", "label"], *([path, CLASSES[1]] for path in listed)])
        (root / "work" / "classes.txt").write_text("\n".join(CLASSES))
        self.images = images
        self.config = written(
            root / "work" / "c.yaml",
            plain(
                images,
                self.out,
                model={"categories": "classes.txt"},
                images={"path": ["in", "list.csv"]},
                target={"top": 2},
                methods=["gradcam"],
                metrics=[{"name": "deletion", "steps": 1}],
                output={"png": ["overlay", "heatmap", "panel"]},
            ),
        )
        before = tree(root, self.out)
        options = {"folder": str(root / "work"), "seconds": 120}
        self.ended = {
            "explain": xai("explain", self.config, **options),
            "again": xai("explain", self.config, "-v", **options),
            "evaluate": xai("evaluate", self.out, "--metrics", "deletion", **options),
            "compare": xai("compare", self.out, "--no-baselines", **options),
            "check": xai("check", self.config, **options),
        }
        self.changed = {path for path, seen in (tree(root, self.out).items() ^ before.items())}


@pytest.fixture(scope="module")
def sandbox(xai, tmp_path_factory):
    return Sandbox(xai, tmp_path_factory.mktemp("sandbox"))


@pytest.mark.case(NAMES, "written out (\\\\x1b); results.h5 has them as they are", "0, 3")
def test_no_name_acts_on_a_terminal_or_forges_a_line(sandbox, ends):
    for command, ended in sandbox.ended.items():
        ends(ended.code)
        assert "Traceback" not in ended.stderr, command
        for text in (ended.stdout, ended.stderr):
            assert not ACTS.search(text), (command, ACTS.search(text))
        assert not [line for line in ended.stderr.split("\n") if line.startswith("2026-01-01T00:00:00")], (
            command
        )
    assert shown(f"bad{HOSTILE[0]}") in sandbox.ended["explain"].stderr


def test_results_keep_names_and_pictures_are_named_safely(sandbox):
    with open_run(sandbox.out) as run:
        kept = {Path(path).name for path in run.images["path"]}
        assert run.categories == tuple(CLASSES)
    assert {name.encode("utf-8", "backslashreplace").decode() for name in HOSTILE} <= kept
    made = [path for path in sandbox.out.rglob("*") if path.suffix == ".png"]
    assert len(made) > 3 * len(HOSTILE)
    assert not [path for path in made if ACTS.search(str(path)) or "\n" in str(path)]


def test_the_table_of_scores_reads_back_and_holds_no_formula(sandbox):
    with open_run(sandbox.out) as run:
        paths = [run.images["path"][row] for row in run.explanations["image"]]
    with (sandbox.out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [os.path.normpath(row["path"]) for row in rows] == [os.path.normpath(path) for path in paths]
    assert not [row for row in rows if row["path"][0] in "=+-@\t\r"]


@pytest.mark.case(OUTSIDE, "nothing is written but in the output folder", "3")
def test_nothing_is_written_outside_the_output(sandbox, ends):
    ends(sandbox.ended["explain"].code)
    assert sandbox.changed == set()
    assert sandbox.ended["explain"].stdout


@pytest.mark.parametrize(
    "label",
    [
        "../../x",
        "\x1b[2J",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("/tmp/x", "..", "[red]", "a\nb", "")),
    ],
)
def test_a_name_of_a_result_that_is_a_path_is_refused(xai, tmp_path, label):
    photos(tmp_path / "in", 1)
    config = plain(tmp_path / "in", tmp_path / "out", methods=[{"name": "gradcam", "as": label}])
    ended = xai("explain", written(tmp_path / "c.yaml", config))
    assert ended.code == 2
    assert "a result's name takes letters, digits" in ended.stderr
    assert not ACTS.search(ended.stderr)
    assert not (tmp_path / "out").exists()


# --- links -----------------------------------------------------------------------------------------------------


@pytest.mark.case(LINKS, "not written through; the output folder itself may be one", "6")
@pytest.mark.parametrize(
    "name",
    [
        "overlays/gradcam",
        "parts",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("overlays", "locks")),
    ],
)
def test_no_link_inside_the_output_is_written_through(xai, tmp_path, ends, name):
    photos(tmp_path / "in", 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "00000.h5").write_text("mine")
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere)
    config = written(
        tmp_path / "c.yaml",
        plain(tmp_path / "in", tmp_path / "out", methods=["gradcam"], output={"png": ["overlay"]}),
    )
    tries = {
        "parts": [["--fresh"]],
        "locks": [[], ["--fresh"]],
    }  # what is in a linked `parts` would be removed
    for more in tries.get(name, [[]]):
        ended = xai("explain", config, *more)
        ends(ended.code)
        assert "is a link" in ended.stderr
        assert [path.name for path in elsewhere.iterdir()] == ["00000.h5"]


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_lies_in_the_place_of_a_temporary_file_is_not_written_to(xai, tmp_path, kind):
    photos(tmp_path / "in", 1)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    out = tmp_path / "out"
    for name in ("run.json.tmp", "inputs.jsonl.tmp", "results.h5.tmp", "parts/00000.h5.1-of-1.tmp",
                 "overlays/gradcam/a/.000.png.png.tmp"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(mine) if kind == "link" else os.mkfifo(out / name)
    config = plain(tmp_path / "in", out, methods=["gradcam"], output={"png": ["overlay"]})
    ended = xai("explain", written(tmp_path / "c.yaml", config), seconds=60)
    assert ended.code == 0, ended.stderr
    assert mine.read_text() == "mine"
    assert (out / "overlays/gradcam/a/000.png.png").is_file()


def test_a_lock_that_is_a_link_empties_no_file(xai, tmp_path):
    photos(tmp_path / "in", 1)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "out/locks").mkdir(parents=True)
    (tmp_path / "out/locks/record.lock").symlink_to(mine)
    ended = xai("explain", written(tmp_path / "c.yaml", plain(tmp_path / "in", tmp_path / "out")))
    assert ended.code == 6
    assert mine.read_text() == "mine"


def test_the_output_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    refuse_links(tmp_path / "out", ("parts", "locks"))
    (tmp_path / "disk/parts").symlink_to(tmp_path)
    with pytest.raises(OutputUnwritable, match="is a link"):
        refuse_links(tmp_path / "out", ("locks", "parts"))


def test_no_picture_is_removed_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    mine = tmp_path / "elsewhere/a.png.png"
    mine.touch()
    (tmp_path / "out/overlays/rise").mkdir(parents=True)
    (tmp_path / "out/overlays/gradcam").symlink_to(mine.parent)
    own = tmp_path / "out/overlays/rise/a.png.png"
    own.symlink_to(mine)
    with PictureWriter(root=tmp_path / "out") as writer:
        with pytest.raises(OutputUnwritable, match="is a link"):
            writer.remove(tmp_path / "out/overlays/gradcam/a.png.png")
        writer.remove(own)
        writer.remove(own)
    assert not own.is_symlink()
    assert mine.exists()


@pytest.mark.parametrize("name", ["evaluation", "evaluation/x"])
def test_no_scores_are_removed_through_a_link(tmp_path, name):
    mine = tmp_path / "elsewhere/x/mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    run = scored_run(tmp_path / "run", {"gradcam": {"road": [0.5]}})
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(mine.parent if "/" in name else mine.parent.parent)
    tidy(run)
    assert mine.exists()


# --- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain é 日本 😀 \u200d", "plain é 日本 😀 \u200d"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\r\t", "a\\nb\\r\\t"),
        ("\0\x7f\x9b\x85", "\\x00\\x7f\\x9b\\x85"),
        ("\u202e\u2066\u200f\u2028", "\\u202e\\u2066\\u200f\\u2028"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("[red]x[/]", "[red]x[/]"),
        ("\\x1b", "\\x1b"),
        ("", ""),
    ],
)
def test_text_is_shown(text, seen):
    assert shown(text) == seen
    assert not ACTS.search(seen)


def test_tables_show_names_of_runs_and_take_no_markup(tmp_path):
    folder = tmp_path / "=[red]run\x1b[2J"
    runs = [
        scored_run(
            folder / name, {method: {"road": [0.1, 0.2, value]} for method, value in (("a", 0.3), ("b", 0.5))}
        )
        for name in ("[bold]one", "\x1b]0;x\x07two")
    ]
    board = compared(runs)
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False)
    show(board, console)
    table(read_scores(runs[1]), console)
    text = out.getvalue()
    assert not ACTS.search(text)
    assert "[bold]one/a" in text
    assert "\\x1b]0;x\\x07two" in text


def test_formulas_in_a_table_of_scores_stay_text(tmp_path):
    names = ["=1+1", "+x", "-x", "@x", "\tx", "x=1", 'q"u,o\nte\r']
    run = scored_run(tmp_path / "run", {"gradcam": {"road": [0.5] * len(names)}}, paths=names)
    write_csv(read_scores(run), tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        found = [row["path"] for row in csv.DictReader(file)]
    assert found == ["./=1+1", "./+x", "./-x", "./@x", "./\tx", "x=1", 'q"u,o\nte\r']
