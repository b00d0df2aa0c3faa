"""Every registered metric keeps every promise."""

from __future__ import annotations

import json
from functools import cache

import metric_contract as contract
import pytest

from xcli.demo import nets
from xcli.hooks import frozen
from xcli.metrics.base import Metric
from xcli.registry import metrics


@pytest.fixture(scope="module")
def network():
    return nets.load("shapes-cnn").double().eval()


@cache
def metric_of(name: str) -> Metric:
    cls = metrics()[name]
    return cls(**cls.small)


LONG = (contract.order_and_company_do_not_matter, contract.a_recorded_pass_gives_the_same)
"""Promises for the long tests: what breaks them most often breaks another one, too."""


@pytest.mark.parametrize(
    "promise",
    [
        pytest.param(p, marks=[pytest.mark.soak] if p in LONG else [], id=p.__name__)
        for p in contract.PROMISES
    ],
)
@pytest.mark.parametrize("name", sorted(metrics()))
def test_every_metric_keeps_every_promise(name, promise, network):
    with frozen(network):
        promise(metric_of(name), network, contract.scenes())


@pytest.mark.parametrize("name", sorted(metrics()))
def test_every_metric_says_what_it_is(name):
    cls = metrics()[name]
    low, high = cls.bounds
    assert cls.direction in ("higher", "lower")
    assert low is None or high is None or low < high
    assert cls.source
    assert cls.cost
    assert cls.__doc__
    assert set(cls.consumes) <= {"map", "x", "score", "truth", "method", "module", "models"}
    for preset in cls.presets.values():
        cls(**preset)
    first = cls.__doc__.strip().split("\n\n")[0]
    assert first.endswith("."), "the first paragraph is the claim"


@pytest.mark.parametrize("name", sorted(metrics()))
def test_a_metric_written_out_and_read_back_is_the_same_one(name):
    """Else a run scored with defaults would not be known again by its written-out config."""
    from xcli.entries import METRICS, metric_specs, options_of

    ((spec,), issues) = metric_specs([name])
    assert not issues
    ((again,), _) = metric_specs([spec.plain()])
    assert json.dumps(options_of(again.metric)) == json.dumps(options_of(spec.metric))
    assert METRICS.table()[name] is type(spec.metric)
