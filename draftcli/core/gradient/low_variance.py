"""DRaFT-LV (Clark et al. 2024, arXiv 2309.17400, section 3.3): several samples of the last step from one rollout.

x_0 is detached, noised again to the last level, x_0 + sigma eps, and denoised once more, with gradient. The loss is the
mean over all 1 + n samples (the paper's listing sums them, which rescales reward and penalty alike).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

from draftcli.core.backward import Piece
from draftcli.core.gradient.last_k import LastK
from draftcli.core.gradient.mode import Evaluations
from draftcli.core.rollout import Rollout
from draftcli.errors import InputError


class LowVariance(LastK):
    """`draftp.gradient: {mode: low_variance, samples: n}`, or draftp.low_variance_samples: n.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps, for the first sample.
        samples: n, beside the first.

    Raises:
        InputError: K or n is out of range.
    """

    recomputes = True
    like_last_k = False

    def __init__(self, total: int, k: int, samples: int = 2) -> None:
        super().__init__(total, k)
        if type(samples) is not int or samples < 1:
            raise InputError(f"draftp.gradient low_variance has samples {samples!r}; allowed are 1 and more")
        self.samples = samples
        self.pieces_per_image = 1 + samples

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`."""
        last = self.total - 1
        yield (piece := rollout.piece(self.first))
        assert piece.x_0 is not None
        (level,) = rollout.sampler.levels(last)
        sigma = sqrt(level.sigma**2 - level.churn**2)  # the piece adds what fresh noise its first level has
        for j in range(self.samples):
            yield rollout.piece(last, piece.x_0 + sigma * rollout.noise("low variance", j))

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`: each sample is the last step once more, without gradient and with it."""
        first, more = super().evaluations(per_step, recompute), self.samples * per_step[-1]
        return Evaluations(first.without_gradient + more, first.with_gradient + more)

    def describe(self) -> str:
        """See `GradientMode`."""
        return f"{super().describe()}, {self.samples} more samples of the last one (DRaFT-LV)"
