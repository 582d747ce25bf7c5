"""Gradient matching: VGG-Flow (arXiv 2512.05116) without its value network, in our coordinates.

At steps chosen at random the estimate is regressed onto that of the base, moved along the reward's gradient:

    loss = mean (eps - sg target)^2,    target = eps_base - scale h / (1 + sigma)^3,
    h = d r / d x_0 at the prediction x_0 = x - sigma sg(eps), its norm clipped to 1 for each image

The reward's graph holds decoder and reward but no UNet, and the loss has a fixed point: where tuned differs from base
by the reward's gradient. So the KL is built in, 1 / scale is its strength, and draftp.kl_coeff comes on top of it.

Coordinates: a flow model walks y = (1 - u) x_0 + u n and regresses v = n - x_0 onto v_base - scale (1 - u)^2 h. With
u = sigma / (1 + sigma) and x = x_0 + sigma n it is y = x / (1 + sigma), 1 - u = 1 / (1 + sigma), and at a given x,
v = (1 + sigma) eps - x. Hence d v = (1 + sigma) d eps, and the target above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from draftcli.core.backward import Piece
from draftcli.core.gradient.mode import Evaluations, check_number
from draftcli.core.rollout import Rollout
from draftcli.core.schedule import Level


class Matching:
    """`draftp.gradient: {mode: matching, share: 0.25, scale: 1000.0, weight: 1.0}`.

    Args:
        total: N, sampler steps.
        k: draftp.truncation_steps, which has no say here.
        share: of the steps that are trained, drawn for each trajectory, in (0, 1].
        scale: s, above 0: how far the target is from the base; the authors' is 1000.
        weight: of the loss, above 0.

    Raises:
        InputError: an option is out of range.
    """

    uses_k = False
    recomputes = True
    longest = 1
    first = 0
    like_last_k = False
    asks_base = True
    even = True

    def __init__(self, total: int, k: int, share: float = 0.25, scale: float = 1000.0, weight: float = 1.0) -> None:
        self.total = total
        self.pieces_per_image = max(1, round(check_number("matching", "share", share, 0, 1, above=True) * total))
        self.scale = check_number("matching", "scale", scale, 0, 1e9, above=True)
        self.weight = check_number("matching", "weight", weight, 0, 1e9, above=True)

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """See `GradientMode`: one piece for each trained step of each image."""
        rollout.records = True
        rollout.to(self.total)
        levels = rollout.sampler.levels()
        for draw, part in zip(rollout.draws("matching"), rollout.each(), strict=True):
            for i in sorted(draw.sample(range(self.total), self.pieces_per_image)):
                level, x = levels[i], part.seen[i]
                x_0 = x - level.sigma * part.eps[i]
                yield Piece(part.batch.prompts, part.cond, [level], [x], x_0, regression=self.loss)

    def loss(self, h: Tensor, eps: Tensor, eps_base: Tensor, level: Level) -> Tensor:
        """See the file; `Regression` in backward.py."""
        norm = torch.linalg.vector_norm(h, dim=(1, 2, 3), keepdim=True)
        target = eps_base - self.scale / (1 + level.sigma) ** 3 * h / norm.clamp(min=1)
        return self.weight * (eps - target).square().mean()

    def evaluations(self, per_step: Sequence[float], recompute: bool) -> Evaluations:
        """See `GradientMode`: every step is walked without gradient first."""
        return Evaluations(sum(per_step), self.pieces_per_image * sum(per_step) / self.total)

    def describe(self) -> str:
        """See `GradientMode`."""
        return (
            f"gradient matching at {self.pieces_per_image} of {self.total} sampler steps, drawn for each trajectory, "
            f"with scale {self.scale:g}"
        )
