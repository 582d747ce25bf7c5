"""Stable Diffusion XL as a family: two text encoders, size keys, UNet.

Shape legend: B images, L text tokens (77), D text width (2048 in SDXL: 768 of CLIP-L beside 1280 of OpenCLIP bigG),
D2 pooled width (1280), C latent channels (4), H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from draftcli.core.batch import Batch
from draftcli.core.models.family import Conditioning, Edition, Embedding, Parts, tokenize
from draftcli.core.models.latent import LatentDiffusion
from draftcli.core.models.original_layout import ORIGINAL_CODE, ORIGINAL_UNET, ORIGINAL_VAE
from draftcli.core.models.original_names import original_unet_names
from draftcli.core.models.size_keys import size_keys, time_ids
from draftcli.core.precision import wide_default

SDXL_CONFIG = Path(__file__).with_name("sdxl_config")
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


class SDXL(LatentDiffusion):
    """Two text encoders, size keys, and zeros where there is no negative prompt."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    short = "SDXL"
    pipeline = "StableDiffusionXLPipeline"
    options = MappingProxyType({"add_watermarker": False})
    hub_base = SDXL_BASE
    hub_license = "openrail++"
    config_folder = SDXL_CONFIG
    networks = MappingProxyType(
        {
            "unet": "unet",
            "vae": "vae decoder",
            "text_encoder": "text encoder",
            "text_encoder_2": "text encoder 2",
        }
    )
    original_prefixes = MappingProxyType(
        {
            "unet": ORIGINAL_UNET,
            "vae": ORIGINAL_VAE,
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": "conditioner.embedders.1.model.",
        }
    )
    kohya_prefixes = MappingProxyType(
        {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    )
    tag = "stable-diffusion-xl"
    added_input = "text_time"
    zeros_for_empty = True

    def encode_prompts(self, parts: Parts, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `Family`: the layer before the last of both encoders, side by side, 77 tokens; pooled is the second
        encoder's projected end-of-text token.
        """
        sequence: list[Tensor] = []
        pooled = None
        for tokens, encoder in zip(tokenize(parts, prompts), parts.text_encoders, strict=True):
            with wide_default(encoder.dtype):
                output = encoder(tokens.to(encoder.device), output_hidden_states=True)
            sequence.append(output.hidden_states[-2])
            pooled = getattr(output, "text_embeds", None)
        assert pooled is not None, "the second text encoder has a projection"
        return torch.cat(sequence, dim=-1), pooled

    def condition(
        self, parts: Parts, embed: Callable[[Sequence[str]], Embedding], batch: Batch, negative: str | None
    ) -> Conditioning:
        """See `Family`: [unconditional ; conditional]. An absent negative prompt is zeros, where the model was trained
        so, else the empty prompt; size keys are those of an uncropped picture.
        """
        sequence, pooled = embed(batch.prompts)
        negatives = [negative if own is None else own for own in batch.negatives]
        zeros = bool(parts.zeros_for_empty)
        absent = torch.tensor([own is None and zeros for own in negatives], device=sequence.device)
        if absent.all():
            uncond, uncond_pooled = torch.zeros_like(sequence), torch.zeros_like(pooled)
        else:
            uncond, uncond_pooled = embed([own or "" for own in negatives])
            uncond = uncond.masked_fill(absent[:, None, None], 0)
            uncond_pooled = uncond_pooled.masked_fill(absent[:, None], 0)
        ids = time_ids(size_keys(len(batch), *batch.size))
        return Conditioning(torch.cat([uncond, sequence]), torch.cat([uncond_pooled, pooled]), torch.cat([ids, ids]))

    def kohya_unet_names(self, modules: Iterable[str]) -> dict[str, str]:
        """See `Family`: those of the original code, with which sd-scripts trains an SDXL."""
        return original_unet_names(modules)

    def edition(self, unet: Mapping[str, tuple[int, ...]], prediction: str | None) -> Edition:
        """See `Family`."""
        return Edition("stable-diffusion-xl-v1-base", ORIGINAL_CODE, "sdxl_base_v1-0")
