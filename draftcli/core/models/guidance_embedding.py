"""The guidance scale as an input of the UNet (`time_cond_proj_dim`): models that were distilled from guided ones, such
as LCM's, draw as with guidance in one evaluation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from draftcli.errors import InputError


def guidance_embedding(scale: float, width: int) -> Tensor:
    """What such a UNet is given beside the timestep, (width,) float32: sines and cosines of 1000 (scale - 1).

    The same operations in the same precision as diffusers' `get_guidance_scale_embedding`.

    Args:
        scale: guidance, 1 is none.
        width: time_cond_proj_dim of the UNet.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    angles = torch.tensor([scale - 1]) * 1000.0 * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))


def timestep_condition(unet: Any, x: Tensor, guidance: float | None) -> dict[str, Tensor]:
    """The argument by which a UNet is told the guidance scale; nothing for one that does not take it.

    Args:
        unet: any; one without time_cond_proj_dim takes nothing.
        x: (B, C, H, W), whose dtype and device it gets.
        guidance: sampling.guidance_embedding.

    Returns:
        `timestep_cond`: (B, time_cond_proj_dim).
    """
    width = getattr(unet.config, "time_cond_proj_dim", None)
    if width is None or guidance is None:
        return {}
    return {"timestep_cond": guidance_embedding(guidance, width).to(x).expand(len(x), -1)}


def check_guidance_embedding(width: int | None, scale: float | None, where: str) -> None:
    """See that the UNet is told a guidance scale where it takes one, and there alone.

    Args:
        width: its time_cond_proj_dim; None: it takes none.
        scale: sampling.guidance_embedding.
        where: what the user calls the model.

    Raises:
        InputError: the setting is missing, or without effect.
    """
    if width is not None and scale is None:
        raise InputError(
            f"{where}: the guidance scale is an input of its UNet (time_cond_proj_dim {width}), as in LCM; set "
            "sampling.guidance_embedding to the scale to generate with, such as 8"
        )
    if width is None and scale is not None:
        raise InputError(
            f"sampling.guidance_embedding is {scale:g}, and the UNet of {where} takes no guidance scale "
            "(time_cond_proj_dim is not set): leave it out, and set sampling.scale"
        )
