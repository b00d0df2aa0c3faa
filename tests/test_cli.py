"""The command line: what each command prints, where, and with which exit code it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
import yaml
from runs import Commands, Ended, photos, plain, same, written

import xcli
import xcli.plan
from xcli.cli import app
from xcli.cli.exits import REPORT, guarded
from xcli.cli.explain import shard_of
from xcli.config import load_config
from xcli.errors import ConfigError
from xcli.registry import methods as registered
from xcli.registry import metrics as registered_metrics

ROOT = typer.main.get_command(app)
SAME_CODE = {**os.environ, "PYTHONPATH": str(Path(xcli.__path__[0]).parent)}
COMMANDS = sorted(ROOT.commands)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def spawned() -> Iterator[Commands]:
    """Commands in processes of their own."""
    with Commands() as commands:
        yield commands


@pytest.fixture
def xai(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The command in this process."""
    monkeypatch.setattr("xcli.tuning.keep_freed_memory", lambda: True)  # a setting of the whole process
    monkeypatch.setattr(xcli.plan, "PART_IMAGES", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        code = guarded(lambda: app([str(one) for one in arguments], prog_name="xai"))
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Ended(code, said.out, said.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures and a config for them."""
    folder = tmp_path_factory.mktemp("cli")
    photos(folder / "photos", 10)
    written(folder / "config.yaml", plain(folder / "photos", folder / "never", methods=["gradcam"]))
    return folder


def entries(folder: Path) -> list[str]:
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


# --- help ----------------------------------------------------------------------------------------------------


def test_the_commands_are_those_of_the_readme():
    assert [
        *(
            "check",
            "compare",
            "evaluate",
            "explain",
            "init",
            "layers",
            "merge",
            "methods",
            "metrics",
            "schema",
        )
    ] == COMMANDS


def test_help_and_version_answer_without_torch(tmp_path: Path):
    calls = [
        ["--version"],
        ["--help"],
        ["-h"],
        *([name, "--help"] for name in COMMANDS),
        ["init", "--nonsense"],
    ]
    script = f"""
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from xcli.cli import app
from xcli.cli.exits import guarded
for call in {calls!r}:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = guarded(lambda: app(call, prog_name="xai"))
    assert code == (2 if "--nonsense" in call else 0), (call, err.getvalue())
    assert out.getvalue() or err.getvalue(), call
for name in ("torch", "torchvision", "h5py", "matplotlib", "numpy"):
    assert name not in sys.modules, name
import xcli
assert "torch" not in sys.modules
xcli.open_run
assert "torch" not in sys.modules  # reading results needs no torch
xcli.explain
assert "torch" in sys.modules  # so that this test can tell
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=tmp_path, env=SAME_CODE)


def test_the_module_runs_like_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "xcli", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"xai {xcli.__version__}\n", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_ends_with_a_line_to_paste(xai, command: str):
    ended = xai(*command.split(), "--help")
    assert ended.code == 0
    last = ended.stdout.strip().splitlines()[-1].strip()
    start, _, line = last.partition("  ")
    assert start in ("Example:", "Try it:")
    for call in line.split("&&"):
        words = call.split(">")[0].split()
        assert words[0] == "xai"
        assert words[1] in COMMANDS
        parsed(words[1:])
    assert not command or line.split()[1] == command


def parsed(words: list[str]) -> object:
    """The arguments and options of a line, refused if there are no such ones; nothing is run."""
    command = ROOT.commands[words[0]]  # type: ignore[attr-defined]
    return command.make_context(words[0], list(words[1:]))


def test_a_line_with_an_unknown_option_would_not_parse():
    with pytest.raises(Exception, match="nonsense") as refused:
        parsed(["explain", "--nonsense"])
    assert type(refused.value).__name__ == "NoSuchOption"


def test_no_arguments_show_the_help(xai):
    ended = xai()
    assert ended.code == 2
    assert "Usage: xai" in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("gradcm", "gradcm"),
        ("explain --nonsense", "--nonsense"),
        ("explain --limit 0", "--limit"),
        ("merge", "RUN"),
    ],
)
def test_a_wrong_command_line_is_refused_plainly(xai, call: str, named: str):
    ended = xai(*call.split())
    assert ended.code == 2
    assert ended.stdout == ""
    assert named in ended.stderr


