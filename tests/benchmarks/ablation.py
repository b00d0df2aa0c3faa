"""Ablation-CAM at layer4 against grad-cam, 224 px: ``python tests/benchmarks/ablation.py``.

The two take turns in one process, ours on ``--batch`` images, the peer on one image, as it takes images one by one
anyway and needs minutes for each. Then each runs in a process of its own for its peak memory. ``--copies`` times
the tail alone, by how many copies a call takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_megabytes, taken_by_others

SIZE, LAYER = 224, "layer4"
NETWORKS = ("resnet18", "resnet50")


def network(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return getattr(torchvision.models, name)().eval().requires_grad_(False)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return x, torch.randint(0, 1000, (count,), generator=generator)


def ours(net: nn.Module, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.methods.cam.ablation import AblationCAM
    from xcli.score import Score
    from xcli.targets import ClassRows

    options = {**AblationCAM.presets["grad-cam"], "relu": False, "layer": LAYER}
    layers, method, rows = survey(net, x[:1]), AblationCAM(**options), ClassRows(torch.arange(len(x)), target)
    return lambda: method.explain(Score(net, rows, layers, Execution()), x).map


def peer(net: nn.Module, x: Tensor, target: Tensor) -> Callable[[], Tensor]:
    from pytorch_grad_cam import AblationCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class Raw(AblationCAM):
        def get_cam_image(self, *args: object, **named: object) -> object:
            self.map = super().get_cam_image(*args, **named)
            return self.map

    cam = Raw(net, [net.get_submodule(LAYER)])

    def run() -> Tensor:
        cam(x[:1], [ClassifierOutputTarget(int(target[0]))])
        return torch.from_numpy(cam.map)

    return run


def timed(name: str, batch: int, repeats: int) -> dict[str, float]:
    """Ours, the peer, ours, the peer, ...: images a second of each, by the clock and by this process's own time, and
    the largest difference of their raw maps."""
    net, (x, target) = network(name), pictures(batch)
    contenders = {"ours": ours(net, x, target), "peer": peer(net, x, target)}
    contenders["ours"]()
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    own: dict[str, list[float]] = {"ours": [], "peer": []}
    maps, shares = {}, []
    for turn in range(2 * repeats + 1):
        key = ("ours", "peer")[turn % 2]

        def run(key: str = key) -> None:
            maps[key] = contenders[key]()

        start = time.process_time()
        took, others = taken_by_others(run)
        own[key].append(time.process_time() - start)
        seconds[key].append(took)
        shares.append(others)
    difference = (maps["ours"][:1] - maps["peer"]).abs().max() / maps["peer"].abs().max()
    return {
        "ours": batch / statistics.median(seconds["ours"]),
        "peer": 1 / statistics.median(seconds["peer"]),
        "own time": batch * statistics.median(own["peer"]) / statistics.median(own["ours"]),
        "difference": float(difference),
        "others": max(shares),
    }


def memory(name: str, contender: str, batch: int) -> dict[str, float]:
    net, (x, target) = network(name), pictures(batch)
    run = {"ours": ours, "peer": peer}[contender](net, x, target)
    before = peak_megabytes()
    run()
    return {"before": before, "peak": peak_megabytes()}


def copies(name: str, kept: bool) -> dict[int, float]:
    """Microseconds a copy, by copies a call, of making copies of one image and running the tail on them."""
    from xcli import tuning
    from xcli.replay import Replay

    if kept:
        tuning.keep_freed_memory()
    net, (x, _) = network(name), pictures(1)
    replay = Replay(net, LAYER, x)
    acts = replay.activations()
    found = {}
    for size in (8, 16, 32, 64, 128, 256, 512):
        image = torch.zeros(size, dtype=torch.long)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            with torch.inference_mode():
                for _ in range(max(1, 512 // size)):
                    replay(acts.index_select(0, image), image)
            best = min(best, (time.perf_counter() - start) / max(512, size))
        found[size] = best * 1e6
    return found


def child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet())
    return json.loads(answer.stdout.splitlines()[-1])


def quiet() -> dict[str, str]:
    return os.environ | {"TQDM_DISABLE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--memory", choices=("ours", "peer"))
    parser.add_argument("--copies", choices=("plain", "kept"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1, help="how often the peer runs")
    chosen = parser.parse_args()
    name = chosen.network or NETWORKS[0]
    if chosen.memory:
        print(json.dumps(memory(name, chosen.memory, chosen.batch)))
    elif chosen.copies:
        print(json.dumps(copies(name, chosen.copies == "kept")))
    elif chosen.network:
        print(json.dumps(timed(name, chosen.batch, chosen.repeats)))
    else:
        report(chosen.batch, chosen.repeats)


def report(batch: int, repeats: int) -> None:
    print(f"{LAYER}, {SIZE}x{SIZE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name in NETWORKS:
        own = ("--network", name, "--batch", str(batch))
        found = child(*own, "--repeats", str(repeats))
        print(f"{name}: ours {found['ours']:.2f} images/s (batch {batch}), peer {found['peer']:.4f} images/s")
        print(
            f"  ratio {found['ours'] / found['peer']:.0f}, {found['own time']:.0f} by the processes' own time; "
            f"largest difference of maps {found['difference']:.1e} of the largest value; "
            f"others took at most {found['others']:.0%} of the time"
        )
        for contender in ("ours", "peer"):
            one = child(*own, "--memory", contender)
            print(f"  memory of {contender}: {one['before']:.0f} MB before, {one['peak']:.0f} MB at the peak")
        for how in ("plain", "kept"):
            each = child(*own, "--copies", how)
            row = ", ".join(f"{size}: {value:.0f}" for size, value in each.items())
            print(f"  us a copy by copies a call, {how} memory: {row}")


if __name__ == "__main__":
    main()
