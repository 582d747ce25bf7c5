"""Activation checkpointing and FSDP2, applied from outside to plain models, in this order.

The models know nothing of devices or processes (the separation of torchtitan's parallelize step).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from draftcli.config import ShardingConfig
from draftcli.errors import InputError


def speed_up(settings: ShardingConfig, unet: Any, base_unet: Any | None, vae: Any) -> None:
    """Apply `settings` to the networks, in place: memory layout, then activation checkpointing."""
    if settings.channels_last:
        for network in filter(None, [unet, base_unet, vae]):
            network.to(memory_format=torch.channels_last)
    if settings.activation_checkpointing:
        checkpoint_activations(unet, vae)


def checkpoint_activations(unet: Any, vae: Any) -> None:
    """Recompute activations in backward instead of keeping them.

    The UNet by diffusers' own switch, block by block. The decoder residual block by residual block: one of its
    blocks at 1024 x 1024 in float32 would keep 10 GiB.
    """
    unet.enable_gradient_checkpointing()
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


def shard(unet: nn.Module) -> None:
    """FSDP2, in place: every transformer and residual block a group of its own, then the rest as the root.

    Parameters become DTensors split over the default process group; each block is gathered when it runs. Call it after
    the adapter is attached and before the optimizer is made.

    Raises:
        InputError: no process group is initialised.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise InputError("sharding needs several processes: start with torchrun")
    for block in unet.modules():
        if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
            fully_shard(block)
    fully_shard(unet)
