"""From a name and its settings to a reward."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from torch import nn

from draftcli.config import Config, RewardSource
from draftcli.errors import InputError
from draftcli.rewards.catalogue import known_rewards
from draftcli.rewards.mixture import WeightedSum
from draftcli.rewards.protocol import Reward
from draftcli.rewards.wrappers import InMicroBatches, PromptRelative


def load_reward(name: str, pretrained: str | None = None, backbone: str | None = None) -> Reward:
    """The reward called `name`, or the object at `package.module:object`.

    Args:
        name: see the package's docstring.
        pretrained: hub id, local folder or local file of its weights; None: its own.
        backbone: hub id or local folder of what its weights stand on; None: its own.

    Raises:
        InputError: nothing has that name, it cannot be imported, or its weights cannot be loaded.
    """
    given = {"pretrained": pretrained, "backbone": backbone}
    given = {key: value for key, value in given.items() if value is not None}
    factory = _factory(name)
    try:
        reward: Any = factory(**given)
    except InputError:
        raise
    except Exception as error:  # a plug-in's own troubles, in one line
        raise InputError(f"reward {name}: cannot be made ({type(error).__name__}: {error})") from error
    if not callable(reward):
        raise InputError(f"reward {name}: its factory returned a {type(reward).__name__}, which cannot be called")
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return cast("Reward", reward)


def blank_reward(name: str) -> nn.Module | None:
    """The reward called `name` without weights, where its factory has a `blank`; see `draftcli.rewards.blank`.

    Raises:
        InputError: nothing has that name, it cannot be imported, or its `blank` fails.
    """
    blank = getattr(_factory(name), "blank", None)
    if blank is None:
        return None
    try:
        return blank()
    except Exception as error:  # a plug-in's own troubles, in one line
        raise InputError(f"reward {name}: has no blank network ({type(error).__name__}: {error})") from error


def load_from(name: str, source: RewardSource) -> Reward:
    """The reward called `name` as its settings want it: relative to control words, in micro-batches.

    Raises:
        InputError: as `load_reward`; also where a relative reward is asked of one that does not compare embeddings.
    """
    reward = load_reward(name, source.pretrained, source.backbone)
    if source.relative is not None:
        reward = PromptRelative(reward, **source.relative.model_dump())
    return reward if source.micro_batch_size is None else InMicroBatches(reward, source.micro_batch_size)


def get_reward_model(cfg: Config | str) -> Reward:
    """The reward of a configuration, as the commands use it, or one reward by name.

    Raises:
        InputError: as `load_reward`; also where a configuration has no reward, or one that cannot be trained on.
    """
    if isinstance(cfg, str):
        return load_reward(cfg)
    if not cfg.rewards:
        raise InputError("rewards is empty: training needs at least one, such as --reward toy")
    check_names([*cfg.rewards, *cfg.held_out_rewards])
    rewards = {name: load_from(name, setting) for name, setting in cfg.rewards.items()}
    for name, reward in rewards.items():
        if not getattr(reward, "differentiable", True):
            raise InputError(
                f"reward {name} is not differentiable, it says so itself: training needs its gradient in the picture. "
                "It can be in held_out_rewards, not in rewards"
            )
    return WeightedSum(rewards, cfg.rewards)


def load_held_out(cfg: Config) -> WeightedSum:
    """The rewards that a configuration logs and never trains on; none is a sum of nothing.

    Raises:
        InputError: as `load_from`.
    """
    return WeightedSum({name: load_from(name, source) for name, source in cfg.held_out_rewards.items()})


def check_names(names: Iterable[str]) -> None:
    """Raise InputError where a reward's name leads nowhere, without loading any weights."""
    for name in names:
        _reference(name)


def _reference(name: str) -> str:
    if ":" in name:
        return name
    known = known_rewards()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]}?" if close else ""
        raise InputError(
            f"unknown reward {name!r}{hint}; there are: {', '.join(sorted(known))}, or package.module:object"
        )
    return known[name]


def _factory(name: str) -> Any:
    module, _, attribute = _reference(name).partition(":")
    if ":" in name and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # a console script does not look in the folder it is started from
    try:
        found = import_module(module)
    except Exception as error:  # whatever a user's own module raises while it is imported
        raise InputError(f"reward {name}: cannot import {module!r} ({type(error).__name__}: {error})") from error
    if not hasattr(found, attribute):
        raise InputError(f"reward {name}: {module} has no {attribute!r}")
    return getattr(found, attribute)
