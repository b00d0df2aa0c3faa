"""Damaged images, configs and command lines, thousands of them: a reason or a message, never a crash.

Cases are drawn by hypothesis, the same in every run; some hundreds plainly, the others in the soak run.
"""

from __future__ import annotations

import io
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import Commands, photos, plain, written
from unattended.hostile import ORIENTATION, chunk, encoded, segment
from unattended.test_bad_images import stored

from xcli.cli import app
from xcli.cli.exits import guarded
from xcli.config import load_config
from xcli.decode import BadImage, image_size, read_image
from xcli.errors import ConfigError
from xcli.overrides import Changes
from xcli.visible import shown
from xcli.yamlfile import read_yaml, write_inline

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest undoes the filter of xcli.decode
CONFIGS = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


def cases(count: int) -> settings:
    """So many cases, the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- images ---------------------------------------------------------------------------------------------------------


def samples() -> dict[str, bytes]:
    """A small good file of each format and of each way it is packed."""
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 255, (24, 31, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    found = {
        "jpeg": encoded("JPEG", base, exif=exif),
        "progressive": encoded("JPEG", base, progressive=True),
        "cmyk": encoded("JPEG", base.convert("CMYK")),
        "png": encoded("PNG", base, exif=exif),
        "palette": encoded("PNG", base.convert("P"), transparency=b"\0\x80"),
        "wide": encoded("PNG", Image.fromarray(rng.integers(0, 65535, (24, 31), dtype=np.uint16))),
        "animated": encoded("PNG", base, save_all=True, append_images=[base.rotate(9)]),
        "gif": encoded("GIF", base, save_all=True, append_images=[base.rotate(9)]),
        "webp": encoded("WEBP", base, exif=exif),
        "lossless": encoded("WEBP", base, lossless=True),
        "bmp": encoded("BMP", base),
        "ppm": encoded("PPM", base),
        "text": b"P2\n4 3\n255\n" + b" ".join(b"%d" % (i * 9) for i in range(12)),
        "group4": encoded("TIFF", base.convert("1"), compression="group4"),
    }
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        found[f"tiff {compression}"] = encoded("TIFF", base, compression=compression, exif=exif)
    return found


SAMPLES = samples()
places = st.integers(0, 1 << 20)
reach = st.sampled_from([60, 300, 1 << 20])  # headers are where it hurts
chunks = st.builds(
    chunk,
    st.sampled_from(
        [*(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"gAMA"),
         *(b"cHRM", b"pHYs", b"sRGB", b"acTL", b"fcTL", b"fdAT", b"abCd")]
    ),
    st.binary(max_size=40),
)  # fmt: skip
segments = st.builds(
    segment, st.sampled_from([*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE]), st.binary(max_size=40)
)
edits = st.one_of(
    st.tuples(st.just("flip"), places, reach, st.integers(0, 7)),
    st.tuples(st.just("set"), places, reach, st.sampled_from([0, 1, 127, 128, 255])),
    st.tuples(st.just("cut"), places, reach, st.none()),
    st.tuples(st.just("splice"), places, reach, st.sampled_from(sorted(SAMPLES))),
    st.tuples(st.just("insert"), places, reach, chunks | segments | st.binary(max_size=12)),
)


def damaged(data: bytes, edit: tuple[str, int, int, object]) -> bytes:
    """The bytes after one edit."""
    how, place, bound, what = edit
    at = place % max(1, min(len(data), bound))
    if how == "cut":
        return data[: at + 1]
    if how == "splice":
        return data[:at] + SAMPLES[what][at:]
    if how == "insert":
        return data[:at] + what + data[at:]
    if not data:
        return data
    return data[:at] + bytes([data[at] ^ 1 << what if how == "flip" else what]) + data[at + 1 :]


def is_image_or_reason(file: Path, draft: tuple[int, int] | None) -> str:
    """The reason, empty where it is an image; the size alone is an answer or a reason, too."""
    reasons = []
    for look in (
        lambda: read_image(str(file), max_pixels=10**6, draft_to=draft).mode == "RGB",
        lambda: min(image_size(str(file), max_pixels=10**6)) > 0,
    ):
        try:
            assert look()
            reasons.append("")
        except BadImage as error:
            reasons.append(str(error))
            assert reasons[-1].isprintable()
            assert 0 < len(reasons[-1]) < 110
    return reasons[0]


broken = st.tuples(
    st.lists(st.sampled_from(sorted(SAMPLES)), min_size=4, max_size=4, unique=True),
    st.lists(edits, min_size=1, max_size=5),
    st.sampled_from([None, (3, 3)]),
)


def check_bytes(folder: Path, count: int) -> Counter[str]:
    """Draw that many damaged files; how often each reason was given."""
    reasons: Counter[str] = Counter()

    @cases(count // 4)
    @given(broken)
    def each(case):
        names, made, draft = case
        for name in names:
            data = SAMPLES[name]
            for edit in made:
                data = damaged(data, edit)
            file = folder / "case.img"
            file.write_bytes(data)
            reasons[is_image_or_reason(file, draft)] += 1

    each()
    return reasons


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_the_samples_are_good(tmp_path, name):
    (tmp_path / "a.img").write_bytes(SAMPLES[name])
    assert is_image_or_reason(tmp_path / "a.img", None) == ""


def test_damaged_bytes_are_an_image_or_have_a_reason(tmp_path):
    reasons = check_bytes(tmp_path, 300)
    assert reasons.total() >= 300
    assert min(reasons[""], reasons["truncated"], reasons["not an image"]) > 10


@pytest.mark.soak
def test_many_damaged_bytes_are_an_image_or_have_a_reason(tmp_path, capfd):
    reasons = check_bytes(tmp_path, 19_000)
    assert reasons.total() >= 19_000
    assert len(reasons) > 30
    assert capfd.readouterr() == ("", ""), "libtiff and Pillow keep quiet"


@pytest.mark.soak
@pytest.mark.case(
    "damaged bytes of every format, 20 000 cases", "each is an image or has a short reason", "3"
)
def test_damaged_files_in_a_run(tmp_path, ends):
    """The command itself on a thousand of them."""
    rng = random.Random(5)
    photos(tmp_path / "in", 3)
    for number in range(1_000):
        name, other = rng.choices(sorted(SAMPLES), k=2)
        data = SAMPLES[name]
        for _ in range(rng.randrange(1, 5)):
            how = rng.choice(["flip", "cut", "splice"])
            what = {"flip": rng.randrange(8), "cut": None, "splice": other}[how]
            data = damaged(data, (how, rng.randrange(1 << 20), rng.choice([60, 300, 1 << 20]), what))
        (tmp_path / f"in/{number:04d}.{rng.choice(['jpg', 'png', 'tif'])}").write_bytes(data)
    config = written(tmp_path / "run.yaml", plain(tmp_path / "in", tmp_path / "run", methods=["eigencam"]))
    with Commands() as xai:
        ended = xai("explain", config, seconds=300, part_images=64)
    ends(ended.code)
    assert "Traceback" not in ended.stderr
    found = stored(tmp_path / "run")
    assert len(found) == 1_003
    assert 100 < sum(map(bool, found.values())) < 1_000
    assert all(reason.isprintable() for reason in found.values())
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in ended.stderr.splitlines()), (
        "nothing but our log"
    )


# ---- configs --------------------------------------------------------------------------------------------------------

WORDS = """model images target methods score runtime output name source path class top above layer relu preset as seed
png demo gradcam predicted label auto none null true 1 0 -1 0.5 1e999 012 .nan x"""
words = st.sampled_from(WORDS.split())
marks = st.sampled_from(
    [": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "'", '"', "&a ", "*a", "!x ", "#", "|", "\t", "<<"]
)
soup = st.lists(words | marks | st.text(max_size=3), max_size=30).map("".join)
values = st.recursive(
    words.map(lambda word: read_yaml(word, "w").data),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(words, v, max_size=3),
    max_leaves=6,
)
DEMO = "model: {source: demo}\nimages: {path: x}\nmethods: [gradcam]\noutput: {path: y}\n"
texts = st.one_of(
    soup,
    soup.map(DEMO.__add__),
    st.builds(
        lambda file, place, gone, put: (
            (text := file.read_text())[: place % len(text)] + put + text[place % len(text) + gone :]
        ),
        st.sampled_from(CONFIGS),
        places,
        st.integers(0, 8),
        soup | words | marks,
    ),
)
sections = st.sampled_from(
    ["model", "images", "target", "methods", "score", "runtime", "output", "methods.0"]
)
overrides = st.one_of(
    st.builds("{}={}".format, st.lists(words, min_size=1, max_size=4).map(".".join), soup),
    st.builds(lambda key, value: f"{key}={write_inline(value)}", sections, values),
)


def check_texts(folder: Path, count: int) -> Counter[str]:
    """Draw that many configs and overrides: each is a config that reads back, or a message that says where."""
    seen: Counter[str] = Counter()
    file = folder / "case.yaml"

    def outcome(path: Path | None, changes: Changes) -> None:
        try:
            assert load_config(path, changes).text()
            seen["config"] += 1
        except ConfigError as error:
            told = str(error)
        else:
            return
        seen["error"] += 1
        assert told
        assert shown(told.replace("\n", " ")) == told.replace("\n", " ")
        if path is not None:
            seen["place"] += bool(re.search(rf"^{re.escape(str(file))}:\d+:\d+: ", told, re.MULTILINE))

    @cases(count // 2)
    @given(texts)
    def each(text):
        file.write_bytes(text.encode("utf-8", "replace"))
        outcome(file, Changes())

    @cases(count // 2)
    @given(overrides)
    def every(override):
        outcome(None, Changes(overrides=[override]))

    each()
    every()
    return seen


def test_damaged_configs_are_a_config_or_a_message(tmp_path):
    seen = check_texts(tmp_path, 200)
    assert seen["config"] > 10
    assert seen["place"] > 30


@pytest.mark.soak
def test_many_damaged_configs_are_a_config_or_a_message(tmp_path):
    seen = check_texts(tmp_path, 3_000)
    assert seen["config"] + seen["error"] >= 3_000


# ---- command lines --------------------------------------------------------------------------------------------------

things = words | soup | st.sampled_from([str(file) for file in CONFIGS]) | st.text(max_size=8).map("".join)
options = st.one_of(
    st.sampled_from([["--json"], ["-q"], ["-v"], ["--fresh"], ["--update"], ["--no-baselines"], ["--version"], ["-h"]]),
    st.tuples(
        st.sampled_from(
            [*("--set", "--limit", "--device", "--shard", "--engine", "--methods", "--metrics", "--gate"),
             *("--input", "--output", "--against", "--nonsense")]
        ),
        overrides | things | st.integers(-3, 3).map(str) | st.sampled_from(["1/2", "2/1", "cuda:99", "road>=0.1"]),
    ).map(list),
    things.map(lambda thing: [thing]),
)  # fmt: skip
commands = st.sampled_from(
    [["explain", "--dry-run"], ["methods"], ["metrics"], ["schema"], ["evaluate", "nowhere"], ["merge", "nowhere"],
     ["compare", "nowhere"], ["init"], ["layers", "nowhere.yaml"], ["check", "nowhere.yaml"], ["nonsense"]]
)  # fmt: skip


def line_of(command: list[str], given: list[list[str]]) -> list[str]:
    """A command line; no path in it leads out of the current folder."""
    every = [*command, *(one for option in given for one in option)]
    own = {"1/2", "2/1", *map(str, CONFIGS)}
    return [one if one in own else one.replace("/", "_").replace("..", "_") for one in every]


lines = st.builds(line_of, commands, st.lists(options, max_size=4))


def check_lines(count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Draw that many command lines that run nothing; the exit codes."""
    seen: list[int] = []

    @cases(count)
    @given(lines)
    def each(line):
        said = io.StringIO()
        monkeypatch.setattr("sys.argv", ["xai", *line])
        monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            code = guarded(app)
        assert code in (0, 2), (line, said.getvalue())
        assert code == 0 or said.getvalue().strip(), line
        assert "Traceback" not in said.getvalue()
        seen.append(code)

    each()
    return iter(seen)


@pytest.mark.case(
    "damaged configs and options", "a message with the file and line, or with the option", "0, 2"
)
def test_damaged_command_lines_are_refused_or_done(tmp_path, monkeypatch, ends):
    monkeypatch.chdir(tmp_path)
    codes = Counter(check_lines(80, monkeypatch))
    for code in codes:
        ends(code)
    assert min(codes[0], codes[2]) > 0


@pytest.mark.soak
@pytest.mark.case(
    "damaged configs and options", "a message with the file and line, or with the option", "0, 2"
)
def test_many_damaged_command_lines_are_refused_or_done(tmp_path, monkeypatch, ends):
    monkeypatch.chdir(tmp_path)
    for code in set(check_lines(1_000, monkeypatch)):
        ends(code)
