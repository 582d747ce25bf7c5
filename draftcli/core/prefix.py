"""The prefix: the walk from noise to the first step with gradient, in fewer steps than the run's own.

No gradient runs through it, so any solver that arrives at the same latents will do. DPM-Solver++(2M) in 10 to 12 steps,
uniform in log sigma, is as near to the exact solution as 24 Euler steps of the run's grid (benchmarks/prefix.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from draftcli.config import Config
from draftcli.core.denoise import SOLVERS, Prefix, Sampler
from draftcli.core.schedule import Level, Schedule, make_schedule
from draftcli.errors import InputError

HIGHEST = 20.0
"""Above this noise level nothing of a picture is there yet; bases with zero terminal SNR begin at 4096."""


def prefix_levels(schedule: Schedule, stop: int, count: int) -> list[Level]:
    """`count` steps from the first level of `schedule` to that of step `stop`, uniform in log sigma.

    They stand on levels that the network was trained on, the nearest ones.

    Args:
        schedule: the run's.
        stop: 1 .. N - 1.
        count: 1 or more.

    Raises:
        InputError: there are not so many levels between the two.
    """
    first, last = int(schedule.timesteps[0]), int(schedule.timesteps[stop])
    if count > first - last:
        raise InputError(
            f"draftp.prefix_steps {count}: the network knows {first - last} noise levels before sampler step {stop}; "
            f"give {first - last} or less"
        )
    start, end = math.log(min(float(schedule.sigmas[0]), HIGHEST)), math.log(float(schedule.sigmas[stop]))
    log_table = schedule.table.double().log()
    grid = [first]
    for j in range(1, count):
        nearest = int((log_table - (start + (end - start) * j / count)).abs().argmin())
        grid.append(min(max(nearest, last + count - j), grid[-1] - 1))
    grid.append(last)
    own, sigmas = schedule.timesteps.tolist(), schedule.table[grid].tolist()
    return [
        Level(max(i for i, t in enumerate(own) if t >= here), len(own), sigma, sigma_next, sigma, here, there)
        for here, there, sigma, sigma_next in zip(grid, grid[1:], sigmas, sigmas[1:], strict=False)
    ]


def make_prefix(cfg: Config, first: int, schedule: Schedule) -> Prefix | None:
    """The prefix that the settings ask for; None: the run's own steps.

    Args:
        cfg: the settings.
        first: the earliest step that may carry gradient (`GradientMode.first`).
        schedule: the run's.

    Raises:
        InputError: it has nothing to shorten, or more steps than there are noise levels.
    """
    count = cfg.draftp.prefix_steps
    if count is None:
        return None
    if first == 0:
        raise InputError(
            f"draftp.prefix_steps {count} has nothing to shorten: draftp.gradient {cfg.draftp.gradient_mode[0]} may "
            "train the first sampler step as well; leave it out, or train later steps alone"
        )
    return Prefix(prefix_levels(schedule, first, count), SOLVERS[cfg.draftp.prefix_sampler], first)


def training_sampler(cfg: Config, first: int, sampler: Sampler) -> Sampler:
    """The run's sampler as training uses it: with the prefix. Arguments and errors are those of `make_prefix`."""
    return replace(sampler, prefix=make_prefix(cfg, first, sampler.schedule))


def evaluations_per_step(cfg: Config, first: int) -> list[float]:
    """UNet evaluations an image of one network in each of the N sampler steps; a guided step takes two.

    With a prefix the steps before `first` take none but the last of them, which takes all of the prefix's. Where a walk
    to `first` serves several optimizer steps (draftp.reuse), each counts its share of it. Arguments are those of
    `make_prefix`.

    Raises:
        InputError: as `make_prefix`, or draftp.reuse has nothing to share.
    """
    reuse = cfg.draftp.reuse
    if reuse > 1 and first == 0:
        raise InputError(
            f"draftp.reuse {reuse} has nothing to share between steps: draftp.gradient {cfg.draftp.gradient_mode[0]} "
            "may train the first sampler step as well; set it to 1, or train later steps alone"
        )
    whole = _whole_evaluations(cfg, first)
    return [*(count / reuse for count in whole[:first]), *whole[first:]]


def _whole_evaluations(cfg: Config, first: int) -> list[int]:
    sampling = cfg.sampling
    own = [1 + sampling.is_guided(i) for i in range(sampling.steps)]
    schedule = make_schedule(sampling.steps, sampling.schedule, bool(cfg.model.zero_terminal_snr), sampling.timesteps)
    prefix, count = make_prefix(cfg, first, schedule), 0
    if prefix is None:
        return own

    def counted(x: Tensor, level: Level) -> Tensor:
        nonlocal count
        count += 1 + sampling.is_guided(level.index)
        return x

    prefix.walk(counted, torch.zeros(1))
    return [*([0] * (first - 1)), count, *own[first:]]
