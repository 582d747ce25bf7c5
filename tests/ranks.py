"""Several processes on this machine as torchrun starts them, but forked, which spares each the import of torch."""

from __future__ import annotations

import faulthandler
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.command import draftp

DEADLOCK = 200  # seconds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_ranks(count: int, work: Callable[[int], int | None]) -> list[int]:
    """`work(rank)` in `count` processes: the exit code of each."""
    port, children = str(free_port()), []
    for rank in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork in a process that has threads
            child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            faulthandler.dump_traceback_later(DEADLOCK, exit=True)  # a deadlock is a failure
            code = 70
            try:
                code = work(rank) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train_in_ranks(
    count: int, preset: Path, output: str, *options: object, before: Callable[[int], object] = lambda rank: None
) -> list[tuple[int, str]]:
    """`draftp train` in `count` processes: the exit code of each, and what it said."""

    def work(rank: int) -> int:
        said = Path(f"{output}-rank{rank}.txt").resolve()
        said.write_text("")
        before(rank)
        result = draftp("train", "--preset", preset, "--output", output, *options)
        said.write_text(result.err + result.out)
        return result.code

    codes = in_ranks(count, work)
    return [(code, Path(f"{output}-rank{rank}.txt").read_text()) for rank, code in enumerate(codes)]
