"""SDXL and PickScore at their real sizes with random weights: all that speed and memory need, and nothing to download.

The tokenizers are bytes: what the text encoders compute does not cost more or less for it.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import (
    BatchEncoding,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from draftcli.config import Config
from draftcli.core.engine.runtime import choose_runtime
from draftcli.core.models.family import Parts
from draftcli.core.models.sdxl import SDXL_CONFIG
from draftcli.core.precision import DTYPES
from draftcli.rewards.clip import CLIPReward
from draftcli.rewards.pixels import Preprocess

BOS, EOS = 49406, 49407


class Bytes:
    """A tokenizer of UTF-8 bytes, called as CLIP's."""

    model_max_length = 77

    def __call__(self, prompts: Any, padding: Any = True, **options: Any) -> BatchEncoding:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = torch.full((len(prompts), 77), EOS)
        for row, prompt in zip(ids, prompts, strict=True):
            text = torch.tensor([BOS, *prompt.encode()[:75]])
            row[: len(text)] = text
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    added_tokens_encoder: ClassVar[dict[str, int]] = {}

    def tokenize(self, prompt: str) -> list[str]:
        """What diffusers looks through for the names of textual inversions."""
        return prompt.split()

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


def random_sdxl(cfg: Config) -> Parts:
    """Every part of SDXL base 1.0 with random weights, made on the device and in the dtypes of `cfg`."""
    runtime = choose_runtime(cfg.model.device, cfg.model.precision)
    vae_dtype = DTYPES[cfg.model.vae_precision] if cfg.model.vae_precision else runtime.latent_dtype

    def read(part: str) -> dict[str, Any]:
        return json.loads((SDXL_CONFIG / part / "config.json").read_text(encoding="utf-8"))

    def make(dtype: torch.dtype, build: Any) -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(runtime.device):
                return build()
        finally:
            torch.set_default_dtype(before)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Parts(
            unet=make(runtime.dtype, lambda: UNet2DConditionModel.from_config(read("unet"))),
            vae=make(vae_dtype, lambda: AutoencoderKL.from_config(read("vae"))),
            text_encoders=(
                make(runtime.dtype, lambda: CLIPTextModel(CLIPTextConfig(**read("text_encoder")))),
                make(runtime.dtype, lambda: CLIPTextModelWithProjection(CLIPTextConfig(**read("text_encoder_2")))),
            ),
            tokenizers=(Bytes(), Bytes()),
            name="SDXL's configuration, random weights",
        )


def random_pickscore() -> CLIPReward:
    """A CLIP ViT-H/14, PickScore's network, with random weights in float32."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(
        vision_config={**vision, "patch_size": 14, "hidden_act": "gelu"},
        text_config={**text, "hidden_act": "gelu", "bos_token_id": BOS, "eos_token_id": EOS},
        projection_dim=1024,
    )
    half: Any = Bytes()
    clip = CLIPModel(config).requires_grad_(False).eval()
    return CLIPReward("pickscore", clip, half, Preprocess(224, "crop"))
