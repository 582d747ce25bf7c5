"""What an evaluation found, as sentences that can be quoted: every word of them rests on a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftcli.evaluation.compare import ColumnComparison
from draftcli.evaluation.figures import EVALUATIONS, Figure, Figures
from draftcli.metrics.diversity import DiversityKept
from draftcli.metrics.statistics import has_interval
from draftcli.pages.numbers import signed, significant

TUNED = "tuned"  # the column of the fine-tuned network as it is


@dataclass(frozen=True)
class Use:
    """Which column is best for what.

    Attributes:
        purpose: what a reader may want.
        column: which serves that best.
        why: the figures behind it.
    """

    purpose: str
    column: str
    why: str


@dataclass(frozen=True)
class EvaluationVerdict:
    """The result in words.

    Attributes:
        column: the one that `sentence` is about.
        sentence: what rose and what it cost; a few whole sentences.
        uses: what to use when.
    """

    column: str
    sentence: str
    uses: Sequence[Use]


def find_verdict(comparison: ColumnComparison, prompts: int, images: int) -> EvaluationVerdict:
    """The verdict on the fine-tuned network as it is, else on the recommended column, else on the last one.

    Args:
        comparison: of at least one column with the base, or of the base alone.
        prompts: how many there were.
        images: of each prompt.
    """
    names = list(comparison.figures)
    others = [name for name in names if name != comparison.base]
    if not others:
        return EvaluationVerdict(comparison.base, f"{comparison.base} was compared with nothing.", ())
    column = TUNED if TUNED in others else comparison.recommendation.column or others[-1]
    figures, base = comparison.figures[column], comparison.base
    rewards = sorted(comparison.rewards, key=lambda reward: (reward != comparison.judge, reward in comparison.trained))
    found = [
        reward_change(reward, figures.reward(reward), comparison.role(reward), comparison.better(reward))
        for reward in rewards
    ]
    over = f"Over {prompts} {_plural('prompt', prompts)} with {images} {_plural('image', images)} each"
    changes = "; ".join(filter(None, found)) or "no reward could be measured"
    sentences = [
        f"{over}, {column} was compared with {base}: {changes}.",
        _cost(figures, comparison.figures[base], base),
    ]
    return EvaluationVerdict(column, " ".join(filter(None, sentences)), _uses(comparison))


def reward_change(reward: str, figure: Figure, role: str, better: int = 1) -> str:
    """What became of a reward, with its interval and how often it is higher, or lower where that is better; empty where
    it was not measured.
    """
    if figure.value is None or figure.difference is None:
        return ""
    before = figure.value - figure.difference
    values = f"from {significant(before)} to {significant(figure.value)}"
    low, high = figure.difference_low, figure.difference_high
    if low is None or high is None or not has_interval(low, high):
        return f"{reward} ({role}) goes {values}, and there is no interval to judge that by"
    interval = f"{signed(figure.difference)}, 95 % interval {signed(low)} to {signed(high)}"
    rate, side = figure.wins(better), "higher" if better > 0 else "lower"
    wins = "" if rate is None else f"; {side} in {100 * rate:.3g} % of pairs"
    if not figure.direction:
        return f"{reward} ({role}) does not change measurably ({interval}{wins})"
    verb = "rises" if figure.direction > 0 else "falls"
    return f"{reward} ({role}) {verb} {values} ({interval}{wins})"


def cost_in_words(kept: DiversityKept | None, base: str) -> str:
    """How much diversity is left; empty where it was not measured."""
    return "" if kept is None else f"{kept.words} of the diversity of {base}"


def _cost(figures: Figures, of_base: Figures, base: str) -> str:
    kept = cost_in_words(figures.diversity.diversity_kept, base)
    parts = [f"It keeps {kept}." if kept else "How much diversity it keeps was not measured."]
    now, before = figures[EVALUATIONS].value, of_base[EVALUATIONS].value
    if now is not None and before is not None and now != before:
        parts.append(f"An image takes {now:g} UNet evaluations instead of {before:g}.")
    return " ".join(parts)


def _uses(comparison: ColumnComparison) -> list[Use]:
    """The balance that `--prefer` asks for, the best reward, and the most diversity."""
    judge, base, sign = comparison.judge, comparison.base, comparison.better(comparison.judge)
    raises, highest = ("raises", "highest") if sign > 0 else ("lowers", "lowest")
    if comparison.figures[base].reward(judge).value is None:
        return []
    picked = comparison.recommendation.column
    better = [name for name, f in comparison.figures.items() if name != base and f.reward(judge).direction == sign]
    best = max(better, key=lambda name: sign * (comparison.figures[name].reward(judge).value or 0), default=None)
    varied = {name: f.diversity.value for name, f in comparison.figures.items() if f.diversity.value is not None}
    uses = [Use("a balance of reward and diversity", picked or base, _why(comparison, picked or base))]
    if best is None:
        return [Use("anything", base, f"no column {raises} {judge} by more than its interval")] if not picked else uses
    uses.append(Use(f"the {highest} {judge}", best, _why(comparison, best)))
    if varied:
        most = max(varied, key=lambda name: varied[name])
        certain = most != base and comparison.figures[most].diversity.direction > 0
        uses.append(Use("the most diversity", most if certain else base, _why(comparison, most if certain else base)))
    return uses


def _why(comparison: ColumnComparison, column: str) -> str:
    if column == comparison.base:
        return "the base itself"
    figures, judge = comparison.figures[column], comparison.judge
    change = figures.reward(judge).difference
    parts = [] if change is None else [f"{judge} {signed(change)}"]
    parts.append(cost_in_words(figures.diversity.diversity_kept, comparison.base))
    return ", ".join(filter(None, parts))


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
