"""What the oracle sees in a picture, as features of diversity: nothing learned, every direction has a meaning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftcli.toy import oracle, world


class OracleFeatures(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> (B, 16), each about [0, 1] wide.

    Background and shape colour (3 + 3), overlap with each silhouette (6), radius, place (2), crispness.
    """

    name = "what the toy world's oracle reads; no learning involved"

    def forward(self, images: Tensor) -> Tensor:
        """The features (B, 16) of images (B, 3, H, W)."""
        seen = oracle.read_pictures(images)
        size = [seen.radius[:, None] / world.RESOLUTION, 0.5 + seen.centre / world.RESOLUTION, seen.crispness[:, None]]
        return torch.cat([seen.paper, seen.paint, seen.overlap, *size], dim=1)


def reading() -> OracleFeatures:
    """What `draftp eval` measures the diversity of the toy's pictures in."""
    return OracleFeatures()
