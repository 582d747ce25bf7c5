"""ReFL (Xu et al. 2023, ImageReward, arXiv 2304.05977): the reward of a prediction made at a random late step.

The walk stops at a random step of the last part. One call with gradient there predicts the image, x_0 = x - sigma eps,
and the reward looks at that. The steps after it are saved; the earlier the stop, the blurrier is what the reward sees.
A stop at the last step is DRaFT-1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from draftcli.core.backward import Piece
from draftcli.core.gradient.mode import Evaluations, at_once, check_count
from draftcli.core.rollout import Rollout


class Refl:
    """`draftp.gradient: {mode: refl, window: 11}`.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps, which has no say here.
        window: the stop is one of so many last steps; default 11 of 25, as FlowBP's comparison has it, in proportion.

    Raises:
        InputError: `window` is outside 1 .. N.
    """

    uses_k = False
    recomputes = False
    pieces_per_image = 1
    longest = 1
    like_last_k = True
    asks_base = False
    even = True

    def __init__(self, total: int, k: int, window: int | None = None) -> None:
        self.total = total
        default = max(1, round(11 / 25 * total))
        self.window = check_count("refl", "window", default if window is None else window, total)
        self.first = total - self.window

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`: images that stop at the same step are one piece."""
        stops = [draw.randint(self.first, self.total - 1) for draw in rollout.draws("refl")]
        for stop, part in rollout.apart(stops, self.total - 1):
            yield part.piece(stop, levels=[at_once(level) for level in part.sampler.levels(stop, stop + 1)])

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`."""
        stops = range(self.first, self.total)
        before = sum(sum(per_step[:stop]) for stop in stops) / self.window
        at_stop = sum(per_step[stop] for stop in stops) / self.window
        return Evaluations(before + (at_stop if recompute else 0), at_stop)

    def describe(self) -> str:
        """See `GradientMode`."""
        return (
            f"gradient through one of the last {self.window} of {self.total} sampler steps, drawn for each trajectory; "
            "the reward sees the image predicted there (ReFL)"
        )
