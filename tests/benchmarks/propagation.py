"""Propagation and transformer methods against the plain floor, zennit and captum:
``python tests/benchmarks/propagation.py``.

The floor on resnet50 is a gradient at the pixels of one batch with frozen weights; on vit_b_16 the same with
attention that is not fused (``SDPBackend.MATH``). zennit runs EpsilonPlusFlat with its canonizer for resnets,
entered once a batch as its documentation does; captum's DeepLift a copy in which no ReLU is shared or in place,
as it refuses the network itself. Both run in the first setting, in which nothing is tuned. Each setting runs in
a process of its own (kept memory cannot be given back), in which the contenders take turns; memory is measured
one contender a process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
from fullgrad import floor
from gradcams import BATCH, SIZE, child, under
from measure import peak_megabytes, race

SETTINGS = ("default", "kept+channels-last")
NETWORKS = {"resnet50": BATCH, "vit_b_16": 4}
"""And how many images at once."""
METHODS: dict[str, tuple[str, ...]] = {
    "resnet50": ("lrp", "deeplift", "excitation-backprop", "contrastive-excitation-backprop", "attnlrp"),
    "vit_b_16": ("attnlrp", "chefer", "gradient-rollout", "legrad", "attention-rollout"),
}
PEERS = {"lrp": "zennit", "deeplift": "captum"}
Run = Callable[[], object]


def bound(name: str, setting: str, undo: ExitStack) -> tuple[nn.Module, Tensor, Tensor]:
    """Network, pictures and targets of a setting."""
    import torchvision

    net, x, target, _ = under(setting, undo)
    x, target = x[: NETWORKS[name]], target[: NETWORKS[name]]
    if name != "resnet50":
        torch.manual_seed(0)
        net = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
        nn.init.normal_(net.heads.head.weight, 0, 0.02)
    return net, x, target


def plain(name: str, net: nn.Module, x: Tensor, target: Tensor) -> Run:
    """The floor of a network."""
    run = floor(net, x, target)
    if name == "resnet50":
        return run

    def unfused() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run()

    return unfused


def ours(net: nn.Module, x: Tensor, target: Tensor, name: str) -> Run:
    """One of our methods at its defaults."""
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.registry import build
    from xcli.score import Score
    from xcli.targets import ClassRows

    method, layers, keys = build(name), survey(net, x[:1]), [str(i) for i in range(len(x))]

    def run() -> Tensor:
        score = Score(net, ClassRows(torch.arange(len(x)), target), layers, Execution(BATCH), keys=keys)
        return method.explain(score, x).map

    return run


def peer(net: nn.Module, x: Tensor, target: Tensor, name: str) -> Run:
    """zennit's LRP or captum's DeepLIFT."""
    if name == "lrp":
        from zennit.attribution import Gradient
        from zennit.composites import EpsilonPlusFlat
        from zennit.torchvision import ResNetCanonizer

        one_hot = torch.eye(1000)[target]

        def run() -> Tensor:
            with Gradient(net, EpsilonPlusFlat(canonizers=[ResNetCanonizer()])) as attribute:
                return attribute(x, one_hot)[1]

        return run
    import captum.attr
    import torchvision

    class Unshared(torchvision.models.resnet.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            out = self.relus[0](self.bn1(self.conv1(x)))
            out = self.bn3(self.conv3(self.relus[1](self.bn2(self.conv2(out)))))
            return self.relus[2](out + (x if self.downsample is None else self.downsample(x)))

    copy = deepcopy(net)
    for part in list(copy.modules()):
        if isinstance(part, torchvision.models.resnet.Bottleneck):
            part.__class__, part.relus = Unshared, nn.ModuleList(nn.ReLU() for _ in range(3))
            del part.relu
    copy.relu = nn.ReLU()
    method = captum.attr.DeepLift(copy)
    return lambda: method.attribute(x, target=target)


def contenders(name: str, setting: str, undo: ExitStack) -> dict[str, Run]:
    net, x, target = bound(name, setting, undo)
    found = {"floor": plain(name, net, x, target)}
    found |= {method: ours(net, x, target, method) for method in METHODS[name]}
    if name == "resnet50" and setting == SETTINGS[0]:
        found |= {f"{package} {method}": peer(net, x, target, method) for method, package in PEERS.items()}
    return found


def timed(name: str, setting: str, repeats: int) -> dict[str, object]:
    with ExitStack() as undo:
        found = race(contenders(name, setting, undo), repeats, 3 * repeats)
        return {
            "images/s": {label: NETWORKS[name] / timing.median for label, timing in found.items()},
            "dropped": {label: timing.dropped for label, timing in found.items()},
        }


def memory(name: str, label: str) -> dict[str, float]:
    """Of two runs of one contender in the default setting."""
    with ExitStack() as undo:
        run = contenders(name, SETTINGS[0], undo)[label]
        before = peak_megabytes()
        run(), run()
        return {"before": before, "peak": peak_megabytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, help="one network alone")
    parser.add_argument("--setting", choices=SETTINGS, help="one setting of it, as JSON")
    parser.add_argument("--memory", help="the memory of one contender, as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen.network, chosen.setting, chosen.repeats)))
    elif chosen.memory:
        print(json.dumps(memory(chosen.network, chosen.memory)))
    else:
        for name in (chosen.network,) if chosen.network else NETWORKS:
            report(name, chosen.repeats)


def report(name: str, repeats: int) -> None:
    print(
        f"{name}, {SIZE}x{SIZE}, batches of {NETWORKS[name]}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )
    print(f"{'setting':<20}{'contender':<34}{'images/s':>9}{'of floor':>10}{'of peer':>9}{'dropped':>9}")
    peers: dict[str, float] = {}
    labels: list[str] = []
    for setting in SETTINGS:
        asked = ("--network", name, "--setting", setting, "--repeats", str(repeats))
        found = child(*asked, file=__file__)
        speeds = found["images/s"]
        labels = labels or list(speeds)
        peers = peers or {
            method: speeds[f"{package} {method}"]
            for method, package in PEERS.items()
            if f"{package} {method}" in speeds
        }
        for label, speed in speeds.items():
            of_peer = f"{speed / peers[label]:.2f}" if label in peers else ""
            print(
                f"{setting:<20}{label:<34}{speed:>9.2f}{speed / speeds['floor']:>10.2f}{of_peer:>9}"
                f"{found['dropped'][label]:>9}"
            )
    print(f"\n{'peak memory, MB':<54}{'before':>9}{'peak':>10}{'added, of floor':>17}")
    floor_added = 0.0
    for label in labels:
        one = child("--network", name, "--memory", label, file=__file__)
        added = one["peak"] - one["before"]
        floor_added = floor_added or added
        print(f"{label:<54}{one['before']:>9.0f}{one['peak']:>10.0f}{added / floor_added:>17.2f}")
    print()


if __name__ == "__main__":
    main()
