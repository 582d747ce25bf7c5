"""Several rewards as one: weights, hinge targets, normalisation by running statistics, a log of every part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from draftcli.config import RewardConfig
from draftcli.errors import InputError
from draftcli.rewards.protocol import Reward
from draftcli.rewards.wrappers import as_reward
from draftcli.spread import Spread


class WeightedSum:
    """sum over rewards of weight * min(score, target) / scale, each raw score kept by name for the log.

    Where the weight is negative, it is max(score, target).

    The scale is 1, or with `normalise` what the scores of the steps *before* span: it is a constant within a step, so
    that micro-batches and ranks add up to the gradient of the whole batch, and `end_step` moves it once a step. Nothing
    is subtracted: it would change no gradient, and would hide in the log that a reward rises. While its scores have
    shown no spread yet, as in the first step of a run, a normalised reward is measured and counts 0.

    A score of NaN means that a reward has nothing to say about a prompt: it counts 0, in value and gradient. That of a
    picture that is not finite itself stays NaN: there the training has diverged.

    Args:
        rewards: by name.
        settings: weight, normalise and target of each, by the same names; None: weight 1, as it is, no target.
    """

    def __init__(self, rewards: Mapping[str, Reward], settings: Mapping[str, RewardConfig] | None = None) -> None:
        self.name = "+".join(rewards)
        self.rewards = {name: as_reward(reward, name) for name, reward in rewards.items()}
        self.settings = dict(settings or {})
        self._scores: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._spread = {name: Spread() for name, s in self.settings.items() if s.normalise != "none"}

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) the weighted sum; see `Reward`. Scores are kept for `pop_scores` only where gradients are recorded.

        Raises:
            InputError: a reward returned no scores, or scores without gradient where one is needed.
        """
        training = torch.is_grad_enabled()
        scores: dict[str, Tensor] = {}
        silent: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            seen = images.view_as(images)  # one for each reward, so that its gradient can be cleaned alone
            score = reward(seen, prompts)
            silent[name] = _silent(score, images)
            if training and images.requires_grad and not score.requires_grad and not silent[name].all():
                raise InputError(
                    f"reward {name} cannot be trained on: its score has no gradient in the image (a detach, "
                    "no_grad, numpy or Pillow on the way). It can be in held_out_rewards; "
                    f"`draftp rewards check {name}` tests it"
                )
            if training:
                self._scores[name].append(score.detach().float().cpu())
            if seen.requires_grad and silent[name].any():
                seen.register_hook(_without(silent[name]))
            scores[name] = score
        total = self._combined(scores, silent, images)
        if training and images.requires_grad and not total.requires_grad:  # silent rewards alone, without a graph
            total = total + 0 * images.flatten(1)[:, 0]
        return total

    def _combined(self, scores: Mapping[str, Tensor], silent: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """(B,) from the raw scores (B,) of each reward, and where it has nothing to say; on the device of `like`."""
        shares = (self._share(name, score).masked_fill(silent[name], 0).to(like) for name, score in scores.items())
        return sum(shares, torch.zeros(len(like), device=like.device, dtype=like.dtype))

    def _share(self, name: str, score: Tensor) -> Tensor:
        setting = self.settings.get(name)
        if setting is None:
            return score
        scale = 1.0 if setting.normalise == "none" else self._spread[name].scale(setting.normalise)
        return _until_target(score, setting) * (0.0 if scale is None else setting.weight / scale)

    @torch.no_grad()
    def of_scores(self, scores: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
        """(n,) float64: what images count in the training, from their raw scores; NaN where no reward says anything.

        Args:
            scores: (n,) of each reward.
            base: of each reward, of the base's images: what a normalised reward is divided by, and what `min` starts
                from. With the running statistics a figure would not mean the same at two steps of a run.
        """
        measured = type(self)({}, self.settings)
        measured.end_step(base)
        own = {name: score.double() for name, score in scores.items()}
        silent = {name: score.isnan() for name, score in own.items()}
        total = measured._combined(own, silent, next(iter(own.values())))
        return total.masked_fill(torch.stack([*silent.values()]).all(0), math.nan)

    def pop_scores(self) -> dict[str, Tensor]:
        """Every raw score since the last call, by reward, in the order the images came; forgets them."""
        scores = {name: torch.cat(parts) for name, parts in self._scores.items()}
        self._scores.clear()
        return scores

    def end_step(self, scores: Mapping[str, Tensor]) -> None:
        """Move the running statistics by one training step.

        Args:
            scores: all raw scores of the step, over micro-batches and ranks, by reward; the order does not matter.
        """
        for name, spread in self._spread.items():
            if name in scores:
                spread.update(scores[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The running statistics, by reward; empty where nothing is normalised."""
        return {name: spread.tensor() for name, spread in self._spread.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` gave, bit for bit.

        Raises:
            KeyError: it is of other rewards.
        """
        if state.keys() != self._spread.keys():
            raise KeyError(f"statistics of {sorted(state)} for the normalised rewards {sorted(self._spread)}")
        for name, spread in self._spread.items():
            spread.load(state[name])

    def to(self, device: torch.device) -> WeightedSum:
        """Move every reward that is a network."""
        for reward in self.rewards.values():
            if isinstance(reward, nn.Module):
                reward.to(device)
        return self


class LeastGain(WeightedSum):
    """`draftp.combine: min`. For each image, the reward that has gained least: no reward can be bought with another.

        min over rewards of weight * (min(score, target) - start) / scale,    weight 1 or -1

    `start` is its mean over the first step of the training, and `scale` as in `WeightedSum`. Every reward is
    normalised, as scores of different units cannot be compared. The gradient is that of one reward alone: the least of
    those that have not reached their target. One that has nothing to say about an image, has shown no spread yet or has
    weight 0 is not among them; where none is left, the image counts 0.
    """

    def _combined(self, scores: Mapping[str, Tensor], silent: Mapping[str, Tensor], like: Tensor) -> Tensor:
        none = torch.full((len(like),), math.inf, device=like.device, dtype=like.dtype)
        gains, trained = [none], [none]
        for name, score in scores.items():
            setting, spread = self.settings[name], self._spread.get(name)
            scale = None if spread is None else spread.scale(setting.normalise)
            if spread is None or scale is None or setting.weight == 0:
                continue
            held = _until_target(score, setting)
            gain = ((held - spread.first) * (setting.weight / scale)).masked_fill(silent[name], math.inf)
            gains.append(gain.to(like))
            below = gain if setting.target is None else gain.masked_fill(held == setting.target, math.inf)
            trained.append(below.to(like))
        least, pushed = (torch.stack(some).min(0).values for some in (gains, trained))
        least, pushed = (some.masked_fill(some == math.inf, 0) for some in (least, pushed))
        return least.detach() + (pushed - pushed.detach())


COMBINATIONS = {"sum": WeightedSum, "min": LeastGain}  # by draftp.combine


def _until_target(score: Tensor, setting: RewardConfig) -> Tensor:
    """min(score, target), or max(score, target) where lower scores are wanted."""
    if setting.target is None:
        return score
    return score.clamp(max=setting.target) if setting.weight >= 0 else score.clamp(min=setting.target)


def _silent(score: Tensor, images: Tensor) -> Tensor:
    """(B,) bool: a score of NaN for a picture that is finite."""
    silent = score.detach().isnan()
    # The pictures are read through only where there is something to tell apart.
    return silent & images.detach().flatten(1).isfinite().all(1) if silent.any() else silent


def _without(silent: Tensor) -> Callable[[Tensor], Tensor]:
    """A gradient (B, 3, H, W) with zeros for the images that are `silent` (B,): that of NaN is NaN, even times 0."""
    return lambda gradient: gradient.masked_fill(silent.view(-1, 1, 1, 1), 0)
