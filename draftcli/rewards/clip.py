"""Rewards that are a CLIP: PickScore and CLIPScore, through transformers alone, differentiable to the pixels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcli.errors import InputError


class CLIPReward(nn.Module):
    """exp(logit_scale) * cosine of a CLIP's image and text embeddings (scale 1 with `bare_cosine`).

    Preprocessing is the official one on tensors: shorter side to the CLIP's size, bicubic with antialiasing, centre
    crop, CLIP's mean and deviation. What lies outside the centre square of a picture is not seen.

    Args:
        name: of the reward.
        clip: transformers' CLIPModel.
        tokenizer: its tokenizer; texts are cut at its 77 tokens.
        mean: of the pixels, per channel.
        std: likewise.
        bare_cosine: leave the logit scale out.
    """

    def __init__(
        self, name: str, clip: Any, tokenizer: Any, mean: list[float], std: list[float], bare_cosine: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.clip = clip
        self.tokenizer = tokenizer
        self.bare_cosine = bare_cosine
        self.size = int(clip.config.vision_config.image_size)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) normalised, in the dtype of the CLIP."""
        images = images.to(self.mean.dtype)
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        # transformers rounds the longer side down; the shorter one is exact
        size = [int(height * scale + 1e-6), int(width * scale + 1e-6)]
        if size != [height, width]:
            # Apple's mps has no backward of this resize, so there it runs on the CPU.
            source = images.cpu() if images.device.type == "mps" else images
            resized = F.interpolate(source, size=size, mode="bicubic", antialias=True, align_corners=False)
            images = resized.to(images.device)
            images = images.clamp(0, 1)  # bicubic overshoots at edges; the official route saturates at 8 bits
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        return ((images - self.mean) / self.std).to(self.clip.dtype)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        device = self.mean.device
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            text = self.clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            text = F.normalize(self.clip.text_projection(text.pooler_output), dim=-1)
        vision = self.clip.vision_model(pixel_values=self.preprocess(images.to(device)))
        image = F.normalize(self.clip.visual_projection(vision.pooler_output), dim=-1)
        cosine = (image * text).sum(-1)
        return cosine if self.bare_cosine else self.clip.logit_scale.exp() * cosine


def load_clip_reward(name: str, pretrained: str, processor: str | None = None, bare_cosine: bool = False) -> CLIPReward:
    """Load a CLIP by hub id or local folder in transformers' format.

    Args:
        name: of the reward.
        pretrained: the CLIP's weights.
        processor: tokenizer and preprocessing, where they lie elsewhere.
        bare_cosine: see `CLIPReward`.

    Raises:
        InputError: it cannot be loaded; says what to put where.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

    try:
        config = AutoConfig.from_pretrained(pretrained)
        if config.model_type != "clip":
            raise InputError(f"reward {name}: {pretrained} is a {config.model_type} model, not a CLIP")
        clip = CLIPModel.from_pretrained(pretrained, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(processor or pretrained)
        pixels = CLIPImageProcessor.get_image_processor_dict(processor or pretrained)[0]
    except (OSError, ValueError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise InputError(
            f"reward {name}: {pretrained} cannot be loaded; without the hub, download it and set "
            f"rewards.{name}.pretrained to its folder ({reason})"
        ) from error
    reward = CLIPReward(name, clip, tokenizer, pixels["image_mean"], pixels["image_std"], bare_cosine)
    return reward.requires_grad_(False).eval()


def pickscore(pretrained: str = "yuvalkirstain/PickScore_v1") -> CLIPReward:
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) * cos of a CLIP ViT-H/14, about 17 to 25.

    A local folder must hold the processor's files beside the weights; on the hub they are LAION's.
    """
    official = pretrained == "yuvalkirstain/PickScore_v1"
    return load_clip_reward("pickscore", pretrained, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" if official else None)


def clip_score(pretrained: str = "openai/clip-vit-large-patch14") -> CLIPReward:
    """Cosine of picture and prompt by any CLIP, in [-1, 1]."""
    return load_clip_reward("clip", pretrained, bare_cosine=True)
