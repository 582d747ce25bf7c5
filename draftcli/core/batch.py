"""What is drawn together, and one seed per image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Walked:
    """How far an earlier optimizer step has walked B pictures (draftp.reuse).

    Attributes:
        step: the sampler step at whose noise level they are.
        x: (B, C, H, W) latents there.
        uses: optimizer steps that have trained on them already.
    """

    step: int
    x: Tensor
    uses: int = 0

    def some(self, images: Sequence[int]) -> Walked:
        """That of the pictures with these numbers."""
        return replace(self, x=self.x[list(images)])


@dataclass(frozen=True)
class Batch:
    """Pictures to draw together: all of one size.

    Attributes:
        prompts: B texts.
        seeds: B numbers; an image's noise depends on its seed and size alone.
        size: (height, width) in pixels.
        negatives: B negative prompts; None where none is given. Left out: none at all.
        walked: where their walks go on from; None: they begin with noise.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    size: tuple[int, int]
    negatives: Sequence[str | None] = ()
    walked: Walked | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.negatives:
            object.__setattr__(self, "negatives", [None] * len(self.prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    def split(self, count: int) -> list[Batch]:
        """Consecutive batches of at most `count` pictures."""
        return [self.some(range(len(self))[i : i + count]) for i in range(0, len(self), count)]

    def some(self, images: Sequence[int]) -> Batch:
        """The batch of the pictures with these numbers, in this order."""
        prompts, seeds = [self.prompts[i] for i in images], [self.seeds[i] for i in images]
        walked = None if self.walked is None else self.walked.some(images)
        return Batch(prompts, seeds, self.size, [self.negatives[i] for i in images], walked)


def derived_seed(*parts: object) -> int:
    """A 32-bit seed from a tuple of names and numbers: the same on every machine, unlike `hash`.

    32 bits because torch's CPU generator (mt19937) reads no more of a seed.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


class ImageNoise:
    """Unit normal noise with one CPU generator per image: image i's noise depends on its seed and the size alone, not
    on the batch, its order, the rank or the device (after EDM2's StackedRandomGenerator).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """(B, ...) float32 on the CPU; `shape[0]` must be the number of seeds."""
        assert shape[0] == len(self.generators)
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators])

    def __getitem__(self, images: slice | Sequence[int]) -> ImageNoise:
        """The noise of some of the images; each goes on where it was, here as there."""
        part, all_of_them = ImageNoise([]), self.generators
        part.generators = all_of_them[images] if isinstance(images, slice) else [all_of_them[i] for i in images]
        return part
