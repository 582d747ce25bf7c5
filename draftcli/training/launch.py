"""How many processes train, which one this is, and starting several on this machine by torchrun's own launcher.

Torch is imported where it is needed: a process alone knows its place without.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from draftcli.errors import DraftpError, InputError


@dataclass(frozen=True)
class ThisProcess:
    """The place of this process in a run.

    Attributes:
        size: how many processes train.
        is_main: whether this is the one that prints.
        is_launcher: whether it only starts those that train.
    """

    size: int
    is_main: bool
    is_launcher: bool

    @contextmanager
    def one_speaker(self) -> Iterator[None]:
        """Inside, what all processes refuse alike is reported by the main one; the others leave with its exit code."""
        try:
            yield
        except InputError as error:
            if self.is_main:
                raise
            raise SystemExit(error.exit_code) from error


def this_process(asked: int) -> ThisProcess:
    """What a launcher's variables, and the option --processes, make of this process.

    Args:
        asked: --processes.

    Raises:
        InputError: the variables are not those of torchrun.
    """
    if asked > 1 and "RANK" not in os.environ:
        return ThisProcess(asked, is_main=True, is_launcher=True)
    if "WORLD_SIZE" in os.environ:
        from draftcli.core.engine.ranks import world_size

        asked = world_size()
    return ThisProcess(asked, is_main=os.environ.get("RANK", "0") == "0", is_launcher=False)


def launch(count: int, arguments: Sequence[str], patience: int) -> int:
    """Run `draftp ARGUMENTS` in `count` processes, without torchrun's tracebacks and with our exit codes.

    Args:
        count: how many.
        arguments: of the command line.
        patience: seconds that they get to finish their step and save, after Ctrl-C or SIGTERM; torchrun's own are 30.

    Returns:
        the exit code of the first that failed, which has printed why; 130 where this process was interrupted.

    Raises:
        DraftpError: one was killed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(patience))
    launcher = ["--standalone", "--nproc-per-node", str(count), "-m", "draftcli", *arguments]
    try:
        with _no_log():  # torchrun's, which would repeat every failure with a traceback
            run.run(run.parse_args(launcher))
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise DraftpError(
            f"process {rank} was killed ({name}); run the same command to resume from the last checkpoint"
        ) from error
    return 0


@contextmanager
def _no_log() -> Iterator[None]:
    """Inside, nothing of this process is logged; torchrun gives each of its loggers a level of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