# --- init, schema, methods, layers, check --------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["", "quickstart", "torchvision", "timm", "own-model"])
def test_what_init_prints_is_a_config(xai, tmp_path: Path, preset: str):
    ended = xai("init", *preset.split())
    assert (ended.code, ended.stderr) == (0, "")
    (tmp_path / "my.yaml").write_text(ended.stdout)
    assert load_config(tmp_path / "my.yaml").methods
    assert any(line.strip().startswith("#") for line in ended.stdout.splitlines())


def test_init_writes_a_file_once(xai, tmp_path: Path):
    ended = xai("init", "quickstart", "--output", tmp_path / "my.yaml")
    assert (ended.code, ended.stdout) == (0, "")
    assert "xai check" in ended.stderr
    text = (tmp_path / "my.yaml").read_text()
    assert text == xai("init", "quickstart").stdout
    assert xai("init", "torchvision", "--output", tmp_path / "my.yaml").code == 2
    assert (tmp_path / "my.yaml").read_text() == text
    assert xai("init", "--output", tmp_path / "my.yaml" / "below").code == 6
    ended = xai("init", "quickstrt")
    assert ended.code == 2
    assert "quickstart" in ended.stderr


def test_schema_is_json_and_knows_every_method(xai):
    ended = xai("schema")
    assert ended.code == 0
    text = json.dumps(json.loads(ended.stdout))
    assert json.loads(ended.stdout)["type"] == "object"
    assert all(f'"{name}"' in text for name in registered())


def test_methods_lists_every_method_on_a_line_below_its_family(xai):
    lines = xai("methods").stdout.splitlines()
    assert sorted(line.split()[0] for line in lines if "  " in line) == list(registered())
    assert [line for line in lines if line and "  " not in line] == [
        "baselines",
        "cam",
        "gradient",
        "perturbation",
        "propagation",
        "transformer",
    ]
    assert lines.index("gradient") < [line.split(" ")[0] for line in lines].index("saliency")
    listed = json.loads(xai("methods", "--json").stdout)
    assert sorted(entry["name"] for entry in listed) == list(registered())
    assert all(entry["claim"] and entry["source"] and entry["cost"] for entry in listed)


@pytest.mark.parametrize("name", sorted(registered()))
def test_the_page_of_a_method_names_its_options_source_and_cost(xai, name: str):
    shown, (entry,) = xai("methods", name).stdout, json.loads(xai("methods", name, "--json").stdout)
    cls = registered()[name]
    assert set(entry["options"]) == {field.name for field in fields(cls)}
    for option, about in entry["options"].items():
        assert f"\n  {option} " in shown
        assert about["help"], option
    assert cls.cost in shown
    assert "Source:" in shown or entry["source"] == "baseline"


def test_metrics_lists_every_metric_by_its_family(xai):
    lines = xai("metrics").stdout.splitlines()
    names = [line.split()[0] for line in lines if "  " in line]
    families = [line for line in lines if line and "  " not in line]
    assert sorted(names) == sorted(registered_metrics())
    assert {"faithfulness", "localisation", "robustness", "complexity", "randomisation", "axioms"} <= set(
        families
    )
    listed = json.loads(xai("metrics", "--json").stdout)
    assert all(entry["claim"] and entry["source"] and entry["cost"] and entry["better"] for entry in listed)


@pytest.mark.parametrize("name", sorted(registered_metrics()))
def test_the_page_of_a_metric_names_its_options_source_and_direction(
    name: str, capsys: pytest.CaptureFixture[str]
):
    from xcli.cli.metrics import metrics

    metrics(name)
    shown = capsys.readouterr().out
    cls = registered_metrics()[name]
    for option in fields(cls):
        assert f"\n  {option.name} " in shown
    assert cls.direction in shown
    assert cls.cost in shown
    assert "Source:" in shown


def test_a_method_that_is_not_there_gets_a_suggestion(xai):
    ended = xai("methods", "gradcm")
    assert (ended.code, ended.stdout) == (2, "")
    assert "'gradcam'" in ended.stderr


