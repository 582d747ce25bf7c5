"""The noise schedule: the levels that a network was trained on, and those that a trajectory visits.

Numbers follow NeMo 2.2.0 (LegacyDDPMDiscretization) to the last digit: sigmas are rounded to float32 before the square
root, and used as such in float64 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from draftcli.core.grid import timesteps as trailing_timesteps

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Level:
    """Where on the schedule a network is asked.

    Attributes:
        index: sampler step i, 0 .. N-1, from noise to image.
        total: N.
        sigma: noise level of x, after churn (sigma_hat).
        sigma_next: noise level after the step, before fresh noise of the next.
        table_sigma: the nearest level that the network was trained on; equal to sigma without churn.
        timestep: its index in the table, 0 .. 999: what the network is given.
        timestep_next: that of sigma_next; None where the step ends at the image.
        churn: deviation of the fresh noise that raises x to sigma before the step, of s_churn or of a sampler that
            lands lower than the next level; 0: none.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    table_sigma: float
    timestep: int
    timestep_next: int | None = None
    churn: float = 0.0

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
        timestep, table_sigma, added = int(self.timesteps[index]), sigma, 0.0
        if churn > 0:
            before, sigma = float(sigma), sigma * (1 + min(churn / len(self), math.sqrt(2) - 1))
            timestep = int((self.table - sigma).abs().argmin())
            table_sigma, added = self.table[timestep], math.sqrt(float(sigma) ** 2 - before**2)
        timestep_next = int(self.timesteps[index + 1]) if index + 1 < len(self) else None
        return Level(
            index, len(self), float(sigma), float(sigma_next), float(table_sigma), timestep, timestep_next, added
        )


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
    steps: int,
    spacing: Literal["trailing", "leading"] = "trailing",
    zero_terminal_snr: bool = False,
    timesteps: Sequence[int] = (),
) -> Schedule:
    """The schedule of `steps` sampler steps.

    Args:
        steps: 1 .. 1000.
        spacing: `trailing` starts at level 999, as the reference does; `leading` is SDXL's own inference grid
            (diffusers with steps_offset 1), which never reaches the noisiest levels and ends at level 1.
        zero_terminal_snr: see `sigma_table`.
        timesteps: the levels themselves, `steps` of them, descending in 0 .. 999, instead of a spacing; empty: none.

    Raises:
        ValueError: steps is outside 1 .. 1000.
    """
    indices = list(timesteps) or trailing_timesteps(steps)
    if spacing == "leading" and not timesteps:
        stride = TRAIN_STEPS // steps
        indices = [min(k * stride + 1, TRAIN_STEPS - 1) for k in range(steps)][::-1]
    table = sigma_table(zero_terminal_snr)
    grid = torch.tensor(indices)
    return Schedule(grid, torch.cat([table[grid], torch.zeros(1)]), table)
