"""Explain what vision models look at, over whole folders of images, unattended.

    >>> import torch, xcli
    >>> from xcli.demo import nets
    >>> model = nets.load("shapes-cnn")
    >>> images = torch.rand(2, 3, 128, 128)
    >>> xcli.explain(model, images, "gradcam").map.shape
    torch.Size([2, 128, 128])

``xcli.open_run(path)`` reads what the command ``xai explain`` wrote. Nothing heavy is imported before a
public name is used, so that ``xai --help`` answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xcli.api import evaluate as evaluate
    from xcli.api import explain as explain
    from xcli.results import open_run as open_run

__version__ = "0.1.0"

__all__ = ["__version__", "evaluate", "explain", "open_run"]

_HOMES = {"evaluate": "xcli.api", "explain": "xcli.api", "open_run": "xcli.results"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'xcli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
