"""Rewards that are a CLIP: PickScore, HPSv2, HPSv2.1, CLIPScore; transformers alone, differentiable to the pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcli.errors import InputError
from draftcli.rewards.blank import BlankTokenizer, with_blank
from draftcli.rewards.checkpoints import (
    Official,
    Origin,
    fill,
    find_checkpoint,
    layer_count,
    load_pretrained,
    loading,
    network_config,
    preprocessor_config,
    read_checkpoint,
    shape_of,
)
from draftcli.rewards.pixels import FitToSquare, Preprocess

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# Transformers of the official weights, as transformers' configurations name their sizes.
Sizes = Mapping[str, Any]
HUGE: Sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
LARGE: Sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
BASE: Sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


class CLIPReward(nn.Module):
    """exp(logit_scale) * cosine of a CLIP's image and text embeddings (scale 1 with `bare_cosine`).

    Args:
        name: of the reward.
        clip: transformers' CLIPModel.
        tokenizer: its tokenizer; texts are cut at its length, and at the CLIP's own, mostly 77 tokens.
        preprocess: of the pictures.
        bare_cosine: leave the logit scale out.
    """

    def __init__(self, name: str, clip: Any, tokenizer: Any, preprocess: Preprocess, bare_cosine: bool = False) -> None:
        super().__init__()
        self.name = name
        self.clip = clip
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.bare_cosine = bare_cosine
        self.requires_grad_(False).eval()

    @property
    def scale(self) -> Tensor | float:
        """What the cosine is multiplied with."""
        return 1.0 if self.bare_cosine else self.clip.logit_scale.exp()

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) of length 1, differentiable."""
        return self.embed_pixels(self.preprocess(images.to(self.preprocess.mean.device)))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), preprocessed -> (B, D) of length 1, differentiable."""
        return self.project(self.pool(pixels))

    def pool(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), preprocessed -> (B, W), the vision tower's pooled output, differentiable."""
        return self.clip.vision_model(pixel_values=pixels.to(self.clip.dtype)).pooler_output

    def project(self, pooled: Tensor) -> Tensor:
        """(B, W), see `pool` -> (B, D) of length 1, what is compared with texts."""
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> (B, D) of length 1."""
        return self.embed_words(texts)

    def embed_words(self, texts: list[str], padding: Literal["max_length", "longest"] = "max_length") -> Tensor:
        """The same, differentiable in the text tower, for who trains it.

        Padding up to the longest text alone takes less time and gives the same up to rounding: the text tower's
        attention is causal, and what follows the end of a text changes nothing.
        """
        # Tokenizers that say nothing of a length have 10^30.
        length = min(self.tokenizer.model_max_length, self.clip.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(texts, padding=padding, max_length=length, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.preprocess.mean.device)
        text = self.clip.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(self.clip.text_projection(text.pooler_output), dim=-1)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores; see `draftcli.rewards.Reward`."""
        return self.scale * (self.embed_images(images) * self.embed_texts(prompts)).sum(-1)

    def save(self, folder: Path) -> None:
        """Write network, tokenizer and preprocessing as transformers does; `load_clip_reward` opens it as "crop"."""
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        size, mean, std = self.preprocess.size, self.preprocess.mean.flatten(), self.preprocess.std.flatten()
        facts = {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
            "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean.tolist(), "image_std": std.tolist(),
            "do_convert_rgb": True,
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def load_clip_reward(name: str, pretrained: str, processor: str | None = None, bare_cosine: bool = False) -> CLIPReward:
    """Load a CLIP by hub id or local folder in transformers' format, with its own preprocessing: a centre crop.

    Args:
        name: of the reward.
        pretrained: the CLIP's weights.
        processor: tokenizer and preprocessing, where they are elsewhere.
        bare_cosine: see `CLIPReward`.

    Raises:
        InputError: it cannot be loaded; says what to put where.
    """
    from transformers import CLIPModel

    clip_config(name, pretrained, "pretrained")
    place, setting = (processor, "backbone") if processor else (pretrained, "pretrained")
    pixels = clip_pixels(name, place, setting)
    clip = load_pretrained(name, CLIPModel, pretrained, "pretrained")
    tokenizer = load_tokenizer(name, place, setting, clip.config.text_config.vocab_size)
    return CLIPReward(name, clip, tokenizer, Preprocess(clip.config.vision_config.image_size, *pixels), bare_cosine)


def clip_config(name: str, place: str, setting: str) -> Any:
    """The CLIPConfig in a folder or on the hub; see `network_config`."""
    return network_config(name, place, setting, "clip", "a CLIP")


def clip_pixels(name: str, place: str, setting: str) -> tuple[FitToSquare, Sequence[float], Sequence[float]]:
    """What a CLIP's own preprocessor does to pictures, as `Preprocess` takes it: fit, mean and std.

    Args and errors are those of `preprocessor_config`.
    """
    pixels = preprocessor_config(name, place, setting)
    return "crop", pixels["image_mean"], pixels["image_std"]


def load_tokenizer(name: str, place: str, setting: str, vocabulary: int) -> Any:
    """The tokenizer in a folder or on the hub.

    Args:
        name: of the reward.
        place: hub id or folder.
        setting: of the reward that can point elsewhere: `pretrained` or `backbone`.
        vocabulary: how many tokens the network knows.

    Raises:
        InputError: there is none, or it is another network's; says what to put where.
    """
    from transformers import AutoTokenizer

    with loading(name, place, setting):
        tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"reward {name}: the tokenizer of {place} has no token to fill short texts with: set pad_token in its "
            "tokenizer_config.json"
        )
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"reward {name}: the tokenizer of {place} knows {len(tokenizer)} tokens and the network {vocabulary}: they "
            f"do not belong together; set rewards.{name}.{setting} to the right one"
        )
    return tokenizer


