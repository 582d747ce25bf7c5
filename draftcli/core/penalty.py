"""The penalty that holds the tuned network to its base, and what controls its coefficient.

A penalty is an object that a training step asks. What it measures is a function found by `draftp.kl_kind`; another kind
is one more function here. How much it counts for each image is an object of image_weights.py. Shape legend: B images,
K gradient steps, C latent channels, H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from draftcli.config import DraftpConfig
from draftcli.core.guidance import NoiseEstimate
from draftcli.core.image_weights import AllAlike, image_weights_of
from draftcli.core.schedule import Level
from draftcli.errors import InputError


class Difference(Protocol):
    """How far apart two networks are."""

    def __call__(
        self, tuned: NoiseEstimate, base: NoiseEstimate, levels: Sequence[Level], weights: Tensor | None = None, /
    ) -> Tensor:
        """The mean over K gradient steps and B images, each times its weight (B,) where there are some: a scalar."""
        ...


class Penalty:
    """What is added to the loss, `beta` times, to keep the tuned network near its base; its coefficient is fixed.

    Args:
        difference: what it measures.
        beta: draftp.kl_coeff.
        is_measured: also where beta is 0.
        weights: how much it counts for each image; None: all alike.

    Attributes:
        beta: the coefficient, 0 or more. It is the same in every process, and constant within a step.
        is_measured: whether the base has to be asked at all: for the loss, or for the log.
    """

    def __init__(
        self, difference: Difference, beta: float, is_measured: bool = True, weights: AllAlike | None = None
    ) -> None:
        self.difference, self.beta, self.is_measured = difference, beta, is_measured or beta > 0
        self.weights = weights or AllAlike()

    def __call__(
        self, tuned: NoiseEstimate, base: NoiseEstimate, levels: Sequence[Level], weights: Tensor | None = None
    ) -> Tensor:
        """The mean over K gradient steps and B images, a scalar.

        Args:
            tuned: the estimates (K, B, C, H, W), with gradient.
            base: the base's at the same x, without.
            levels: K, of the steps.
            weights: how much each image counts, (B,), as `weigh` says; None: all alike.
        """
        return self.difference(tuned, base, levels, weights)

    def weigh(self, images: Tensor, prompts: Sequence[str], rewards: Tensor) -> Tensor | None:
        """How much the penalty of each image counts, (B,), a constant; None: all alike.

        Args:
            images: (B, 3, H, W) in [0, 1], at the size of pictures.
            prompts: B.
            rewards: (B,), the trained reward of each.

        Raises:
            InputError: the settings want held-out rewards asked, and nobody has given any.
        """
        return self.weights(images.detach(), list(prompts), rewards.detach()) if self.beta > 0 else None

    def figures(self) -> dict[str, float]:
        """What a step's line of metrics.jsonl says beside the penalty itself."""
        return {}

    def end_step(self, kl: float) -> None:
        """After an optimizer step: its penalty, averaged over the whole batch. Here a coefficient may move."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be in a checkpoint: small."""
        state = self.weights.state_dict()
        return {"weights": state} if state else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.weights.load_state_dict(state.get("weights", {}))


class SteeredPenalty(Penalty):
    """`draftp.kl_target`: the coefficient is steered so that the penalty stays near a target.

    The proportional rule of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2), after each step:

        beta <- beta (1 + GAIN e),    e = penalty / target - 1, clipped to [-CLIP, CLIP]

    so that it moves by at most 5 % a step. Their GAIN is 0.1, for runs of many thousand steps. PPO's rule of a fixed
    factor (Schulman et al. 2017, arXiv 1707.06347, section 4) is meant for iterations of many steps: a factor of 1.5 at
    each step let the coefficient swing by a thousand. As the penalty begins at 0, where no coefficient could raise it,
    the coefficient stays within REACH times what it began with.

    Args:
        difference: what it measures.
        beta: draftp.kl_coeff, which it begins with; above 0.
        target: draftp.kl_target, above 0.
        weights: how much it counts for each image; None: all alike.
    """

    GAIN, CLIP, REACH = 0.25, 0.2, 100.0

    def __init__(self, difference: Difference, beta: float, target: float, weights: AllAlike | None = None) -> None:
        super().__init__(difference, beta, weights=weights)
        self.target, self._low, self._high = target, beta / self.REACH, beta * self.REACH

    def figures(self) -> dict[str, float]:
        """The coefficient."""
        return {"kl_coeff": self.beta}

    def end_step(self, kl: float) -> None:
        """Move the coefficient for the next step."""
        error = min(max(kl / self.target - 1, -self.CLIP), self.CLIP)
        self.beta = min(max(self.beta * (1 + self.GAIN * error), self._low), self._high)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, and what the weights have."""
        return {**super().state_dict(), "kl_coeff": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the coefficient of a checkpoint."""
        super().load_state_dict(state)
        self.beta = state["kl_coeff"]


