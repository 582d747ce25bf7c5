"""From a network's raw output to a guided noise estimate: input scaling, classifier-free guidance, prediction types.

Shape legend: B images, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from draftcli.core.schedule import Level

Prediction = Literal["epsilon", "v_prediction", "sample"]


def network_input(x: Tensor, level: Level) -> Tensor:
    """c_in x: the variance-preserving sample that the network was trained on (EDM's EpsScaling)."""
    return x * (1 / math.sqrt(level.table_sigma**2 + 1))


def to_noise_estimate(output: Tensor, x: Tensor, level: Level, prediction: Prediction) -> Tensor:
    """d = (x - D) / sigma from the network's guided output.

    For an eps network D = x - sigma eps, hence d = eps. For a v network v = alpha n - s x_0 with
    alpha = 1 / sqrt(1 + sigma^2) and s = sigma alpha, hence D = alpha^2 x - s v and d = sigma alpha^2 x + alpha v,
    written so that nothing cancels at the sigma of 4096 of zero terminal SNR. A sample network says D itself. With
    churn the level that the network is given (table_sigma) differs from that of x (sigma), which leaves the factor
    table_sigma / sigma, as in the reference.
    """
    if prediction == "sample":
        return (x - output) / level.sigma
    sigma = level.table_sigma
    if prediction == "v_prediction":
        output = (sigma / (1 + sigma**2)) * x + (1 / math.sqrt(1 + sigma**2)) * output
    return output if level.sigma == sigma else (sigma / level.sigma) * output


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
