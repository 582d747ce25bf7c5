"""What a reward is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reward(Protocol):
    """Scores pictures; higher is better.

    A reward may set `differentiable = False`: it then serves as a held-out reward only. A score of NaN means that the
    reward has nothing to say about that prompt: it then counts 0, and is left out of means and statistics.
    """

    name: str

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Images (B, 3, H, W) float in [0, 1], differentiable -> (B,) scores."""
        ...
