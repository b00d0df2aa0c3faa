"""CAMs without gradients on resnet50, batch 16, against the plain-torch floor and grad-cam.

``python tests/benchmarks/activations.py``. The floor is a forward pass without a graph up to the layer (EigenCAM needs
no more), the Gram matrices of the centred activations and one batched eigendecomposition in float64; for FEM the
forward pass and the statistics. Contenders take turns in one process a setting; memory is measured one a process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gradcams
from measure import peak_megabytes, race

METHODS = ("eigencam", "fem", "kpca-cam")
SETTINGS = ("default", "kept+channels-last")
PEERS = {"eigencam": "EigenCAM", "fem": "FEM", "kpca-cam": "KPCA_CAM"}


def forward(net: torch.nn.Module, x: Tensor) -> Tensor:
    """The whole network: the classes to explain have to be known, and cost the same pass."""
    kept: list[Tensor] = []
    handle = net.layer4.register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.inference_mode():
        net(x)
    handle.remove()
    return kept[0]


def up(maps: Tensor) -> Tensor:
    return F.interpolate(maps[:, None].float(), size=(gradcams.SIZE, gradcams.SIZE), mode="bilinear")[:, 0]


def eigen_floor(net: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        rows = forward(net, x).flatten(2).transpose(1, 2).double()
        rows = rows - rows.mean(1, keepdim=True)
        power, left = torch.linalg.eigh(rows @ rows.transpose(1, 2))
        return up((left[:, :, -1] * power[:, -1:].clamp_min(0).sqrt()).unflatten(1, (7, 7)))

    return run


def fem_floor(net: torch.nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        acts = forward(net, x)
        std, mean = torch.std_mean(acts, (2, 3), keepdim=True, correction=0)
        return up(((acts > mean + 2 * std) * mean).sum(1))

    return run


def peer(net: torch.nn.Module, x: Tensor, target: Tensor, name: str) -> Callable[[], object]:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    cam = getattr(pytorch_grad_cam, PEERS[name])(net, [net.layer4])
    goals = [ClassifierOutputTarget(int(t)) for t in target]
    return lambda: cam(x, goals)


def timed(setting: str, repeats: int) -> dict[str, object]:
    with ExitStack() as undo:
        net, x, target, _ = gradcams.under(setting, undo)
        contenders: dict[str, Callable[[], object]] = {
            "floor of eigencam, kpca-cam": eigen_floor(net, x),
            "floor of fem": fem_floor(net, x),
        }
        contenders |= {name: gradcams.ours(net, x, target, None, name) for name in METHODS}
        contenders |= {f"grad-cam {name}": peer(net, x, target, name) for name in METHODS}
        found = race(contenders, repeats)
        return {
            "images/s": {name: gradcams.BATCH / timing.median for name, timing in found.items()},
            "dropped": sum(timing.dropped for timing in found.values()),
        }


def memory(contender: str) -> dict[str, float]:
    net, (x, target) = gradcams.network(), gradcams.pictures()
    before = peak_megabytes()
    kind, _, name = contender.rpartition(" ")
    (peer(net, x, target, name) if kind else gradcams.ours(net, x, target, None, name))()
    return {"before": before, "peak": peak_megabytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--memory")
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
        f"resnet50, batch {gradcams.BATCH}, {gradcams.SIZE}x{gradcams.SIZE}, {torch.get_num_threads()} threads\n"
    )
    print(
        f"{'setting':<22}{'method':<12}{'floor':>8}{'ours':>8}{'grad-cam':>10}{'of floor':>10}{'x grad-cam':>12}"
    )
    for setting in SETTINGS:
        found = gradcams.child("--setting", setting, "--repeats", str(repeats), file=__file__)
        speed = found["images/s"]
        for name in METHODS:
            floor = speed["floor of fem" if name == "fem" else "floor of eigencam, kpca-cam"]
            own, other = speed[name], speed[f"grad-cam {name}"]
            print(
                f"{setting:<22}{name:<12}{floor:>8.2f}{own:>8.2f}{other:>10.2f}{own / floor:>10.2f}{own / other:>12.1f}"
            )
        print(f"{'':<22}repeats dropped: {found['dropped']}")
    print(f"\n{'peak memory, MB':<22}{'before':>9}{'peak':>9}")
    for name in (*METHODS, *(f"grad-cam {name}" for name in METHODS)):
        one = gradcams.child("--memory", name, file=__file__)
        print(f"{name:<22}{one['before']:>9.0f}{one['peak']:>9.0f}")


if __name__ == "__main__":
    main()
