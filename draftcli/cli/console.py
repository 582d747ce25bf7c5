"""What every command shares: where people look, and libraries that don't talk in between."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from draftcli.errors import warn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

NO_TERMINAL = 10_000  # columns: a file or a pipe has no edge at which a path would be cut


def open_console(quiet: bool, debug: bool) -> Console:
    """The console for results and progress. Call it before torch, diffusers and transformers are imported.

    The libraries' own notes and loading bars are switched off, except with `--debug`; a user who set their variables
    keeps them.
    """
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    warnings.showwarning = _one_line
    return literal_console(quiet=quiet)


def literal_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A console that prints text as it stands: every console of draftp is made here.

    To rich, `[brackets]` are markup and `:fire:` is an emoji; in the names of people's files they are letters. Styled
    text is made with `rich.text.Text`. Lines keep their length, so that a path can be copied whole.
    """
    from rich.console import Console

    escape_unencodable()
    console = Console(quiet=quiet, stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = NO_TERMINAL
    return console


def busy(console: Console, text: str) -> Status:
    """A context that shows in a terminal that `text` goes on."""
    from rich.text import Text

    return console.status(Text(text), spinner="dots" if console.encoding.startswith("utf") else "line")


def escape_unencodable() -> None:
    r"""Let stdout and stderr write `\u2192` for a letter that their encoding lacks, instead of ending the command.

    An encoding such as ASCII or cp1252 comes from the locale, from PYTHONIOENCODING, or from a pipe on Windows. Who
    asks for another way than Python's defaults (`PYTHONIOENCODING=ascii:replace`) keeps it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print columns of text. A terminal folds long cells; in a file or a pipe every row is one line."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_json(value: object, console: Console) -> None:
    """Print `value` as JSON, and nothing else, for other programs."""
    console.print(json.dumps(value, indent=2, ensure_ascii=False))


def quoted(path: Path) -> str:
    """`path` as one argument of a command that people copy into a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _one_line(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
    """Our own warnings as one line on stderr; those of libraries are for their developers."""
    if "draftcli" in filename:
        warn(str(message))
