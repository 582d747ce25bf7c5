"""What the families that diffuse latents with diffusers' UNet and AutoencoderKL have in common.

Shape legend: B images, C latent channels (4), H W latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from draftcli.core.models.family import Parts, latent_factor
from draftcli.core.models.tiles import decode_in_tiles
from draftcli.core.schedule import Schedule, make_schedule


class LatentDiffusion:
    """Networks, decoder and schedule; see `Family`. Text and the UNet's inputs are each family's own."""

    def build(self, part: str, settings: Mapping[str, Any]) -> nn.Module:
        """See `Family`."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        diffusion: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
        if part in diffusion:
            return diffusion[part].from_config(settings)
        encoder = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
        return encoder(CLIPTextConfig(**settings))

    def decode(self, vae: Any, latents: Tensor, tile: int | None = None) -> Tensor:
        """See `Family`. Saturated pixels get no gradient, as in the reference."""
        scaled = _as_encoded(vae.config, latents).to(next(vae.parameters()).dtype)

        def decode_all(z: Tensor) -> Tensor:
            return vae.decode(z, return_dict=False)[0]

        factor = latent_factor(vae)
        pixels = decode_all(scaled) if tile is None else decode_in_tiles(decode_all, scaled, tile // factor, factor)
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

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
