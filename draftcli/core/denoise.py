"""The noise schedule and the ONE denoising loop.

Everything that walks from noise to a picture (training, validation, sampling, annealing) calls `denoise` and differs
only in the `predict` it hands over. Coordinates are variance exploding: x = x_0 + sigma n, so that an Euler step is
one line. Shape legend: B images, N sampler steps, C latent channels, H W latent size.

Numbers follow NeMo 2.2.0 (LegacyDDPMDiscretization, EulerEDMSampler) to the last digit: sigmas are rounded to float32
before the square root, and used as such in float64 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from draftcli import timesteps as trailing_timesteps

TRAIN_STEPS = 1000
Prediction = Literal["epsilon", "v_prediction"]

# predict(x (B, C, H, W), level) -> guided noise estimate d (B, C, H, W), in the dtype of x
Predict = Callable[[Tensor, "Level"], Tensor]

# solver(predict, x, level, earlier) -> x at level.sigma_next. `earlier` is a list of its own that lives as long as the
# trajectory: (sigma, x_0 estimate) of the step before, for solvers that look back.
Solver = Callable[[Predict, Tensor, "Level", list[tuple[float, Tensor]]], Tensor]


@dataclass(frozen=True)
class Level:
    """Where on the schedule a network is asked.

    Attributes:
        index: sampler step i, 0 .. N-1, from noise to image.
        total: N.
        sigma: noise level of x, after churn (sigma_hat).
        sigma_next: noise level after the step.
        table_sigma: the nearest level that the network was trained on; equal to sigma without churn.
        timestep: its index in the table, 0 .. 999: what the network is told.
        timestep_next: that of sigma_next; None where the step ends at the image.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    table_sigma: float
    timestep: int
    timestep_next: int | None = None

    @property
    def end(self) -> Level:
        """Where the step ends: what a second-order solver asks again. It belongs to the same step, index and all."""
        assert self.timestep_next is not None, "no network is asked at the image"
        return replace(self, sigma=self.sigma_next, table_sigma=self.sigma_next, timestep=self.timestep_next)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one trajectory.

    Attributes:
        timesteps: (N,) int64 indices into `table`, descending.
        sigmas: (N + 1,) float32, descending, the last one 0.
        table: (1000,) float32, ascending: every level the network was trained on.
    """

    timesteps: Tensor
    sigmas: Tensor
    table: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def init_scale(self) -> float:
        """sqrt(1 + sigma_0^2): what unit noise is multiplied by at the start."""
        return float((1 + self.sigmas[0] ** 2).sqrt())

    def level(self, index: int, churn: float = 0.0) -> Level:
        """The level of step `index`, raised by the reference's gamma where `churn` (s_churn) is above 0."""
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        timestep, table_sigma = int(self.timesteps[index]), sigma
        if churn > 0:
            sigma = sigma * (1 + min(churn / len(self), math.sqrt(2) - 1))
            timestep = int((self.table - sigma).abs().argmin())
            table_sigma = self.table[timestep]
        timestep_next = int(self.timesteps[index + 1]) if index + 1 < len(self) else None
        return Level(index, len(self), float(sigma), float(sigma_next), float(table_sigma), timestep, timestep_next)


def sigma_table(zero_terminal_snr: bool = False) -> Tensor:
    """(1000,) float32 noise levels of SDXL's training, ascending.

    beta = linspace(sqrt 0.00085, sqrt 0.0120, 1000)^2, "scaled_linear" in diffusers. With zero terminal SNR (Lin et
    al. 2024, arXiv 2305.08891, algorithm 1) the last level would be infinite; like diffusers we set its alpha-bar to
    2^-24, which makes it 4096.
    """
    betas = np.linspace(0.00085**0.5, 0.0120**0.5, TRAIN_STEPS) ** 2
    alphas_bar = np.cumprod(1 - betas)
    if zero_terminal_snr:
        root = np.sqrt(alphas_bar)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_bar = root**2
        alphas_bar[-1] = 2.0**-24
    return torch.from_numpy((1 - alphas_bar) / alphas_bar).float().sqrt()


def make_schedule(
    steps: int, spacing: Literal["trailing", "leading"] = "trailing", zero_terminal_snr: bool = False
) -> Schedule:
    """The schedule of `steps` sampler steps.

    Args:
        steps: 1 .. 1000.
        spacing: `trailing` starts at level 999, as the reference does; `leading` is SDXL's own inference grid
            (diffusers with steps_offset 1), which never reaches the noisiest levels and ends at level 1.
        zero_terminal_snr: see `sigma_table`.

    Raises:
        ValueError: steps is outside 1 .. 1000.
    """
    indices = trailing_timesteps(steps)
    if spacing == "leading":
        stride = TRAIN_STEPS // steps
        indices = [min(k * stride + 1, TRAIN_STEPS - 1) for k in range(steps)][::-1]
    table = sigma_table(zero_terminal_snr)
    grid = torch.tensor(indices)
    return Schedule(grid, torch.cat([table[grid], torch.zeros(1)]), table)


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


def network_input(x: Tensor, level: Level) -> Tensor:
    """c_in x: the variance-preserving sample that the network was trained on (EDM's EpsScaling)."""
    return x * (1 / math.sqrt(level.table_sigma**2 + 1))


def to_noise_estimate(output: Tensor, x: Tensor, level: Level, prediction: Prediction) -> Tensor:
    """d = (x - D) / sigma from the network's guided output.

    For an eps network D = x - sigma eps, hence d = eps. For a v network v = alpha n - s x_0 with
    alpha = 1 / sqrt(1 + sigma^2) and s = sigma alpha, hence D = alpha^2 x - s v and d = sigma alpha^2 x + alpha v,
    written so that nothing cancels at the sigma of 4096 of zero terminal SNR. With churn the level that the network
    is told (table_sigma) differs from that of x (sigma), which leaves the factor table_sigma / sigma, as in the
    reference.
    """
    sigma = level.table_sigma
    if prediction == "v_prediction":
        output = (sigma / (1 + sigma**2)) * x + (1 / math.sqrt(1 + sigma**2)) * output
    return output if level.sigma == sigma else (sigma / level.sigma) * output
