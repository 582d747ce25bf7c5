"""LoRA folded into the weights while no gradient is needed: one matrix product a layer instead of three.

Nothing drifts: the base's own tensors are put aside and come back as they were, bit for bit; nothing is subtracted.

In bfloat16 most of an early LoRA is lost on folding: an update below half a unit in the last place of its weight
rounds away. So what would be lost is measured on the weights, and where it is more than allowed nothing is folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from draftcli.core.engine.eight_bit import EightBitLinear
from draftcli.core.lora.adapters import adapters_off, lora_layers


@contextmanager
def folded(unet: nn.Module, tolerance: float) -> Iterator[bool]:
    """Inside, the weights of `unet` hold its LoRA and the adapters are off; no gradient may be asked for.

    It costs a second copy of the adapted weights for as long as it lasts.

    Args:
        unet: a network with a LoRA. A sharded one is never folded: its weights are spread over processes; nor is one
            in 8 bits, which have no room for it.
        tolerance: fold if `lost_share` is at most this.

    Yields:
        whether it was folded. If not, `unet` is as it was, adapters on.
    """
    in_8_bits = any(isinstance(module, EightBitLinear) for module in unet.modules())
    if in_8_bits or any(isinstance(p, DTensor) for p in unet.parameters()) or lost_share(unet) > tolerance:
        yield False
        return
    own: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in lora_layers(unet):
                if (update := _update(layer)) is not None:
                    weight: Any = layer.get_base_layer().weight
                    own.append((weight, weight.data))
                    weight.data = (_wide(weight) + update).to(weight.dtype)
        with adapters_off(unet):
            yield True
    finally:
        for weight, data in own:
            weight.data = data


@torch.no_grad()
def lost_share(unet: nn.Module) -> float:
    """How much of the LoRA rounding would take away: |round(W + U) - (W + U)| / |U| over all layers, in [0, 1] for a
    LoRA that vanishes; 0 where there is no update at all. About 1e-4 in float32 after one step of training.
    """
    lost: list[Tensor] = []
    sizes: list[Tensor] = []
    for layer in lora_layers(unet):
        if (update := _update(layer)) is not None:
            weight: Any = layer.get_base_layer().weight
            exact = _wide(weight) + update
            lost.append((exact - exact.to(weight.dtype)).norm())
            sizes.append(update.norm())
    size = torch.stack(sizes).norm() if sizes else torch.zeros(())
    return float(torch.stack(lost).norm() / size) if size > 0 else 0.0


def _update(layer: Any) -> Tensor | None:
    """scale B A of the adapters that are on, in the LoRA's dtype and the weight's shape; None where all are off."""
    if layer.disable_adapters:
        return None
    updates: list[Tensor] = [layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A]
    return reduce(torch.add, updates) if updates else None


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
