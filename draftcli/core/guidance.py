"""From a network's raw output to a guided noise estimate: input scaling, classifier-free guidance, prediction types.

Shape legend: B images, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from draftcli.core.denoise import Predict
from draftcli.core.schedule import Level

Prediction = Literal["epsilon", "v_prediction", "sample"]


class NoiseEstimate(NamedTuple):
    """What a network says at one level: its noise estimates.

    Attributes:
        guided: (B, C, H, W), what the sampler follows.
        conditional: (B, C, H, W), that for the prompt alone; where a step is not guided, the same tensor.
    """

    guided: Tensor
    conditional: Tensor

    @classmethod
    def stacked(cls, estimates: Sequence[NoiseEstimate]) -> NoiseEstimate:
        """Those of K steps as one, (K, B, C, H, W)."""
        return cls(torch.stack([e.guided for e in estimates]), torch.stack([e.conditional for e in estimates]))


# estimator(x (B, C, H, W), level) -> the network's estimates there, in the dtype of x
Estimator = Callable[[Tensor, Level], NoiseEstimate]


def only_guided(estimator: Estimator) -> Predict:
    """The guided one of its estimates."""
    return lambda x, level: estimator(x, level).guided


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


def make_estimate(output: Tensor, x: Tensor, level: Level, prediction: Prediction, scale: float) -> NoiseEstimate:
    """Both noise estimates from a network's raw output.

    Args:
        output: (2 B, C, H, W) for [unconditional ; conditional]; where the step is not guided (B, C, H, W) for the
            prompts alone.
        x: (B, C, H, W) where it was asked.
        level: of x.
        prediction: what the network predicts.
        scale: of the guidance.
    """
    if len(output) == len(x):
        eps = to_noise_estimate(output, x, level, prediction)
        return NoiseEstimate(eps, eps)
    return NoiseEstimate(
        to_noise_estimate(guided(output, scale), x, level, prediction),
        to_noise_estimate(output[len(x) :], x, level, prediction),
    )
