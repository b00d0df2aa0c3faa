"""Small folders of pictures, configs for them, and the command `xai` in children of one warm process.

As a script: a server. Each line on standard input is a JSON list (arguments, options); the answer says how the child
ended. A child is a fork that runs the whole command, so that it may be killed and costs no import.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from store_driver import columns_of

import xcli

SIDE = 64
PREPROCESS = {"resize": [SIDE, SIDE], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def picture(index: int) -> Image.Image:
    """Coloured blocks and some noise, another picture and another size (48 to 84) for each index."""
    draw = np.random.default_rng(index)
    height, width = 48 + 4 * (index % 10), 84 - 4 * (index % 10)
    coarse = Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    noisy = np.asarray(coarse).astype(int) + draw.integers(-20, 20, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def photos(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Pictures number ``start`` and on in two folders, PNG and JPEG in turn."""
    files = [
        folder / "ab"[index // 2 % 2] / f"{index:03d}.{('png', 'jpg')[index % 2]}"
        for index in range(start, start + count)
    ]
    for index, file in enumerate(files, start):
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(file, quality=95)
    return files


def plain(folder: Path, output: Path, /, **sections: Any) -> dict[str, Any]:
    """A config as plain data; a section that is a mapping is laid over the default one."""
    defaults: dict[str, Any] = {
        "model": {"source": "demo", "name": "shapes-cnn", "preprocess": PREPROCESS},
        "images": {"path": str(folder)},
        "methods": [{"name": "gradcam", "relu": False}, "eigencam", "random"],
        "runtime": {"device": "cpu", "batch_size": 4, "workers": 2},
        "output": {"path": str(output), "png": []},
    }
    laid = {
        key: {**defaults.get(key, {}), **value} if isinstance(value, dict) and key != "target" else value
        for key, value in sections.items()
    }
    return {**defaults, **laid}


def written(file: Path, config: dict[str, Any]) -> Path:
    """``config`` as a YAML file."""
    file.write_text(yaml.safe_dump(config))
    return file


def same(found: Path, expected: Path, tolerance: float = 0.0) -> None:
    """Both results.h5 hold the same columns: byte for byte, or floats to ``tolerance`` of their largest value."""
    ours, theirs = columns_of(found / "results.h5"), columns_of(expected / "results.h5")
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype, name
        if tolerance and values.dtype.kind == "f" and values.size:
            largest = max(float(np.abs(values).max()), 1e-12)
            np.testing.assert_allclose(ours[name], values, rtol=0, atol=tolerance * largest, err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], values, err_msg=name)


def longer(*parameters: Any) -> list[Any]:
    """Parameters of a test for the long run alone."""
    import pytest

    rows = [one if isinstance(one, tuple) else (one,) for one in parameters]
    return [pytest.param(*row, marks=pytest.mark.soak) for row in rows]


class Ended(NamedTuple):
    """How a command ended: its exit code, negative for a signal that killed it, what it said, its largest size."""

    code: int
    stdout: str
    stderr: str
    peak: int = 0  # bytes


class Commands:
    """A warm process that runs commands in children."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(xcli.__path__[0]).parent), str(here)]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, *arguments: object, **options: Any) -> None:
        """Begin ``xai`` with these arguments; the options are those of ``child``."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([[str(one) for one in arguments], options]) + "\n")
        self.server.stdin.flush()

    def ended(self) -> Ended:
        """How the command that was begun ended."""
        assert self.server.stdout is not None
        return Ended(*json.loads(self.server.stdout.readline()))

    def __call__(self, *arguments: object, **options: Any) -> Ended:
        self.start(*arguments, **options)
        return self.ended()

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(30)
        if self.server.stdout is not None:
            self.server.stdout.close()


# --- in the server ----------------------------------------------------------------------------------------------


