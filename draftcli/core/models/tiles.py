"""Decode latents in overlapping tiles, differentiable: memory as for one tile, whatever the size of the picture.

It is close to decoding at once, not equal: the decoder's group norms and its attention see one tile at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OVERLAP = 4  # a quarter of a tile is shared with its neighbour


def decode_in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, factor: int) -> Tensor:
    """Decode tile by tile; overlaps are blended linearly. In backward each tile is decoded again.

    Args:
        decode: latents (B, C, h, w) -> pixels (B, 3, factor h, factor w).
        latents: (B, C, H, W).
        tile: edge of a tile in latents.
        factor: pixels by latent.

    Returns:
        (B, 3, factor H, factor W); what `decode` gives where one tile holds everything.
    """
    height, width = latents.shape[-2:]
    if max(height, width) <= tile:
        return decode(latents)
    rows, columns = _starts(height, tile), _starts(width, tile)
    picture = total = None
    for top, left in product(rows, columns):
        part = latents[..., top : top + tile, left : left + tile]
        pixels = checkpoint(decode, part, use_reentrant=False) if torch.is_grad_enabled() else decode(part)
        if picture is None or total is None:
            picture = pixels.new_zeros(*pixels.shape[:2], factor * height, factor * width)
            total = picture.new_zeros(picture.shape[-2:])
        vertical, horizontal = (_ramp(edge, factor * tile).to(pixels) for edge in pixels.shape[-2:])
        weight = vertical[:, None] * horizontal
        there = (..., slice(factor * top, factor * (top + tile)), slice(factor * left, factor * (left + tile)))
        picture[there] += weight * pixels
        total[there] += weight
    assert picture is not None
    assert total is not None
    return picture / total


def _starts(edge: int, tile: int) -> list[int]:
    """Where tiles begin along one edge; the last one ends with it."""
    if edge <= tile:
        return [0]
    stride = tile - tile // OVERLAP
    return [*range(0, edge - tile, stride), edge - tile]


def _ramp(length: int, tile: int) -> Tensor:
    """(length,) weights that rise from both ends over the overlap, to 1."""
    distance = torch.arange(length) + 0.5
    return torch.minimum(distance, length - distance).div(max(1, tile // OVERLAP)).clamp(max=1)
