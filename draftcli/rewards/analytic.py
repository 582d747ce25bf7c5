"""Rewards without a network, to probe a training: they have one known answer, and hacking them is in plain sight."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BT601_LUMA = (0.299, 0.587, 0.114)  # JPEG's (ITU-R BT.601)
# The example tables of the JPEG standard (ITU-T T.81, annex K), which everyone's encoder scales by its quality.
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)  # fmt: skip
QUALITY = 75


class Analytic:
    """A function of the picture alone.

    Args:
        name: of the reward.
        score: (B, 3, H, W) in [0, 1] -> (B,).
    """

    def __init__(self, name: str, score: Callable[[Tensor], Tensor]) -> None:
        self.name = name
        self.score = score

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        return self.score(images)


def brightness() -> Analytic:
    """Mean luma, in [0, 1]."""
    return Analytic("brightness", lambda images: _luma(images).mean((1, 2)))


def saturation() -> Analytic:
    """Mean over the pixels of largest minus smallest channel, in [0, 1]; 0 is grey, where it has no gradient.

    Not HSV's saturation (`metrics.signs.hsv_saturation`), whose division by the largest channel has no bounded gradient
    near black.
    """
    return Analytic("saturation", lambda images: (images.amax(1) - images.amin(1)).mean((1, 2)))


def symmetry() -> Analytic:
    """Minus the mean squared difference from the mirror image, left to right; 0 is symmetric."""
    return Analytic("symmetry", lambda images: -(images - images.flip(-1)).square().mean((1, 2, 3)))


def compressibility() -> Analytic:
    """Minus the estimated bits per pixel of a JPEG at quality 75: a smooth stand-in for minus its size.

    Papers reward minus the size of a JPEG file (Black et al. 2023, arXiv 2305.13301), which has no gradient. This is
    JPEG up to the rounding (YCbCr, chroma halved, 8 x 8 cosine transform, quantisation tables) and then, in place of
    rounding and Huffman code, log2(1 + c^2) / 2 bits for a coefficient of c quantisation steps.
    A negative weight rewards incompressibility.
    """
    return Analytic("compressibility", lambda images: -jpeg_bits(images, QUALITY))


def jpeg_bits(images: Tensor, quality: int) -> Tensor:
    """Estimated bits per pixel (B,) of images (B, 3, H, W) in [0, 1] as JPEG of `quality` 1 to 100."""
    height, width = images.shape[-2:]
    images = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, blue = images[:, 0], images[:, 2]
    luma = _luma(images)
    chroma = torch.stack([(blue - luma) / 1.772, (red - luma) / 1.402], 1)
    # As libjpeg scales the tables.
    factor = 50 / quality if quality < 50 else 2 - quality / 50
    bits = _block_bits(luma[:, None] - 0.5, LUMA_TABLE, factor)
    return (bits + _block_bits(F.avg_pool2d(chroma, 2), CHROMA_TABLE, factor)) / (height * width)


def _block_bits(planes: Tensor, table: tuple[tuple[int, ...], ...], factor: float) -> Tensor:
    """(B, C, H, W) in [-0.5, 0.5] -> (B,) bits."""
    k = torch.arange(8, dtype=planes.dtype, device=planes.device)
    transform = torch.cos((2 * k[None] + 1) * k[:, None] * (torch.pi / 16)) / 2
    transform = torch.cat([transform[:1] / 2**0.5, transform[1:]])
    steps = (torch.tensor(table, dtype=planes.dtype, device=planes.device) * factor).round().clamp(1, 255)
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    coefficients = transform @ (255 * blocks) @ transform.T / steps
    # Smooth at 0, where every coefficient of a flat block lies: |c| would have the sign of rounding as its gradient.
    return torch.log2(1 + coefficients.square()).sum((1, 2, 3, 4, 5)) / 2


def _luma(images: Tensor) -> Tensor:
    return torch.einsum("bchw,c->bhw", images, images.new_tensor(BT601_LUMA))
