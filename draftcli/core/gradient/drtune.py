"""DRTune (Wu et al. 2024, arXiv 2405.00760): deep supervision at a detached input, and an early stop.

The network's input is detached in every step, and the gradient flows through the sampler's sums alone; K equally spaced
steps with a random start are trained; the walk stops at a random step of the last part, where the image is predicted:
x_0 = x_M - sigma_M eps_M, with x_M = x_T + sum_{i < M} dsigma_i eps_i. So an estimate i < M moves x_0 by dsigma_i.
Memory does not grow with K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from draftcli.core.backward import Piece
from draftcli.core.gradient.mode import Evaluations, at_once, check_count, check_not_drawn, check_steps
from draftcli.core.rollout import Rollout
from draftcli.errors import InputError


class Drtune:
    """`draftp.gradient: {mode: drtune, steps: 3, stop: 10}`, or `{mode: drtune, at: [3, 12, 14], stop: 10}`.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps, which has no say here.
        steps: K, how many steps before the stop are trained; default 3.
        stop: the stop M is one of so many last steps; default 40 % of N.
        at: the trained steps outright, rather than drawn: none after the earliest stop.
        detach: whether the network's input is detached. False lets the gradient through x as well: with every step
            trained and no early stop that is full backpropagation, last_k with K = N.

    Raises:
        InputError: an option is out of range, a step in `at` is repeated, or lies after a stop that can be drawn, or
            `steps` is given beside it.
    """

    uses_k = False
    recomputes = True
    pieces_per_image = 1
    like_last_k = True
    asks_base = False
    even = True

    def __init__(
        self,
        total: int,
        k: int,
        steps: int | None = None,
        stop: int | None = None,
        at: Sequence[int] | None = None,
        detach: bool = True,
    ) -> None:
        self.total = total
        check_not_drawn("drtune", at, steps=steps)
        self.at = None if at is None else check_steps("drtune", at, total)
        if self.at is None and total == 1:
            raise InputError("draftp.gradient drtune trains steps before the stop: it needs sampling.steps 2 or more")
        default = max(1, round(0.4 * total))
        most = total if self.at is not None else total - 1
        self.stop = check_count("drtune", "stop", default if stop is None else stop, most)
        self.earliest = total - self.stop
        if self.at is not None and self.at[-1] > self.earliest:
            raise InputError(
                f"draftp.gradient drtune trains step {self.at[-1]}, and can stop at step {self.earliest} of {total}: "
                f"give stop {total - self.at[-1]} or less"
            )
        if type(detach) is not bool:
            raise InputError(f"draftp.gradient drtune has detach {detach!r}; it is true or false")
        self.detach, before = detach, max(1, self.earliest)
        self.steps = check_count("drtune", "steps", min(3, before) if steps is None else steps, before)
        self.longest = len(self.at or range(self.steps))
        self.first = 0 if self.at is None else self.at[0]

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`: one piece an image."""
        rollout.records = True
        plans = [self._drawn(draw) for draw in rollout.draws("drtune")]
        chosen = dict(zip(rollout.batch.seeds, plans, strict=True))
        for _, here in rollout.apart([stop + 1 for stop, _ in plans], self.total):
            for part in here.each():
                yield self._piece(part, *chosen[part.batch.seeds[0]])

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`: every step to the stop is walked without gradient first."""
        stops = range(self.earliest, self.total)
        walked = sum(sum(per_step[: stop + 1]) for stop in stops) / self.stop
        if self.at is not None:
            return Evaluations(walked, sum(per_step[i] for i in self.at))
        sets = [
            range(start, start + self.steps * apart, apart) for stop in stops for apart, start in self._starts(stop)
        ]
        weights = [1 / (self.stop * len(self._starts(stop))) for stop in stops for _ in self._starts(stop)]
        trained = sum(w * sum(per_step[i] for i in at) for w, at in zip(weights, sets, strict=True))
        return Evaluations(walked, trained)

    def describe(self) -> str:
        """See `GradientMode`."""
        which = f"{self.steps} equally spaced steps" if self.at is None else f"steps {', '.join(map(str, self.at))}"
        return (
            f"gradient through {which} of {self.total} sampler steps, {'' if self.detach else 'not '}detached; the "
            f"reward sees the image predicted at one of the last {self.stop} (DRTune)"
        )

    def _starts(self, stop: int) -> list[tuple[int, int]]:
        """What can be drawn for a stop: the steps' distance, and where they start."""
        apart = stop // self.steps
        return [(apart, start) for start in range(stop - (self.steps - 1) * apart)]

    def _drawn(self, draw: Random) -> tuple[int, Sequence[int]]:
        """The stop and the trained steps of one trajectory."""
        stop = draw.randint(self.earliest, self.total - 1)
        if self.at is not None:
            return stop, self.at
        apart, start = draw.choice(self._starts(stop))
        return stop, range(start, start + self.steps * apart, apart)

    def _piece(self, rollout: Rollout, stop: int, at: Sequence[int]) -> Piece:
        walked = rollout.sampler.levels(stop=stop)
        levels = [*walked, *(at_once(level) for level in rollout.sampler.levels(stop, stop + 1))]
        moves = [level.sigma_next - level.sigma for level in levels]
        return Piece(
            rollout.batch.prompts,
            rollout.cond,
            [levels[i] for i in at],
            [rollout.seen[i] for i in at],
            rollout.seen[stop] + moves[stop] * rollout.eps[stop],
            reach=[moves[i] for i in at] if self.detach else None,
        )
