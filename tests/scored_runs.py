"""Runs with made-up scores, written by hand as results.h5 has them."""

import json

import h5py
import numpy as np

NAN = float("nan")
HIGHER, LOWER = "higher", "lower"


def attributes(metric, direction=HIGHER, **params):
    return {"metric": metric, "direction": direction, "params": json.dumps(params), "bounds": "[null, null]"}


def scored_run(
    folder,
    scores,
    *,
    image=None,
    target=None,
    paths=None,
    lower=(),
    baselines=(),
    scalars=None,
    params=None,
    curves=None,
    model="demo:shapes-cnn",
    weights="abc",
):
    """A results.h5 with ``scores``: method -> metric -> (rows,); ``scalars`` likewise, one number a run.

    ``baselines`` have maps or not: ``random`` has, the others were only scored. ``params``: metric -> its options;
    ``curves``: method -> metric -> ((rows, S + 1), (S + 1,)).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(next(iter(scores.values())).values()))) if scores else len(image)
    image = np.arange(rows) if image is None else np.asarray(image)
    paths = [f"dir/{i:03d}.png" for i in range(image.max(initial=-1) + 1)] if paths is None else paths
    with h5py.File(folder / "results.h5", "w") as file:
        file.attrs.update({"schema": "xcli/1", "model": model, "weights_sha256": weights})
        file.create_dataset("images/path", data=paths, dtype=h5py.string_dtype())
        file["explanations/image"] = image
        file["explanations/target"] = np.zeros(rows, int) if target is None else np.asarray(target)
        for method in {**scores, **(scalars or {})}:
            if method not in baselines or method == "random":
                maps = file.create_dataset(f"heatmaps/{method}", data=np.zeros((rows, 2, 2), np.float32))
                maps.attrs["source"] = "baseline" if method in baselines else "a paper"
        for group, numbers in (("metrics", scores), ("summary", scalars or {})):
            for method, metrics in numbers.items():
                for metric, values in metrics.items():
                    data = np.asarray(values, np.float32) if group == "metrics" else float(values)
                    stored = file.create_dataset(f"{group}/{method}/{metric}", data=data)
                    direction = LOWER if metric in lower else HIGHER
                    stored.attrs.update(attributes(metric, direction, **(params or {}).get(metric, {})))
        for method, metrics in (curves or {}).items():
            for metric, (values, fraction) in metrics.items():
                file[f"curves/{method}/{metric}"] = np.asarray(values, np.float32)
                file[f"curves/{method}/{metric}.fraction"] = np.asarray(fraction, np.float32)
    return folder
