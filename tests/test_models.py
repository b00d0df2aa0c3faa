"""Models: every source, every refusal, checkpoints in every wrapping, logits in every kind of output."""

from __future__ import annotations

import json
import os
import pickle
import re
import textwrap
import warnings
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models

from xcli.demo import nets
from xcli.errors import ModelError
from xcli.layers import survey
from xcli.models import ModelSpec, find_logits, load_model, unwrap
from xcli.preprocess import Preprocess
from xcli.sources import SOURCES
from xcli.weights import load_weights, read_state_dict, weights_hash

PLAIN = Preprocess(resize=8, crop=8)


class Payload:
    """Creates a file named by the environment when it is unpickled."""

    def __reduce__(self):
        return (os.system, (f"touch {os.environ['PAYLOAD_RAN']}",))


class Net(nn.Module):
    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, labels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)).mean((2, 3)))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    net = Net()
    for value in net.state_dict().values():
        value.copy_(torch.randint(-5, 5, value.shape))
    return net.state_dict()


@pytest.fixture
def payload(tmp_path, monkeypatch) -> Path:
    mark = tmp_path / "ran"
    monkeypatch.setenv("PAYLOAD_RAN", str(mark))
    return mark


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


# ------------------------------------------------------------------------------------------------------ checkpoints

WRAPPED = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {}, "epoch": 3},
    "model_state_dict": lambda w: {"model_state_dict": w, "loss": 0.1},
    "model_ema": lambda w: {
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed(w, "module.")},
        "epoch": 1,
    },
    "ema": lambda w: {"ema": w, "step": 1},
    "nested": lambda w: {"model": {"state_dict": w, "version": 2}},
    "DataParallel": lambda w: prefixed(w, "module."),
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled in DataParallel": lambda w: prefixed(w, "module._orig_mod."),
    "DataParallel twice in compiled": lambda w: prefixed(w, "_orig_mod.module.module."),
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2"},
    "a compiled part": lambda w: {key.replace("stem.", "stem._orig_mod."): value for key, value in w.items()},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("case", WRAPPED)
def test_checkpoints_are_unwrapped(case, suffix, weights, tmp_path):
    torch.save(WRAPPED[case](weights), tmp_path / f"file{suffix}")
    assert same(read_state_dict(tmp_path / f"file{suffix}"), weights)


def test_safetensors_are_read(weights, tmp_path):
    save_file(prefixed(weights, "module."), tmp_path / "file.safetensors")
    assert same(read_state_dict(tmp_path / "file.safetensors"), weights)


def test_prefixes_that_only_some_names_have_stay(weights, tmp_path):
    odd = {**prefixed(weights, "model."), "scale": torch.ones(1)}
    torch.save(odd, tmp_path / "file.pt")
    assert same(read_state_dict(tmp_path / "file.pt"), odd)


def test_a_network_whose_own_names_look_wrapped_is_loaded(weights, tmp_path):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

    outer = Outer()
    torch.save(prefixed(weights, "module.model."), tmp_path / "file.pt")
    load_weights(outer, tmp_path / "file.pt")
    assert same(outer.model.state_dict(), weights)


def truncated(file: Path, size: int) -> Path:
    file.write_bytes(file.read_bytes()[:size])
    return file


@pytest.mark.parametrize("kept", [0, 1, 100, 1500, -40])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_refused(kind, kept, weights, tmp_path):
    file = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    if kind == "safetensors":
        save_file(weights, file)
        kept = min(kept, 600)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ModelError, match="damaged"):
        read_state_dict(truncated(file, kept))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pt", None, "there is no weights file"),
        ("file.onnx", b"x", "weights are read from"),
        ("file.pt", b"hello world, this is text", "damaged"),
        ("file.safetensors", b"hello world, this is text", "damaged"),
    ],
)
def test_other_files_are_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is empty"),
        (torch.ones(3), "holds a Tensor"),
        ([torch.ones(3)], "holds a list"),
        ({"epoch": 3, "generator": torch.ones(1)}, "is no state dict.*epoch, generator"),
    ],
)
def test_checkpoints_without_tensors_by_name_are_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ModelError, match=message):
        read_state_dict(tmp_path / "file.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_with_code_is_refused_and_its_payload_does_not_run(kind, payload, tmp_path):
    file = tmp_path / "file.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(), protocol=2))
    else:
        torch.save({"weight": Payload()}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ModelError, match=r"holds code.*save_file\(model.state_dict"):
        read_state_dict(file)
    assert not payload.exists()
    if kind == "pickle":  # the trap is armed
        pickle.loads(file.read_bytes())
        assert payload.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "file.pt")
    with pytest.raises(
        ModelError, match=r"a Python object \(torch.nn.modules.linear.Linear\), not only tensors"
    ):
        read_state_dict(tmp_path / "file.pt")


