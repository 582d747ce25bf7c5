"""The figures of one column: which metrics there are, and one figure of each from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Gallery
from draftcli.metrics.diversity import (
    NEIGHBOURS,
    DiversityKept,
    cosine_diversity,
    frechet_distance,
    kernel_distance,
    log_spectral_distance,
    neighbourhoods,
    spectral_distance,
    squared_diversity,
    vendi_score,
)
from draftcli.metrics.signs import near_duplicates
from draftcli.metrics.statistics import direction, estimate, paired, win_rate
from draftcli.metrics.thumbnails import pairwise_distance

ENOUGH = 10 * NEIGHBOURS  # pictures that neighbourhoods and the kernel distance need


@dataclass(frozen=True)
class Metric:
    """What a figure is of.

    Attributes:
        key: in metrics.json.
        label: for people.
        group: reward, diversity, distance, sign or cost.
        better: 1 where more is better, -1 where less is, 0 where neither is.
        digits: after the point.
        about: one line on what it is.
    """

    key: str
    label: str
    group: str
    better: int
    digits: int
    about: str = ""

    @classmethod
    def of_reward(cls, name: str, better: int = 1) -> Metric:
        """The metric of the reward `name`."""
        return cls(f"reward/{name}", name, "reward", better, 3)


def _diversity(key: str, label: str, digits: int, about: str) -> Metric:
    return Metric(key, label, "diversity", 1, digits, about)


def _distance(key: str, label: str, about: str) -> Metric:
    return Metric(key, label, "distance", -1, 4, about)


def _sign(key: str, about: str) -> Metric:
    return Metric(key, key.replace("_", " "), "sign", 0, 3, about)


COSINE = _diversity("cosine_diversity", "1 - cosine", 3, "1 - mean pairwise cosine of a prompt's images")
SQUARED = _diversity("squared_diversity", "squared distance", 2, "mean squared distance of a prompt's images")
VENDI = _diversity("vendi", "Vendi score", 2, "effective number of different images of a prompt")
PIXELS = _diversity(
    "pixel_diversity", "pixels", 3, "mean root mean squared distance of the thumbnails of a prompt's images"
)
DIVERSITY: dict[Metric, Callable[[np.ndarray], float]] = {
    COSINE: cosine_diversity,
    SQUARED: squared_diversity,
    VENDI: vendi_score,
}
NEIGHBOURHOODS = tuple(  # their keys are the attributes of `Neighbourhoods`
    Metric(key, key, "distance", better, 3, about)
    for key, better, about in (
        ("recall", 1, "share of the base's images near an image of this column: how much of the base is still covered"),
        ("precision", 1, "share of this column's images near one of the base's: how much stays close to the base"),
        ("density", 0, "how many neighbourhoods of base images hold an image, over k"),
        ("coverage", 1, "share of the base's neighbourhoods that hold an image"),
    )
)
KERNEL = _distance("kid", "kernel", "unbiased squared MMD to the base, cubic kernel (KID where Inception's)")
DISTANCES: dict[Metric, Callable[[np.ndarray, np.ndarray], float]] = {
    _distance("spectral", "spectral", "norm of the difference of the features' covariance spectra"): spectral_distance,
    _distance("log_spectral", "log spectral", "the same on log10 of the spectra"): log_spectral_distance,
    _distance("fid", "Fréchet", "Fréchet distance to the base (FID where features are Inception's)"): frechet_distance,
    KERNEL: kernel_distance,
}
NEAR_DUPLICATES = _sign("near_duplicates", "share of images that look like one of another prompt")
SIGN_METRICS = (  # but the last, their keys are those of `metrics.signs.SIGNS`
    _sign("saturation", "mean HSV saturation"),
    _sign("contrast", "standard deviation of luma"),
    _sign("edge_density", "share of pixels with an edge"),
    _sign("colour_entropy", "entropy of colours, bits"),
    _sign("high_frequency_energy", "share of variance above half the Nyquist frequency"),
    _sign("clipped", "share of channel values at the bottom or the top of their range"),
    NEAR_DUPLICATES,
)
EVALUATIONS = Metric("evaluations", "UNet evaluations", "cost", -1, 0, "of one image: steps (guided: 2) x networks")
SECONDS = Metric("seconds", "seconds", "cost", -1, 2, "of one image, on the machine that generated it")


def metrics_of(rewards: Mapping[str, int]) -> list[Metric]:
    """Every metric, in the order of metrics.json and of the report.

    Args:
        rewards: by name, 1 where higher scores are better and -1 where lower ones are.
    """
    return [
        *(Metric.of_reward(name, better) for name, better in rewards.items()), *DIVERSITY, PIXELS, *NEIGHBOURHOODS,
        *DISTANCES, *SIGN_METRICS, EVALUATIONS, SECONDS,
    ]  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One metric of one column. What does not apply is None; an interval of a single prompt is NaN.

    Attributes:
        value: the mean over prompts, or what a whole set has; None where it could not be measured.
        median: over pictures, or over prompts where a metric has one value a prompt.
        low: lower bound of the 95 % interval of the value.
        high: upper bound.
        n: how many values there were.
        difference: to the base, paired; None in the base itself.
        difference_low: lower bound of its 95 % interval.
        difference_high: upper bound.
        win_rate: how often it is above the base, in [0, 1], ties half.
        win_low: lower bound of its 95 % interval.
        win_high: upper bound.
        why: there is no value.
        kept: of diversity alone: the value as a share of the base's, in [0, inf).
        kept_low: lower bound of its 95 % interval.
        kept_high: upper bound.
    """

    value: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    win_rate: float | None = None
    win_low: float | None = None
    win_high: float | None = None
    why: str | None = None
    kept: float | None = None
    kept_low: float | None = None
    kept_high: float | None = None

    @property
    def diversity_kept(self) -> DiversityKept | None:
        """`kept` with its interval; None for the base, and for what is no diversity."""
        if self.kept is None or self.kept_low is None or self.kept_high is None:
            return None
        return DiversityKept(self.kept, self.kept_low, self.kept_high)

    @property
    def direction(self) -> int:
        """1 or -1 where the interval of the difference to the base is above or below 0; else 0."""
        return direction(self.difference_low, self.difference_high)

    def wins(self, better: int) -> float | None:
        """How often it is better than the base, in [0, 1], ties half: `win_rate`, or the rest where less is better."""
        return self.win_rate if self.win_rate is None or better > 0 else 1 - self.win_rate

    def to_json(self) -> dict[str, Any]:
        """The figure in metrics.json: "value" and what applies."""
        return {name: value for name, value in asdict(self).items() if name == "value" or value is not None}


