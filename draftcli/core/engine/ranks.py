"""The processes of a run: how they meet, share work, wait for each other, and miss one that is gone."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from draftcli.errors import DraftpError, InputError

# Longer than any validation or checkpoint that other processes wait for.
DEFAULT_TIMEOUT = timedelta(hours=2)
NOTICE = 5.0  # seconds that a process which misses another gives the rest to miss it too
NOTICED = "missed another"


class Ranks:
    """The processes that train together, as torchrun or accelerate launch started them.

    Every method that asks or tells the others is collective: all processes call it, in the same order. In a process
    that is alone they do nothing.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        lockstep: whether using the networks is collective as well (FSDP): then a process that fails cannot wait for
            the others to notice, for they wait inside a network for its part of the weights; it leaves at once.
    """

    def __init__(self, rank: int = 0, size: int = 1, board: dist.Store | None = None) -> None:
        self.rank, self.size, self.lockstep = rank, size, False
        self._board, self._at = board, "start"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` things are this process's, or those of `rank`: neighbours, and as many as the others' or
        one more or less.
        """
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over the processes, in place."""
        if self.size == 1:
            return
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in works:
            work.wait()  # type: ignore[union-attr]

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average each tensor over the processes, in place."""
        self.sum_(tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor.div_(self.size)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.where(here))

    def where(self, here: bool) -> list[int]:
        """The processes in which it is so."""
        return [rank for rank, flag in enumerate(self.all_gather(int(here))) if flag]

    def all_gather(self, number: int) -> list[int]:
        """The number that each process gives, in every process (collective)."""
        numbers = torch.zeros(self.size, dtype=torch.int64)
        numbers[self.rank] = number
        self.sum_([numbers])
        return numbers.tolist()

    def broadcast(self, value: Any) -> Any:
        """Process 0's value, in every process (collective)."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Work that each process does by itself, or one for all: if it fails in one, all of them raise (collective).

        Without it the others would wait for the one that failed. When all of them fail the main one speaks for all.
        """
        failure = None
        try:
            yield
        except Exception as error:
            if self.lockstep or is_lost_connection(error):
                raise
            failure = error
        codes = self.all_gather(0 if failure is None else getattr(failure, "exit_code", 1))
        failed = [rank for rank, code in enumerate(codes) if code]
        if isinstance(failure, DraftpError) and self.rank and len(failed) == self.size:
            raise SystemExit(failure.exit_code) from failure  # process 0 says it for all
        if failure is not None:
            raise failure
        if failed:
            kind = InputError if InputError.exit_code in codes else DraftpError
            raise kind(f"{_processes(failed)} of this run failed; see its message above")

    def heartbeat(self, what: str) -> None:
        """Note what this process is doing, for the others to read should they wait for it in vain."""
        self._at = what
        if self._board is not None and self.size > 1:
            self._board.set(f"at {self.rank}", what)

    def leave(self, why: str) -> None:
        """Note why this process goes, or that it has noticed that another is missing."""
        if self._board is not None and self.size > 1:
            self._board.set(f"left {self.rank}", why)

    def blame(self, error: BaseException) -> str:
        """Who is missing, in words, after `error` of a connection.

        Whoever notices says so, and gives the others a little time to say it too: who says nothing is the one.
        """
        slow = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        here = f"process {self.rank} waited at: {self._at}"
        if self._board is None:
            return f"another process of this run is gone; {here}"
        try:
            self.leave(NOTICED)
            until, silent = time.monotonic() + NOTICE, list(range(self.size))
            while silent and time.monotonic() < until:
                silent = [r for r in silent if not self._board.check([f"left {r}"])]
                time.sleep(0.05)
            left = {r: self._board.get(f"left {r}").decode() for r in range(self.size) if r not in silent}
            last = {r: self._board.get(f"at {r}").decode() for r in silent if self._board.check([f"at {r}"])}
        except RuntimeError:  # without torchrun it is process 0 that keeps torch's store
            return f"process 0 of this run is gone, see its message; {here}"
        if failed := [f"process {r} of this run failed: {why}" for r, why in left.items() if why != NOTICED]:
            return "; ".join(failed)
        where = "; ".join(f"process {r} was last at: {last.get(r, 'start')}" for r in silent)
        if silent:
            verb = "did not answer in time (sharding.timeout_minutes)" if slow else "of this run is gone"
            return f"{_processes(silent)} {verb}; {where}; {here}"
        return f"the processes of this run lost contact; {here}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether gloo, NCCL or torch's store noticed that another process is gone or does not come."""
    # gloo raises plain RuntimeErrors that name its source file.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _processes(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


