"""Answers between two pictures of a prompt, and what shows in them before anything is learned."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.stats import binomtest

from draftcli.errors import InputError
from draftcli.pictures import open_picture

HABIT = 1e-3  # how unlikely so uneven a choice of sides must be, where sides mean nothing, before it is a habit


@dataclass(frozen=True)
class Shown:
    """One of the two pictures of a pair.

    Attributes:
        name: for messages; of a picture in a file its path.
        path: of its file; None where a table holds it.
        data: the file's bytes, where a table holds them.
    """

    name: str
    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> str:
        """The same for the same picture."""
        if self.path is not None:
            return str(self.path)
        return hashlib.sha256(self.data or b"").hexdigest()

    def picture(self) -> Image.Image:
        """The picture in 8-bit RGB.

        Raises:
            InputError: it is not there, or cannot be read.
        """
        if self.path is None:
            return open_picture(io.BytesIO(self.data or b""), self.name)
        if not self.path.is_file():
            raise InputError(f"{self.path}: there is no such file")
        return open_picture(self.path)


@dataclass(frozen=True)
class Answer:
    """What somebody said of two pictures.

    Attributes:
        prompt: of both; empty: not known.
        first: one picture, the left one where they were side by side.
        second: the other.
        label: the share that the first has of the preference: 1, 0, or 0.5 for a tie.
        repeat: it was asked before, to see how steady the answers are.
        called: which line, row or file it was, for messages.
    """

    prompt: str
    first: Shown
    second: Shown
    label: float
    repeat: bool = False
    called: str = ""

    @property
    def pictures(self) -> frozenset[str]:
        """Both, in no order."""
        return frozenset((self.first.key, self.second.key))


@dataclass(frozen=True)
class Answers:
    """All answers of a file or folder, in its order.

    Attributes:
        where: it was read.
        answers: without the skipped ones and those that were taken back.
        skipped: how many said nothing.
        sides_by_chance: whether which picture came first was drawn by chance, so that it cannot matter to a taste.
        left_out: answers that could not be read, a sentence each.
    """

    where: str
    answers: tuple[Answer, ...]
    skipped: int = 0
    sides_by_chance: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def decided(self) -> int:
        """How many are no ties."""
        return sum(answer.label != 0.5 for answer in self.answers)

    @cached_property
    def groups(self) -> np.ndarray:
        """(n,) a number for each answer: answers of one group are never on both sides of a split.

        A group is a prompt. Where there is no prompt, or only one, it is what is linked by common pictures.
        """
        prompts = {answer.prompt for answer in self.answers}
        if len(prompts) > 1 and "" not in prompts:
            return numbered([answer.prompt for answer in self.answers])
        return _linked([answer.pictures | ({answer.prompt} if len(prompts) > 1 else set()) - {""}
                        for answer in self.answers])  # fmt: skip

    @property
    def splits_prompts(self) -> bool:
        """Whether groups keep prompts apart; else there are too few to do so."""
        return len({answer.prompt for answer in self.answers} - {""}) > 1

    def only(self, kept: Sequence[bool], why: Sequence[str] = ()) -> Answers:
        """Some of the answers, and in words why not the others."""
        answers = tuple(answer for answer, keep in zip(self.answers, kept, strict=True) if keep)
        return replace(self, answers=answers, left_out=(*self.left_out, *why))

    def steadiness(self) -> list[float]:
        """For every repeated pair 1 where the answer was the same picture again, 0 where it was the other.

        A tie beside an answer is half the same.
        """
        before: dict[tuple[str, frozenset[str]], Answer] = {}
        same = []
        for answer in self.answers:
            key = (answer.prompt, answer.pictures)
            earlier = before.get(key)
            if earlier is None:
                before[key] = answer
            elif answer.repeat:
                label = answer.label if answer.first.key == earlier.first.key else 1 - answer.label
                same.append(1 - abs(label - earlier.label))
        return same

    def habit(self) -> str | None:
        """A warning where one side was chosen so often that a taste cannot be the reason; None where not."""
        if not self.sides_by_chance:
            return None
        sides = Counter(answer.label for answer in self.answers if answer.label != 0.5)
        left, decided = sides[1.0], sides[1.0] + sides[0.0]
        if not decided or binomtest(left, decided).pvalue > HABIT:
            return None
        side, count = ("left", left) if left > decided / 2 else ("right", decided - left)
        return (
            f"{self.where}: the {side} image was chosen in {count} of {decided} pairs, and which one is {side} was "
            "drawn by chance: so many are a habit of the hand rather than a taste; rate again, or look at the file"
        )


def numbered(names: Sequence[str]) -> np.ndarray:
    """(n,) a number for each name, the same for the same one, from 0 in the order in which they come."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], int)


def _linked(sets: Sequence[frozenset[str]]) -> np.ndarray:
    """A number for each set, the same for sets that are linked by common members."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = name = leader[leader[name]]
        return name

    firsts = [next(iter(sorted(members))) for members in sets]
    for first, members in zip(firsts, sets, strict=True):
        for member in members:
            leader[find(member)] = find(first)
    return numbered([find(first) for first in firsts])
