"""Reward hacking: one rule, for the validations of a training and for the columns of an evaluation.

The rule: a reward, as a mean over held-out prompts, has fallen from its best earlier value by more than half the width
of the 95 % interval of its difference to the base, while a trained reward is higher than it was at that time.

In a training the earlier values are those of the validations before. In an evaluation the only earlier value is the
base's: the fall is then the difference itself, and it exceeds half the interval's width where the interval lies below 0
(exactly so where the difference is in its middle). Without an interval there is no verdict.

A trained reward can fall too: while another trained one rises, or while it rises on the prompts of the training itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from draftcli.metrics.statistics import has_interval

NAN = math.nan


@dataclass(frozen=True)
class RewardMean:
    """One reward over the held-out prompts.

    Attributes:
        mean: score of the tuned network; NaN where no prompt could be scored.
        low: lower bound of the 95 % interval of its paired difference to the base; NaN where it is unknown.
        high: upper bound.
    """

    mean: float
    low: float = NAN
    high: float = NAN

    @property
    def margin(self) -> float:
        """Half the width of the interval: what a fall must exceed; NaN, which nothing exceeds, where there is none."""
        return (self.high - self.low) / 2 if has_interval(self.low, self.high) else NAN


@dataclass(frozen=True)
class Standing:
    """How a network scores at one time.

    Attributes:
        when: "step 40" or "base", for people.
        rewards: by name.
        in_training: mean reward of the training steps since the standing before; NaN where it is unknown.
    """

    when: str
    rewards: Mapping[str, RewardMean] = field(default_factory=dict)
    in_training: float = NAN

    @classmethod
    def of_validation(cls, line: Mapping[str, Any]) -> Standing:
        """From a line of validation.jsonl, where null stands for NaN."""
        rewards = {
            name: RewardMean(*(_number(figures[key]) for key in ("tuned", "low", "high")))
            for name, figures in line["rewards"].items()
        }
        return cls(f"step {line['step']}", rewards, _number(line.get("training_reward")))


@dataclass(frozen=True)
class Fall:
    """A reward that fell while a trained one rose.

    Attributes:
        reward: what fell.
        by: how much, in the reward's own unit.
        since: when it was at its best.
        rose: the trained reward that rose meanwhile; None where it is the mean reward of the training steps.
    """

    reward: str
    by: float
    since: str
    rose: str | None


@dataclass(frozen=True)
class Hacking:
    """The verdict: at least one fall."""

    falls: tuple[Fall, ...]

    def sentence(self, prompts: str) -> str:
        """The verdict for people, without a full stop; `prompts` says on which prompts the rewards were measured."""
        falls = [
            f"{fall.reward} on {prompts} fell by {fall.by:.3g} against {fall.since} while "
            + ("the reward in training rose" if fall.rose is None else f"{fall.rose}, which was trained on, rose")
            for fall in self.falls
        ]
        return f"{'; '.join(falls)}: this looks like reward hacking"


def find_hacking(history: Sequence[Standing], trained: Collection[str]) -> Hacking | None:
    """Whether the newest standing looks like reward hacking; the rule is at the top of this file.

    Args:
        history: the newest last; at least one.
        trained: names of the rewards that are trained on.

    Returns:
        None where nothing does.
    """
    *earlier, now = history
    falls = [fall for name in now.rewards if (fall := _fall(name, earlier, now, trained)) is not None]
    return Hacking(tuple(falls)) if falls else None


def training_warning(validations: Sequence[Mapping[str, Any]], trained: Collection[str]) -> str | None:
    """What a run says after the newest of its `validations`, the lines of validation.jsonl; None: nothing."""
    verdict = find_hacking([Standing.of_validation(line) for line in validations], trained)
    if verdict is None:
        return None
    return (
        f"{verdict.sentence('held-out prompts')}. Look at samples/; stop here, or raise draftp.kl_coeff or lower "
        "optim.lr in a new run"
    )


def _fall(name: str, earlier: Sequence[Standing], now: Standing, trained: Collection[str]) -> Fall | None:
    known = [standing for standing in earlier if not math.isnan(_mean(standing, name))]
    if not known:
        return None
    best = max(known, key=lambda standing: _mean(standing, name))
    by = _mean(best, name) - _mean(now, name)
    if not by > now.rewards[name].margin:  # nor where one of them is NaN
        return None
    risen = [other for other in trained if _mean(now, other) > _mean(best, other)]
    if risen or now.in_training > best.in_training:
        return Fall(name, by, best.when, risen[0] if risen else None)
    return None


def _mean(standing: Standing, name: str) -> float:
    return standing.rewards[name].mean if name in standing.rewards else NAN


def _number(value: float | None) -> float:
    return NAN if value is None else value
