"""Reward hacking: one rule, for the validations of a training and for the columns of an evaluation.

The rule has two parts, and each alone is enough.

1. A reward, as a mean over held-out prompts, has fallen from its best earlier value by more than half the width of the
   95 % interval of its difference to the base, and has lost more than half of what it had gained over the base by then,
   while a trained reward is higher than it was at that time. A training that has found what there is to gain goes up
   and down by a part of its gain for a long time; one that is hacked loses all of it, and more.
2. Signs are far from the base's (`SignChange.is_far`) while a trained reward is surely higher than the base's: three or
   more of them, or two where no held-out reward is surely higher, so that nobody else praises what the trained reward
   does. "Surely" is by the 95 % interval of the paired difference. One sign alone says nothing, as a reward may well
   want more contrast; and three count whatever others say, as judges that learned alike are fooled alike.

In a training the earlier values are those of the validations before. In an evaluation the only earlier value is the
base's, which has gained nothing: the fall is then the difference itself, and it exceeds half the interval's width where
the interval lies below 0 (exactly so where the difference is in its middle). Without an interval there is no verdict.

A trained reward can fall too: while another trained one rises, or while it rises on the prompts of the training itself.
Where lower scores of a reward are wanted, the rule takes its negative, which it calls `-NAME`. A reward of weight 0 is
a judge as one that is held out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from draftcli.metrics.statistics import direction, has_interval, or_nan

NAN = math.nan
LARGE_DRIFT = 0.25  # relative change of a sign that is far
LARGE_SHARE = 0.1  # rise that is far for the signs of IN_ABSOLUTE
LARGE_LOSS = 0.5  # what is left of the signs of LOST, where less is far
LARGE_FALL = 0.5  # share of what a reward had gained over the base
# Shares of values or pictures, which may be 0 in the base, and what they are called.
IN_ABSOLUTE = {"clipped": "the share of clipped values", "near_duplicates": "the share of near duplicates"}
LOST = ("diversity", "batch_spread")  # more of them is no sign of anything
SIGNS_TOGETHER, SIGNS_ALONE = 2, 3  # so many far signs, where no held-out reward agrees; and where one does


@dataclass(frozen=True)
class RewardMean:
    """One reward over the held-out prompts.

    Attributes:
        mean: score of the tuned network; NaN where no prompt could be scored.
        low: lower bound of the 95 % interval of its paired difference to the base; NaN where it is unknown.
        high: upper bound.
        gained: the difference itself; NaN where it is unknown.
    """

    mean: float
    low: float = NAN
    high: float = NAN
    gained: float = NAN

    @property
    def margin(self) -> float:
        """Half the width of the interval: what a fall must exceed; NaN, which nothing exceeds, where there is none."""
        return (self.high - self.low) / 2 if has_interval(self.low, self.high) else NAN


@dataclass(frozen=True)
class SignChange:
    """What became of one sign, as a mean over pictures or prompts, against the base at the same prompts and seeds.

    Attributes:
        name: of `metrics.signs`, near_duplicates, diversity (the distance of one prompt's pictures), or batch_spread
            (the deviation of the trained reward within a batch, whose `base` is its mean over the first steps).
        base: of the base.
        tuned: of the tuned network.
        low: lower bound of the 95 % interval of the paired difference; NaN where it is unknown.
        high: upper bound.
    """

    name: str
    base: float
    tuned: float
    low: float = NAN
    high: float = NAN

    @property
    def is_far(self) -> bool:
        """Whether it surely changed by much: by more than a quarter of the base's value, up or down. Shares that may
        be 0 matter where they rose by more than 0.1; diversity and spread where more than half of them is lost.
        """
        where = direction(self.low, self.high)
        if self.name in IN_ABSOLUTE:
            return where > 0 and self.tuned - self.base > LARGE_SHARE
        if self.name in LOST:
            return where < 0 and self.tuned < LARGE_LOSS * self.base
        return where != 0 and self.base > 0 and abs(self.tuned / self.base - 1) > LARGE_DRIFT

    @property
    def words(self) -> str:
        """Such as "edge density is 0.4 times the base's"."""
        if self.name in IN_ABSOLUTE:
            return f"{IN_ABSOLUTE[self.name]} is {self.tuned:.2g}, the base's {self.base:.2g}"
        times = self.tuned / self.base if self.base else NAN
        if self.name == "batch_spread":
            return f"the spread of the trained reward within a batch is {times:.2g} times what it was at first"
        return f"{self.name.replace('_', ' ')} is {times:.2g} times the base's"


@dataclass(frozen=True)
class Standing:
    """How a network scores at one time.

    Attributes:
        when: "step 40" or "base", for people.
        rewards: by name.
        in_training: mean reward of the training steps since the standing before; NaN where it is unknown.
        signs: those that were measured.
    """

    when: str
    rewards: Mapping[str, RewardMean] = field(default_factory=dict)
    in_training: float = NAN
    signs: Sequence[SignChange] = ()

    @classmethod
    def of_validation(cls, line: Mapping[str, Any]) -> Standing:
        """From a line of validation.jsonl, where null stands for NaN."""
        rewards = {
            name: RewardMean(*(or_nan(figures.get(key)) for key in ("tuned", "low", "high", "difference")))
            for name, figures in line["rewards"].items()
        }
        return cls(f"step {line['step']}", rewards, or_nan(line.get("training_reward")), sign_changes(line))


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
    """The verdict: at least one fall, or far signs.

    Attributes:
        falls: rewards that fell while a trained one rose.
        signs: those that are far, where there are enough of them; else none.
        rose: the trained reward that is surely higher than the base's meanwhile; None without signs.
    """

    falls: tuple[Fall, ...]
    signs: tuple[SignChange, ...] = ()
    rose: str | None = None

    def sentence(self, prompts: str) -> str:
        """The verdict for people, without a full stop; `prompts` says on which prompts the rewards were measured."""
        falls = [
            f"{fall.reward} on {prompts} fell by {fall.by:.3g} against {fall.since} while "
            + ("the reward in training rose" if fall.rose is None else f"{fall.rose}, which was trained on, rose")
            for fall in self.falls
        ]
        if self.signs:
            together = ", ".join(sign.words for sign in self.signs)
            falls.append(f"{together}, while {self.rose}, which was trained on, rose")
        return f"{'; '.join(falls)}: this looks like reward hacking"


def find_hacking(history: Sequence[Standing], trained: Mapping[str, int]) -> Hacking | None:
    """Whether the newest standing looks like reward hacking; the rule is at the top of this file.

    Args:
        history: the newest last; at least one.
        trained: the rewards that are trained on, by name: 1 where higher scores are wanted, -1 where lower.

    Returns:
        None where nothing does.
    """
    *earlier, now = [_higher_is_better(standing, trained) for standing in history]
    wanted = [_wanted(name, trained) for name in trained]
    falls = [fall for name in now.rewards if (fall := _fall(name, earlier, now, wanted)) is not None]
    signs, rose = _signs_that_convict(now, wanted)
    return Hacking(tuple(falls), signs, rose) if falls or signs else None


def sign_changes(line: Mapping[str, Any]) -> list[SignChange]:
    """What a line of validation.jsonl says of signs, diversity first; lines of older versions have diversity alone."""
    figures = {"diversity": line.get("diversity"), **(line.get("signs") or {})}
    keys = ("base", "tuned", "low", "high")
    return [SignChange(name, *(or_nan(f.get(key)) for key in keys)) for name, f in figures.items() if f]


def _wanted(name: str, trained: Mapping[str, int]) -> str:
    """What is to rise: the reward, or `-NAME` where lower scores of it are wanted."""
    return f"-{name}" if trained.get(name, 1) < 0 else name


def _higher_is_better(standing: Standing, trained: Mapping[str, int]) -> Standing:
    """The same with the negative of each reward whose lower scores are wanted."""
    rewards = {
        _wanted(name, trained): RewardMean(-reward.mean, -reward.high, -reward.low, -reward.gained)
        if trained.get(name, 1) < 0
        else reward
        for name, reward in standing.rewards.items()
    }
    return replace(standing, rewards=rewards)


def _fall(name: str, earlier: Sequence[Standing], now: Standing, trained: Collection[str]) -> Fall | None:
    known = [standing for standing in earlier if not math.isnan(_mean(standing, name))]
    if not known:
        return None
    best = max(known, key=lambda standing: _mean(standing, name))
    by = _mean(best, name) - _mean(now, name)
    gained = best.rewards[name].gained
    if not by > now.rewards[name].margin or by <= LARGE_FALL * gained:  # nor where one of the first two is NaN
        return None
    risen = [other for other in trained if _mean(now, other) > _mean(best, other)]
    if risen or now.in_training > best.in_training:
        return Fall(name, by, best.when, risen[0] if risen else None)
    return None


def _signs_that_convict(now: Standing, trained: Collection[str]) -> tuple[tuple[SignChange, ...], str | None]:
    """The far signs and the trained reward that has surely risen, where there are enough of them; else none."""
    risen = [name for name, reward in now.rewards.items() if direction(reward.low, reward.high) > 0]
    rose = next((name for name in risen if name in trained), None)
    far = tuple(sign for sign in now.signs if sign.is_far)
    others_agree = any(name not in trained for name in risen)
    if rose is None or len(far) < (SIGNS_ALONE if others_agree else SIGNS_TOGETHER):
        return (), None
    return far, rose


def _mean(standing: Standing, name: str) -> float:
    return standing.rewards[name].mean if name in standing.rewards else NAN
