"""ICT and HP (Ba et al. 2025, arXiv 2507.19002): two rewards made against the habit of CLIP rewards to take points off
for detail. ICT asks how much of the prompt a picture contains; HP asks for quality alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.errors import InputError
from draftcli.rewards.aesthetic import scoring_head
from draftcli.rewards.blank import with_blank
from draftcli.rewards.checkpoints import Official, fill, find_checkpoint, read_checkpoint
from draftcli.rewards.clip import (
    HUGE,
    LARGE,
    VIT_H,
    CLIPReward,
    blank_clip,
    clip_config,
    clip_pixels,
    load_tokenizer,
    straighten_quotes,
)
from draftcli.rewards.pixels import Preprocess

ICT_WEIGHTS = Official("pytorch_model.bin", hub="8y/ICT")
HP_BACKBONE = Official("hp_backbone/pytorch_model.bin", hub="8y/HP")
HP_HEAD = Official("hp_scorer/mlp_pytorch_model.bin", hub="8y/HP")
# Older releases of transformers kept these tables of 0, 1, 2, ... among the tensors.
_TABLES = [f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")]


class HPReward(nn.Module):
    """sigmoid(head(embedding)): the embedding is not normalised, and the prompt is not looked at.

    Args:
        vision: transformers' CLIPVisionModelWithProjection.
        head: (B, D) -> (B, 1).
        preprocess: of the pictures.
    """

    name = "hp"

    def __init__(self, vision: Any, head: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision, self.head = vision, head
        self.preprocess = preprocess
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores in [0, 1]; see `draftcli.rewards.Reward`."""
        pixels = self.preprocess(images.to(self.preprocess.mean.device)).to(self.vision.dtype)
        return self.head(self.vision(pixel_values=pixels).image_embeds).squeeze(-1).sigmoid()


@with_blank(lambda: blank_clip("ict", HUGE, LARGE, Preprocess(224, "crop")))
def ict(pretrained: str | None = None, backbone: str = VIT_H) -> CLIPReward:
    """ICT: cosine of a CLIP ViT-H/14 that was trained towards 1 for pictures that contain all of their prompt.

    `backbone` holds configuration, tokenizer and preprocessor of the CLIP that it was made of.

    Raises:
        InputError: see `find_checkpoint`, `read_checkpoint` and `fill`.
    """
    from transformers import CLIPModel

    name = "ict"
    path = find_checkpoint(name, ICT_WEIGHTS, pretrained)
    tensors = read_checkpoint(name, path)
    config = clip_config(name, backbone, "backbone")
    with torch.device("meta"):
        clip = CLIPModel(config)
    fill(name, path, clip, tensors, unused=_TABLES)
    tokenizer = load_tokenizer(name, backbone, "backbone", config.text_config.vocab_size)
    straighten_quotes(tokenizer)  # the authors take open_clip's
    preprocess = Preprocess(config.vision_config.image_size, *clip_pixels(name, backbone, "backbone"))
    return CLIPReward(name, clip, tokenizer, preprocess, bare_cosine=True)


def _blank_hp() -> HPReward:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**HUGE, patch_size=14, projection_dim=1024))
        return HPReward(vision, scoring_head(1024), Preprocess(224, "crop"))


@with_blank(_blank_hp)
def hp(pretrained: str | None = None, backbone: str = VIT_H) -> HPReward:
    """HP: 0 to 1, by another fine-tuned CLIP ViT-H/14 and a head; the prompt is not looked at.

    Args:
        pretrained: hub id or folder with hp_backbone/ and hp_scorer/.
        backbone: hub id or folder with configuration and preprocessor of the CLIP that it was made of.

    Raises:
        InputError: see `find_checkpoint`, `read_checkpoint` and `fill`.
    """
    from transformers import CLIPVisionModelWithProjection

    name = HPReward.name
    if pretrained is not None and Path(pretrained).expanduser().is_file():
        raise InputError(
            f"reward {name}: {pretrained} is one file, and its weights are two; set rewards.{name}.pretrained to the "
            f"folder that holds {HP_BACKBONE.file} and {HP_HEAD.file}"
        )
    head_path = find_checkpoint(name, HP_HEAD, pretrained)
    head = read_checkpoint(name, head_path)
    path = find_checkpoint(name, HP_BACKBONE, pretrained)
    tensors = read_checkpoint(name, path)
    config = clip_config(name, backbone, "backbone")
    vision_config = config.vision_config
    vision_config.projection_dim = config.projection_dim
    with torch.device("meta"):
        parts = nn.ModuleDict({"layers": scoring_head(config.projection_dim)})
        vision = CLIPVisionModelWithProjection(vision_config)
    fill(name, head_path, parts, head)
    # The file holds the half that reads as well.
    reads = [key for key in tensors if key.startswith(("text_model.", "text_projection.", "logit_scale"))]
    fill(name, path, vision, tensors, unused=[*reads, *_TABLES])
    preprocess = Preprocess(vision_config.image_size, *clip_pixels(name, backbone, "backbone"))
    return HPReward(vision, parts["layers"], preprocess)  # type: ignore[arg-type]
