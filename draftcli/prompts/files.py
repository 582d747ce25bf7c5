"""Prompts in a file: .txt (one a line), .jsonl, .tar of texts; and in a folder of texts.

A line of .jsonl is an object: prompt, and where wanted negative_prompt, seed and size ([height, width]). Files are
indexed, not loaded: of a million prompts 18 bytes each stay in memory, and a .tar is read in place, never unpacked.
The texts of a folder are loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from array import array
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from draftcli.errors import DraftpError, InputError
from draftcli.file_kinds import stands_for_a_file
from draftcli.prompts.captions import LONGEST_PROMPT, Entries, Names, folder_entries, tar_entries
from draftcli.prompts.notation import Notation, read_switches
from draftcli.prompts.prompt import SEEDS, Prompt, PromptList, PromptSequence, rows_by_label

_KEYS = ("prompt", "negative_prompt", "seed", "size")
PROMPT_FILES = (".txt", ".jsonl", ".tar")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
# From the bytes of an entry to its prompt, and the switches that were left out of it.
_Parse = Callable[[bytes], tuple[Prompt, list[str]]]


class PromptFile(PromptSequence):
    """The prompts of a file, each read when it is asked for; every line was checked once.

    Args:
        path: a .txt, .jsonl or .tar, in letters of either case.
        where: what it is called in error messages.

    Attributes:
        sha256: of the file.
        lengths: (n,) bytes of each prompt's entry in the file.

    Raises:
        InputError: an invalid line or member, a damaged .tar, or nothing in it.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.where = where
        kind = path.suffix.lower()
        self._from_bytes: _Parse = _from_json if kind == ".jsonl" else _from_text
        notation, names = Notation(), Names("members")
        # Unbuffered and kept open: a file that is replaced during the run stays what it was.
        self._file = path.open("rb", buffering=0)
        self._close = weakref.finalize(self, self._file.close)
        starts, lengths, sizes = array("q"), array("q"), array("H")
        self.negatives = 0
        known: dict[tuple[int, int] | None, int] = {None: 0}
        with path.open("rb") as file:
            _check_not_packed(file, where)
            for start, raw, place in tar_entries(file, where, names) if kind == ".tar" else _lines(path, where):
                if kind == ".txt" and raw.startswith(b"#"):
                    notation.comments += 1
                    continue
                prompt = _noted(self._from_bytes, raw, f"{where} {_called(place)}", notation)
                self.negatives += prompt.negative is not None
                starts.append(start)
                lengths.append(len(raw))
                sizes.append(known.setdefault(prompt.size, len(known)))
                if len(known) == 2**16:
                    raise InputError(f"{where}: more than {2**16 - 2} sizes")
            self.notes = (*names.notes(where), *notation.notes(where))
            if not starts:
                instead = f": {names.instead}" if kind == ".tar" else ""
                raise InputError(f"{where}: there is no prompt in it{instead}")
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
            raise DraftpError(f"{self.where} was changed while it was read; run the same command to read the new file")
        self._file.seek(start)
        return self._from_bytes(self._file.read(length))[0]

    def _changed_at(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


def read_folder(folder: Path, where: str) -> PromptSequence:
    """The captions in a folder, sorted by name.

    Args:
        folder: is there.
        where: what it is called in error messages.

    Raises:
        InputError: a caption that is none, or none at all.
        OSError: a file cannot be read.
    """
    notation, names = Notation(), Names("files")
    prompts = [
        _noted(_from_text, raw, f"{where} file {name!r}", notation)
        for raw, name in folder_entries(folder, where, names)
    ]
    if not prompts:
        raise InputError(f"{where}: there is no prompt in this folder: {names.instead}; name a .jsonl or .tar itself")
    return PromptList(prompts, (*names.notes(where), *notation.notes(where)))


def _noted(parse: _Parse, raw: bytes, called: str, notation: Notation) -> Prompt:
    try:
        prompt, left_out = parse(raw)
    except (ValueError, InputError) as error:
        raise InputError(f"{called}: {error}") from None
    notation.add(prompt, left_out)
    return prompt


def _called(place: int | str) -> str:
    return f"line {place}" if isinstance(place, int) else f"member {place[:80]!r}"


def _check_not_packed(file: BinaryIO, where: str) -> None:
    start = file.read(8)
    for mark, program in _PACKED.items():
        if start.startswith(mark):
            raise InputError(
                f"{where}: not an uncompressed tar file of texts or a text, but packed by {program}; unpack it first"
            )


def _lines(path: Path, where: str) -> Entries:
    """Lines that are not blank, without the white space around them; a byte order mark does not count.

    They end at line feeds and carriage returns, and at no other line break that Unicode knows.
    """
    offset, number = 0, 0
    with path.open(encoding="latin-1", newline="") as text:  # a letter a byte, and ends as they are
        while line := text.readline(LONGEST_PROMPT + 1).encode("latin-1"):
            number += 1
            if len(line) > LONGEST_PROMPT:
                raise InputError(f"{where} line {number}: longer than {LONGEST_PROMPT} bytes, which is no prompt")
            body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            start = offset + len(line) - len(body.lstrip())
            offset += len(line)
            body = body.strip()
            if body:
                yield start, body, number


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save it as UTF-8") from None


def _from_text(raw: bytes) -> tuple[Prompt, list[str]]:
    if told := stands_for_a_file(raw):
        raise ValueError(told)
    text = _decoded(raw)
    if "\0" in text:
        raise ValueError("not text, as it holds zero bytes; if it is UTF-16, save it as UTF-8")
    item, left_out = read_switches(re.sub(r"\r\n|[\r\n]", " ", text).strip())
    return prompt_from_item(item), left_out


def _from_json(raw: bytes) -> tuple[Prompt, list[str]]:
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
    return prompt_from_item(item), []


def prompt_from_item(item: Mapping[str, Any]) -> Prompt:
    """The prompt that prompt, negative_prompt, seed and size ([height, width]) say.

    Raises:
        ValueError: one of them is not what it can be.
        InputError: as `Prompt`.
    """
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
