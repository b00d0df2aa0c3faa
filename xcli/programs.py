"""Exported programs (.pt2) looked through before PyTorch loads them: what in one would run code.

PyTorch evaluates the sizes in a program as Python, looks its operators up by any name below ``torch`` and unpickles
some members, and it writes names into Python that it compiles. Here sizes must be arithmetic, operators must be
operators, names must be names.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcli.errors import ModelError
from xcli.visible import shown
from xcli.weights import DAMAGED, first_line, refuse_bomb

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|quantized|quantized_decomposed|higher_order)\.(?!from_file\b)\w+(\.\w+)?"
    r"|torch\._?sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
_NAME = re.compile(r"[\w.-]*")
_MODULES = {"fqn", "parameter_name", "buffer_name", "tensor_constant_name"}
"""Where names of modules and of their tensors stand: any text, as converters write 'block/1' or 'cls head'."""
_QUOTED = re.compile(r"'(\w*|[\d.e+-]*)'")
_ARITHMETIC = re.compile(r"[\w\s.,=()+*/<>&|~%-]*")
_CALL = re.compile(r"(\w+)\s*\(")
# fmt: off
_CALLED = {
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs",
    "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "ModularIndexing", "PythonMod",
    "Where", "FloatPow", "PowByNatural", "ToFloat", "TruncToInt", "RoundToInt", "CeilToInt",
    "FloorToInt", "TruncToFloat", "RoundDecimal",
    "Identity", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality",
    "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Piecewise",
    "floor", "ceiling",
} | {
    f"OpaqueUnaryFn_{name}" for name in (
        "sqrt", "cos", "cosh", "sin", "sinh", "tan", "tanh", "asin", "acos", "atan", "exp", "log", "asinh", "log2",
    )
}
# fmt: on
"""Functions of sizes."""


def load_program(name: str) -> nn.Module:
    """The modules of an exported program.

    Raises:
        ModelError: it holds code, is damaged, or cannot be explained: a fixed batch size, training mode.
    """
    refuse_code(name)
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        program = torch.export.load(name)
    except (RuntimeError, OSError, ValueError, KeyError, AssertionError, zipfile.BadZipFile) as error:
        raise ModelError(
            f"{shown(name)} cannot be read as an exported program: {first_line(error)}"
        ) from error
    finally:
        logger.setLevel(level)
    _check_program(program, name)
    try:
        module: nn.Module = torch.export.unflatten(program)
    except RuntimeError as error:  # what PyTorch 2.6 exports by default has modules without a place
        raise ModelError(
            f"the modules of {shown(name)} cannot be found; export it with strict=False"
        ) from error
    return module


def _check_program(program: torch.export.ExportedProgram, name: str) -> None:
    """Refuse a fixed batch size and layers that were exported in training mode."""
    inputs = [
        n
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in program.graph_signature.user_inputs
    ]
    shapes = [n.meta["val"].shape for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        raise ModelError(
            f"{name} does not take one batch of images, but {[tuple(map(str, s)) for s in shapes]}"
        )
    if isinstance(shapes[0][0], int):
        raise ModelError(
            f"{name} was exported for batches of exactly {shapes[0][0]}; export it with a dynamic batch: "
            "torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
        )
    training = {"dropout.default": 2, "batch_norm.default": 5}
    for node in program.graph.nodes:
        position = training.get(str(node.target).removeprefix("aten."))
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise ModelError(
                f"{name} was exported in training mode; call model.eval() before torch.export.export"
            )


def refuse_code(path: str | Path) -> None:
    """Raise where an exported program holds what would run code as it is loaded.

    Raises:
        ModelError: it does, or the file is missing, or no archive.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"there is no exported program {shown(file)}")
    try:
        refuse_bomb(file)
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                for pickled in _pickles(archive, member):
                    torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True)
                if member.endswith(".json") and not member.endswith("_config.json"):
                    _refuse_strange(json.loads(archive.read(member)), file)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{shown(file)} holds code: {member} is a pickled object, not only tensors"
        ) from error
    except (zipfile.BadZipFile, RuntimeError, *DAMAGED) as error:
        raise ModelError(f"{shown(file)} is damaged or no exported program: {first_line(error)}") from error


def _pickles(archive: zipfile.ZipFile, member: str) -> Iterator[bytes]:
    """What PyTorch unpickles of one member of an exported program."""
    folder, _, name = member.rpartition("/")
    if name.startswith(("custom_obj", "opaque_obj")):
        raise pickle.UnpicklingError(name)
    if name.endswith("_config.json"):
        entries = json.loads(archive.read(member)).get("config", {})
        for entry in entries.values():
            if entry.get("use_pickle"):
                yield archive.read(f"{folder}/{entry['path_name']}")
    elif name.endswith(".pt") and (content := archive.read(member)):
        yield content


def _refuse_strange(program: Any, file: Path) -> None:
    """Raise for a text in a program that is not what its place asks for."""
    waiting = [("", program)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            # of what a node was made from, the names of its modules become Python, and nothing else
            waiting += [(k, v) for k, v in value.items() if key != "metadata" or k == "nn_module_stack"]
        elif isinstance(value, list):
            waiting += [(key, entry) for entry in value]
        elif isinstance(value, str) and not is_expected(key, value):
            raise ModelError(
                f"{shown(file)} is refused, as it may hold code: {key} {shown(value)[:100]!r} is none of the "
                "operators, sizes and names known to run nothing as they are loaded; export it without, or give "
                "the model as Python (`source: factory`)"
            )


def is_expected(key: str, text: str) -> bool:
    """Whether the text of a key is an operator, a size, a name, as the key says."""
    match key:
        case "target" | "as_operator":
            return _OPERATOR.fullmatch(text) is not None
        case "expr_str":
            return is_arithmetic(text)
        case "in_spec" | "out_spec":
            return "__enum__" not in text  # imports a module
        case "nn_module_stack":  # its names are written between double quotes
            return text.isprintable() and not set(text) & set('"\\')
        case _ if key in _MODULES:
            return text.isprintable() and not set(text) & set("\"'`()\\")
        case _ if key == "name" or key.endswith("_name") or key.endswith("_names"):
            return _NAME.fullmatch(text) is not None
    return True


def is_arithmetic(text: str) -> bool:
    """Whether a text is a formula of known functions, and no other Python."""
    bare = _QUOTED.sub("", text)
    known = all(found in _CALLED for found in _CALL.findall(bare))
    plain = not re.search(r"\)\s*\(|\.\s*[A-Za-z_]", bare) and "__" not in text
    return known and plain and _ARITHMETIC.fullmatch(bare) is not None
