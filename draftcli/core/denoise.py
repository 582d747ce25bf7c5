"""The ONE denoising loop, and the solvers that take its steps.

Everything that walks from noise to a picture (training, validation, sampling, annealing) calls `denoise` and differs
only in the `predict` it hands over. Coordinates are variance exploding: x = x_0 + sigma n, so that an Euler step is
one line. Shape legend: B images, N sampler steps, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from draftcli.core.schedule import Level, Schedule

# predict(x (B, C, H, W), level) -> guided noise estimate d (B, C, H, W), in the dtype of x
Predict = Callable[[Tensor, Level], Tensor]

# solver(predict, x, level, earlier) -> x at level.sigma_next. `earlier` is a list of its own that lives as long as the
# trajectory: (sigma, x_0 estimate) of the step before, for solvers that look back.
Solver = Callable[[Predict, Tensor, Level, list[tuple[float, Tensor]]], Tensor]


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


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def denoise(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    *,
    solver: Solver = euler,
    start: int = 0,
    stop: int | None = None,
    churn: float = 0.0,
    noise: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> Tensor:
    """Walk x from step `start` to before step `stop`.

    Args:
        predict: guided noise estimate at a level; it alone decides whose it is and whether it has gradient.
        x: (B, C, H, W) latents at level `start`, already times `schedule.init_scale` when start is 0.
        schedule: the noise levels.
        solver: takes a step.
        start: first step to take. One that looks back (dpmpp_2m) then begins anew, with a step of order 1.
        stop: step to stop before; None walks to the image.
        churn: the reference's s_churn: fresh noise added before each step; 0 is deterministic.
        noise: draws unit noise of a shape for churn; the global CPU generator where None.

    Returns:
        (B, C, H, W) latents at level `stop`, in the dtype of x.
    """
    earlier: list[tuple[float, Tensor]] = []
    for i in range(start, len(schedule) if stop is None else stop):
        level = schedule.level(i, churn)
        if churn > 0:
            before = float(schedule.sigmas[i])
            fresh = (noise or torch.randn)(tuple(x.shape)).to(x)
            x = x + fresh * math.sqrt(level.sigma**2 - before**2)
        x = solver(predict, x, level, earlier)
    return x


def euler_step(x: Tensor, eps: Tensor, level: Level) -> Tensor:
    """x at the next level, from x at `level` (after churn) and its noise estimate; all (B, C, H, W)."""
    return x + (level.sigma_next - level.sigma) * eps
