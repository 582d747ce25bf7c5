"""A spinner for what takes a while, and how long things take in words. Imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.status import Status
from rich.text import Text


@dataclass
class Activity:
    """Something that goes on.

    Attributes:
        ending: the line that stays when it is done; empty: none does.
        began: by the clock of `time.monotonic`.
    """

    ending: str = ""
    began: float = field(default_factory=time.monotonic)
    _status: Status | None = None

    def update(self, text: str) -> None:
        """Show in the terminal how far it is."""
        if self._status is not None:
            self._status.update(Text(text))

    @property
    def took(self) -> str:
        """How long it has taken until now, in words."""
        return duration(time.monotonic() - self.began)


@contextmanager
def busy(console: Console, text: str, in_logs: bool = False) -> Iterator[Activity]:
    """Inside, a terminal shows a spinner beside `text`; it ends with the line in `ending`, unless an error came.

    Args:
        console: where people look; a quiet one shows nothing.
        text: what goes on.
        in_logs: print `text` as a line where the output is no terminal.
    """
    activity = Activity()
    if not console.is_terminal or console.is_dumb_terminal:
        if in_logs:
            console.print(text)
        yield activity
    else:
        spinner = "dots" if console.encoding.startswith("utf") else "line"
        with console.status(Text(text), spinner=spinner) as activity._status:
            yield activity
    if activity.ending:
        console.print(activity.ending)


def duration(seconds: float) -> str:
    """In two units at most: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
