"""Text from outside (names of files and classes, reasons of libraries) as terminals, logs and UTF-8 files take it."""

from __future__ import annotations

import re
from pathlib import Path

_HIDDEN = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters: ESC and CSI start commands to a terminal, line breaks forge lines
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction marks, which show text in another order than it has
    "\u2028\u2029"  # line and paragraph separators
    "\ud800-\udfff"  # bytes that are not UTF-8
    "]"
)


def shown(text: Path | str) -> str:
    r"""``text`` with all that would act instead of being seen written out, such as ``\x1b``, ``\n`` and ``\u202e``.

    For text that goes to a person. Data files keep names as they are.
    """
    return _HIDDEN.sub(lambda found: repr(found[0])[1:-1], str(text))
