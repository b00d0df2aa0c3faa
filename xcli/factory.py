"""Calling the user's own code: the one place where a config runs some, because its owner names it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xcli.errors import ModelError


def call(name: str, args: Mapping[str, Any]) -> Any:
    """What the callable ``name`` returns for ``args``.

    Args:
        name: "package.module:callable" or "path/to/file.py:callable"; a module instance is taken as it is.
    Raises:
        ModelError: ``name`` is written in another way, or the user's code fails; says where and how.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ModelError(f"factory {name!r}: write package.module:callable or path/to/file.py:callable")
    with user_code(name), seeded():
        target: Any = _imported(place)
        for part in attribute.split("."):
            target = getattr(target, part)
    with user_code(name), seeded():  # anew: whether the import drew numbers does not matter
        return target if isinstance(target, nn.Module) else target(**args)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time inside the block; the generator goes on after it as if nothing happened."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def _imported(place: str) -> Any:
    """The module of a file or of a dotted name; the current folder, or the file's, can be imported from."""
    if not place.endswith(".py"):
        _importable(Path.cwd())
        return importlib.import_module(place)
    file = Path(place).resolve()
    _importable(file.parent)
    found = importlib.util.spec_from_file_location(f"xcli_factory_{file.stem}", file)
    if found is None or found.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {place}")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses and pickle look their module up
    found.loader.exec_module(module)
    return module


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that it hides nothing; kept, as models import late


@contextlib.contextmanager
def user_code(name: str) -> Iterator[None]:
    """Say which line of the user's code failed, and how."""
    try:
        yield
    except (Exception, SystemExit) as error:  # what the user's own code raises can be anything
        frames = traceback.extract_tb(error.__traceback__)
        foreign = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "<frozen", __file__)
        own = [frame for frame in frames if not frame.filename.startswith(foreign)]
        at = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        raise ModelError(f"factory {name} failed: {type(error).__name__}: {error}{at}") from error
