"""Precisions by the names that settings give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF = (torch.bfloat16, torch.float16)


@contextmanager
def wide_default(dtype: torch.dtype) -> Iterator[None]:
    """Inside, new tensors are float64 where `dtype` is: transformers 4 makes a mask of float64's smallest number in the
    default dtype, which overflows in float32.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
