"""Black-box methods on resnet18 against the passes alone and their peers: ``python tests/benchmarks/perturbation.py``.

Speeds are pictures a second that go through the network: 8 images, 4 at a time, with about 512 copies each. The floor
is the passes alone, on copies that are there before the clock starts, by the fastest of ``AT_ONCE`` at once, in the
same setting, that of the command: memory kept, channels-last, batch norms folded. Contenders take turns, since the
speed of a shared machine wanders. Peers run as they come, in a process of their own, on one image, ``PEER_BATCH``
copies at once, beside the floor there: captum, and, with ``--torchray PATH`` to a checkout, TorchRay's RISE. Memory is
that of one run of RISE on one image with ``MANY`` masks, a contender a process, over what the process held after a
pass of one image.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from gradcams import child
from measure import DISTURBED, peak_megabytes, taken_by_others
from scorecam import layout, network

IMAGES, ROUNDS, COPIES, SIZE, MANY = 4, 2, 512, 224, 8000
AT_ONCE, PEER_BATCH = (16, 27, 32), 16
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


def speeds(contenders: dict[str, tuple[Run, int]], rounds: int) -> dict[str, dict[str, float]]:
    """Inputs a second of each contender over its rounds, without those that others disturbed if there are quiet ones,
    and the largest share of the cores that others took in the rounds that count."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, (run, _) in contenders.items():
            seen[name].append(taken_by_others(run))
    found: dict[str, dict[str, float]] = {"speeds": {}, "others": {}}
    for name, (_, inputs) in contenders.items():
        quiet = [one for one in seen[name] if one[1] <= DISTURBED] or seen[name]
        found["speeds"][name] = len(quiet) * inputs / sum(seconds for seconds, _ in quiet)
        found["others"][name] = max(taken for _, taken in quiet)
    return found


def floors(net: nn.Module, x: Tensor) -> dict[str, tuple[Run, int]]:
    found = {f"floor, {batch} at once": (floor(net, x, batch), COPIES // batch * batch) for batch in AT_ONCE}
    for run, _ in found.values():
        run()
    return found


def timed(only: str) -> dict[str, dict[str, float]]:
    from xcli import tuning

    net, x = network(), pictures().contiguous(memory_format=torch.channels_last)
    tuning.keep_freed_memory()
    with tuning.channels_last(net), tuning.folded(net, x[:1]):
        known = floors(net, x)
        for name in only.split(",") if only else OURS:
            options, copies = OURS[name]
            known[name] = (ours(net, x, name, options), IMAGES * copies)
        return speeds(known, ROUNDS)


def timed_peers(torchray: str) -> dict[str, dict[str, float]]:
    net, x = network(), pictures()
    return speeds({**floors(net, x), **peers(net, x, torchray)}, 1)


def memory(masks: int) -> dict[str, float]:
    """Resident memory of RISE with so many masks on one image over the model's own and a pass of a few masks'."""
    net, x = network(), pictures()[:1]
    with torch.inference_mode():
        net(x)
    before = peak_megabytes()
    ours(net, x, "rise", {"masks": masks})()
    return {"before": before, "peak": peak_megabytes()}


def report(found: dict[str, dict[str, float]], peer: dict[str, float]) -> None:
    best = max(speed for name, speed in found["speeds"].items() if "floor" in name)
    for name, speed in found["speeds"].items():
        against = f"{speed / peer[name]:.2f}" if name in peer else ""
        disturbed = "yes" if found["others"][name] > DISTURBED else ""
        print(f"{name:<24}{speed:>9.1f}{speed / best:>10.2f}{against:>9}{disturbed:>11}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--torchray", default="")
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--only", default="", help="of our methods, separated by commas")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--memory", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.ours:
        print(json.dumps(timed(options.only)))
    elif options.peers:
        print(json.dumps(timed_peers(options.torchray)))
    elif options.memory:
        print(json.dumps(memory(options.memory)))
    else:
        print(f"{'contender':<24}{'inputs/s':>9}{'of floor':>10}{'of peer':>9}{'disturbed':>11}")
        print("peers, as they come")
        found = child("--peers", "--torchray", options.torchray, file=__file__)
        report(found, {})
        print("ours, as the command runs them")
        report(child("--ours", "--only", options.only, file=__file__), found["speeds"])
        for masks in (64, MANY):
            held = child("--memory", str(masks), file=__file__)
            print(f"rise, {masks} masks: {held['peak'] - held['before']:.0f} MB over {held['before']:.0f} MB")


if __name__ == "__main__":
    main()
