"""Reward models behind one protocol; built-in ones come in by the same door as plug-ins.

A reward is found by built-in name, by an entry point of the group `draftp.rewards`, or by `package.module:object`.
What is found is a factory: called with the settings it knows (`pretrained`, where the user gave one), it returns the
reward. `core` knows nothing of this package: to it a reward is a plain callable.
"""

from __future__ import annotations

import difflib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from draftcli.errors import InputError

if TYPE_CHECKING:
    from draftcli.config import Config, RewardConfig

GROUP = "draftp.rewards"
BUILT_IN = {
    "pickscore": "draftcli.rewards.clip:pickscore",
    "clip": "draftcli.rewards.clip:clip_score",
    "toy": "draftcli.toy.reward:toy_reward",
    "toy_oracle": "draftcli.toy.reward:toy_oracle",
}


class Reward(Protocol):
    """Scores pictures; higher is better.

    A reward may set `differentiable = False`: it then serves as a held-out reward only. A score of NaN means that the
    reward has nothing to say about that prompt.
    """

    name: str

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], differentiable -> (B,) scores."""
        ...


class WeightedSum:
    """Several rewards as one: sum of weight * min(score, target), each part kept by name for the log.

    Args:
        rewards: by name.
        settings: weight and target of each, by the same names; None: weight 1, no target.
    """

    def __init__(self, rewards: Mapping[str, Reward], settings: Mapping[str, RewardConfig] | None = None) -> None:
        self.name = "+".join(rewards)
        self.rewards = dict(rewards)
        self.settings = dict(settings or {})
        self._scores: defaultdict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) the weighted sum; see `Reward`."""
        total = torch.zeros(len(prompts), device=images.device, dtype=images.dtype)
        for name, reward in self.rewards.items():
            score = reward(images, prompts)
            if score.shape != (len(prompts),):
                shape = tuple(score.shape)
                raise InputError(f"reward {name} returned shape {shape} for {len(prompts)} pictures: one score each")
            self._scores[name].append(score.detach().float().cpu())
            setting = self.settings.get(name)
            if setting is not None and setting.target is not None:
                score = score.clamp(max=setting.target)
            total = total + (1.0 if setting is None else setting.weight) * score.to(total)
        return total

    def pop_scores(self) -> dict[str, Tensor]:
        """Every raw score since the last call, by reward, in the order the images came; forgets them."""
        scores = {name: torch.cat(parts) for name, parts in self._scores.items()}
        self._scores.clear()
        return scores

    def to(self, device: torch.device) -> WeightedSum:
        """Move every reward that is a network."""
        for reward in self.rewards.values():
            if isinstance(reward, nn.Module):
                reward.to(device)
        return self


def known_rewards() -> dict[str, str]:
    """Every reward that can be named, and where it is: built-in ones and entry points."""
    return {**{point.name: point.value for point in entry_points(group=GROUP)}, **BUILT_IN}


def load_reward(name: str, pretrained: str | None = None) -> Reward:
    """The reward called `name`, or the object at `package.module:object`.

    Args:
        name: see the module's docstring.
        pretrained: hub id or local folder of its weights; None: its own.

    Raises:
        InputError: nothing has that name, it cannot be imported, or its weights cannot be loaded.
    """
    factory = _factory(name)
    try:
        reward: Any = factory(**({} if pretrained is None else {"pretrained": pretrained}))
    except InputError:
        raise
    except Exception as error:  # a plug-in's own troubles, in one line
        raise InputError(f"reward {name}: cannot be made ({type(error).__name__}: {error})") from error
    if not callable(reward):
        raise InputError(f"reward {name}: its factory returned a {type(reward).__name__}, which cannot be called")
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval()
    return cast("Reward", reward)


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
    rewards = {name: load_reward(name, setting.pretrained) for name, setting in cfg.rewards.items()}
    for name, reward in rewards.items():
        if not getattr(reward, "differentiable", True):
            raise InputError(f"reward {name} is not differentiable: it can be in held_out_rewards, not in rewards")
    return WeightedSum(rewards, cfg.rewards)


def check_names(names: Sequence[str]) -> None:
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