def scripted(net: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():  # deprecated in newer versions, but files of it are around
        warnings.simplefilter("ignore")
        return torch.jit.script(net)


@pytest.mark.filterwarnings(
    "ignore:'torch.load' received a zip file", "ignore:.*torch.jit.save:FutureWarning"
)
def test_a_script_is_refused(tmp_path):
    torch.jit.save(scripted(nn.Linear(2, 2)), tmp_path / "file.pt")
    with pytest.raises(ModelError, match="TorchScript program"):
        read_state_dict(tmp_path / "file.pt")


def test_weights_that_do_not_fit_are_listed_all_at_once(weights, tmp_path):
    wrong = {key: value for key, value in weights.items() if not key.startswith("norm")}
    wrong |= {f"extra{i:02}": torch.ones(1) for i in range(12)} | {"head.weight": torch.ones(7, 4)}
    torch.save(wrong, tmp_path / "file.pt")
    with pytest.raises(ModelError) as caught:
        load_weights(Net(), tmp_path / "file.pt")
    message = str(caught.value)
    assert "missing from the file: norm.weight" in message
    assert "12 unknown to the model: extra00, extra01" in message
    assert "extra09, and 2 more" in message
    assert "1 of another shape: head.weight (7, 4) instead of (3, 4)" in message


def test_half_precision_files_fill_float_networks(weights, tmp_path):
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}, tmp_path / "f.safetensors"
    )
    net = Net()
    load_weights(net, tmp_path / "f.safetensors")
    assert same(net.state_dict(), weights)
    assert net.head.weight.dtype == torch.float32


def test_published_densenet_names_are_understood(tmp_path):
    net = models.DenseNet(growth_rate=2, block_config=(2,), num_init_features=4, num_classes=3)
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v
        for key, v in net.state_dict().items()
    }
    assert old.keys() != net.state_dict().keys()
    torch.save(old, tmp_path / "file.pt")
    load_weights(net, tmp_path / "file.pt")


def test_the_hash_of_weights_sees_bytes_names_dtypes_and_shapes_alone():
    torch.manual_seed(0)
    net, other = Net(), Net()
    assert weights_hash(net) != weights_hash(other)
    other.load_state_dict(net.state_dict())
    assert weights_hash(net) == weights_hash(other.eval().requires_grad_(False))
    assert weights_hash(net.double()) != weights_hash(other)
    blank = nn.Conv2d(1, 1, 1).requires_grad_(False)
    blank.load_state_dict({"weight": torch.zeros(1, 1, 1, 1), "bias": torch.zeros(1)})
    assert weights_hash(blank.half()) != weights_hash(blank.bfloat16())


# -------------------------------------------------------------------------------------------------- sources: demo


def ready(model) -> bool:
    parts = all(not part.training for part in model.module.modules())
    return parts and not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize("name", nets.NETS)
def test_demo_models_are_ready(name):
    model = load_model(ModelSpec("demo", name))
    assert ready(model)
    assert (model.categories, model.weights, model.preprocess.size) == (nets.CATEGORIES, "shipped", nets.SIZE)
    assert model.module(torch.zeros(1, 3, *nets.SIZE)).shape == (1, len(nets.CATEGORIES))


