"""What the families that diffuse latents with diffusers' UNet and AutoencoderKL have in common.

Shape legend: B images, C latent channels (4), H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from draftcli.core.models.family import Conditioning, Parts, latent_factor
from draftcli.core.models.guidance_embedding import timestep_condition
from draftcli.core.models.original_layout import Original, original_layout
from draftcli.core.models.tiles import decode_in_tiles
from draftcli.core.schedule import Schedule, make_schedule


class LatentDiffusion:
    """Networks, decoder and schedule; see `Family`. How prompts become the UNet's inputs is each family's own."""

    original_prefixes: Mapping[str, str]

    def build(self, part: str, settings: Mapping[str, Any]) -> nn.Module:
        """See `Family`."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        diffusion: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        if part in diffusion:
            return diffusion[part].from_config(settings)
        encoder = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
        return encoder(CLIPTextConfig(**settings))

    def predict(self, unet: Any, x: Tensor, timestep: int, cond: Conditioning, guidance: float | None = None) -> Tensor:
        """See `Family`; x (2 B, C, H, W) for a doubled batch."""
        seen = x.to(cond.prompt_embeds.dtype)
        added: dict[str, Any] = {}
        if cond.text_embeds is not None:
            added = {"added_cond_kwargs": {"text_embeds": cond.text_embeds, "time_ids": cond.time_ids}}
        output = unet(
            seen,
            torch.tensor(timestep, device=x.device),
            **timestep_condition(unet, seen, guidance),
            encoder_hidden_states=cond.prompt_embeds,
            **added,
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
        return original_layout(part, shapes, self.original_prefixes[part])

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