def test_layers_marks_the_one_default(xai, place: Path):
    rows = json.loads(xai("layers", place / "config.yaml", "--json").stdout)
    assert [row["name"] for row in rows if row["default"]] == ["stages"]
    (found,) = [row for row in rows if row["name"] == "stages"]
    assert (found["kind"], found["shape"], found["grid"], found["calls"]) == (
        "Sequential",
        [96, 8, 8],
        [8, 8],
        1,
    )
    ended = xai("layers", place / "config.yaml")
    starred = [line for line in ended.stdout.splitlines() if line.startswith("*")]
    assert len(starred) == 2  # the row, and the line that says what the star means
    assert "stages" in starred[0]
    assert starred[1].endswith("stages")


def test_check_says_what_a_run_would_do_and_writes_nothing(xai, place: Path):
    before = entries(place)
    report = json.loads(xai("check", place / "config.yaml", "--json").stdout)
    assert (report["images"], report["size"], report["classes"], report["batch_size"]) == (
        10,
        [64, 64],
        10,
        4,
    )
    assert (report["methods"][0]["layer"], report["methods"][0]["grid"]) == ("stages", [8, 8])
    shown = xai("check", place / "config.yaml")
    assert shown.code == 0
    assert "64x64" in shown.stdout
    assert "stages" in shown.stdout
    assert entries(place) == before


def test_check_warns_of_random_weights(xai, place: Path):
    ended = xai("check", place / "config.yaml", "--set", "model.weights=none", "--json")
    assert any("random" in trap for trap in json.loads(ended.stdout)["traps"])
    ended = xai("check", place / "config.yaml", "--json")
    assert not any("random" in trap for trap in json.loads(ended.stdout)["traps"])


@pytest.mark.parametrize("command", ["check", "explain"])
@pytest.mark.parametrize(
    ("method", "network", "said"),
    [
        ("lrp", "shapes-vit", "module 'blocks.0.norm1' calls layer_norm"),
        ("deeplift", "shapes-vit", "module 'blocks.0.norm1' calls layer_norm"),
        ("chefer", "shapes-cnn", "this network has no attention"),
    ],
)
def test_what_a_method_cannot_handle_exactly_is_refused_by_name_before_the_run(
    xai, place: Path, command: str, method: str, network: str, said: str
):
    before = entries(place)
    ended = xai(
        command, place / "config.yaml", "--methods", method, "--set", f"model.name={network}",
        "--set", "model.preprocess={resize: [128, 128], mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}",
    )  # fmt: skip
    assert ended.code == 2
    assert f"{method}: {said}" in ended.stderr
    assert "; " in ended.stderr.split(said)[1]  # what to do instead
    assert entries(place) == before


# --- explain -------------------------------------------------------------------------------------------------


def test_json_is_one_line_on_standard_output(xai, place: Path, tmp_path: Path):
    ended = xai("explain", place / "config.yaml", "--output", tmp_path / "run", "--json")
    assert ended.code == 0
    (line,) = ended.stdout.splitlines()
    summary = json.loads(line)
    assert (summary["status"], summary["images"], summary["failed"], summary["explanations"]) == (
        "done",
        10,
        0,
        10,
    )
    assert summary["results"] == str(tmp_path / "run" / "results.h5")
    assert Path(summary["results"]).exists()
    again = xai("explain", place / "config.yaml", "--output", tmp_path / "run", "--json")
    assert (again.code, json.loads(again.stdout)["status"]) == (0, "already done")


def test_progress_goes_to_standard_error_and_quiet_is_silent(xai, place: Path, tmp_path: Path):
    ended = xai("explain", place / "config.yaml", "--output", tmp_path / "run")
    assert (ended.code, ended.stdout) == (0, "")
    assert "10/10 images" in ended.stderr
    assert ended.stderr.rstrip().endswith("results.h5")
    assert "\x1b" not in ended.stderr  # plain lines where there is no terminal
    assert xai("explain", place / "config.yaml", "--output", tmp_path / "run2", "--quiet") == Ended(0, "", "")


