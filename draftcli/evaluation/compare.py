"""From what was measured to conclusions: figures with intervals, the Pareto front, warnings, a recommendation.

The first column is the base; every other one is compared with it picture by picture, at the same prompt and seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from draftcli.evaluation.figures import (
    COSINE,
    PIXELS,
    SIGN_METRICS,
    Figures,
    Metric,
    column_figures,
    metrics_of,
)
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Gallery, Item
from draftcli.metrics.hacking import RewardMean, SignChange, Standing, find_hacking
from draftcli.metrics.roles import reward_role, trained_in_words
from draftcli.metrics.statistics import has_interval

FEW_PROMPTS = 10  # below it intervals are rough


@dataclass(frozen=True)
class Recommendation:
    """Which column to take; None: none of them, keep the base. `why` is for people."""

    column: str | None
    why: str


@dataclass(frozen=True)
class ColumnComparison:
    """Columns beside each other, with what follows from their figures.

    Attributes:
        columns: the base first.
        rewards: names of those that judged.
        judge: the reward of the Pareto front and the recommendation.
        prefer: 1 wants the reward alone, 0 diversity alone.
        trained: those of `rewards` that were trained on: 1 where higher scores are wanted, -1 where lower.
        figures: by the columns' names.
        fronts: by reward, the columns on its Pareto front with diversity.
        recommendation: by judge and preference.
        warnings: whole sentences.
    """

    columns: Sequence[Gallery]
    rewards: Sequence[str]
    judge: str
    prefer: float
    trained: Mapping[str, int]
    figures: Mapping[str, Figures]
    fronts: Mapping[str, Sequence[str]]
    recommendation: Recommendation
    warnings: Sequence[str]

    @property
    def base(self) -> str:
        """The name of the first column."""
        return self.columns[0].name

    @property
    def metrics(self) -> list[Metric]:
        """Those that `figures` has, in their order."""
        return metrics_of({reward: self.better(reward) for reward in self.rewards})

    def better(self, reward: str) -> int:
        """1 where higher scores of a reward are better, -1 where lower ones are."""
        return self.trained.get(reward, 1)

    @property
    def trained_in_words(self) -> str:
        """The rewards that were trained on, for people; empty where there are none."""
        return trained_in_words(self.trained)

    def role(self, reward: str) -> str:
        """Whether a reward was trained on or held out, and whether lower scores of it are better."""
        return reward_role(reward, self.trained)

    def to_json(self) -> dict[str, Any]:
        """The comparison's part of metrics.json; docs/evaluation.md describes it."""
        return {
            "columns": [
                {"name": c.name, "source": c.source, "evaluations": c.evaluations, "seconds": c.seconds}
                for c in self.columns
            ],
            "base": self.base,
            "judge": self.judge,
            "prefer": self.prefer,
            "trained": list(self.trained),
            "metrics": [asdict(metric) for metric in self.metrics],
            "figures": {name: figures.to_json() for name, figures in self.figures.items()},
            "fronts": {reward: list(front) for reward, front in self.fronts.items()},
            "recommendation": asdict(self.recommendation),
            "warnings": list(self.warnings),
        }


def compare(
    columns: Sequence[Gallery],
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    trained: Mapping[str, int],
    judge: str,
    prefer: float = 0.5,
    cautions: Sequence[str] = (),
) -> ColumnComparison:
    """Compare `columns`, the first of which is the base.

    Args:
        columns: what is compared.
        items: prompts and seeds, those of a prompt next to each other.
        measured: by the columns' names.
        trained: rewards that were trained on: 1 where higher scores are wanted, -1 where lower.
        judge: the reward of the Pareto front and the recommendation.
        prefer: 1 wants the reward alone, 0 diversity alone.
        cautions: sentences about what was measured, to be said before all other warnings.
    """
    base = columns[0].name
    prompts = list(dict.fromkeys(item.prompt for item in items))
    groups = np.array([prompts.index(item.prompt) for item in items])
    rewards = list(measured[base].scores)
    figures = {
        c.name: column_figures(c, measured[c.name], None if c.name == base else measured[base], groups) for c in columns
    }
    fronts = {reward: _front(figures, reward, trained.get(reward, 1)) for reward in rewards}
    return ColumnComparison(
        columns=columns,
        rewards=rewards,
        judge=judge,
        prefer=prefer,
        trained={name: sign for name, sign in trained.items() if name in rewards},
        figures=figures,
        fronts=fronts,
        recommendation=recommend(figures, base, judge, fronts[judge], prefer, trained.get(judge, 1)),
        warnings=[
            *cautions,
            *(
                f"{name}: identical images, those of {base}: there is no difference."
                for name, seen in measured.items()
                if name != base and seen.sees_the_same(measured[base])
            ),
            *warnings(figures, base, rewards, trained, len(prompts)),
        ],
    )


