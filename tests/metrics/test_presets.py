"""Presets have the numbers of the packages they are named after, read from the installed packages themselves."""

from __future__ import annotations

import inspect

import captum.metrics
import pytest
import quantus

from xcli.metrics.localisation import IntersectionOverUnion, PointingGame
from xcli.registry import build_metric, metrics

QUANTUS = [
    ("max-sensitivity", quantus.MaxSensitivity, {"samples": "nr_samples", "radius": "lower_bound"}),
    ("average-sensitivity", quantus.AvgSensitivity, {"samples": "nr_samples", "radius": "lower_bound"}),
    ("local-lipschitz", quantus.LocalLipschitzEstimate, {
        "samples": "nr_samples", "radius": "perturb_std", "centre": "perturb_mean",
    }),
    ("relative-input-stability", quantus.RelativeInputStability, {
        "samples": "nr_samples", "epsilon": "eps_min",
    }),
    ("region-perturbation", quantus.RegionPerturbation, {
        "patch": "patch_size", "regions": "regions_evaluation",
    }),
    ("selectivity", quantus.Selectivity, {"patch": "patch_size"}),
    ("monotonicity-correlation", quantus.MonotonicityCorrelation, {
        "samples": "nr_samples", "pixels": "features_in_step",
    }),
    ("sufficiency", quantus.Sufficiency, {"threshold": "threshold"}),
    ("smooth-mprt", quantus.SmoothMPRT, {"samples": "nr_samples", "noise": "noise_magnitude"}),
    ("effective-complexity", quantus.EffectiveComplexity, {"threshold": "eps"}),
    ("non-sensitivity", quantus.NonSensitivity, {"epsilon": "eps"}),
]  # fmt: skip


def defaults(function):
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize(("name", "theirs", "named"), QUANTUS, ids=[name for name, *_ in QUANTUS])
def test_the_preset_quantus_has_the_defaults_of_quantus(name, theirs, named):
    metric, known = build_metric({"name": name, "preset": "quantus"}), defaults(theirs.__init__)
    assert {ours: getattr(metric, ours) for ours in named} == {
        ours: known[other] for ours, other in named.items()
    }


def test_the_preset_captum_of_sensitivity_has_the_defaults_of_captum():
    metric, known = (
        build_metric({"name": "max-sensitivity", "preset": "captum"}),
        defaults(captum.metrics.sensitivity_max),
    )
    assert (metric.samples, metric.radius) == (known["n_perturb_samples"], known["perturb_radius"])


def test_torchrays_pointing_game_is_the_default():
    assert build_metric({"name": "pointing-game", "preset": "torchray"}) == PointingGame(tolerance=15)


def test_the_preset_wsol_thresholds_the_scaled_map():
    assert build_metric({"name": "iou", "preset": "wsol"}) == IntersectionOverUnion(scale="min-max")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mu-fidelity", {"samples": 200, "grid": 9, "share": 0.2}),
        ("average-stability", {"samples": 20}),
        ("smooth-mprt", {"samples": 50, "noise": 0.1}),
        ("irof", {"segments": 100}),
        ("road", {"percentages": (20, 40, 60, 80), "noise": 0.01}),
        ("insertion", {"substrate": "blur", "kernel": 11, "sigma": 5.0, "steps": 32}),
        ("deletion", {"substrate": "constant", "value": 0.0, "score": "probability", "steps": 32}),
        ("region-perturbation", {"patch": 9, "regions": 100}),
        ("iou", {"threshold": 0.2}),
    ],
)
def test_defaults_are_those_that_are_documented(name, expected):
    metric = build_metric(name)
    assert {option: getattr(metric, option) for option in expected} == expected


def test_every_preset_differs_from_the_default_or_says_so():
    same = {
        (name, preset)
        for name, cls in metrics().items()
        for preset in cls.presets
        if build_metric({"name": name, "preset": preset}) == build_metric(name)
    }
    alike = ("relevance-rank", "localisation-auc", "top-k-intersection")
    assert same == {("pointing-game", "torchray"), *((name, "quantus") for name in alike)}
