"""Intervals and paired tests: against scipy, against resampling written out, by hand."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from xcli import intervals
from xcli.errors import ConfigError
from xcli.intervals import (
    estimate,
    estimates,
    holm,
    paired,
    places,
    signed_rank,
    statistic,
    with_interval,
)

RANDOM = np.random.default_rng(1)
NAN = float("nan")


def written_out(values, image, share):
    """Every resample as the list of its rows."""
    images = np.unique(image)
    random = np.random.default_rng(intervals.SEED)
    drawn = []
    for _ in range(intervals.RESAMPLES):
        chosen = images[random.integers(0, len(images), len(images))]
        rows = np.concatenate([values[image == one] for one in chosen])
        drawn.append(rows.mean() if share is None else np.quantile(rows, share))
    return np.quantile(drawn, [0.025, 0.975])


@pytest.mark.parametrize(("name", "share"), [("mean", None), ("median", 0.5), ("p10", 0.1), ("p99", 0.99)])
def test_a_resample_repeats_the_rows_of_its_images(name, share):
    image = np.array([0, 0, 0, 3, 4, 4, 9, 11, 11, 12])
    values = RANDOM.normal(size=10).astype(np.float32)
    found = estimate(values, image, name)
    np.testing.assert_allclose([found.low, found.high], written_out(values.astype(float), image, share))
    assert (found.n, found.images) == (10, 6)


@pytest.mark.parametrize(("name", "function"), [("mean", np.mean), ("median", np.median)])
def test_one_row_an_image_is_the_plain_bootstrap_of_scipy(name, function):
    values = RANDOM.gamma(2, size=200)
    theirs = stats.bootstrap((values,), function, n_resamples=4000, method="percentile", rng=3)
    ours = estimate(values, np.arange(200), name)
    spread = theirs.standard_error
    assert ours.value == pytest.approx(function(values))
    assert abs(ours.low - theirs.confidence_interval.low) < 0.15 * spread
    assert abs(ours.high - theirs.confidence_interval.high) < 0.15 * spread


def test_the_interval_covers_the_truth_as_often_as_it_says_also_where_rows_depend_on_their_image():
    random = np.random.default_rng(0)
    rows, every = np.repeat(np.arange(40), 5), np.arange(200)
    columns = [random.normal(size=40)[rows] + 0.3 * random.normal(size=200) for _ in range(1000)]
    by_image, by_row = (
        np.mean([found.low <= 0 <= found.high for found in estimates(columns, image)])
        for image in (rows, every)
    )
    assert 0.92 <= by_image <= 0.96
    assert by_row < 0.75  # what would be claimed if rows counted as independent


def test_chunks_do_not_change_the_resamples(monkeypatch):
    image, values = np.repeat(np.arange(30), 2), RANDOM.normal(size=60)
    whole = [estimate(values, image, name) for name in ("mean", "p25")]
    monkeypatch.setattr(intervals, "CELLS", 7 * 30)
    parts = [estimate(values, image, name) for name in ("mean", "p25")]
    for a, b in zip(whole, parts):
        np.testing.assert_allclose([a.low, a.high], [b.low, b.high], rtol=1e-12)


def test_columns_together_give_what_each_gives_alone():
    image = np.repeat(np.arange(12), 2)
    columns = [RANDOM.normal(size=24) for _ in range(4)]
    columns[1][[0, 1, 7]] = NAN
    for name in ("mean", "median"):
        together = estimates(columns, image, name)
        for a, b in zip(together, [estimate(column, image, name) for column in columns]):
            assert (a.value, a.n, a.images) == (b.value, b.n, b.images)
            np.testing.assert_allclose([a.low, a.high], [b.low, b.high], rtol=1e-12)
    assert (together[1].n, together[1].images) == (21, 11)


def test_rows_that_are_not_defined_are_left_out():
    image, values = np.repeat(np.arange(10), 2), RANDOM.normal(size=20)
    holes = np.r_[values, NAN, NAN]
    assert estimate(holes, np.r_[image, 3, 77]) == estimate(values, image)
    nothing = estimate(np.full(3, NAN), np.arange(3))
    assert (nothing.n, nothing.images) == (0, 0)
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()


def test_no_interval_is_made_up():
    one_image = estimate(np.array([1.0, 2.0, 3.0]), np.zeros(3, int))
    assert one_image.value == 2
    assert np.isnan([one_image.low, one_image.high]).all()
    for name, value in (("min", 0), ("max", 9)):
        extreme = estimate(np.arange(10.0), np.arange(10), name)
        assert extreme.value == value
        assert np.isnan([extreme.low, extreme.high]).all()
    same = estimate(np.full(5, 0.25), np.arange(5))
    assert (same.low, same.value, same.high) == (0.25, 0.25, 0.25)


def test_statistics_are_numpys():
    values = RANDOM.normal(size=31)
    assert statistic(values, "p10") == np.percentile(values, 10)
    assert statistic(values, "median") == np.median(values)
    assert (statistic(values, "min"), statistic(values, "max")) == (values.min(), values.max())
    for name in ("avg", "p0", "p100", "p5.5", "P10", ""):
        with pytest.raises(ConfigError, match="there are mean, median, min, max, and p1 to p99"):
            statistic(values, name)


def test_paired_differences_are_averaged_an_image():
    image = np.array([0, 0, 1, 2, 2, 3, 4, 5])
    mine, other = RANDOM.normal(size=8), RANDOM.normal(size=8) - 1
    found = paired(mine, other, image)
    means = [(mine - other)[image == one].mean() for one in range(6)]
    assert found.p == stats.wilcoxon(means).pvalue
    assert found.difference.value == pytest.approx((mine - other).mean())
    mine[2] = NAN  # the only row of image 1
    assert paired(mine, other, image).p == stats.wilcoxon(means[:1] + means[2:]).pvalue


def test_paired_at_its_ends():
    image = np.arange(6)
    assert signed_rank(np.zeros(6), image) == 1.0
    assert np.isnan(signed_rank(np.full(6, NAN), image))
    assert signed_rank(np.arange(1.0, 7.0), image) == 2 / 2**6  # one of 64 sign patterns, on either side
    assert signed_rank(np.array([1.0]), np.zeros(1, int)) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [0.03, 0.06, 0.06, 0.02]
    assert holm([0.4, 0.9]) == [0.8, 0.9]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    corrected = holm([0.02, NAN, 0.03])
    assert (corrected[0], corrected[2]) == (0.04, 0.04)
    assert np.isnan(corrected[1])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.12345, 0.1, 0.9], "0.123 [0.100, 0.900]"),
        ([9.12345, 0.1, -9.5], "9.123 [0.100, -9.500]"),
        ([0.12345, 0.1, 12.3], "0.12 [0.10, 12.30]"),
        ([0.12345, -1.5, -1234], "0 [-2, -1234]"),
        ([0.012, 0.01, 0.02], "0.0120 [0.0100, 0.0200]"),
        ([1e-5, 1e-5, 2e-5], "1.00e-05 [1.00e-05, 2.00e-05]"),
        ([2e6, 1e6, 3e6], "2.00e+06 [1.00e+06, 3.00e+06]"),
        ([0.0, 0.0, 0.0], "0.000 [0.000, 0.000]"),
        ([NAN, 0, 1], "nan [0.000, 1.000]"),
    ],
)
def test_numbers_have_as_many_digits_as_their_size_wants(values, text):
    assert with_interval(*values, places(values)) == text


def test_a_number_without_an_interval_stands_alone():
    assert with_interval(-0.0001, NAN, NAN, places([1])) == "0.000"


def test_many_rows_take_little_memory_and_time():
    import tracemalloc

    random = np.random.default_rng(0)
    image, values = np.repeat(np.arange(20_000), 2), random.normal(size=40_000)
    tracemalloc.start()
    found = [estimate(values, image, name) for name in ("mean", "p10")]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6
    assert found[0].high - found[0].low == pytest.approx(2 * 1.96 / 200, rel=0.1)


def test_nothing_here_needs_torch():
    names = ("intervals", "gates", "scoretable", "leaderboard", "plots")
    script = "import sys\n" + "".join(f"import xcli.{name}\n" for name in names)
    script += "for name in ('torch', 'matplotlib', 'scipy'):\n    assert name not in sys.modules, name\n"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
