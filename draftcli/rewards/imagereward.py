"""ImageReward: a BLIP whose text encoder looks at the picture, and a small head on its first token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftcli.rewards.aesthetic import scoring_head
from draftcli.rewards.blank import BlankTokenizer, with_blank
from draftcli.rewards.checkpoints import (
    Official,
    Origin,
    fill,
    find_checkpoint,
    layer_count,
    read_checkpoint,
    shape_of,
)
from draftcli.rewards.clip import BASE, LARGE, load_tokenizer
from draftcli.rewards.pixels import Preprocess

# Of the scores on the authors' validation set, part of the definition.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TEXT_LENGTH = 35


class ImageReward(nn.Module):
    """(head(text encoder(prompt, looking at the picture)[CLS]) - MEAN) / STD.

    Args:
        vision: transformers' BlipVisionModel.
        text: transformers' BlipTextModel with cross-attention.
        mlp: the head.
        tokenizer: BERT's; texts are cut at 35 tokens.
        preprocess: of the pictures.
    """

    name = "imagereward"

    def __init__(self, vision: Any, text: Any, mlp: nn.Module, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision, self.text, self.mlp = vision, text, mlp
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores, mostly -2 to 2; see `draftcli.rewards.Reward`."""
        device = self.preprocess.mean.device
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).to(device)
        pixels = self.preprocess(images.to(device)).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=device),
        ).last_hidden_state
        return (self.mlp(read[:, 0]).squeeze(-1) - MEAN) / STD


def _blank() -> ImageReward:
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    text_config = BlipTextConfig(
        **BASE, vocab_size=30524, encoder_hidden_size=1024, max_position_embeddings=512, use_cache=False
    )
    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**LARGE, image_size=224, patch_size=16))
        text = BlipTextModel(text_config, add_pooling_layer=False)
        return ImageReward(vision, text, scoring_head(768), BlankTokenizer(), Preprocess(224, "crop_even"))


@with_blank(_blank)
def imagereward(pretrained: str | None = None, backbone: str = "google-bert/bert-base-uncased") -> ImageReward:
    """ImageReward (Xu et al. 2023, arXiv 2304.05977), mostly -2 to 2. `backbone` holds the tokenizer.

    Raises:
        InputError: see `find_checkpoint`, `read_checkpoint` and `fill`.
    """
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    name = ImageReward.name
    path = find_checkpoint(name, Official("ImageReward.pt", hub="THUDM/ImageReward"), pretrained)
    tensors = read_checkpoint(name, path)
    vision_config, text_config = _configs(name, path, tensors)
    with torch.device("meta"):
        parts = nn.ModuleDict(
            {
                "vision": BlipVisionModel(vision_config),
                "text": BlipTextModel(text_config, add_pooling_layer=False),
                "mlp": nn.ModuleDict({"layers": scoring_head(text_config.hidden_size)}),
            }
        )
    # Left from BLIP's own training: two projections that the score does not use, and a table of 0, 1, 2, ...
    unused = [f"blip.{part}_proj.{kind}" for part in ("vision", "text") for kind in ("weight", "bias")]
    fill(name, path, parts, tensors, _origin, [*unused, "blip.text_encoder.embeddings.position_ids"])
    tokenizer = load_tokenizer(name, backbone, "backbone", text_config.vocab_size)
    preprocess = Preprocess(vision_config.image_size, "crop_even")
    head = parts["mlp"]["layers"]  # type: ignore[index]
    return ImageReward(parts["vision"], parts["text"], head, tokenizer, preprocess)


def _configs(name: str, path: Path, tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """BLIP's configurations, sizes by the tensors' shapes: ViT-L/16 with 16 heads, BERT base with 12."""
    from transformers import BlipTextConfig, BlipVisionConfig

    shape = partial(shape_of, name, path, tensors)
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    width, _, patch, _ = shape(f"{vision}patch_embed.proj.weight")
    grid = round((shape(f"{vision}pos_embed")[1] - 1) ** 0.5)
    vocabulary, text_width = shape(f"{text}embeddings.word_embeddings.weight")
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape(f"{vision}blocks.0.mlp.fc1.weight")[0],
        num_hidden_layers=layer_count(tensors, f"{vision}blocks."),
        num_attention_heads=16,
        image_size=grid * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=shape(f"{text}encoder.layer.0.intermediate.dense.weight")[0],
        num_hidden_layers=layer_count(tensors, f"{text}encoder.layer."),
        num_attention_heads=12,
        max_position_embeddings=shape(f"{text}embeddings.position_embeddings.weight")[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        bos_token_id=vocabulary - 2,
        sep_token_id=None,
        use_cache=False,
    )
    return vision_config, text_config


_VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
    "encoder.layers.": "blocks.",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
}


def _origin(key: str) -> Origin:
    """BLIP's name for a tensor of ours: the text encoder and the head are named alike."""
    part, _, rest = key.partition(".")
    if part == "vision":
        for ours, theirs in _VISION.items():
            rest = rest.replace(ours, theirs)
    prefix = {"vision": "blip.visual_encoder.", "text": "blip.text_encoder.", "mlp": "mlp."}[part]
    return prefix + rest, lambda tensor: tensor
