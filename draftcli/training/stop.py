"""Ctrl-C and SIGTERM: finish the step, save and leave."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from draftcli.core.engine.ranks import Ranks

SAVE_DEADLINE = 10.0  # seconds after SIGTERM in which a step may still end; what is left of the usual 30 is for saving


class DeadlinePassed(Exception):
    """What is being done takes too long: whoever sent SIGTERM will kill this process."""


class Stop:
    """Whether somebody has asked to stop, and since when.

    Attributes:
        asked: whether somebody has.
        deadline: time.monotonic() from which nothing long is waited for; None: there is no deadline.
    """

    def __init__(self) -> None:
        self.asked = False
        self.deadline: float | None = None

    def __bool__(self) -> bool:
        return self.asked

    def is_late(self) -> bool:
        """Whether the deadline is over."""
        return self.deadline is not None and time.monotonic() > self.deadline


@contextmanager
def stop_on_signal(ranks: Ranks) -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM ask to stop after the present step; a second one stops at once, by KeyboardInterrupt.

    torchrun passes a Ctrl-C on as SIGINT and a second one as SIGTERM; any other second signal may be a repetition of
    the first, from a scheduler and from torchrun. SIGTERM sets a deadline: schedulers kill after 30 seconds.

    Python gives signals to the main thread alone: in another one nothing changes, and nobody asks.
    """
    stop, first = Stop(), 0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        nonlocal first
        first = first or number
        if stop and (ranks.size == 1 or (first, number) == (signal.SIGINT, signal.SIGTERM)):
            raise KeyboardInterrupt
        if not stop and ranks.is_main:
            print("stopping after this step (Ctrl-C again to quit now)", file=sys.stderr, flush=True)
        stop.asked = True
        if number == signal.SIGTERM:
            stop.deadline = time.monotonic() + SAVE_DEADLINE

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
