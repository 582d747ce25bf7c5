"""How different pictures are: what reward hacking takes away first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

THUMBNAIL_EDGE = 32


def thumbnail(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3 * 32 * 32): block averages, so that pictures of any size can be compared."""
    return functional.adaptive_avg_pool2d(images.float(), THUMBNAIL_EDGE).flatten(1)


def pairwise_distance(thumbnails: Tensor | np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Mean root mean square distance over the pairs within each group, in [0, 1].

    Args:
        thumbnails: (n, D), from `thumbnail`.
        groups: (n,) which group each belongs to: 0 .. G-1. Pictures of one prompt are a group.

    Returns:
        (G,) float64; NaN for a group of one.
    """
    points = torch.as_tensor(thumbnails).double()
    labels = torch.as_tensor(list(groups))
    figures = []
    for group in range(int(labels.max()) + 1):
        members = points[labels == group]
        distances = torch.pdist(members) / points.shape[1] ** 0.5
        figures.append(float(distances.mean()) if len(distances) else float("nan"))
    return np.array(figures)
