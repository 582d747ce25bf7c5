"""What every command shares: where people look, and libraries that don't talk in between."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

from draftcli.errors import warn

if TYPE_CHECKING:
    from rich.console import Console


def open_console(quiet: bool, debug: bool) -> Console:
    """The console for results and progress. Call it before torch, diffusers and transformers are imported.

    The libraries' own notes and loading bars are switched off, except with `--debug`; a user who set their variables
    keeps them.
    """
    from rich.console import Console

    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    warnings.showwarning = _one_line
    return Console(quiet=quiet)


def _one_line(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
    """Our own warnings as one line on stderr; those of libraries are for their developers."""
    if "draftcli" in filename:
        warn(str(message))
