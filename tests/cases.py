"""The table of what a run survives, from the rows of its tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FAILED = "FAILED"


def table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of (file, what, happens, exit) by file and what, in Markdown; those of one case are one, a failure stays."""
    merged: dict[tuple[str, str], tuple[str, str]] = {}
    for file, what, happens, code in sorted(rows):
        place = next((place for place in merged if place[1] == what), (file, what))
        if merged.get(place, ("", ""))[0] != FAILED:
            merged[place] = (happens, code)
    cells = [f"| {what} | {happens} | {code} |" for (_, what), (happens, code) in merged.items()]
    return ["| what | what happens | exit |", "|---|---|---|", *cells]
