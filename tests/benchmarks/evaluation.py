"""Scoring a folder: memory over the number of images, and time against the passes it demands.

``python tests/benchmarks/evaluation.py`` explains and scores 100, 400 and 1 000 generated scenes with deletion,
insertion and ROAD, each in a process of its own, and prints its peak memory; the last column is the share of the time
that as many plain forward passes take in the same process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_megabytes

METRICS = ["{name: deletion, steps: 8}", "{name: insertion, steps: 8}", "road"]
PASSES = 1 + 7 + 1 + 7 + 1 + 8
"""An explanation: the image, two curves of 8 steps with their emptied images, and ROAD at four levels, twice."""


def scored(folder: Path, count: int) -> None:
    """One process: print peak memory and time as JSON."""
    import torch

    from xcli.config import load_config
    from xcli.images import find_images
    from xcli.overrides import Changes
    from xcli.plan import prepared
    from xcli.progress import Quiet
    from xcli.scorecard import explain_and_score
    from xcli.tuning import keep_freed_memory

    keep_freed_memory()
    changes = Changes(
        overrides=["target=predicted", "output.png=[]", f"metrics=[{', '.join(METRICS)}]"],
        methods="gradcam",
        inputs=[str(folder / "scenes")],
        output=str(folder / f"run-{count}"),
    )
    config = load_config(None, changes)
    sources = find_images(config.images.paths, limit=count)
    began = time.perf_counter()
    explain_and_score(config, sources, Quiet())
    seconds, peak = time.perf_counter() - began, peak_megabytes()
    with prepared(config, sources) as plan, torch.inference_mode():
        x = torch.zeros(plan.batch_size, 3, *plan.size).contiguous(memory_format=torch.channels_last)
        began = time.perf_counter()
        for _ in range(max(1, count * PASSES // plan.batch_size // 10)):
            plan.model.module(x)
        floor = 10 * (time.perf_counter() - began)
    print(json.dumps({"count": count, "seconds": seconds, "megabytes": peak, "floor": floor}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 400, 1000])
    parser.add_argument("--one", type=int)
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    if chosen.one is not None:
        scored(chosen.folder, chosen.one)
        return
    from xcli.demo.scenes import write_pairs

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pairs(folder, max(chosen.counts), [])
        print(f"{'explanations':>12}{'seconds':>10}{'peak MB':>10}{'of its forwards':>17}")
        for count in chosen.counts:
            call = [sys.executable, __file__, "--one", str(count), "--folder", place]
            told = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
            share = told["floor"] / told["seconds"]
            print(f"{count:>12}{told['seconds']:>10.1f}{told['megabytes']:>10.0f}{share:>17.2f}", flush=True)


if __name__ == "__main__":
    main()
