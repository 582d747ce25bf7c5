"""The toy world's two rewards: `toy_reward`, learned, differentiable and imperfect, and `toy_oracle`, the truth."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from draftcli.toy import oracle

WEIGHTS = Path(__file__).parent / "weights"


class ToyReward(torch.nn.Module):
    """The tiny CLIP: exp(logit_scale) * cos of picture and caption. Frozen, float32, differentiable in the pixels."""

    name = "toy"
    differentiable = True

    def __init__(self, pretrained: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__()
        folder = Path(pretrained or WEIGHTS / "reward")
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.clip = CLIPModel.from_pretrained(folder).float().eval().requires_grad_(False)
        processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self.register_buffer("mean", torch.tensor(processor["image_mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(processor["image_std"]).view(3, 1, 1))
        self.size: int = self.clip.config.vision_config.image_size
        self.to(device)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), higher is better, of images (B, 3, H, W) in [0, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if images.shape[-2:] != (self.size, self.size):
                images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            pooled = self.clip.vision_model((images - self.mean) / self.std).pooler_output
            seen = self.clip.visual_projection(pooled)
            tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
            text = self.clip.text_projection(self.clip.text_model(**tokens.to(images.device)).pooler_output)
            return self.clip.logit_scale.exp() * F.cosine_similarity(seen, text, dim=-1)


class ToyOracle:
    """The exact score in [0, 1]; NaN where a caption is outside the toy world's grammar. For judging, not training."""

    name = "toy_oracle"
    differentiable = False

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,) of images (B, 3, H, W) in [0, 1], on their device."""
        return oracle.score(images, prompts).to(images.device)


def toy_reward(pretrained: str | Path | None = None, device: str | torch.device = "cpu") -> ToyReward:
    """The learned reward that ships with draftp, or another in the same format from `pretrained`."""
    return ToyReward(pretrained, device)


def toy_oracle(pretrained: None = None, device: str | torch.device = "cpu") -> ToyOracle:
    """The oracle as a reward; it has no weights, and computes on the CPU whatever the device."""
    return ToyOracle()
