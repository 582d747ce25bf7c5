"""An exponential moving average of the trained weights: smoother pictures, and a brake on reward hacking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from draftcli.core.engine.sharding import as_part_of, local


class Ema:
    """The average of weights after each step, updated in place: average = d average + (1 - d) weights.

    Early on d is (1 + n) / (10 + n) after n updates, as in diffusers' EMAModel: the start is forgotten soon.

    Args:
        parameters: the weights that are trained. Of those that are split over processes, each averages its part.
        decay: d once enough steps were taken, 0 < d < 1.
        device: where the average is kept; None: beside each weight.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float, device: torch.device | None = None) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages = [local(p).detach().to(device or p.device, copy=True) for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(local(parameter).to(average.device), 1 - decay)
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
            weight = local(parameter)
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def tensors(self) -> list[Tensor]:
        """The averages, split as their weights are."""
        return [as_part_of(average, p) for average, p in zip(self.averages, self.parameters, strict=True)]

    @torch.no_grad()
    def load(self, updates: int, tensors: Sequence[Tensor]) -> None:
        """Put back what `updates` and `tensors` were."""
        self.updates = updates
        for average, kept in zip(self.averages, tensors, strict=True):
            average.copy_(local(kept))
