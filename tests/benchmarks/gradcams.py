"""CAMs on resnet50, batch 16, against the plain-torch floor and grad-cam: ``python tests/benchmarks/gradcams.py``.

Each setting runs in a process of its own (kept memory cannot be given back), in which the floor and we take turns.
The floor is what the definition demands: a forward pass without a graph up to the layer, the tail forward and
backward, the weighted sum, the up-sampling. ``--peer`` adds grad-cam; memory is measured one contender a process.
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
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_megabytes, race

BATCH, SIZE, LAYER = 16, 224, "layer4"
METHODS = ("gradcam", "hirescam", "gradcam-elementwise", "gradcam++", "xgradcam", "layercam")
SETTINGS = (
    "default",
    "kept",
    "kept+channels-last",
    "kept+channels-last+folded",
    "kept+channels-last+bfloat16",
)


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator), torch.randint(
        0, 1000, (BATCH,), generator=generator
    )


def network() -> torch.nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50().eval().requires_grad_(False)


def floor(
    net: torch.nn.Module, x: Tensor, target: Tensor, precision: torch.dtype | None
) -> Callable[[], Tensor]:
    """Grad-CAM written out for this one network."""
    trunk = torch.nn.Sequential(*list(net.children())[:-2])

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=precision or torch.bfloat16, enabled=precision is not None):
            with torch.no_grad():
                acts = trunk(x)
            acts = acts.requires_grad_()
            logits = net.fc(net.avgpool(acts).flatten(1))
        grads = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), acts)[0]
        maps = (grads.mean((2, 3), keepdim=True) * acts.detach()).sum(1).relu().float()
        return F.interpolate(maps[:, None], size=(SIZE, SIZE), mode="bilinear")[:, 0]

    return run


def ours(
    net: torch.nn.Module, x: Tensor, target: Tensor, precision: torch.dtype | None, name: str
) -> Callable[[], Tensor]:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.registry import methods
    from xcli.score import Score
    from xcli.targets import ClassRows

    layers, method = survey(net, x[:1]), methods()[name]()
    execution = Execution(BATCH, precision)

    def run() -> Tensor:
        score = Score(net, ClassRows(torch.arange(BATCH), target), layers, execution)
        return method.explain(score, x, (SIZE, SIZE)).map

    return run


def peer(net: torch.nn.Module, x: Tensor, target: Tensor) -> Callable[[], object]:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    for parameter in net.parameters():
        parameter.requires_grad_(True)
    cam = GradCAM(net, [net.layer4])
    goals = [ClassifierOutputTarget(int(t)) for t in target]
    return lambda: cam(x, goals)


def under(setting: str, undo: ExitStack) -> tuple[torch.nn.Module, Tensor, Tensor, torch.dtype | None]:
    from xcli import tuning

    net, (x, target) = network(), pictures()
    if "kept" in setting:
        tuning.keep_freed_memory()
    if "channels-last" in setting:
        undo.enter_context(tuning.channels_last(net))
        x = x.contiguous(memory_format=torch.channels_last)
    if "folded" in setting:
        undo.enter_context(tuning.folded(net, x[:1], (LAYER,)))
    return net, x, target, torch.bfloat16 if "bfloat16" in setting else None


def timed(setting: str, repeats: int) -> dict[str, object]:
    with ExitStack() as undo:
        net, x, target, precision = under(setting, undo)
        contenders: dict[str, Callable[[], object]] = {"floor": floor(net, x, target, precision)}
        contenders |= {name: ours(net, x, target, precision, name) for name in METHODS}
        contenders["all six together"] = together(net, x, target, precision)
        found = race(contenders, repeats)
        exact = floor(network(), *pictures(), None)()
        maps = ours(net, x, target, precision, "gradcam")()
        return {
            "images/s": {name: BATCH / timing.median for name, timing in found.items()},
            "dropped": sum(timing.dropped for timing in found.values()),
            "effect": float((maps - exact).abs().max() / exact.abs().max()),
        }


def together(
    net: torch.nn.Module, x: Tensor, target: Tensor, precision: torch.dtype | None
) -> Callable[[], object]:
    """All methods on one recorded pass, as the command runs them."""
    from xcli.execution import Execution
    from xcli.forward import Forward
    from xcli.layers import survey
    from xcli.registry import methods
    from xcli.score import Score
    from xcli.targets import ClassRows

    layers, execution = survey(net, x[:1]), Execution(BATCH, precision)
    chosen = [methods()[name]() for name in METHODS]

    def run() -> object:
        forward = Forward(net, x, [LAYER], execution, leaves=[LAYER])
        score = Score(net, ClassRows(torch.arange(BATCH), target), layers, execution, forward=forward)
        return [method.explain(score, x, (SIZE, SIZE)).map for method in chosen]

    return run


def timed_peer(repeats: int) -> dict[str, object]:
    net, (x, target) = network(), pictures()
    found = race({"grad-cam": peer(net, x, target)}, repeats)
    return {
        "images/s": {name: BATCH / t.median for name, t in found.items()},
        "dropped": found["grad-cam"].dropped,
    }


def memory(contender: str) -> dict[str, float]:
    net, (x, target) = network(), pictures()
    before = peak_megabytes()
    match contender:
        case "forward":
            with torch.inference_mode():
                net(x)
        case "grad-cam":
            peer(net, x, target)()
        case name:
            ours(net, x, target, None, name)()
    return {"before": before, "peak": peak_megabytes()}


def child(*arguments: str, file: str = __file__) -> dict[str, object]:
    """What a process of its own prints in its last line."""
    command = [sys.executable, file, *arguments]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--memory", choices=("forward", *METHODS, "grad-cam"))
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen.setting, chosen.repeats)))
    elif chosen.peer:
        print(json.dumps(timed_peer(chosen.repeats)))
    elif chosen.memory:
        print(json.dumps(memory(chosen.memory)))
    else:
        report(chosen.repeats)


def report(repeats: int) -> None:
    print(
        f"resnet50, batch {BATCH}, {SIZE}x{SIZE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(
        f"{'setting':<28}{'contender':<42}{'images/s':>9}{'of floor':>10}{'effect on maps':>16}{'dropped':>9}"
    )
    for setting in SETTINGS:
        found = child("--setting", setting, "--repeats", str(repeats))
        speeds = found["images/s"]
        for name, speed in speeds.items():
            effect = f"{found['effect']:.1e}" if name == "gradcam" else ""
            dropped = found["dropped"] if name == "floor" else ""
            print(
                f"{setting:<28}{name:<42}{speed:>9.2f}{speed / speeds['floor']:>10.2f}{effect:>16}{dropped:>9}"
            )
    other = child("--peer", "--repeats", str(repeats))
    print(
        f"{'default':<28}{'grad-cam':<42}{other['images/s']['grad-cam']:>9.2f}{'':>26}{other['dropped']:>9}"
    )
    print(f"\n{'peak memory, MB':<28}{'before':>9}{'peak':>9}")
    for name in ("forward", *METHODS, "grad-cam"):
        one = child("--memory", name)
        print(f"{name:<28}{one['before']:>9.0f}{one['peak']:>9.0f}")


if __name__ == "__main__":
    main()