def test_a_terminal_gets_a_bar(xai, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ended = xai("explain", place / "config.yaml", "--output", tmp_path / "run", "--json")
    assert ended.code == 0
    assert json.loads(ended.stdout)["status"] == "done"
    assert "10/10" in ended.stderr
    assert "shapes-cnn" in ended.stderr


def test_a_dry_run_writes_nothing(xai, place: Path):
    before = entries(place)
    ended = xai("explain", place / "config.yaml", "--dry-run", "--limit", "5", "--set", "runtime.seed=3")
    assert ended.code == 0
    assert yaml.safe_load(ended.stdout)["runtime"]["seed"] == 3
    assert "5 images" in ended.stdout
    document = json.loads(xai("explain", place / "config.yaml", "--dry-run", "--json").stdout)
    assert (document["images"], document["output"]) == (10, str(place / "never"))
    assert entries(place) == before


def test_options_change_the_config(xai, place: Path, tmp_path: Path):
    call = ["explain", place / "config.yaml", "--output", tmp_path / "run", "--methods", "random,gradcam"]
    call += [
        "--input",
        place / "photos" / "a",
        "--set",
        "methods.0.relu=false",
        "--limit",
        "2",
        "--device",
        "cpu",
    ]
    assert xai(*call).code == 0
    with xcli.open_run(tmp_path / "run") as run:
        assert list(run.names) == ["gradcam", "random"]
        assert len(run.images["path"]) == 2
        assert json.loads(run.heatmap_attrs("gradcam")["params"])["relu"] is False


def test_a_wrong_config_is_named_with_its_place_and_nothing_runs(xai, place: Path, tmp_path: Path):
    text = (place / "config.yaml").read_text().replace("gradcam", "gradcm") + "colour: red\n"
    (tmp_path / "wrong.yaml").write_text(text)
    line = next(n for n, content in enumerate(text.splitlines(), 1) if "gradcm" in content)
    for command in ("explain", "check", "layers"):
        ended = xai(command, tmp_path / "wrong.yaml")
        assert (ended.code, ended.stdout) == (2, ""), command
        said = ended.stderr.splitlines()
        assert any(
            one.startswith(f"{tmp_path / 'wrong.yaml'}:{line}:3:") and "gradcam" in one for one in said
        ), said
        assert any(
            one.startswith(f"{tmp_path / 'wrong.yaml'}:{len(text.splitlines())}:1:") for one in said
        ), said
    assert not (place / "never").exists()


def test_a_missing_config_or_folder_is_a_usage_error(xai, place: Path, tmp_path: Path):
    for call in ([tmp_path / "none.yaml"], [place / "config.yaml", "--input", tmp_path / "none"]):
        ended = xai("explain", *call)
        assert (ended.code, ended.stdout) == (2, "")
        assert "none" in ended.stderr
    (tmp_path / "empty").mkdir()
    assert xai("explain", place / "config.yaml", "--input", tmp_path / "empty").code == 2


def test_another_engine_is_not_in_this_version(xai, place: Path):
    ended = xai("explain", place / "config.yaml", "--engine", "ray")
    assert (ended.code, ended.stdout) == (2, "")
    assert "not in this version" in ended.stderr


def test_a_layer_that_is_not_there_is_refused_before_the_run(xai, place: Path, tmp_path: Path):
    call = ["--output", tmp_path / "run", "--set", "methods.0={name: gradcam, layer: stage}"]
    ended = xai("explain", place / "config.yaml", *call)
    assert (ended.code, ended.stdout) == (2, "")
    assert "stages" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "shard"), [("1/1", (1, 1)), ("2/4", (2, 4)), ("10/10", (10, 10))])
def test_a_shard_is_two_numbers(text: str, shard: tuple[int, int]):
    assert shard_of(text) == shard


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "a/b", "1/", "/2", "-1/2", "1/2/3", "1.0/2", "²/3"])
def test_other_shards_are_refused(text: str):
    with pytest.raises(ConfigError, match="I/N"):
        shard_of(text)


