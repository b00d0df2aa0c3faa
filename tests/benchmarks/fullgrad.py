"""FullGrad on resnet50, batch 16, against the plain-torch floor and grad-cam: ``python tests/benchmarks/fullgrad.py``.

Each setting runs in a process of its own (kept memory cannot be given back), in which the contenders take turns. The
floor is a forward pass and a backward pass to the pixels with frozen weights: what every method that asks for all
gradients pays. grad-cam runs on ``PEER_BATCH`` images, for it takes seconds an image; speeds are images a second.
Memory is measured one contender a process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gradcams import BATCH, SIZE, network, pictures, under
from measure import peak_megabytes, race

PEER_BATCH = 2
SETTINGS = ("default", "kept", "kept+channels-last", "kept+channels-last+bfloat16")
PRESETS = ("paper", "grad-cam", "simple")


def floor(
    net: torch.nn.Module, x: Tensor, target: Tensor, precision: torch.dtype | None = None
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        pixels = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
            logits = net(pixels)
        return torch.autograd.grad(logits.gather(1, target[:, None]).sum(), pixels)[0]

    return run


def ours(
    net: torch.nn.Module, x: Tensor, target: Tensor, preset: str, precision: torch.dtype | None = None
) -> Callable[[], Tensor]:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.registry import build
    from xcli.score import Score
    from xcli.targets import ClassRows

    layers, method = survey(net, x[:1]), build({"name": "fullgrad", "preset": preset})
    execution = Execution(BATCH, precision)

    def run() -> Tensor:
        score = Score(net, ClassRows(torch.arange(len(x)), target), layers, execution)
        return method.explain(score, x, (SIZE, SIZE)).map

    return run


def peer(net: torch.nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    from pytorch_grad_cam import FullGrad
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = FullGrad(net, [])
    goals = [ClassifierOutputTarget(int(t)) for t in target]
    return lambda: cam(x, goals)


def timed(setting: str, repeats: int) -> dict[str, object]:
    with ExitStack() as undo:
        net, x, target, precision = under(setting, undo)
        contenders: dict[str, Callable[[], object]] = {"floor": floor(net, x, target, precision)}
        contenders |= {f"fullgrad {preset}": ours(net, x, target, preset, precision) for preset in PRESETS}
        counts = dict.fromkeys(contenders, BATCH)
        if setting == "default":
            weights = network().requires_grad_(True)
            contenders["grad-cam"] = peer(weights, x[:PEER_BATCH], target[:PEER_BATCH])
            counts["grad-cam"] = PEER_BATCH
        found = race(contenders, repeats)
        return {
            "images/s": {name: counts[name] / timing.median for name, timing in found.items()},
            "dropped": {name: timing.dropped for name, timing in found.items()},
        }


def memory(contender: str) -> dict[str, float]:
    net, (x, target) = network(), pictures()
    before = peak_megabytes()
    match contender:
        case "floor":
            floor(net, x, target)()
        case "fullgrad":
            ours(net, x, target, "paper")()
        case "grad-cam":
            peer(net.requires_grad_(True), x, target)()
    return {"before": before, "peak": peak_megabytes()}


def child(*arguments: str) -> dict[str, object]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--memory", choices=("floor", "fullgrad", "grad-cam"))
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen.setting, chosen.repeats)))
    elif chosen.memory:
        print(json.dumps(memory(chosen.memory)))
    else:
        report(chosen.repeats)


def report(repeats: int) -> None:
    print(
        f"resnet50, batch {BATCH}, {SIZE}x{SIZE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(f"{'setting':<30}{'contender':<20}{'images/s':>9}{'of floor':>10}{'of grad-cam':>13}{'dropped':>9}")
    other = 0.0
    for setting in SETTINGS:
        found = child("--setting", setting, "--repeats", str(repeats))
        speeds = found["images/s"]
        other = other or speeds["grad-cam"]  # the package runs in the first setting alone
        for name, speed in speeds.items():
            times = f"{speed / other:.1f}"
            print(
                f"{setting:<30}{name:<20}{speed:>9.2f}{speed / speeds['floor']:>10.2f}{times:>13}"
                f"{found['dropped'][name]:>9}"
            )
    print(f"\n{'peak memory, MB':<30}{'before':>9}{'peak':>9}")
    for name in ("floor", "fullgrad", "grad-cam"):
        one = child("--memory", name)
        print(f"{name:<30}{one['before']:>9.0f}{one['peak']:>9.0f}")


if __name__ == "__main__":
    main()
