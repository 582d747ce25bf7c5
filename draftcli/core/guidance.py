"""Classifier-free guidance, and the weightings of Annealed Importance Guidance (AIG).

AIG (Jena et al., WACV 2025, arXiv 2409.06493) mixes two guided noise estimates at the same x:
eps = w eps_tuned + (1 - w) eps_base, with w rising from noise to image. The kinds here are those of the reference
(NeMo-Aligner, anneal_sdxl.py): base, draft, linear, power_P, step_F.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from draftcli.core.denoise import Level, Predict
from draftcli.errors import InputError

# weighing_fn(sigma_i, sigma_next, i, total) -> weight of the tuned model in [0, 1]
Weighing = Callable[[float, float, int, int], float]

KINDS = "base, draft (or tuned), linear, power_P (P > 0), step_F (F in [0, 1])"


def guided(output: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + scale (c - u).

    Args:
        output: (2 B, C, H, W) the network's output for [unconditional ; conditional], in this order.
        scale: 1 is conditional only.

    Returns:
        (B, C, H, W).
    """
    uncond, cond = output.chunk(2)
    return uncond + scale * (cond - uncond)


def linear(sigma: float, sigma_next: float, i: int, total: int) -> float:
    """i / total: 0 at the first step, (total - 1) / total at the last."""
    return i / total


def weighing(kind: str) -> Weighing:
    """The weighting named `kind`.

    Raises:
        InputError: an unknown kind, or a number outside its range.
    """
    name, _, number = kind.partition("_")
    fixed: dict[str, Weighing] = {
        "base": lambda sigma, sigma_next, i, total: 0.0,
        "draft": lambda sigma, sigma_next, i, total: 1.0,
        "tuned": lambda sigma, sigma_next, i, total: 1.0,
        "linear": linear,
    }
    if kind in fixed:
        return fixed[kind]
    try:
        value = float(number)
    except ValueError:
        value = None
    if name == "power" and value is not None and 0 < value < float("inf"):
        return lambda sigma, sigma_next, i, total: (i / total) ** value
    if name == "step" and value is not None and 0 <= value <= 1:
        return lambda sigma, sigma_next, i, total: float(i / total >= value)
    raise InputError(f"unknown annealing weight {kind!r}; known kinds: {KINDS}")


def annealed(tuned: Predict, base: Predict, weigh: Weighing) -> Predict:
    """The mixed denoiser of AIG. A step with weight 0 or 1 asks one network only.

    Raises:
        InputError: `weigh` gave a weight outside [0, 1].
    """

    def predict(x: Tensor, level: Level) -> Tensor:
        weight = float(weigh(level.sigma, level.sigma_next, level.index, level.total))
        if not 0 <= weight <= 1:
            raise InputError(f"the weight at step {level.index} of {level.total} is {weight:g}; it must be in [0, 1]")
        if weight == 0:
            return base(x, level)
        if weight == 1:
            return tuned(x, level)
        return (1 - weight) * base(x, level) + weight * tuned(x, level)

    return predict
