"""Reading prompts by what a setting names: a file, a folder, a built-in set, a Hugging Face dataset or a plain list."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from draftcli.config import expand_home, presets_folder
from draftcli.errors import InputError
from draftcli.prompts.files import PROMPT_FILES, PromptFile, read_folder
from draftcli.prompts.notation import Notation
from draftcli.prompts.prompt import Prompt, PromptList, PromptSequence
from draftcli.prompts.tables import TABLE_FILES, read_table

_DATASET = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w .-]+)?(@[\w.:%\[\]-]+)?")
_PACKED_FILES = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}
# Endings of files that a dataset's id does not have, though a full stop may stand in one.
_OTHER_FILES = {".json", ".arrow", ".xlsx", ".yaml", ".yml", ".toml", ".md", ".text"}
_COLUMNS = ("prompt", "Prompt", "text", "caption")  # of a dataset, the first that is there


def built_in_sets() -> dict[str, Path]:
    """The prompt sets that ship with draftp, by name."""
    return {path.stem: path for path in sorted((presets_folder() / "prompts").glob("*.txt"))}


def read_prompts(source: str | Sequence[str], setting: str = "data.prompts") -> PromptSequence:
    """Read prompts from a file, a folder of captions, a built-in set, a dataset of the Hugging Face hub or a list.

    Args:
        source: path (a ~ is the home folder), name of a built-in set, dataset id (`owner/name`,
            `owner/name:column`, either with `@split` behind it, `train` otherwise:
            `owner/name:caption@test[:500]`), or the texts themselves.
        setting: what the source is called in error messages.

    Raises:
        InputError: no such file, set or dataset, not UTF-8, an invalid line, or nothing in it.
    """
    if not isinstance(source, str):
        given = [Prompt(text) for text in source]
        return PromptList(given, _notes(given, setting))
    path, where = find_prompts(source, setting), f"{setting} {source}"
    if path is None:
        prompts = _dataset(source, where)
    else:
        try:
            prompts = _reader(path)(path, where)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror}){_named(error, path)}") from None
    if not prompts:
        raise InputError(f"{where}: there is no prompt in it")
    return prompts


def find_prompts(source: str, setting: str = "data.prompts") -> Path | None:
    """The file or folder of prompts that `source` names; None for a dataset of the hub. It is not opened.

    Raises:
        InputError: there is no such file, or it is neither file, folder, set nor dataset.
    """
    path = built_in_sets().get(source, Path(expand_home(source)))
    where = f"{setting} {source}"
    if os.path.isdir(path):  # noqa: PTH112, as Path.is_dir raises for what cannot be a name
        return path
    if path.suffix.lower() in (*PROMPT_FILES, *TABLE_FILES):
        try:
            path.stat()
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror}){_named(error, path)}") from None
        except ValueError:
            raise InputError(f"{setting} {source!r}: no file can have such a name") from None
        if not path.is_file():  # a pipe would be waited for
            raise InputError(f"{where}: not a file")
        return path
    if _DATASET.fullmatch(source) and path.suffix.lower() not in _PACKED_FILES | _OTHER_FILES and not path.is_file():
        return None
    raise InputError(
        f"{setting} {source!r}: {_why_not(source, path)}expected a .txt, .jsonl, .tar, .csv, .tsv or .parquet "
        f"file, a folder of .txt files, a dataset's id (owner/name), or one of the sets {', '.join(built_in_sets())}"
    )


def _reader(path: Path) -> Callable[[Path, str], PromptSequence]:
    """What reads a file or folder."""
    if path.is_dir():
        return read_folder
    return read_table if path.suffix.lower() in TABLE_FILES else PromptFile


def _named(error: OSError, path: Path) -> str:
    """Which file within a folder."""
    return f": {error.filename}" if error.filename not in (None, str(path)) else ""


def _why_not(source: str, path: Path) -> str:
    """What is known of a source that cannot be read."""
    if path.suffix.lower() in _PACKED_FILES:
        return f"a {path.suffix} is packed, unpack it first; "
    if path.suffix.lower() in _OTHER_FILES:
        return f"a {path.suffix} is not read; "
    looks_like_a_path = source.startswith((".", "~")) or source.endswith("/") or re.search(r"^/|\\|/.*/", source)
    return "there is no such file or folder; " if looks_like_a_path and not os.path.lexists(path) else ""


def _notes(prompts: Iterable[Prompt], where: str) -> tuple[str, ...]:
    notation = Notation()
    for prompt in prompts:
        notation.add(prompt)
    return tuple(notation.notes(where))


def _dataset(source: str, where: str) -> PromptSequence:
    """A split of a dataset; its code is never run (datasets 4 knows no such thing any more)."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{where}: a dataset of the Hugging Face hub needs one more package: pip install 'draftp[datasets]'; "
            "for a file, give its whole name (.txt, .jsonl, .tar, .csv, .tsv, .parquet)"
        ) from None
    place, _, split = source.partition("@")
    name, _, column = place.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub, its mirror, its formats and its network have an exception each
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{where}: no such dataset at hand ({reason}); or give a .txt, .jsonl, .tar, .csv or .parquet file"
        ) from None
    texts = [c for c in rows.column_names if getattr(rows.features[c], "dtype", None) in ("string", "large_string")]
    found = next((c for c in ([column] if column else _COLUMNS) if c in texts), None)
    if found is None:
        raise InputError(
            f"{where}: name its column of prompts, as owner/name:column; its text columns are: {', '.join(texts)}"
        )
    return _Column(rows, found, where)


class _Column(PromptSequence):
    """One text column of a Hugging Face dataset, memory-mapped: only the rows that are asked for are loaded."""

    def __init__(self, rows: Any, name: str, where: str) -> None:
        self._rows, self._name, self.negatives = rows, name, 0
        self.by_size = [np.arange(len(rows))] if len(rows) else []  # a text has no size
        self.notes = _notes(islice(self, 1000), where)  # of what there may be millions of

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, index: int) -> Prompt:
        return Prompt(self._rows[int(index)][self._name] or "")
