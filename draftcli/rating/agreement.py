"""How far the answers agree with themselves, with one of the columns, and with rewards. Looked at afterwards only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcli.metrics.statistics import Estimate, estimate, has_interval

_BATCH = 8  # pictures of one size that a judge looks at together
_OTHER_SIDE = {"left": "right", "right": "left"}


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
    first = {_pictures(line): _better(line) for line in once}
    again = [(first[_pictures(line)], _better(line)) for line in answers
             if line["repeats"] and line["answer"] != "skip" and _pictures(line) in first]  # fmt: skip
    return RatingSummary(
        answered=len(answers),
        preferences=kinds.count("left") + kinds.count("right"),
        ties=kinds.count("neither"),
        skipped=kinds.count("skip"),
        repeated=len(again),
        steady=sum(1.0 if a == b else 0.5 if None in (a, b) else 0.0 for a, b in again),  # as rewards train counts
        wins=_wins(once, columns) if len(columns) == 2 else None,
    )


def agreement_with(
    answers: Sequence[Mapping[str, Any]], folder: Path, judge: str, device: str | None = None
) -> Estimate:
    """How often a reward scores the better picture higher, equal scores counting half, with its interval over prompts.

    Ties, skipped and repeated pairs are left out, and those that the reward has no score for.

    Args:
        answers: lines of preferences.jsonl.
        folder: that it is in.
        judge: the reward's name.
        device: that it runs on; None: the fastest one here.

    Raises:
        InputError: the reward cannot be loaded, or a picture not be read.
    """
    decided = [line for line in answers if line["answer"] in _OTHER_SIDE and not line["repeats"]]
    scores = _scores(decided, folder, judge, device)
    values = []
    for line in decided:
        better, worse = (scores[line["prompt"], line[side]["picture"]] for side in _sides(line["answer"]))
        values.append(math.nan if math.isnan(better + worse) else (better > worse) + (better == worse) / 2)
    return estimate(values, _prompt_numbers(decided))


def in_percent(share: Estimate) -> str:
    """A share of pairs in words, with its interval where there is one: 71 % of 87 pairs (95 % interval 60 to 80 %)."""
    text = f"{100 * share.mean:.0f} % of {share.n} pair{'' if share.n == 1 else 's'}"
    if not has_interval(share.low, share.high):
        return text
    return f"{text} (95 % interval {100 * share.low:.0f} to {100 * share.high:.0f} %)"


def _sides(answer: str) -> tuple[str, str]:
    return answer, _OTHER_SIDE[answer]


def _scores(lines: Sequence[Mapping[str, Any]], folder: Path, judge: str, device: str | None) -> dict[Any, float]:
    """By prompt and picture, each looked at once."""
    import numpy as np
    import torch

    from draftcli.core.engine.runtime import choose_runtime
    from draftcli.evaluation.pictures import read_picture
    from draftcli.rewards import get_reward_model

    reward, where = get_reward_model(judge), choose_runtime(device or "auto", "fp32").device
    if isinstance(reward, torch.nn.Module):
        reward.to(where)
    wanted = list(dict.fromkeys((line["prompt"], line[side]["picture"]) for line in lines for side in _OTHER_SIDE))
    scores: dict[Any, float] = {}
    group: list[tuple[tuple[str, str], np.ndarray]] = []

    def look() -> None:
        if group:
            images = torch.from_numpy(np.stack([pixels for _, pixels in group])).to(where)
            with torch.no_grad():
                found = reward(images, [prompt for (prompt, _), _ in group]).tolist()
            scores.update({key: score for (key, _), score in zip(group, found, strict=True)})
        group.clear()

    for key in wanted:
        pixels = read_picture(folder / key[1])
        if len(group) == _BATCH or (group and group[0][1].shape != pixels.shape):
            look()
        group.append((key, pixels))
    look()
    return scores


def _wins(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Estimate:
    values = {columns[0]: 0.0, columns[1]: 1.0, "": 0.5}
    counted = [line for line in lines if line["answer"] != "skip"]
    won = [values[line[line["answer"]]["column"] if line["answer"] in _OTHER_SIDE else ""] for line in counted]
    return estimate(won, _prompt_numbers(counted))


def _prompt_numbers(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(line["prompt"] for line in lines))}
    return [numbers[line["prompt"]] for line in lines]


def _pictures(line: Mapping[str, Any]) -> frozenset[str]:
    return frozenset((line["left"]["picture"], line["right"]["picture"]))


def _better(line: Mapping[str, Any]) -> str | None:
    """The picture that was better; None for neither."""
    return line[line["answer"]]["picture"] if line["answer"] in _OTHER_SIDE else None
