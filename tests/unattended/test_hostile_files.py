"""Configs, weights and run files made by somebody else: refused with what to do, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from runs import Commands, photos, plain, written
from safetensors.torch import save_file
from store_driver import opened, run

import xcli
from xcli.breadcrumbs import Decoding, breadcrumbs, forget
from xcli.demo import nets
from xcli.errors import ConfigError, InputError, ModelError, XaiError
from xcli.merge import merge_run
from xcli.preprocess import Preprocess
from xcli.programs import is_expected, refuse_code
from xcli.record import load
from xcli.scoreparts import STATE, Work
from xcli.scoretable import curves_of, read_curve, read_scores
from xcli.weights import load_weights

COUNT = 11
ESCAPE = "\x1b]0;taken\x07\x1b[2J"
NAMES = "a config with tags, anchors that explode, terminal escapes, or that is a device"
WEIGHTS = "weights that would run code, or lie about their size"
RUNS = "a results.h5 or run.json made by someone else"


@pytest.fixture(scope="module")
def xai():
    with Commands() as commands:
        yield commands


@pytest.fixture(scope="module")
def idle(xai):
    """Bytes that a command takes which has nothing to do."""
    return xai("methods", "gradcam").peak


def mostly_long(names, *short):
    """Parameters, of which those not named are for the long tests."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.soak) for name in names]


def refused(ended, *words):
    """It ended with exit code 2 and one message that a terminal can take, and not with a traceback."""
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert " ERROR" in ended.stderr
    assert not set(ended.stderr) & set("\x1b\x07\x9b\x00\r"), repr(ended.stderr)
    for word in words:
        assert word in ended.stderr, ended.stderr


# --- configs -------------------------------------------------------------------------------------------------

LAUGHS = "\n".join(
    ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30))]
)
CONFIGS = {
    "tag": (b"model: !!python/object/apply:os.system ['touch RAN']", "the tag"),
    "laughs": (LAUGHS.encode(), "values, aliases expanded"),
    "circle": (b"methods: &m [*m]", "contains itself"),
    "number": (b"runtime: {seed: " + b"9" * 100_000 + b"}", "more than 18 digits"),
    "deep": (b"[" * 500_000, "levels deep"),
    "large": (b"# " + b"x" * (2 << 20), "larger than 1 MiB"),
    "zeros": (b"a: \x00", "a character that YAML does not allow"),
    "utf-16": ("model: {source: demo}".encode("utf-16"), "not UTF-8"),
    "escape in a key": (b'"\\e]0;taken\\a": 1', "unknown key"),
    "escape in a path": (
        b'model: {source: demo, weights: "\\e[2J\\n.pt"}',
        "there is no weights file \\x1b[2J\\n.pt",
    ),
    "escape in a class": (b'{model: {source: demo}, target: {class: "\\e[2J\\u202e"}}', "has no class"),
}


@pytest.mark.case(NAMES, "refused with file, line and column, escapes written out", "2")
@pytest.mark.parametrize("name", mostly_long(CONFIGS, "tag", "escape in a path"))
def test_a_hostile_config_is_refused_in_little_memory(xai, idle, tmp_path, ends, name):
    content, word = CONFIGS[name]
    config = tmp_path / "c.yaml"
    config.write_bytes(content)
    photos(tmp_path / "in", 1)
    ended = xai("check", config, "--input", tmp_path / "in", folder=str(tmp_path), seconds=60)
    refused(ended, word)
    assert ended.peak < idle + (200 << 20)
    ends(ended.code)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.case(NAMES, "refused with file, line and column, escapes written out", "2")
@pytest.mark.parametrize("kind", mostly_long(["folder", "fifo", "device", "loop", "missing"], "fifo"))
def test_a_config_that_is_no_file_is_refused(xai, tmp_path, ends, kind):
    config = tmp_path / f"c{ESCAPE}.yaml"
    match kind:
        case "folder":
            config.mkdir()
        case "fifo":
            os.mkfifo(config)
        case "device":
            config.symlink_to("/dev/zero")
        case "loop":
            config.symlink_to(config)
    ended = xai("check", config, seconds=60)
    refused(ended, "\\x1b]0;taken\\x07")
    ends(ended.code)