def test_shards_are_merged_by_hand_once_all_are_through(xai, place: Path, tmp_path: Path):
    call = ["explain", place / "config.yaml", "--output", tmp_path / "run"]
    first = xai(*call, "--shard", "2/2")
    assert (first.code, first.stdout) == (0, "")
    assert f"xai merge {tmp_path / 'run'}" in first.stderr
    ended = xai("merge", tmp_path / "run")
    assert (ended.code, ended.stdout) == (2, "")
    assert "1/2" in ended.stderr
    assert xai(*call, "--shard", "1/2").code == 0
    ended = xai("merge", tmp_path / "run", "--json")
    assert json.loads(ended.stdout) == {"status": "done", "results": str(tmp_path / "run" / "results.h5")}
    assert xai("merge", tmp_path / "run").stdout == f"{tmp_path / 'run' / 'results.h5'}\n"
    assert xai("merge", tmp_path / "nothing").code == 2


# --- exit codes ----------------------------------------------------------------------------------------------


def test_a_broken_image_ends_with_3(xai, tmp_path: Path):
    photos(tmp_path / "photos", 3)
    (tmp_path / "photos" / "a" / "000.png").write_bytes(b"no picture")
    config = written(
        tmp_path / "config.yaml", plain(tmp_path / "photos", tmp_path / "run", methods=["random"])
    )
    ended = xai("explain", config, "--json")
    assert (ended.code, json.loads(ended.stdout)["failed"]) == (3, 1)
    assert xai("explain", config).code == 0  # already done


def test_a_broken_image_in_a_shard_ends_with_3(xai, tmp_path: Path):
    photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "a" / "000.png").write_bytes(b"no picture")
    config = written(
        tmp_path / "config.yaml", plain(tmp_path / "photos", tmp_path / "run", methods=["random"])
    )
    ended = xai("explain", config, "--shard", "1/2", "--json")
    assert (ended.code, json.loads(ended.stdout)["failed"]) == (3, 1)


def test_an_output_below_a_file_ends_with_6(xai, place: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        ended = xai("explain", place / "config.yaml", "--output", output)
        assert (ended.code, ended.stdout) == (6, ""), output
        assert str(tmp_path / "file") in ended.stderr


@pytest.mark.soak
def test_an_output_in_use_ends_with_5(xai, place: Path, tmp_path: Path, spawned: Commands):
    call = ["explain", place / "config.yaml", "--output", tmp_path / "run"]
    spawned.start(*call, wait_at=[2, str(tmp_path / "running"), str(tmp_path / "go on")])
    while not (tmp_path / "running").exists():
        assert spawned.server.poll() is None
    ended = xai(*call)
    (tmp_path / "go on").touch()
    assert (ended.code, ended.stdout) == (5, "")
    assert "in use by process" in ended.stderr
    assert spawned.ended().code == 0  # the first was not disturbed
    assert xai(*call).code == 0


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_with_its_code_and_the_same_command_goes_on(
    xai, place: Path, tmp_path: Path, spawned: Commands, number: int, code: int
):
    call = ["explain", place / "config.yaml", "--output", tmp_path / "run"]
    ended = spawned(*call, "--json", signal_at=[3, number])
    assert ended.code == code
    said = json.loads(ended.stdout)
    assert (said["status"], said["exit_code"]) == ("error", code)
    assert "finished parts are kept" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert entries(tmp_path / "run" / "parts") == ["00000.h5"]
    assert xai(*call).code == 0
    assert xai("explain", place / "config.yaml", "--output", tmp_path / "whole").code == 0
    same(tmp_path / "run", tmp_path / "whole")


def test_a_mistake_of_ours_ends_with_1_and_a_traceback(capfd: pytest.CaptureFixture[str]):
    def wrong() -> None:
        raise KeyError("ours")

    assert guarded(wrong) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert "Traceback" in said.err
    assert REPORT in said.err


def test_an_early_end_of_the_reader_is_no_error():
    """As in `xai schema | head -1`."""
    script = "import sys; from xcli.cli import main; sys.argv = ['xai', 'schema']; main()"
    reading, writing = os.pipe()
    os.close(reading)
    call = [sys.executable, "-c", script]
    ended = subprocess.run(call, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=SAME_CODE)
    os.close(writing)
    assert ended.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
