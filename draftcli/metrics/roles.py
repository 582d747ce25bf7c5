"""What a reward is to those who read its scores: trained on or held out, and whether higher or lower ones are wanted.

`trained` is everywhere as `config.trained_signs` has it: the rewards that were trained on, by name, 1 where higher
scores are wanted and -1 where lower. Of every other reward higher scores are better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def reward_role(name: str, trained: Mapping[str, int]) -> str:
    """For the head of a column: held out; trained on; or trained on, lower is better."""
    if name not in trained:
        return "held out"
    return "trained on" if trained[name] > 0 else "trained on, lower is better"


def trained_in_words(trained: Mapping[str, int]) -> str:
    """The names, each with a note where lower scores are wanted; empty where there are none."""
    return ", ".join(name if sign > 0 else f"{name} (lower is better)" for name, sign in trained.items())


def which_is_better(rewards: Iterable[str], trained: Mapping[str, int]) -> str:
    """Whether higher or lower scores of `rewards` are better, without a full stop."""
    lower = [name for name in rewards if trained.get(name, 1) < 0]
    return f"Higher is better, except for {' and '.join(lower)}" if lower else "Higher is better"
