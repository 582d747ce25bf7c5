"""How much the penalty counts for each image of a step: the same for all, or where the reward is high already, or where
rewards that are held out disagree with the one that is trained.

What is high is told by running statistics of the scores of the steps *before*. So a weight depends on its own image and
on them alone: micro-batches and processes add up to the penalty of the whole batch. The statistics move once a step, by
all its scores. Weights are 1 on average, so that draftp.kl_coeff keeps its meaning.

Shape legend: B images of a micro-batch, H W picture size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from draftcli.config import DraftpConfig
from draftcli.core.networks import RewardFunction, scored
from draftcli.errors import InputError
from draftcli.spread import Spread

TRAINED = ""  # the name of the trained reward's scores, beside those that are held out
HELD_OUT = "held_out/"  # with a name behind it, the key of a held-out reward in metrics.jsonl


class AllAlike:
    """`draftp.kl_gate: none`: every image counts as much as any other."""

    def __call__(self, images: Tensor, prompts: list[str], rewards: Tensor) -> Tensor | None:
        """How much the penalty of each image counts, (B,), a constant; None: all alike.

        Args:
            images: (B, 3, H, W) in [0, 1], without graph.
            prompts: B.
            rewards: (B,), the trained reward of each, without graph.
        """
        return None

    def pop_scores(self) -> dict[str, Tensor]:
        """The scores that were looked at since the last call, by name, in the order the images came; forgets them."""
        return {}

    def figures(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """What a step's line of metrics.jsonl says of its `scores`, which `end_step` has not taken in yet."""
        return {}

    def end_step(self, scores: Mapping[str, Tensor]) -> None:
        """Move the statistics by one training step.

        Args:
            scores: all that `pop_scores` gave, over micro-batches and processes; their order does not matter.
        """

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave, bit for bit."""


class ByReward(AllAlike):
    """`draftp.kl_by_reward`: an image whose reward is low yet is left free, one whose reward is high already is held.

        weight = 2 rank,    rank: the share of the images of about the last hundred steps whose reward is lower

    After CRD's reward-adaptive KL (arXiv 2603.14128), whose weight rises with a reward between 0 and 1; a rank is that
    for a reward of any unit. While the rewards have shown no spread yet, as in the first step, all images are alike.
    """

    def __init__(self) -> None:
        self._scores: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._spread: defaultdict[str, Spread] = defaultdict(Spread)

    def __call__(self, images: Tensor, prompts: list[str], rewards: Tensor) -> Tensor | None:
        """See `AllAlike`."""
        scores = {name: some.cpu().double() for name, some in self._judged(images, prompts, rewards).items()}
        for name, some in scores.items():
            self._scores[name].append(some)
        weights = self._of(scores)
        return None if weights is None else weights.to(rewards)

    def _judged(self, images: Tensor, prompts: list[str], rewards: Tensor) -> dict[str, Tensor]:
        """The scores (B,) that the weights depend on, by name."""
        return {TRAINED: rewards}

    def _of(self, scores: Mapping[str, Tensor]) -> Tensor | None:
        """The weights of images with these scores."""
        rank = self._spread[TRAINED].rank(scores[TRAINED])
        return None if rank is None else (2 * rank).nan_to_num(1)

    def pop_scores(self) -> dict[str, Tensor]:
        """See `AllAlike`."""
        scores = {name: torch.cat(parts) for name, parts in self._scores.items()}
        self._scores.clear()
        return scores

    def figures(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean weight."""
        weights = self._of(scores) if scores else None
        return {"kl_weight": 1.0 if weights is None else float(weights.mean())}

    def end_step(self, scores: Mapping[str, Tensor]) -> None:
        """See `AllAlike`."""
        for name, some in scores.items():
            self._spread[name].update(some)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of each reward by its name: what `Spread.tensor` gives."""
        return {name: spread.tensor() for name, spread in self._spread.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `AllAlike`."""
        self._spread.clear()
        for name, numbers in state.items():
            self._spread[name].load(numbers)


class HeldOutGate(ByReward):
    """`draftp.kl_gate: held_out`: the penalty holds the images that the trained reward likes and held-out ones don't.

        excess = max(0, rank by the trained reward - mean rank by the held-out ones),    0 to 1
        weight = min(MOST, excess / its mean over about the last hundred steps)

    So an image of which the held-out rewards think as well as the trained one, or better, is free, and the others are
    held as much more. After GARDO (arXiv 2512.24138), whose text says so; its released code has the other sign. The
    rewards' ranks are among the images of about the last hundred steps (`ByReward`). A held-out reward that has nothing
    to say about an image (NaN) is left out; where none has, its weight is 1. While there is no spread or no excess yet,
    as in the first two steps, all images are alike.

    Attributes:
        held_out: what is asked, without gradient, by name; assign before training.
    """

    MOST = 6.0  # the largest there is where rewards are unrelated: the excess of two random ranks is 1 / 6 on average

    def __init__(self, held_out: Mapping[str, RewardFunction] | None = None) -> None:
        super().__init__()
        self.held_out = dict(held_out or {})
        self._excess = Spread()

    def _judged(self, images: Tensor, prompts: list[str], rewards: Tensor) -> dict[str, Tensor]:
        if not self.held_out:
            raise InputError(
                "draftp.kl_gate held_out has no reward to ask: assign model.penalty.weights.held_out = {NAME: reward} "
                "first"
            )
        with torch.no_grad():
            others = {HELD_OUT + name: scored(judge, images, prompts) for name, judge in self.held_out.items()}
        return {TRAINED: rewards, **others}

    def _excess_of(self, scores: Mapping[str, Tensor]) -> Tensor | None:
        """(B,) in [0, 1], NaN where no held-out reward has anything to say; None: nobody can tell yet."""
        ranks = {name: self._spread[name].rank(some) for name, some in scores.items()}
        trained, others = ranks.pop(TRAINED), [rank for rank in ranks.values() if rank is not None]
        if trained is None or not others:
            return None
        return (trained - torch.stack(others).nanmean(0)).clamp(min=0)

    def _of(self, scores: Mapping[str, Tensor]) -> Tensor | None:
        excess, typical = self._excess_of(scores), self._excess.mean
        return None if excess is None or typical <= 0 else (excess / typical).clamp(max=self.MOST).nan_to_num(1)

    def figures(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean weight, and the mean of each held-out reward."""
        means = {name: float(some.nanmean()) for name, some in scores.items() if name != TRAINED}
        return {**super().figures(scores), **means}

    def end_step(self, scores: Mapping[str, Tensor]) -> None:
        """See `AllAlike`."""
        excess = self._excess_of(scores) if scores else None
        super().end_step(scores)
        if excess is not None:
            self._excess.update(excess)

    def state_dict(self) -> dict[str, Any]:
        """The statistics of each reward by its name, and of the excess."""
        return {"scores": super().state_dict(), "excess": self._excess.tensor()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `AllAlike`."""
        super().load_state_dict(state["scores"])
        self._excess.load(state["excess"])


def image_weights_of(settings: DraftpConfig) -> AllAlike:
    """What `draftp.kl_gate` and `draftp.kl_by_reward` name."""
    if settings.kl_gate == "held_out":
        return HeldOutGate()
    return ByReward() if settings.kl_by_reward else AllAlike()