def test_demo_models_without_weights_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    first = load_model(ModelSpec("demo", "shapes-cnn", weights="none"))
    torch.manual_seed(5)
    second = load_model(ModelSpec("demo", "shapes-cnn", weights="none"))
    assert torch.equal(torch.rand(1), expected)
    assert weights_hash(first.module) == weights_hash(second.module)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("demo", "shapes-cmn"), "no demo model 'shapes-cmn'; nearest: shapes-cnn"),
        (ModelSpec("torchvison", "resnet18"), "no source 'torchvison'; nearest: torchvision"),
        (ModelSpec("torchvision", "resnet5o"), "no torchvision model 'resnet5o'; nearest: .*resnet50"),
        (ModelSpec("torchvision", "resnet50", "IMAGENET1K_V9"), "no weights of resnet50.*IMAGENET1K_V2"),
        (ModelSpec("torchvision", "resnet18", "nowhere.pt"), "there is no weights file nowhere.pt"),
        (ModelSpec("torchvision", "resnet18", "none", args={"colour": 1}), "cannot be built with .*colour"),
        (ModelSpec("exported", "nowhere.pt2"), "there is no exported program"),
        (ModelSpec("exported", "x.pt2", "w.pt"), "carries its own weights"),
        (ModelSpec("demo", "shapes-cnn", categories="nowhere.txt"), "categories: nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(spec, message):
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_categories_come_from_a_file_or_a_list(tmp_path):
    (tmp_path / "names.txt").write_text("käse\nbrot \n\n", encoding="utf-8")
    assert load_model(ModelSpec("demo", "shapes-cnn", categories=str(tmp_path / "names.txt"))).categories == (
        "käse",
        "brot",
    )
    assert load_model(ModelSpec("demo", "shapes-cnn", categories=("a",))).categories == ("a",)


def test_an_own_preprocessing_wins():
    assert load_model(ModelSpec("demo", "shapes-cnn", preprocess=PLAIN)).preprocess == PLAIN


# ------------------------------------------------------------------------------------------ sources: torchvision, timm


def test_torchvision_without_weights_keeps_the_record_of_the_default_ones():
    model = load_model(ModelSpec("torchvision", "mobilenet_v3_small", weights="none"))
    assert ready(model)
    assert (model.weights, model.categories[281]) == ("none", "tabby")
    assert (model.preprocess.resize, model.preprocess.crop) == (256, 224)
    other = load_model(ModelSpec("torchvision", "mobilenet_v3_small", weights="none"))
    assert weights_hash(model.module) == weights_hash(other.module)


@pytest.mark.parametrize(
    ("name", "labels"), [("squeezenet1_1", 7), ("mobilenet_v3_small", 7), ("squeezenet1_1", 1000)]
)
def test_torchvision_with_an_own_file_has_the_classes_of_the_file(name, labels, tmp_path):
    net = models.get_model(name, weights=None, num_classes=labels)
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    model = load_model(ModelSpec("torchvision", name, weights=str(tmp_path / "own.safetensors")))
    x = torch.randn(2, 3, 64, 64)
    assert_close(model.module(x), net.eval()(x))
    assert len(model.categories) == (1000 if labels == 1000 else 0)
    assert model.weights == str(tmp_path / "own.safetensors")


def test_googlenet_with_an_own_file_reads_its_input_as_the_published_one(tmp_path, recwarn):
    net = models.googlenet(num_classes=4, aux_logits=False, transform_input=True, init_weights=False)
    torch.save({"model": net.state_dict()}, tmp_path / "own.pth")
    model = load_model(ModelSpec("torchvision", "googlenet", weights=str(tmp_path / "own.pth")))
    x = torch.randn(1, 3, 64, 64)
    assert_close(model.module(x), net.eval()(x))
    assert model.module.transform_input
    assert not [warning for warning in recwarn if "init" in str(warning.message)]


def test_torchvision_offline_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(url, *_args, **_kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load_model(ModelSpec("torchvision", "squeezenet1_1"))
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    for hint in (url, str(tmp_path / "checkpoints" / Path(url).name), "weights: PATH", "weights: none"):
        assert hint in str(caught.value)


def test_torchvision_takes_cached_weights_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    offer = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    net = models.squeezenet1_1()
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / Path(offer.url).name)
    model = load_model(ModelSpec("torchvision", "squeezenet1_1"))
    assert weights_hash(model.module) == weights_hash(net)
    assert (model.weights, len(model.categories)) == ("IMAGENET1K_V1", 1000)
    truncated(tmp_path / "checkpoints" / Path(offer.url).name, 2000)
    with pytest.raises(ModelError, match=r"torch's cache.*damaged.*delete the file"):
        load_model(ModelSpec("torchvision", "squeezenet1_1"))


def test_timm_brings_its_own_preprocessing(tmp_path):
    import timm

    model = load_model(ModelSpec("timm", "resnet10t", weights="none"))
    assert ready(model)
    config = timm.data.resolve_data_config({}, model=model.module)
    resize, crop, *_ = timm.data.create_transform(**config).transforms
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert model.preprocess == Preprocess(
        resize.size, tuple(crop.size), resize.interpolation.value, mean, std
    )
    assert model.categories[281] == "tabby"
    net = timm.create_model("resnet10t", num_classes=3)
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    spec = ModelSpec("timm", "resnet10t", str(tmp_path / "own.safetensors"), args={"num_classes": 3})
    assert weights_hash(load_model(spec).module) == weights_hash(net)
    assert load_model(spec).categories == ()
    with pytest.raises(ModelError, match=r"no timm model 'resnet10'; nearest: .*resnet10t"):
        load_model(ModelSpec("timm", "resnet10"))
    with pytest.raises(ModelError, match=r"cannot build resnet10t\.nosuch"):
        load_model(ModelSpec("timm", "resnet10t", "nosuch"))


def test_timm_offline_and_timm_missing_say_what_to_do(monkeypatch):
    import timm

    def unreachable(*_args, **_kwargs):
        raise FileNotFoundError("cannot reach the Hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        ModelError, match=r"not on this machine.*huggingface.co/timm/resnet10t.*weights: PATH"
    ):
        load_model(ModelSpec("timm", "resnet10t"))
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r"pip install 'xcli\[timm\]'"):
        load_model(ModelSpec("timm", "resnet10t"))


