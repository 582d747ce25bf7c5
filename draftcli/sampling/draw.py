"""Draw pictures without gradient: every prompt with every seed, in batches, on the one denoising loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftcli.core.draftp import Batch, SDXLDRaFTPModel
from draftcli.core.guidance import weighing
from draftcli.prompts import Prompt


@dataclass(frozen=True)
class Picture:
    """One picture to draw: noise from `seed` and `size` alone."""

    prompt: Prompt
    seed: int
    size: tuple[int, int]


def plan(prompts: Sequence[Prompt], images: int, seed: int, size: tuple[int, int]) -> list[Picture]:
    """Picture j of every prompt has seed + j; a prompt's pictures are neighbours."""
    return [Picture(prompt, seed + j, size) for prompt in prompts for j in range(images)]


@torch.no_grad()
def draw(
    model: SDXLDRaFTPModel, pictures: Sequence[Picture], kind: str, batch_size: int
) -> Iterator[tuple[Tensor, list[str]]]:
    """Draw `pictures` in order, in batches of one size.

    Args:
        model: tuned and base in one.
        pictures: what to draw.
        kind: a weighting of `core.guidance`: base, tuned, linear, ...
        batch_size: at most so many at once.

    Yields:
        images (B, 3, H, W) in [0, 1] on the model's device, and their B prompts.
    """
    weigh = weighing(kind)
    for group in _batches(pictures, batch_size):
        batch = Batch(
            [p.prompt.text for p in group], [p.seed for p in group], group[0].size, [p.prompt.negative for p in group]
        )
        noise = model.initial_noise(batch)
        yield (model.annealed_guidance(batch, noise, weigh) / 255).float(), list(batch.prompts)


def _batches(pictures: Sequence[Picture], count: int) -> Iterator[list[Picture]]:
    group: list[Picture] = []
    for picture in pictures:
        if group and (len(group) == count or picture.size != group[0].size):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group
