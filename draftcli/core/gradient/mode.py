"""What a gradient mode is: which sampler steps carry gradient, what they see, and what the reward sees.

A mode is one file here, found by its name in `draftp.gradient`; plans, memory, cards and benchmarks ask the mode
itself what it takes. See last_k.py for the shortest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from draftcli.config import Config
from draftcli.core.backward import Piece, Work
from draftcli.core.batch import Batch, ImageNoise, derived_seed
from draftcli.core.denoise import Sampler, denoise
from draftcli.core.networks import Networks
from draftcli.core.schedule import Level
from draftcli.errors import InputError

TRAINING_SAMPLERS = ("euler", "ddim")


@dataclass(frozen=True)
class Evaluations:
    """UNet evaluations an image in a training step, of the tuned network; a guided step takes two.

    Attributes:
        without_gradient: forward passes alone.
        with_gradient: forward passes that are followed by a backward. The base, where it is asked, takes as many.
    """

    without_gradient: int
    with_gradient: int


class GradientMode(Protocol):
    """Cuts trajectories into pieces that carry gradient.

    Attributes:
        recomputes: whether it needs x_0 before the steps with gradient are run (backward.py: RecomputedSteps).
        pieces_per_image: pieces that a batch is cut into, each with all of its images.
        longest: steps with gradient in the longest piece, whose graph may be kept.
    """

    recomputes: bool
    pieces_per_image: int
    longest: int

    def pieces(self, rollout: Rollout) -> Iterator[Piece]:
        """What is to be backpropagated of one rollout. Randomness belongs to the images' seeds."""
        ...

    def evaluations(self, per_step: Sequence[int], recompute: bool) -> Evaluations:
        """What an image takes.

        Args:
            per_step: (N,) evaluations of one network in each sampler step: 2 where it is guided, else 1.
            recompute: whether steps with gradient are walked once without (backward.py: RecomputedSteps).
        """
        ...

    def describe(self) -> str:
        """For model cards: what carries gradient, as in "gradient through the last 4 of 25 sampler steps"."""
        ...


class Rollout:
    """The walk of a batch from noise to images without gradient, as far as a mode asks for it.

    Args:
        nets: tuned, for the walk.
        sampler: how it is walked.
        batch: B images.
        cond: what the networks get for them.
        x: (B, C, H, W) latents at the first level.
        recompute: whether pieces need x at each of their steps and x_0 beforehand, as RecomputedSteps does.
    """

    def __init__(
        self,
        nets: Networks,
        sampler: Sampler,
        batch: Batch,
        cond: Any,
        x: Tensor,
        recompute: bool = False,
    ) -> None:
        self.nets, self.sampler, self.batch, self.cond, self.recompute = nets, sampler, batch, cond, recompute
        self._churn = churn_noise(batch)
        self._at, self._x = 0, x

    def to(self, step: int) -> Tensor:
        """Walk on to level `step` -> x (B, C, H, W)."""
        self._x = self.sampler.walk(self.nets.tuned(self.cond), self._x, self._churn, start=self._at, stop=step)
        self._at = step
        return self._x

    def piece(self, x: Tensor, first: int) -> Piece:
        """The piece of the steps from `first` to the image, following each other, from x (B, C, H, W) at that level."""
        levels = self.sampler.levels(first)
        churn = [self._churn(tuple(x.shape)).to(x) for level in levels if level.churn > 0]
        if churn:
            x, levels[0] = x + churn[0] * levels[0].churn, replace(levels[0], churn=0.0)
        piece = Piece(self.batch.prompts, self.cond, levels, [x], churn=churn[1:])
        return self._walked(piece) if self.recompute else piece

    def _walked(self, piece: Piece) -> Piece:
        """The piece with the latents that the network sees in each of its steps, and x_0."""
        tuned, churn = self.nets.tuned(self.cond), iter(piece.churn)
        seen: list[Tensor] = []

        def predict(x: Tensor, level: Level) -> Tensor:
            seen.append(x)
            return tuned(x, level)

        x_0 = denoise(predict, piece.x[0], piece.levels, solver=self.sampler.solver, noise=lambda shape: next(churn))
        return replace(piece, x=seen, x_0=x_0)

    def noise(self, *purpose: object) -> Tensor:
        """Unit noise (B, C, H, W) of a mode's own, from each image's seed and `purpose`: names and numbers."""
        seeds = [derived_seed(seed, *purpose) for seed in self.batch.seeds]
        return ImageNoise(seeds)(tuple(self._x.shape)).to(self._x)


def churn_noise(batch: Batch) -> ImageNoise:
    """The noise that sampling.s_churn adds along a batch's trajectories, from each image's seed."""
    return ImageNoise([derived_seed(seed, "churn") for seed in batch.seeds])


def mode_names() -> list[str]:
    """The modes that there are: the files beside this one."""
    folder = Path(__file__).parent
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", Path(__file__).stem))


def make_mode(cfg: Config) -> GradientMode:
    """The mode that the settings name.

    Raises:
        InputError: no such mode, an option that it does not have or allow, or a sampler that cannot carry gradient.
    """
    check_sampler(cfg.sampling.sampler)
    name, options = cfg.draftp.gradient_mode
    if name not in mode_names():
        raise InputError(f"draftp.gradient {name!r}: there is no such mode; there are {', '.join(mode_names())}")
    # last_k.py has LastK.
    factory: Any = getattr(import_module(f"draftcli.core.gradient.{name}"), name.title().replace("_", ""))
    known = [option for option in inspect.signature(factory).parameters if option not in ("steps", "k")]
    if unknown := sorted(options.keys() - set(known)):
        allowed = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"draftp.gradient {name} has no option {unknown[0]!r}; {allowed}")
    return factory(steps=cfg.sampling.steps, k=cfg.draftp.truncation_steps, **options)


def recomputes_steps(cfg: Config) -> bool:
    """Whether gradient steps run again in backward, as the settings ask or as their mode cannot do otherwise."""
    return Work.of(cfg, make_mode(cfg).recomputes).recompute


def check_sampler(sampler: str) -> None:
    """See that a sampler can carry gradient: one network call a step, and none that looks back over a cut.

    Raises:
        InputError: it cannot.
    """
    if sampler not in TRAINING_SAMPLERS:
        raise InputError(
            f"sampling.sampler {sampler} draws pictures but cannot train; train with {' or '.join(TRAINING_SAMPLERS)}, "
            f"and draw with draftp sample --sampler {sampler}"
        )
