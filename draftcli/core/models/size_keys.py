"""SDXL's size conditioning: original size, crop and target size, always (height, width).

The reference builds (width, height), which tells the network the transposed aspect ratio; SDXL was trained with
(height, width) (sgm, diffusers). On square pictures the two are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size_keys(count: int, height: int, width: int) -> dict[str, Tensor]:
    """The size keys of `count` uncropped pictures of height x width pixels, each (count, 2) int64."""
    size = torch.tensor([[height, width]]).repeat(count, 1)
    return {
        "original_size_as_tuple": size,
        "crop_coords_top_left": torch.zeros_like(size),
        "target_size_as_tuple": size.clone(),
    }


def time_ids(keys: dict[str, Tensor]) -> Tensor:
    """(B, 6) as diffusers' SDXL UNet takes them: original size, crop, target size."""
    return torch.cat(
        [keys["original_size_as_tuple"], keys["crop_coords_top_left"], keys["target_size_as_tuple"]], dim=1
    )
