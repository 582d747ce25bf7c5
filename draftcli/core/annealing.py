"""Annealed Importance Guidance (AIG): weightings, and the denoisers that mix tuned and base by them.

AIG (Jena et al., WACV 2025, arXiv 2409.06493) mixes two guided noise estimates at the same x:
eps = w eps_tuned + (1 - w) eps_base, with w rising from noise to image. base, draft, linear, power_P and step_F are
those of the reference (NeMo-Aligner, anneal_sdxl.py); the others are ours.

A weight belongs to a sampler step: a solver that asks twice in a step (heun) mixes with the same weight both times, and
one that looks back (dpmpp_2m) looks at the mixture. So a step with weight 0 or 1 asks one network with every solver.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcli.core.batch import derived_seed
from draftcli.core.denoise import Predict, Sampler, Solver
from draftcli.core.schedule import Level, Schedule
from draftcli.errors import InputError

# weighing_fn(sigma_i, sigma_next, i, total) -> weight of the tuned model in [0, 1]
Weighing = Callable[[float, float, int, int], float]
# the same as a function of progress i / total alone
Curve = Callable[[float], float]

KINDS = (
    "base, draft (or tuned), linear, cosine, power_P (P > 0), step_F (F in [0, 1]), constant_W (W in [0, 1]), "
    "interval_A_B (0 <= A <= B <= 1), reverse_KIND, package.module:function"
)


def linear(sigma: float, sigma_next: float, i: int, total: int) -> float:
    """i / total: 0 at the first step, (total - 1) / total at the last."""
    return i / total


def weighing(kind: str) -> Weighing:
    """The weighting named `kind`.

    Raises:
        InputError: an unknown kind, a number outside its range, or a function that cannot be had.
    """
    return named_weighing(kind)[1]


def named_weighing(kind: str) -> tuple[str, Weighing]:
    """The one name of a kind that can be written in several ways (draft is tuned, power_2.0 is power_2), and the
    weighting.

    Raises:
        InputError: as `weighing`.
    """
    if ":" in kind:
        return kind.replace(":", "."), _imported(kind)
    name, curve = _parse(kind)
    return name, _by_progress(curve)


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


def _parse(kind: str) -> tuple[str, Curve]:
    """A kind's one name, and its curve."""
    if kind.startswith("reverse_"):
        name, curve = _parse_forward(kind.removeprefix("reverse_"), kind)
        return f"reverse_{name}", lambda x: 1 - curve(x)
    return _parse_forward(kind, kind)


def _parse_forward(kind: str, given: str) -> tuple[str, Curve]:
    word, *texts = kind.split("_")
    name = "tuned" if word == "draft" else word
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = [math.nan]
    curve = _curve(name, numbers)
    if curve is None:
        raise InputError(f"unknown annealing weight {given!r}; known kinds: {KINDS}")
    return "_".join([name, *(f"{number:g}" for number in numbers)]), curve


def _curve(name: str, numbers: list[float]) -> Curve | None:  # noqa: PLR0911
    match name, numbers:
        case "base", []:
            return lambda x: 0.0
        case "tuned", []:
            return lambda x: 1.0
        case "linear", []:
            return lambda x: x
        case "cosine", []:
            return lambda x: (1 - math.cos(math.pi * x)) / 2
        case "power", [p] if 0 < p < math.inf:
            return lambda x: x**p
        case "step", [f] if 0 <= f <= 1:
            return lambda x: float(x >= f)
        case "constant", [w] if 0 <= w <= 1:
            return lambda x: w
        case "interval", [a, b] if 0 <= a <= b <= 1:
            return lambda x: float(a <= x < b)
    return None


def _by_progress(curve: Curve) -> Weighing:
    return lambda sigma, sigma_next, i, total: curve(i / total)


def _imported(kind: str) -> Weighing:
    module, _, name = kind.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # a console script does not look in the folder it is started from
    try:
        found: Any = getattr(import_module(module), name, None)
    except Exception as error:  # whatever a user's own module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"annealing weight {kind!r}: cannot import {module!r} ({reason})") from error
    if not callable(found):
        raise InputError(f"annealing weight {kind!r}: {module} has no function {name!r}")

    def weigh(sigma: float, sigma_next: float, i: int, total: int) -> float:
        try:
            weight: Any = found(sigma, sigma_next, i, total)
            return float(weight)
        except Exception as error:  # whatever a function of the user's can raise
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"annealing weight {kind!r} failed at step {i} of {total} ({reason})") from error

    return weigh
