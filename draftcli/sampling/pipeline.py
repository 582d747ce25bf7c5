"""AIG in plain diffusers: `annealed(pipe, weight)` makes a pipeline with a LoRA draw annealed pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from draftcli.core.lora.adapters import adapters_off, lora_layers
from draftcli.core.weighings import Weighing, weighing
from draftcli.errors import InputError


@contextmanager
def annealed(pipe: Any, weight: str | Weighing = "linear") -> Iterator[Any]:
    """Inside, `pipe` draws with Annealed Importance Guidance between its UNet without and with its LoRAs.

    The pictures are those of `draftp anneal` to rounding. What is mixed is the UNet's raw output; guidance and
    predictions are linear in it, so mixing before them is mixing after them (`guidance_rescale`, which is not linear,
    aside). A LoRA's part for the text encoders stays on.

    Args:
        pipe: a StableDiffusionXLPipeline, or one whose `unet` is called once a scheduler's timestep, with LoRAs loaded
            and not fused.
        weight: a kind as `draftp anneal --weight` takes it, or a function of (sigma_i, sigma_next, i, total).

    Yields:
        pipe itself.

    Raises:
        InputError: no LoRA on the UNet, it is fused, or the weight is unknown or not in [0, 1].
    """
    weigh = weighing(weight) if isinstance(weight, str) else weight
    layers = lora_layers(pipe.unet)
    if not layers:
        raise InputError("there is no LoRA on pipe.unet to anneal; load one with pipe.load_lora_weights first")
    if any(layer.merged for layer in layers):
        raise InputError("the LoRA is fused into pipe.unet and cannot be switched off; call pipe.unfuse_lora() first")
    tuned, own = pipe.unet.forward, vars(pipe.unet).get("forward")  # its own where hooks (offloading) are set
    seen: list[int] = []  # the last timestep, as often as the network was asked about it in a row

    def forward(sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        t = int(timestep)
        seen[:] = [*seen, t] if seen[-1:] == [t] else [t]
        w = _weight(weigh, pipe.scheduler, t, len(seen) - 1)
        if w == 1:
            return tuned(sample, timestep, *args, **kwargs)
        with adapters_off(pipe.unet):
            base = tuned(sample, timestep, *args, **kwargs)
        return base if w == 0 else _mix(base, tuned(sample, timestep, *args, **kwargs), w)

    pipe.unet.forward = forward
    try:
        yield pipe
    finally:
        if own is None:
            del pipe.unet.forward
        else:
            pipe.unet.forward = own


def _weight(weigh: Weighing, scheduler: Any, timestep: int, repeats: int) -> float:
    """The weight of the step that a call at `timestep` belongs to; Heun asks about inner timesteps twice."""
    timesteps = [int(t) for t in scheduler.timesteps]
    places = [i for i, t in enumerate(timesteps) if t == timestep]
    if not places:
        raise InputError(f"pipe.unet was asked about timestep {timestep}, which is none of pipe.scheduler's")
    i, total = places[repeats % len(places)] // scheduler.order, -(-len(timesteps) // scheduler.order)
    later = [t for t in timesteps[i * scheduler.order :] if t < timesteps[i * scheduler.order]]
    sigmas = [_sigma(scheduler, t) for t in (timesteps[i * scheduler.order], *later[:1])]
    w = float(weigh(sigmas[0], sigmas[1] if later else 0.0, i, total))
    if not 0 <= w <= 1:
        raise InputError(f"the weight at step {i} of {total} is {w:g}; it must be in [0, 1]")
    return w


def _sigma(scheduler: Any, timestep: int) -> float:
    alpha_bar = float(scheduler.alphas_cumprod[timestep])
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def _mix(base: Any, tuned: Any, weight: float) -> Any:
    """Of the UNet's outputs as it returns them: a tuple, or an object with `sample`."""
    if isinstance(base, Sequence):
        return ((1 - weight) * base[0] + weight * tuned[0],)
    base.sample = (1 - weight) * base.sample + weight * tuned.sample
    return base
