"""Bytes of tensors alive at once: measured on real tensors, or predicted on tensors without data."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that are alive, counted by storage as operators return them: the allocator's view of a GPU,
    for any device. What a kernel allocates and frees within itself is not seen.

    Args:
        known: tensors that are there already, such as weights.

    Attributes:
        now: bytes alive at this moment.
        peak: the most that were alive at once.
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
        """See the class."""
        before, self.live.peak = self.live.peak, self.live.now
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks[name], self.live.peak)
            self.live.peak = max(self.live.peak, before)
