"""Rewards around a reward: relative to control words in the prompt, and in micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draftcli.errors import InputError
from draftcli.rewards.protocol import Reward


class PromptRelative(nn.Module):
    """One picture against two wordings of its prompt: (1 + k) r(x, positive) - r(x, negative).

    The semantic relative preference of SRPO (Shen et al. 2025, arXiv 2509.06942): what a reward likes in every
    picture cancels, and what the control words say stays. With cosines that is scale * f(x) . ((1 + k) c+ - c-), so the
    picture is embedded once.

    Args:
        reward: a CLIP-type one: with `embed_images`, `embed_texts` and `scale` as CLIPReward has them.
        positive: control words put before the prompt, with a full stop between: wanted.
        negative: unwanted.
        strength: k; 0 is the plain difference.

    Raises:
        InputError: the reward does not compare embeddings.
    """

    def __init__(self, reward: Any, positive: str, negative: str, strength: float = 0.0) -> None:
        super().__init__()
        if not all(hasattr(reward, part) for part in ("embed_images", "embed_texts", "scale")):
            name = getattr(reward, "name", type(reward).__name__)
            raise InputError(
                f"reward {name} cannot be relative: it does not compare the embedding of a picture with that of its "
                "prompt, as clip, pickscore, hpsv2, hpsv2_1 and toy do"
            )
        self.reward = reward
        self.name = reward.name
        self.positive, self.negative, self.strength = positive, negative, strength

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `Reward`."""
        wanted = self.reward.embed_texts([f"{self.positive}. {prompt}" for prompt in prompts])
        unwanted = self.reward.embed_texts([f"{self.negative}. {prompt}" for prompt in prompts])
        direction = (1 + self.strength) * wanted - unwanted
        return self.reward.scale * (self.reward.embed_images(images) * direction).sum(-1)


class InMicroBatches(nn.Module):
    """A reward that is asked for a few pictures at a time, and again in backward: memory for one micro-batch.

    Args:
        reward: whose scores do not depend on the batch.
        size: of a micro-batch.
    """

    def __init__(self, reward: Reward, size: int) -> None:
        super().__init__()
        self.reward, self.size = reward, size
        self.name = reward.name
        self.differentiable = getattr(reward, "differentiable", True)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `Reward`."""
        again = torch.is_grad_enabled() and images.requires_grad
        scores = []
        for first in range(0, len(prompts), self.size):
            part = images[first : first + self.size], prompts[first : first + self.size]
            scores.append(checkpoint(self.reward, *part, use_reentrant=False) if again else self.reward(*part))
        return torch.cat(scores)
