"""The penalty that holds the tuned network to its base."""

from __future__ import annotations

from torch import Tensor


def kl_penalty(eps_tuned: Tensor, eps_base: Tensor) -> Tensor:
    """DRaFT+'s penalty: mean over K, B, C, H, W of the squared difference of the guided noise estimates.

    It is a plain mean squared error, called KL after the Gaussian it is proportional to; no 1/2, no 1/sigma^2.
    """
    return (eps_tuned - eps_base).square().mean()
