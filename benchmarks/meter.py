"""What a step costs by phase: seconds, FLOPs, and bytes of tensors alive at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from draftcli.cli.console import open_console
from draftcli.planning.live_bytes import LiveBytes, PeakMeter

__all__ = ["FlopCount", "LiveBytes", "Meter", "PeakMeter", "clock", "matmul_rate", "quiet_console"]


def quiet_console(width: int = 120) -> Console:
    """A console for figures alone: libraries show no loading bars. Call it before anything is loaded."""
    console = open_console(quiet=False, debug=False)
    console.width = width
    return console


class FlopCount(TorchDispatchMode):
    """FLOP of what runs inside, by torch's own formulas.

    torch's FlopCounterMode tells modules apart as well, by hooks on the graph that keep the activations of a backward
    pass alive until its end: beside `LiveBytes` or a clock, it changes what they measure.

    Attributes:
        total: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def read(self) -> int:
        """`total`, for a `Meter`."""
        return self.total


class Meter:
    """`meter(name)` is a context; `totals[name]` is by how much `read()` grew in it, phases inside it left out."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.totals: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self.read()
        self._inside.append(0.0)
        try:
            yield
        finally:
            spent = self.read() - began
            self.totals[name] += spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent


def clock(device: torch.device, cpu_time: bool = False) -> Callable[[], float]:
    """Seconds; on a GPU once it has done what it was given. `cpu_time`: of this process, on a shared machine."""
    if cpu_time:
        return time.process_time

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return read


def matmul_rate(read: Callable[[], float], device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of the best of many large square products: what the device does in practice, not on paper."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best, until = 0.0, read() + seconds
    while (began := read()) < until:
        torch.mm(a, a)
        best = max(best, 2 * size**3 / (read() - began))
    return best