def pareto_front(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Whether no other point is at least as good in both and better in one; more is better. (n,) bool, NaN False."""
    points = np.stack([np.asarray(x, float), np.asarray(y, float)], axis=1)
    as_good = np.all(points[None] >= points[:, None], axis=2)
    better = np.any(points[None] > points[:, None], axis=2)
    return np.array([not line.any() for line in as_good & better]) & ~np.isnan(points.sum(1))


def recommend(
    figures: Mapping[str, Figures], base: str, judge: str, front: Sequence[str], prefer: float, better: int = 1
) -> Recommendation:
    """The column of the front nearest to the ideal: the best reward with the most diversity of all columns.

    Both axes are scaled to [0, 1] over the columns; the distance is sqrt(p (1 - reward)^2 + (1 - p) (1 - diversity)^2)
    with p = `prefer` (compromise programming, Zeleny 1973).

    Only columns whose reward is better than the base's are candidates: others cost diversity or buy nothing. Where
    lower scores of the judge are better (`better` -1), its negative is the reward.
    """
    for figure, what in ((figures[base].diversity, "diversity"), (figures[base].reward(judge), judge)):
        if figure.value is None:
            return Recommendation(None, f"{what} was not measured ({figure.why})")
    candidates = [name for name in front if name != base and better * (figures[name].reward(judge).difference or 0) > 0]
    raises, rises = ("raises", "rises") if better > 0 else ("lowers", "falls")
    if not candidates:
        return Recommendation(
            None, f"keep {base}: no column {raises} {judge} and is on its Pareto front with diversity"
        )
    gain = _scaled({name: None if (v := f.reward(judge).value) is None else better * v for name, f in figures.items()})
    varied = _scaled({name: f.diversity.value for name, f in figures.items()})

    def distance(name: str) -> float:
        return float(np.sqrt(prefer * (1 - gain[name]) ** 2 + (1 - prefer) * (1 - varied[name]) ** 2))

    best = min(candidates, key=distance)
    figure, kept = figures[best].reward(judge), figures[best].diversity.diversity_kept
    low, high = figure.difference_low, figure.difference_high
    known = f"95 % {low:+.3g} to {high:+.3g}" if has_interval(low, high) else "no interval"
    text = f"{judge} {figure.difference:+.3g} against {base} ({known})"
    if kept is not None:
        text += f", {kept.words} of its diversity"
    if figure.direction != better:
        text += f"; that {judge} {rises} at all is not certain"
    return Recommendation(best, text)


def warnings(
    figures: Mapping[str, Figures], base: str, rewards: Sequence[str], trained: Mapping[str, int], prompts: int
) -> list[str]:
    """What a reader must not overlook, in whole sentences; only what the intervals are sure of."""
    lines = []
    if prompts == 1:
        lines.append(
            "Only 1 prompt: there are no intervals, so no difference is certain. "
            f"Use at least {FEW_PROMPTS}, preferably 50."
        )
    elif prompts < FEW_PROMPTS:
        lines.append(f"Only {prompts} prompts: every interval is rough. Use at least {FEW_PROMPTS}, preferably 50.")
    for name, figure in figures.items():
        if name == base:
            continue
        before, now = _base_and_column(base, name, figures[base], figure, rewards)
        verdict = find_hacking([before, now], trained)
        if verdict is not None:
            lines.append(f"{name}: {verdict.sentence('these prompts')}.")
        lines += [f"{name}: {line}." for line in _diversity_warnings(figure)]
        drifted = [sign.words for sign in now.signs if sign.is_far and sign.name != "diversity"]
        if drifted and not (verdict and verdict.signs):  # else they were named already
            lines.append(f"{name}: {', '.join(drifted)}.")
    return lines


def _diversity_warnings(figures: Figures) -> list[str]:
    """Of one column: a large loss, and features and pixels that don't agree on whether there is any."""
    measured = {"in features": figures[COSINE].diversity_kept, "in pixels": figures[PIXELS].diversity_kept}
    known = {where: kept for where, kept in measured.items() if kept is not None}
    lines = []
    if lost := [f"{kept.words} of the base's {where}" for where, kept in known.items() if kept.lost_much]:
        lines.append(f"diversity fell to {' and '.join(lost)}")
    features, pixels = measured.values()
    if features is None or pixels is None or not (features.direction or pixels.direction):
        return lines
    if (features.share - 1) * (pixels.share - 1) < 0:
        lines.append(
            f"features and pixels disagree about diversity: {features.words} of the base's is left in features, "
            f"{pixels.words} in pixels; look at the images, or use other features (--features)"
        )
    return lines


def _base_and_column(
    base: str, name: str, of_base: Figures, figures: Figures, rewards: Sequence[str]
) -> list[Standing]:
    """The base and a column as `find_hacking` takes them."""
    before, now = {}, {}
    for reward in rewards:
        figure = figures.reward(reward)
        if figure.value is None or figure.difference is None:
            continue
        before[reward] = RewardMean(figure.value - figure.difference)
        now[reward] = RewardMean(figure.value, _known(figure.difference_low), _known(figure.difference_high))
    signs = [
        SignChange(
            key, _known(was.value), _known(found.value), _known(found.difference_low), _known(found.difference_high)
        )
        for key, metric in {"diversity": PIXELS, **{sign.key: sign for sign in SIGN_METRICS}}.items()
        for was, found in [(of_base[metric], figures[metric])]
    ]
    return [Standing(base, before), Standing(name, now, signs=signs)]


def _front(figures: Mapping[str, Figures], reward: str, better: int) -> list[str]:
    x = [_known(f.diversity.value) for f in figures.values()]
    y = [better * _known(f.reward(reward).value) for f in figures.values()]
    return [name for name, is_on_it in zip(figures, pareto_front(x, y), strict=True) if is_on_it]


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def _scaled(values: Mapping[str, float | None]) -> dict[str, float]:
    known = {name: value for name, value in values.items() if value is not None}
    low, high = min(known.values()), max(known.values())
    return {name: (value - low) / (high - low) if high > low else 1.0 for name, value in known.items()}
