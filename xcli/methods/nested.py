"""Methods that work around another method: its place in the YAML, a name or a mapping of its own."""

from __future__ import annotations

from typing import Any, TypeVar

from xcli.errors import ConfigError
from xcli.methods.base import Method
from xcli.registry import build

Spec = str | dict[str, Any]
"""``gradcam``, or ``{name: gradcam, relu: false}``, as in a list of methods."""

Kind = TypeVar("Kind", bound=Method)


def inner(spec: Spec, kind: type[Kind], ours: tuple[str, ...] = ()) -> Kind:
    """The method that ``spec`` names, which must be a ``kind``.

    Args:
        ours: options that the outer method sets for both.
    Raises:
        ValueError: there is no such method, it is of another kind, or ``spec`` sets an option of ``ours``; in words,
            so that a validator can pass it on.
    """
    try:
        made = build(spec)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if not isinstance(made, kind):
        raise ValueError(f"{made.name} is no {kind.__name__}; it cannot be used here")
    given = [name for name in ours if isinstance(spec, dict) and name in spec]
    if given:
        raise ValueError(f"{made.name}: set {', '.join(given)} outside, beside it")
    return made
