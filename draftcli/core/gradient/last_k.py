"""DRaFT-K (Clark et al. 2024, arXiv 2309.17400, algorithm 1): the last K steps carry gradient.

The first N - K steps run without a graph; the gradient of the others runs through the network and through x from step
to step. K = N is full backpropagation (DRaFT); K = 1 is the default of DRaFT+.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from draftcli.core.backward import Piece
from draftcli.core.gradient.mode import Evaluations
from draftcli.core.rollout import Rollout
from draftcli.errors import InputError


class LastK:
    """`draftp.gradient: last_k`, the default.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps.

    Raises:
        InputError: K is above N.
    """

    uses_k = True
    recomputes = False
    pieces_per_image = 1
    like_last_k = True
    asks_base = False
    even = True

    def __init__(self, total: int, k: int) -> None:
        if k > total:
            raise InputError(f"draftp.truncation_steps is {k}, sampling.steps {total}: K can be at most {total}")
        self.total = total
        self.k = self.longest = k
        self.first = total - k

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`."""
        yield rollout.piece(self.first)

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`."""
        with_gradient = sum(per_step[-self.k :])
        return Evaluations(sum(per_step) - (0 if recompute else with_gradient), with_gradient)

    def describe(self) -> str:
        """See `GradientMode`."""
        return f"gradient through the last {self.k} of {self.total} sampler steps"
