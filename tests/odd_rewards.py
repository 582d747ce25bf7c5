"""Rewards in the forms that people bring: functions, objects, classes and factories, and what they return.

All that give scores give those of `red`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def function(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[:, 0] - images[:, 1]).mean((1, 2))


class Class:
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return function(images, prompts)


class Network(nn.Module):
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return function(images, prompts)


def factory(scale: float = 1.0) -> Any:
    return lambda images, prompts: scale * function(images, prompts)


def with_default(images: Tensor, prompts: list[str], scale: float = 1.0) -> Tensor:
    return scale * function(images, prompts)


instance, network = Class(), Network()
partly = functools.partial(with_default, scale=1.0)


def column(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts)[:, None]


def half(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts).half()


def brain(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts).bfloat16()


def double(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts).double()


def list_of_tensors(images: Tensor, prompts: list[str]) -> list[Tensor]:
    return list(function(images, prompts))


def list_of_small_tensors(images: Tensor, prompts: list[str]) -> list[Tensor]:
    return list(column(images, prompts))


def array(images: Tensor, prompts: list[str]) -> np.ndarray:
    return function(images, prompts).detach().numpy()


def list_of_numbers(images: Tensor, prompts: list[str]) -> list[float]:
    return function(images, prompts).tolist()


def whole_numbers(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts).mul(100).long()


def bools(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts) > 0


def detached(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts).detach()


def scalar(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts).mean()


def two_columns(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts)[:, None].repeat(1, 2)


def row(images: Tensor, prompts: list[str]) -> Tensor:
    return function(images, prompts)[None]


def dictionary(images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    return {"scores": function(images, prompts)}


def pair(images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    return function(images, prompts), {}


def nothing(images: Tensor, prompts: list[str]) -> None:
    return None


def list_of_words(images: Tensor, prompts: list[str]) -> list[str]:
    return prompts


def too_long(images: Tensor, prompts: list[str]) -> list[Tensor]:
    return list(function(images, prompts)) * 2


def array_of_objects(images: Tensor, prompts: list[str]) -> np.ndarray:
    return np.array([None] * len(prompts))


def complex_numbers(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.complex(function(images, prompts), function(images, prompts))


def of_bytes(images: Tensor, prompts: list[str]) -> Tensor:
    """Made for pictures in [0, 255]."""
    if images.max() <= 1:
        raise ValueError("expected pixels in [0, 255]")
    return function(images, prompts)


def one_argument(images: Tensor) -> Tensor:
    return function(images, [])


def anything(*arguments: Any) -> Tensor:
    return function(*arguments)


def makes_a_class() -> type:
    return Class


def makes_nothing() -> None:
    return None


class Needy(Class):
    def __init__(self, weights: str) -> None:
        self.weights = weights


number = 7
