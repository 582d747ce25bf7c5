"""Device, dtype and the reason for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from draftcli.config import check_device_name
from draftcli.core.precision import DTYPES, HALF
from draftcli.errors import InputError


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
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype in HALF):
            yield


def choose_runtime(device: str, precision: str, setting: str = "model.device") -> Runtime:
    """Resolve `device` (auto, cpu, cuda, cuda:1, mps) and `precision` (fp64, fp32, bf16, fp16).

    `setting` is what the user calls the device.

    Raises:
        InputError: a device that is not here, or a precision that it cannot do.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        kind = next(name for name, here in available.items() if here)
        chosen, why = _of_this_process(torch.device(kind)), " (no GPU found)" if kind == "cpu" else ""
    else:
        check_device_name(device, setting)
        chosen = _of_this_process(torch.device(device))
        here = [name for name, yes in available.items() if yes]
        if chosen.type not in here:
            raise InputError(
                f"{setting} {device!r} is not available on this machine; available: auto, {', '.join(here)}"
            )
        why = f" ({setting})"
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{setting} {device!r}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    if precision == "fp64" and chosen.type == "mps":
        raise InputError("model.precision fp64: Apple's mps has no float64; use fp32, or model.device cpu")
    if precision == "bf16" and chosen.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("model.precision bf16: this GPU computes no bfloat16; use fp16 or fp32")
    return Runtime(chosen, DTYPES[precision], f"{chosen}{why} in {precision}")


def _of_this_process(device: torch.device) -> torch.device:
    """`cuda` without a number is the GPU that torchrun gave this process."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
