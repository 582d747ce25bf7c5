"""Rewards around a reward: one of anybody's as `Reward` wants it, relative to control words, in micro-batches, and with
the gradient of the worst picture nearby.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from draftcli.errors import InputError
from draftcli.rewards.protocol import Reward


class AnyReward(nn.Module):
    """A reward of anybody's as `Reward` wants it: with a name, and one float score a picture where the pictures are.

    What is as good is taken: scores (B, 1), of another device, of 16 bits, whole numbers or bools, and a list of B
    scores; a NumPy array or a list of numbers likewise, without a gradient.

    Args:
        reward: called as reward(images, prompts); frozen where it is a network.
        name: what it is asked for by.
    """

    def __init__(self, reward: Any, name: str) -> None:
        super().__init__()
        self.reward = reward
        self.name = name
        self.differentiable = bool(getattr(reward, "differentiable", True))

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `Reward`.

        Raises:
            InputError: the reward returned something else.
        """
        returned = self.reward(images, prompts)
        scores = _as_tensor(returned)
        count = len(prompts)
        if scores is not None and scores.shape == (count, 1):
            scores = scores[:, 0]
        if scores is None or scores.shape != (count,) or scores.is_complex():
            raise InputError(
                f"reward {self.name} returned {_what(returned)} for {count} images; expected one score for each: a "
                f"float tensor of shape ({count},)"
            )
        exact = scores.dtype in (torch.float32, torch.float64)
        return (scores if exact else scores.float()).to(images.device)


def as_reward(reward: Any, name: str) -> Reward:
    """A reward that is called `name` as `Reward` wants it; one that is so already as it is."""
    return reward if isinstance(reward, AnyReward | _Around) else AnyReward(reward, name)


def innermost(reward: Any) -> Any:
    """What is inside all wrappers."""
    while isinstance(reward, AnyReward | _Around):
        reward = reward.reward
    return reward


def source_file(reward: Any) -> str | None:
    """Where the code of a reward is, without its wrappers; None where no file has it."""
    inner = innermost(reward)
    try:
        return inspect.getsourcefile(inner if inspect.isroutine(inner) else type(inner))
    except (TypeError, OSError):  # of what is built in, made by functools.partial, or typed into a running Python
        return None


def _as_tensor(returned: Any) -> Tensor | None:
    """Scores of any shape and dtype; None where there is no way to read them."""
    if isinstance(returned, Tensor):
        return returned
    try:
        if isinstance(returned, np.ndarray) and returned.dtype.kind in "fiub":
            return torch.from_numpy(np.array(returned, np.float32))
        if isinstance(returned, list) and returned and all(isinstance(score, Tensor) for score in returned):
            return torch.stack(returned)
        if isinstance(returned, list) and all(
            isinstance(score, int | float | np.number | np.bool_) for score in returned
        ):
            return torch.tensor([float(score) for score in returned])
    except (TypeError, RuntimeError, OverflowError):  # tensors of several shapes, whole numbers beyond all floats
        pass
    return None


def _what(returned: Any) -> str:
    """Type, shape and dtype of what came."""
    if isinstance(returned, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(returned, Tensor) else "a NumPy array"
        return f"{kind} of shape {tuple(returned.shape)}, {str(returned.dtype).removeprefix('torch.')}"
    if isinstance(returned, list | tuple | dict):
        values = returned.values() if isinstance(returned, dict) else returned
        kinds = ", ".join(dict.fromkeys(type(value).__name__ for value in values))
        return f"a {type(returned).__name__} of {len(returned)}" + (f" ({kinds})" if kinds else "")
    return "None" if returned is None else f"a {type(returned).__name__}"


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
                f"reward {name} cannot be relative: it does not compare the embedding of an image with that of its "
                "prompt, as clip, pickscore, hpsv2, hpsv2_1, ict and toy do"
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


class AtWorst(nn.Module):
    """`rewards.NAME.robust: rho`. A reward's score, with the gradient that it has at the worst picture nearby:

        d r / d x at x - rho h / |h|,    h = d r / d x

    for each picture by itself; rho is its Euclidean distance over all 3 H W values. What makes a reward higher without
    making a picture better is often a narrow ridge of the reward, whose gradient is another one a little aside. From
    RSA-FT (arXiv 2603.21175), its part that moves pictures. One more forward and backward pass of the reward, none of
    the decoder; where no gradient is wanted it is the reward itself.

    Args:
        reward: whose scores do not depend on the batch.
        rho: the distance, above 0; the authors' is 0.01.
        weight: the reward's in the sum: where it is negative, the worst picture has a higher score.
    """

    def __init__(self, reward: Reward, rho: float, weight: float = 1.0) -> None:
        super().__init__()
        self.reward, self.rho = reward, rho if weight >= 0 else -rho
        self.name = reward.name
        self.differentiable = getattr(reward, "differentiable", True)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `Reward`."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            return self.reward(images, prompts)
        here = images.detach().requires_grad_()
        scores = self.reward(here, prompts)
        if not scores.requires_grad:  # who asks for a gradient says so
            return scores
        torch.autograd.backward(scores.sum(), inputs=[here])
        h = torch.zeros_like(here) if here.grad is None else here.grad
        norm = torch.linalg.vector_norm(h, dim=(1, 2, 3), keepdim=True)
        # Where a reward does not look at a picture, or has nothing to say about it, there is no worse one.
        at_worst = self.reward(images - self.rho * (h / norm).nan_to_num(0), prompts)
        return scores.detach() + (at_worst - at_worst.detach())


_Around = PromptRelative | InMicroBatches | AtWorst
