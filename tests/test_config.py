"""What a config may say, what is refused and how it is said, and what the command line changes."""

from __future__ import annotations

import datetime
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from xcli import decode, registry, targets
from xcli.complaints import InvalidConfigError
from xcli.config import Config, load_config, resolve_targets
from xcli.demo import nets
from xcli.entries import METRICS, known_keys, method_specs
from xcli.errors import ConfigError
from xcli.methods.cam.gradient import GradCAM
from xcli.modelsection import DemoModel
from xcli.overrides import Changes
from xcli.preprocess import Preprocess
from xcli.sections import ImagesSection, TopTarget

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DEMO = "model: {source: demo}\nimages: {path: pictures}\n"


@pytest.fixture
def load(tmp_path):
    def from_text(text: str, **options) -> Config:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, Changes(**options))

    return from_text


@pytest.fixture
def problems(load, tmp_path):
    """The lines of everything that is wrong, without the folder."""

    def of(text: str, **options) -> list[str]:
        with pytest.raises(InvalidConfigError) as error:
            load(text, **options)
        assert str(error.value) == "\n".join(error.value.problems)
        return [line.replace(f"{tmp_path}/", "") for line in error.value.problems]

    return of


# ---- what is shipped ----------------------------------------------------------------------------------------------


def test_there_are_configs():
    assert len(CONFIGS) >= 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_how_it_is_run(path):
    config = load_config(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    commands = tuple(
        f"#     xai {word} {path.relative_to(ROOT).as_posix()}" for word in ("explain", "evaluate")
    )
    assert len(comment) >= 3
    assert any(line.startswith(commands) for line in comment)
    assert config.output.path.startswith("results/")


def test_the_built_in_config_is_the_quickstart():
    assert load_config(None) == load_config(ROOT / "configs" / "quickstart.yaml")


def test_defaults_that_other_rooms_also_know():
    assert ImagesSection.model_fields["max_pixels"].default == decode.MAX_PIXELS
    assert set(nets.NETS) == {"shapes-cnn", "shapes-vit"}
    for name in nets.NETS:
        assert DemoModel(source="demo", name=name).name == name


def test_model_and_images_are_enough(load):
    config = load(DEMO)
    assert [spec.label for spec in config.methods] == ["gradcam"]
    assert config.target == ("predicted",)
    assert config.output.path == "results/my"
    assert config.runtime.seed == 0
    assert config == load(DEMO + "runtime:\noutput:\nmethods:\n")  # an empty section is none


# ---- everything that is wrong, at once --------------------------------------------------------------------------

WRONG = """\
model: {source: torchvision, name: resnet50, wieghts: none}
images:
  path: x
  labels: folders
  max_pixels: 1.5
target: [tabby, {tpo: 3}, {class: []}]
metods: []
methods:
  - {name: gradcamm}
  - {name: gradcam, layr: layer3, relu: 1, preset: capton}
  - {name: layercam, layer: [1, a], as: a/b}
  - {name: layercam, upsampling: cubic}
  - layercam
runtime: {device: gpu, batch_size: 0, seed: "0", fold: 1, fold: true}
output:
  path: results/{time}
  png: overlay
  colormap: viridus
"""

METHODS = ", ".join(registry.methods())
GRADCAM = ", ".join([*(own.name for own in fields(registry.methods()["gradcam"])), "as, preset, score"])
PRESETS = ", ".join(["paper", *registry.methods()["gradcam"].presets])

EXPECTED = f"""\
my.yaml:1:46: model.wieghts: unknown key 'wieghts'; known here: source, name, weights, checkpoints, preprocess, \
categories, output, args; did you mean 'weights'?
my.yaml:4:11: images.labels: expected one of none, folder, manifest; got 'folders'; did you mean 'folder'?
my.yaml:5:15: images.max_pixels: expected a whole number; got 1.5
my.yaml:6:10: target[0]: expected one of predicted, label, {{class: ...}}, {{top: ...}}; got 'tabby'
my.yaml:6:17: target[1].top: the key 'top' is missing
my.yaml:6:18: target[1].tpo: unknown key 'tpo'; known here: top, above; did you mean 'top'?
my.yaml:6:35: target[2].class: must not be empty
my.yaml:7:1: metods: unknown key 'metods'; known here: model, images, target, score, methods, metrics, baselines, \
gates, against, runtime, output; did you mean 'methods'?
my.yaml:9:12: methods[0].name: unknown method; there are {METHODS}; got 'gradcamm'; did you mean 'gradcam'?
my.yaml:10:21: methods[1].layr: gradcam has no parameter 'layr'; known here: {GRADCAM}; did you mean 'layer'?
my.yaml:10:41: methods[1].relu: expected true or false; got 1
my.yaml:10:52: methods[1].preset: gradcam has the presets {PRESETS}; got 'capton'; did you mean 'captum'?
my.yaml:11:30: methods[2].layer[0]: expected text; got 1; quote it: '1'
my.yaml:11:41: methods[2].as: a result's name takes letters, digits, . _ + and -; got 'a/b'
my.yaml:12:34: methods[3].upsampling: expected one of bilinear, bicubic, nearest; got 'cubic'; did you mean 'bicubic'?
my.yaml:13:5: methods[4]: methods[3] is called 'layercam' too; give one another name with `as:`
my.yaml:14:19: runtime.device: expected auto, cpu, cuda, cuda:N or mps; got 'gpu'
my.yaml:14:36: runtime.batch_size: must be at least 1; got 0
my.yaml:14:45: runtime.seed: expected a whole number; got '0'
my.yaml:14:56: runtime.fold: expected true or false; got 1
my.yaml:14:59: runtime.fold: given twice; first at 14:50
my.yaml:16:9: output.path: the only placeholder is {{date}}; got '{{time}}'
my.yaml:17:8: output.png: expected a list; got 'overlay'
my.yaml:18:13: output.colormap: matplotlib has no colour map 'viridus'; for example jet, turbo, viridis, magma, \
inferno, plasma, hot, gray, coolwarm, seismic; did you mean 'viridis'?
--set model.nme: unknown key 'nme'; known here: source, name, weights, checkpoints, preprocess, categories, output, \
args; did you mean 'name'?
--set methods.9.layer: methods has 5 entries, numbered from 0; there is no 9, and the next new one is 5
"""


def test_everything_that_is_wrong_is_said_at_once_in_the_order_of_the_file(problems):
    assert problems(WRONG, overrides=["model.nme=x", "methods.9.layer=x"]) == EXPECTED.splitlines()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("images: {path: x}", ["my.yaml:1:1: model: the key 'model' is missing"]),
        ("model: {source: demo}", ["my.yaml:1:1: images: the key 'images' is missing"]),
        ("model: {name: x}\nimages: {path: x}", ["my.yaml:1:8: model: the key 'source' is missing"]),
        (
            "model: resnet50\nimages: {path: x}",
            ["my.yaml:1:8: model: expected keys with values; got 'resnet50'"],
        ),
        (
            "model: {source: tochvision}\nimages: {path: x}",
            [
                "my.yaml:1:17: model.source: expected one of demo, torchvision, timm, factory, exported; "
                "got 'tochvision'; did you mean 'torchvision'?"
            ],
        ),
        (
            "model: {source: huggingface, name: x}\nimages: {path: x}",
            [
                "my.yaml:1:17: model.source: huggingface is not in this version; "
                "expected one of demo, torchvision, timm, factory, exported"
            ],
        ),
        (
            "model: {source: factory, name: build}\nimages: {path: x}",
            [
                "my.yaml:1:32: model.name: expected 'package.module:callable' or 'path/to/file.py:callable'; "
                "got 'build'"
            ],
        ),
        (
            DEMO + "metrics: [{name: deletion, stops: 3}]",
            [
                "my.yaml:3:28: metrics[0].stops: deletion has no parameter 'stops'; known here: "
                f"{', '.join(known_keys(registry.metrics()['deletion'], METRICS))}; did you mean 'steps'?"
            ],
        ),
        (
            DEMO + "metrics: [pointing-game, mege]",
            [
                "my.yaml:3:11: metrics[0]: pointing-game needs where the objects are; set images.truth",
                "my.yaml:3:26: metrics[1]: mege needs further weights; set model.checkpoints",
            ],
        ),
        (
            DEMO + "metods:",
            [
                "my.yaml:3:1: metods: unknown key 'metods'; known here: model, images, target, score, methods, "
                "metrics, baselines, gates, against, runtime, output; did you mean 'methods'?"
            ],
        ),
        (DEMO + "engine: ray", ["my.yaml:3:1: engine: not in this version"]),
        (DEMO + "runtime: {engine: ray}", ["my.yaml:3:11: runtime.engine: not in this version"]),
        (
            DEMO + "methods: gradcam",
            ["my.yaml:3:10: methods: expected a list of methods; got 'gradcam'; write [gradcam]"],
        ),
        (
            DEMO + "methods: []",
            ["my.yaml:3:10: methods: the list is empty; name at least one method, see `xai methods`"],
        ),
        (
            DEMO + "methods: [{layer: x}, 3]",
            [
                "my.yaml:3:11: methods[0]: the key 'name' is missing; which method? see `xai methods`",
                "my.yaml:3:23: methods[1]: expected a method's name, or name: and its options; got 3",
            ],
        ),
        (
            DEMO + "methods: [random, {name: gradcam, as: Random}]",
            [
                "my.yaml:3:39: methods[1].as: methods[0] is called 'Random' too; give one another name with `as:`"
            ],
        ),
        (
            DEMO + "methods: [gradcam, gradcam]",
            [
                "my.yaml:3:20: methods[1]: methods[0] is called 'gradcam' too; give one another name with `as:`"
            ],
        ),
        (
            DEMO + "methods: [{name: gradcam, score: logits}]",
            [
                "my.yaml:3:34: methods[0].score: expected one of auto, logit, probability, log-probability, contrast; "
                "got 'logits'; did you mean 'logit'?"
            ],
        ),
        (
            "model: {source: demo}\nimages: {path: x, only: wrong, max_pixels: 0}\ntarget: [predicted, label]",
            [
                "my.yaml:2:25: images.only: 'wrong' compares the prediction with the true class; "
                "set images.labels to folder or manifest",
                "my.yaml:2:44: images.max_pixels: must be at least 1; got 0",
                "my.yaml:3:21: target[1]: 'label' is the true class of each image; "
                "set images.labels to folder or manifest",
            ],
        ),
        (
            "model: {source: demo}\nimages: {path: x, only: {probability_bellow: 0.5}}",
            [
                "my.yaml:2:19: images.only.probability_below: the key 'probability_below' is missing",
                "my.yaml:2:26: images.only.probability_bellow: unknown key 'probability_bellow'; "
                "known here: probability_below; did you mean 'probability_below'?",
            ],
        ),
        (
            DEMO + "runtime: {batch_size: atuo, workers: true}",
            [
                "my.yaml:3:23: runtime.batch_size: expected auto or a whole number; got 'atuo'; did you mean 'auto'?",
                "my.yaml:3:38: runtime.workers: expected auto or a whole number; got true",
            ],
        ),
        (
            "model: {source: demo, preprocess: {crop: [1], mean: [1, 2], std: [1, 1, 0], reszie: 3}}\n"
            "images: {path: x}",
            [
                "my.yaml:1:42: model.preprocess.crop: the list is too short; got 1 entry",
                "my.yaml:1:53: model.preprocess.mean: the list is too short; got 2 entries",
                "my.yaml:1:73: model.preprocess.std[2]: must be above 0; got 0",
                "my.yaml:1:77: model.preprocess.reszie: unknown key 'reszie'; known here: resize, crop, mean, std, "
                "interpolation, letterbox, fill; did you mean 'resize'?",
            ],
        ),
        (DEMO + 'x\u202ey: 1\n"a\\nb": 012', None),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_choices(problems, text, lines):
    found = problems(text)
    if lines is None:  # nothing of the file's text breaks the form of one line a problem
        assert all(
            line.startswith("my.yaml:") and "\n" not in line and "\u202e" not in line for line in found
        )
        assert len(found) == 3
    else:
        assert found == lines


def test_strict_about_types(problems):
    text = (
        DEMO
        + "methods: [{name: gradcam, relu: 'true'}]\nruntime: {seed: 1.0, fold: no}\noutput: {alpha: '0.5'}"
    )
    assert problems(text) == [
        "my.yaml:3:33: methods[0].relu: expected true or false; got 'true'",
        "my.yaml:4:17: runtime.seed: expected a whole number; got 1.0",
        "my.yaml:4:28: runtime.fold: expected true or false; got 'no'",
        "my.yaml:5:17: output.alpha: expected a number; got '0.5'",
    ]


def test_errors_of_reading_and_of_checking_come_together(problems):
    found = problems(DEMO + "runtime: {seed: 012}\nscore: logitt\n1: x")
    assert [line.partition(": ")[0] for line in found] == ["my.yaml:3:17", "my.yaml:4:8", "my.yaml:5:1"]
    assert "leading zero" in found[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the config is empty"),
        ("# nothing", "the config is empty"),
        ("- a", "expected keys such as model:"),
        ("x", "got 'x'"),
    ],
)
def test_a_file_without_keys_is_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "quickstart.yaml").write_text(DEMO)
    with pytest.raises(
        ConfigError, match=r"there is no config .*quickstrat\.yaml; .* has quickstart\.yaml; did you mean"
    ):
        load_config(tmp_path / "quickstrat.yaml")
    with pytest.raises(ConfigError, match=r"is a folder; name one of its configs: quickstart\.yaml"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="there is no config"):
        load_config(tmp_path / "no" / "such" / "folder.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_config(tmp_path / "big.yaml")


# ---- what a config becomes --------------------------------------------------------------------------------------


def test_a_preset_sets_defaults_and_explicit_keys_win(load):
    entries = "methods: [gradcam, "
    entries += "{name: gradcam, preset: captum, as: a},"
    entries += " {name: gradcam, preset: captum, as: b, relu: true}]"
    paper, captum, both = load(DEMO + entries).methods
    assert (paper.preset, paper.method) == ("paper", GradCAM())
    assert (captum.preset, captum.method) == ("captum", GradCAM(relu=False))
    assert (both.preset, both.method) == ("captum", GradCAM(relu=True))
    assert both.params["relu"] is True
    assert (both.name, both.label) == ("gradcam", "b")


def test_every_preset_of_every_method_can_be_built():
    entries = [
        {"name": name, "preset": preset} for name, cls in registry.methods().items() for preset in cls.presets
    ]
    specs, issues = method_specs([{**entry, "as": f"r{i}"} for i, entry in enumerate(entries)])
    assert not issues
    assert len(specs) == len(entries) > 0


def test_the_score_of_an_entry_wins_over_that_of_the_config(load):
    text = (
        DEMO
        + "score: contrast\nmethods: [gradcam, {name: layercam, score: probability}, {name: hirescam, score: auto}]"
    )
    assert [(spec.score, spec.scale) for spec in load(text).methods] == [
        ("contrast", "contrast"),
        ("probability", "probability"),
        ("auto", "logit"),
    ]


@pytest.mark.parametrize("weights", ["none", "null", "~"])
def test_no_weights_has_three_spellings(load, weights):
    spec = load(
        f"model: {{source: torchvision, name: resnet18, weights: {weights}}}\nimages: {{path: x}}"
    ).model_spec()
    assert (spec.source, spec.name, spec.weights) == ("torchvision", "resnet18", "none")


def test_the_model_section_as_a_spec(load):
    spec = load(
        "model: {source: factory, name: 'a.b:c.d', args: {n: [1, {x: null}]}, output: logits,\n"
        "  categories: [no, 'yes'],\n"
        "  preprocess: {resize: 32, crop: [24, 28], mean: 0.5, std: [1, 2, 3], fill: [1, 2, 3]}}\nimages: {path: x}"
    ).model_spec()
    assert spec.args == {"n": [1, {"x": None}]}
    assert spec.categories == ("no", "yes")
    assert spec.output == "logits"
    assert spec.preprocess == Preprocess(32, (24, 28), "bilinear", (0.5,), (1.0, 2.0, 3.0), fill=(1, 2, 3))
    exported = load("model: {source: exported, path: net.pt2}\nimages: {path: x}").model_spec()
    assert (exported.name, exported.weights) == ("net.pt2", "DEFAULT")


def test_images_and_output(load):
    config = load(
        "model: {source: demo}\nimages: {path: ['-', b], size: [32, 40], background: [1, 2, 3]}\n"
        "output: {path: 'r/{date}', png: []}\nruntime: {device: 'cuda:1'}"
    )
    assert config.images.paths == ("-", "b")
    assert config.images.size == (32, 40)
    assert config.images.background_rgb == (1, 2, 3)
    assert config.output.png == ()
    assert config.output.folder(datetime.date(2026, 1, 2)) == "r/2026-01-02"


def test_labels_are_needed_by_only_and_by_the_label_target(load):
    labelled = "model: {source: demo}\nimages: {path: x, labels: folder}\n"
    assert not load(labelled).needs_labels
    assert load(labelled + "target: label").needs_labels
    assert load(labelled.replace("folder", "folder, only: wrong")).needs_labels


# ---- text and fingerprint ---------------------------------------------------------------------------------------

ODD = """\
model: {source: factory, name: 'm.py:f', args: {a: 1e-7, b: 'no', c: "12:30", d: [], e: {f: "l\\nm"}},
  categories: ["on", "1", é]}
images: {path: ["a b", "#c"], labels: manifest, only: {probability_below: 0.25}, size: [3, 4]}
target: [label, {class: [0, "1"]}, {top: 2, above: 1e-3}]
methods: [{name: gradcam, preset: captum, layer: [a, b*], as: "1e5"}, {name: random, score: contrast}]
output: {heatmap: {dtype: float16}, colormap: viridis_r}
"""


@pytest.mark.parametrize("text", [DEMO, ODD, *(path.read_text() for path in CONFIGS)])
def test_the_written_config_loads_back_equal(load, text):
    config = load(text)
    again = load(config.text())
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert again.text() == config.text()


@pytest.mark.parametrize("change", ["runtime.workers=3", "runtime.device=cpu", "output.path=elsewhere"])
def test_the_fingerprint_leaves_out_what_changes_no_number(load, change):
    changed = load(ODD, overrides=[change])
    assert changed != load(ODD)
    assert changed.fingerprint() == load(ODD).fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        "runtime.seed=1",
        "methods.0.relu=true",
        "methods.1.as=x",
        "target=predicted",
        "images.draft=false",
        "output.alpha=0.4",
    ],
)
def test_the_fingerprint_tells_everything_else_apart(load, change):
    assert load(ODD, overrides=[change]).fingerprint() != load(ODD).fingerprint()


