"""Calling the user's own code: the one place where a config runs some, because its owner names it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xcli.errors import ModelError
from xcli.execution import out_of_memory


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
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise  # a smaller batch may fit
        frames = traceback.extract_tb(error.__traceback__)
        foreign = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "<frozen", __file__)
        own = [frame for frame in frames if not frame.filename.startswith(foreign)]
        at = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
        raise ModelError(f"factory {name} failed: {type(error).__name__}: {error}{at}") from error


class BlackBox(nn.Module):
    """Any function of pictures as a network of which nothing is known: it has no layers and no gradient.

    ``function`` takes a float tensor (N, C, H, W), preprocessed, on the run's device, and returns numbers (N, L): a
    tensor, an array or nested lists. What it raises becomes a ``ModelError`` that names ``name`` and the line.
    """

    def __init__(self, function: Callable[[Tensor], Any], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), user_code(self.name):
            found = torch.as_tensor(self.function(x.detach()), device=x.device)
        if found.ndim != 2 or len(found) != len(x):
            raise ModelError(
                f"{self.name} made {tuple(found.shape)} of {len(x)} pictures; a black box has to return "
                f"({len(x)}, L), a row of L numbers a picture"
            )
        return found.to(x.dtype)
