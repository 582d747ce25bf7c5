"""Draw pictures without gradient: every prompt with every seed, in batches, on the one denoising loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from draftcli.core.annealing import evaluations, step_weights
from draftcli.core.batch import Batch
from draftcli.core.denoise import SOLVERS
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.lora.adapters import adapters_scaled, lora_layers
from draftcli.core.weighings import Weighing, named_weighing, weighing
from draftcli.errors import InputError
from draftcli.prompts import SEEDS, Prompt


@dataclass(frozen=True)
class Picture:
    """One picture to draw: noise from `seed` and `size` alone."""

    prompt: Prompt
    seed: int
    size: tuple[int, int]


@dataclass(frozen=True)
class StepWeights:
    """A weighting worked out for N steps: the weight of each."""

    weights: tuple[float, ...]

    def __call__(self, sigma: float, sigma_next: float, i: int, total: int) -> float:
        """That of step `i`."""
        return self.weights[i]


@dataclass(frozen=True)
class Column:
    """One way to draw a picture, between base and tuned.

    Attributes:
        name: for captions, file names and indexes: letters, digits and `._-`.
        weigh: the tuned network's weight at each step.
        stochastic: one network a step, drawn with that weight.
        lora_scale: times the scale that the LoRAs have.
    """

    name: str
    weigh: Weighing
    stochastic: bool = False
    lora_scale: float = 1.0

    @classmethod
    def of(cls, kind: str, stochastic: bool = False) -> Column:
        """The column of an annealing weight: base, tuned, linear, ...

        Raises:
            InputError: an unknown kind.
        """
        name, weigh = named_weighing(kind)
        chance = stochastic and name not in ("base", "tuned")
        return cls(name + ("_stochastic" if chance else ""), weigh, chance)

    @classmethod
    def scaled(cls, scale: float) -> Column:
        """The tuned network with its LoRAs at `scale`: what people do without AIG."""
        return cls(f"scale_{scale:g}", weighing("tuned"), lora_scale=scale)

    def on(self, model: DRaFTPModel) -> Column:
        """The same column with the weights of the model's steps worked out, so that a user's function is called once a
        step and not again for every batch.

        Raises:
            InputError: a weight is not in [0, 1].
        """
        return replace(self, weigh=StepWeights(tuple(self.weights(model))))

    def weights(self, model: DRaFTPModel) -> list[float]:
        """The tuned network's weight at each of the model's steps."""
        return step_weights(self.weigh, model.schedule)

    def evaluations(self, model: DRaFTPModel) -> int:
        """UNet evaluations that one picture takes, guidance's two counted."""
        sampling = model.cfg.sampling
        solver = SOLVERS[sampling.sampler]
        return evaluations(self.weights(model), model.schedule, solver, self.stochastic, sampling.is_guided)


def plan(prompts: Sequence[Prompt], images: int, seed: int, size: tuple[int, int]) -> list[Picture]:
    """Picture j of every prompt has seed + j; a prompt's pictures are neighbours. A prompt's own seed and size win.

    Raises:
        InputError: a seed beyond 2^32 - 1, more than torch's generator reads.
    """
    starts = [seed if prompt.seed is None else prompt.seed for prompt in prompts]
    if (last := max(starts, default=0) + images - 1) >= SEEDS:
        raise InputError(f"the last image would have seed {last}; seeds go from 0 to {SEEDS - 1}")
    return [
        Picture(prompt, start + j, prompt.size or size)
        for prompt, start in zip(prompts, starts, strict=True)
        for j in range(images)
    ]


def draw(
    model: DRaFTPModel, pictures: Sequence[Picture], column: Column | str, batch_size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Draw `pictures` in order, in batches of one size.

    Args:
        model: tuned and base in one.
        pictures: what to draw.
        column: how, or the name of an annealing weight.
        batch_size: at most so many at once.

    Yields:
        images (B, 3, H, W) in [0, 1] on the model's device, and their B prompts.
    """
    for group in batches(pictures, batch_size):
        images = draw_batch(model, group, Column.of(column) if isinstance(column, str) else column)
        yield images.float(), [picture.prompt.text for picture in group]


@torch.no_grad()
def draw_batch(model: DRaFTPModel, group: Sequence[Picture], column: Column) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of pictures of one size."""
    batch = Batch(
        [p.prompt.text for p in group], [p.seed for p in group], group[0].size, [p.prompt.negative for p in group]
    )
    with ExitStack() as stack:
        if column.lora_scale != 1:
            networks = [n for n in (model.unet, *model.parts.text_encoders) if lora_layers(n)]
            if not networks:
                raise InputError(f"{column.name}: this model has no LoRA whose scale could be changed")
            for network in networks:
                stack.enter_context(adapters_scaled(network, column.lora_scale))
        return model.annealed_images(batch, model.initial_noise(batch), column.weigh, column.stochastic)


def batches(pictures: Sequence[Picture], count: int) -> Iterator[list[Picture]]:
    """Consecutive pictures of one size, at most `count` together."""
    group: list[Picture] = []
    for picture in pictures:
        if group and (len(group) == count or picture.size != group[0].size):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group
