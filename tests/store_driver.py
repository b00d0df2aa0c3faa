"""A run without a model, with known numbers. As a script: a small server that runs it in children, which may be killed.

Each line on standard input is a JSON list (root, options, fail-point or null); the answer is how the child ended.
"""

import json
import os
import resource
import sys
from pathlib import Path

import h5py
import numpy as np

from xcli.errors import XaiError
from xcli.store import Input, Part, Record, open_store

LENGTH = 4


def inputs(count, root="/photos"):
    names = [f"dir/{i:03d}.png" if i % 5 else os.fsdecode(b"dir/\xff%03d.png" % i) for i in range(count)]
    return [
        Input(name, f"{root}/{name}", 100 + i, 10**18 + i, None if i % 3 else "cat")
        for i, name in enumerate(names)
    ]


def record(fingerprint="one", **resolved):
    attrs = {"model": "stub", "device": "cpu", "seed": 7, "versions": '{"numpy": "2"}'}
    config = "methods: [gradcam]  # é\n"
    return Record(fingerprint, config, attrs, resolved, LENGTH, "2026-01-02T03:04:05Z", ("cat", "dög"))


def part(rows, fingerprint="one"):
    """The part of the images ``rows``; also, by definition of merging, the whole run for all rows."""
    images = np.arange(rows.start, rows.stop)
    owner = np.repeat(images, np.where(images % 7 == 3, 0, 1 + images % 2))  # every seventh image has failed
    copies = np.r_[-1, owner[:-1]] == owner if owner.size else owner  # the second row of an image
    seeds = [[len(fingerprint), int(image), int(copy)] for image, copy in zip(owner, copies, strict=True)]
    draw = [np.random.default_rng(seed) for seed in seeds]
    cam = [r.normal(size=(5, 6)) for r in draw]
    rise = [r.normal(size=(3, 4, 2)) for r in draw]
    columns = {
        "images/label": np.where(images % 3, -1, 0).astype(np.int64),
        "images/status": (images % 7 == 3).astype(np.uint8),
        "images/error": ["cannot be read: é\udcff\0" if i % 7 == 3 else "" for i in images],
        "explanations/image": owner.astype(np.int64),
        "explanations/target": (owner % 2).astype(np.int64),
        "explanations/score": np.array([r.normal() for r in draw], np.float32),
        "explanations/error": ["x" * int(i) for i in owner],
        "heatmaps/gradcam": np.array(cam, np.float32).reshape(-1, 5, 6),
        "heatmaps/rise": np.array(rise, np.float16).reshape(-1, 3, 4, 2),
        "status/gradcam": (owner % 4).astype(np.uint8),
        "extras/rise/delta": np.array([r.normal() for r in draw], np.float64),
        "curves/gradcam/deletion": np.array([r.normal(size=3) for r in draw], np.float32).reshape(-1, 3),
        "curves/gradcam/deletion.fraction": np.linspace(0, 1, 3),
    }
    return Part(
        columns, {"heatmaps/gradcam": {"method": "gradcam", "layer": "conv5", "steps": 3, "eps": 0.5}}
    )


def run(
    root, count, journal=None, fingerprint="one", shard=(1, 1), layout=None, merge=True, limit=None, **options
):
    """What a pipeline does; ``journal`` gets the number of every part that ``commit`` called final."""
    resolved = {} if layout is None else {"layout": layout}
    root = Path(root)
    with open_store(
        root, record(fingerprint, **resolved), inputs(count), shard=tuple(shard), **options
    ) as store:
        for number, rows in store.todo()[:limit]:
            store.commit(number, part(rows, fingerprint))
            if journal:
                _note(journal, f"{rows.start} {rows.stop} {number}\n")
        if merge and store.complete():
            store.merge()


def opened(root, count=11, fingerprint="one", **options):
    return open_store(root, record(fingerprint), inputs(count), **options)


def columns_of(path):
    found = {}
    with h5py.File(path, "r") as file:
        file.visititems(
            lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None
        )
        return {
            name: item.asstr()[...] if h5py.check_string_dtype(item.dtype) else item[...]
            for name, item in found.items()
        }


def printable(text):
    return text.replace("\udcff", "\\udcff").replace("\0", "\\x00")


def assert_holds(found, expected, images):
    """``found`` has exactly the columns of ``expected`` and the names of ``images``, bit for bit."""
    columns = {"images/path": [item.path for item in images], **expected.columns}
    assert set(found) - {"categories"} == set(columns)
    for key, column in columns.items():
        if isinstance(column, list):
            assert list(found[key]) == [printable(text) for text in column], key
        else:
            assert found[key].dtype == column.dtype, key
            np.testing.assert_array_equal(found[key], column, err_msg=key)


def assert_is_run(root, count, fingerprint="one"):
    """results.h5 equals what one part of all images would hold: merging changes nothing."""
    assert_holds(columns_of(root / "results.h5"), part(slice(0, count), fingerprint), inputs(count))


def _note(journal, line):
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def _child(root, options, point):
    if point:
        os.environ["XCLI_FAILPOINT"] = point
    if size := options.pop("file_size", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        run(root, **options)
    except XaiError as error:
        print(error, file=sys.stderr)
        os._exit(error.exit_code)
    except BaseException:  # noqa: BLE001  (a fork must never return to the server's loop)
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def serve():
    """Answer every request with the exit status of its child: negative for a signal."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
