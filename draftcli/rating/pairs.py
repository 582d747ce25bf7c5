"""Which two pictures are shown together, in which order, on which side, and which pairs are shown again.

All of it follows from the seed and a pair's number: the same command shows the same, and one that asks for more pairs
begins with those of one that asked for fewer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from draftcli.errors import InputError
from draftcli.evaluation.pictures import entries_by_item, read_entries
from draftcli.prompts import Prompt, Shuffled
from draftcli.sampling.names import INDEX

REPEAT_EVERY = 10  # after so many pairs one of the earlier half of them is shown again
_T = TypeVar("_T")


@dataclass(frozen=True)
class RatedPicture:
    """A picture that is shown beside another.

    Attributes:
        path: its file.
        column: the weights that drew it, such as base or tuned, or the name of a run or folder.
        facts: what its line of index.jsonl says, such as its seed, without file and prompt.
    """

    path: Path
    column: str
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, line: Mapping[str, Any], column: str) -> RatedPicture:
        """The picture of a line of the index.jsonl in `folder`."""
        facts = {key: value for key, value in line.items() if key not in ("file", "prompt", "picture", "column")}
        return cls(folder / line["file"], column, facts)


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt."""

    prompt: str
    pictures: tuple[RatedPicture, RatedPicture]


@dataclass(frozen=True)
class Showing:
    """A pair on the page.

    Attributes:
        pair: its number, from 0.
        swapped: whether its first picture is on the right.
        repeats: whether it was on the page before, with its sides the other way round.
    """

    pair: int
    swapped: bool
    repeats: bool = False


def showings(count: int, seed: int) -> list[Showing]:
    """The order in which `count` pairs are shown, those that are shown again among them."""
    shown: list[Showing] = []
    swapped: list[bool] = []
    for i in range(count):
        chance = np.random.default_rng([seed, i])
        swapped.append(bool(chance.integers(2)))
        shown.append(Showing(i, swapped[i]))
        if (i + 1) % REPEAT_EVERY == 0:
            earlier = i + 1 - int(chance.integers(REPEAT_EVERY // 2 + 1, REPEAT_EVERY + 1))
            shown.append(Showing(earlier, not swapped[earlier], repeats=True))
    return shown


def prompts_of_pairs(prompts: Sequence[Prompt], count: int, seed: int) -> list[tuple[Prompt, int]]:
    """The prompt of each of `count` pairs, in a shuffled order, and how many pairs before have the same one."""
    shuffled, before = Shuffled(prompts, seed), defaultdict[Prompt, int](int)
    chosen = []
    for i in range(count):
        chosen.append((shuffled[i], before[shuffled[i]]))
        before[shuffled[i]] += 1
    return chosen


def pairs_in_folder(folder: Path, column: str, count: int, seed: int) -> list[Pair]:
    """At most `count` pairs of pictures of one prompt, out of a folder with an index.jsonl.

    Prompts take turns, and a prompt's pictures are first put in pairs that share none.

    Raises:
        InputError: no index, a picture outside the folder, or no prompt with two pictures.
    """
    found = defaultdict[str, list[RatedPicture]](list)
    for line in read_entries(folder):
        found[line["prompt"]].append(RatedPicture.of(folder, line, str(line.get("weight", column))))
    if all(len(pictures) < 2 for pictures in found.values()):
        raise InputError(f"{folder}: no prompt in {INDEX} has two images; a pair needs two of the same prompt")
    order = np.random.default_rng(seed)
    turns = [
        _pairs_of(prompt, [pictures[i] for i in order.permutation(len(pictures))]) for prompt, pictures in found.items()
    ]
    return list(islice(_in_turn(turns), count))


def pairs_across(folders: Sequence[Path], columns: Sequence[str], count: int, seed: int) -> list[Pair]:
    """At most `count` pairs of pictures with the same prompt and seed, one out of each of two folders.

    Raises:
        InputError: no index, a picture outside its folder, several of one prompt and seed, or nothing in common.
    """
    first, second = (
        {item: RatedPicture.of(folder, line, column) for item, line in entries_by_item(folder).items()}
        for folder, column in zip(folders, columns, strict=True)
    )
    both = [item for item in first if item in second]
    if not both:
        raise InputError(
            f"{folders[0]} and {folders[1]} have no prompt with the same seed in common; pairs are compared at one seed"
        )
    order = np.random.default_rng(seed).permutation(len(both))
    return [Pair(both[i].prompt, (first[both[i]], second[both[i]])) for i in order[:count]]


def _pairs_of(prompt: str, pictures: Sequence[RatedPicture]) -> Iterator[Pair]:
    return (Pair(prompt, two) for two in _couples(pictures))


def _couples(items: Sequence[_T]) -> Iterator[tuple[_T, _T]]:
    """Every two of `items` once: neighbours first, then those two apart, and so on round the circle."""
    n = len(items)
    for apart in range(1, n // 2 + 1):
        starts = range(n // 2 if 2 * apart == n else n)
        once = [i for i in starts if i // apart % 2 == 0 and i + apart < n]  # no item is in two of these
        for i in [*once, *(i for i in starts if i not in once)]:
            yield items[i], items[(i + apart) % n]


def _in_turn(iterators: Sequence[Iterator[_T]]) -> Iterator[_T]:
    waiting = list(iterators)
    while waiting:
        left = []
        for iterator in waiting:
            for item in islice(iterator, 1):
                yield item
                left.append(iterator)
        waiting = left