def child(arguments: list[str], options: dict[str, Any]) -> None:
    """Run the command in this process, and end it.

    Args:
        options: ``failpoint``: XCLI_FAILPOINT; ``part_images``: most images a part; ``signal_at``: [batch, number], the
            signal this process sends itself when it comes to that batch; ``wait_at``: [batch, made, awaited], it makes
            the one file when it comes to that batch, and goes on when the other is there; ``folder``: the current one;
            ``signal``: sent at the fail-point instead of SIGKILL; ``points``: a file that gets the name of every
            fail-point passed; ``file_size``: most bytes a file may have, as if the disk were full;
            ``stdout``, ``stderr``: a device, or None for a closed stream;
            ``seconds``: it is killed by SIGALRM then, though it may hang in a library; ``obeys``: what a file's mode
            forbids is forbidden to an administrator, too; ``changes``: [what, file], done once the list of images is
            made (``vanish``, ``grow``, ``touch``, or ``replace`` by what lies beside it with ``.new`` at its end).
    """
    import time

    import xcli.images
    import xcli.pipeline
    import xcli.plan
    from xcli.cli import main

    os.chdir(options.get("folder", "."))
    if point := options.get("failpoint"):
        os.environ["XCLI_FAILPOINT"] = point
    if number := options.get("signal"):
        import xcli.durable

        xcli.durable.signal = SimpleNamespace(SIGKILL=number)
    if points := options.get("points"):
        import xcli.durable

        os.environ["XCLI_FAILPOINT"] = "none:1"
        xcli.durable.fnmatchcase = lambda name, _: note(points, name)
    if size := options.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if options.get("obeys"):
        obey_modes()
    signal.alarm(options.get("seconds", 0))
    genuine_list = xcli.images.find_images

    def listed(*given: Any, **named: Any) -> Any:
        found = genuine_list(*given, **named)
        for what, file in options.get("changes", ()):
            change(what, Path(file))
        return found

    xcli.images.find_images = listed
    xcli.plan.PART_IMAGES = options.get("part_images", 4)
    batches = 0
    genuine = xcli.pipeline.explained

    def explained(*given: Any) -> Any:
        nonlocal batches
        batches += 1
        if "signal_at" in options and batches == options["signal_at"][0]:
            os.kill(os.getpid(), options["signal_at"][1])
        if "wait_at" in options and batches == options["wait_at"][0]:
            Path(options["wait_at"][1]).touch()
            while not Path(options["wait_at"][2]).exists():
                time.sleep(0.01)
        return genuine(*given)

    xcli.pipeline.explained = explained
    sys.argv = ["xai", *arguments]
    code: Any = 70
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  (a fork must never return to the server's loop)
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def note(file: str, line: str) -> None:
    """Add a line to a file, also from several threads."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def change(what: str, file: Path) -> None:
    """Do to an image what another process might."""
    if what == "vanish":
        file.unlink()
    elif what == "grow":
        with file.open("ab") as end:
            end.write(b"more")
    elif what == "touch":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    else:
        file.with_name(f"{file.name}.new").replace(file)


def obey_modes() -> None:
    """Give up the right of an administrator to open what its mode forbids (capabilities 1 and 2 of Linux)."""
    library = ctypes.CDLL(None, use_errno=True)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    library.capget(head, sets)
    sets[0] &= ~0b110
    assert library.capset(head, sets) == 0


def redirect(number: int, device: str | int | None) -> None:
    """Make the stream a device, or close it, as a shell does before the command starts."""
    name = {1: "stdout", 2: "stderr"}[number]
    if device is None:
        os.close(number)
        setattr(sys, name, None)
    elif isinstance(device, str):
        os.dup2(os.open(device, os.O_WRONLY), number)


def serve() -> None:
    """Answer every request with the exit status of its child, negative for a signal, and with what it wrote."""
    import matplotlib.backends.backend_agg  # noqa: F401  (what children would import one after the other)
    import torch.fx.experimental.symbolic_shapes  # noqa: F401  (by the first gradient)

    import xcli.scorecard  # noqa: F401
    from xcli.registry import methods, metrics

    methods()
    metrics()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever those who started the tests ignore
                arguments, options = json.loads(line)
                for number, name in ((1, "stdout"), (2, "stderr")):
                    redirect(number, options.get(name, number))
                child(arguments, options)
            _, status, used = os.wait4(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            answer = [code, out.read().decode(), err.read().decode(), used.ru_maxrss << 10]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