# ---- the command line -------------------------------------------------------------------------------------------


def test_overrides_reach_into_lists_and_make_what_is_missing(load):
    config = load(
        DEMO + "methods: [gradcam, {name: layercam, as: deep}]",
        overrides=[
            "methods.0.layer=layer3",
            "methods[1].layer=[a, b]",
            "methods.2=random",
            "runtime.seed=7",
            "output.heatmap.dtype=float16",
            "target={top: 2}",
            "images.path=x=y",
        ],
    )
    assert [spec.params.get("layer") for spec in config.methods] == ["layer3", ("a", "b"), None]
    assert (config.runtime.seed, config.output.heatmap.dtype) == (7, "float16")
    assert config.target == (TopTarget(top=2, above=0.0),)
    assert config.images.path == "x=y"


def test_a_default_method_can_be_set_too(load):
    assert load(DEMO, overrides=["methods.0.layer=x"]).methods[0].method == GradCAM(layer="x")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("runtime.seed", "--set runtime.seed: expected key=value, such as runtime.seed=1 or methods.0.layer=layer3"),
        ("a..b=1", "--set a..b=1: expected key=value, such as runtime.seed=1 or methods.0.layer=layer3"),
        ("runtime.seed=x", "--set runtime.seed: expected a whole number; got 'x'"),
        ("runtime={sed: 1}",
         "--set runtime: runtime.sed: unknown key 'sed'; known here: device, batch_size, precision, "
         "workers, seed, fold, channels_last; did you mean 'seed'?"),
        ("runtime.seed=012", "--set runtime.seed: a number with a leading zero has two readings; write 12 or '012'"),
        ("methods.x=1", "--set methods.x: methods has 1 entries, numbered from 0; 'x' is no number"),
        ("score.x=1", "--set score.x: score is 'auto', which has no keys; set it whole"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(problems, override, line):
    assert problems(DEMO + "score: auto", overrides=[override]) == [line]


def test_methods_keeps_what_the_config_says_about_them(load):
    text = (
        DEMO
        + "methods: [{name: gradcam, as: deep, layer: x}, {name: gradcam, as: shallow, layer: y},"
        + " {name: layercam, relu: false}]"
    )
    chosen = load(text, methods="layercam, random,shallow").methods
    assert [spec.label for spec in chosen] == ["layercam", "random", "shallow"]
    assert chosen[0].params["relu"] is False
    assert chosen[2].params["layer"] == "y"
    assert [spec.label for spec in load(text, methods="gradcam").methods] == ["deep", "shallow"]


def test_errors_of_chosen_methods_keep_their_place(problems):
    text = DEMO + "methods: [random, {name: gradcam, layr: x}, {name: layercam, rleu: 1}]"
    found = problems(text, methods="gradcamm,gradcam", overrides=["methods.1.relu=2"])
    assert [line.partition(": ")[0] for line in found] == [
        "my.yaml:3:35",
        "--set methods.1.relu",
        "--methods",
    ]
    assert "methods[1].layr" in found[0]
    assert "did you mean 'gradcam'?" in found[2]
    assert problems(DEMO, methods=" , ") == [
        "--methods: expected names separated by commas; see `xai methods`"
    ]


def test_input_output_and_device_replace_the_config(load, problems):
    config = load(DEMO, inputs=["a"], output="out/{date}", device="cpu")
    assert (config.images.path, config.output.path, config.runtime.device) == ("a", "out/{date}", "cpu")
    assert load(DEMO, inputs=["a", "b"]).images.path == ("a", "b")
    assert problems(DEMO, inputs=[""], output="{x}", device="gpu") == [
        "--input: must not be empty",
        "--output: the only placeholder is {date}; got '{x}'",
        "--device: expected auto, cpu, cuda, cuda:N or mps; got 'gpu'",
    ]
    assert problems(DEMO, inputs=["a\udcff"]) == [
        "--input: 'a\\udcff' is not UTF-8, so a config cannot hold it"
    ]


# ---- targets ----------------------------------------------------------------------------------------------------

ANIMALS = ("cat", "dog", "crane", "crane")


def test_targets_become_indices(load):
    config = load(
        "model: {source: demo}\nimages: {path: x, labels: folder}\n"
        "target: [predicted, label, {class: [dog, 0, 1]}, {top: 2}]"
    )
    assert resolve_targets(config, ANIMALS) == (
        targets.Predicted(),
        targets.Label(),
        targets.Classes((1, 0)),
        targets.Top(2, 0.0),
    )
    assert resolve_targets(load(DEMO + "target: {class: 7}"), ()) == (targets.Classes((7,)),)


def test_classes_that_do_not_exist_are_named_with_their_places(load, tmp_path):
    config = load(DEMO + "target: [{class: [dgo, 4]}, {class: crane}]")
    with pytest.raises(InvalidConfigError) as error:
        resolve_targets(config, ANIMALS)
    assert [line.replace(f"{tmp_path}/", "") for line in error.value.problems] == [
        "my.yaml:3:19: target[0].class[0]: the model has no class 'dgo'; the classes are cat, dog, crane, crane; "
        "did you mean 'dog'?",
        "my.yaml:3:24: target[0].class[1]: there is no class 4; the model has 4 classes, numbered from 0",
        "my.yaml:3:37: target[1].class: 2 classes are called 'crane'; give the index of one: 2, 3",
    ]


@pytest.mark.parametrize(
    ("target", "labels", "message"),
    [
        (
            "{class: dog}",
            None,
            r"my\.yaml:3:17: target\.class: the model's class names are unknown; give an index",
        ),
        ("{class: -1}", None, r"my\.yaml:3:17: target\.class: there is no class -1; indices start at 0"),
        ("{class: 3}", 3, r"my\.yaml:3:17: target\.class: there is no class 3; the model has 3 classes"),
    ],
)
def test_a_class_of_a_model_without_names(load, target, labels, message):
    with pytest.raises(ConfigError, match=message):
        resolve_targets(load(DEMO + f"target: {target}"), (), labels)


def test_an_error_that_shows_later_has_its_place(load):
    config = load(DEMO + "methods: [{name: gradcam, layer: layre4}]")
    assert str(config.error(("methods", 0, "layer"), "no such layer")).endswith(
        "my.yaml:3:34: methods[0].layer: no such layer"
    )


def test_importing_the_config_does_not_import_torch():
    code = "import sys, xcli.config, xcli.schema; sys.exit(any(m in sys.modules for m in ('torch', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