@dataclass(frozen=True)
class Figures:
    """Every figure of one column."""

    by_key: Mapping[str, Figure]

    def __getitem__(self, metric: Metric) -> Figure:
        return self.by_key[metric.key]

    def reward(self, name: str) -> Figure:
        """Of the reward `name`."""
        return self[Metric.of_reward(name)]

    @property
    def diversity(self) -> Figure:
        """The one that the Pareto front, the recommendation and the plots go by: 1 - cosine."""
        return self[COSINE]

    def to_json(self) -> dict[str, Any]:
        """The column's figures in metrics.json."""
        return {key: figure.to_json() for key, figure in self.by_key.items()}


def column_figures(column: Gallery, here: Measured, base: Measured | None, groups: np.ndarray) -> Figures:
    """Every figure of one column.

    Args:
        column: says what a picture cost.
        here: what was measured of it, n pictures.
        base: the same of the base; None where this is the base.
        groups: (n,) the number of each picture's prompt.
    """
    figures = {
        Metric.of_reward(name): _figure(scores, groups, None if base is None else base.scores[name])
        for name, scores in here.scores.items()
    }
    figures |= _diversities(here, base, groups) | _distances(here, base, groups)
    for metric in SIGN_METRICS:
        against = None if base is None else _sign_values(metric, base, groups)
        figures[metric] = _figure(_sign_values(metric, here, groups), groups, against)
    for metric, value in ((EVALUATIONS, column.evaluations), (SECONDS, column.seconds)):
        figures[metric] = Figure(why="unknown") if value is None else Figure(float(value))
    return Figures({metric.key: figure for metric, figure in figures.items()})


def _diversities(here: Measured, base: Measured | None, groups: np.ndarray) -> dict[Metric, Figure]:
    """One value a prompt, from the pictures of that prompt."""
    each = int(np.bincount(groups).min())
    if each < 2:
        return {metric: Figure(why=f"needs 2 images a prompt, has {each}") for metric in (*DIVERSITY, PIXELS)}

    def by_prompt(metric: Metric, measured: Measured) -> np.ndarray:
        if metric is PIXELS:
            return pairwise_distance(measured.thumbnails, groups.tolist())
        return np.array([DIVERSITY[metric](measured.features[groups == group]) for group in np.unique(groups)])

    prompts = np.arange(len(np.unique(groups)))
    figures = {}
    for metric in (*DIVERSITY, PIXELS):
        values, against = by_prompt(metric, here), None if base is None else by_prompt(metric, base)
        figure = _figure(values, prompts, against)
        kept = None if against is None else DiversityKept.of(against, values)
        if kept is not None:
            figure = replace(figure, kept=kept.share, kept_low=kept.low, kept_high=kept.high)
        figures[metric] = figure
    return figures


def _distances(here: Measured, base: Measured | None, groups: np.ndarray) -> dict[Metric, Figure]:
    """Where the column is as seen from the base's pictures."""
    if base is None:
        return {metric: Figure(why="reference") for metric in (*NEIGHBOURHOODS, *DISTANCES)}
    count, width = here.features.shape
    figures: dict[Metric, Figure] = {}
    if count < ENOUGH:
        why = f"needs {ENOUGH} images for k = {NEIGHBOURS}, has {count}"
        figures |= {metric: Figure(why=why) for metric in NEIGHBOURHOODS}
    else:
        terms = neighbourhoods(base.features, here.features, NEIGHBOURS)
        figures |= {metric: _figure(getattr(terms, metric.key), groups, None) for metric in NEIGHBOURHOODS}
    for metric, function in DISTANCES.items():
        needed = ENOUGH if metric is KERNEL else width + 1
        if count < needed:
            figures[metric] = Figure(why=f"needs {needed} images for {width} features, has {count}")
        else:
            figures[metric] = Figure(function(base.features, here.features), n=count)
    return figures


def _sign_values(metric: Metric, measured: Measured, groups: np.ndarray) -> np.ndarray:
    return near_duplicates(measured.thumbnails, groups) if metric is NEAR_DUPLICATES else measured.signs[metric.key]


def _figure(values: np.ndarray, groups: np.ndarray, base: np.ndarray | None) -> Figure:
    """Mean, median, interval; against `base` also the paired difference and the win rate."""
    found = estimate(values, groups)
    if not found.n:
        return Figure(why="not applicable to these prompts")
    if base is None:
        return Figure(found.mean, found.median, found.low, found.high, found.n)
    against, wins = paired(base, values, groups), win_rate(base, values, groups)
    return Figure(
        found.mean, found.median, found.low, found.high, found.n,
        against["difference"], against["low"], against["high"], wins.mean, wins.low, wins.high,
    )  # fmt: skip
