"""The ONE denoising loop, and the solvers that take its steps.

Everything that walks from noise to a picture (training, validation, sampling, annealing) calls `denoise` and differs
only in the `predict` it hands over. Coordinates are variance exploding: x = x_0 + sigma n, so that an Euler step is
one line. Shape legend: B images, N sampler steps, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftcli.core.schedule import Level, Schedule

# predict(x (B, C, H, W), level) -> guided noise estimate d (B, C, H, W), in the dtype of x
Predict = Callable[[Tensor, Level], Tensor]

# solver(predict, x, level, earlier) -> x at level.sigma_next. `earlier` is a list of its own that lives as long as the
# trajectory: (sigma, x_0 estimate) of the step before, for solvers that look back.
Solver = Callable[[Predict, Tensor, Level, list[tuple[float, Tensor]]], Tensor]

# landing(sigma, sigma_next) -> the noise level that a step itself goes down to. Where that is below sigma_next, fresh
# noise raises x from there.
Landing = Callable[[float, float], float]

# noise(shape) -> unit normal noise, for churn and for samplers that land lower than the next level
Noise = Callable[[tuple[int, ...]], Tensor]


def euler(predict: Predict, x: Tensor, level: Level, earlier: list[tuple[float, Tensor]]) -> Tensor:
    """Euler's step (Karras et al. 2022, algorithm 2 without Heun; NeMo's EulerEDMSampler). One evaluation."""
    return euler_step(x, predict(x, level), level)


def ddim(predict: Predict, x: Tensor, level: Level, earlier: list[tuple[float, Tensor]]) -> Tensor:
    """DDIM with eta 0 (Song et al. 2021, equation 12). In these coordinates it is Euler's step, to rounding."""
    d = predict(x, level)
    x_0 = x - level.sigma * d
    return x_0 + level.sigma_next * d


def heun(predict: Predict, x: Tensor, level: Level, earlier: list[tuple[float, Tensor]]) -> Tensor:
    """Heun's step (Karras et al. 2022, algorithm 1): the slope is the mean of both ends'. Two evaluations, the last
    step one.
    """
    d = predict(x, level)
    there = x + (level.sigma_next - level.sigma) * d
    if level.timestep_next is None:
        return there
    return x + (level.sigma_next - level.sigma) * (d + predict(there, level.end)) / 2


def dpmpp_2m(predict: Predict, x: Tensor, level: Level, earlier: list[tuple[float, Tensor]]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2; midpoint, the first and last step of order 1).

    Second order from the estimate of the step before, so one evaluation a step. lambda = -log sigma.
    """
    x_0 = target = x - level.sigma * predict(x, level)
    if earlier and level.timestep_next is not None:
        sigma_before, x_0_before = earlier.pop()
        r = math.log(sigma_before / level.sigma) / math.log(level.sigma / level.sigma_next)
        target = x_0 + (x_0 - x_0_before) / (2 * r)
    earlier.append((level.sigma, x_0))
    return target + (level.sigma_next / level.sigma) * (x - target)


def ancestral(sigma: float, sigma_next: float) -> float:
    """Where a step of the ancestral sampler lands, sigma_next^2 / sigma (k-diffusion's get_ancestral_step, eta 1)."""
    return sigma_next**2 / sigma if sigma else 0.0


def at_image(sigma: float, sigma_next: float) -> float:
    """Where a step of a consistency model lands (Luo et al. 2023, arXiv 2310.04378, algorithm 3): the image that it
    predicts, which is then noised again.

    diffusers' LCMScheduler also mixes x itself into that image, by less than 1e-5 from timestep 16 up; here it is not.
    """
    return 0.0


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": euler,
    "lcm": euler,
}
LANDINGS: dict[str, Landing] = {"euler_ancestral": ancestral, "lcm": at_image}  # of the others: the next level


@dataclass(frozen=True)
class Prefix:
    """Another way from the first level to that of a later step, where no gradient runs (core/prefix.py).

    Attributes:
        levels: its steps; each has the index of the sampler step that its noise level falls into.
        solver: takes them.
        stop: the sampler step at whose level it arrives.
    """

    levels: Sequence[Level]
    solver: Solver
    stop: int

    def walk(self, predict: Predict, x: Tensor) -> Tensor:
        """Walk x (B, C, H, W), latents at the first level, to level `stop`."""
        return denoise(predict, x, self.levels, solver=self.solver)


@dataclass(frozen=True)
class Sampler:
    """How trajectories are walked.

    Attributes:
        schedule: their levels.
        solver: takes a step.
        churn: the reference's s_churn: fresh noise before each step; 0 is deterministic.
        prefix: the way that a walk from the first level takes up to `prefix.stop`; None: that of the schedule.
        landing: where each step lands; None: at the next level, without fresh noise.
    """

    schedule: Schedule
    solver: Solver = euler
    churn: float = 0.0
    prefix: Prefix | None = None
    landing: Landing | None = None

    @classmethod
    def named(cls, name: str, schedule: Schedule, churn: float = 0.0) -> Sampler:
        """The sampler that sampling.sampler calls so."""
        return cls(schedule, SOLVERS[name], churn, landing=LANDINGS.get(name))

    def levels(self, start: int = 0, stop: int | None = None) -> list[Level]:
        """The levels of the steps from `start` to before `stop`; None: to the image."""
        return [self._level(i) for i in range(start, len(self.schedule) if stop is None else stop)]

    def _level(self, index: int) -> Level:
        """The level of a step. Where the step before landed lower, the difference is fresh noise, as with churn."""
        level = self.schedule.level(index, self.churn)
        if self.landing is None:
            return level
        landed = self.landing(self.schedule.level(index - 1).sigma, level.sigma) if index else level.sigma
        added = math.sqrt(max(0.0, level.sigma**2 - landed**2))
        return replace(level, sigma_next=self.landing(level.sigma, level.sigma_next), churn=added)

    def walk(
        self, predict: Predict, x: Tensor, noise: Noise | None = None, *, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Walk x (B, C, H, W), latents at level `start`, to level `stop`; see `denoise`.

        With a prefix a walk begins at the first level or at `prefix.stop` or later, and ends no earlier than there.
        """
        if self.prefix is not None and start < self.prefix.stop:
            assert start == 0, "a prefix has no levels of the schedule between its ends"
            assert stop is None or stop >= self.prefix.stop, "the walk ends inside the prefix"
            x, start = self.prefix.walk(predict, x), self.prefix.stop
        return denoise(predict, x, self.levels(start, stop), solver=self.solver, noise=noise)


def denoise(
    predict: Predict, x: Tensor, levels: Sequence[Level], *, solver: Solver = euler, noise: Noise | None = None
) -> Tensor:
    """Walk x through `levels`, a step at each.

    Args:
        predict: guided noise estimate at a level; it alone decides whose it is and whether it has gradient.
        x: (B, C, H, W) latents before the first of them, already times `schedule.init_scale` where that is step 0.
        levels: of neighbouring steps. A solver that looks back (dpmpp_2m) begins with a step of order 1.
        solver: takes a step.
        noise: draws unit noise for levels with fresh noise; the global CPU generator where None.

    Returns:
        (B, C, H, W) latents after the last of them, in the dtype of x.
    """
    earlier: list[tuple[float, Tensor]] = []
    for level in levels:
        if level.churn > 0:
            x = x + (noise or torch.randn)(tuple(x.shape)).to(x) * level.churn
        x = solver(predict, x, level, earlier)
    return x


def euler_step(x: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x at the next level, from x at `level` (after churn) and its noise estimate; all (B, C, H, W)."""
    return x + (level.sigma_next - level.sigma) * eps
