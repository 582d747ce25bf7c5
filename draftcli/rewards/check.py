"""Checks of a reward before hours are spent on it: range, determinism, gradient, batch independence, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.rewards.first_call import ask_once
from draftcli.rewards.protocol import Reward
from draftcli.rewards.wrappers import as_reward

# Within the toy world's grammar, so that its oracle can score them.
PROMPTS = [
    "a large red circle in the centre of a white background",
    "a small blue square in the centre of a black background",
    "a large green star in the centre of a white background",
]
ALIKE = 1e-4  # relative; scores of the same picture on the same machine
SLOPES = 0.05  # relative; a gradient against finite differences, of a network in float64


@dataclass(frozen=True)
class RewardFinding:
    """One thing looked at.

    Attributes:
        what: its name.
        good: None where it is information only.
        words: what was found.
    """

    what: str
    good: bool | None
    words: str


@dataclass(frozen=True)
class Verdict:
    """What a reward is good for.

    Attributes:
        findings: in the order they were looked at.
        trains: nothing speaks against training on it.
        judges: nothing speaks against evaluating with it.
    """

    findings: list[RewardFinding]
    trains: bool
    judges: bool

    @property
    def words(self) -> str:
        """The verdict in one line."""
        if self.trains:
            return "usable for training and for evaluation"
        return "usable for evaluation only (held_out_rewards)" if self.judges else "not usable as it is"


def check_reward(reward: Reward, size: tuple[int, int] = (256, 192)) -> Verdict:
    """Score noise and a flat picture, and look at what comes.

    Args:
        reward: a network among them is turned into float64 at the end; do not use it afterwards.
        size: (height, width) of the pictures.

    Raises:
        InputError: it fails, or what it returns are no scores.
    """
    name = getattr(reward, "name", type(reward).__name__)
    reward = as_reward(reward, name)
    device = next((p.device for p in _parameters(reward)), torch.device("cpu"))
    noise = torch.rand(len(PROMPTS), 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    noise = 0.1 + 0.8 * noise  # away from 0 and 1, where preprocessing may saturate
    ask_once({name: reward}, PROMPTS, size, device)
    findings = [_range(reward, noise)]
    if findings[0].good:
        findings += [_determinism(reward, noise), _batch(reward, noise), _prompt(reward, noise)]
    judges = all(f.good is not False for f in findings)
    trains = judges and bool(getattr(reward, "differentiable", True))
    if not getattr(reward, "differentiable", True):
        findings.append(RewardFinding("gradient", None, "none, the reward declares differentiable = False"))
    elif judges:
        findings += _gradient(reward, noise)
        trains = all(f.good is not False for f in findings)
    return Verdict(findings, trains, judges)


def _range(reward: Reward, noise: Tensor) -> RewardFinding:
    with torch.no_grad():
        scores = {"noise": reward(noise, PROMPTS), "flat grey": reward(torch.full_like(noise, 0.5), PROMPTS)}
    for what, score in scores.items():
        if score.isinf().any() or score.isnan().all():
            return RewardFinding("range", False, f"{what}: scores are {[round(s, 4) for s in score.tolist()]}")
    words = "; ".join(
        f"{w} {float(s.nan_to_num().min()):.4g} to {float(s.nan_to_num().max()):.4g}" for w, s in scores.items()
    )
    silent = int(scores["noise"].isnan().sum())
    return RewardFinding(
        "range", True, words + (f"; not applicable to {silent} of {len(PROMPTS)} prompts" if silent else "")
    )


@torch.no_grad()
def _determinism(reward: Reward, noise: Tensor) -> RewardFinding:
    gap = _gap(reward(noise, PROMPTS), reward(noise, PROMPTS))
    return RewardFinding("determinism", gap == 0, f"the same images twice differ by {gap:.1e}")


@torch.no_grad()
def _batch(reward: Reward, noise: Tensor) -> RewardFinding:
    alone = torch.cat([reward(noise[i : i + 1], PROMPTS[i : i + 1]) for i in range(len(PROMPTS))])
    gap = _gap(reward(noise, PROMPTS), alone)
    return RewardFinding("batch", gap <= ALIKE, f"an image alone and among others differs by {gap:.1e} of its score")


@torch.no_grad()
def _prompt(reward: Reward, noise: Tensor) -> RewardFinding:
    moved = _gap(reward(noise, PROMPTS), reward(noise, PROMPTS[1:] + PROMPTS[:1]))
    return RewardFinding("prompt", None, "matters" if moved > 0 else "does not matter to the score")


def _gradient(reward: Reward, noise: Tensor) -> list[RewardFinding]:
    """The gradient exists, is finite, not zero, stays in its own picture, and is that of finite differences."""
    images = noise.clone().requires_grad_()
    saved: dict[tuple[Any, ...], int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        scores = reward(images, PROMPTS)
    if not scores.requires_grad:
        words = (
            "blocked: the score does not depend on the image by torch's operations alone "
            "(a detach, no_grad, numpy or Pillow on the way)"
        )
        return [RewardFinding("gradient", False, words)]
    # One with something to say: NaN is a reward's answer to a prompt that it has no opinion on.
    i = int(scores.isfinite().int().argmax())
    (gradient,) = torch.autograd.grad(scores[i], images, allow_unused=True)
    if gradient is None or not gradient.isfinite().all():
        kind = "blocked: it does not reach the image" if gradient is None else "not finite (NaN or infinity)"
        return [RewardFinding("gradient", False, kind)]
    largest = float(gradient[i].abs().max())
    if largest == 0:
        return [RewardFinding("gradient", False, "zero everywhere")]
    found = [RewardFinding("gradient", True, f"finite, largest {largest:.2e} a pixel")]
    others = torch.cat([gradient[:i], gradient[i + 1 :]])
    if float(others.abs().max()) > ALIKE * largest:
        found.append(RewardFinding("batch", False, "the score of one image has a gradient in another"))
    if any(torch.equal(scores, scores.to(dtype).to(scores)) for dtype in (torch.float16, torch.bfloat16)):
        return [*found, RewardFinding("slope", None, "not compared: differences of scores of 16 bits say nothing")]
    # Before the network is turned into float64.
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in _parameters(reward)}
    kept = sum(size for (place, _), size in saved.items() if place not in weights)
    words = f"weights {_bytes(sum(weights.values()))}, {_bytes(kept / len(noise))} an image while its gradient is held"
    try:
        slope, expected = _slopes(reward, noise[i : i + 1], PROMPTS[i])
    except torch.OutOfMemoryError:
        found.append(RewardFinding("slope", None, "not compared: the network in float64 does not fit into the memory"))
    else:
        gap = abs(slope - expected) / max(abs(slope), abs(expected), 1e-30)
        found.append(RewardFinding("slope", gap <= SLOPES, f"gradient {slope:.3e}, finite differences {expected:.3e}"))
    return [*found, RewardFinding("memory", None, words)]


def _slopes(reward: Reward, image: Tensor, prompt: str) -> tuple[float, float]:
    """The slope along the gradient, by the gradient and by central differences; float64 where that is possible."""
    if image.device.type == "mps":
        return _slopes_of(reward, image, prompt)
    if isinstance(reward, nn.Module):
        reward.double()
    with double_by_default():
        return _slopes_of(reward, image.double(), prompt)


@contextmanager
def double_by_default() -> Iterator[None]:
    """New tensors are float64 where nothing else is said: transformers 4 fills CLIP's mask with the smallest float64,
    which the usual float32 cannot hold.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _slopes_of(reward: Reward, image: Tensor, prompt: str) -> tuple[float, float]:
    at = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(at, [prompt]).sum(), at)
    direction = gradient / gradient.norm()
    # Longer where the score itself is kept in float32 and rounding would show.
    with torch.no_grad():
        exact = reward(image, [prompt]).dtype == torch.float64
        step = 1e-5 if exact else 1e-2
        ahead, behind = (reward(image + s * step * direction, [prompt]).double().sum() for s in (1, -1))
    return float(gradient.norm()), float(ahead - behind) / (2 * step)


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the scores' size; NaN only beside NaN."""
    if bool((a.isnan() != b.isnan()).any()):
        return float("inf")
    a, b = a.nan_to_num(), b.nan_to_num()
    return float((a - b).abs().max() / max(float(a.abs().max()), 1e-8))


def _parameters(reward: Reward) -> list[Tensor]:
    return list(reward.parameters()) if isinstance(reward, nn.Module) else []


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
