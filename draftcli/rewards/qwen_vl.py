"""What the judges made of Qwen2-VL and Qwen3-VL share: pictures as patches, in tensors so that the gradient reaches
every pixel, and what memory plans need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.errors import InputError
from draftcli.rewards.pixels import OPENAI_MEAN, OPENAI_STD, Normalised, resize_saturating

LARGEST_RATIO = 200  # of a picture's sides, as Qwen's preprocessing allows


class Patches(Normalised):
    """(B, 3, H, W) in [0, 1] -> patches (B, N, 3 * frames * patch ** 2), and the grid (rows, columns), N their product.

    A picture keeps its shape, nearly: its sides become multiples of patch * merge. The patches stand in the order in
    which the network merges them: merge by merge blocks, row by row. A still picture is a film of equal frames.

    Args:
        vision: configuration of the network that sees: its patch_size, spatial_merge_size and temporal_patch_size.
        least: pixels of a picture.
        most: likewise.
        mean: of the pixels, per channel.
        std: likewise.
    """

    def __init__(
        self,
        vision: Any,
        least: int,
        most: int,
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
    ) -> None:
        super().__init__(mean, std)
        self.patch, self.merge, self.frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.least, self.most = least, most

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """See the class.

        Raises:
            InputError: one side is more than 200 times the other.
        """
        tall, wide = images.shape[-2:]
        height, width = fitted_sides(tall, wide, self.patch * self.merge, self.least, self.most)
        images = (resize_saturating(images.to(self.mean), height, width) - self.mean) / self.std
        rows, columns = height // self.patch, width // self.patch
        blocks = images.unflatten(-1, (columns // self.merge, self.merge, self.patch))
        blocks = blocks.unflatten(2, (rows // self.merge, self.merge, self.patch))
        # (B, 3, row, down, y, column, across, x) -> (B, row, column, down, across, 3, y, x)
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
        film = blocks.unsqueeze(6).expand(*blocks.shape[:6], self.frames, self.patch, self.patch)
        return film.reshape(len(images), rows * columns, -1), (rows, columns)


def fitted_sides(height: int, width: int, step: int, least: int, most: int) -> tuple[int, int]:
    """The height and width that Qwen's preprocessing gives a picture.

    Args:
        height: of the picture, in pixels.
        width: likewise.
        step: both sides become multiples of it.
        least: pixels, height times width.
        most: likewise.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    if max(height, width) > LARGEST_RATIO * min(height, width):
        raise InputError(
            f"an image of {height} x {width} pixels: one side is more than {LARGEST_RATIO} times the other, which "
            "Qwen-VL does not take"
        )
    tall, wide = (max(step, round(side / step) * step) for side in (height, width))
    if tall * wide > most:
        ratio = math.sqrt(height * width / most)
        tall, wide = (max(step, math.floor(side / ratio / step) * step) for side in (height, width))
    elif tall * wide < least:
        ratio = math.sqrt(least / (height * width))
        tall, wide = (math.ceil(side * ratio / step) * step for side in (height, width))
    return tall, wide


def token_ids(tokenizer: Any, text: str, device: torch.device) -> Tensor:
    """Text -> (L,) tokens, special ones by their names, none added."""
    return torch.as_tensor(tokenizer(text, add_special_tokens=False).input_ids, device=device).view(-1)


def plain_words(prompt: str) -> str:
    """A prompt that holds none of Qwen's special tokens, which would end the question or stand for a picture."""
    return prompt.replace("<|", "< |")


class BlankWords:
    """Stands for a tokenizer in memory plans: about one token for four letters, as in English."""

    def __call__(self, text: str, **options: Any) -> Any:
        """A BatchEncoding of zeros."""
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": torch.zeros(1, len(text) // 4 + 1, dtype=torch.long)})


class AttentionInPlans(nn.Module):
    """Stands for a seeing block's attention in memory plans: transformers reads numbers from tensors there, and in a
    plan tensors have none. It keeps what the block's matrices do; a fused attention keeps little beside that.

    Args:
        attention: of the block.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj

    def forward(self, hidden: Tensor, **options: Any) -> Tensor:
        """(N, D) -> (N, D)."""
        return self.proj(self.qkv(hidden).unflatten(-1, (3, -1)).sum(-2))


def seen_in_plans(visual: Any, patches: Tensor) -> Tensor:
    """Patches (N, D) -> (N / merge ** 2, width), by a `visual` whose blocks have `AttentionInPlans`."""
    hidden = visual.patch_embed(patches)
    for block in visual.blocks:
        hidden = block(hidden, cu_seqlens=None, position_embeddings=None)
    return visual.merger(hidden)


def with_attention_in_plans(network: Any) -> Any:
    """A Qwen2VLModel or Qwen3VLModel in bfloat16, as memory plans want it."""
    for block in network.visual.blocks:
        block.attn = AttentionInPlans(block.attn)
    return nn.Module.to(network, torch.bfloat16)
