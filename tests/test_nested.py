"""Methods around other methods: read from YAML, refused in words, written out, and described for editors."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, ClassVar

import pytest
import test_schema
from pydantic import Field, TypeAdapter, ValidationError

from xcli.config import load_config
from xcli.entries import METHODS
from xcli.errors import ConfigError
from xcli.methods.base import Method
from xcli.methods.cam.base import CAM
from xcli.methods.cam.gradient import LayerCAM
from xcli.methods.nested import Around, Spec, is_around
from xcli.registry import build, methods, options
from xcli.schema import entry_schema
from xcli.yamlfile import read_yaml

ANY = Around(Method, {"edges": "has no place here"})


@options
class Wrapper(Method):
    """Around any method."""

    name: ClassVar[str] = "wrapper"

    inner: Annotated[Spec, ANY, Field(description="what", json_schema_extra=ANY.schema_default)] = "gradcam"

    def attribute(self, score, x):
        return ANY.method(self.inner).attribute(score, x)


def text(*entries):
    head = "model: {source: demo, name: shapes-cnn}\nimages: {path: photos}\nmethods:\n"
    return head + "".join(f"  - {entry}\n" for entry in entries)


@pytest.fixture
def loaded(tmp_path):
    def load(content):
        path = tmp_path / "my.yaml"
        path.write_text(content, encoding="utf-8")
        return load_config(path)

    return load


# ---- what is taken ---------------------------------------------------------------------------------------------


def test_a_name_and_a_mapping_are_written_out_and_build_the_method():
    assert Wrapper() == Wrapper(inner={"name": "gradcam"})
    spec = Wrapper(inner={"name": "layercam", "eigen_smooth": True}).inner
    own = {field.name for field in fields(LayerCAM)} - {field.name for field in fields(Method)}
    assert list(spec)[:2] == ["name", "preset"]
    assert set(spec) == {"name", "preset", *own}
    assert spec["eigen_smooth"] is True
    assert json.loads(json.dumps(spec)) == spec
    assert ANY.method(spec) == LayerCAM(eigen_smooth=True)
    assert Wrapper(inner=spec).inner == spec
    narrow = Around(CAM).written_out({"name": "layercam", "eigen_smooth": True})
    assert set(narrow) == {"name", "preset", *own} - {field.name for field in fields(CAM)}


def test_a_preset_sets_what_is_the_inner_methods_own_and_options_win():
    found = Around(CAM).written_out({"name": "gradcam++", "preset": "grad-cam"})
    assert found["eps"] == methods()["gradcam++"].presets["grad-cam"]["eps"]
    assert "fused_at" not in found
    given = Around(CAM).written_out({"name": "gradcam++", "preset": "grad-cam", "eps": 0.5})
    assert given == {**found, "eps": 0.5}
    assert Around(CAM).written_out(given) == given


def test_a_config_is_read_written_and_read_again(loaded):
    config = loaded(
        text(
            "{name: finercam, base: layercam}",
            "{name: refinecam, base: {name: finercam, base: {name: layercam, eigen_smooth: true}, references: 2}}",
            "{name: finercam, as: theirs, preset: grad-cam, base: {name: gradcam++, preset: grad-cam}}",
        )
    )
    assert loaded(config.text()) == config
    assert loaded(config.text()).fingerprint() == config.fingerprint()
    plain = config.plain()["methods"]
    assert plain[0]["base"]["name"] == "layercam"
    assert plain[1]["base"]["base"]["eigen_smooth"] is True
    assert plain[2]["base"]["preset"] == "grad-cam"
    assert [spec.params["base"] for spec in config.methods] == [entry["base"] for entry in plain]
    short = loaded(text("{name: finercam, base: {name: layercam, sign: peak}}", "refinecam"))
    assert short.methods[0].params == config.methods[0].params


# ---- what is refused -------------------------------------------------------------------------------------------


WRONG = [
    ("{base: gradcamm}", "gradcamm", "base: expected one of ", "; got 'gradcamm'; did you mean 'gradcam'?"),
    ("{base: edges}", "edges", "base: expected one of ", "; got 'edges'"),
    ("{base: 3}", "3", "base: expected text or keys with values", "; got 3"),
    ("{base: {sign: peak}}", "{sign", "base: the key 'name' is missing; there are ", "xgradcam"),
    ("{base: {name: [cam]}}", "[cam", "base.name: expected one of ", "; got ['cam']"),
    (
        "{base: {name: layercam, eigen_smoth: true}}",
        "true",
        "base.eigen_smoth: layercam has no parameter 'eigen_smoth' here; known here: eigen_smooth, ",
        "did you mean 'eigen_smooth'?",
    ),
    (
        "{base: {name: layercam, preset: papper}}",
        "papper",
        "base.preset: layercam has the presets paper",
        "; got 'papper'",
    ),
    ("{base: {name: gradcam, sign: up}}", "up", "base.sign: expected one of peak, channels", "; got 'up'"),
    (
        "{base: {name: finercam, base: {name: gradcam, relu: false}}}",
        "false",
        "base.base.relu: gradcam takes relu from the method around it",
        "; set it there",
    ),
    ("{base: {name: finercam, alpha: -1}}", "-1", "base.alpha: must be at least 0", "; got -1"),
]


def test_each_problem_is_told_at_its_place_all_at_once(loaded):
    entries = [f"{{name: refinecam, as: r{i}, {entry[1:]}" for i, (entry, *_) in enumerate(WRONG)]
    content = text(*entries)
    with pytest.raises(ConfigError) as error:
        loaded(content)
    told = [line.partition("my.yaml:")[2] for line in str(error.value).splitlines()]
    assert len(told) == len(WRONG)
    for i, (line, (_, mark, start, end)) in enumerate(zip(told, WRONG, strict=True)):
        column = content.splitlines()[i + 3].index(mark, 30) + 1
        assert line.startswith(f"{i + 4}:{column}: methods[{i}].{start}"), line
        assert line.endswith(end), line


@pytest.mark.parametrize(
    "option", ["layer", "relu", "fusion", "normalise", "fused_at", "aug_smooth", "reduce"]
)
def test_what_the_outer_method_decides_cannot_be_set_inside(option):
    with pytest.raises(
        ConfigError, match=f"finercam: base: gradcam takes {option} from the method around it"
    ):
        build({"name": "finercam", "base": {"name": "gradcam", option: "peak"}})


def test_methods_that_cannot_be_used_there_are_refused_with_the_reason():
    with pytest.raises(
        ConfigError, match="finercam: base: refinecam combines .* outermost: {name: refinecam, base"
    ):
        build({"name": "finercam", "base": "refinecam"})
    with pytest.raises(ConfigError, match="finercam cannot be used around itself"):
        build({"name": "finercam", "base": {"name": "finercam"}})
    with pytest.raises(ConfigError, match="refinecam cannot be used around itself"):
        build({"name": "refinecam", "base": "refinecam"})
    with pytest.raises(ValidationError, match="edges has no place here"):
        Wrapper(inner="edges")
    with pytest.raises(ConfigError, match="eigen' here"):
        build({"name": "refinecam", "base": {"name": "finercam", "base": {"name": "gradcam", "eigen": 1}}})


# ---- the JSON Schema -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "fits"),
    [
        ("layercam", True),
        ("gradcamm", False),
        ("random", False),
        ({"name": "layercam", "eigen_smooth": True}, True),
        ({"name": "layercam", "eigen_smoth": True}, False),
        ({"name": "layercam", "sign": "up"}, False),
        ({"name": "layercam", "relu": False}, False),
        ({"name": "layercam", "preset": "nobody"}, False),
        ({"name": "finercam", "base": "gradcam"}, True),
        ({"eigen_smooth": True}, False),
        (3, False),
    ],
)
def test_the_json_schema_takes_what_the_config_takes(base, fits):
    schema = test_schema.SCHEMA["$defs"]["method-refinecam"]
    assert test_schema.matches(schema, {"name": "refinecam", "base": base}) is fits
    try:
        build({"name": "refinecam", "base": base})
    except ConfigError:
        assert not fits
    else:
        assert fits


def test_the_written_out_config_fits_the_json_schema(loaded):
    entry = "{name: refinecam, base: {name: finercam, base: {name: layercam, eigen_smooth: true}}}"
    config = loaded(text(entry, "finercam"))
    assert test_schema.matches(test_schema.SCHEMA, config.plain())
    assert test_schema.matches(test_schema.SCHEMA, read_yaml(config.text(), "written").data)
    assert not test_schema.matches(
        test_schema.SCHEMA, read_yaml(text("{name: finercam, base: x}"), "wrong").data
    )


def test_options_that_name_methods_are_known_by_their_mark():
    assert is_around(Wrapper)
    assert is_around(methods()["refinecam"])
    assert not is_around(LayerCAM)
    schema = TypeAdapter(Wrapper).json_schema()["properties"]["inner"]
    assert schema["default"] == Wrapper().inner
    assert schema["description"] == "what"
    assert entry_schema(methods()["finercam"], METHODS)["properties"]["base"]["default"]["name"] == "gradcam"


def test_an_option_can_have_another_default_within():
    around = Around(Method, defaults={"saliency": {"absolute": False}})
    assert around.method("saliency").absolute is False
    assert around.method({"name": "saliency", "absolute": True}).absolute is True
    assert around.written_out("saliency")["absolute"] is False
    assert Around(Method).method("saliency").absolute is True
