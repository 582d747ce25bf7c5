"""Annealed Importance Guidance (AIG): the denoisers that mix tuned and base by a weighting (weighings.py).

AIG (Jena et al., WACV 2025, arXiv 2409.06493) mixes two guided noise estimates at the same x:
eps = w eps_tuned + (1 - w) eps_base, with w rising from noise to image. base, draft, linear, power_P and step_F are
those of the reference (NeMo-Aligner, anneal_sdxl.py); the others are ours.

A weight belongs to a sampler step: a solver that asks twice in a step (heun) mixes with the same weight both times, and
one that looks back (dpmpp_2m) looks at the mixture. So a step with weight 0 or 1 asks one network with every solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from draftcli.core.batch import derived_seed
from draftcli.core.denoise import Predict, Sampler, Solver
from draftcli.core.schedule import Level, Schedule
from draftcli.core.weighings import Weighing
from draftcli.errors import InputError


def step_weights(weigh: Weighing, schedule: Schedule) -> list[float]:
    """The tuned network's weight at each of the N steps.

    Raises:
        InputError: one is not in [0, 1].
    """
    total = len(schedule)
    weights = []
    for i, (sigma, sigma_next) in enumerate(pairwise(schedule.sigmas.tolist())):
        weight = float(weigh(sigma, sigma_next, i, total))
        if not 0 <= weight <= 1:
            raise InputError(f"the weight at step {i} of {total} is {weight:g}; it must be in [0, 1]")
        weights.append(weight)
    return weights


def annealed_denoiser(
    tuned: Callable[[Any], Predict],
    base: Callable[[Any], Predict],
    conds: tuple[Any, Any],
    weights: Sequence[float],
    seeds: Sequence[int] | None = None,
) -> Predict:
    """The denoiser of AIG for B pictures. Weight 1 is tuned, weight 0 base.

    Args:
        tuned: a condition (core/networks.py) -> the tuned network's guided noise estimate.
        base: the base's, likewise.
        conds: what tuned gets, and what the base gets: the text encoders of tuned may have a LoRA.
        weights: (N,) of tuned, from `step_weights`.
        seeds: B; None mixes both networks. Else each step asks one of them, tuned with its weight as probability; a
            picture's draws depend on its seed alone.
    """
    if seeds is None:
        return mixed(tuned(conds[0]), base(conds[1]), weights)
    generators = [torch.Generator().manual_seed(derived_seed(seed, "network")) for seed in seeds]
    uniform = torch.stack([torch.rand(len(weights), generator=g) for g in generators])
    return drawn(lambda rows: tuned(conds[0][rows]), lambda rows: base(conds[1][rows]), weights, uniform)


def mixed(tuned: Predict, base: Predict, weights: Sequence[float]) -> Predict:
    """The mixed denoiser of AIG. A step with weight 0 or 1 asks one network only.

    Args:
        tuned: the tuned network's guided noise estimate.
        base: the base's.
        weights: (N,) of tuned, from `step_weights`.
    """

    def predict(x: Tensor, level: Level) -> Tensor:
        weight = weights[level.index]
        if weight == 0:
            return base(x, level)
        if weight == 1:
            return tuned(x, level)
        return (1 - weight) * base(x, level) + weight * tuned(x, level)

    return predict


def drawn(
    tuned: Callable[[Tensor], Predict],
    base: Callable[[Tensor], Predict],
    weights: Sequence[float],
    uniform: Tensor,
) -> Predict:
    """AIG at the price of plain sampling: a step asks one network, tuned with probability w.

    After Diffusion Blend's DB-MPA-LS. The mean step is AIG's; pictures scatter around AIG's, less with more steps.

    Args:
        tuned: the pictures' rows (B,) bool -> the tuned network's guided noise estimate for them.
        base: the base's, likewise.
        weights: (N,) of tuned.
        uniform: (B, N) in [0, 1): tuned where it is below the weight. Each picture has draws of its own.
    """

    def predict(x: Tensor, level: Level) -> Tensor:
        chosen = (uniform[:, level.index] < weights[level.index]).to(x.device)
        estimate = torch.empty_like(x)
        for network, rows in ((tuned, chosen), (base, ~chosen)):
            if rows.any():
                estimate[rows] = network(rows)(x[rows], level)
        return estimate

    return predict


def evaluations(
    weights: Sequence[float],
    schedule: Schedule,
    solver: Solver,
    stochastic: bool = False,
    is_guided: Callable[[int], bool] = lambda step: True,
) -> int:
    """UNet evaluations a picture: found by walking the schedule with a network that counts. A step that is guided takes
    two for each network.
    """
    count = 0

    def predict(x: Tensor, level: Level) -> Tensor:
        nonlocal count
        networks = 1 if stochastic or weights[level.index] in (0, 1) else 2
        count += networks * (1 + is_guided(level.index))
        return x

    Sampler(schedule, solver).walk(predict, torch.zeros(1))
    return count
