"""Activation checkpointing and FSDP2, applied from outside to plain models, in this order.

The models know nothing of devices or processes (the separation of torchtitan's parallelize step).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from draftcli.errors import InputError


def checkpoint_activations(*networks: Any) -> None:
    """Recompute each block's activations in backward instead of keeping them; diffusers' own switch."""
    for network in networks:
        network.enable_gradient_checkpointing()


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
