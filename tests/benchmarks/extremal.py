"""Extremal perturbation on resnet18 against the plain-torch floor: ``python tests/benchmarks/extremal.py``.

``IMAGES`` pictures with four areas each are searched together, for a few iterations. The floor is as many passes
forward and backward to the pixels, with frozen weights, of batches that are already there: whatever a mask costs is
beyond it. Both run with several numbers of pictures at once, and the fastest of each are compared. The stand-in for
the code of the authors, which searches one picture at a time, is the loop of the tests, on one picture and area.
Each setting runs in a process of its own (kept memory cannot be given back), in which the contenders take turns.
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
from gradcams import child
from measure import peak_megabytes, race

IMAGES, SIZE, INNER = 8, 224, (8, 16, 32)
AREAS = (0.025, 0.05, 0.1, 0.2)
MASKS = IMAGES * len(AREAS)
SETTINGS = ("default", "kept+channels-last")
CONTENDERS = ("floor", "extremal-perturbation", "one by one")
Run = Callable[[], object]


def case(setting: str, undo: ExitStack) -> tuple[nn.Module, Tensor, Tensor]:
    import torchvision

    from xcli import tuning

    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
    if "kept" in setting:
        tuning.keep_freed_memory()
    if "channels-last" in setting:
        undo.enter_context(tuning.channels_last(net))
        x = x.contiguous(memory_format=torch.channels_last)
    return net, x, torch.randint(0, 1000, (IMAGES,), generator=generator)


def passes(net: nn.Module, x: Tensor, target: Tensor, iterations: int, inner: int) -> Run:
    """The floor: a gradient for every mask in every iteration, ``inner`` at once."""
    index = torch.arange(MASKS) // len(AREAS)
    parts = [floor(net, x[own], target[own]) for own in index.split(inner)]
    return lambda: [part() for _ in range(iterations) for part in parts]


def ours(net: nn.Module, x: Tensor, target: Tensor, iterations: int, inner: int) -> Run:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.methods.perturbation.extremal import ExtremalPerturbation
    from xcli.score import Score
    from xcli.targets import ClassRows

    method = ExtremalPerturbation(areas=AREAS, iterations=iterations)
    layers, execution = survey(net, x[:1]), Execution(inner)

    def run() -> Tensor:
        score = Score(net, ClassRows(torch.arange(IMAGES), target), layers, execution)
        return method.explain(score, x, (SIZE, SIZE)).map

    return run


def one_by_one(net: nn.Module, x: Tensor, target: Tensor, iterations: int) -> Run:
    """A single mask by the loop of the tests."""
    tests = Path(__file__).parents[1]
    sys.path.extend([str(tests), str(tests / "methods")])
    from test_extremal import literal

    from xcli.methods.perturbation.extremal import ExtremalPerturbation

    method = ExtremalPerturbation(iterations=iterations)
    return lambda: literal(net, x[0], int(target[0]), AREAS[2], method)


def contenders(setting: str, iterations: int, undo: ExitStack) -> dict[str, tuple[Run, int]]:
    """What runs, and how many masks it searches."""
    given = (*case(setting, undo), iterations)
    found = {f"floor, {inner} at once": (passes(*given, inner), MASKS) for inner in INNER}
    found |= {f"extremal-perturbation, {inner} at once": (ours(*given, inner), MASKS) for inner in INNER}
    return found | {"one by one": (one_by_one(*given), 1)}


def timed(setting: str, iterations: int, repeats: int) -> dict[str, object]:
    with ExitStack() as undo:
        known = contenders(setting, iterations, undo)
        found = race({name: run for name, (run, _) in known.items()}, repeats, 3 * repeats)
        return {
            "seconds": {name: found[name].median / (known[name][1] * iterations) for name in known},
            "dropped": {name: found[name].dropped for name in known},
        }


def memory(name: str, iterations: int) -> dict[str, float]:
    """Of one contender, in the default setting, ``MASKS`` at once."""
    with ExitStack() as undo:
        known = contenders("default", iterations, undo)
        before = peak_megabytes()
        known.get(name, known.get(f"{name}, {INNER[-1]} at once"))[0]()
        return {"before": before, "peak": peak_megabytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, help="one setting, as JSON")
    parser.add_argument("--memory", choices=CONTENDERS, help="the memory of one contender, as JSON")
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen.setting, chosen.iterations, chosen.repeats)))
    elif chosen.memory:
        print(json.dumps(memory(chosen.memory, chosen.iterations)))
    else:
        report(chosen.iterations, chosen.repeats)


def report(iterations: int, repeats: int) -> None:
    counts = "--iterations", str(iterations), "--repeats", str(repeats)
    print(
        f"resnet18, {SIZE}x{SIZE}, {IMAGES} pictures, areas {AREAS}, {iterations} iterations, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(f"{'setting':<20}{'contender':<40}{'ms a mask, iteration':>21}{'of floor':>10}{'dropped':>9}")
    for setting in SETTINGS:
        found = child("--setting", setting, *counts, file=__file__)
        seconds = found["seconds"]
        limit = min(second for name, second in seconds.items() if name.startswith("floor"))
        for name, second in seconds.items():
            print(
                f"{setting:<20}{name:<40}{1000 * second:>21.1f}{limit / second:>10.2f}{found['dropped'][name]:>9}"
            )
    print(f"\n{'peak memory, MB':<60}{'before':>9}{'peak':>9}")
    for name in CONTENDERS:
        one = child("--memory", name, "--iterations", "2", file=__file__)
        print(f"{name:<60}{one['before']:>9.0f}{one['peak']:>9.0f}")


if __name__ == "__main__":
    main()
