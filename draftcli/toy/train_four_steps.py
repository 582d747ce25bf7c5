"""Stage 4 of the toy's weights: a LoRA with which the base draws in 4 steps without guidance, as few-step SDXLs do.

The base walks with guidance from noise to picture in 12 steps, and every third of its levels is one of the four. The
LoRA is trained on its own walk from the same noise: each of its steps shall land where the base was at the next level
(progressive distillation, Salimans and Ho 2022, arXiv 2202.00512, along the student's own trajectory). Four evaluations
then do the work of 24.

Shape legend: B pictures, C latent channels, H W latent size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftcli import SDXLDRaFTPModel, load_config
from draftcli.core.batch import Batch, derived_seed
from draftcli.core.denoise import euler_step
from draftcli.core.lora.adapters import lora_state_dict, save_lora
from draftcli.toy.train_sdxl import GUIDANCE, some_terse
from draftcli.toy.training import minimise
from draftcli.toy.world import RESOLUTION, training_scenes

TEACHER_STEPS = 12
FOUR_LEVELS = (999, 749, 499, 249)  # every third of the teacher's
RANK = 24
STUDENT_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
)


def train_four_steps(
    model: Path, output: Path, seed: int, steps: int, batch: int = 32, walks: int = 4096
) -> dict[str, float]:
    """Train the LoRA on the base in `model`; save it to `output` as diffusers reads it, in fp16.

    Args:
        model: a diffusers folder.
        output: the LoRA's folder.
        seed: of everything.
        steps: of training.
        batch: pictures a step.
        walks: how many of the base's there are to learn from.

    Returns:
        What was run, for provenance.json.
    """
    student = SDXLDRaFTPModel(_settings(model, timesteps=list(FOUR_LEVELS), scale=1.0, seed=seed))
    teacher = SDXLDRaFTPModel(_settings(model, steps=TEACHER_STEPS, scale=GUIDANCE, seed=seed), student.parts)
    rng = np.random.default_rng(seed)
    scenes = [training_scenes()[i] for i in rng.integers(len(training_scenes()), size=walks)]
    seeds = [derived_seed("walk", seed, i) for i in range(walks)]
    data = Batch(some_terse(scenes, rng), seeds, (RESOLUTION, RESOLUTION))
    visited = torch.cat([_teachers_walk(teacher, part) for part in data.split(64)])
    generator = torch.Generator().manual_seed(seed)
    levels = student.sampler.levels()

    def loss(step: int) -> torch.Tensor:
        rows = torch.randint(walks, (batch,), generator=generator).tolist()
        predict, x = student.networks.tuned(student.encode(data.some(rows))), visited[rows, 0]
        errors = []
        for level, target in zip(levels, visited[rows].unbind(1)[1:], strict=True):
            landed = euler_step(x, predict(x, level), level)
            errors.append((landed - target).square().mean() / (1 + level.sigma_next**2))
            x = landed.detach()
        return torch.stack(errors).sum()

    seconds = minimise(student.trainable_parameters, loss, steps, lr=2e-3, name="four_steps")
    layers = {name: tensor.detach().half() for name, tensor in lora_state_dict(student.unet).items()}
    save_lora(student.unet, output, layers)
    return {
        "steps": steps,
        "batch": batch,
        "walks": walks,
        "teacher_steps": TEACHER_STEPS,
        "rank": RANK,
        "seconds": seconds,
        "parameters": sum(tensor.numel() for tensor in layers.values()),
    }


def _settings(model: Path, *, scale: float, seed: int, **grid: Any) -> Any:
    values = {
        "model.pretrained": str(model),
        "sampling.height": RESOLUTION,
        "sampling.width": RESOLUTION,
        "sampling.scale": scale,
        **{f"sampling.{key}": value for key, value in grid.items()},
        "draftp.truncation_steps": 1,
        "peft.rank": RANK,
        "peft.target_modules": list(STUDENT_TARGETS),
        "trainer.seed": seed,
    }
    return load_config(None, values=values)


@torch.no_grad()
def _teachers_walk(teacher: SDXLDRaFTPModel, batch: Batch) -> torch.Tensor:
    """Where the base is at each of FOUR_LEVELS and at the end, (B, 5, C, H, W)."""
    predict, x = teacher.networks.base(teacher.encode(batch)), teacher.networks.start(batch)
    visited, stride = [x], TEACHER_STEPS // len(FOUR_LEVELS)
    for start in range(0, TEACHER_STEPS, stride):
        visited.append(teacher.sampler.walk(predict, visited[-1], start=start, stop=start + stride))
    return torch.stack(visited, dim=1)
