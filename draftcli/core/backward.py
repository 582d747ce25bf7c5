"""The gradient of one piece of a trajectory, in two stages, so that memory peaks at the larger, not at their sum.

    stage one  decoder, reward and their backward      -> s = d r / d x_0, then all of it is freed
    stage two  the gradient steps receive it:  d (-<s, x_0> + beta KL) / d weights

Stage two is done in one of two ways, with the same gradient (float64: 1e-9). `KeptGraph` runs the gradient steps once
and keeps their graph over stage one. `RecomputedSteps` knows x_0 already, from a walk without gradient, and runs step
after step again, the last one first, each with a backward of its own: memory does not grow with the number of steps.

Steps with gradient are Euler's, which DDIM's are to rounding.

Shape legend: B images, K gradient steps, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from draftcli.config import Config
from draftcli.core.denoise import Predict, denoise, euler_step
from draftcli.core.guidance import NoiseEstimate
from draftcli.core.networks import Networks, RewardFunction, scored
from draftcli.core.penalty import Penalty, objective
from draftcli.core.phase import Phase
from draftcli.core.schedule import Level

# regression(h, eps, eps_base, level) -> the mean loss of B images, a scalar. h = d r / d x_0 of each image, and the
# guided noise estimates of tuned, with gradient, and of base, at the same x; all (B, C, H, W)
Regression = Callable[[Tensor, Tensor, Tensor, Level], Tensor]


@dataclass(frozen=True)
class Piece:
    """Gradient steps of B images, and where they lead: values, nothing of which has a graph.

    Attributes:
        prompts: B texts, for the reward.
        cond: what the networks get for them.
        levels: of the K steps that carry gradient, in order.
        x: latents (B, C, H, W) that the network sees in each of the steps, after churn; KeptGraph needs only the first.
        x_0: (B, C, H, W) that the reward sees; KeptGraph finds it out by itself.
        churn: unit noise (B, C, H, W) for each step whose level has some; the first has none left.
        reach: None: the steps follow each other, and the gradient runs through x from one to the next. Else
            d x_0 / d eps of each: its input is detached, and x_0 moves by `reach` times the change of its estimate.
        regression: None: the estimates follow the reward's slope. Else the loss of the piece's one step.
    """

    prompts: Sequence[str]
    cond: Any
    levels: Sequence[Level]
    x: Sequence[Tensor]
    x_0: Tensor | None = None
    churn: Sequence[Tensor] = ()
    reach: Sequence[float] | None = None
    regression: Regression | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, count: int) -> Iterator[Piece]:
        """Parts of at most `count` images."""
        for i in range(0, len(self), count):
            some = slice(i, i + count)
            yield replace(
                self,
                prompts=self.prompts[some],
                cond=self.cond[some],
                x=[x[some] for x in self.x],
                x_0=None if self.x_0 is None else self.x_0[some],
                churn=[noise[some] for noise in self.churn],
            )


class CutsSteps(Protocol):
    """What is to know here of a gradient mode, which says what pieces there are; see gradient/mode.py."""

    recomputes: bool
    longest: int


@dataclass(frozen=True)
class Work:
    """How a training step is cut up and computed. None of it changes the gradient beyond rounding.

    Attributes:
        micro: images per backward.
        prefix: images drawn together where no gradient is needed.
        decode: images per backward of decoder and reward.
        recompute: gradient steps run again when their backward comes, rather than keep their graph.
        scale: of the loss, under fp16.
        lockstep: every process makes the same network calls, as FSDP needs.
    """

    micro: int
    prefix: int
    decode: int
    recompute: bool
    scale: Callable[[Tensor], Tensor]
    lockstep: bool = False

    @classmethod
    def of(
        cls, cfg: Config, mode: CutsSteps | None = None, scale: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> Work:
        """As `cfg.sharding` and `cfg.trainer` say.

        Args:
            cfg: the settings.
            mode: whose pieces are run; None: none are.
            scale: see the class.
        """
        settings, micro = cfg.sharding, cfg.trainer.micro_batch_size
        asked = settings.recompute_steps
        if asked is None:
            several = mode is not None and mode.longest > 1
            asked = settings.offload or (settings.activation_checkpointing and several)
        return cls(
            micro=micro,
            # Whole micro-batches.
            prefix=max(micro, (settings.prefix_batch_size or 8) // micro * micro) if settings.two_stage else micro,
            decode=settings.decode_batch_size or micro,
            recompute=asked or (mode is not None and mode.recomputes),
            scale=scale,
            lockstep=settings.strategy == "fsdp",
        )

    @property
    def executor(self) -> Executor:
        """What runs pieces in this way."""
        return RecomputedSteps() if self.recompute else KeptGraph()


def reward_slope(
    nets: Networks,
    reward: RewardFunction,
    x_0: Tensor,
    prompts: Sequence[str],
    share: float,
    work: Work,
    penalty: Penalty,
) -> RewardSlope:
    """Stage one: the mean reward r of B images, and s = d (share r) / d x_0 (B, C, H, W), scaled under fp16; and how
    much the penalty counts for each image.
    """
    slopes: list[Tensor] = []
    weights: list[Tensor] = []
    total = torch.zeros((), device=x_0.device, dtype=x_0.dtype)
    for i in range(0, len(prompts), work.decode):
        some = list(prompts[i : i + work.decode])
        latents = x_0[i : i + work.decode].detach().requires_grad_()
        with nets.phase(Phase.DECODE):
            image = nets.decode(latents)
        with nets.phase(Phase.REWARD):
            scores = scored(reward, image, some)
        r = scores.sum() / len(prompts)
        with nets.phase(Phase.JUDGING):
            work.scale(share * r).backward()
        with nets.phase(Phase.REWARD):  # after the backward, whose graph is gone
            weighed = penalty.weigh(image, some, scores)
        weights += [] if weighed is None else [weighed]
        # A reward that does not look at the picture, at least not here, has no gradient.
        slopes.append(torch.zeros_like(latents) if latents.grad is None else latents.grad)
        total = total + r.detach()
    return RewardSlope(total, torch.cat(slopes), share, torch.cat(weights) if weights else None)


@dataclass(frozen=True)
class RewardSlope:
    """What stage one finds out.

    Attributes:
        reward: mean of B images, a scalar.
        slope: s = d (share r) / d x_0 (B, C, H, W).
        share: of the B images in the loss of the whole step.
        weights: how much the penalty counts for each image, (B,); None: all alike.
    """

    reward: Tensor
    slope: Tensor
    share: float
    weights: Tensor | None = None

    def of_each_image(self, work: Work) -> Tensor:
        """h = d r / d x_0 (B, C, H, W) of each image by itself: without its share of the loss, and not scaled."""
        return self.slope * (len(self.slope) / self.share) / work.scale(torch.ones_like(self.reward))


@dataclass(frozen=True)
class Forward:
    """Where the steps of a piece led.

    Attributes:
        x_0: (B, C, H, W), with its graph where that is kept.
        eps: noise estimates of the tuned network (K, B, C, H, W), where the graph is kept.
        eps_base: of the base.
    """

    x_0: Tensor
    eps: NoiseEstimate | None = None
    eps_base: NoiseEstimate | None = None


class Executor(Protocol):
    """Runs the gradient steps of pieces."""

    def groups(self, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
        """The pieces, as many together as go through stage one before any goes through stage two."""
        ...

    def forward(self, nets: Networks, piece: Piece, with_base: bool) -> Forward:
        """The steps of a piece -> x_0. `with_base`: the base is needed as well, for the penalty."""
        ...

    def backward(
        self, nets: Networks, piece: Piece, ahead: Forward, seen: RewardSlope, penalty: Penalty, work: Work
    ) -> Tensor | None:
        """Stage two: adds the gradient to the weights' `.grad`. The penalty, without graph; None: not measured."""
        ...