# --- weights -------------------------------------------------------------------------------------------------


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def lying(file: Path, header: object, data: bytes = b"", claim: int | None = None) -> None:
    """A safetensors file with this header; ``claim``: the length that it says the header has."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if claim is None else claim) + text + data)


def tensor(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def rezipped(source: Path, file: Path, change, method=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))


def weights(name: str, folder: Path) -> Path:
    """A hostile file of weights; payloads would make ``folder/RAN``."""
    file = folder / f"w.{name.rpartition('.')[2]}"
    state = nets.load("shapes-cnn").state_dict()
    key = next(iter(state))
    payload = Payload(f"touch {folder / 'RAN'}")
    good = folder / "good.pt"
    match name:
        case "code.pt":
            torch.save({**state, "x": payload}, file)
        case "raw code.pt":
            file.write_bytes(pickle.dumps(payload))
        case "old code.pt":
            torch.save(payload, file, _use_new_zipfile_serialization=False)
        case "script.pt":
            torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
        case "paths.pt":
            torch.save(state, good)
            rezipped(good, file, lambda name, data: (f"../../{folder}/{name}", data))
        case "bomb.pt":
            torch.save(state, good)
            rezipped(
                good, file, lambda name, data: (name, data + bytes(130 << 20) if name.endswith("data.pkl") else data),
                zipfile.ZIP_DEFLATED,
            )  # fmt: skip
        case "endless shapes.pt":
            torch.save({key: torch.zeros(()).expand(10**6, 10**6)}, file)
        case "circle.pt":
            circle: dict[str, object] = {}
            circle["model"] = circle
            torch.save(circle, file)
        case "sparse.pt":
            torch.save({k: v.to_sparse() if v.dim() == 2 else v for k, v in state.items()}, file)
        case "no data.pt":
            torch.save({k: v.to("meta") for k, v in state.items()}, file)
        case "complex.pt":
            torch.save({k: v.to(torch.complex64) if v.dim() == 4 else v for k, v in state.items()}, file)
        case "numbers.pt":
            torch.save({**state, ESCAPE: 3}, file)
        case "shapes.pt":
            torch.save({k: v[:1] if v.dim() else v for k, v in state.items()}, file)
        case "cut.pt":
            torch.save(state, good)
            file.write_bytes(good.read_bytes()[:-4000])
        case "fifo.pt":
            os.mkfifo(file)
        case "folder.pt":
            file.mkdir()
        case "device.pt":
            file.symlink_to("/dev/zero")
        case "claim of 100 MB.safetensors":
            lying(file, {}, claim=100_000_000)
        case "claim beyond.safetensors":
            lying(file, {}, claim=2**64 - 1)
        case "tensor beyond.safetensors":
            lying(file, {key: tensor([4], 0, 16)}, bytes(8))
        case "overlap.safetensors":
            lying(file, {"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12))
        case "negative.safetensors":
            lying(file, {"a": tensor([-1], -4, 0)})
        case "huge.safetensors":
            lying(file, {"a": tensor([2**62, 4], 0, 16)}, bytes(16))
        case "type.safetensors":
            lying(file, {"a": tensor([1], 0, 4, "Q99")}, bytes(4))
        case "twice.safetensors":
            one = json.dumps(tensor([1], 0, 4))
            lying(file, f'{{"a":{one},"a":{one}}}'.encode(), bytes(4))
        case "names.safetensors":
            lying(file, {f"{ESCAPE}\n": tensor([1], 0, 4)}, bytes(4))
        case "cut.safetensors":
            save_file(state, file)
            file.write_bytes(file.read_bytes()[:-100])
        case "deep.safetensors":
            lying(file, b"[" * 100_000)
    return file


PICKLES = ["code.pt", "raw code.pt", "old code.pt", "script.pt", "paths.pt", "endless shapes.pt", "circle.pt",
           "sparse.pt", "no data.pt", "complex.pt", "numbers.pt", "shapes.pt", "cut.pt", "fifo.pt", "folder.pt",
           "device.pt"]  # fmt: skip
HEADERS = ["claim of 100 MB", "claim beyond", "tensor beyond", "overlap", "negative", "huge", "type", "twice", "names",
           "cut", "deep"]  # fmt: skip
EVERY = [*PICKLES, *(f"{name}.safetensors" for name in HEADERS)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_hostile_weights_are_refused(tmp_path, name):
    module = nets.load("shapes-cnn")
    with pytest.raises(ModelError):
        load_weights(module, weights(name, tmp_path))
    assert not (tmp_path / "RAN").exists()


@pytest.mark.case(WEIGHTS, "refused, and nothing of it is run", "2")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    mostly_long(
        ["code.pt", "bomb.pt", "numbers.pt", "fifo.pt", "claim of 100 MB.safetensors"], "code.pt", "bomb.pt"
    ),
)
def test_the_command_refuses_hostile_weights_in_little_memory(xai, idle, tmp_path, ends, name):
    photos(tmp_path / "in", 1)
    model = {"weights": str(weights(name, tmp_path))}
    config = written(tmp_path / "c.yaml", plain(tmp_path / "in", tmp_path / "out", model=model))
    ended = xai("explain", config, seconds=60)
    refused(ended)
    ends(ended.code)
    assert ended.peak < idle + (100 << 20)
    assert not (tmp_path / "RAN").exists()
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_told(caplog, tmp_path):
    module = nets.load("shapes-cnn")
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state["head.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    load_weights(module, tmp_path / "nan.pt")
    assert "not finite" in caplog.text
    assert "head.weight" in caplog.text


# --- exported programs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("expr_str", "__import__('os').system('touch RAN')"),
        ("expr_str", "exec(chr(111))"),
        ("target", "torch.os.system"),
        ("target", "torch.ops.load_library"),
        ("target", "torch.ops.aten.from_file.default"),
        ("target", "torch.ops.image.write_file.default"),
        ("name", "x; import os"),
        ("name", "block/1"),
        ("as_operator", "torch.os.system"),
    ],
)
def test_an_exported_program_that_would_run_code_is_refused(tmp_path, key, text):
    """PyTorch evaluates a size as Python, and finds an operator by any name below ``torch``."""
    values = {"x": {"sizes": [{"as_expr": {"expr_str": "Symbol('s0', integer=True)"}}]}}
    node = {
        "name": "relu",
        "target": "torch.ops.aten.relu.default",
        "metadata": {"stack_trace": "as_it; was"},
    }
    for given in ({}, {key: text}):
        graph = {"graph": {"nodes": [{**node, **given}], "tensor_values": values}}
        with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
            archive.writestr("net/models/model.json", json.dumps({"graph_module": graph}))
        if given:
            with pytest.raises(ModelError, match="may hold code"):
                refuse_code(tmp_path / "net.pt2")
        else:
            refuse_code(tmp_path / "net.pt2")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Symbol('s31', positive=True, integer=True)", True),
        ("Add(Mul(Integer(2), Symbol('s0')), Integer(-1))", True),
        ("2*s0 + 1", True),
        ("floor(s0/2) - 1.5", True),
        ("TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s0'))))", True),
        ("TruncToFloat(RoundDecimal(OpaqueUnaryFn_sqrt(Float('1.0e-5', precision=53)), 1))", True),
        ("Add('os.system', 1)", False),
        ("eval('1')", False),
        ("s0.__class__", False),
        ("s0 . real", False),
        ("S('exec')('x')", False),
        ("Symbol('x')('y')", False),
        ("(lambda: 1)()", False),
        ("[x for x in y]", False),
        ('Symbol("x")', False),
    ],
)
def test_a_size_is_arithmetic(text, right):
    assert is_expected("expr_str", text) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [("d.cls head", True), ("block/1", True), ("a:b-c", True)]
    + [(text, False) for text in ("a\rimport os", 'a")', "a\\", "a'", "a(b)")],
)
def test_a_module_may_have_any_name_that_stays_one(text, right):
    """PyTorch writes it between double quotes in Python that it compiles."""
    for key in ("fqn", "parameter_name", "buffer_name"):
        assert is_expected(key, text) is right


# --- run files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run without a model, one whose parts are kept, and one that waits for its merge."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder / "merged", COUNT)
    run(folder / "parts", COUNT, layout="parts")
    run(folder / "unmerged", COUNT, merge=False)
    return folder


def replaced(file, key, data, **options):
    del file[key]
    file.create_dataset(key, data=data, **options)


def external_link(file):
    del file["heatmaps/gradcam"]
    file["heatmaps/gradcam"] = h5py.ExternalLink("/etc/other.h5", "/x")


def soft_link(file):
    del file["status/gradcam"]
    file["status/gradcam"] = h5py.SoftLink("/status/gradcam")


def soft_to_good(file):
    file["extras/gradcam"] = h5py.SoftLink("/extras/rise")


def cycle(file):
    file["extras/rise/again"] = file["extras"]


def external_storage(file):
    del file["explanations/score"]
    rows = len(file["explanations/image"])
    file.create_dataset(
        "explanations/score", (rows,), "f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    )


def virtual(target, key="heatmaps/gradcam"):
    def spoil(file):
        shape, dtype = file[key].shape, file[key].dtype
        del file[key]
        layout = h5py.VirtualLayout(shape, dtype)
        layout[...] = h5py.VirtualSource(target, key, shape)
        file.create_virtual_dataset(key, layout)

    return spoil


def endless(key, shape, dtype="f4", **options):
    def spoil(file):
        del file[key]
        file.create_dataset(key, shape, dtype, **options)

    return spoil


def foreign_filter(file):
    values = file["extras/rise/delta"][...]
    del file["extras/rise/delta"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((len(values),))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (1,))
    space = h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(file["extras/rise"].id, b"delta", h5py.h5t.IEEE_F64LE, space, plist)


def attribute(path, name, value):
    def spoil(file):
        file[path].attrs[name] = value

    return spoil


def lists(file):
    values = np.array([*[np.arange(2)] * 12, np.arange(3)], object)
    replaced(file, "explanations/score", values, dtype=h5py.vlen_dtype("i8"))


def owners(change):
    return lambda file: replaced(file, "explanations/image", change(file["explanations/image"][...]))


SPOILED = {
    "schema": attribute("/", "schema", "xcli/9"),
    "schema of another type": attribute("/", "schema", np.arange(3)),
    "no images": lambda f: f.__delitem__("images"),
    "no owners": lambda f: f.__delitem__("explanations/image"),
    "short column": lambda f: replaced(f, "images/label", np.arange(3)),
    "long column": lambda f: replaced(f, "explanations/score", np.zeros(99, "f4")),
    "texts for numbers": lambda f: replaced(f, "explanations/target", ["a"] * 13),
    "numbers for texts": lambda f: replaced(f, "images/path", np.arange(COUNT)),
    "pairs": lambda f: replaced(f, "explanations/score", np.zeros(13, [("a", "f4"), ("b", "i8")])),
    "lists": lists,
    "references": lambda f: replaced(f, "explanations/score", np.array([f.ref] * 13, h5py.ref_dtype)),
    "complex maps": lambda f: replaced(f, "heatmaps/gradcam", np.zeros((13, 5, 6), "c8")),
    "long doubles": lambda f: replaced(f, "explanations/score", np.zeros(13, np.longdouble)),
    "other byte order": lambda f: replaced(f, "heatmaps/gradcam", np.zeros((13, 5, 6), ">f4")),
    "maps of other rows": lambda f: replaced(f, "heatmaps/gradcam", np.zeros((3, 5, 6), "f4")),
    "maps without height": lambda f: replaced(f, "heatmaps/gradcam", np.zeros(13, "f4")),
    "a map for a curve": lambda f: replaced(f, "curves/gradcam/deletion", np.zeros((13, 2, 2), "f4")),
    "another abscissa": lambda f: replaced(f, "curves/gradcam/deletion.fraction", np.zeros(9)),
    "nothing at all": lambda f: replaced(f, "explanations/score", h5py.Empty("f4")),
    "negative owners": owners(lambda rows: rows - 1),
    "owners beyond": owners(lambda rows: rows + 2),
    "huge owners": owners(lambda rows: np.where(rows, 2**62, rows)),
    "external link": external_link,
    "link to itself": soft_link,
    "link inside": soft_to_good,
    "a group in itself": cycle,
    "data in another file": external_storage,
    "virtual elsewhere": virtual("/etc/other.h5"),
    "virtual above": virtual("../parts/00000.h5"),
    "virtual in parts above": virtual("parts/../../00000.h5"),
    "virtual in itself": virtual("."),
    "virtual column": virtual("parts/00000.h5", "explanations/score"),
    "10^12 rows": endless("explanations/image", (10**12,), "i8", chunks=(1024,)),
    "10^12 maps": endless("heatmaps/gradcam", (10**12, 5, 6), chunks=(1, 5, 6), compression="gzip"),
    "one endless map": endless("heatmaps/gradcam", (13, 10**6, 10**6), chunks=(1, 10, 10)),
    "endless texts": endless("categories", (10**10,), h5py.string_dtype()),
    "long texts": endless("categories", (3,), "S200000000"),
    "foreign filter": foreign_filter,
    "huge attribute": attribute("/", "model", np.zeros(60_000, "u1")),
    "params that are none": attribute("curves/gradcam/deletion", "params", "{" * 5),
    "deep params": attribute("curves/gradcam/deletion", "params", "[" * 50_000),
    "direction": attribute("curves/gradcam/deletion", "direction", "sideways"),
    "a name with escapes": lambda f: f.copy("heatmaps/gradcam", f"heatmaps/{ESCAPE}"),
    "a name that climbs": lambda f: f.copy("heatmaps/gradcam", f["heatmaps"], ".. "),
    "a group of its own": lambda f: f.create_group("notes"),
    "a group for maps": lambda f: (f.__delitem__("heatmaps/gradcam"), f.create_group("heatmaps/gradcam")),
    "a type for maps": lambda f: (f.__delitem__("heatmaps/gradcam"), f.__setitem__("heatmaps/gradcam", np.dtype("f4"))),
}  # fmt: skip


def read_all(path):
    """Everything that is read of a results.h5."""
    with xcli.open_run(path) as found:
        for whole in ("attrs", "config", "images", "explanations", "categories", "scored"):
            getattr(found, whole)
        for name in found.names:
            found.heatmap(name), found.heatmap_attrs(name), found.extras(name)
        for name in {*found.scored, *found.names}:
            found.metrics(name), found.curves(name), found.summary(name), found.measured(name)
    scores = read_scores(path)
    for metric, methods in curves_of(scores).items():
        read_curve(scores, methods[0], metric)


def test_a_sound_run_file_is_read(made):
    read_all(made / "merged")
    read_all(made / "parts")


@pytest.mark.parametrize("name", SPOILED)
def test_a_results_file_of_someone_else_is_refused(made, tmp_path, name):
    shutil.copyfile(made / "merged/results.h5", tmp_path / "results.h5")
    with h5py.File(tmp_path / "results.h5", "a") as file:
        SPOILED[name](file)
    with pytest.raises(InputError):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "name", ["short column", "external link", "data in another file", "virtual elsewhere", "10^12 maps",
             "owners beyond", "foreign filter", "complex maps", "a name with escapes"],
)  # fmt: skip
def test_a_part_of_someone_else_is_not_merged(made, tmp_path, name):
    root = shutil.copytree(made / "unmerged", tmp_path / "run")
    with h5py.File(root / "parts/00001.h5", "a") as file:
        rows = len(file["explanations/image"])
        if name == "short column":
            replaced(file, "explanations/score", np.zeros(rows + 1, "f4"))
        elif name == "complex maps":
            replaced(file, "heatmaps/gradcam", np.zeros((rows, 5, 6), "c8"))
        elif name == "owners beyond":
            replaced(file, "explanations/image", file["explanations/image"][...] + 4)
        else:
            SPOILED[name](file)
    with pytest.raises(ConfigError, match=r"00001\.h5"):
        merge_run(root)


@pytest.mark.parametrize("how", ["contiguous", "other chunks", "no shuffle"])
def test_a_part_whose_maps_cannot_be_copied_is_not_merged(made, tmp_path, how):
    root = shutil.copytree(made / "unmerged", tmp_path / "run")
    options = {"contiguous": {}, "other chunks": {"chunks": (1, 5, 3), "compression": "gzip", "shuffle": True},
               "no shuffle": {"chunks": (1, 5, 6), "compression": "gzip"}}  # fmt: skip
    with h5py.File(root / "parts/00001.h5", "a") as file:
        replaced(file, "heatmaps/gradcam", file["heatmaps/gradcam"][...], **options[how])
    with pytest.raises(ConfigError, match=r"00001\.h5"):
        merge_run(root)


def test_maps_are_not_read_through_a_part_of_someone_else(made, tmp_path):
    """An index of parts is sound; one of the parts it points to keeps its maps in another file."""
    root = shutil.copytree(made / "parts", tmp_path / "run")
    (tmp_path / "secret").write_bytes(bytes(range(120)) * 100)
    with h5py.File(root / "parts/00001.h5", "a") as file:
        shape = file["heatmaps/gradcam"].shape
        del file["heatmaps/gradcam"]
        size = 4 * int(np.prod(shape))
        file.create_dataset("heatmaps/gradcam", shape, "f4", external=[(str(tmp_path / "secret"), 0, size)])
    with xcli.open_run(root) as found, pytest.raises(InputError, match="another file"):
        found.heatmap("gradcam", 0)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "loop", "empty", "cut", "text"])
def test_a_results_file_that_is_none_is_refused(made, tmp_path, kind):
    file = tmp_path / "results.h5"
    match kind:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "loop":
            file.symlink_to(file)
        case "empty":
            file.touch()
        case "cut":
            file.write_bytes((made / "merged/results.h5").read_bytes()[:-3000])
        case "text":
            file.write_text("no")
    for path in (tmp_path, file):
        with pytest.raises(InputError):
            xcli.open_run(path)


def test_a_hole_makes_no_room(made, tmp_path):
    """A file of many gigabytes that has none of them on disk does not make terabytes believable."""
    shutil.copyfile(made / "merged/results.h5", tmp_path / "results.h5")
    with h5py.File(tmp_path / "results.h5", "a") as file:
        del file["explanations/score"]
        file.create_dataset("explanations/score", (13,), "f4")
        del file["categories"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((1 << 16,))
        text = h5py.h5t.C_S1.copy()
        text.set_size(1 << 20)
        h5py.h5d.create(file.id, b"categories", text, space, plist)
    assert (tmp_path / "results.h5").stat().st_size > 1 << 36
    with pytest.raises(InputError, match="more than the file can hold"):
        xcli.open_run(tmp_path)


# --- records -------------------------------------------------------------------------------------------------

VERSIONS = [{"versions": text} for text in ("nope", "[]", '{"torch": 2}', 2, "[" * 100_000)]
RECORDS = {
    "part_length": [0, -1, 1.5, "4", True, 10**30, None],
    "generations": [[], [5], [11, 3, 11], [-1, 11], ["11"], 11, [10**18]],
    "base": [-1, 12, "0", None],
    "attrs": [[], *VERSIONS, {"": "x"}, {"model": None}, {"model": [1]}, {"seed": 10**30}, {"a": "\udc00\ud800"}],
    "resolved": [[], {"size": [1, 2, 3]}, {"size": [10**9, 10**9]}, {"batch_size": 0}, {"layout": "x"}, {"shapes": 3}],
    "categories": ["abc", [1], None, ["\0"]],
    "fingerprint": [1, None],
    "config": [None, ["a"]],
    "inputs": [None, {"bytes": -1, "sha256": ""}, {"bytes": "x"}],
    "schema": ["xcli/9", None],
}  # fmt: skip


@pytest.mark.parametrize("key", RECORDS)
def test_a_record_that_cannot_be_is_refused(made, tmp_path, key):
    shutil.copytree(made / "unmerged", tmp_path, dirs_exist_ok=True)
    document = json.loads((tmp_path / "run.json").read_text())
    for value in RECORDS[key]:
        (tmp_path / "run.json").write_text(json.dumps({**document, key: value}))
        for use in (load, merge_run):
            with pytest.raises(ConfigError, match="record of the run"):
                use(tmp_path)
        with pytest.raises(ConfigError, match="record of the run"), opened(tmp_path):
            pass


@pytest.mark.parametrize(
    "change",
    [{"path": "../../x.png"}, {"path": "/etc/x.png"}, {"path": "a/./b"}, {"path": ""}, {"path": "a\0b"}, {"path": 3},
     {"file": "a\0b"}, {"file": None}, {"size": -1}, {"size": 10**30}, {"mtime_ns": "x"}, {"label": 3},
     {"path": "\ud800"}],
    ids=str,
)  # fmt: skip
def test_a_list_of_images_that_leaves_its_folder_is_refused(made, tmp_path, change):
    import hashlib

    shutil.copytree(made / "unmerged", tmp_path, dirs_exist_ok=True)
    first, *rest = (tmp_path / "inputs.jsonl").read_text().splitlines()
    text = "\n".join([json.dumps({**json.loads(first), **change}), *rest, ""]).encode()
    (tmp_path / "inputs.jsonl").write_bytes(text)
    document = json.loads((tmp_path / "run.json").read_text())
    document["inputs"] |= {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (tmp_path / "run.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="line 1"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "deep", "not JSON", "list", "number"])
@pytest.mark.parametrize("name", ["run.json", "inputs.jsonl"])
def test_a_record_that_is_no_file_is_refused(made, tmp_path, name, kind):
    shutil.copytree(made / "unmerged", tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    file.unlink()
    match kind:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "deep":
            file.write_text("[" * 100_000)
        case "not JSON":
            file.write_bytes(b"\xff{")
        case "list":
            file.write_text("[]")
        case "number":
            file.write_text("9" * 10_000)
    with pytest.raises(ConfigError, match="record of the run"):
        load(tmp_path)


@pytest.mark.parametrize("length", [0, -1, True, "4", 1.5, None, [1]])
def test_scores_in_parts_of_no_length_are_begun_anew(made, tmp_path, length):
    root = shutil.copytree(made / "merged", tmp_path / "run")
    plan = SimpleNamespace(
        config=None, scoring=SimpleNamespace(pairs=[]), device=torch.device("cpu"), part_length=4
    )
    begun = Work.open(root, load(root), plan)
    (begun.folder / STATE).write_text(json.dumps({"pairs": [], "length": length}))
    assert Work.open(root, load(root), plan).length == 4
    assert json.loads((begun.folder / STATE).read_text())["length"] == 4


def test_what_no_shard_has_locked_names_none(made, tmp_path):
    root = shutil.copytree(made / "unmerged", tmp_path / "run")
    (root / "locks/x-of-y.lock").touch()
    (root / "parts/00001.h5").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        merge_run(root)


# --- notes ---------------------------------------------------------------------------------------------------


def spoiled_note(path: Path, kind: str) -> None:
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.write_text(kind)


NOTES = ["folder", "fifo", "device", '{"x": "y"}', '{"0": 5}', '{"0": null, "-1": "x", "١": "y"}', "[[0, 1]]",
         "9" * 5000, "[" * 60_000]  # fmt: skip


@pytest.mark.parametrize("kind", NOTES, ids=lambda kind: kind[:20])
def test_a_note_of_someone_else_says_nothing(tmp_path, caplog, kind):
    decoding = Decoding(Preprocess(resize=(16, 16)), (255, 255, 255), 10**6, True)
    for name in ("9-of-9.crashes", "9-of-9.reading"):
        spoiled_note(tmp_path / name, kind)
    if kind == "fifo":
        os.mkfifo(tmp_path / "9-of-9.lock")
    with breadcrumbs(tmp_path, "1-of-1", [], decoding) as crumbs:
        assert crumbs.refused == {}
    if kind in ("folder", "fifo", "device"):
        assert "9-of-9.reading is ignored" in caplog.text
    forget(tmp_path)


def test_a_note_that_cannot_be_removed_stays(tmp_path, caplog, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "not permitted")

    (tmp_path / "9-of-9.reading").write_bytes(bytes(8))
    decoding = Decoding(Preprocess(resize=(16, 16)), (255, 255, 255), 10**6, True)
    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr("xcli.breadcrumbs.new_file", lambda path: os.open(path, os.O_RDWR | os.O_CREAT))
    with breadcrumbs(tmp_path, "1-of-1", [], decoding):
        pass
    assert "9-of-9.reading stays: not permitted" in caplog.text


# --- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(xai, tmp_path_factory):
    """A run with scores."""
    folder = tmp_path_factory.mktemp("scored")
    photos(folder / "in", 2)
    metrics = [{"name": "deletion", "steps": 2}]
    config = written(
        folder / "c.yaml", plain(folder / "in", folder / "out", methods=["gradcam"], metrics=metrics)
    )
    assert xai("explain", config).code == 0
    return folder / "out"


def explosive(document):
    document["config"] = LAUGHS
    document["fingerprint"] = "other"


def tagged(document):
    document["config"] = "model: !!python/object/apply:os.system ['touch RAN']"


def another_class(file):
    file["explanations/target"][...] = 10


def other_maps(file):
    rows = len(file["explanations/image"])
    replaced(
        file,
        "heatmaps/gradcam",
        np.zeros((rows, 3, 3), "f4"),
        chunks=(1, 3, 3),
        compression="gzip",
        shuffle=True,
    )


HARM = {
    "external link": ("h5", external_link, ["evaluate", "compare", "merge"]),
    "10^12 rows": ("h5", SPOILED["10^12 rows"], ["evaluate", "compare"]),
    "classes": ("h5", another_class, ["evaluate"]),
    "maps": ("h5", other_maps, ["evaluate"]),
    "laughs": ("json", explosive, ["evaluate", "explain"]),
    "tag": ("json", tagged, ["evaluate"]),
    "no choices": ("json", lambda document: document["resolved"].clear(), ["evaluate"]),
}


@pytest.mark.case(RUNS, "refused: what is wrong in which place of the file", "2")
@pytest.mark.parametrize("name", mostly_long(HARM, "external link", "no choices"))
def test_the_command_refuses_a_run_of_someone_else(xai, scored, tmp_path, ends, name):
    kind, harm, commands = HARM[name]
    root = shutil.copytree(scored, tmp_path / "out")
    if kind == "h5":
        with h5py.File(root / "results.h5", "a") as file:
            harm(file)
    else:
        document = json.loads((root / "run.json").read_text())
        harm(document)
        (root / "run.json").write_text(json.dumps(document))
    more = {"evaluate": ["--metrics", "insertion"], "compare": ["--no-baselines"], "merge": []}
    for command in commands:
        arguments = [root, *more.get(command, [])]
        if command == "explain":
            arguments = [scored.parent / "c.yaml", "--output", root]
        ended = xai(command, *arguments, seconds=60, folder=str(tmp_path))
        refused(ended)
        ends(ended.code)
    assert not (tmp_path / "RAN").exists()


# --- bytes ---------------------------------------------------------------------------------------------------


def damaged(data: bytes, seed: int) -> bytes:
    """Some bytes changed, most of them among the first, where HDF5 keeps its structure; at times cut off."""
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        place = draw.randrange(draw.choice([100, 2000, len(changed)]))
        changed[place] = draw.choice([0, 255, draw.randrange(256), changed[place] ^ 1 << draw.randrange(8)])
    return bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.1 else changed)


def outcome(use, *given) -> int:
    """Use damaged bytes in a child: 0 used, 2 refused, 1 a traceback, negative: HDF5 itself died or never ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.alarm(4)
        try:
            use(*given)
            code = 0
        except XaiError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def told(ends: list[int]) -> None:
    """No traceback, and most damage is seen; HDF5 cannot be mended from here, so its deaths are only counted."""
    print(
        f"{len(ends)} damaged: {ends.count(0)} used, {ends.count(2)} refused, {sum(end < 0 for end in ends)} died"
    )
    assert 1 not in ends, [seed for seed, end in enumerate(ends) if end == 1]
    assert ends.count(2) > len(ends) / 10


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.soak)])
def test_damaged_bytes_are_read_or_refused(made, tmp_path, count):
    data = (made / "merged/results.h5").read_bytes()
    ends = []
    for seed in range(count):
        (tmp_path / "results.h5").write_bytes(damaged(data, seed))
        ends.append(outcome(read_all, tmp_path))
    told(ends)


@pytest.mark.soak
def test_damaged_parts_are_merged_or_refused(made, tmp_path):
    data = (made / "unmerged/parts/00001.h5").read_bytes()
    ends = []
    for seed in range(200):
        root = shutil.copytree(made / "unmerged", tmp_path / str(seed))
        (root / "parts/00001.h5").write_bytes(damaged(data, seed))
        ends.append(outcome(merge_run, root))
        shutil.rmtree(root)
    told(ends)
