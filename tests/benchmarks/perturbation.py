"""Black-box methods on resnet18 against the passes alone and their peers: ``python tests/benchmarks/perturbation.py``.

Speeds are pictures a second that go through the network, 8 images with about 512 copies each. The floor is the passes
alone, on copies that are there before the clock starts, by the fastest of ``AT_ONCE`` at once, in the same setting.
Each setting runs in a process of its own (kept memory cannot be given back), in which the contenders take turns; the
last one is what the command uses. Peers run in the first, on one image, ``PEER_BATCH`` copies at once: captum, and,
with ``--torchray PATH`` to a checkout, TorchRay's RISE. ``of peer`` is over the peer's own speed there. Memory is that
of one run of RISE on one image with ``MANY`` masks, a contender a process, over what the process held after one pass.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from gradcams import child
from measure import DISTURBED, peak_megabytes, taken_by_others
from scorecam import layout, network

IMAGES, COPIES, SIZE, MANY = 8, 512, 224, 8000
AT_ONCE, PEER_BATCH = (8, 16, 32), 16
SETTINGS = ("default", "kept", "kept+channels-last+folded")
OURS: dict[str, tuple[dict[str, object], int]] = {
    "rise": ({"masks": COPIES}, COPIES),
    "occlusion": ({"patch": 32, "stride": 9}, 23 * 23),
    "lime": ({"samples": COPIES}, COPIES),
    "kernel-shap": ({"samples": COPIES}, COPIES),
    "sobol": ({"samples": 8}, 8 * 65),
    "hsic": ({"samples": COPIES}, COPIES),
}
"""Options, and how many copies of an image they make."""
Run = Callable[[], object]


def pictures() -> Tensor:
    return torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def floor(net: nn.Module, x: Tensor, batch: int) -> Run:
    copies = x[torch.arange(batch) % len(x)].contiguous(memory_format=layout(x))

    def run() -> None:
        with torch.inference_mode():
            for _ in range(COPIES // batch):
                net(copies)

    return run


def ours(net: nn.Module, x: Tensor, name: str, options: dict[str, object]) -> Run:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.registry import build
    from xcli.score import Score
    from xcli.targets import ClassRows

    method = build({"name": name, **options})
    layers, rows = survey(net, x[:1]), ClassRows(torch.arange(len(x)), torch.arange(len(x)))
    keys = [str(i) for i in range(len(x))]

    def run() -> Tensor:
        score = Score(net, rows, layers, Execution(IMAGES), keys=keys).scaled(method.scale)
        return method.explain(score, x, (SIZE, SIZE)).map

    return run


def peers(net: nn.Module, x: Tensor, torchray: str) -> dict[str, tuple[Run, int]]:
    from captum.attr import KernelShap, Lime, Occlusion

    one = x[:1]
    cells = torch.arange(SIZE) // 32
    mask = (cells[:, None] * 7 + cells)[None, None]
    window = {"sliding_window_shapes": (3, 32, 32), "strides": (3, 9, 9)}
    several = {"target": 0, "perturbations_per_eval": PEER_BATCH}
    found: dict[str, tuple[Run, int]] = {
        "occlusion": (lambda: Occlusion(net).attribute(one, **window, **several), 23 * 23),
        "kernel-shap": (
            lambda: KernelShap(net).attribute(one, feature_mask=mask, n_samples=COPIES, **several),
            COPIES,
        ),
        "lime": (lambda: Lime(net).attribute(one, feature_mask=mask, n_samples=COPIES, **several), COPIES),
    }
    if torchray:
        sys.path.insert(0, torchray)
        rise = importlib.import_module("torchray.attribution.rise").rise
        found["rise"] = (lambda: rise(net, one, num_masks=COPIES, batch_size=32), COPIES)
    return found


def under(setting: str, undo: ExitStack) -> tuple[nn.Module, Tensor]:
    from xcli import tuning

    net, x = network(), pictures()
    if "kept" in setting:
        tuning.keep_freed_memory()
    if "channels-last" in setting:
        undo.enter_context(tuning.channels_last(net))
        x = x.contiguous(memory_format=torch.channels_last)
    if "folded" in setting:
        undo.enter_context(tuning.folded(net, x[:1]))
    return net, x


def timed(setting: str, torchray: str) -> dict[str, dict[str, float]]:
    """Speed of each contender, and the share of the cores' time that others took meanwhile."""
    speeds, others = {}, {}
    with ExitStack() as undo:
        net, x = under(setting, undo)

        def measure(name: str, run: Run, inputs: int) -> None:
            seconds, taken = taken_by_others(run)
            speeds[name], others[name] = inputs / seconds, taken

        for batch in AT_ONCE:
            floor(net, x, batch)()
            measure(f"floor, {batch} at once", floor(net, x, batch), COPIES)
        for name, (options, copies) in OURS.items():
            measure(name, ours(net, x, name, options), IMAGES * copies)
        for batch in AT_ONCE:
            measure(f"floor, {batch} at once, again", floor(net, x, batch), COPIES)
        if setting == SETTINGS[0]:
            for name, (run, copies) in peers(network(), x, torchray).items():
                measure(f"peer {name}", run, copies)
    return {"speeds": speeds, "others": others}


def memory(masks: int) -> dict[str, float]:
    """Resident memory of RISE with so many masks on one image over the model's own and a pass of a few masks'."""
    net, x = network(), pictures()[:1]
    with torch.inference_mode():
        net(x)
    before = peak_megabytes()
    ours(net, x, "rise", {"masks": masks})()
    return {"before": before, "peak": peak_megabytes()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torchray", default="")
    parser.add_argument("--setting", default="")
    parser.add_argument("--memory", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.setting:
        print(json.dumps(timed(options.setting, options.torchray)))
        return
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    print(f"{'setting':<28}{'contender':<28}{'inputs/s':>9}{'of floor':>10}{'of peer':>9}{'disturbed':>11}")
    peer: dict[str, float] = {}
    for setting in SETTINGS:
        found = child("--setting", setting, "--torchray", options.torchray, file=__file__)
        speeds, others = found["speeds"], found["others"]
        peer |= {name.removeprefix("peer "): speed for name, speed in speeds.items() if "peer" in name}
        best = max(speed for name, speed in speeds.items() if "floor" in name)
        for name, speed in speeds.items():
            against = f"{speed / peer[name]:.2f}" if name in peer else ""
            print(
                f"{setting:<28}{name:<28}{speed:>9.1f}{speed / best:>10.2f}{against:>9}"
                f"{'yes' if others[name] > DISTURBED else '':>11}"
            )
    for masks in (64, MANY):
        found = child("--memory", str(masks), file=__file__)
        print(f"rise, {masks} masks: {found['peak'] - found['before']:.0f} MB over {found['before']:.0f} MB")


if __name__ == "__main__":
    main()
