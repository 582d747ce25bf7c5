"""The penalty that holds the tuned network to its base, and what controls its coefficient.

A penalty is an object that a training step asks, found by `draftp.kl_kind`; another kind is one more class here.
Shape legend: B images, K gradient steps, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from draftcli.config import DraftpConfig
from draftcli.core.schedule import Level
from draftcli.errors import InputError


class Penalty(Protocol):
    """What is added to the loss, `beta` times, to keep the tuned network near its base.

    Attributes:
        beta: the coefficient, 0 or more. It is the same in every process, and constant within a step.
        is_measured: whether the base has to be asked at all: for the loss, or for the log.
    """

    beta: float
    is_measured: bool

    def __call__(self, eps_tuned: Tensor, eps_base: Tensor, levels: Sequence[Level]) -> Tensor:
        """The mean over K gradient steps and B images, a scalar.

        Args:
            eps_tuned: (K, B, C, H, W) guided noise estimates, with gradient.
            eps_base: the base's at the same x, without.
            levels: K, of the steps.
        """
        ...

    def end_step(self, kl: float) -> None:
        """After an optimizer step: its penalty, averaged over the whole batch. Here a coefficient may move."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has to be in a checkpoint: small."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


class EpsPenalty:
    """`draftp.kl_kind: eps`, the reference's: a fixed coefficient on the squared difference of the noise estimates.

    Args:
        beta: draftp.kl_coeff.
        is_measured: also where beta is 0.
    """

    def __init__(self, beta: float, is_measured: bool = True) -> None:
        self.beta, self.is_measured = beta, is_measured or beta > 0

    def __call__(self, eps_tuned: Tensor, eps_base: Tensor, levels: Sequence[Level]) -> Tensor:
        """See `Penalty`."""
        return kl_penalty(eps_tuned, eps_base)

    def end_step(self, kl: float) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


PENALTIES = {"eps": EpsPenalty}


def make_penalty(settings: DraftpConfig) -> Penalty:
    """The penalty that `draftp.kl_kind` and `draftp.kl_coeff` name.

    Raises:
        InputError: there is no such kind.
    """
    if settings.kl_kind not in PENALTIES:
        raise InputError(
            f"draftp.kl_kind {settings.kl_kind!r}: there is no such penalty; there is {', '.join(PENALTIES)}"
        )
    return PENALTIES[settings.kl_kind](settings.kl_coeff, settings.log_kl)


def kl_penalty(eps_tuned: Tensor, eps_base: Tensor) -> Tensor:
    """DRaFT+'s penalty: mean over K, B, C, H, W of the squared difference of the guided noise estimates.

    It is a plain mean squared error, called KL after the Gaussian it is proportional to; no 1/2, no 1/sigma^2.
    """
    return (eps_tuned - eps_base).square().mean()


def objective(reward: Tensor, kl: Tensor | None, beta: float) -> Tensor:
    """-r + beta KL, what DRaFT+ minimises. The one place where reward and penalty meet.

    Args:
        reward: scalar; the reward itself, or in stage two of a backward its linear part <dr/dx, x>, which has the same
            gradient.
        kl: scalar; None: not measured.
        beta: coefficient of the penalty.
    """
    return -reward + beta * kl if kl is not None and beta > 0 else -reward