class KeptGraph:
    """One forward pass, whose graph is kept over stage one; one piece after the other."""

    def groups(self, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
        """See `Executor`."""
        for piece in pieces:
            yield [piece]

    def forward(self, nets: Networks, piece: Piece, with_base: bool) -> Forward:
        """See `Executor`. The base is asked at the same x; its estimate does not steer x.

        Latents that the piece knows stay as they are: what a step adds to them is 0, with a gradient.
        """
        tuned, base = nets.tuned_estimates(piece.cond), nets.base_estimates(piece.cond)
        eps: list[NoiseEstimate] = []
        eps_base: list[NoiseEstimate] = []

        def predict(x: Tensor, level: Level) -> Tensor:
            eps.append(tuned(x, level))
            if with_base or piece.regression is not None:
                eps_base.append(base(x, level))
            return eps[-1].guided

        with nets.phase(Phase.STEPS):
            x_0 = self._walked(piece, predict)
        return Forward(x_0, NoiseEstimate.stacked(eps), NoiseEstimate.stacked(eps_base) if eps_base else None)

    def _walked(self, piece: Piece, predict: Predict) -> Tensor:
        """x_0 (B, C, H, W) with its graph."""
        if piece.x_0 is None:
            churn = iter(piece.churn)
            return denoise(predict, piece.x[0], piece.levels, noise=lambda shape: next(churn))
        moved = torch.zeros_like(piece.x_0)
        for k, (x, level) in enumerate(zip(piece.x, piece.levels, strict=True)):
            if piece.reach is None:
                moved = euler_step(moved, predict(x + moved - moved.detach(), level), level)
            else:
                moved = moved + piece.reach[k] * predict(x, level)
        return piece.x_0 + moved - moved.detach()

    def backward(
        self, nets: Networks, piece: Piece, ahead: Forward, seen: RewardSlope, penalty: Penalty, work: Work
    ) -> Tensor | None:
        """See `Executor`."""
        with nets.phase(Phase.BACKWARD):
            kl, gain = None, (seen.slope * ahead.x_0).sum()
            if ahead.eps is not None and ahead.eps_base is not None:
                kl = penalty(ahead.eps, ahead.eps_base, piece.levels, seen.weights)
                if piece.regression is not None:
                    gain = _matched(piece, seen, ahead.eps.guided[0], ahead.eps_base.guided[0], work)
            scaled = None if kl is None else work.scale(kl)
            objective(gain, scaled, seen.share * penalty.beta).backward()
        return None if kl is None else kl.detach()


class RecomputedSteps:
    """Stage one of all pieces, then stage two of all: the networks of each stage are needed once a training step."""

    def groups(self, pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
        """See `Executor`."""
        yield pieces

    def forward(self, nets: Networks, piece: Piece, with_base: bool) -> Forward:
        """See `Executor`: x_0 is known, and the steps run in `backward`."""
        assert piece.x_0 is not None, "a piece for recomputed steps knows its x_0"
        return Forward(piece.x_0)

    def backward(
        self, nets: Networks, piece: Piece, ahead: Forward, seen: RewardSlope, penalty: Penalty, work: Work
    ) -> Tensor | None:
        """See `Executor`. In every step d loss / d x is handed on to the step before."""
        tuned, base = nets.tuned_estimates(piece.cond), nets.base_estimates(piece.cond)
        slope, count = seen.slope, len(piece.levels)
        needs_base = penalty.is_measured or piece.regression is not None
        penalties: list[Tensor] = []
        for k in reversed(range(count)):
            level, follows = piece.levels[k], piece.reach is None and k > 0
            x = piece.x[k].detach().requires_grad_(follows)
            with nets.phase(Phase.STEPS):
                said = tuned(x, level)
            eps, said_by_base = said.guided, base(x, level) if needs_base else None
            if said_by_base is not None:
                both = NoiseEstimate.stacked([said]), NoiseEstimate.stacked([said_by_base])
                kl = penalty(*both, [level], seen.weights) / count
                penalties.append(kl.detach())
            else:
                kl = None
            if piece.regression is not None and said_by_base is not None:
                gain = _matched(piece, seen, eps, said_by_base.guided, work)
            else:
                gain = (slope * (euler_step(x, eps, level) if piece.reach is None else piece.reach[k] * eps)).sum()
            scaled = None if kl is None else work.scale(kl)
            loss = objective(gain, scaled, seen.share * penalty.beta)
            with nets.phase(Phase.BACKWARD):
                loss.backward()
            if follows:
                assert x.grad is not None
                slope = -x.grad  # the reward rises where the loss falls
        return torch.stack(penalties).sum() if penalties else None


def _matched(piece: Piece, seen: RewardSlope, eps: Tensor, eps_base: Tensor, work: Work) -> Tensor:
    """What a piece whose loss is a regression gains: the loss with the sign turned, in its share of the step."""
    assert piece.regression is not None
    (level,) = piece.levels
    return -work.scale(seen.share * piece.regression(seen.of_each_image(work), eps, eps_base, level))
