"""Reading prompts: .txt (one a line), .jsonl (objects with prompt and negative_prompt), built-in sets, plain lists.

The order of training is a function of the seed and the image's index alone, so a run resumes where it was by knowing
its step, and ranks share the work without talking.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from draftcli.config import presets_folder
from draftcli.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """One prompt; `negative` None means the run's own negative prompt. An empty text is legal."""

    text: str
    negative: str | None = None


def built_in_sets() -> dict[str, Path]:
    """The prompt sets that ship with draftp, by name."""
    return {path.stem: path for path in sorted((presets_folder() / "prompts").glob("*.txt"))}


def read_prompts(source: str | Sequence[str], setting: str = "data.prompts") -> list[Prompt]:
    """Read prompts from a file, a built-in set or a list.

    Args:
        source: path, name of a built-in set, or the texts themselves.
        setting: what the source is called in error messages.

    Raises:
        InputError: no such file or set, not UTF-8, an invalid line, or nothing in it.
    """
    if not isinstance(source, str):
        return [Prompt(text) for text in source]
    path = built_in_sets().get(source, Path(source))
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"{setting} {source!r}: expected a .txt or .jsonl file or one of the sets {', '.join(built_in_sets())}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{setting} {source}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{setting} {source}: cannot be read ({error.strerror})") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_from_json(line, f"{setting} {source} line {number}") for number, line in numbered]
    else:
        prompts = [Prompt(line) for _, line in numbered]
    if not prompts:
        raise InputError(f"{setting} {source}: there is no prompt in it")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not valid JSON") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise InputError(f'{where}: expected an object such as {{"prompt": "a fox"}}')
    unknown = sorted(item.keys() - {"prompt", "negative_prompt"})
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are prompt and negative_prompt")
    negative = item.get("negative_prompt")
    if negative is not None and not isinstance(negative, str):
        raise InputError(f"{where}: negative_prompt must be text")
    return Prompt(item["prompt"], negative)


class Shuffled(Generic[T]):
    """An endless, reproducible shuffle: every item once an epoch, in another order each epoch.

    Args:
        items: prompts, or the sizes of a batch.
        seed: of the order.
    """

    def __init__(self, items: Sequence[T], seed: int) -> None:
        self.items = items
        self.seed = seed
        self._permutation = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.items))

    def __getitem__(self, index: int) -> T:
        """The `index`-th item from 0, counted over all epochs."""
        epoch, position = divmod(index, len(self.items))
        return self.items[self._permutation(epoch)[position]]
