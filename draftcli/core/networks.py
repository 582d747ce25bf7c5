"""What the method asks of the networks: tuned and base as two callables, text, decoder. No device, no file, no model.

engine/networks.py has them on this machine; tests bring an analytic pair.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

from torch import Tensor

from draftcli.core.batch import Batch
from draftcli.core.denoise import Predict
from draftcli.core.guidance import Estimator
from draftcli.core.phase import Phase
from draftcli.errors import InputError

# reward(images (B, 3, H, W) float in [0, 1], B prompts) -> (B,) scores, higher is better
RewardFunction = Callable[[Tensor, list[str]], Tensor]


def scored(reward: RewardFunction, images: Tensor, prompts: list[str]) -> Tensor:
    """(B,) scores of B images.

    Raises:
        InputError: the reward returned something else.
    """
    scores = reward(images, prompts)
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        what = (
            f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        )
        raise InputError(
            f"model.reward_model returned {what} for {len(prompts)} images, not one score for each, a tensor of shape "
            f"({len(prompts)},); draftcli.get_reward_model(reward) accepts more kinds of scores"
        )
    return scores


class Condition(Protocol):
    """What a network gets beside the latents of B images: text, and sizes where the family has them."""

    def __getitem__(self, some: slice | Tensor, /) -> Self:
        """That of some of the images: a slice, or chosen (B,) bool."""
        ...


class Networks(Protocol):
    """The network that is tuned, its frozen base, and what stands before and behind them."""

    def encode(self, batch: Batch) -> Any:
        """The prompts of a batch as a `Condition`."""
        ...

    def start(self, batch: Batch) -> Tensor:
        """x_T (B, C, H, W) of a batch: noise from each image's seed, at the first level of the schedule."""
        ...

    def tuned(self, cond: Any) -> Predict:
        """The tuned network's guided noise estimate under a `Condition`."""
        ...

    def base(self, cond: Any) -> Predict:
        """The base's, which never carries gradient."""
        ...

    def tuned_estimates(self, cond: Any) -> Estimator:
        """The tuned network's guided and conditional estimate, of one call: what steps with gradient ask for."""
        ...

    def base_estimates(self, cond: Any) -> Estimator:
        """The base's, likewise, without gradient."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, 3, 8 H, 8 W) in [0, 1], differentiable."""
        ...

    def without_gradient(self) -> AbstractContextManager[None]:
        """Inside, no graph is recorded, and the tuned network may compute in a quicker way."""
        ...

    def phase(self, phase: Phase) -> AbstractContextManager[Any]:
        """Around each phase of a step, for profilers and memory plans."""
        ...
