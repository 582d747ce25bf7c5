"""FlowBP-Sparse (arXiv 2606.11075): K chosen steps anywhere, each backpropagated by itself.

The reward sees the true x_0. In Euler's walk x_0 = x_N + sum_i dsigma_i eps_i. Each chosen estimate is taken at a
detached x, so that

    d (-r) / d theta  ~  sum_{i in A} gamma dsigma_i < d (-r) / d x_0, d eps_i / d theta >

needs the memory of one step whatever K is. gamma = 1 + rescale (sum_i |dsigma_i| / sum_{i in A} |dsigma_i| - 1) makes
up for the steps left out. On SDXL's grid the first |dsigma| is fifteen times the last, where flow models, for which the
method was written, have nearly equal ones: a learning rate or a clipping value does not carry over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from draftcli.core.backward import Piece
from draftcli.core.gradient.mode import Evaluations, check_count, check_not_drawn, check_number, check_steps
from draftcli.core.rollout import Rollout


class Sparse:
    """`draftp.gradient: {mode: sparse, steps: 4, late_bias: 1.0, tail: 1.0, rescale: 0.5}`, or with `at: [3, 12, 24]`.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps, which has no say here.
        steps: K, how many steps carry gradient; default 4.
        late_bias: b; step i is drawn with a probability proportional to (i + 1)^b; default 1.
        tail: share of the steps, the last ones, that are drawn from, in (0, 1]; default 1, all of them.
        rescale: rho, in [0, 1]: 0 leaves each step its own weight, 1 makes up for all that were left out.
        at: the steps outright, 0 .. N - 1, rather than drawn: without `steps`, `late_bias` and `tail`.

    Raises:
        InputError: an option is out of range, a step in `at` is repeated, or options for drawing are given beside it.
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
        late_bias: float | None = None,
        tail: float | None = None,
        rescale: float = 0.5,
        at: Sequence[int] | None = None,
    ) -> None:
        self.total = total
        check_not_drawn("sparse", at, steps=steps, late_bias=late_bias, tail=tail)
        share = check_number("sparse", "tail", 1.0 if tail is None else tail, 0, 1, above=True)
        self.rescale = check_number("sparse", "rescale", rescale, 0, 1)
        self.late_bias = check_number("sparse", "late_bias", 1.0 if late_bias is None else late_bias, 0, 100)
        self.pool = range(total - max(1, round(share * total)), total)
        self.at = None if at is None else check_steps("sparse", at, total)
        default = min(4, len(self.pool))
        self.steps = check_count("sparse", "steps", default if steps is None else steps, len(self.pool))
        self.longest = len(self.at or range(self.steps))
        self.first = (self.at or self.pool)[0]

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`: one piece an image, or one for all where the steps are named."""
        rollout.records = True
        rollout.to(self.total)
        if self.at is not None:
            yield self._piece(rollout, self.at)
            return
        for draw, part in zip(rollout.draws("sparse"), rollout.each(), strict=True):
            yield self._piece(part, self._drawn(draw))

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`: every step is walked without gradient first."""
        if self.at is not None:
            return Evaluations(sum(per_step), sum(per_step[i] for i in self.at))
        return Evaluations(sum(per_step), sum(share * per_step[i] for i, share in self.shares().items()))

    def describe(self) -> str:
        """See `GradientMode`."""
        which = f"steps {', '.join(map(str, self.at or []))} of {self.total} sampler steps"
        if self.at is None:
            which = f"{self.steps} of the last {len(self.pool)} of {self.total} sampler steps, drawn for each image"
        return f"gradient through {which}, each by itself at a detached x (FlowBP-Sparse)"

    def shares(self) -> dict[int, float]:
        """How often each step is among the chosen ones, estimated from 4,096 draws; they add up to K."""
        counts = dict.fromkeys(self.pool, 0)
        for seed in range(4096):
            for i in self._drawn(Random(seed)):
                counts[i] += 1
        return {i: count / 4096 for i, count in counts.items()}

    def _drawn(self, draw: Random) -> list[int]:
        """K different steps, in order. Those with the largest u^(1/w) are drawn with weights w (Efraimidis 2006)."""
        keys = {i: draw.random() ** (i + 1) ** -self.late_bias for i in self.pool}
        return sorted(sorted(keys, key=keys.__getitem__)[-self.steps :])

    def _piece(self, rollout: Rollout, at: Sequence[int]) -> Piece:
        levels = rollout.sampler.levels()
        moves = [level.sigma_next - level.sigma for level in levels]
        walked, chosen = sum(map(abs, moves)), sum(abs(moves[i]) for i in at)
        # Without data, as memory is planned, all levels are 0.
        gamma = 1 + self.rescale * (walked / chosen - 1) if chosen else 1.0
        return Piece(
            rollout.batch.prompts,
            rollout.cond,
            [levels[i] for i in at],
            [rollout.seen[i] for i in at],
            rollout.to(self.total),
            reach=[gamma * moves[i] for i in at],
        )