# ------------------------------------------------------------------------------------------------- sources: factory

FACTORY = """
import torch
from torch import nn

def net(labels=3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, labels))

def with_preprocess():
    return net(), {"resize": 10, "crop": [8, 6], "mean": [0.5, 0.5, 0.5]}

def misspelt():
    return net(), {"resise": 10}

def fails():
    return missing_name

def leaves():
    raise SystemExit(3)

def text():
    return "net"

def a_class():
    return nn.Conv2d

compiled = nn.Sequential(torch.compile(net()))
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "ours.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("import torch\n\nx = = 3\n")
    (tmp_path / "needs.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "bag_of_nets").mkdir()
    (tmp_path / "bag_of_nets" / "inner.py").write_text("from bag_of_nets import helper\nnet = helper.net\n")
    (tmp_path / "bag_of_nets" / "helper.py").write_text(FACTORY)
    return tmp_path


@pytest.mark.parametrize("name", ["ours.py:net", "bag_of_nets.inner:net", "{here}/ours.py:net"])
def test_factories_are_called_with_their_arguments(name, here):
    name = name.replace("{here}", str(here))
    model = load_model(ModelSpec("factory", name, args={"labels": 5}, preprocess=PLAIN))
    assert ready(model)
    assert model.module(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    again = load_model(ModelSpec("factory", name, args={"labels": 5}, preprocess=PLAIN))
    assert weights_hash(again.module) == weights_hash(model.module)


def test_a_factory_may_know_its_preprocessing_and_take_a_file(here):
    spec = ModelSpec("factory", "ours.py:with_preprocess")
    model = load_model(spec)
    assert (model.preprocess.size, model.preprocess.mean) == ((8, 6), (0.5, 0.5, 0.5))
    torch.save({k: v + 1 for k, v in model.module.state_dict().items()}, here / "own.pt")
    other = load_model(ModelSpec("factory", "ours.py:with_preprocess", weights="own.pt"))
    assert_close(other.module[3].bias, model.module[3].bias + 1)
    assert (model.weights, other.weights) == ("factory", "own.pt")


def test_compiled_modules_are_unwrapped(here):
    model = load_model(ModelSpec("factory", "ours.py:compiled", preprocess=PLAIN))
    assert [type(part).__name__ for part in model.module.children()] == ["Sequential"]
    assert survey(model.module, torch.zeros(1, 3, 8, 8)).default.name == "0.0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ours.py", "write package.module:callable or path"),
        ("nowhere.py:net", "FileNotFoundError: there is no file nowhere.py"),
        ("nowhere_at_all:net", "ModuleNotFoundError.*nowhere_at_all"),
        ("needs.py:net", r"ModuleNotFoundError: No module named 'nowhere_to_be_found' \(.*needs.py:1\)"),
        ("broken.py:net", "SyntaxError: invalid syntax.*broken.py, line 3"),
        ("ours.py:nett", "AttributeError.*nett"),
        ("ours.py:fails", r"NameError: name 'missing_name' is not defined \(.*ours.py:15\)"),
        ("ours.py:leaves", "SystemExit: 3"),
        ("ours.py:text", "returned a str, not an nn.Module"),
        ("ours.py:a_class", "returned the class Conv2d"),
        ("ours.py:misspelt", "preprocessing that cannot be used.*resise"),
        ("ours.py:net", r"set `model.preprocess`.*\(module, \{...\}\)"),
    ],
)
def test_factories_that_fail_say_where_and_how(name, message, here):
    with pytest.raises(ModelError, match=textwrap.dedent(message)):
        load_model(ModelSpec("factory", name))


def test_a_factory_offers_no_named_weights(here):
    with pytest.raises(ModelError, match="offers no weights 'V2'"):
        load_model(ModelSpec("factory", "ours.py:net", weights="V2"))


# ------------------------------------------------------------------------------------------------ sources: exported


def program(net: nn.Module, *, dynamic: bool = True) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    return torch.export.export(net, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes, strict=False)


def test_exported_programs_take_hooks_and_give_gradients(tmp_path):
    net = nn.Sequential(
        Net().stem, nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    torch.export.save(program(net.eval()), tmp_path / "net.pt2")
    model = load_model(ModelSpec("exported", str(tmp_path / "net.pt2"), preprocess=PLAIN))
    assert ready(model)
    x = torch.randn(5, 3, 32, 32)
    assert_close(model.module(x), net(x))
    assert survey(model.module, x[:1]).default.name == "1"


class Scaled(nn.Module):
    """Sizes that are no whole numbers, and names as converters write them."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("block/1", nn.Conv2d(3, 4, 3))
        self.parts = nn.ModuleDict({"cls head": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(self.get_submodule("block/1")(x), scale_factor=1.5)
        return self.parts["cls head"](x.mean((2, 3)) * x.shape[2] ** 0.5)


def scaled(file: Path) -> nn.Module:
    net = Scaled().eval()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    x = torch.randn(2, 3, 12, 10)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=(sizes,), strict=False), file)
    return net


