"""Reading prompts by what a setting names: a file, a built-in set, a Hugging Face dataset or a plain list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from draftcli.config import presets_folder
from draftcli.errors import InputError
from draftcli.prompts.files import INDEXERS, PromptFile
from draftcli.prompts.prompt import Prompt, PromptList, PromptSequence

_COLUMNS = ("prompt", "Prompt", "text", "caption")  # of a dataset, the first that is there


def built_in_sets() -> dict[str, Path]:
    """The prompt sets that ship with draftp, by name."""
    return {path.stem: path for path in sorted((presets_folder() / "prompts").glob("*.txt"))}


def read_prompts(source: str | Sequence[str], setting: str = "data.prompts") -> PromptSequence:
    """Read prompts from a file, a built-in set, a dataset of the Hugging Face hub or a list.

    Args:
        source: path, name of a built-in set, dataset id (`owner/name`, `owner/name:column`, either with
            `@split` behind it, `train` otherwise: `owner/name:caption@test[:500]`), or the texts themselves.
        setting: what the source is called in error messages.

    Raises:
        InputError: no such file, set or dataset, not UTF-8, an invalid line, or nothing in it.
    """
    if not isinstance(source, str):
        return PromptList(Prompt(text) for text in source)
    path, where = find_prompts(source, setting), f"{setting} {source}"
    try:
        prompts: PromptSequence = PromptFile(path, where) if path is not None else _dataset(source, where)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror})") from None
    if not prompts:
        raise InputError(f"{where}: there is no prompt in it")
    return prompts


def find_prompts(source: str, setting: str = "data.prompts") -> Path | None:
    """The file of prompts that `source` names; None for a dataset of the hub. It is not opened.

    Raises:
        InputError: there is no such file, or it is neither file, set nor dataset.
    """
    path = built_in_sets().get(source, Path(source))
    where = f"{setting} {source}"
    if path.suffix in INDEXERS:
        try:
            path.stat()
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise InputError(f"{setting} {source!r}: no file can have such a name") from None
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"{where}: not a file")
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w .-]+)?(@[\w.:%\[\]-]+)?", source) and not path.is_file():
        return None
    raise InputError(
        f"{setting} {source!r}: expected a .txt, .jsonl or .tar file, a dataset's id (owner/name), or one of the "
        f"sets {', '.join(built_in_sets())}"
    )


def _dataset(source: str, where: str) -> PromptSequence:
    """A split of a dataset; its code is never run (datasets 4 knows no such thing any more)."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{where}: a dataset of the Hugging Face hub needs one more package: pip install 'draftp[datasets]'; "
            "for a file, give its whole name (.txt, .jsonl, .tar)"
        ) from None
    place, _, split = source.partition("@")
    name, _, column = place.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub, its mirror, its formats and its network have an exception each
        reason = str(error).partition("\n")[0]
        raise InputError(f"{where}: no such dataset at hand ({reason}); or give a .txt, .jsonl or .tar file") from None
    texts = [c for c in rows.column_names if getattr(rows.features[c], "dtype", None) in ("string", "large_string")]
    found = next((c for c in ([column] if column else _COLUMNS) if c in texts), None)
    if found is None:
        raise InputError(f"{where}: name its column of prompts, as owner/name:column; texts are: {', '.join(texts)}")
    return _Column(rows, found)


class _Column(PromptSequence):
    """One text column of a Hugging Face dataset, memory-mapped: only the rows that are asked for are loaded."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows, name
        self.by_size = [np.arange(len(rows))] if len(rows) else []  # a text has no size

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, index: int) -> Prompt:
        return Prompt(self._rows[int(index)][self._name] or "")