def guided_difference(
    tuned: NoiseEstimate, base: NoiseEstimate, levels: Sequence[Level], weights: Tensor | None = None
) -> Tensor:
    """`draftp.kl_kind: eps`, the reference's: that of the guided estimates, which the sampler follows."""
    return kl_penalty(tuned.guided, base.guided, weights)


def conditional_difference(
    tuned: NoiseEstimate, base: NoiseEstimate, levels: Sequence[Level], weights: Tensor | None = None
) -> Tensor:
    """`draftp.kl_kind: conditional`: that of the estimates for the prompt alone.

    Guidance multiplies a change of the conditional estimate by sampling.scale, and so a penalty on the guided one by
    its square. This one does not depend on it, for given latents.
    """
    return kl_penalty(tuned.conditional, base.conditional, weights)


def image_difference(
    tuned: NoiseEstimate, base: NoiseEstimate, levels: Sequence[Level], weights: Tensor | None = None
) -> Tensor:
    """`draftp.kl_kind: x0`: that of the images predicted at each step, in latent space.

    x_0 = x - sigma eps at the same x, so it is the difference of the guided estimates times sigma^2.
    """
    sigmas = tuned.guided.new_tensor([level.sigma for level in levels]).view(-1, 1, 1, 1, 1)
    return kl_penalty(sigmas * tuned.guided, sigmas * base.guided, weights)


PENALTIES: dict[str, Difference] = {
    "eps": guided_difference,
    "conditional": conditional_difference,
    "x0": image_difference,
}


def make_penalty(settings: DraftpConfig) -> Penalty:
    """The penalty that `draftp.kl_kind`, `kl_coeff`, `kl_target`, `kl_gate` and `kl_by_reward` name.

    Raises:
        InputError: there is no such kind.
    """
    if settings.kl_kind not in PENALTIES:
        raise InputError(
            f"draftp.kl_kind {settings.kl_kind!r}: there is no such penalty; available are {', '.join(PENALTIES)}"
        )
    difference, weights = PENALTIES[settings.kl_kind], image_weights_of(settings)
    if settings.kl_target is not None:
        return SteeredPenalty(difference, settings.kl_coeff, settings.kl_target, weights)
    return Penalty(difference, settings.kl_coeff, settings.log_kl, weights)


def kl_penalty(eps_tuned: Tensor, eps_base: Tensor, weights: Tensor | None = None) -> Tensor:
    """DRaFT+'s penalty: mean over K, B, C, H, W of the squared difference of two networks' noise estimates.

    It is a plain mean squared error, called KL after the Gaussian it is proportional to; no 1/2, no 1/sigma^2. With
    `weights` (B,) each image's part counts times its own.
    """
    squares = (eps_tuned - eps_base).square()
    return squares.mean() if weights is None else (squares * weights.view(1, -1, 1, 1, 1)).mean()


def objective(reward: Tensor, kl: Tensor | None, beta: float) -> Tensor:
    """-r + beta KL, what DRaFT+ minimises. The one place where reward and penalty meet.

    Args:
        reward: scalar; the reward itself, or in stage two of a backward its linear part <dr/dx, x>, which has the same
            gradient.
        kl: scalar; None: not measured.
        beta: coefficient of the penalty.
    """
    return -reward + beta * kl if kl is not None and beta > 0 else -reward
