"""Intervals against scipy's own and against values worked out by hand."""

import numpy as np
import pytest
from scipy.stats import norm

from draftcli.metrics.statistics import direction, estimate, has_interval, paired, ratio, win_rate


def test_mean_and_median_leave_out_nan():
    got = estimate([1, 2, 6, np.nan])
    assert (got.mean, got.median, got.n) == (3, 2, 3)
    assert 1 <= got.low < 3 < got.high <= 6


def test_nothing_is_nan_and_one_value_has_no_interval():
    assert np.isnan(estimate([np.nan]).mean)
    assert estimate([np.nan]).n == 0
    one = estimate([4.0])
    assert one.mean == 4
    assert np.isnan([one.low, one.high]).all()


def test_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(3).normal(2, 1, 400)
    got, half = estimate(values), norm.ppf(0.975) * values.std(ddof=1) / 20
    assert got.low == pytest.approx(values.mean() - half, abs=0.01)
    assert got.high == pytest.approx(values.mean() + half, abs=0.01)


def test_prompts_are_what_is_resampled():
    """Ten equal pictures of each of two prompts are two observations, not twenty."""
    values, groups = np.repeat([0.0, 1.0], 10), np.repeat([0, 1], 10)
    assert (estimate(values, groups).low, estimate(values, groups).high) == (0, 1)
    assert estimate(values).high < 0.8


def test_paired_by_prompt():
    got = paired([0, 0, 0, 0], [1, 3, 5, 7], groups=[8, 8, 9, 9])
    assert (got["base"], got["tuned"], got["difference"], got["low"], got["high"], got["n"]) == (0, 4, 4, 2, 6, 4)


def test_ties_are_half_a_win():
    assert win_rate([0, 0, 0, 0], [1, 0, -1, 2]).mean == 0.625
    assert win_rate([0, np.nan], [1, 1]).n == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.2, 0), (0.0, 0.2, 0), (np.nan, np.nan, 0), (0.1, np.nan, 0),
        (np.nan, -0.1, 0), (None, None, 0), (0.1, 0.1, 0), (-0.3, -0.3, 0), (0.0, 0.0, 0), (0.1, 0.1 + 1e-16, 0),
        (1.0, np.inf, 0),
    ],
)  # fmt: skip
def test_without_an_interval_nothing_differs(low, high, expected):
    assert direction(low, high) == expected


def test_a_ratio_agrees_with_its_difference_and_never_goes_below_0():
    random = np.random.default_rng(0)
    for shift in (0.05, 0.4, 0.95, 1.0, 1.2):
        base = random.uniform(0.2, 1, 12)
        tuned = base * shift * random.uniform(0.7, 1.3, 12)
        share, difference = ratio(base, tuned), paired(base, tuned)
        assert share.mean == pytest.approx(tuned.mean() / base.mean())
        assert 0 < share.low < share.mean < share.high
        assert direction(share.low - 1, share.high - 1) == direction(difference["low"], difference["high"])


@pytest.mark.parametrize(("base", "tuned"), [([], []), ([0.0, 0.0], [1.0, 2.0]), ([np.nan], [1.0])])
def test_a_ratio_to_nothing_is_not_known(base, tuned):
    assert np.isnan(ratio(base, tuned).mean)


def test_a_ratio_of_one_prompt_or_of_equal_ones_has_no_interval():
    assert (ratio([2.0], [1.0]).mean, np.isnan(ratio([2.0], [1.0]).low)) == (0.5, True)
    same = ratio([2.0, 2.0], [1.0, 1.0])
    assert not has_interval(same.low, same.high)
