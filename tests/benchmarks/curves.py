"""Deletion and insertion together, against the passes they demand and torch-cam: ``python tests/benchmarks/curves.py``.

The floor is nothing but the forward passes of the definition, in batches of the same size: the images, the emptied
images, and steps - 1 copies for either curve. Each setting runs in a process of its own (kept memory cannot be given
back), in which the contenders take turns. torch-cam's own class is used where it is installed (it is given the maps,
so that no CAM is timed), else its way written out: all points of both curves in one list of jobs, made batch by batch,
each score put in its place on its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import race

SETTINGS = ("default", "kept", "kept+channels-last", "kept+channels-last+folded")
HAS_PEER = importlib.util.find_spec("torchcam") is not None
PEER = "torch-cam" if HAS_PEER else "torch-cam, written out"
Run = Callable[[], Tensor]


class Case:
    """A network, images with one class each, and a map for each."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        import torchvision

        self.steps, self.batch = chosen.steps, chosen.batch
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(chosen.images, 3, chosen.size, chosen.size, generator=draw)
        self.maps = torch.rand(chosen.images, chosen.size, chosen.size, generator=draw)
        self.target = torch.randint(0, 1000, (chosen.images,), generator=draw)
        torch.manual_seed(0)
        self.net = getattr(torchvision.models, chosen.model)().eval().requires_grad_(False)

    @property
    def copies(self) -> int:
        return len(self.x) * (2 * (self.steps - 1) + 2)


def floor(case: Case) -> Run:
    """So many copies through the network, whatever they show."""
    whole = case.x.repeat(-(-case.batch // len(case.x)), 1, 1, 1)
    sizes = [min(case.batch, case.copies - start) for start in range(0, case.copies, case.batch)]

    def run() -> Tensor:
        with torch.inference_mode():
            return torch.cat([case.net(whole[:size])[:, 0] for size in sizes])

    return run


def ours(case: Case) -> Run:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.registry import build_metric
    from xcli.score import Score
    from xcli.targets import ClassRows

    layers, execution = survey(case.net, case.x[:1]), Execution(case.batch)
    metrics = [
        build_metric({"name": name, "preset": "torch-cam", "steps": case.steps})
        for name in ("deletion", "insertion")
    ]

    def run() -> Tensor:
        keys = [str(i) for i in range(len(case.x))]
        score = Score(
            case.net, ClassRows(torch.arange(len(case.x)), case.target), layers, execution, keys=keys
        )
        return torch.stack([m.measure(map=case.maps, x=case.x, score=score).values for m in metrics]).mean(1)

    return run


class Given:
    """A CAM extractor that hands maps out."""

    def __init__(self, case: Case) -> None:
        self.model, self.maps = case.net, case.maps

    def __call__(self, class_idx: object, scores: object) -> list[Tensor]:
        return [self.maps]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> nullcontext[None]:
        return nullcontext()


def peer(case: Case) -> Run:
    from torchcam.metrics import DeletionInsertionMetric

    def run() -> Tensor:
        metric = DeletionInsertionMetric(Given(case), steps=case.steps, batch_size=case.batch)
        with torch.no_grad():
            metric.update(case.x, case.target.tolist())
        return torch.tensor(list(metric.summary().values()))

    return run


def written_out(case: Case) -> Run:
    total = case.maps[0].numel()
    size = -(-total // case.steps)
    counts = [*range(0, total, size), total]
    inner = [(curve, point) for point in range(1, len(counts) - 1) for curve in (0, 1)]
    jobs = [(i, *job) for i in range(len(case.x)) for job in [(0, len(counts) - 1), *inner]]

    def run() -> Tensor:
        ranks = case.maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        with torch.no_grad():
            clean = case.net(case.x).gather(1, case.target[:, None])[:, 0]
        curves = clean.new_empty(2, len(clean), len(counts))
        curves[0, :, 0] = curves[1, :, -1] = clean
        with torch.inference_mode():
            for start in range(0, len(jobs), case.batch):
                chunk = jobs[start : start + case.batch]
                own = torch.tensor([job[0] for job in chunk])
                first = ranks[own] < torch.tensor([counts[job[2]] for job in chunk])[:, None]
                kept = first == torch.tensor([job[1] == 1 for job in chunk])[:, None]
                pixels = case.x.flatten(2)[own]
                copies = torch.where(kept[:, None], pixels, torch.zeros_like(pixels)).view(
                    -1, *case.x.shape[1:]
                )
                scores = case.net(copies).gather(1, case.target[own][:, None])[:, 0]
                for score, (i, curve, point) in zip(scores, chunk, strict=True):
                    curves[curve, i, point] = score
                    if point == len(counts) - 1:
                        curves[1, i, 0] = score
        return torch.trapezoid(curves, torch.tensor(counts) / total, dim=2).mean(1)

    return run


def timed(chosen: argparse.Namespace) -> dict[str, object]:
    from xcli import tuning

    case = Case(chosen)
    them = (peer if HAS_PEER else written_out)(case)
    expected = them()
    with ExitStack() as undo:
        if "kept" in chosen.setting:
            tuning.keep_freed_memory()
        if "channels-last" in chosen.setting:
            undo.enter_context(tuning.channels_last(case.net))
            case.x = case.x.contiguous(memory_format=torch.channels_last)
        if "folded" in chosen.setting:
            undo.enter_context(tuning.folded(case.net, case.x[:1]))
        contenders = {"floor": floor(case), "ours": ours(case)}
        if chosen.setting == "default":
            contenders[PEER] = them
        found = race(contenders, chosen.repeats, 3 * chosen.repeats)
        return {
            "images/s": {name: len(case.x) / timing.median for name, timing in found.items()},
            "dropped": {name: timing.dropped for name, timing in found.items()},
            "difference": float((contenders["ours"]() - expected).abs().max() / expected.abs().max()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen)))
    else:
        report(chosen)


def report(chosen: argparse.Namespace) -> None:
    given = [f"--{name}={value}" for name, value in vars(chosen).items() if value is not None]
    print(
        f"{chosen.model}, {chosen.images} images {chosen.size}x{chosen.size}, {chosen.steps} steps, batches of "
        f"{chosen.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(
        f"{'setting':<28}{'contender':<26}{'images/s':>9}{'of floor':>10}{'of torch-cam':>14}{'difference':>12}"
        f"{'dropped':>9}"
    )
    them = 0.0
    for setting in SETTINGS:
        command = [sys.executable, __file__, f"--setting={setting}", *given]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        speeds = found["images/s"]
        them = them or speeds[PEER]
        for name, speed in speeds.items():
            apart = f"{found['difference']:.1e}" if name == "ours" else ""
            print(
                f"{setting:<28}{name:<26}{speed:>9.2f}{speed / speeds['floor']:>10.2f}{speed / them:>14.2f}{apart:>12}"
                f"{found['dropped'][name]:>9}"
            )


if __name__ == "__main__":
    main()
