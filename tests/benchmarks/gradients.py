"""Gradient methods on resnet50 against the plain-torch floor and captum: ``python tests/benchmarks/gradients.py``.

Speeds are inputs a second that go through the network forward and backward. The floor is a gradient at the pixels
with frozen weights: that of one batch for methods with one gradient; for sums over steps, on ``FEW`` images, that of
the fastest of ``INNER`` inputs at once, without the two forward passes that integrated gradients need for their error.
In the row ``known`` one of these has run already, as it has in the command, which chooses the targets by it. Each
setting runs in a process of its own (kept memory cannot be given back), in which the contenders take turns. captum
runs in the first setting, on a copy of the network; ``of captum`` is over its fastest inner batch, ``of its default``
over all steps of all images at once. That takes 12 GB, and runs once, in a process of its own. Memory is measured one
contender a process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from fullgrad import floor
from gradcams import BATCH, SIZE, child, network, pictures, under
from measure import DISTURBED, peak_megabytes, race, taken_by_others

FEW, INNER = 4, (4, 8, 16)
SETTINGS = ("default", "kept", "kept+channels-last")
SINGLE = {
    "saliency": "Saliency",
    "input-x-gradient": "InputXGradient",
    "guided-backprop": "GuidedBackprop",
    "deconvnet": "Deconvolution",
}
"""Our name and captum's of methods with one gradient."""
SUMS = {"integrated-gradients": "steps", "smoothgrad": "samples"}
"""Methods that sum gradients, and what they call the number of these."""
Run = Callable[[], object]


def in_parts(net: nn.Module, x: Tensor, target: Tensor, inner: int) -> Run:
    """The floor of a batch, ``inner`` inputs at once."""
    parts = [floor(net, own, goals) for own, goals in zip(x.split(inner), target.split(inner), strict=True)]
    return lambda: [part() for part in parts]


def ours(
    net: nn.Module,
    x: Tensor,
    target: Tensor,
    name: str,
    steps: int = 0,
    *,
    known: bool = False,
    inner: int = BATCH,
) -> Run:
    """One of our methods; of ``steps`` gradients, where it sums them, ``inner`` inputs at once. ``known``: after the
    pass that the command chooses the targets by."""
    from xcli.execution import Execution
    from xcli.forward import Forward
    from xcli.layers import survey
    from xcli.registry import build
    from xcli.score import Score
    from xcli.targets import ClassRows

    method = build({"name": name, **({SUMS[name]: steps} if steps else {})})
    layers, execution, keys = survey(net, x[:1]), Execution(inner), [str(i) for i in range(len(x))]
    forward = Forward(net, x, (), execution) if known else None

    def run() -> Tensor:
        rows = ClassRows(torch.arange(len(x)), target)
        score = Score(net, rows, layers, execution, keys=keys, forward=forward)
        return method.explain(score, x, (SIZE, SIZE)).map

    return run


def peer(net: nn.Module, x: Tensor, target: Tensor, name: str) -> Run:
    """captum's method with one gradient."""
    import captum.attr

    method = getattr(captum.attr, SINGLE[name])(net)
    return lambda: method.attribute(x, target=target)


