"""Stable Diffusion XL as a family: text, size keys, UNet, decoder, schedule.

Shape legend: B images, L text tokens (77), D text width (2048 in SDXL: 768 of CLIP-L beside 1280 of OpenCLIP bigG),
D2 pooled width (1280), C latent channels (4), H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from draftcli.core.batch import Batch
from draftcli.core.models.family import Conditioning, Embedding, Parts, latent_factor, tokenize
from draftcli.core.models.guidance_embedding import guidance_embedding
from draftcli.core.models.original_layout import Original, original_layout
from draftcli.core.models.size_keys import size_keys, time_ids
from draftcli.core.models.tiles import decode_in_tiles
from draftcli.core.precision import wide_default
from draftcli.core.schedule import Schedule, make_schedule

SDXL_CONFIG = Path(__file__).with_name("sdxl_config")
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"


class SDXL:
    """Two text encoders, size keys, a schedule with SDXL's betas."""

    name = "sdxl"
    title = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
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
    tag = "stable-diffusion-xl"
    architecture = "stable-diffusion-xl-v1-base"
    kohya_version = "sdxl_base_v1-0"

    def build(self, part: str, settings: Mapping[str, Any]) -> nn.Module:
        """See `Family`."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        diffusion: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        if part in diffusion:
            return diffusion[part].from_config(settings)
        encoder = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
        return encoder(CLIPTextConfig(**settings))

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
        absent = torch.tensor([own is None and parts.zeros_for_empty for own in negatives], device=sequence.device)
        if absent.all():
            uncond, uncond_pooled = torch.zeros_like(sequence), torch.zeros_like(pooled)
        else:
            uncond, uncond_pooled = embed([own or "" for own in negatives])
            uncond = uncond.masked_fill(absent[:, None, None], 0)
            uncond_pooled = uncond_pooled.masked_fill(absent[:, None], 0)
        ids = time_ids(size_keys(len(batch), *batch.size))
        return Conditioning(torch.cat([uncond, sequence]), torch.cat([uncond_pooled, pooled]), torch.cat([ids, ids]))

    def predict(self, unet: Any, x: Tensor, timestep: int, cond: Conditioning, guidance: float | None = None) -> Tensor:
        """See `Family`; x (2 B, C, H, W) for a doubled batch."""
        seen, width = x.to(cond.prompt_embeds.dtype), getattr(unet.config, "time_cond_proj_dim", None)
        told = None if width is None or guidance is None else guidance_embedding(guidance, width).to(seen)
        output = unet(
            seen,
            torch.tensor(timestep, device=x.device),
            timestep_cond=None if told is None else told.expand(len(x), -1),
            encoder_hidden_states=cond.prompt_embeds,
            added_cond_kwargs={"text_embeds": cond.text_embeds, "time_ids": cond.time_ids},
            return_dict=False,
        )[0]
        return output.to(x.dtype)

    def decode(self, vae: Any, latents: Tensor, tile: int | None = None) -> Tensor:
        """See `Family`. Saturated pixels get no gradient, as in the reference."""
        scaled = _as_encoded(vae.config, latents).to(next(vae.parameters()).dtype)

        def decode_all(z: Tensor) -> Tensor:
            return vae.decode(z, return_dict=False)[0]

        factor = latent_factor(vae)
        pixels = decode_all(scaled) if tile is None else decode_in_tiles(decode_all, scaled, tile // factor, factor)
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def original_layout(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Original]:
        """See `Family`."""
        return original_layout(part, shapes)

    def schedule(
        self, parts: Parts, steps: int, spacing: Literal["trailing", "leading"], timesteps: Sequence[int] = ()
    ) -> Schedule:
        """See `Family`."""
        return make_schedule(steps, spacing, parts.zero_terminal_snr, timesteps)


def _as_encoded(config: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as the VAE's encoder had them: scaled back, and moved back where its configuration says so,
    as diffusers' pipeline does it.
    """
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return latents / config.scaling_factor
    mean, std = (latents.new_tensor(values)[:, None, None] for values in (mean, std))
    return latents * std / config.scaling_factor + mean
