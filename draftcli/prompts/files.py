"""Prompts in a file: .txt (one a line), .jsonl, .tar of texts.

A line of .jsonl is an object: prompt, and where wanted negative_prompt, seed and size ([height, width]). Files are
indexed, not loaded: of a million prompts 18 bytes each stay in memory, and a .tar is read in place, never unpacked.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import weakref
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from draftcli.errors import DraftpError, InputError
from draftcli.prompts.prompt import SEEDS, Prompt, PromptSequence, rows_by_label

_KEYS = ("prompt", "negative_prompt", "seed", "size")
_LONGEST = 2**20  # bytes of one prompt; more is another kind of file


class PromptFile(PromptSequence):
    """The prompts of a file, each read when it is asked for; every line was checked once.

    Args:
        path: a .txt, .jsonl or .tar.
        where: what it is called in error messages.

    Attributes:
        sha256: of the file.
        lengths: (n,) bytes of each prompt's entry in the file.

    Raises:
        InputError: an invalid line or member, or a damaged .tar.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        self._from_bytes = _from_json if path.suffix == ".jsonl" else _from_text
        # Unbuffered and kept open: a file that is replaced during the run stays what it was.
        self._file = path.open("rb", buffering=0)
        self._close = weakref.finalize(self, self._file.close)
        starts, lengths, sizes = array("q"), array("q"), array("H")
        known: dict[tuple[int, int] | None, int] = {None: 0}
        with path.open("rb") as file:
            for start, raw, place in INDEXERS[path.suffix](file, where):
                try:
                    size = self._from_bytes(raw).size
                except (ValueError, InputError) as error:
                    raise InputError(f"{where} {_called(place)}: {error}") from None
                starts.append(start)
                lengths.append(len(raw))
                sizes.append(known.setdefault(size, len(known)))
                if len(known) == 2**16:
                    raise InputError(f"{where}: more than {2**16 - 2} sizes")
            file.seek(0)
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._starts, self.lengths, self._sizes = np.array(starts), np.array(lengths), np.array(sizes)
        self._stamp = self._changed_at()

    def __len__(self) -> int:
        return len(self._starts)

    @cached_property
    def by_size(self) -> list[np.ndarray]:
        """See `PromptSequence`."""
        return rows_by_label(self._sizes)

    def _read(self, index: int) -> Prompt:
        start, length = int(self._starts[index]), int(self.lengths[index])
        if self._changed_at() != self._stamp:
            raise DraftpError(f"{self.where} was changed while it was read; the same command again takes the new file")
        self._file.seek(start)
        return self._from_bytes(self._file.read(length))

    def _changed_at(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


# Where the prompts of a file are: (byte offset, bytes, line or member).
_Entries = Iterator[tuple[int, bytes, int | str]]


def _called(place: int | str) -> str:
    return f"line {place}" if isinstance(place, int) else f"member {place[:80]!r}"


def _lines(file: BinaryIO, where: str) -> _Entries:
    """Lines that are not blank, without the white space around them; a byte order mark does not count."""
    offset, number = 0, 0
    while line := file.readline(_LONGEST + 1):
        number += 1
        if len(line) > _LONGEST:
            raise InputError(f"{where} line {number}: longer than {_LONGEST} bytes, which is no prompt")
        body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        start = offset + len(line) - len(body.lstrip())
        offset += len(line)
        body = body.strip()
        if body:
            yield start, body, number


def _members(file: BinaryIO, where: str) -> _Entries:
    """Every .txt in an uncompressed tar, one prompt each. Names are looked at and nothing is written anywhere."""
    before = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else every header is kept
                if member.offset_data <= before:  # a crafted header can lead backwards, and around for ever
                    raise tarfile.ReadError("its headers lead backwards")
                before = member.offset_data
                if not member.isreg() or member.issparse() or not member.name.endswith(".txt"):
                    continue
                if member.size > _LONGEST:
                    raise tarfile.ReadError(f"{_called(member.name)} is longer than {_LONGEST} bytes")
                file.seek(member.offset_data)
                raw = file.read(member.size)
                if len(raw) < member.size:
                    raise tarfile.ReadError(f"it ends within {_called(member.name)}")
                yield member.offset_data, raw, member.name
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        raise InputError(f"{where}: not an uncompressed tar file of texts, or a damaged one ({error})") from None


INDEXERS: dict[str, Callable[[BinaryIO, str], _Entries]] = {".txt": _lines, ".jsonl": _lines, ".tar": _members}


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save it as UTF-8") from None


def _from_text(raw: bytes) -> Prompt:
    return Prompt(_decoded(raw).replace("\n", " ").strip())


def _from_json(raw: bytes) -> Prompt:
    text = _decoded(raw)
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise ValueError('expected an object such as {"prompt": "a fox"}')
    unknown = sorted(item.keys() - set(_KEYS))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    negative, seed, size = item.get("negative_prompt"), item.get("seed"), item.get("size")
    if negative is not None and not isinstance(negative, str):
        raise ValueError("negative_prompt must be text")
    if seed is not None and not (_is_whole(seed) and 0 <= seed < SEEDS):
        raise ValueError(f"seed {seed!r} must be a whole number from 0 to {SEEDS - 1}")
    if size is not None:
        fits = isinstance(size, list) and len(size) == 2 and all(map(_is_whole, size))
        if not fits or not all(16 <= n <= 8192 and n % 8 == 0 for n in size):
            raise ValueError(f"size {size!r} must be [height, width], multiples of 8 from 16 to 8192")
        size = (size[0], size[1])
    return Prompt(item["prompt"], negative, seed, size)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # JSON's true is no 1