def test_exported_programs_may_scale_sizes_and_name_modules_freely(tmp_path):
    net, x = scaled(tmp_path / "net.pt2"), torch.randn(3, 3, 16, 14)
    model = load_model(ModelSpec("exported", str(tmp_path / "net.pt2"), preprocess=PLAIN))
    assert_close(model.module(x), net(x))


def test_an_exported_program_whose_module_names_are_python_is_refused(payload, tmp_path):
    """PyTorch compiles them; the carriage return ends the function that they stand in."""
    file, bad = tmp_path / "net.pt2", tmp_path / "bad.pt2"
    torch.export.save(program(Net().eval()), file)
    name = f'c")\r[open("{payload}", "w")]\rdef rest():\r    #('
    poisoned = 0
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(bad, "w") as out:
        for member in good.namelist():
            text = good.read(member).decode("latin-1")
            text, found = re.subn(
                r'("nn_module_stack": "[^"]*,)head,', lambda m: f"{m[1]}{json.dumps(name)[1:-1]},", text
            )
            poisoned += found
            out.writestr(member, text.encode("latin-1"))
    assert poisoned
    with pytest.raises(ModelError, match="may hold code: nn_module_stack"):
        SOURCES["exported"](ModelSpec("exported", str(bad)))
    assert not payload.exists()


