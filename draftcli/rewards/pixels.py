"""The official preprocessing of the reward models, on tensors, so that the gradient reaches every pixel.

The official routes resize 8-bit pictures with Pillow (or a tensor with torchvision): bicubic, antialiased. Here it is
torch's bicubic with antialias=True, pinned: the same filter, with Pillow's saturation, without its rounding to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# crop: the shorter side becomes `size`, then the centre square, its corner rounded down as transformers does.
# crop_even: likewise, its corner rounded half to even as torchvision does.
# pad: the longer side becomes `size`, then black borders.
# squash: both sides become `size`.
FitToSquare = Literal["crop", "crop_even", "pad", "squash"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class Normalised(nn.Module):
    """Holds what pixels are normalised by, as buffers (3, 1, 1) that move with the network.

    Args:
        mean: of the pixels, per channel.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(3, 1, 1), persistent=False)


class Preprocess(Normalised):
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size), (x - mean) / std.

    Args:
        size: edge of the square that the network sees.
        fit: how a picture becomes a square, see `FitToSquare`.
        mean: of the pixels, per channel.
        std: likewise.
    """

    def __init__(
        self, size: int, fit: FitToSquare, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD
    ):
        super().__init__(mean, std)
        self.size, self.fit = size, fit

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        images, size = images.to(self.mean), self.size
        height, width = images.shape[-2:]
        if self.fit == "squash":
            images = resize_saturating(images, size, size)
        elif self.fit == "pad":
            # HPSv2 resizes a float tensor, which saturates nowhere.
            longest = max(height, width)
            images = resize(images, round(height * (size / longest)), round(width * (size / longest)))
            down, right = size - images.shape[-2], size - images.shape[-1]
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        else:
            shortest = min(height, width)
            images = resize_saturating(images, height * size // shortest, width * size // shortest)
            down, right = images.shape[-2] - size, images.shape[-1] - size
            top, left = (round(down / 2), round(right / 2)) if self.fit == "crop_even" else (down // 2, right // 2)
            images = images[..., top : top + size, left : left + size]
        return (images - self.mean) / self.std


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing; a picture of that size stays as it is."""
    if tuple(images.shape[-2:]) == (height, width):
        return images
    # Apple's mps has no backward of this resize, so there it runs on the CPU.
    source = images.cpu() if images.device.type == "mps" else images
    resized = F.interpolate(source, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.to(images.device)


def resize_saturating(images: Tensor, height: int, width: int) -> Tensor:
    """`resize` as Pillow does it at 8 bits: across, then down. Bicubic overshoots at edges, and each pass saturates."""
    across = resize(images, images.shape[-2], width).clamp(0, 1)
    return resize(across, height, width).clamp(0, 1)
