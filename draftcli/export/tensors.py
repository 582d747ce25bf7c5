"""Tensors in safetensors files, read one at a time and written one at a time: memory never holds more than one.

safetensors' own `save_file` wants all tensors in memory at once. Its format is a length, a JSON header and the bytes
(https://github.com/huggingface/safetensors), so a file can be written as its tensors are made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftcli.core.models.original_layout import Form, from_original
from draftcli.errors import InputError
from draftcli.file_kinds import unreadable

_DTYPE_OF_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in _DTYPE_OF_NAME.items()}
Wrote = Callable[[int], object]  # is given the bytes of each tensor once it is written


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, or a slice of one, not read yet.

    Attributes:
        file: where it is.
        key: its name there.
        dtype: as stored.
        shape: of what `load` returns.
        rows: which rows of the stored tensor; None: all.
        form: how it is laid out there.
    """

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    form: Form = "plain"

    def load(self) -> Tensor:
        """Read it, in its own dtype."""
        tensor = _opened(self.file).get_tensor(self.key)
        if self.rows:
            tensor = tensor[slice(*self.rows)]
        return from_original(tensor, self.form)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: its name, dtype and shape, and how to make it when its turn comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """What a file holds, in its own order.

    Raises:
        InputError: it is damaged, or holds numbers of a kind that draftp does not know.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            found = {}
            for key in opened.keys():  # noqa: SIM118  (it is no dict)
                part = opened.get_slice(key)
                if part.get_dtype() not in _DTYPE_OF_NAME:
                    raise InputError(f"{file}: {key} is stored as {part.get_dtype()}, which draftp does not know")
                found[key] = StoredTensor(file, key, _DTYPE_OF_NAME[part.get_dtype()], tuple(part.get_shape()))
            return found
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: {unreadable(file, error)}") from error


def file_metadata(file: Path) -> dict[str, str]:
    """The text that a file carries beside its tensors."""
    return dict(_opened(file).metadata() or {})


def write_safetensors(
    path: Path, entries: Sequence[PlannedTensor], metadata: Mapping[str, str], wrote: Wrote = lambda _: None
) -> None:
    """Make and write one tensor after the other.

    Args:
        path: of the new file.
        entries: in the order of the file.
        metadata: text beside the tensors.
        wrote: called with the bytes of each tensor, for progress.
    """
    with path.open("wb") as file:
        file.write(header_bytes(entries, metadata))
        for entry in entries:
            file.write(tensor_bytes(entry))
            wrote(entry.size)
        file.flush()
        os.fsync(file.fileno())


def header_bytes(entries: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """All of a file that comes before the tensors: the header and its length."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.size]
        header[entry.key] = {
            "dtype": _NAME_OF_DTYPE[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(entry: PlannedTensor) -> memoryview:
    """Make a tensor; its bytes as they stand in a file."""
    tensor = entry.make().contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.key
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def times(tensor: Tensor, factor: float) -> Tensor:
    """`factor` times the tensor, rounded once, in the tensor's dtype."""
    return tensor if factor == 1 else (factor * tensor.double()).to(tensor.dtype)


@cache
def _opened(file: Path) -> Any:
    """Kept open: a large header takes long to parse, and the tensors themselves are mapped, not read."""
    return safe_open(file, framework="pt")


def close_files() -> None:
    """Forget the open files."""
    _opened.cache_clear()
