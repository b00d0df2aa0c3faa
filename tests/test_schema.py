"""The JSON Schema covers every section, method, preset and default; what `xai init` writes loads and hides nothing."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from xcli import registry
from xcli.config import DEFAULT, load_config
from xcli.errors import ConfigError
from xcli.schema import DIALECT, init_text, json_schema
from xcli.sections import ImagesSection, OutputSection, RuntimeSection, Sections
from xcli.template import PRESETS
from xcli.yamlfile import read_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
SCHEMA = json_schema()


def matches(schema: dict[str, Any], value: Any) -> bool:
    """Whether ``value`` fits ``schema``: the keywords that are used here, and no others."""
    known = {
        "$ref",
        "$schema",
        "$defs",
        "title",
        "description",
        "default",
        "discriminator",
        "anyOf",
        "oneOf",
        "const",
    }
    known |= {
        "enum",
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "prefixItems",
        "minItems",
        "propertyNames",
        "minProperties",
        "maxProperties",
    }
    known |= {
        "maxItems",
        "minLength",
        "pattern",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
    }
    assert set(schema) <= known, set(schema) - known
    checks = [
        "$ref" not in schema or matches(SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], value),
        "anyOf" not in schema or any(matches(one, value) for one in schema["anyOf"]),
        "oneOf" not in schema or sum(matches(one, value) for one in schema["oneOf"]) == 1,
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        "type" not in schema or of_type(schema["type"], value),
    ]
    if isinstance(value, dict):
        own = schema.get("properties", {})
        checks += [matches(own[key], inner) for key, inner in value.items() if key in own]
        checks += [key in value for key in schema.get("required", [])]
        others = schema.get("additionalProperties", True)
        checks += [others is not False or set(value) <= set(own)]
        if isinstance(others, dict):
            checks += [matches(others, inner) for key, inner in value.items() if key not in own]
        checks += [matches(schema.get("propertyNames", {}), key) for key in value]
        checks += [schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 1e9)]
    if isinstance(value, list):
        checks += [matches(schema.get("items", {}), item) for item in value]
        checks += [schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9)]
    if isinstance(value, (int, float)):
        checks += [schema.get("minimum", value) <= value <= schema.get("maximum", value)]
    return all(checks)


def of_type(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    types = {
        "integer": int,
        "number": (int, float),
        "string": str,
        "array": list,
        "object": dict,
        "null": type(None),
    }
    return isinstance(value, types.get(name, ()))


def test_it_is_json_and_says_what_it_is():
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == DIALECT
    assert SCHEMA["required"] == ["model", "images"]
    assert set(SCHEMA["properties"]) == {*Sections.model_fields, "methods", "metrics"}


def test_every_reference_leads_somewhere():
    text = json.dumps(SCHEMA)
    references = {part.partition('"')[0] for part in text.split('"#/$defs/')[1:]}
    assert references
    assert references == set(SCHEMA["$defs"])


def test_every_method_is_there_with_its_options_and_presets():
    items = SCHEMA["properties"]["methods"]["anyOf"][0]["items"]["anyOf"]
    assert items[0]["enum"] == list(registry.methods())
    for name, cls in registry.methods().items():
        own = SCHEMA["$defs"][f"method-{name}"]
        assert {"$ref": f"#/$defs/method-{name}"} in items
        assert own["properties"]["name"]["const"] == name
        assert own["properties"]["preset"]["enum"] == ["paper", *cls.presets]
        assert own["additionalProperties"] is False
        for field in dataclasses.fields(cls):
            option = own["properties"][field.name]
            assert option["description"], (name, field.name)
            assert option["default"] == json.loads(json.dumps(getattr(cls(), field.name)))


def described(schema: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(key, "description" in inner) for key, inner in schema.get("properties", {}).items()]


def test_every_key_is_described():
    keys = described(SCHEMA) + [pair for part in SCHEMA["$defs"].values() for pair in described(part)]
    assert len(keys) > 50
    assert [key for key, has_one in keys if not has_one] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_short_and_written_out(path):
    assert matches(SCHEMA, read_yaml(path.read_bytes(), path.name).data)
    assert matches(SCHEMA, load_config(path).plain())


@pytest.mark.parametrize(
    "change",
    [
        "extra: 1",
        "model: {source: demo, nme: x}",
        "model: {name: shapes-cnn}",
        "target: {tpo: 1}",
        "target: tabby",
        "methods: [gradcamm]",
        "methods: [{name: gradcam, layr: x}]",
        "methods: [{name: gradcam, preset: nobody}]",
        "methods: []",
        "metrics: [deletoin]",
        "metrics: [{name: deletion, stops: 3}]",
        "gates: road>=0.1",
        "runtime: {batch_size: 0}",
        "runtime: {fold: 1}",
        "images: {}",
        "output: {png: overlay}",
    ],
)
def test_what_the_config_refuses_does_not_fit(change):
    data = read_yaml(DEFAULT, "default").data
    assert matches(SCHEMA, data)
    assert not matches(SCHEMA, {**data, **read_yaml(change, "change").data})


# ---- xai init -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_what_init_writes_loads_and_fits(preset, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(init_text(preset), encoding="utf-8")
    config = load_config(path)
    assert matches(SCHEMA, read_yaml(path.read_bytes(), "mine").data)
    assert config.model.source == {"own-model": "factory"}.get(
        preset, preset if preset in ("torchvision", "timm") else "demo"
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_what_init_writes_holds_every_key_and_only_its_own_values_differ_from_the_defaults(preset, tmp_path):
    data = read_yaml(init_text(preset), "init").data
    for key, section in (("images", ImagesSection), ("runtime", RuntimeSection), ("output", OutputSection)):
        assert list(data[key]) == list(section.model_fields)
    assert data["runtime"] == RuntimeSection().model_dump(mode="json")
    chosen = PRESETS[preset]
    short = {**{key: dict(values) for key, values in chosen.values.items()}, "target": chosen.target}
    path = tmp_path / "short.yaml"
    path.write_text(json.dumps({**short, "methods": list(chosen.methods)}), encoding="utf-8")
    (tmp_path / "long.yaml").write_text(init_text(preset), encoding="utf-8")
    assert load_config(path) == load_config(tmp_path / "long.yaml")


def test_the_quickstart_of_init_is_the_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(init_text("quickstart"), encoding="utf-8")
    assert load_config(tmp_path / "mine.yaml") == load_config(None)


def test_every_line_is_explained_and_short():
    lines = init_text("quickstart").splitlines()
    assert max(map(len, lines)) <= 100
    for above, line in pairwise(lines):
        if line.strip() and not line.lstrip().startswith(("#", "-")):
            assert above.lstrip().startswith("#") or "  # " in line, line


def test_an_unknown_preset_names_the_others():
    with pytest.raises(
        ConfigError, match=r"no preset 'tochvision'; there are quickstart, .*did you mean 'torchvision'"
    ):
        init_text("tochvision")
