"""The parts of one evaluation, in ``evaluation/`` of the run: begun, gone on with, joined into results.h5, removed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xcli.config import Config
from xcli.durable import failpoint, locked, make_folder, refuse_links, shown, write_file, writing
from xcli.errors import ConfigError, OutputLocked, OutputUnwritable
from xcli.merge import EVALUATION_LOCK, LOCKS, RECORD_LOCK, build, current_layout
from xcli.parts import Part, part_bytes
from xcli.plan import Plan
from xcli.provenance import makers
from xcli.record import RESULTS, Saved
from xcli.recordcheck import is_whole
from xcli.results import open_run
from xcli.scoring import Pair, identity
from xcli.summaries import add_summaries
from xcli.survey import Piece, is_score, parts_of

LOG = logging.getLogger(__name__)
FOLDER, STATE = "evaluation", "evaluation.json"
UNUSABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""None was begun, or what is left of it cannot be used."""


@dataclass(frozen=True)
class Work:
    """The parts of one evaluation, in ``root/evaluation``."""

    root: Path
    folder: Path
    saved: Saved
    config: Config
    length: int  # images a part

    @classmethod
    def open(cls, root: Path, saved: Saved, plan: Plan) -> Work:
        """Go on with the evaluation that was begun, where it is this one; else begin it."""
        wanted = [[label, spec.label, identity(plan.config, spec)] for label, spec in plan.scoring.pairs]
        told = json.dumps([wanted, saved.record.fingerprint, saved.digest, makers(plan.device)])
        name = hashlib.sha256(told.encode()).hexdigest()[:16]
        refuse_links(root, (FOLDER, f"{FOLDER}/{name}"))
        folder = root / FOLDER / name
        try:
            length = state_of(folder)["length"]
            if not is_whole(length, 1):
                raise ValueError("no part is that long")
        except UNUSABLE:
            length = plan.part_length
            if folder.is_dir():
                discard(folder)
            for older in begun(root, wanted):
                LOG.warning("scores that other versions or another device began are made again")
                discard(older)
            make_folder(folder)
            state = json.dumps({"pairs": wanted, "length": length}).encode()
            write_file(folder / STATE, state, folder / f"{STATE}.tmp", "evaluation")
        return cls(root, folder, saved, plan.config, length)

    def pieces(self) -> list[Piece]:
        """The parts, done or not."""
        count = len(self.saved.inputs)
        starts = range(0, count, self.length)
        return [
            Piece(self.folder / f"{n:05d}.h5", slice(start, min(start + self.length, count)), is_score)
            for n, start in enumerate(starts)
        ]

    def commit(self, piece: Piece, part: Part) -> None:
        """Make a part final. Raises ``OutputUnwritable``; earlier parts are as before."""
        paths = [item.path for item in self.saved.inputs[piece.images]]
        data = part_bytes(part, paths, self.saved.record.fingerprint, "gzip")
        write_file(piece.path, data, piece.path.with_suffix(".tmp"), "scores")

    def join(self, done: Sequence[Pair]) -> None:
        """Write results.h5 anew with the scores of ``done`` in it, and remove the parts.

        Scores of the same name that were made with other options go: one name means one metric in a run.
        """
        replaced = {f"{label}/{spec.label}" for label, spec in done} | self.outdated(done)

        def stays(key: str) -> bool:
            path = key.partition("/")[2]
            return not is_score(key) or not any(f"{path}.".startswith(f"{one}.") for one in replaced)

        with locked(self.root / LOCKS / RECORD_LOCK, wait=None):
            layout = current_layout(self.root, self.saved)
            if layout is None:
                raise ConfigError(f"the run in {shown(self.root)} has changed meanwhile; evaluate it again")
            whole = slice(0, len(self.saved.inputs))
            if layout == "merged":
                layers = [[Piece(self.root / RESULTS, whole, stays)]]
            else:
                maps = [piece._replace(keeps=is_no_score) for piece in parts_of(self.root, self.saved)]
                layers = [maps, [Piece(self.root / RESULTS, whole, lambda key: is_score(key) and stays(key))]]
            build(self.root, self.saved, [*layers, self.pieces()], layout, add_summaries)
        discard(self.folder)

    def outdated(self, done: Sequence[Pair]) -> set[str]:
        """The scores in results.h5, ``label/metric``, that are called like new ones and are made in another way."""
        new = {spec.label: identity(self.config, spec) for _, spec in done}
        with open_run(self.root) as run:
            return {
                f"{label}/{metric}"
                for label in run.scored
                for metric, attrs in run.measured(label).items()
                if metric in new and attrs.get("identity") != new[metric]
            }


def is_no_score(key: str) -> bool:
    """Whether the dataset ``key`` is there before any evaluation."""
    return not is_score(key)


def discard(folder: Path) -> None:
    """Remove the parts of an evaluation that is through, what it is last, so that a kill leaves no orphans."""
    with writing(folder):
        parts = sorted(path for path in folder.iterdir() if path.name != STATE)
        for path in (*parts, folder / STATE):
            failpoint("discard-evaluation")
            path.unlink(missing_ok=True)
        failpoint("discard-folder")
        folder.rmdir()
        with suppress(OSError):  # others are unfinished
            folder.parent.rmdir()


def begun(root: Path, wanted: object) -> list[Path]:
    """Where scores of the pairs ``wanted`` were begun."""
    return [folder for folder in folders(root) if pairs_of(folder) == wanted]


def folders(root: Path) -> list[Path]:
    """Those of evaluations; what is in one that is a link is none of ours, and would be removed."""
    inside = () if (root / FOLDER).is_symlink() else (root / FOLDER).glob("*/")
    return sorted(folder for folder in inside if not folder.is_symlink())


def pairs_of(folder: Path) -> list[list[str]] | None:
    """The pairs whose scores lie in ``folder``; ``None`` where that cannot be told."""
    try:
        found = state_of(folder)["pairs"]
        return [[str(text) for text in (label, metric, made)] for label, metric, made in found]
    except UNUSABLE:
        return None


def state_of(folder: Path) -> Any:
    """What the evaluation in ``folder`` noted when it began, as it says. Raises one of ``UNUSABLE``."""
    if not (folder / STATE).is_file():  # a FIFO would never answer
        raise ValueError(f"{STATE} is not there")
    return json.loads((folder / STATE).read_bytes())


def tidy(root: Path) -> None:
    """Remove what is left of evaluations that had not begun or whose scores are all in results.h5; nothing, while one
    is running."""
    found = folders(root)
    if not found:
        with suppress(OSError):  # it is not there, as nearly always
            (root / FOLDER).rmdir()
        return
    with suppress(OutputLocked, OutputUnwritable), locked(root / LOCKS / EVALUATION_LOCK):
        for folder in found:
            pairs = pairs_of(folder) or []
            with open_run(root) as run:
                done = all(run.is_scored(*pair) for pair in pairs)
            if done:
                discard(folder)
