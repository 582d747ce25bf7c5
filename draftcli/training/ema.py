"""An exponential moving average of the trained weights: smoother pictures, and a brake on reward hacking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Ema:
    """The average of weights after each step, updated in place: average = d average + (1 - d) weights.

    Early on d is (1 + n) / (10 + n) after n updates, as in diffusers' EMAModel: the start is forgotten soon.

    Args:
        parameters: the weights that are trained.
        decay: d once enough steps were taken, 0 < d < 1.
        device: where the average is kept; None: beside each weight.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, device: torch.device | None = None) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages = [p.detach().to(device or p.device, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter.to(average.device), 1 - decay)
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the weights are the average. Afterwards they are what they were, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"updates": self.updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.updates = state["updates"]
        for average, kept in zip(self.averages, state["averages"], strict=True):
            average.copy_(kept)
