"""Several processes on this machine by torchrun's own launcher, without its tracebacks and with our exit codes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from draftcli.errors import DraftpError


def launch(count: int, arguments: Sequence[str], patience: int) -> int:
    """Run `draftp ARGUMENTS` in `count` processes.

    Args:
        count: how many.
        arguments: of the command line.
        patience: seconds that they get to finish their step and save, after Ctrl-C or SIGTERM; torchrun's own are 30.

    Returns:
        the exit code of the first that failed, which has said why; 130 where this process was interrupted.

    Raises:
        DraftpError: one was killed.
    """
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(patience))
    logging.disable(logging.CRITICAL)  # here, not in those that are started
    launcher = ["--standalone", "--nproc-per-node", str(count), "-m", "draftcli", *arguments]
    try:
        run.run(run.parse_args(launcher))
    except SignalException:
        return 130
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        raise DraftpError(
            f"process {rank} was killed ({name}); the same command again goes on after the last checkpoint"
        ) from error
    return 0
