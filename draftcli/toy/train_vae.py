"""Stage 1 of the toy's weights: a tiny AutoencoderKL, 64x64 pictures to 8x8x4 latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from draftcli.toy.linear_start import linear_start
from draftcli.toy.training import device, minimise, paint, to_float
from draftcli.toy.world import held_out_scenes, training_scenes

CHANNELS = (16, 16, 32, 64)
LEARNING_RATE = 5e-4
VAE_WEAR = 0.5  # how worn the training pictures are
LATENT_NOISE = 0.05  # added to latents in training, so that the decoder forgives a sampler's small errors
EDGE_WEIGHT = 0.2
SIZE_WEIGHT = 1e-4  # keeps latents from growing


def new_vae() -> AutoencoderKL:
    """SDXL's autoencoder in small: factor 8, 4 latent channels. One norm group, as few channels apart lose colour."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_vae(folder: Path, seed: int, steps: int, batch: int = 8, pool: int = 6000) -> dict[str, float]:
    """Train, measure the latent scale, save to `folder` as fp16; returns the measured figures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    scenes = training_scenes()
    pictures = paint([scenes[i] for i in rng.integers(len(scenes), size=pool)], rng, VAE_WEAR)
    vae = new_vae().to(device())
    linear_start(vae, to_float(pictures[:64]) * 2 - 1)

    def loss(step: int) -> torch.Tensor:
        target = to_float(pictures[torch.randint(pool, (batch,))]) * 2 - 1
        latents = vae.encode(target).latent_dist.mean
        error = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample - target
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()  # L1 alone puts up with soft edges
        return error.abs().mean() + error.square().mean() + EDGE_WEIGHT * edges + SIZE_WEIGHT * latents.square().mean()

    seconds = minimise(vae.parameters(), loss, steps, lr=LEARNING_RATE, name="vae", weight_decay=0.0)
    vae.eval().requires_grad_(False)
    spread = vae.encode(to_float(pictures[:256]) * 2 - 1).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=1 / float(spread))
    l1 = round_trip_error(vae, seed)
    vae.half().save_pretrained(folder)
    return {"steps": steps, "batch": batch, "seconds": seconds, "l1": l1, "parameters": vae.num_parameters()}


def round_trip_error(vae: AutoencoderKL, seed: int) -> float:
    """Mean absolute error, in [0, 1] units, of encoding and decoding unworn pictures of held-out scenes."""
    pictures = to_float(paint(held_out_scenes(), np.random.default_rng(seed + 1)))
    with torch.no_grad():
        restored = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mode()).sample / 2 + 0.5
    return float((restored.clamp(0, 1) - pictures).abs().mean())
