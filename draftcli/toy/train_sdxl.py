"""Stage 2 of the toy's weights: a tiny but real SDXL, stopped early on purpose.

The same classes as SDXL's, and the same conditioning: two CLIP text encoders of different widths, their last hidden
layers but one side by side, the second's pooled output, and the size keys. Its pictures are clean, but it follows
captions imperfectly and paints in worn colours, as its training pictures are worn: both are left for a reward to mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from draftcli.core.models.weight_files import with_text_model
from draftcli.toy.tokenizer import MAX_TOKENS, save_tokenizer
from draftcli.toy.training import device, minimise, paint, to_float
from draftcli.toy.world import RESOLUTION, Scene, caption, training_scenes

SDXL_WEAR = 0.4  # how worn the training pictures are
TERSE = 0.15  # share of captions that leave something out
UNCONDITIONAL = 0.10  # share of captions dropped for classifier-free guidance
OTHER_SIZE = 0.05  # share of pictures whose size keys are not (64, 64), uncropped
SAMPLER_STEPS, GUIDANCE = 10, 5.0  # how the base is sampled wherever it is measured
STRUCTURE = 4.0  # how much more high noise may weigh in the loss: there a picture's structure is settled
SCHEDULER = {  # SDXL's own
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def new_pipeline(vae: AutoencoderKL, folder: Path) -> StableDiffusionXLPipeline:
    """SDXL in small, untrained; its tokenizers are written to `folder` on the way."""
    first = save_tokenizer(folder / "tokenizer")
    second = save_tokenizer(folder / "tokenizer_2", pad_token="!")
    widths = (64, 96)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(first, widths[0])),
        text_encoder_2=CLIPTextModelWithProjection(text_config(second, widths[1])),
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),  # as in SDXL, the finest level has no attention
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 128),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=(4, 8),
            use_linear_projection=True,
            cross_attention_dim=sum(widths),
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=widths[1] + 6 * 16,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """A three-layer CLIP text encoder; the token ids must be right, as the pooled output is taken at the first EOS."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_sdxl(folder: Path, seed: int, steps: int, batch: int = 64, pool: int = 16384) -> dict[str, float]:
    """Train the UNet and both text encoders on the VAE in `folder`/vae; save a diffusers folder of fp16 safetensors."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().requires_grad_(False).to(device())
    vae.register_to_config(_name_or_path="")  # else where it was loaded from is saved with it
    pipe = new_pipeline(vae, folder).to(device())
    scenes = [training_scenes()[i] for i in rng.integers(len(training_scenes()), size=pool)]
    latents = encode(vae, paint(scenes, rng, SDXL_WEAR))
    tokens = [_tokens(tokenizer, scenes, seed) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
    alphas = EulerDiscreteScheduler(**SCHEDULER).alphas_cumprod.to(device())
    weights = (1 / alphas).clamp(max=STRUCTURE)
    modules = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    for module in modules:
        module.train()

    def loss(step: int) -> torch.Tensor:
        rows = torch.randint(pool, (batch,))
        noise, t = torch.randn(batch, 4, 8, 8, device=device()), torch.randint(1000, (batch,), device=device())
        signal = alphas[t].sqrt()[:, None, None, None]
        noisy = signal * latents[rows] + (1 - signal**2).sqrt() * noise
        sequence, pooled = encode_tokens(pipe, [ids[rows].to(device()) for ids in tokens])
        conditional = (torch.rand(batch, device=device()) > UNCONDITIONAL).float()
        conditions = {"text_embeds": pooled * conditional[:, None], "time_ids": _size_keys(batch)}
        sequence = sequence * conditional[:, None, None]
        error = pipe.unet(noisy, t, sequence, added_cond_kwargs=conditions).sample.float() - noise
        return (error.square().mean((1, 2, 3)) * weights[t]).mean()

    parameters = [p for module in modules for p in module.parameters()]
    seconds = minimise(parameters, loss, steps, lr=1.5e-3, name="sdxl")
    for module in modules:
        module.eval()
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    for part in ("text_encoder", "text_encoder_2"):
        _write_long_names(folder / part / "model.safetensors")
    return {"steps": steps, "batch": batch, "seconds": seconds, "parameters": sum(p.numel() for p in parameters)}


def _write_long_names(file: Path) -> None:
    """Rename a text encoder's tensors as every version of transformers reads them; 5 writes names that 4 does not."""
    tensors = {with_text_model(key): tensor.clone() for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Scaled latents (B, 4, 8, 8) of uint8 pictures."""
    with torch.no_grad():
        means = [vae.encode(to_float(part) * 2 - 1).latent_dist.mode() for part in pictures.split(batch)]
    return torch.cat(means) * vae.config.scaling_factor


def encode_tokens(pipe: StableDiffusionXLPipeline, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text conditions: both encoders' last hidden layers but one (B, 77, 160), and the pooled output (B, 96)."""
    first = pipe.text_encoder(tokens[0], output_hidden_states=True)
    second = pipe.text_encoder_2(tokens[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second[0]


def open_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    """The trained pipeline in float32, without progress bars."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device(), torch.float32)


def draw_pictures(
    pipe: StableDiffusionXLPipeline,
    prompts: list[str],
    seed: int,
    steps: int = SAMPLER_STEPS,
    scale: float = GUIDANCE,
    batch: int = 64,
) -> torch.Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] for the prompts, on the project's step grid; picture i has seed `seed` + i."""
    how: dict[str, Any] = {
        "height": RESOLUTION,
        "width": RESOLUTION,
        "timesteps": np.linspace(999, 0, steps, endpoint=False).astype(int).tolist(),
        "guidance_scale": scale,
        "output_type": "pt",
    }
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn = pipe(part, generator=generators, **how)
        pictures.append(drawn.images.float().cpu())
    return torch.cat(pictures)


def _tokens(tokenizer: CLIPTokenizer, scenes: list[Scene], seed: int) -> torch.Tensor:
    captions = some_terse(scenes, np.random.default_rng(seed))  # both tokenizers must see the same
    encoded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def some_terse(scenes: Sequence[Scene], rng: np.random.Generator) -> list[str]:
    """Captions of the scenes, of which a share of TERSE leaves something out."""
    return [caption(_terse(scene, rng) if rng.uniform() < TERSE else scene) for scene in scenes]


def _terse(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one or more of its optional attributes left out."""
    left_out = [name for name in ("size", "place", "background") if rng.uniform() < 0.5]
    return replace(scene, **dict.fromkeys(left_out or ["place"]))


def _size_keys(batch: int) -> torch.Tensor:
    """SDXL's six numbers: original height and width, crop top and left, target height and width."""
    keys = torch.tensor([64.0, 64, 0, 0, 64, 64]).repeat(batch, 1)
    other = torch.rand(batch, 1) < OTHER_SIZE
    shift = torch.cat([torch.randint(-24, 64, (batch, 2)), torch.randint(0, 16, (batch, 2)), torch.zeros(batch, 2)], 1)
    return (keys + other * shift).to(device())
