"""The learned reward that ships, and the oracle by the same door."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from draftcli.rewards.clip import CLIPReward
from draftcli.toy import world
from draftcli.toy.reward import toy_oracle, toy_reward

SCENES = world.held_out_scenes(32)
PROMPTS = [world.caption(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def reward() -> CLIPReward:
    return toy_reward()


@pytest.fixture(scope="module")
def truth() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([world.render(scene, rng) for scene in SCENES]))


def test_reward_is_scaled_cosine(reward: CLIPReward, truth: torch.Tensor) -> None:
    scores = reward(truth, PROMPTS)
    assert scores.shape == (32,)
    assert scores.dtype == torch.float32
    inputs = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt")
    outputs = reward.clip(**inputs, pixel_values=truth * 2 - 1)  # transformers' own logits
    torch.testing.assert_close(scores, outputs.logits_per_image.diagonal(), rtol=1e-4, atol=1e-4)
    assert scores.abs().max() <= reward.clip.logit_scale.exp()


def test_reward_has_a_finite_gradient_in_the_pixels_only(reward: CLIPReward, truth: torch.Tensor) -> None:
    images = truth[:4].clone().requires_grad_()
    reward(images, PROMPTS[:4]).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().max() > 0
    assert not any(p.requires_grad for p in reward.parameters())


def test_reward_prefers_the_right_caption(reward: CLIPReward, truth: torch.Tensor) -> None:
    wrong = PROMPTS[1:] + PROMPTS[:1]
    assert (reward(truth, PROMPTS) > reward(truth, wrong)).float().mean() > 0.7  # chance is 0.5


def test_reward_takes_other_sizes_and_types(reward: CLIPReward, truth: torch.Tensor) -> None:
    larger = torch.nn.functional.interpolate(truth[:4], size=(96, 80), mode="bicubic", antialias=True).clamp(0, 1)
    assert reward(larger.bfloat16(), PROMPTS[:4]).dtype == torch.float32


def test_oracle_is_a_reward_that_says_it_has_no_gradient(truth: torch.Tensor) -> None:
    oracle = toy_oracle()
    scores = oracle(truth[:3], [PROMPTS[0], "a photo of a dog", PROMPTS[2]])
    assert not oracle.differentiable
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[0] > 0.95