def peer_sum(
    net: nn.Module, x: Tensor, target: Tensor, name: str, steps: int, inner: int | None = None
) -> Run:
    """captum's method that sums ``steps`` gradients, ``inner`` inputs at once; by default all."""
    from captum.attr import IntegratedGradients, NoiseTunnel, Saliency

    if name == "integrated-gradients":
        path = IntegratedGradients(net)
        return lambda: path.attribute(x, target=target, n_steps=steps, internal_batch_size=inner)
    tunnel = NoiseTunnel(Saliency(net))
    options = {"nt_samples": steps, "nt_samples_batch_size": inner and inner // len(x), "abs": False}
    return lambda: tunnel.attribute(x, nt_type="smoothgrad", target=target, **options)


def contenders(setting: str, steps: int, undo: ExitStack) -> dict[str, tuple[Run, int]]:
    """What runs, and how many inputs it brings through the network."""
    net, x, target, _ = under(setting, undo)
    few = x[:FEW], target[:FEW]
    found = {f"floor, {inner} at once": (in_parts(net, x, target, inner), BATCH) for inner in INNER}
    found |= {name: (ours(net, x, target, name), BATCH) for name in SINGLE}
    found |= {
        f"{name}, {inner} at once": (ours(net, *few, name, steps, inner=inner), FEW * steps)
        for name in SUMS
        for inner in INNER
    }
    found["integrated-gradients, known"] = (
        ours(net, *few, "integrated-gradients", steps, known=True),
        FEW * steps,
    )
    if setting == SETTINGS[0]:
        copy = network()
        found |= {f"captum {name}": (peer(copy, x, target, name), BATCH) for name in SINGLE}
        found |= {
            f"captum {name}, {inner} at once": (peer_sum(copy, *few, name, steps, inner), FEW * steps)
            for name in SUMS
            for inner in INNER
        }
    return found


def timed(setting: str, steps: int, repeats: int) -> dict[str, object]:
    with ExitStack() as undo:
        known = contenders(setting, steps, undo)
        found = race({name: run for name, (run, _) in known.items()}, repeats, 3 * repeats)
        return {
            "inputs/s": {name: known[name][1] / timing.median for name, timing in found.items()},
            "dropped": {name: timing.dropped for name, timing in found.items()},
        }


def timed_default(name: str, steps: int) -> dict[str, float]:
    """captum's sum as it comes, once, after a pass that sets the process up."""
    net, (x, target) = network(), pictures()
    floor(net, x[:1], target[:1])()
    before = peak_megabytes()
    seconds, others = taken_by_others(peer_sum(net, x[:FEW], target[:FEW], name, steps))
    return {"inputs/s": FEW * steps / seconds, "others": others, "before": before, "peak": peak_megabytes()}


def memory(name: str, steps: int) -> dict[str, float]:
    """Of one run on ``FEW`` images, of the floor on a batch of 16, in the default setting."""
    net, (x, target) = network(), pictures()
    before = peak_megabytes()
    if name == "floor":
        floor(net, x, target)()
    else:
        ours(net, x[:FEW], target[:FEW], name, steps)()
    return {"before": before, "peak": peak_megabytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, help="one setting, as JSON")
    parser.add_argument("--memory", choices=("floor", *SUMS), help="the memory of one run, as JSON")
    parser.add_argument("--peer", choices=SUMS, help="captum's default, all steps at once, as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="the report has 4 times as many too")
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen.setting, chosen.steps, chosen.repeats)))
    elif chosen.memory:
        print(json.dumps(memory(chosen.memory, chosen.steps)))
    elif chosen.peer:
        print(json.dumps(timed_default(chosen.peer, chosen.steps)))
    else:
        report(chosen.steps, chosen.repeats)


def report(steps: int, repeats: int) -> None:
    print(
        f"resnet50, {SIZE}x{SIZE}, {torch.get_num_threads()} threads, torch {torch.__version__}; one batch of {BATCH}, "
        f"sums of {steps} steps on {FEW} images\n"
    )
    more = str(4 * steps)
    defaults = {name: child("--peer", name, "--steps", more, file=__file__) for name in SUMS}
    print(
        f"{'setting':<20}{'contender':<42}{'inputs/s':>9}{'of floor':>10}{'of captum':>11}{'of its default':>16}"
        f"{'dropped':>9}"
    )
    for name, found in defaults.items():
        print(
            f"{'default':<20}{f'captum {name}, {more} steps at once':<42}{found['inputs/s']:>9.2f}{'':>37}"
            f"{int(found['others'] > DISTURBED):>9}"
        )
    peers: dict[str, float] = {}
    for setting in SETTINGS:
        found = child("--setting", setting, "--steps", str(steps), "--repeats", str(repeats), file=__file__)
        speeds = found["inputs/s"]
        peers = peers or {name: fastest(speeds, f"captum {name}") for name in (*SINGLE, *SUMS)}
        for name, speed in speeds.items():
            own = name.removeprefix("captum ").split(",")[0]
            limit = fastest(speeds, "floor") if own in SUMS else speeds[f"floor, {BATCH} at once"]
            captum = f"{speed / peers[own]:.2f}" if own in peers else ""
            default = f"{speed / defaults[own]['inputs/s']:.2f}" if own in SUMS else ""
            print(
                f"{setting:<20}{name:<42}{speed:>9.2f}{speed / limit:>10.2f}{captum:>11}{default:>16}"
                f"{found['dropped'][name]:>9}"
            )
    print(f"\n{'peak memory, MB':<62}{'before':>9}{'peak':>10}{'of floor':>11}")
    peaks = {f"floor, {BATCH} at once": child("--memory", "floor", file=__file__)}
    for name in SUMS:
        for count in (str(steps), more):
            peaks[f"{name}, {count} steps"] = child("--memory", name, "--steps", count, file=__file__)
        peaks[f"captum {name}, {more} steps at once"] = defaults[name]
    limit = next(iter(peaks.values()))["peak"]
    for name, one in peaks.items():
        print(f"{name:<62}{one['before']:>9.0f}{one['peak']:>10.0f}{one['peak'] / limit:>11.2f}")


def fastest(speeds: dict[str, float], name: str) -> float:
    """Of one contender, whatever its inner batch."""
    return max(speed for own, speed in speeds.items() if own.split(",")[0] == name)


if __name__ == "__main__":
    main()
