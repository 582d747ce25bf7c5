"""DRaFT+ as a competent user of diffusers and peft would write it in an afternoon: what ours is measured against.

The same maths as draftcli.core.draftp, the same loss and gradient (tests/benchmarks/test_train_step.py), and none of
its levers: text encoders on every step, one micro-batch size for everything, the LoRA beside the weights throughout,
one backward through decoder and network with diffusers' own activation checkpointing, as memory demands at SDXL size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from peft import LoraConfig
from torch import Tensor

import draftcli


class PlainLoop:
    """Loss and gradient of DRaFT+ for prompts and seeds.

    Args:
        modules: vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet (without LoRA, frozen here).
        reward: (images (B, 3, H, W) in [0, 1], prompts) -> (B,).
        rank: of the LoRA.
        targets: its modules.
        steps: N.
        scale: of guidance.
        k: steps with gradient.
        kl_coeff: weight of the penalty.
        micro_batch_size: images per backward.
        checkpointing: recompute activations in backward.
        phase: a context by name around each phase, to measure it.
    """

    def __init__(
        self,
        modules: dict[str, Any],
        reward: Callable[[Tensor, list[str]], Tensor],
        *,
        rank: int,
        targets: list[str],
        steps: int,
        scale: float,
        k: int,
        kl_coeff: float,
        micro_batch_size: int,
        checkpointing: bool = True,
        phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        # Its annotations are narrower than what it takes.
        self.pipe: Any = StableDiffusionXLPipeline(**modules, scheduler=cast(Any, scheduler), add_watermarker=False)
        self.unet, self.vae, self.reward, self.phase = self.pipe.unet, self.pipe.vae, reward, phase
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"))
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        scheduler.set_timesteps(timesteps=draftcli.timesteps(steps))
        self.timesteps, self.sigmas = scheduler.timesteps, scheduler.sigmas.tolist()
        self.steps, self.scale, self.k, self.kl_coeff, self.micro = steps, scale, k, kl_coeff, micro_batch_size

    def step(self, prompts: list[str], seeds: list[int], size: tuple[int, int]) -> tuple[float, float, float]:
        """Loss, reward and KL of the batch; its gradient is added to the LoRA's `.grad`."""
        totals = torch.zeros(3, dtype=torch.float64)
        for i in range(0, len(prompts), self.micro):
            part = prompts[i : i + self.micro]
            loss, reward, kl = self._forward(part, seeds[i : i + self.micro], size)
            share = len(part) / len(prompts)
            with self.phase("backward"):
                (share * loss).backward()
            totals += share * torch.stack([loss.detach(), reward.detach(), kl]).cpu()
        return tuple(totals.tolist())

    def _forward(self, prompts: list[str], seeds: list[int], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        device, dtype = self.unet.device, self.unet.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with self.phase("text"), torch.no_grad():
            cond, uncond, pooled, uncond_pooled = self.pipe.encode_prompt(prompts, device=device)
        context = torch.cat([uncond, cond]).to(dtype)
        ids = torch.tensor([[*size, 0, 0, *size]] * (2 * len(prompts)), device=device)
        added = {"text_embeds": torch.cat([uncond_pooled, pooled]).to(dtype), "time_ids": ids}
        shape = (self.unet.config.in_channels, *(edge // self.pipe.vae_scale_factor for edge in size))
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = torch.stack(noise).to(device, wide) * (self.sigmas[0] ** 2 + 1) ** 0.5

        def noise_estimate(x: Tensor, i: int) -> Tensor:
            inputs = torch.cat([x, x]) / (self.sigmas[i] ** 2 + 1) ** 0.5
            half = dtype in (torch.bfloat16, torch.float16)
            with torch.autocast(device.type, dtype, enabled=half):
                out = self.unet(
                    inputs.to(dtype),
                    self.timesteps[i].to(device),
                    encoder_hidden_states=context,
                    added_cond_kwargs=added,
                    return_dict=False,
                )[0]
            without, with_prompt = out.to(wide).chunk(2)
            return without + self.scale * (with_prompt - without)

        penalty = torch.zeros((), device=device, dtype=wide)
        for i in range(self.steps):
            with_gradient = i >= self.steps - self.k
            with self.phase("gradient steps" if with_gradient else "prefix"), torch.set_grad_enabled(with_gradient):
                eps = noise_estimate(x, i)
            if with_gradient:
                with self.phase("base pass"), torch.no_grad():
                    self.unet.disable_adapters()
                    base = noise_estimate(x, i)
                    self.unet.enable_adapters()
                penalty = penalty + (eps - base).square().mean() / self.k
            x = x + (self.sigmas[i + 1] - self.sigmas[i]) * eps
        with self.phase("decode"):
            latents = (x / self.vae.config.scaling_factor).to(self.vae.dtype)
            image = (self.vae.decode(latents, return_dict=False)[0].to(wide) / 2 + 0.5).clamp(0, 1)
        with self.phase("reward"):
            reward = self.reward(image, prompts).mean()
        return -reward + self.kl_coeff * penalty, reward, penalty.detach()
