"""The walk of a batch from noise to images without gradient, which gradient modes cut their pieces from.

Shape legend: B images, N sampler steps, C latent channels, H W latent size.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draftcli.core.backward import Piece
from draftcli.core.batch import Batch, ImageNoise, derived_seed
from draftcli.core.denoise import Sampler, denoise
from draftcli.core.networks import Networks
from draftcli.core.schedule import Level


class Rollout:
    """The walk of a batch from noise to images without gradient, as far as a mode asks for it.

    Args:
        nets: tuned, for the walk.
        sampler: how it is walked.
        batch: B images.
        cond: what the networks get for them.
        x: (B, C, H, W) latents at the first level; None: those of the batch's seeds, or where it has been walked to.
        recompute: whether pieces need x at each of their steps and x_0 beforehand, as RecomputedSteps does.
        lockstep: whether other processes walk beside this one with the same number of network calls (FSDP).

    Attributes:
        records: whether `seen` and `eps` are kept; a mode that wants them sets it before it walks.
        seen: (B, C, H, W) that the network was given, after churn, by step: those so far, without a prefix's.
        eps: (B, C, H, W) what it said, likewise: guided noise estimates.
    """

    def __init__(
        self,
        nets: Networks,
        sampler: Sampler,
        batch: Batch,
        cond: Any,
        x: Tensor | None = None,
        recompute: bool = False,
        lockstep: bool = False,
    ) -> None:
        self.nets, self.sampler, self.batch, self.cond = nets, sampler, batch, cond
        self.recompute, self.lockstep = recompute, lockstep
        self.records = False
        self.seen: dict[int, Tensor] = {}
        self.eps: dict[int, Tensor] = {}
        self._churn = churn_noise(batch)
        walked = batch.walked
        if x is None and walked is not None:
            self._at, self._x = walked.step, walked.x
        else:
            self._at, self._x = 0, nets.start(batch) if x is None else x
        # What a mode draws is new each time that it trains on the same pictures.
        self._again = ("use", walked.uses) if walked is not None and walked.uses else ()

    @property
    def steps(self) -> int:
        """N."""
        return len(self.sampler.schedule)

    def to(self, step: int) -> Tensor:
        """Walk on to level `step` -> x (B, C, H, W)."""
        tuned, prefix = self.nets.tuned(self.cond), self.sampler.prefix
        first = 0 if prefix is None else prefix.stop

        def predict(x: Tensor, level: Level) -> Tensor:
            eps = tuned(x, level)
            if self.records and level.index >= first:
                self.seen[level.index], self.eps[level.index] = x, eps
            return eps

        self._x = self.sampler.walk(predict, self._x, self._churn, start=self._at, stop=step)
        self._at = step
        return self._x

    def some(self, images: Sequence[int]) -> Rollout:
        """The walk of some of the images, from where it is now."""
        rows = torch.tensor(images, device=self._x.device)
        part = copy.copy(self)
        part.batch, part.cond, part._churn = self.batch.some(images), self.cond[rows], self._churn[images]
        part._x = self._x[rows]
        part.seen, part.eps = ({step: x[rows] for step, x in kept.items()} for kept in (self.seen, self.eps))
        return part

    def each(self) -> Iterator[Rollout]:
        """The walk of each image by itself."""
        return (self.some([i]) for i in range(len(self.batch)))

    def apart(self, steps: Sequence[int], latest: int) -> Iterator[tuple[int, Rollout]]:
        """Walk each image to a level of its own, as many together as are on their way.

        Args:
            steps: (B,) its level.
            latest: the largest that could have been drawn. In lockstep the walk is as long whatever was drawn.

        Yields:
            level, and the walk of the images that stop there; in lockstep of each of them by itself.
        """
        rollout, left = self, list(steps)
        for step in sorted(set(steps)):
            rollout.to(step)
            here = rollout.some([i for i, level in enumerate(left) if level == step])
            if step < max(steps):
                others = [i for i, level in enumerate(left) if level != step]
                rollout, left = rollout.some(others), [left[i] for i in others]
            for part in here.each() if self.lockstep else [here]:
                yield step, part
        if self.lockstep:
            rollout.to(latest)

    def piece(self, first: int, x: Tensor | None = None, levels: Sequence[Level] | None = None) -> Piece:
        """A piece of steps that follow each other, the gradient running through x from one to the next.

        Args:
            first: the level that it begins at.
            x: (B, C, H, W) latents there; None: those of the walk.
            levels: of its steps; None: from `first` to the image.
        """
        x, levels = self.to(first) if x is None else x, list(levels or self.sampler.levels(first))
        churn = [self._churn(tuple(x.shape)).to(x) for level in levels if level.churn > 0]
        if levels[0].churn > 0:
            x, levels[0] = x + churn.pop(0) * levels[0].churn, replace(levels[0], churn=0.0)
        piece = Piece(self.batch.prompts, self.cond, levels, [x], churn=churn)
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
        seeds = [derived_seed(seed, *purpose, *self._again) for seed in self.batch.seeds]
        return ImageNoise(seeds)(tuple(self._x.shape)).to(self._x)

    def draws(self, *purpose: object) -> list[random.Random]:
        """(B,) random numbers of a mode's own, from each image's seed and `purpose`: names and numbers."""
        return [random.Random(derived_seed(seed, *purpose, *self._again)) for seed in self.batch.seeds]


def churn_noise(batch: Batch) -> ImageNoise:
    """The noise that sampling.s_churn, or the sampler, adds along a batch's trajectories, from each image's seed."""
    return ImageNoise([derived_seed(seed, "churn") for seed in batch.seeds])