@contextmanager
def open_ranks(timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[Ranks]:
    """The processes of this run; a process group is made where there are several and none is there yet.

    Args:
        timeout: how long one waits for another.

    Raises:
        InputError: WORLD_SIZE promises several processes, and nothing says where they are.
        DraftpError: another process went away or did not come in time; the message names it.
    """
    ours = not dist.is_initialized()
    size = world_size() if ours else dist.get_world_size()
    if size == 1:
        yield Ranks()
        return
    store = _meet(size, timeout) if ours else None
    board = dist.PrefixStore("draftp", store) if store is not None else None
    ranks, failed = Ranks(int(os.environ["RANK"]) if ours else dist.get_rank(), size, board), False
    try:
        if ours:
            ranks.heartbeat("connecting")
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=size, timeout=timeout)
            ranks.any(False)  # nobody leaves, for whatever reason of his own, while another is still connecting
        yield ranks
    except BaseException as error:
        failed = True
        if is_lost_connection(error):
            raise DraftpError(ranks.blame(error)) from error
        with suppress(RuntimeError):
            ranks.leave(str(error) or type(error).__name__)
        raise
    finally:
        # NCCL would wait here for processes that wait for this one; it goes with this process.
        if ours and dist.is_initialized() and not (failed and torch.cuda.is_available()):
            dist.destroy_process_group()


def world_size() -> int:
    """How many processes the launcher of this one has started, by its variables.

    Raises:
        InputError: they are not those of torchrun.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if given == "1":
        return 1
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    bad = [name for name in names if name not in os.environ]
    bad += [f"{name}={os.environ[name]}" for name in ("RANK", "MASTER_PORT") if not os.environ.get(name, "0").isdigit()]
    if bad or not given.isdigit() or int(given) < 1:
        raise InputError(
            f"WORLD_SIZE is {given!r}, with {', '.join(names)} wrong or not set ({', '.join(bad) or 'WORLD_SIZE'}): "
            "start with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return int(given)


def _meet(size: int, timeout: timedelta) -> dist.Store:
    """torch's store, empty: all processes of this start are there, and none sees what those before have left in it.

    torchrun starts processes again with the store of those that are gone, with their addresses in it, and its count of
    restarts differs between nodes (a node whose own processes were well does not count). So process 0 draws a name for
    this start and tells it to each, by a name that each has drawn: what is left of others answers to nobody.

    Raises:
        DraftpError: process 0 cannot be reached, or another did not come in time.
    """
    rank, me = int(os.environ["RANK"]), secrets.token_hex(8)
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    trouble = f"process 0 cannot be reached at {where}" if rank else "not all processes of this run started"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store.set(f"here {rank}", me)
        if rank:
            trouble = "not all processes of this run started"
            ours = dist.PrefixStore(store.get(f"start of {me}").decode(), store)
            ours.set(f"came {rank}", "")
            return ours
        ours = dist.PrefixStore(me, store)
        for other in range(1, size):
            trouble = f"process {other} did not come"
            until = time.monotonic() + timeout.total_seconds()
            while not ours.check([f"came {other}"]):
                if time.monotonic() > until:
                    raise dist.DistStoreError("the files here are from an earlier start")
                store.set(f"start of {store.get(f'here {other}').decode()}", me)
                time.sleep(0.02)
        return ours
    except dist.DistError as error:
        raise DraftpError(f"{trouble} in time (sharding.timeout_minutes)") from error
