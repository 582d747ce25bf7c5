"""One prompt, and many: with what is known of all of them without reading each again."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np

from draftcli.config import SamplingConfig
from draftcli.errors import InputError, brief

SEEDS = 2**32  # torch's CPU generator reads no more of a seed


@dataclass(frozen=True)
class Prompt:
    """One prompt. An empty text is legal.

    Attributes:
        text: what the image should show.
        negative: its negative prompt; None means the run's own.
        seed: of its noise, 0 to 2^32 - 1, instead of the run's own.
        size: (height, width) in pixels, instead of the run's own.

    Raises:
        InputError: a text that cannot be encoded.
    """

    text: str
    negative: str | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for text in (self.text, self.negative or ""):
            if not text.isprintable():  # quick; a lone half of a surrogate pair is not printable
                _check_encodable(text)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"prompt {brief(text)}: it holds half a character (a lone surrogate); save it again") from None


class PromptSequence(Sequence[Prompt]):
    """n prompts, wherever they are kept.

    What follows is worked out from the prompts, once; a file knows most of it from its index.

    Attributes:
        notes: what people should know of them, a line each: what was not read, or not as another program reads it.
    """

    notes: Sequence[str] = ()

    @abstractmethod
    def _read(self, index: int) -> Prompt:
        """Prompt `index`; negative numbers count from the end."""

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        return self._read(index)

    @staticmethod
    def of(prompts: Sequence[Prompt]) -> PromptSequence:
        """The prompts themselves, a plain list wrapped."""
        return prompts if isinstance(prompts, PromptSequence) else PromptList(prompts)

    @cached_property
    def sha256(self) -> str:
        """Changes with any prompt: of a file its checksum, else of the prompts as JSON."""
        digest = hashlib.sha256()
        for prompt in self:
            digest.update(json.dumps(asdict(prompt)).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def negatives(self) -> int:
        """How many have a negative prompt of their own."""
        return sum(prompt.negative is not None for prompt in self)

    def notes_for(self, sampling: SamplingConfig) -> list[str]:
        """The notes, and what has no effect where pictures are drawn as `sampling` says."""
        guided = any(map(sampling.is_guided, range(sampling.steps)))
        count = f"{self.negatives} of {len(self)} prompts"
        idle = f"negative prompts of their own, which {count} have, do nothing without guidance"
        return [*self.notes, *([idle] if self.negatives and not guided else [])]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n,) bytes, at least as many as each text has."""
        return np.array([len(prompt.text.encode()) for prompt in self], dtype=int)

    @cached_property
    def by_size(self) -> list[np.ndarray]:
        """The indices of the prompts of each size that occurs; first those without a size of their own."""
        numbers: dict[tuple[int, int] | None, int] = {None: 0}
        labels = np.array([numbers.setdefault(prompt.size, len(numbers)) for prompt in self], dtype=int)
        return rows_by_label(labels)


class PromptList(PromptSequence):
    """Prompts in memory, and their notes."""

    def __init__(self, prompts: Iterable[Prompt] = (), notes: Sequence[str] = ()) -> None:
        self._prompts = list(prompts)
        self.notes = notes

    def __len__(self) -> int:
        return len(self._prompts)

    def _read(self, index: int) -> Prompt:
        return self._prompts[index]


def rows_by_label(labels: np.ndarray) -> list[np.ndarray]:
    """The indices of each label, 0 first; of labels (n,), whole numbers from 0."""
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def past_the_limit(prompts: Sequence[Prompt], tokenizer: Any) -> tuple[int, Prompt | None]:
    """How many prompts have more tokens than `tokenizer` keeps, and the first of them.

    A token stands for at least one byte, so that short prompts need no counting.
    """
    limit = tokenizer.model_max_length
    candidates = np.flatnonzero(PromptSequence.of(prompts).lengths > limit - 2)  # two are its start and its end
    count, first = 0, None
    for start in range(0, len(candidates), 4096):
        some = [prompts[int(i)] for i in candidates[start : start + 4096]]
        tokens = tokenizer([p.text for p in some], truncation=False, padding=False, verbose=False).input_ids
        long = [p for p, ids in zip(some, tokens, strict=True) if len(ids) > limit]
        count += len(long)
        first = first or next(iter(long), None)
    return count, first
