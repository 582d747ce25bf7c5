"""The frozen base in 8 bits: half of bfloat16's memory for the linear weights of the UNet's transformer blocks.

A weight is bitsandbytes' blockwise dynamic 8-bit type (Dettmers et al., ICLR 2022, arXiv 2110.02861): one code a weight
and a float32 scale for every 256. A product takes its weight back to the precision of computing for a moment, in
forward and once more in backward. Left to autograd, the weight that was taken back would stay from one to the other,
and with it those of all layers: what is to be saved.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcli.config import Config
from draftcli.errors import InputError

BLOCK = 256  # weights that share a scale


def bitsandbytes(setting: str) -> Any:
    """The library.

    Args:
        setting: that wants it, for the message.

    Raises:
        InputError: it is not installed.
    """
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{setting} needs one more package: pip install 'draftp[bitsandbytes]'; or leave it out"
        ) from None
    return bitsandbytes


def check_installed(cfg: Config) -> None:
    """Before anything is loaded, see that what the settings want is installed.

    Raises:
        InputError: it is not.
    """
    if cfg.model.quantize is not None:
        bitsandbytes(f"model.quantize {cfg.model.quantize}")
    if cfg.optim.name == "adamw8bit":
        bitsandbytes("optim.name adamw8bit")


@cache
def levels() -> Tensor:
    """The 256 values that a code can stand for, in units of its block's scale.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    return bitsandbytes("model.quantize 8bit").functional.create_dynamic_map()


class EightBitLinear(nn.Module):
    """A frozen linear layer in 8 bits; the gradient goes through it to its input.

    Its result has the dtype of autocast where that is on, else of the input, as nn.Linear's.

    Args:
        linear: in float32, bfloat16 or float16; it is left as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        values = levels().to(weight.device, copy=True)
        codes, scales = torch.ops.bitsandbytes.quantize_blockwise.default(weight, values, BLOCK)
        self.register_buffer("codes", codes)  # (out, in) uint8
        self.register_buffer("scales", scales)  # (out * in / BLOCK, rounded up) float32
        self.register_buffer("values", values)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        kind = x.device.type
        is_cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return self.product(x, torch.get_autocast_dtype(kind) if is_cast else x.dtype)

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., in) -> (..., out), both in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.codes, self.scales, self.values, bias)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales, values)
        return F.linear(x, _weight(codes, scales, values, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes, scales, values = ctx.saved_tensors
        return gradient @ _weight(codes, scales, values, gradient.dtype), None, None, None, None


def _weight(codes: Tensor, scales: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.bitsandbytes.dequantize_blockwise.default(codes, scales, values, BLOCK, dtype)


def quantize_blocks(unet: nn.Module) -> None:
    """Put the linear layers of every transformer block into 8 bits, in place; a LoRA on them stays as it is.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    blocks = [block for block in unet.modules() if type(block).__name__ == "BasicTransformerBlock"]
    for parent in [module for block in blocks for module in block.modules()]:
        if isinstance(parent, nn.ModuleDict):  # peft keeps a LoRA's own matrices in these
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, EightBitLinear(child))
