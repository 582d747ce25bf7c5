"""From a name and its settings to a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from draftcli.config import Config, RewardSource
from draftcli.errors import InputError
from draftcli.rewards.catalogue import check_names, reward_folder, reward_reference
from draftcli.rewards.mixture import COMBINATIONS, WeightedSum
from draftcli.rewards.protocol import Reward
from draftcli.rewards.references import find_object, make_reward
from draftcli.rewards.trained import trained_factory
from draftcli.rewards.wrappers import AtWorst, InMicroBatches, PromptRelative, as_reward


def load_reward(name: str, pretrained: str | None = None, backbone: str | None = None) -> Any:
    """The reward called `name` as it is, with what it has beside the call; `load_from` gives it as it is asked.

    Args:
        name: see the package's docstring.
        pretrained: hub id, local folder or local file of its weights; None: its own.
        backbone: hub id or local folder of what its weights stand on; None: its own.

    Raises:
        InputError: nothing has that name, it cannot be imported, it is no reward, or its weights cannot be loaded.
    """
    given = {"pretrained": pretrained, "backbone": backbone}
    return make_reward(name, _find(name), {key: value for key, value in given.items() if value is not None})


def blank_reward(name: str) -> nn.Module | None:
    """The reward called `name` without weights, where its factory has a `blank`; see `draftcli.rewards.blank`.

    Raises:
        InputError: nothing has that name, it cannot be imported, or its `blank` fails.
    """
    blank = getattr(_find(name), "blank", None)
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
    found = load_reward(name, source.pretrained, source.backbone)
    relative = source.relative
    reward = as_reward(found, name) if relative is None else PromptRelative(found, **relative.model_dump())
    return reward if source.micro_batch_size is None else InMicroBatches(reward, source.micro_batch_size)


def get_reward_model(cfg: Config | str | Callable[..., Any]) -> Reward:
    """The reward of a configuration, as the commands use it; or one reward: by name, or an object of one's own.

    Args:
        cfg: settings, a name, or what a name may lead to: a function (images, prompts), an object that is called so, a
            class or a factory.

    Raises:
        InputError: as `load_reward`; also where a configuration has no reward, or one that cannot be trained on.
    """
    if isinstance(cfg, str):
        return load_from(cfg, RewardSource())
    if not isinstance(cfg, Config):
        name = getattr(cfg, "name", getattr(cfg, "__name__", type(cfg).__name__))
        return as_reward(make_reward(name, cfg, {}), name)
    if not cfg.rewards:
        raise InputError("rewards is empty: training needs at least one, such as --reward toy")
    check_names([*cfg.rewards, *cfg.held_out_rewards])
    rewards = {name: load_from(name, setting) for name, setting in cfg.rewards.items()}
    for name, reward in rewards.items():
        check_differentiable(name, reward)
        if (rho := cfg.rewards[name].robust) is not None:
            rewards[name] = AtWorst(reward, rho, cfg.rewards[name].weight)
    return COMBINATIONS[cfg.draftp.combine](rewards, cfg.rewards)


def check_differentiable(name: str, reward: Any) -> None:
    """Raise InputError where a reward that is to be trained on says that it has no gradient in the image."""
    if not getattr(reward, "differentiable", True):
        raise InputError(
            f"reward {name} is not differentiable, as it declares itself: training needs its gradient in the "
            "image. It can be in held_out_rewards, not in rewards"
        )


def load_held_out(cfg: Config) -> WeightedSum:
    """The rewards that a configuration logs and never trains on; none is a sum of nothing.

    Raises:
        InputError: as `load_from`.
    """
    return WeightedSum({name: load_from(name, source) for name, source in cfg.held_out.items()})


def _find(name: str) -> Any:
    folder = reward_folder(name)
    return trained_factory(name, folder) if folder else find_object(name, reward_reference(name))
