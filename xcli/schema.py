"""What a config may hold, for editors (JSON Schema), made from the same classes that check it.

``init_text``, a commented config to start from, is made from them too.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from xcli.entries import METHODS, METRICS, PAPER, SCORES, Kind
from xcli.sections import Sections
from xcli.template import init_text as init_text

Schema = dict[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> Schema:
    """The JSON Schema (2020-12) of a config: sections, and every method with its parameters, bounds and defaults."""
    schema = Sections.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    _without_titles(schema)
    shared: Schema = schema["$defs"]
    for kind, doc in (
        (
            METHODS,
            "how it is explained: names, or {name: ..., as: ..., preset: ..., score: ..., and its options}",
        ),
        (METRICS, "how the maps are scored: names, or {name: ..., as: ..., preset: ..., and its options}"),
    ):
        for name, cls in kind.table().items():
            own = entry_schema(cls, kind)
            shared.update(own.pop("$defs", {}))
            shared[f"{kind.word}-{name}"] = own
        schema["properties"][kind.key] = _listed(kind, doc)
    schema["properties"]["methods"].update(minItems=1, default=["gradcam"])
    _nullable(schema)
    return {"$schema": DIALECT, "title": "Config of xai explain", **schema}


def _listed(kind: Kind, description: str) -> Schema:
    """The schema of a whole list: names, or entries in the long form."""
    names = list(kind.table())
    short: Schema = {"enum": names, "description": f"a {kind.word} with its defaults"}
    return {
        "description": description,
        "type": "array",
        "items": {"anyOf": [short, *({"$ref": f"#/$defs/{kind.word}-{name}"} for name in names)]},
        "default": [],
    }


def entry_schema(cls: type[Any], kind: Kind) -> Schema:
    """The JSON Schema of one entry of ``methods`` or ``metrics`` in its long form."""
    own = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
    _without_titles(own)
    claim = " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
    head: Schema = {
        "name": {"const": cls.name, "description": claim},
        "as": {
            "type": "string",
            "pattern": f"^{kind.label}$",
            "description": f"name of the result, where it is not the {kind.word}'s",
        },
        "preset": {
            "enum": [PAPER, *cls.presets],
            "default": PAPER,
            "description": f"whose definition of the {kind.word}; options that are given win over it",
        },
    }
    if "score" in kind.common:
        head["score"] = {
            "enum": list(SCORES),
            "default": "auto",
            "description": f"the number explained; auto: {cls.scale}",
        }
    return {
        "type": "object",
        "description": claim,
        "properties": {**head, **own.get("properties", {})},
        "required": ["name"],
        "additionalProperties": False,
        **({"$defs": own["$defs"]} if "$defs" in own else {}),
    }


def _nullable(schema: Schema) -> None:
    """An empty top-level section of a YAML is null and counts as left out."""
    optional = [key for key in schema["properties"] if key not in schema["required"]]
    for key in optional:
        whole = schema["properties"][key]
        kept = {name: whole.pop(name) for name in ("description", "default") if name in whole}
        schema["properties"][key] = {**kept, "anyOf": [whole, {"type": "null"}]}


def _without_titles(schema: Any) -> None:
    """Drop pydantic's titles, which repeat the keys; a property that is called title stays."""
    if isinstance(schema, list):
        for part in schema:
            _without_titles(part)
    elif isinstance(schema, dict):
        if isinstance(schema.get("title"), str):
            del schema["title"]
        for part in schema.values():
            _without_titles(part)
