"""preferences.jsonl: one line for each answer, on the disk before the next pair is shown.

Lines are only ever added. An answer that was taken back stays in the file, and a line {"undo": N} says that line N,
counted from 0, no longer counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from draftcli.disk import disk_errors, lock_file
from draftcli.errors import DraftpError, InputError
from draftcli.lines import json_line
from draftcli.preferences.reading import ANSWERS, PREFERENCES, json_lines

_LOCK = ".lock"


def read_preferences(path: Path) -> dict[int, dict[str, Any]]:
    """The answers that count, by the number of their line from 0: without those taken back; skipped pairs are there.

    Lines that are damaged, such as one that was being written when the power went, are left out.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        lines, _ = json_lines(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    answers: dict[int, dict[str, Any]] = {}
    for number, line in lines.items():
        if not isinstance(line, dict):
            continue
        if type(line.get("undo")) is int:
            answers.pop(line["undo"], None)
        elif _is_answer(line):
            answers[number] = line
    return answers


def _is_answer(line: Mapping[str, Any]) -> bool:
    sides = [line.get(side) for side in ("left", "right")]
    return (
        isinstance(line.get("prompt"), str)
        and line.get("answer") in ANSWERS
        and all(isinstance(side, dict) and isinstance(side.get("picture"), str) for side in sides)
    )


class Preferences:
    """An open preferences.jsonl; `open_preferences` makes one.

    Args:
        path: of the file.
        file: the same, open to append, without a buffer.

    Attributes:
        path: of the file.
        answers: those that count, by the number of their line.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._file = path, file
        self.answers = read_preferences(path)
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):  # half a line, by somebody who was killed
            self._write(b"\n")
            text += b"\n"
        self._count = text.count(b"\n")

    def append(self, answer: Mapping[str, Any]) -> int:
        """Add an answer and wait until it is on the disk; the number of its line.

        Raises:
            DraftpError: the disk refuses; the file is then as it was before.
        """
        number = self._add(answer)
        self.answers[number] = dict(answer)
        return number

    def undo(self, number: int) -> None:
        """Take the answer of line `number` back. Raises as `append`."""
        self._add({"undo": number})
        del self.answers[number]

    def _add(self, line: Mapping[str, Any]) -> int:
        self._write(json_line(line).encode())
        self._count += 1
        return self._count - 1

    def _write(self, text: bytes) -> None:
        before = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(text) != len(text):
                raise DraftpError(f"{self.path}: cannot be written (the disk is full)")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(before)
            raise DraftpError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        except DraftpError:
            self._file.truncate(before)
            raise


@contextmanager
def open_preferences(folder: Path) -> Iterator[Preferences]:
    """The preferences.jsonl of a folder, which is made where it is missing. Inside, no other process writes there.

    Raises:
        InputError: another process has it open.
        DraftpError: the disk refuses.
    """
    path = folder / PREFERENCES
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("ab")
    with lock:
        if not lock_file(lock.fileno()):
            raise InputError(f"{folder}: another draftp rate is open there; go on in that one, or give --output")
        with disk_errors(path):
            file = path.open("ab", buffering=0)
        with file:
            yield Preferences(path, file)
