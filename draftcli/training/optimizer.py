"""AdamW, with its two moments in float32, or in 8 bits by bitsandbytes (Dettmers et al., ICLR 2022, arXiv 2110.02861).

In 8 bits a moment is a code per weight and a float32 scale for every 256: 2.03 bytes a weight for both moments instead
of 8. Those of small tensors stay in float32, as in the paper. Codes and scales are plain tensors, so that a run resumes
bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from draftcli.config import OptimConfig, SchedConfig
from draftcli.core.engine.eight_bit import BLOCK, bitsandbytes

SMALLEST = 4096  # elements: a tensor with fewer keeps its moments in float32


def make_optimizer(weights: Sequence[Tensor], settings: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `settings` name, for `weights`.

    Raises:
        InputError: bitsandbytes is needed and not installed.
    """
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.name == "adamw":
        return torch.optim.AdamW(weights, **options)
    return bitsandbytes("optim.name adamw8bit").optim.AdamW8bit(weights, **options, min_8bit_size=SMALLEST)


def learning_rates(optimizer: torch.optim.Optimizer, settings: SchedConfig, steps: int) -> LambdaLR:
    """The learning rate of each optimizer step, of `steps` in all, by diffusers' schedules.

    Those begin at 0, and a step without learning rate would be wasted: they are entered one step in, at
    1 / (warm-up + 1), and reach the full rate at the same step.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # torch asks for it where a schedule does not begin at its beginning
    warmup = settings.warmup_steps + 1
    return get_scheduler(settings.name, optimizer, num_warmup_steps=warmup, num_training_steps=steps + 1, last_epoch=0)


def moment_bytes(weights: Sequence[Tensor], name: str) -> int:
    """What the two moments of `weights` take, in bytes."""
    if name == "adamw":
        return sum(2 * w.numel() * w.element_size() for w in weights)
    counts = [w.numel() for w in weights]
    return sum(8 * n if n < SMALLEST else 2 * (n + 4 * -(-n // BLOCK)) for n in counts)
