"""Small folders of pictures, configs for them, and the command `xai` in children of one warm process.

As a script: a server. Each line on standard input is a JSON list (arguments, options); the answer says how the child
ended. A child is a fork that runs the whole command, so that it may be killed and costs no import.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
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


class Ended(NamedTuple):
    """How a command ended: its exit code, negative for a signal that killed it, and what it said."""

    code: int
    stdout: str
    stderr: str


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
            the one file when it comes to that batch, and goes on when the other is there.
    """
    import time

    import xcli.pipeline
    import xcli.plan
    from xcli.cli import main

    if point := options.get("failpoint"):
        os.environ["XCLI_FAILPOINT"] = point
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


def serve() -> None:
    """Answer every request with the exit status of its child, negative for a signal, and with what it wrote."""
    from xcli.registry import methods

    methods()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                child(*json.loads(line))
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)


if __name__ == "__main__":
    serve()
