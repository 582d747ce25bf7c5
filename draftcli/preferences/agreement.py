"""How well a reward agrees with the person on answers that it has not seen, and what follows from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from draftcli.metrics.statistics import Estimate, estimate, has_interval, paired
from draftcli.preferences.fit import preference_loss

CHANCE = 0.5
EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the bins in which calibration is looked at
STILL_RISING = 0.01  # in agreement, from half of the pairs to all of them
FEW_REPEATS = 10  # with fewer, how steady the answers are is not said


def agrees(difference: Tensor, label: Tensor) -> np.ndarray:
    """(n,) 1 where the difference of two scores is on the person's side, 0 where not; a tie of either counts half.

    NaN where the scores say nothing.
    """
    scores, answers = np.sign(difference.numpy()), np.sign(label.numpy() - 0.5)
    return (1 + scores * answers) / 2


@dataclass(frozen=True)
class JudgeFigures:
    """A known reward on the same answers.

    Attributes:
        agreement: its own.
        lead: the trained reward's agreement minus its own.
        low: of the 95 % interval of that, by prompt.
        high: likewise.
    """

    agreement: Estimate
    lead: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationBin:
    """Answers of which the reward is about equally sure.

    Attributes:
        sure: the mean of how probable it holds its own side, 0.5 to 1.
        right: the share of them in which that is the person's side.
        n: how many.
    """

    sure: float
    right: float
    n: int


@dataclass(frozen=True)
class Assessment:
    """What is said of a trained reward, all of it on answers that it has not seen.

    Attributes:
        agreement: the share of answers in which it prefers what the person preferred; each prompt counts alike.
        best: the largest share that there can be, as a tie counts half.
        log_loss: mean of -log of what it gave the person's answer; 0.693 is a coin's.
        calibration: by how sure it is.
        judges: other rewards on the same answers, by name.
        steadiness: how often the person chose the same again; None: too few pairs were asked twice.
        curve: agreement by how many answers it was trained on.
    """

    agreement: Estimate
    best: float
    log_loss: float
    calibration: tuple[CalibrationBin, ...]
    judges: Mapping[str, JudgeFigures]
    steadiness: Estimate | None
    curve: Mapping[int, float]

    @property
    def beats_chance(self) -> bool:
        """Whether the interval of the agreement lies above chance."""
        return has_interval(self.agreement.low, self.agreement.high) and self.agreement.low > CHANCE

    @property
    def calibration_error(self) -> float:
        """Mean distance of `sure` and `right` over the answers."""
        total = sum(part.n for part in self.calibration)
        return sum(part.n * abs(part.sure - part.right) for part in self.calibration) / total

    def figures(self) -> dict[str, Any]:
        """For report.json; None stands for what there is not."""
        return _plain({**asdict(self), "chance": CHANCE, "calibration_error": self.calibration_error})


def assess(
    difference: Tensor,
    label: Tensor,
    groups: np.ndarray,
    judges: Mapping[str, Tensor],
    repeats: list[float],
    curve: Mapping[int, Tensor],
) -> Assessment:
    """Everything in an `Assessment`.

    Args:
        difference: (n,) the trained reward's log-odds, of held-out answers.
        label: (n,)
        groups: (n,) of the answers.
        judges: (n,) the difference of the scores of other rewards on the same answers, by name.
        repeats: see `Answers.steadiness`.
        curve: (n,) log-odds by rewards that were trained on so many answers.
    """
    own = agrees(difference, label)
    found = {}
    for name, scores in judges.items():
        theirs = agrees(scores, label)
        ahead = paired(theirs, own, groups)
        found[name] = JudgeFigures(estimate(theirs, groups), ahead["difference"], ahead["low"], ahead["high"])
    return Assessment(
        agreement=estimate(own, groups),
        best=estimate(np.where(label.numpy() == 0.5, 0.5, 1.0), groups).mean,
        log_loss=float(preference_loss(difference, label)),
        calibration=_calibration(difference, own),
        judges=found,
        steadiness=estimate(repeats) if len(repeats) >= FEW_REPEATS else None,
        curve={count: estimate(agrees(odds, label), groups).mean for count, odds in curve.items()},
    )


def _calibration(difference: Tensor, right: np.ndarray) -> tuple[CalibrationBin, ...]:
    sure = difference.abs().sigmoid().numpy()
    which = np.digitize(sure, EDGES[1:-1])
    rows = [which == number for number in range(len(EDGES) - 1)]
    return tuple(CalibrationBin(float(sure[r].mean()), float(right[r].mean()), int(r.sum())) for r in rows if r.any())


def advice(found: Assessment, pairs: int) -> list[str]:
    """What follows, a sentence each: whether there is a taste to see at all, and whether more pairs would help.

    Args:
        found: of all answers.
        pairs: how many there are.
    """
    mean = found.agreement.mean
    if not found.beats_chance:
        text = f"the held-out agreement of {_words(found.agreement)} cannot be told from chance, {CHANCE}"
        needed = _needed(found.agreement, pairs)
        more = f"about {needed} pairs in all would tell {mean:.2f} from it" if needed else "more pairs may show one"
        return [f"{text}: do not train on this reward; {more}"]
    counts = sorted(found.curve)
    if len(counts) < 2:
        return []
    half, whole = counts[-2:]
    gain = found.curve[whole] - found.curve[half]
    step = f"trained on {half} pairs it agrees in {found.curve[half]:.2f}, on {whole} in {found.curve[whole]:.2f}"
    if gain > STILL_RISING:
        return [f"{step}: more pairs would still help; try {pairs} more"]
    return [f"{step}: more pairs of this kind would help little"]


def _needed(agreement: Estimate, pairs: int) -> int | None:
    """How many pairs make the interval half as wide as the lead over chance; None where there is no lead to speak of.

    An interval narrows with the square root of their number.
    """
    lead, half = agreement.mean - CHANCE, agreement.mean - agreement.low
    if not lead > 0.01 or not has_interval(agreement.low, agreement.high):
        return None
    exact = pairs * (half / lead) ** 2
    digits = 10 ** max(0, int(math.log10(exact)) - 1)
    return math.ceil(exact / digits) * digits


def _words(value: Estimate) -> str:
    if not has_interval(value.low, value.high):
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} ({value.low:.2f} to {value.high:.2f})"


def _plain(value: Any) -> Any:
    """As JSON takes it: NaN becomes None, numbers that are keys become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def agreement_table(found: Assessment) -> list[tuple[str, str]]:
    """The agreements as rows of name and words: the trained reward's, chance, the judges', the person's own."""
    ties = f"; at best {found.best:.2f}, as ties count half" if found.best < 1 else ""
    rows = [
        ("held out", f"agrees with you in {_words(found.agreement)} of {found.agreement.n} pairs that it has not seen"),
        ("chance", f"{CHANCE:.2f}{ties}"),
    ]
    for name, judge in found.judges.items():
        lead = f"{judge.lead:+.2f}"
        lead += f" ({judge.low:+.2f} to {judge.high:+.2f})" if has_interval(judge.low, judge.high) else ""
        rows.append((name, f"{_words(judge.agreement)} of the same pairs; the trained reward's lead is {lead}"))
    if found.steadiness is not None:
        same = found.steadiness
        rows.append(("you", f"the same answer again in {_words(same)} of {same.n} pairs that were asked twice"))
    return rows
