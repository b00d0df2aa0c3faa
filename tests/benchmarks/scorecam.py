"""Score-CAM on resnet18 against its floor and two packages: ``python tests/benchmarks/scorecam.py --peer``.

The floor is what the definition demands: as many forward passes as the layer has channels, of the image as it is, in
micro-batches of one size. Each setting runs in a process of its own (kept memory cannot be given back), in which the
contenders take turns; ``--peer`` adds the packages to the first setting, the one they run in. Memory is measured one
contender a process.
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
from measure import peak_megabytes, race

SIZE, TARGET = 224, 207
CHANNELS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
SETTINGS = ("default", "kept", "kept+channels-last", "kept+channels-last+folded")
PEERS = ("grad-cam", "torch-cam")
Run = Callable[[], object]


def picture() -> Tensor:
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def network() -> torch.nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18().eval().requires_grad_(False)


def floor(net: torch.nn.Module, x: Tensor, channels: int, batch: int) -> Run:
    """The passes alone, on copies that are there before the clock starts."""
    copies = x.expand(batch, -1, -1, -1).contiguous(memory_format=layout(x))

    def run() -> Tensor:
        with torch.inference_mode():
            found = [
                net(copies[: min(batch, channels - start)])[:, TARGET] for start in range(0, channels, batch)
            ]
        return torch.cat(found)

    return run


def layout(x: Tensor) -> torch.memory_format:
    last = torch.channels_last
    return last if x.is_contiguous(memory_format=last) else torch.contiguous_format


def ours(net: torch.nn.Module, x: Tensor, layer: str, batch: int) -> Callable[[], Tensor]:
    from xcli.execution import Execution
    from xcli.layers import survey
    from xcli.methods.cam.masks import ScoreCAM
    from xcli.score import Score
    from xcli.targets import ClassRows

    layers, rows = survey(net, x), ClassRows(torch.tensor([0]), torch.tensor([TARGET]))
    method = ScoreCAM(layer=layer)

    def run() -> Tensor:
        return method.explain(Score(net, rows, layers, Execution(batch)), x, (SIZE, SIZE)).map

    return run


def peer(name: str, net: torch.nn.Module, x: Tensor, layer: str, batch: int) -> Run:
    """A package's Score-CAM as it is meant to be called, at our micro-batch."""
    if name == "grad-cam":
        from pytorch_grad_cam import ScoreCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        def run_grad_cam() -> object:
            with ScoreCAM(net, [net.get_submodule(layer)]) as cam:
                cam.batch_size = batch
                return cam(x, [ClassifierOutputTarget(TARGET)])

        return run_grad_cam
    from torchcam.methods import ScoreCAM as TorchCam

    def run_torch_cam() -> object:
        with TorchCam(net, layer, batch_size=batch) as cam, torch.inference_mode():
            net(x)
            return cam(TARGET)

    return run_torch_cam


def under(setting: str, layer: str, undo: ExitStack) -> tuple[torch.nn.Module, Tensor]:
    from xcli import tuning

    net, x = network(), picture()
    if "kept" in setting:
        tuning.keep_freed_memory()
    if "channels-last" in setting:
        undo.enter_context(tuning.channels_last(net))
        x = x.contiguous(memory_format=torch.channels_last)
    if "folded" in setting:
        undo.enter_context(tuning.folded(net, x, (layer,)))
    return net, x


def timed(setting: str, layer: str, batch: int, repeats: int, peers: bool) -> dict[str, object]:
    with ExitStack() as undo:
        net, x = under(setting, layer, undo)
        mine = ours(net, x, layer, batch)
        contenders: dict[str, Run] = {"floor": floor(net, x, CHANNELS[layer], batch), "scorecam": mine}
        if peers:
            contenders |= {name: peer(name, net, x, layer, batch) for name in PEERS}
        found = race(contenders, repeats, 3 * repeats)
        exact, maps = ours(network(), picture(), layer, batch)(), mine()
        return {
            "masks/s": {name: CHANNELS[layer] / timing.median for name, timing in found.items()},
            "dropped": {name: timing.dropped for name, timing in found.items()},
            "effect": float((maps - exact).abs().max() / exact.abs().max()),
        }


def memory(contender: str, layer: str, batch: int) -> dict[str, float]:
    net, x = network(), picture()
    with torch.inference_mode():
        net(x)
    before = peak_megabytes()
    if contender == "floor":
        run = floor(net, x, CHANNELS[layer], batch)
    else:
        run = ours(net, x, layer, batch) if contender == "scorecam" else peer(contender, net, x, layer, batch)
    run()
    return {"before": before, "peak": peak_megabytes()}


def child(*arguments: object) -> dict:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, help="one setting, as JSON")
    parser.add_argument(
        "--memory", choices=("floor", "scorecam", *PEERS), help="one contender's memory, as JSON"
    )
    parser.add_argument("--peer", action="store_true", help="with the packages")
    parser.add_argument("--layer", choices=CHANNELS, default="layer4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.setting:
        print(json.dumps(timed(chosen.setting, chosen.layer, chosen.batch, chosen.repeats, chosen.peer)))
    elif chosen.memory:
        print(json.dumps(memory(chosen.memory, chosen.layer, chosen.batch)))
    else:
        report(chosen.layer, chosen.batch, chosen.repeats, chosen.peer)


def report(layer: str, batch: int, repeats: int, peers: bool) -> None:
    shape = ["--layer", layer, "--batch", batch]
    print(
        f"resnet18 {layer}, {CHANNELS[layer]} channels, {SIZE}x{SIZE}, micro-batch {batch}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(f"{'setting':<28}{'contender':<12}{'masks/s':>9}{'of floor':>10}{'effect':>10}{'dropped':>9}")
    speeds: dict[str, float] = {}
    for setting in SETTINGS:
        packages = ["--peer"] if peers and setting == SETTINGS[0] else []
        found = child("--setting", setting, *shape, "--repeats", repeats, *packages)
        for name, speed in found["masks/s"].items():
            effect = f"{found['effect']:.1e}" if name == "scorecam" else ""
            share = speed / found["masks/s"]["floor"]
            print(
                f"{setting:<28}{name:<12}{speed:>9.2f}{share:>10.3f}{effect:>10}{found['dropped'][name]:>9}"
            )
        speeds |= found["masks/s"]  # of us, those of the last setting stay
    if peers:
        best = max(speeds[name] for name in PEERS)
        print(f"\nours, all settings, over the faster package: {speeds['scorecam'] / best:.2f}")
    print(f"\n{'peak memory, MB':<28}{'before':>9}{'peak':>9}")
    for name in ("floor", "scorecam", *(PEERS if peers else ())):
        one = child("--memory", name, *shape)
        print(f"{name:<28}{one['before']:>9.0f}{one['peak']:>9.0f}")


if __name__ == "__main__":
    main()
