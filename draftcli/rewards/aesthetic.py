"""Rewards that ask for beauty alone: a small head on the normalised image embedding of a CLIP or a SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcli.errors import InputError
from draftcli.rewards.blank import with_blank
from draftcli.rewards.checkpoints import Official, fill, find_checkpoint, load_pretrained, loading, read_checkpoint
from draftcli.rewards.clip import LARGE, Sizes
from draftcli.rewards.pixels import Preprocess

VIT_L = "openai/clip-vit-large-patch14"
SIGLIP = "google/siglip-so400m-patch14-384"
_IMPROVED = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main"
# The checksums are those of the files in the three repositories as of November 2026.
V1 = Official(
    "sa_0_4_vit_l_14_linear.pth",
    url="https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
)
V2 = Official(
    "sac+logos+ava1-l14-linearMSE.pth",
    url=f"{_IMPROVED}/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
V2_5 = Official(
    "aesthetic_predictor_v2_5.pth",
    url="https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
    sha256="a6caf256b3dc434273c98dcb12f6bf17c5d4fc647d8df11f038386923dd06220",
)


class AestheticReward(nn.Module):
    """head(embedding / |embedding|); the prompt is not looked at.

    Args:
        name: of the reward.
        vision: transformers' CLIPVisionModelWithProjection, or SiglipVisionModel.
        head: (B, D) -> (B, 1).
        preprocess: of the pictures.
    """

    def __init__(self, name: str, vision: Any, head: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.name = name
        self.vision, self.head = vision, head
        self.preprocess = preprocess
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        pixels = self.preprocess(images.to(self.preprocess.mean.device)).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels)
        embedding = seen.image_embeds if "image_embeds" in seen else seen.pooler_output
        return self.head(F.normalize(embedding, dim=-1)).squeeze(-1)


def scoring_head(width: int, last_dropout: bool = False) -> nn.Sequential:
    """width-1024-128-64-16-1 without activations. The dropouts, off here, only keep the official numbering of layers.

    Args:
        width: of the embedding.
        last_dropout: there is one before the last layer too (Aesthetic v2.5).
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(), nn.Linear(128, 64), nn.Dropout(),
        nn.Linear(64, 16), *([nn.Dropout()] if last_dropout else []), nn.Linear(16, 1),
    )  # fmt: skip


def _blank_on_clip(name: str, head: Callable[[], nn.Module]) -> AestheticReward:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**LARGE, patch_size=14, projection_dim=768))
        return AestheticReward(name, vision, head(), Preprocess(224, "crop_even"))


def _blank_on_siglip() -> AestheticReward:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes: Sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    with torch.device("meta"):
        vision = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=384, patch_size=14))
        head = scoring_head(1152, last_dropout=True)
        return AestheticReward("aesthetic_v2_5", vision, head, Preprocess(384, "squash"))


@with_blank(lambda: _blank_on_clip("aesthetic", lambda: scoring_head(768)))
def aesthetic(pretrained: str | None = None, backbone: str = VIT_L) -> AestheticReward:
    """LAION's improved aesthetic predictor ("v2"): about 1 to 10, by OpenAI's CLIP ViT-L/14, which is `backbone`."""
    head = _Head("aesthetic", V2, pretrained)
    vision = _clip_vision("aesthetic", backbone)
    layers = head.filled(nn.ModuleDict({"layers": scoring_head(vision.config.projection_dim)}))["layers"]
    return AestheticReward("aesthetic", vision, layers, Preprocess(vision.config.image_size, "crop_even"))


@with_blank(lambda: _blank_on_clip("aesthetic_v1", lambda: nn.Linear(768, 1)))
def aesthetic_v1(pretrained: str | None = None, backbone: str = VIT_L) -> AestheticReward:
    """LAION's first aesthetic predictor, linear: about 1 to 10, by OpenAI's CLIP ViT-L/14, which is `backbone`."""
    head = _Head("aesthetic_v1", V1, pretrained)
    vision = _clip_vision("aesthetic_v1", backbone)
    layer = head.filled(nn.Linear(vision.config.projection_dim, 1))
    return AestheticReward("aesthetic_v1", vision, layer, Preprocess(vision.config.image_size, "crop_even"))


@with_blank(_blank_on_siglip)
def aesthetic_v2_5(pretrained: str | None = None, backbone: str = SIGLIP) -> AestheticReward:
    """Aesthetic Predictor V2.5: 1 to 10, 5.5 and more is good, by SigLIP so400m/14 at 384, which is `backbone`."""
    from transformers import SiglipVisionModel

    head = _Head("aesthetic_v2_5", V2_5, pretrained)
    vision = load_pretrained("aesthetic_v2_5", SiglipVisionModel, backbone, "backbone")
    layers = nn.ModuleDict({"scoring_head": scoring_head(vision.config.hidden_size, last_dropout=True)})
    preprocess = Preprocess(vision.config.image_size, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return AestheticReward("aesthetic_v2_5", vision, head.filled(layers)["scoring_head"], preprocess)


class _Head:
    """The small file, read before the large network is."""

    def __init__(self, name: str, official: Official, pretrained: str | None) -> None:
        self.name = name
        self.path = find_checkpoint(name, official, pretrained)
        self.tensors = read_checkpoint(name, self.path)

    def filled(self, layers: Any) -> Any:
        fill(self.name, self.path, layers, self.tensors)
        return layers


def _clip_vision(name: str, backbone: str) -> Any:
    """The half of a CLIP that sees, with its projection."""
    from transformers import AutoConfig, CLIPVisionModelWithProjection

    with loading(name, backbone, "backbone"):
        config = AutoConfig.from_pretrained(backbone)
    if config.model_type not in ("clip", "clip_vision_model"):
        raise InputError(f"reward {name}: {backbone} is a {config.model_type} model, not a CLIP")
    if config.model_type == "clip":  # both halves, as on the hub; the width of the embedding stands outside
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    return load_pretrained(name, CLIPVisionModelWithProjection, backbone, "backbone", config=config)
