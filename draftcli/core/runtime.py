"""Device, dtype and the reason for it, the processes of a run, and one seed per image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from draftcli.errors import DraftpError, InputError

# Longer than any validation or checkpoint that other processes wait for.
PATIENCE = timedelta(hours=2)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision the networks run.

    Attributes:
        device: of the networks.
        dtype: of the networks' matrix products.
        reason: why this device and dtype, for people.
    """

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def latent_dtype(self) -> torch.dtype:
        """Float32, or float64 where the networks are float64."""
        return torch.promote_types(self.dtype, torch.float32)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Around ONE network call. Never around phases with and without gradient together: torch's cache of cast
        weights would carry casts made without gradient into the phase that wants one (pytorch issue 65766).
        """
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, self.dtype, enabled=half):
            yield


def choose_runtime(device: str, precision: str) -> Runtime:
    """Resolve `device` (auto, cpu, cuda, cuda:1, mps) and `precision` (fp64, fp32, bf16, fp16).

    Raises:
        InputError: a device that is not here, or a precision that it cannot do.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        kind = next(name for name, here in available.items() if here)
        chosen, why = _of_this_process(torch.device(kind)), f"{kind} is the fastest device here"
    else:
        try:
            chosen = _of_this_process(torch.device(device))
        except RuntimeError:
            raise InputError(f"model.device {device!r}: allowed are auto, cpu, cuda, cuda:N and mps") from None
        here = [name for name, yes in available.items() if yes]
        if chosen.type not in here:
            raise InputError(f"model.device {device!r} is not on this machine; here are: auto, {', '.join(here)}")
        why = "asked for by model.device"
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"model.device {device!r}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    if precision == "fp64" and chosen.type == "mps":
        raise InputError("model.precision fp64: Apple's mps has no float64; use fp32, or model.device cpu")
    if precision == "bf16" and chosen.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("model.precision bf16: this GPU computes no bfloat16; use fp16 or fp32")
    return Runtime(chosen, DTYPES[precision], f"{chosen} ({why}), {precision} (model.precision)")


def _of_this_process(device: torch.device) -> torch.device:
    """`cuda` without a number is the GPU that torchrun gave this process."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


class Ranks:
    """The processes that train together, as torchrun or accelerate launch started them.

    Every method is collective: all processes call it, in the same order. In a process that is alone they do nothing.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: neighbours, and as many as the others' or one more or less."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up each tensor over the processes, in place."""
        if self.size == 1:
            return
        try:
            works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in works:
                work.wait()  # type: ignore[union-attr]
        except RuntimeError as error:  # gloo and NCCL notice that the other end of a connection is gone
            raise DraftpError("another process of this run is gone; see above what it said") from error

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average each tensor over the processes, in place."""
        self.sum_(tensors)
        if self.size > 1:
            for tensor in tensors:
                tensor.div_(self.size)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        flag = torch.tensor([float(here)])
        self.sum_([flag])
        return bool(flag > 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that each process does by itself, or one for all: when it fails in one, all of them raise.

        Without it the others would wait for the one that failed.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failed_somewhere = self.any(failure is not None)
        if failure is not None:
            raise failure
        if failed_somewhere:
            raise DraftpError("another process of this run failed; see above what it said")


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The processes of this run; a process group is made where there are several and none is there yet.

    Raises:
        InputError: WORLD_SIZE promises several processes, and nothing says where they are.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise InputError(
            f"WORLD_SIZE is {size}, and {', '.join(missing)} is not set: start with torchrun or accelerate launch, "
            "or unset WORLD_SIZE"
        )
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            dist.destroy_process_group()


def derived_seed(*parts: object) -> int:
    """A 32-bit seed from a tuple of names and numbers: the same on every machine, unlike `hash`.

    32 bits because torch's CPU generator (mt19937) reads no more of a seed.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


class ImageNoise:
    """Unit normal noise with one CPU generator per image: image i's noise depends on its seed and the size alone, not
    on the batch, its order, the rank or the device (after EDM2's StackedRandomGenerator).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """(B, ...) float32 on the CPU; `shape[0]` must be the number of seeds."""
        assert shape[0] == len(self.generators)
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators])

    def __getitem__(self, cut: slice) -> ImageNoise:
        """The noise of some of the images; each goes on where it was, here as there."""
        part = ImageNoise([])
        part.generators = self.generators[cut]
        return part
