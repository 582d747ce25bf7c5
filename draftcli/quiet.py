"""Libraries that don't talk in between: the notes, loading bars and warnings of diffusers and transformers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from draftcli.errors import warn


def warn_in_one_line(message: Warning | str, category: type[Warning], filename: str, *_: object, **__: object) -> None:
    """For `warnings.showwarning`: our own as one line on stderr; those of libraries are for their developers."""
    if "draftcli" in filename:
        warn(str(message))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, the libraries are as quiet as in the commands; afterwards they are as the caller had them.

    Who has set TRANSFORMERS_VERBOSITY or DIFFUSERS_VERBOSITY keeps that level.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = warn_in_one_line
        import diffusers.utils.logging
        import transformers.utils.logging

        for name, library in (("DIFFUSERS", diffusers.utils.logging), ("TRANSFORMERS", transformers.utils.logging)):
            if f"{name}_VERBOSITY" not in os.environ:
                stack.callback(library.set_verbosity, library.get_verbosity())
                library.set_verbosity_error()
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