def blank_clip(name: str, vision: Sizes, text: Sizes, preprocess: Preprocess) -> CLIPReward:
    """A CLIP of those two towers without weights, on the meta device; its embeddings are as wide as the text."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        vision_config={**vision, "patch_size": 14}, text_config={**text}, projection_dim=text["hidden_size"]
    )
    with torch.device("meta"):
        clip = CLIPModel(config)
    return CLIPReward(name, clip, BlankTokenizer(), preprocess)


@with_blank(lambda: blank_clip("pickscore", HUGE, LARGE, Preprocess(224, "crop")))
def pickscore(pretrained: str = "yuvalkirstain/PickScore_v1", backbone: str | None = None) -> CLIPReward:
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) * cos of a CLIP ViT-H/14, about 17 to 25.

    `backbone` holds tokenizer and preprocessor: on the hub LAION's, of a local folder the folder itself.
    """
    official = pretrained == "yuvalkirstain/PickScore_v1"
    return load_clip_reward("pickscore", pretrained, backbone or (VIT_H if official else None))


@with_blank(lambda: blank_clip("clip", LARGE, BASE, Preprocess(224, "crop")))
def clip_score(pretrained: str = "openai/clip-vit-large-patch14", backbone: str | None = None) -> CLIPReward:
    """Cosine of picture and prompt by any CLIP, in [-1, 1]. `backbone`: tokenizer and preprocessor, if elsewhere."""
    return load_clip_reward("clip", pretrained, backbone, bare_cosine=True)


@with_blank(lambda: blank_clip("hpsv2", HUGE, LARGE, Preprocess(224, "pad")))
def hpsv2(pretrained: str | None = None, backbone: str = VIT_H) -> CLIPReward:
    """HPSv2 (Wu et al. 2023, arXiv 2306.09341): cosine of a CLIP ViT-H/14, about 0.2 to 0.3. Not comparable with 2.1.

    `backbone` holds the tokenizer. The whole picture is seen: its longer side at 224, black borders.
    """
    return load_hps("hpsv2", "HPS_v2_compressed.pt", pretrained, backbone)


