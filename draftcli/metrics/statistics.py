"""Means with intervals, and paired comparisons of two samples. What is resampled is the prompt.

Pictures of one prompt resemble each other, so n pictures of p prompts are no n independent observations. Where `groups`
says which prompt each value belongs to, values are averaged by group first, and the bootstrap (Efron & Tibshirani 1993,
percentile method, through scipy) draws groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 10_000
NO_WIDTH = 1e-9  # of an interval, relative to its bounds: what rounding leaves where all values are equal
Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it can be trusted.

    Attributes:
        mean: of the groups' means; NaN where there is nothing.
        median: of the values themselves.
        low: lower bound of the 95 % interval of the mean; NaN with fewer than two groups.
        high: upper bound.
        n: how many values there were, NaN left out.
    """

    mean: float
    median: float
    low: float
    high: float
    n: int


def estimate(values: Values, groups: Sequence[int] | np.ndarray | None = None) -> Estimate:
    """Mean, median and 95 % interval of `values` (n,); NaN are left out.

    Args:
        values: (n,)
        groups: (n,) whole numbers, such as the number of each value's prompt; None: every value is a group of its own.
    """
    values = np.asarray(values, float)
    valid = ~np.isnan(values)
    if not valid.any():
        nan = float("nan")
        return Estimate(nan, nan, nan, nan, 0)
    means = _group_means(values[valid], None if groups is None else np.asarray(groups)[valid])
    return Estimate(float(means.mean()), float(np.median(values[valid])), *_interval(means), int(valid.sum()))


def or_nan(value: float | None) -> float:
    """A number of a file of figures, which have null where a number is NaN, as JSON knows no NaN."""
    return math.nan if value is None else value


def has_interval(low: float | None, high: float | None) -> bool:
    """Whether two bounds are an interval, from which something follows.

    False where they are missing or NaN (fewer than two prompts, or no scores), and where they are one number: all
    values were equal, and how far they might have been apart is not known.
    """
    if low is None or high is None or not math.isfinite(low + high):
        return False
    return high - low > NO_WIDTH * max(abs(low), abs(high))


def direction(low: float | None, high: float | None) -> int:
    """1 or -1 where the interval of a difference lies above or below 0; 0 where it does neither, or there is none."""
    if low is None or high is None or not has_interval(low, high):
        return 0
    return int(low > 0) - int(high < 0)


def paired(base: Values, tuned: Values, groups: Sequence[int] | np.ndarray | None = None) -> dict[str, float]:
    """Means of two paired samples (n,), their difference, and its paired bootstrap 95 % interval (10,000 resamples).

    Pairs with a NaN (a reward without a score for that prompt) are left out; with fewer than two pairs (or groups) the
    interval is NaN.

    Args:
        base: (n,)
        tuned: (n,)
        groups: see `estimate`.
    """
    base, tuned, kept = _pairs(base, tuned, groups)
    difference = estimate(tuned - base, kept)
    return {
        "base": _mean(base, kept),
        "tuned": _mean(tuned, kept),
        "difference": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "n": difference.n,
    }


def ratio(base: Values, tuned: Values) -> Estimate:
    """The mean of `tuned` (n,) as a share of that of `base` (n,), which is positive; both of one prompt are a pair.

    The interval resamples pairs, so that it lies below 1 where that of the difference lies below 0; NaN with fewer than
    two pairs. The median is that of the pairs' own ratios.
    """
    base, tuned, _ = _pairs(base, tuned, None)
    if not len(base) or not base.mean() > 0:
        return Estimate(math.nan, math.nan, math.nan, math.nan, len(base))
    share = float(tuned.mean() / base.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        median = float(np.median(tuned / base))
    low, high = (math.nan, math.nan) if len(base) < 2 else _ratio_interval(base, tuned)
    return Estimate(share, median, low, high, len(base))


def _ratio_interval(base: np.ndarray, tuned: np.ndarray) -> tuple[float, float]:
    if np.ptp(base) == np.ptp(tuned) == 0:
        return float(tuned[0] / base[0]), float(tuned[0] / base[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = bootstrap(
            (base, tuned), _share, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
            rng=np.random.default_rng(0), batch=500,
        ).confidence_interval  # fmt: skip
    return float(bounds.low), float(bounds.high)


def _share(base: np.ndarray, tuned: np.ndarray, axis: int = -1) -> np.ndarray:
    return tuned.mean(axis) / base.mean(axis)


def win_rate(base: Values, tuned: Values, groups: Sequence[int] | np.ndarray | None = None) -> Estimate:
    """How often `tuned` (n,) is above `base` (n,), ties counting half, with its interval. In [0, 1]."""
    base, tuned, kept = _pairs(base, tuned, groups)
    return estimate((np.sign(tuned - base) + 1) / 2, kept)


def _pairs(base: Values, tuned: Values, groups: Values | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    base, tuned = np.asarray(base, float), np.asarray(tuned, float)
    valid = ~np.isnan(base + tuned)
    return base[valid], tuned[valid], None if groups is None else np.asarray(groups)[valid]


def _mean(values: np.ndarray, groups: np.ndarray | None) -> float:
    return float(_group_means(values, groups).mean()) if len(values) else float("nan")


def _group_means(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    if groups is None:
        return values
    _, index = np.unique(groups, return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Bounds of the 95 % percentile bootstrap interval of the mean of `values` (n,)."""
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    bounds = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), batch=500
    ).confidence_interval
    return float(bounds.low), float(bounds.high)
