"""AlignProp's random truncation (Prabhudesai et al. 2023, arXiv 2310.03739): a K for each trajectory.

Backpropagation through a fixed, large K collapsed there within two epochs; a random K did not. One K is drawn for each
trajectory, from its image's seed. (A draw in every step, as some ports have it, is another distribution: the gradient
then ends at the last step that happened to be cut.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import erf, sqrt
from random import Random

from draftcli.core.backward import Piece
from draftcli.core.gradient.mode import Evaluations, check_count
from draftcli.core.rollout import Rollout
from draftcli.errors import InputError


class RandomK:
    """`draftp.gradient: {mode: random_k, low: 1, high: 25}`, uniform, or `{mode: random_k, mean: 8, std: 5}`.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps, which has no say here.
        low: smallest K.
        high: largest K; default N.
        mean: of a normal distribution, rounded and clipped to low .. high; needs `std`.
        std: its deviation, above 0.

    Raises:
        InputError: an option is out of range, or one of `mean` and `std` is missing.
    """

    uses_k = False
    recomputes = False
    pieces_per_image = 1
    like_last_k = True
    asks_base = False

    def __init__(
        self,
        total: int,
        k: int,
        low: int = 1,
        high: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ) -> None:
        self.total = total
        self.high = check_count("random_k", "high", total if high is None else high, total)
        self.low = check_count("random_k", "low", low, self.high)
        if (mean is None) != (std is None):
            raise InputError("draftp.gradient random_k takes mean and std together, or neither")
        if std is not None and not (isinstance(std, int | float) and std > 0):
            raise InputError(f"draftp.gradient random_k has std {std!r}; it is a number above 0")
        if mean is not None and not isinstance(mean, int | float):
            raise InputError(f"draftp.gradient random_k has mean {mean!r}; it is a number")
        self.mean, self.std = mean, std
        self.longest, self.even = self.high, self.low == self.high
        self.first = total - self.high

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`: images with the same K are one piece."""
        firsts = [self.total - self._drawn(draw) for draw in rollout.draws("random k")]
        for first, part in rollout.apart(firsts, self.total - self.low):
            yield part.piece(first)

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`."""
        with_gradient = sum(share * sum(per_step[-k:]) for k, share in self.shares().items())
        return Evaluations(sum(per_step) - (0 if recompute else with_gradient), with_gradient)

    def describe(self) -> str:
        """See `GradientMode`."""
        drawn = "" if self.mean is None else f", with mean {self.mean:g} and deviation {self.std:g}"
        return (
            f"gradient through the last {self.low} to {self.high} of {self.total} sampler steps, drawn for each "
            f"trajectory{drawn}"
        )

    def shares(self) -> dict[int, float]:
        """How probable each K is; they add up to 1."""
        ks = range(self.low, self.high + 1)
        if self.mean is None or self.std is None:
            return dict.fromkeys(ks, 1 / len(ks))
        mean, std = self.mean, self.std

        def below(value: float) -> float:
            return (1 + erf((value - mean) / (std * sqrt(2)))) / 2

        inner = {k: below(k + 0.5) - below(k - 0.5) for k in ks}
        inner[self.low] += below(self.low - 0.5)
        inner[self.high] += 1 - below(self.high + 0.5)
        return inner

    def _drawn(self, draw: Random) -> int:
        if self.mean is None or self.std is None:
            return draw.randint(self.low, self.high)
        return min(max(round(draw.gauss(self.mean, self.std)), self.low), self.high)
