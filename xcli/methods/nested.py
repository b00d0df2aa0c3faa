"""Methods that work around another method: its place in the YAML, a name or a mapping of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from xcli.layers import Layers
from xcli.methods.base import Method
from xcli.registry import methods, nearest

Spec = str | dict[str, Any]
"""``gradcam``, or ``{name: layercam, eigen_smooth: true}``, as in a list of methods."""

PAPER = "paper"
"""The preset of a method as its paper has it."""


@dataclass(frozen=True)
class Around:
    """Says of an option that it names another method, which the outer one works around.

    .. code-block:: python

        BASE = Around(CAM)
        base: Annotated[Spec, BASE, Field(description=..., json_schema_extra=BASE.schema_default)] = "gradcam"

    The options that every ``kind`` (or ``ours``) has are the outer method's: they cannot be set here, and what a
    preset of the inner method says of them does not count. The option's value is kept written out, with every option
    of the inner method's own; ``method`` builds the inner method from it.

    Attributes:
        kind: what the inner method must be, a class of methods.
        apart: methods of that kind that cannot be used here, each with the reason, behind which the name can stand.
        ours: the class whose options are the outer method's; ``None``: ``kind``.
        defaults: by the inner method's name, options that have another default here than by itself.
    """

    kind: type[Any]
    apart: Mapping[str, str] = field(default_factory=dict)
    ours: type[Any] | None = None
    defaults: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def method(self, spec: Spec) -> Any:
        """The inner method, a ``kind``.

        Raises:
            ValidationError: no such method can be used here, or one of its options is wrong; all problems at once,
                each at its place within ``spec``.
        """
        return self._parsed(spec)[1]

    def written_out(self, spec: Spec) -> Spec:
        """``spec`` with every key that can be set here, as YAML has them."""
        return self._plain(*self._parsed(spec))

    def pinned(self, spec: Spec, layers: Layers, names: Sequence[str] = ()) -> Spec:
        """``spec`` written out, the layers of its method by name (``Method.pinned``)."""
        preset, made = self._parsed(spec)
        return self._plain(preset, made.pinned(layers, names))

    def _plain(self, preset: str, made: Any) -> Spec:
        own = {f.name: getattr(made, f.name) for f in fields(made) if f.name not in self._ours()}
        plain: dict[str, Any] = json.loads(json.dumps({"name": made.name, "preset": preset, **own}))
        return plain

    def choices(self) -> dict[str, type[Method]]:
        """The methods that can be used here, by name."""
        return {
            name: cls
            for name, cls in methods().items()
            if issubclass(cls, self.kind) and name not in self.apart
        }

    def _ours(self) -> tuple[str, ...]:
        return tuple(own.name for own in fields(self.ours or self.kind))

    def _parsed(self, spec: Spec) -> tuple[str, Any]:
        given = {"name": spec} if isinstance(spec, str) else dict(spec)
        cls = self._class(given.pop("name", None), ("name",) if isinstance(spec, dict) else ())
        preset, problems = given.pop("preset", PAPER), []
        if preset not in (presets := [PAPER, *cls.presets]):
            text = f"{cls.name} has the presets {', '.join(presets)}; got {preset!r}"
            problems.append(_problem(("preset",), text))
            preset = PAPER
        for name in [name for name in self._ours() if name in given]:
            del given[name]
            problems.append(
                _problem((name,), f"{cls.name} takes {name} from the method around it; set it there")
            )
        try:
            chosen = json.dumps({**self.defaults.get(cls.name, {}), **cls.presets.get(preset, {}), **given})
            made = TypeAdapter(cls).validate_json(chosen, strict=True)
        except ValidationError as error:
            known = [own.name for own in fields(cls) if own.name not in self._ours()]
            problems += [_worded(cls, known, found) for found in error.errors(include_url=False)]
        if problems:
            raise ValidationError.from_exception_data(cls.name, problems)
        return preset, made

    def _class(self, name: object, place: tuple[str, ...]) -> type[Method]:
        known = self.choices()
        if isinstance(name, str) and name in known:
            return known[name]
        if isinstance(name, str) and name in self.apart:
            text = f"{name} {self.apart[name]}"
        elif name is None:
            place, text = (), f"the key 'name' is missing; there are {', '.join(known)}"
        else:
            near = nearest(name, known) if isinstance(name, str) else ""
            text = f"expected one of {', '.join(known)}; got {name!r}{near}"
        raise ValidationError.from_exception_data(self.kind.__name__, [_problem(place, text)])

    # ---- how pydantic sees the option -------------------------------------------------------------------------

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.written_out, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        known = self.choices()
        return {"anyOf": [{"enum": list(known)}, *(self._entry(cls) for cls in known.values())]}

    def schema_default(self, schema: dict[str, Any]) -> None:
        """Write the default out in the JSON Schema of the option."""
        schema["default"] = self.written_out(schema["default"])

    def _entry(self, cls: type[Method]) -> dict[str, Any]:
        """The JSON Schema of the long form; of a method that is itself around another, no more than its name."""
        whole: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": cls.name}},
            "required": ["name"],
        }
        if is_around(cls):
            return whole
        own = TypeAdapter(cls).json_schema()["properties"]
        whole["properties"]["preset"] = {"enum": [PAPER, *cls.presets], "default": PAPER}
        whole["properties"] |= {key: value for key, value in own.items() if key not in self._ours()}
        return {**whole, "additionalProperties": False}


def is_around(cls: type[Any]) -> bool:
    """Whether methods of this class work around another."""
    known = cls.__pydantic_fields__.values()
    return any(isinstance(mark, Around) for one in known for mark in one.metadata)


def _problem(place: tuple[int | str, ...], text: str) -> InitErrorDetails:
    told = PydanticCustomError("value_error", "{error}", {"error": text})
    return InitErrorDetails(type=told, loc=place, input=None)


def _worded(cls: type[Method], known: Sequence[str], found: Any) -> InitErrorDetails:
    """An error of the inner method's own validation; an unknown option is told with those that are known here."""
    if found["type"] == "unexpected_keyword_argument":
        option = str(found["loc"][-1])
        listed = ", ".join(known) or "none"
        text = (
            f"{cls.name} has no parameter {option!r} here; known here: {listed}{nearest(option, list(known))}"
        )
        return _problem(found["loc"], text)
    context = found.get("ctx", {})
    return InitErrorDetails(type=found["type"], loc=found["loc"], input=found["input"], ctx=context)
