"""The metrics that are one number a run, computed from the columns of a results.h5 that is being written."""

from __future__ import annotations

import json

import h5py

from xcli.registry import build_metric

COPIED = ("metric", "params", "preset", "direction", "bounds", "source", "identity")


def add_summaries(out: h5py.File) -> None:
    """Write ``/summary/<label>/<metric>`` for every metric whose rows together say more than their mean."""
    scored = [f"{label}/{metric}" for group in ("metrics", "curves") for label in out.get(group, ())
              for metric in out[group][label]]  # fmt: skip
    for path in dict.fromkeys(scored):
        values, curve = (out.get(f"{group}/{path}") for group in ("metrics", "curves"))
        attrs = (curve if values is None else values).attrs
        if "metric" not in attrs:  # a further number of a metric, or the abscissa of its curve
            continue
        metric = build_metric({"name": attrs["metric"], **json.loads(attrs.get("params", "{}"))})
        number = metric.summary(
            None if values is None else values[...],
            None if curve is None else curve[...],
            out["explanations/target"][...],
        )
        if number is not None:
            dataset = out.create_dataset(f"summary/{path}", data=float(number))
            for name in (name for name in COPIED if name in attrs):
                dataset.attrs[name] = attrs[name]
