"""What a step costs by phase: seconds, FLOPs, and bytes of tensors alive at once."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that are alive, counted by storage as operators return them: the allocator's view of a GPU,
    for any device. What a kernel allocates and frees within itself is not seen.

    Args:
        known: tensors that are there already, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen and self._seen[key]() is storage:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class PeakMeter:
    """`meter(name)` is a context; `peaks[name]` the most bytes alive at once in it, phases inside it included."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.peaks: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before, self.live.peak = self.live.peak, self.live.now
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks[name], self.live.peak)
            self.live.peak = max(self.live.peak, before)


def matmul_rate(read: Callable[[], float], device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of the best of many large square products: what the device does in practice, not on paper."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    best, until = 0.0, read() + seconds
    while (began := read()) < until:
        a @ a
        best = max(best, 2 * size**3 / (read() - began))
    return best
