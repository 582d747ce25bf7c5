"""The LoRA's product added in one matrix operation while no gradient is needed.

peft computes W x, then B (A x), times the scale, and adds: on a GPU the last two, and the product before them, read and
write the layer's whole output, which at SDXL's size takes half as long again as the network itself. Here the output is
written once: W x + (scale B) (A x) is what `torch.addmm` does in one kernel. Same sums, rounded once instead of three
times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from draftcli.core.lora.adapters import lora_layers


@contextmanager
def fused(unet: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the linear layers of `unet` add their LoRAs in one operation; no gradient may be asked for.

    Layers of another kind (convolutions, DoRA, weights that are split over processes) stay as they are.

    Args:
        unet: a network with a LoRA.
        dtype: of its matrix products.
    """
    changed: list[Any] = [layer for layer in lora_layers(unet) if _can_be(layer)]
    try:
        for layer in changed:
            layer.forward = _forward(layer, dtype)
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def _can_be(layer: Any) -> bool:
    if type(layer) is not Linear or layer.disable_adapters or layer.merged:
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = all(
        name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
        for name in names
    )
    return bool(names) and plain and not any(isinstance(p, DTensor) for p in layer.parameters())


def _forward(layer: Any, dtype: torch.dtype) -> Callable[..., Tensor]:
    base = layer.get_base_layer()
    with torch.no_grad():
        pairs = [
            (layer.lora_A[name].weight.to(dtype), (layer.scaling[name] * layer.lora_B[name].weight).to(dtype).t())
            for name in layer.active_adapters
            if name in layer.lora_A
        ]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = base(x, *args, **kwargs)
        for a, b in [] if layer.disable_adapters else pairs:
            flat = torch.addmm(out.flatten(0, -2), F.linear(x.to(a.dtype), a).flatten(0, -2), b)
            out = flat.view(out.shape)
        return out

    return forward
