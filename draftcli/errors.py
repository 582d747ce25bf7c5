"""The kinds of errors a user can meet; the command line turns them into one line on stderr and an exit code."""


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
