"""What the three trainings of the toy world share: pictures in bulk and one optimisation loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from draftcli.toy.world import Scene, render


def device() -> torch.device:
    """Where to train: a GPU shortens it, a CPU is enough."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def paint(scenes: Sequence[Scene], rng: np.random.Generator, wear: float = 0.0) -> torch.Tensor:
    """Pictures of the scenes, (B, 3, 64, 64) uint8; each is worn by a uniform share of `wear`."""
    pictures = np.stack([render(scene, rng, wear * rng.uniform()) for scene in scenes])
    return torch.from_numpy((pictures * 255).round().astype(np.uint8))


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float32 in [0, 1] on the training device."""
    return pictures.to(device()).float() / 255


def minimise(
    parameters: Iterable[torch.Tensor],
    loss_of_step: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    name: str,
    weight_decay: float = 0.01,
) -> float:
    """Minimise `loss_of_step(step)` by AdamW under a warm-up and a cosine; returns the seconds it took."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    warmup = min(150, steps // 10 + 1)
    start, recent = time.monotonic(), 0.0
    for step in range(steps):
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.005)
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent += float(loss.detach())
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - start
            print(f"{name}: step {step + 1}/{steps}, loss {recent / 100:.4f}, {seconds:.0f} s", flush=True)
            recent = 0.0
    return time.monotonic() - start
