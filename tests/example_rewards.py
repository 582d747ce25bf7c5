"""Rewards for tests, found as users' own are: by `tests.example_rewards:red`."""

from __future__ import annotations

import torch
from torch import Tensor


class Red:
    """How much redder than green a picture is."""

    name = "red"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 1]).mean((1, 2))


class Broken(Red):
    """A reward that is never a number."""

    name = "broken"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(images, prompts) * torch.nan


class Choosy(Red):
    """Green, with nothing to say where the prompt is about something blue."""

    name = "choosy"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        said = torch.tensor([torch.nan if "blue" in prompt else 1.0 for prompt in prompts])
        return -super().__call__(images, prompts) * said.to(images)


class Jury(Red):
    """Judges, but carries no gradient."""

    name = "jury"
    differentiable = False


class Green(Red):
    """The opposite of red: what a run that is trained on red loses."""

    name = "green"

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -super().__call__(images, prompts)


red, broken, choosy, jury, green = Red, Broken, Choosy, Jury, Green
