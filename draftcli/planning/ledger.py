"""What a training computes for each image, before it runs: UNet evaluations, FLOP, and bytes moved to the GPU.

Nothing is timed. torch counts the FLOP of one evaluation and its backward, of decoder and rewards, on tensors without
data (planning/rehearsal.py); the gradient mode says how many of each an image takes. Matrix products and convolutions
count, a multiplication and an addition as two; what is element by element does not, nor do prompts, which are encoded
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from draftcli.config import Config
from draftcli.core.batch import Batch
from draftcli.core.denoise import Predict, Sampler
from draftcli.core.gradient.mode import GradientMode, make_mode, recomputes_steps
from draftcli.core.phase import Phase
from draftcli.core.prefix import evaluations_per_step
from draftcli.core.rollout import Rollout
from draftcli.core.schedule import make_schedule
from draftcli.planning.rehearsal import NamedRewards, of_one_evaluation, one_image, remembered, weights_of
from draftcli.planning.repeated_layers import RepeatedLayers
from draftcli.planning.without_data import WithoutData

RATES = (100, 400, 790)
SMALL_RATES = (10, 100, 1000)
"""TFLOP/s of GPUs that people rent, at most of which a training reaches a half; GFLOP/s of a CPU, for small models."""


@dataclass(frozen=True)
class Ledger:
    """The work of one image in training, and what a step moves.

    Attributes:
        evaluations: UNet evaluations by phase; a guided step takes two. In Phase.BACKWARD: those that are followed by
            one.
        flop: by phase.
        moved: bytes that an optimizer step moves between the computer's memory and the GPU.
    """

    evaluations: dict[Phase, float]
    flop: dict[Phase, float]
    moved: int

    @property
    def forward(self) -> float:
        """UNet evaluations, of tuned and base."""
        return sum(count for phase, count in self.evaluations.items() if phase is not Phase.BACKWARD)

    @property
    def total(self) -> float:
        """FLOP of all phases."""
        return sum(self.flop.values())


@dataclass(frozen=True)
class UnitWork:
    """FLOP of one image.

    Attributes:
        base: of a UNet evaluation without the LoRA, or with it folded.
        tuned: with the LoRA.
        backward: of the backward of one that begins a piece: its input needs no gradient.
        backward_through: where it does, as in the last K - 1 of K steps.
        decode: latents to an image.
        reward: its score; and those of the held-out rewards that training asks.
        judging: the backward of both.
    """

    base: int
    tuned: int
    backward: int
    backward_through: int
    decode: int
    reward: int
    judging: int


def unit_work(cfg: Config, folder: Path) -> UnitWork:
    """Count the work of one image at the largest size that is trained on, checkpointing and tiles included.

    Args:
        cfg: the settings.
        folder: with the configurations of the model's networks.
    """
    return _unit_work(*of_one_evaluation(cfg), folder)


@remembered
def _unit_work(cfg: Config, named: NamedRewards, asked: NamedRewards, folder: Path) -> UnitWork:
    level = make_schedule(2).level(1)
    with one_image(cfg, folder, named, asked) as (model, batch, (rewards, held_out)):
        nets, networks = model.networks, [*model.parts.modules.values(), rewards, held_out]
        with WithoutData():
            cond, x = nets.encode(batch), nets.start(batch)

        def counted(work: Callable[[], Any]) -> int:
            return _flop(work, networks)

        def stepped(through: bool) -> None:
            nets.tuned(cond)(x.detach().requires_grad_(through), level).sum().backward()

        def judged() -> None:
            rewards(nets.decode(x.detach().requires_grad_()), list(batch.prompts)).sum().backward()

        with torch.no_grad():
            base, tuned = counted(lambda: nets.base(cond)(x, level)), counted(lambda: nets.tuned(cond)(x, level))
            decode = counted(lambda: nets.decode(x))
            both = counted(lambda: rewards(nets.decode(x), list(batch.prompts)))
            more = counted(lambda: held_out(nets.decode(x), list(batch.prompts))) - decode if asked else 0
        backward, through = (counted(partial(stepped, needed)) - tuned for needed in (False, True))
        judging = counted(judged) - both
        for weight in model.trainable_parameters:
            weight.grad = None
    return UnitWork(base, tuned, backward, through, decode, both - decode + more, judging)


def make_ledger(cfg: Config, folder: Path) -> Ledger:
    """Work out the ledger of `cfg`.

    Args:
        cfg: the settings.
        folder: with the configurations of the model's networks.

    Raises:
        InputError: the gradient mode cannot be combined with the settings.
    """
    mode, unit = make_mode(cfg), unit_work(cfg, folder)
    per_step, again = evaluations_per_step(cfg, mode.first), cfg.sharding.two_stage and recomputes_steps(cfg)
    found = mode.evaluations(per_step, again)
    with_gradient, pieces = found.with_gradient, mode.pieces_per_image
    if cfg.draftp.detach_uncond:  # half of them run without
        with_gradient = mode.evaluations([1] * cfg.sampling.steps, again).with_gradient
    base = found.with_gradient if cfg.draftp.needs_base or mode.asks_base else 0.0
    through = with_gradient * _share_through_x(cfg, mode)
    prefix = unit.base if _folds(cfg) else unit.tuned
    flop = {
        Phase.PREFIX: found.without_gradient * prefix,
        Phase.STEPS: found.with_gradient * unit.tuned,
        Phase.BASE: base * unit.base,
        Phase.DECODE: pieces * unit.decode,
        Phase.REWARD: pieces * unit.reward,
        Phase.JUDGING: pieces * unit.judging,
        Phase.BACKWARD: (with_gradient - through) * unit.backward + through * unit.backward_through,
    }
    evaluations = {
        Phase.PREFIX: found.without_gradient,
        Phase.STEPS: found.with_gradient,
        Phase.BASE: base,
        Phase.BACKWARD: with_gradient,
    }
    return Ledger(evaluations, flop, _moved(cfg, folder))


def count_flop(work: Callable[[], Any]) -> FlopCounterMode:
    """Run `work` and count its matrix products, convolutions and attention, on a CPU or on tensors without data."""
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        work()
    return counter


def _flop(work: Callable[[], Any], networks: Sequence[nn.Module]) -> int:
    """FLOP of `work` without data, in which a layer that stands for others counts as often as there are such layers."""
    with WithoutData():
        found = count_flop(work).get_flop_counts()
    total = sum(found["Global"].values())
    for network in networks:
        names = {id(module): f"{type(network).__name__}.{name}" for name, module in network.named_modules()}
        for others in (module for module in network.modules() if isinstance(module, RepeatedLayers)):
            total += others.count * sum(found.get(names[id(others.like)], {}).values())
    return total


def _forward_of_attention(query: Any, key: Any, value: Any, *more: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward_of_attention(gradient: Any, query: Any, key: Any, value: Any, *more: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# The kernel of torch on a CPU, for which its counter has no formula.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_of_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_of_attention,
}


class _Silent:
    """Networks that say nothing: what a mode cuts a walk into does not depend on it."""

    def tuned(self, cond: Any) -> Predict:
        return lambda x, level: torch.zeros_like(x)


def _share_through_x(cfg: Config, mode: GradientMode, images: int = 64) -> float:
    """Of the evaluations with gradient, the share whose input needs a gradient as well: all but the first of a piece,
    and none where x is detached. A mean over `images` draws where the mode draws its steps.
    """
    nets: Any = _Silent()
    batch = Batch([""] * images, list(range(images)), (8, 8), [None] * images)
    sampler, x = Sampler(make_schedule(cfg.sampling.steps)), torch.zeros(images, 1, 1, 1)
    all_of_them, through = 0, 0
    for piece in mode.pieces(Rollout(nets, sampler, batch, torch.zeros(images), x, mode.recomputes)):
        guided = [cfg.sampling.is_guided(level.index) and not cfg.draftp.detach_uncond for level in piece.levels]
        counts = [len(piece) * (1 + is_guided) for is_guided in guided]
        all_of_them += sum(counts)
        through += sum(counts[1:]) if piece.reach is None else 0
    return through / all_of_them


def _folds(cfg: Config) -> bool:
    """Whether the prefix runs with the LoRA folded; in half precision rounding hardly ever allows it."""
    sharding, exact = cfg.sharding, cfg.model.precision in ("fp32", "fp64")
    possible = cfg.model.quantize is None and sharding.strategy != "fsdp" and exact
    return cfg.peft.peft_scheme == "none" or (sharding.fold_lora and sharding.two_stage and possible)


def _moved(cfg: Config, folder: Path) -> int:
    """Bytes; see `Ledger.moved`. What sharding.offload takes off the GPU is dropped there, not copied back."""
    weights, moved = weights_of(cfg, folder), 0
    if cfg.sharding.offload:
        frozen = "unet" if cfg.peft.peft_scheme == "lora" else "frozen copy of the unet"
        moved += sum(weights.parts[part] for part in (frozen, "vae decoder", "rewards"))
    return moved + (weights.trained if cfg.ema.decay is not None and cfg.ema.device == "cpu" else 0)
