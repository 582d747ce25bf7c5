"""Running statistics of scores: what those of the training so far span."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEMORY = 0.99  # a step's scores count by this power of the steps since: about the last hundred count
FLAT = 1e-6  # scores that span less than this share of their mean are all alike, but for rounding


class Spread:
    """What the scores of past steps span: count, mean and sum of squared deviations, all fading; lowest, highest, and
    the mean of the first step.

    Sums are exactly rounded (math.fsum): the same scores in any order, from any number of micro-batches or ranks, leave
    the same statistics, bit for bit.
    """

    def __init__(self) -> None:
        self.count = self.mean = self.squares = 0.0
        self.low, self.high, self.first = math.inf, -math.inf, 0.0

    def update(self, scores: Tensor) -> None:
        """Take in all scores of one step; those that are not finite say nothing."""
        values = [value for value in scores.double().flatten().tolist() if math.isfinite(value)]
        if not values:
            return
        number = len(values)
        mean = math.fsum(values) / number
        squares = math.fsum((value - mean) ** 2 for value in values)
        self.first = self.first if self.count else mean
        kept = MEMORY * self.count
        shift = mean - self.mean
        self.count = kept + number
        self.mean += shift * number / self.count
        self.squares = MEMORY * self.squares + squares + shift**2 * kept * number / self.count
        self.low, self.high = min(self.low, *values), max(self.high, *values)

    def scale(self, kind: str) -> float | None:
        """The deviation (`std`) or highest minus lowest (`range`); None while nothing differs yet."""
        if not self.count:
            return None
        span = math.sqrt(self.squares / self.count) if kind == "std" else self.high - self.low
        return span if span > FLAT * abs(self.mean) else None

    def rank(self, scores: Tensor) -> Tensor | None:
        """The share of the scores so far that is lower than each of `scores`, in (0, 1), as if they were normally
        distributed; NaN for NaN. None while nothing differs yet.
        """
        deviation = self.scale("std")
        return None if deviation is None else torch.special.ndtr((scores.double() - self.mean) / deviation)

    def tensor(self) -> Tensor:
        """The six numbers, float64."""
        numbers = [self.count, self.mean, self.squares, self.low, self.high, self.first]
        return torch.tensor(numbers, dtype=torch.float64)

    def load(self, numbers: Tensor) -> None:
        """Put back what `tensor` gave, also that of versions that did not keep the mean of the first step."""
        self.count, self.mean, self.squares, self.low, self.high, *first = numbers.double().tolist()
        self.first = first[0] if first else self.mean
