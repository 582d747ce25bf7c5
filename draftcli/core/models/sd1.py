"""Stable Diffusion 1.x and 2.x as a family: one text encoder, UNet, and no other input.

Shape legend: B images, L text tokens (77), D text width (768 of CLIP-L in 1.x, 1024 of OpenCLIP-H in 2.x), C latent
channels (4), H W latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from draftcli.core.batch import Batch
from draftcli.core.models.family import Conditioning, Embedding, Parts, tokenize
from draftcli.core.models.latent import LatentDiffusion
from draftcli.core.models.original_layout import Original
from draftcli.core.precision import wide_default
from draftcli.errors import InputError

SD1_CONFIG = Path(__file__).with_name("sd1_config")
SD1_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class SD1(LatentDiffusion):
    """One text encoder whose last hidden layer is read; no negative prompt is the empty prompt.

    2.x differs in its folders alone: their text encoder ends one layer early (23 of 24), so that its last layer is the
    one that the model was trained with, and the scheduler says v_prediction where it is so.
    """

    name = "sd1"
    title = "Stable Diffusion 1 and 2"
    short = "SD 1.x"
    pipeline = "StableDiffusionPipeline"
    options = MappingProxyType({"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False})
    hub_base = SD1_BASE
    hub_license = "creativeml-openrail-m"
    config_folder = SD1_CONFIG
    networks = MappingProxyType({"unet": "unet", "vae": "vae decoder", "text_encoder": "text encoder"})
    tag = "stable-diffusion"
    architecture = "stable-diffusion-v1"
    kohya_version = "sd_v1"
    added_input = None
    zeros_for_empty = False

    def encode_prompts(self, parts: Parts, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See `Family`: the last layer, with the final norm, 77 tokens. Nothing is pooled: (B, 0)."""
        (tokens,), (encoder,) = tokenize(parts, prompts), parts.text_encoders
        with wide_default(encoder.dtype):
            sequence = encoder(tokens.to(encoder.device)).last_hidden_state
        return sequence, sequence.new_zeros(len(sequence), 0)

    def condition(
        self, parts: Parts, embed: Callable[[Sequence[str]], Embedding], batch: Batch, negative: str | None
    ) -> Conditioning:
        """See `Family`: [unconditional ; conditional]. An absent negative prompt is the empty one."""
        negatives = [negative if own is None else own for own in batch.negatives]
        uncond, _ = embed([own or "" for own in negatives])
        sequence, _ = embed(batch.prompts)
        return Conditioning(torch.cat([uncond, sequence]))

    def predict(self, unet: Any, x: Tensor, timestep: int, cond: Conditioning) -> Tensor:
        """See `Family`; x (2 B, C, H, W) for a doubled batch."""
        output = unet(
            x.to(cond.prompt_embeds.dtype),
            torch.tensor(timestep, device=x.device),
            encoder_hidden_states=cond.prompt_embeds,
            return_dict=False,
        )[0]
        return output.to(x.dtype)

    def original_layout(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Original]:
        """See `Family`.

        Raises:
            InputError: always; single files are read for SDXL alone.
        """
        raise InputError(f"a single file of {self.title} is not read yet: take the model as a diffusers folder")
