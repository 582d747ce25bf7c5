"""What every command shares: where people look, and libraries that don't talk in between."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from draftcli.quiet import warn_in_one_line

if TYPE_CHECKING:
    from rich.console import Console

NO_TERMINAL = 10_000  # columns: a file or a pipe has no edge at which a path would be cut


def open_console(quiet: bool, debug: bool, in_logs: bool = False) -> Console:
    """The console for results and progress. Call it before torch, diffusers and transformers are imported.

    A terminal shows that they are being loaded. Their own notes and loading bars are switched off, except with
    `--debug`; a user who set their variables keeps them.

    Args:
        quiet: print nothing.
        debug: leave the libraries as they are.
        in_logs: say also where the output is no terminal that they are being loaded, and how long it took.
    """
    from draftcli.progress import busy

    console = literal_console(quiet=quiet)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    with busy(console, "loading torch, diffusers and transformers", in_logs) as loading:
        import diffusers.utils.logging
        import transformers.utils.logging

        if in_logs:
            loading.ending = f"loaded in {loading.took}"
    if not debug:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    warnings.showwarning = warn_in_one_line
    return console


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


def escape_unencodable() -> None:
    r"""Let stdout and stderr write `\u2192` for a letter that their encoding lacks, instead of ending the command.

    An encoding such as ASCII or cp1252 comes from the locale, from PYTHONIOENCODING, or from a pipe on Windows. Who
    asks for another way than Python's defaults (`PYTHONIOENCODING=ascii:replace`) keeps it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], console: Console, numbers: Collection[int] = ()
) -> None:
    """Print columns of text. A terminal folds long cells; in a file or a pipe every row is one line.

    Args:
        headings: of the columns; where all are empty none is shown.
        rows: a text for each column.
        console: where people look.
        numbers: columns whose texts end at the same place.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if number in numbers else "left")
    for row in rows:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as printed:
        console.print(table)
    console.print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def print_json(value: object, console: Console) -> None:
    """Print `value` as JSON, and nothing else, for other programs."""
    console.print(json.dumps(value, indent=2, ensure_ascii=False))


def written_label(what: str) -> str:
    """What people are told that a file is, from its key in a result's `written`."""
    return what.replace("pictures", "images")


def quoted(path: Path) -> str:
    """`path` as one argument of a command that people copy into a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
