"""The kinds of errors a user can meet; the command line turns them into one line on stderr and an exit code."""

from __future__ import annotations

import reprlib
import sys

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 2, 4, 4, 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def brief(value: object) -> str:
    """`repr`, short enough for a message and soon done: YAML's references make a small file a huge value."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no numbers of more than 4,300 digits
        return "a number of thousands of digits"


def first_line(error: BaseException) -> str:
    """What an exception of a library says, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


class DraftpError(Exception):
    """The work failed for a reason of its own: disk full, divergence, no memory. Exit code 1."""

    exit_code = 1


class InputError(DraftpError):
    """What the user gave is wrong: a setting, a file, a name. Exit code 2.

    The message has three parts: what came, what is allowed, what to do.
    """

    exit_code = 2


class Interrupted(DraftpError):
    """The user asked to stop. Exit code 130."""

    exit_code = 130


def warn(text: str) -> None:
    """Print a warning for the user as one line on stderr; a live view on stdout shows it above itself."""
    print(f"warning: {text}", file=sys.stderr)