def test_exported_programs_that_cannot_be_used_are_refused(tmp_path):
    file = tmp_path / "net.pt2"
    torch.export.save(program(Net().eval(), dynamic=False), file)
    with pytest.raises(
        ModelError, match=r"batches of exactly 2; export it with a dynamic batch.*Dim\('batch'\)"
    ):
        SOURCES["exported"](ModelSpec("exported", str(file)))
    torch.export.save(program(Net().train()), file)
    with pytest.raises(ModelError, match="exported in training mode"):
        SOURCES["exported"](ModelSpec("exported", str(file)))
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),)), file)
    with pytest.raises(ModelError, match="does not take one batch of images"):
        SOURCES["exported"](ModelSpec("exported", str(file)))
    with pytest.raises(ModelError, match="damaged or no exported program"):
        SOURCES["exported"](ModelSpec("exported", str(truncated(file, 3000))))


def test_an_exported_program_with_a_pickle_is_refused_and_its_payload_does_not_run(payload, tmp_path):
    file, bad = tmp_path / "net.pt2", tmp_path / "bad.pt2"
    torch.export.save(program(Net().eval()), file)
    torch.save(Payload(), tmp_path / "evil.pt")
    poisoned = 0
    with zipfile.ZipFile(file) as good, zipfile.ZipFile(bad, "w") as out:
        for member in good.namelist():
            evil = member.endswith(".pt")
            poisoned += evil
            out.writestr(member, (tmp_path / "evil.pt").read_bytes() if evil else good.read(member))
    assert poisoned
    with pytest.raises(ModelError, match="holds code"):
        SOURCES["exported"](ModelSpec("exported", str(bad)))
    assert not payload.exists()


# ----------------------------------------------------------------------------------------------------- unwrapping


def test_wrappers_are_taken_off_at_every_depth():
    net = nn.Sequential(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3))), torch.compile(nn.Flatten()))
    net.compile()
    inner = unwrap(nn.DataParallel(torch.compile(net)))
    assert inner is net
    assert [name for name, _ in inner.named_modules()] == ["", "0", "0.0", "1"]
    assert inner._compiled_call_impl is None


# -------------------------------------------------------------------------------------------------------- logits

LOGITS, MAPS = torch.ones(2, 5), torch.ones(2, 5, 4, 4)
Pair = namedtuple("Pair", ["features", "scores"])


@dataclass
class Output:
    logits: Tensor
    loss: None = None


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        (LOGITS, None),
        ({"out": LOGITS, "aux": LOGITS + 1}, None),
        ({"features": MAPS[:, :, 0, 0], "logits": LOGITS}, None),
        ({"features": MAPS, "scores": LOGITS}, None),
        ({"a": LOGITS + 1, "b": LOGITS}, "b"),
        ((LOGITS, LOGITS + 1), None),
        ([MAPS, LOGITS], None),
        ((LOGITS + 1, LOGITS), "1"),
        (Pair(MAPS, LOGITS), None),
        (Pair(LOGITS + 1, LOGITS), "scores"),
        (Output(LOGITS), None),
        (SimpleNamespace(logits=LOGITS, pooled=LOGITS + 1), None),
        (SimpleNamespace(first=LOGITS + 1, second=LOGITS), "second"),
    ],
)
def test_logits_are_found(outputs, name):
    assert find_logits(outputs, name) is LOGITS


@pytest.mark.parametrize(
    ("outputs", "name", "message"),
    [
        (MAPS, None, r"Tensor \(2, 5, 4, 4\)"),
        ({"a": LOGITS, "b": LOGITS + 1}, None, r"a \(2, 5\), b \(2, 5\); set `model.output`"),
        ({"boxes": [1]}, None, r"boxes \(list\)"),
        ({"a": LOGITS}, "b", r"'b' is no tensor.*a \(2, 5\)"),
        (LOGITS, "logits", "'logits' is no tensor"),
        ((), None, "tuple"),
        (None, None, "NoneType"),
        ("text", None, "str"),
    ],
)
def test_outputs_without_logits_are_listed(outputs, name, message):
    with pytest.raises(ModelError, match=message):
        find_logits(outputs, name)
