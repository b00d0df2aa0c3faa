"""The whole command over 2 000 JPEGs against decode + forward alone: ``python tests/benchmarks/command.py``.

The floor streams the same files through the same workers into the same tuned network and does nothing else. The two
take turns; every run is a process of its own, timed from the first batch on inside it, start-up left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from measure import DISTURBED, busy

PHOTOS = Path(__file__).parents[2] / "sample_images" / "photos"
KINDS = {"floor": "[]", "one method": "[]", "one method, overlays": "[overlay]"}


def write_images(folder: Path, count: int) -> None:
    """``count`` JPEGs of 500x375: crops of the sample photographs."""
    rng = np.random.default_rng(0)
    photos = [Image.open(path).convert("RGB").resize((1000, 800)) for path in sorted(PHOTOS.glob("*.jpg"))]
    for index in range(count):
        left, top = rng.integers(0, 500), rng.integers(0, 425)
        crop = photos[index % len(photos)].crop((left, top, left + 500, top + 375))
        crop.save(folder / f"{index:05d}.jpg", quality=90)


class Resident:
    """Samples this process's resident memory, MB, twenty times a second."""

    def __enter__(self) -> Resident:
        self.samples: list[float] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE") / 1e6
        while not self.done.wait(0.05):
            self.samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def quarter(self, index: int) -> float:
        size = len(self.samples) // 4
        return statistics.fmean(self.samples[index * size : (index + 1) * size])


def run(kind: str, folder: str, out: str) -> dict[str, float]:
    """One timed pass in this process."""
    import torch

    from xcli import pipeline, tuning
    from xcli.config import load_config
    from xcli.images import find_images
    from xcli.overrides import Changes
    from xcli.plan import prepared
    from xcli.progress import Quiet

    tuning.keep_freed_memory()
    config = load_config(
        None,
        Changes(
            overrides=["target=predicted", f"output.png={KINDS[kind]}"],
            methods="gradcam",
            inputs=[folder],
            output=out,
        ),
    )
    sources = find_images([folder])

    class Clock(Quiet):
        def start(self, total: int, done: int) -> None:
            self.began, self.before = time.perf_counter(), busy()

    clock = Clock()
    with Resident() as memory:
        if kind == "floor":
            with prepared(config, sources) as plan:
                clock.start(0, 0)
                batches = pipeline.stream(
                    sources, range(len(sources)), plan.preprocess, size=plan.size, batch_size=plan.batch_size,
                    workers=min(8, os.cpu_count() or 1),
                )  # fmt: skip
                with torch.inference_mode():
                    for batch in batches:
                        plan.model.module(plan.to_input(batch.pixels))
        else:
            pipeline.explain_folder(config, sources, fresh=True, progress=clock)
        seconds, after = time.perf_counter() - clock.began, busy()
    others = (after[0] - clock.before[0]) - (after[1] - clock.before[1])
    return {
        "images/s": len(sources) / seconds,
        "others": max(0.0, others) / (seconds * (os.cpu_count() or 1)),
        "second quarter": memory.quarter(1),
        "last quarter": memory.quarter(3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(KINDS))
    parser.add_argument("--folder")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.kind:
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(run(chosen.kind, chosen.folder, f"{out}/run")))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), chosen.images)
        report(folder, chosen.images, chosen.repeats)


def report(folder: str, images: int, repeats: int) -> None:
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    dropped = 0
    for _ in range(repeats * 2):
        for kind, results in found.items():
            if sum(one["others"] <= DISTURBED for one in results) >= repeats:
                continue
            command = [sys.executable, __file__, "--kind", kind, "--folder", folder]
            results.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
    print(f"{images} JPEGs of 500x375, shapes-cnn, {os.cpu_count()} cores\n")
    print(
        f"{'':<24}{'images/s':>10}{'of floor':>10}{'MB, 2nd quarter':>17}{'MB, last quarter':>18}{'dropped':>9}"
    )
    base = 0.0
    for kind, results in found.items():
        quiet = [one for one in results if one["others"] <= DISTURBED] or results
        dropped = len(results) - len(quiet)
        speed = statistics.median(one["images/s"] for one in quiet)
        base = base or speed
        second, last = (
            statistics.median(one[key] for one in quiet) for key in ("second quarter", "last quarter")
        )
        print(f"{kind:<24}{speed:>10.1f}{speed / base:>10.2f}{second:>17.0f}{last:>18.0f}{dropped:>9}")


if __name__ == "__main__":
    main()