@with_blank(lambda: blank_clip("hpsv2_1", HUGE, LARGE, Preprocess(224, "pad")))
def hpsv2_1(pretrained: str | None = None, backbone: str = VIT_H) -> CLIPReward:
    """HPSv2.1, as `hpsv2`: the version that the HPSv2 benchmark reports by default, times 100."""
    return load_hps("hpsv2_1", "HPS_v2.1_compressed.pt", pretrained, backbone)


def load_hps(name: str, file: str, pretrained: str | None, backbone: str) -> CLIPReward:
    """Load an HPSv2 checkpoint: open_clip's names, filled into transformers' CLIPModel.

    Raises:
        InputError: see `find_checkpoint`, `read_checkpoint` and `fill`.
    """
    from transformers import CLIPModel

    path = find_checkpoint(name, Official(file, hub="xswu/HPSv2"), pretrained)
    tensors = read_checkpoint(name, path)
    config = _open_clip_config(name, path, tensors)
    with torch.device("meta"):
        clip = CLIPModel(config)
    # An older open_clip kept the text's causal mask among its tensors.
    fill(name, path, clip, tensors, _open_clip_origin, unused=["attn_mask"])
    tokenizer = load_tokenizer(name, backbone, "backbone", config.text_config.vocab_size)
    straighten_quotes(tokenizer)
    return CLIPReward(name, clip, tokenizer, Preprocess(config.vision_config.image_size, "pad"), bare_cosine=True)


def straighten_quotes(tokenizer: Any) -> None:
    """Let a tokenizer of transformers read curly quotation marks as straight ones, which open_clip's does by ftfy."""
    from tokenizers import Regex
    from tokenizers.normalizers import Replace, Sequence

    marks = [("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"')]
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([*(Replace(Regex(curly), straight) for curly, straight in marks), backend.normalizer])


def _open_clip_config(name: str, path: Path, tensors: Mapping[str, Tensor]) -> Any:
    """A ViT-H/14's configuration, sizes by the tensors' shapes. Both towers have 16 heads (80 and 64 wide)."""
    from transformers import CLIPConfig

    shape = partial(shape_of, name, path, tensors)
    width, _, patch, _ = shape("visual.conv1.weight")
    grid = round((shape("visual.positional_embedding")[0] - 1) ** 0.5)
    vocabulary, text_width = shape("token_embedding.weight")
    common = {"num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    return CLIPConfig(
        text_config={
            **common,
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": layer_count(tensors, "transformer.resblocks."),
            "max_position_embeddings": shape("positional_embedding")[0],
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,  # where open_clip reads the text's embedding
        },
        vision_config={
            **common,
            "hidden_size": width,
            "intermediate_size": shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
            "num_hidden_layers": layer_count(tensors, "visual.transformer.resblocks."),
            "image_size": grid * patch,
            "patch_size": patch,
        },
        projection_dim=shape("text_projection")[1],
    )


_OPEN_CLIP = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def _open_clip_origin(key: str) -> Origin:
    """open_clip's name for a tensor of CLIPModel: attention's three matrices are one there, projections transposed."""
    if key in _PROJECTIONS:
        return _PROJECTIONS[key], torch.t
    block = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if block is None:
        stem, _, kind = key.rpartition(".")
        return (_OPEN_CLIP[key] if key in _OPEN_CLIP else f"{_OPEN_CLIP[stem]}.{kind}"), _as_it_is
    tower, number, part, kind = block.groups()
    prefix = f"{'visual.' if tower == 'vision' else ''}transformer.resblocks.{number}."
    if part in _OPEN_CLIP_BLOCK:
        return f"{prefix}{_OPEN_CLIP_BLOCK[part]}.{kind}", _as_it_is
    third = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(part)
    return f"{prefix}attn.in_proj_{kind}", lambda tensor: tensor.chunk(3)[third]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
