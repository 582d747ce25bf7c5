"""How far the answers agree with themselves, with one of the columns, and with rewards. Looked at afterwards only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcli.errors import warn
from draftcli.metrics.statistics import Estimate, estimate, has_interval
from draftcli.preferences.pairs import Answers, numbered
from draftcli.preferences.reading import PREFERENCES, SKIP, answers_in
from draftcli.progress import Activity


@dataclass(frozen=True)
class RatingSummary:
    """What the answers say without any judge.

    Attributes:
        answered: how many there are, pairs that were shown again among them.
        preferences: different pairs of which one picture was better.
        ties: different pairs of which neither was.
        skipped: different pairs that were skipped.
        repeated: pairs that were answered twice.
        steady: of those, how many times the answer was the same; neither beside a preference counts half.
        wins: how often the second column was better than the first, ties counting half, in [0, 1] with its interval
            over prompts; None where pairs are of one column.
    """

    answered: int
    preferences: int
    ties: int
    skipped: int
    repeated: int
    steady: float
    wins: Estimate | None


def summarise(answers: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> RatingSummary:
    """Count what lines of preferences.jsonl say, those of one session."""
    once = [line for line in answers if not line["repeats"]]
    kinds = [line["answer"] for line in once]
    again = _read(answers, Path()).steadiness()
    return RatingSummary(
        answered=len(answers),
        preferences=kinds.count("left") + kinds.count("right"),
        ties=kinds.count("neither"),
        skipped=kinds.count(SKIP),
        repeated=len(again),
        steady=sum(again),
        wins=_wins(once, columns) if len(columns) == 2 else None,
    )


def agreement_with(
    answers: Sequence[Mapping[str, Any]], folder: Path, judge: str, device: str | None = None
) -> Estimate:
    """How often a reward scores the better picture higher, equal scores counting half, with its interval over prompts.

    Ties, skipped and repeated pairs are left out, and those that the reward has no score for. A warning says where
    pictures cannot be read; their pairs are left out, too.

    Args:
        answers: lines of preferences.jsonl.
        folder: that it is in.
        judge: the reward's name.
        device: that it runs on; None: the fastest one here.

    Raises:
        InputError: the reward cannot be loaded, or no picture be read.
    """
    from draftcli.core.engine.runtime import choose_runtime
    from draftcli.preferences.agreement import agrees
    from draftcli.preferences.looking import ask

    decided = [line for line in answers if line["answer"] in ("left", "right") and not line["repeats"]]
    if not decided:
        return estimate([])
    where = choose_runtime(device or "auto", "fp32").device
    seen = ask(judge, _read(decided, folder), where, Activity())
    for text in seen.preferences.left_out:
        warn(text)
    prompts = [answer.prompt for answer in seen.preferences.answers]
    return estimate(agrees(seen.difference, seen.label), numbered(prompts))


def in_percent(share: Estimate) -> str:
    """A share of pairs in words, with its interval where there is one: 71 % of 87 pairs (95 % interval 60 to 80 %)."""
    text = f"{100 * share.mean:.0f} % of {share.n} pair{'' if share.n == 1 else 's'}"
    if not has_interval(share.low, share.high):
        return text
    return f"{text} (95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} %)"


def _read(lines: Sequence[Mapping[str, Any]], folder: Path) -> Answers:
    return answers_in(folder / PREFERENCES, dict(enumerate(lines)))


def _wins(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Estimate:
    values = {columns[0]: 0.0, columns[1]: 1.0}
    counted = [line for line in lines if line["answer"] != SKIP]
    won = [0.5 if line["answer"] == "neither" else values[line[line["answer"]]["column"]] for line in counted]
    return estimate(won, numbered([line["prompt"] for line in counted]))
