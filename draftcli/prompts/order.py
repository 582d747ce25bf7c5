"""The order in which a run takes its prompts: a function of the seed and the image's number alone.

So a run resumes where it was by knowing its step, and ranks share the work without talking.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

from draftcli.prompts.prompt import Prompt, PromptSequence

_T = TypeVar("_T")


class Shuffled(Generic[_T]):
    """An endless, reproducible shuffle: every item once an epoch, in another order each epoch.

    Args:
        items: prompts, or the sizes of a batch.
        seed: of the order.
    """

    def __init__(self, items: Sequence[_T] | np.ndarray, seed: int) -> None:
        self.items = items
        self.seed = seed
        self.permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def __getitem__(self, index: int) -> _T:
        """The `index`-th item from 0, counted over all epochs."""
        epoch, position = divmod(index, len(self.items))
        return self.items[int(self.permutation(epoch)[position])]


class Batches:
    """Which prompts train together: `count` of one size, in the order of `Shuffled`.

    Prompts with a size of their own are with their like; each size has as many batches an epoch as its prompts fill,
    and at least one. Where no prompt has a size there is one group, and this is `Shuffled` cut in pieces.

    Args:
        prompts: all of them.
        count: pictures a batch.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Prompt], count: int, seed: int) -> None:
        self.prompts, self.count = prompts, count
        self._groups = [Shuffled(group, seed) for group in PromptSequence.of(prompts).by_size]
        shares = [max(1, round(len(group.items) / count)) for group in self._groups]
        self._turns = Shuffled(np.repeat(np.arange(len(shares)), shares), seed)

    def __getitem__(self, index: int) -> list[Prompt]:
        """The prompts of batch `index`, from 0."""
        which = int(self._turns[index])
        epoch, position = divmod(index, len(self._turns.items))
        order = np.asarray(self._turns.items)[self._turns.permutation(epoch)]
        turn = epoch * int((order == which).sum()) + int((order[:position] == which).sum())
        return [self.prompts[int(self._groups[which][turn * self.count + i])] for i in range(self.count)]
