"""Reward models behind one protocol; built-in ones come in by the same door as plug-ins.

A reward is found by built-in name, by an entry point of the group `draftp.rewards`, by `package.module:object`, or by
`file.py:object`. What is found is the reward itself, or a class or factory: called with the settings it knows
(`pretrained` and `backbone`, where the user gave them), it returns the reward. `core` knows nothing of this package: to
it a reward is a plain callable.

The public names below are imported when they are first used: `draftp rewards list` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftcli.rewards.catalogue import check_names, check_sources, known_rewards
    from draftcli.rewards.mixture import WeightedSum
    from draftcli.rewards.protocol import Reward
    from draftcli.rewards.registry import get_reward_model, load_held_out, load_reward

__all__ = [
    "Reward",
    "WeightedSum",
    "check_names",
    "check_sources",
    "get_reward_model",
    "known_rewards",
    "load_held_out",
    "load_reward",
]

_HOME = {
    "Reward": "protocol",
    "WeightedSum": "mixture",
    "check_names": "catalogue",
    "check_sources": "catalogue",
    "get_reward_model": "registry",
    "known_rewards": "catalogue",
    "load_held_out": "registry",
    "load_reward": "registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
