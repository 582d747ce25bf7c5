"""DRaFT+ in one file: a tiny SDXL learns what a reward likes, in plain torch, diffusers and peft.

DRaFT (Clark et al. 2024, arXiv 2309.17400) unrolls the sampler and ascends the reward's gradient through its last K
steps; DRaFT+ (NVIDIA NeMo-Aligner) adds a penalty to the frozen base, without which the network learns to fool the
reward:

    loss = - mean_b r(image_b, prompt_b)  +  kl * mean_{k, b, c, h, w} (eps_tuned - eps_base)^2

This is the loop of `draftp train --preset toy` without all that makes it fast, restartable and general, and with the
same numbers: tests/examples/test_draft_loop.py holds its losses, its gradient and its LoRA to those of the command.

    python examples/draft_loop.py --steps 60 --output my-lora

Shapes: B images, N sampler steps, C latent channels, H W latent size; images are float in [0, 1].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

import draftcli
from draftcli.core.batch import derived_seed
from draftcli.prompts import Shuffled, read_prompts
from draftcli.toy.reward import WEIGHTS_FOLDER

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
SIZE = 64  # pixels of an edge


@dataclass(frozen=True)
class Settings:
    """The values of presets/toy.yaml; each is an option of the command line."""

    steps: int = 60  # of the optimizer
    batch_size: int = 8  # B
    sampler_steps: int = 10  # N
    gradient_steps: int = 4  # K
    guidance: float = 5.0  # scale of classifier-free guidance
    kl: float = 12.0  # weight of the penalty
    rank: int = 16  # of the LoRA
    lr: float = 1e-3
    warmup: int = 5  # optimizer steps over which the learning rate rises
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.9  # decay of the averaged weights
    seed: int = 1234
    output: str = "my-lora"  # folder


def load_toy(settings: Settings) -> Any:
    """The toy SDXL as a diffusers pipeline, everything frozen but a new LoRA on its UNet."""
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(WEIGHTS_FOLDER / "model", add_watermarker=False)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        network.requires_grad_(False).eval().float()  # its files are in float16
    # W x + B A x, A ~ N(0, 1 / rank), B = 0: at the start tuned is base.
    torch.manual_seed(settings.seed)
    rank = settings.rank
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
    return pipe


def noise_levels(count: int) -> tuple[list[int], list[float]]:
    """The timesteps of N = `count` sampler steps, and their N + 1 noise levels, the last of them 0."""
    timesteps = draftcli.timesteps(count)  # t_i = trunc(999 - 999 i / N)
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    alphas_bar = (1 - betas).cumprod(0)  # abar_t = prod_{s <= t} (1 - beta_s)
    sigmas = ((1 - alphas_bar) / alphas_bar).sqrt()  # sigma_t^2 = (1 - abar_t) / abar_t
    return timesteps, [*sigmas[timesteps].tolist(), 0.0]


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """What the UNet is conditioned on, for [without prompt ; with prompt]: first dimension 2 B."""
    cond, uncond, pooled, uncond_pooled = pipe.encode_prompt(list(prompts), device=pipe.unet.device)
    size_keys = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * (2 * len(prompts)))  # original size, crop, target size
    added = {"text_embeds": torch.cat([uncond_pooled, pooled]), "time_ids": size_keys}
    return {"encoder_hidden_states": torch.cat([uncond, cond]), "added_cond_kwargs": added}


def objective(
    pipe: Any,
    reward_model: Callable[[Tensor, list[str]], Tensor],
    prompts: list[str],
    seeds: Sequence[int],
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one image for each prompt and seed; the loss, the mean reward and the penalty, scalars with a graph."""
    unet, vae = pipe.unet, pipe.vae
    timesteps, sigmas = noise_levels(settings.sampler_steps)
    text = encode(pipe, prompts)

    def guided_eps(x: Tensor, i: int) -> Tensor:
        unit = x / (1 + sigmas[i] ** 2) ** 0.5  # the network takes inputs of unit variance
        eps_uncond, eps_cond = unet(torch.cat([unit, unit]), timesteps[i], **text).sample.chunk(2)
        return eps_uncond + settings.guidance * (eps_cond - eps_uncond)

    # x = x_0 + sigma n. At sigma_0 it is noise, with the variance that training gave it there, 1 + sigma_0^2.
    edge = SIZE // pipe.vae_scale_factor
    shape = (unet.config.in_channels, edge, edge)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    x = noise * (1 + sigmas[0] ** 2) ** 0.5

    penalties = []  # of the last K steps; those before them carry no gradient
    for i in range(settings.sampler_steps):
        has_gradient = i >= settings.sampler_steps - settings.gradient_steps
        with torch.set_grad_enabled(has_gradient):
            eps_tuned = guided_eps(x, i)
        if has_gradient:
            # The base is the same network without its LoRA, at the same x. It does not steer the sampler.
            unet.disable_adapters()
            with torch.no_grad():
                eps_base = guided_eps(x, i)
            unet.enable_adapters()
            penalties.append((eps_tuned - eps_base).square().mean())
        # Euler's step of dx / dsigma = eps. Nothing is detached: over K steps the gradient runs through x too.
        x = x + (sigmas[i + 1] - sigmas[i]) * eps_tuned

    images = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    reward = reward_model(images, prompts).mean()
    penalty = torch.stack(penalties).mean()
    loss = -reward + settings.kl * penalty
    return loss, reward, penalty


def train(settings: Settings) -> None:
    """The loop. The run's images are numbered from 0, B a step; an image's number gives its prompt and its seed."""
    pipe = load_toy(settings)
    reward_model = draftcli.get_reward_model("toy")
    prompts = Shuffled(read_prompts("toy-train"), settings.seed)
    weights = [p for p in pipe.unet.parameters() if p.requires_grad]
    average = [w.detach().clone() for w in weights]
    optimizer = torch.optim.AdamW(weights, settings.lr, weight_decay=0.0)

    for step in range(settings.steps):
        numbers = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        texts = [prompts[n].text for n in numbers]
        seeds = [derived_seed(settings.seed, "image", n) for n in numbers]
        loss, reward, penalty = objective(pipe, reward_model, texts, seeds, settings)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1, (step + 1) / (settings.warmup + 1))
        optimizer.step()
        optimizer.zero_grad()
        # average <- d average + (1 - d) weights; d grows to its full value, so that the start is soon forgotten.
        decay = min(settings.ema, (1 + step) / (10 + step))
        for a, w in zip(average, weights, strict=True):
            a.lerp_(w.detach(), 1 - decay)
        line = f"loss {loss:.6f}  reward {reward:.6f}  kl {penalty:.3e}  gradient {norm:.6f}"
        print(f"step {step + 1}  {line}", flush=True)

    for a, w in zip(average, weights, strict=True):
        w.data = a
    # Writes pytorch_lora_weights.safetensors, which `pipe.load_lora_weights(output)` reads.
    pipe.save_lora_weights(settings.output, get_peft_model_state_dict(pipe.unet))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description="DRaFT+ on the toy world, in plain torch, diffusers and peft.")
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    train(Settings(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
