"""Stable Diffusion 1.x and 2.x as a family: one text encoder, UNet, and no other input.

Shape legend: B images, L text tokens (77), D text width (768 of CLIP-L in 1.x, 1024 of OpenCLIP-H in 2.x), C latent
channels (4), H W latent size.
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
from draftcli.core.models.original_layout import ORIGINAL_UNET, ORIGINAL_VAE, Original
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
    original_prefixes = MappingProxyType(
        {"unet": ORIGINAL_UNET, "vae": ORIGINAL_VAE, "text_encoder": "cond_stage_model.transformer."}
    )
    kohya_prefixes = MappingProxyType({"unet": "lora_unet_", "text_encoder": "lora_te_"})
    tag = "stable-diffusion"
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

    def original_layout(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Original]:
        """See `Family`.

        Raises:
            InputError: a tensor has no place there; or the model is a 2.x, whose text encoder a single file has in
                OpenCLIP's form and with the last layer, which a diffusers folder leaves out.
        """
        if part == "unet" and _is_second(shapes):
            raise InputError(
                "a single file of Stable Diffusion 2 has a layer of the text encoder that a diffusers folder lacks; "
                "take the model as a diffusers folder, and merge-lora's result with --format diffusers"
            )
        return super().original_layout(part, shapes)

    def kohya_unet_names(self, modules: Iterable[str]) -> dict[str, str]:
        """See `Family`: diffusers' own, with whose UNet sd-scripts trains these models."""
        return {module: module for module in modules}

    def edition(self, unet: Mapping[str, tuple[int, ...]], prediction: str | None) -> Edition:
        """See `Family`."""
        of_v = prediction == "v_prediction"
        if not _is_second(unet):
            return Edition("stable-diffusion-v1", "diffusers", "sd_v1_v" if of_v else "sd_v1")
        size = "768-v" if of_v else "512"
        return Edition(f"stable-diffusion-v2-{size}", "diffusers", "sd_v2_v" if of_v else "sd_v2", v2=True)


def _is_second(unet: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a UNet is that of a 2.x, whose attention is entered by linear layers instead of convolutions.

    Args:
        unet: shapes of its tensors or weights.
    """
    return any(len(shape) == 2 for name, shape in unet.items() if name.endswith(("proj_in", "proj_in.weight")))
