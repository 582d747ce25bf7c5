"""What comes and goes in a training step: the step itself, taken on tensors without data.

The real modules, the real code of core/backward.py and a real AdamW run on torch's meta device: every shape, dtype and
saved activation is there, and no data. What is alive is counted operator by operator, so that whatever a setting does
to memory (checkpointing, two stages, tiles, batches) it does here too.

The step is taken in pieces that depend on few settings each (prefix; gradient steps; decoder and reward), so that
settings that differ little share most of their rehearsals.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftcli.config import Config, RewardConfig, check_config
from draftcli.core.backward import Work, reward_slope
from draftcli.core.batch import Batch
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.eight_bit import EightBitLinear
from draftcli.core.engine.sharding import checkpoint_activations
from draftcli.core.gradient.mode import make_mode, recomputes_steps
from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.family import Parts
from draftcli.core.phase import Phase
from draftcli.planning.blank_networks import BlankRewards, blank_parts, stays
from draftcli.planning.live_bytes import PeakMeter
from draftcli.planning.repeated_layers import RepeatedLayers, size_of, tensors
from draftcli.planning.without_data import WithoutData
from draftcli.training.optimizer import moment_bytes


@dataclass(frozen=True)
class Weights:
    """Bytes that are in memory all the time.

    Attributes:
        parts: of the weights, by part.
        trained: of the trained weights.
        moments: of the optimizer's moments.
        adapted: of the weights that have a LoRA.
        optimizer: that the optimizer's step takes for itself beside weights, gradients and moments.
        uncounted: rewards whose networks are not known.
    """

    parts: dict[str, int]
    trained: int
    moments: int
    adapted: int
    optimizer: int
    uncounted: tuple[str, ...]


def weights_of(cfg: Config, folder: Path) -> Weights:
    """The weights of one process that has them whole.

    Args:
        cfg: the settings.
        folder: with the configurations of the model's four networks.
    """
    parts = stand_ins(cfg, folder)
    unet, in_full = size_of(tensors(parts.unet)), cfg.peft.peft_scheme == "none"
    weights = [(p, times) for p, times in tensors(parts.unet, buffers=False) if p.requires_grad or in_full]
    trained = size_of(weights)
    found = {"unet": unet, "frozen copy of the unet": unet} if in_full else {"LoRA": trained, "unet": unet - trained}
    found["vae decoder"] = size_of(tensors(parts.vae))
    for name, encoder in zip(("text encoder", "text encoder 2"), parts.text_encoders, strict=True):
        found[name] = size_of(tensors(encoder))
    rewards, held_out = (
        _rewards(_as_key(cfg.rewards)),
        _rewards(_as_key(cfg.held_out_rewards if validates(cfg) else {})),
    )
    found["rewards"] = size_of(tensors(rewards))
    if held_out_size := size_of(tensors(held_out)):
        found["held-out rewards"] = held_out_size
    moments = sum(times * moment_bytes([p], cfg.optim.name) for p, times in weights)
    layers = [(layer, 1) for layer in lora_layers(parts.unet)]
    for others in (module for module in parts.unet.modules() if isinstance(module, RepeatedLayers)):
        layers += [(layer, others.count) for layer in lora_layers(others.like)]
    # Those in 8 bits are never folded into.
    bases = [(layer.get_base_layer(), times) for layer, times in layers]
    adapted = size_of((base.weight, times) for base, times in bases if not isinstance(base, EightBitLinear))  # type: ignore[union-attr]
    # On a GPU all weights are taken at once, as one would be; on a CPU one after the other, so the largest counts.
    on_gpu, sizes = cfg.model.device != "cpu", [(p.numel(), times) for p, times in weights]
    count = sum(size * times for size, times in sizes) if on_gpu else max(size for size, _ in sizes)
    optimizer = _optimizer_step(count, weights[0][0].dtype, on_gpu)
    if cfg.optim.name == "adamw8bit":  # one tensor after the other: nothing on a GPU, some float32 copies on a CPU
        optimizer = 0 if on_gpu else 8 * 4 * count
    return Weights(found, trained, moments, adapted, optimizer, (*rewards.uncounted, *held_out.uncounted))


def validates(cfg: Config) -> bool:
    """Whether the run has validations."""
    return bool(cfg.trainer.val_check_interval and cfg.data.validation_prompts)


def prefix_of(cfg: Config, folder: Path, images: int, with_lora: bool) -> dict[Phase, int]:
    """Bytes that come and go while prompts are encoded and while no gradient is needed, for `images` at a time."""
    draftp = _LAST_STEP
    sampling = {**_SHORT, **_guidance(cfg, range(cfg.sampling.steps))}
    key = _key(cfg, images, draftp=draftp, sampling=sampling, sharding=_PLAIN, model={"vae_tile": None})
    return _prefix(key, folder, with_lora)


def steps_of(cfg: Config, folder: Path, images: int) -> dict[Phase, int]:
    """Bytes that come and go from the latents at the first gradient step to the weights' gradient, for one
    micro-batch of `images`; the decoder and the rewards take nothing here. Without sharding.two_stage they are in it.

    Graphs that are kept grow by as much with each gradient step: beyond three they are counted at two and three. Where
    some of the steps are guided they are counted as if all were.
    """
    k, again = make_mode(cfg).longest, recomputes_steps(cfg)
    sampling = _guidance(cfg, range(cfg.sampling.steps - k, cfg.sampling.steps))
    key = _key(cfg, images, sampling=sampling, model={"vae_tile": None} if cfg.sharding.two_stage else {})
    rewards = "{}" if cfg.sharding.two_stage else _as_key(cfg.rewards)
    if cfg.sharding.two_stage and again:
        return _steps(key, folder, min(k, 2), rewards)
    if k <= 3:
        return _steps(key, folder, k, rewards)
    two, three = (_steps(key, folder, count, rewards) for count in (2, 3))
    return {name: size + (k - 3) * (size - two[name]) for name, size in three.items()}


def judging_of(cfg: Config, folder: Path, images: int, training: bool = True) -> dict[Phase, int]:
    """Bytes that come and go while `images` are decoded and judged together, and in the backward of that; not in
    training: while held-out rewards judge them as well, without gradient, at the size of validation.
    """
    size = {} if training else {"height": cfg.sampling.height, "width": cfg.sampling.width}
    draftp = {**_LAST_STEP, "kl_coeff": 0.0}
    kept = {"activation_checkpointing": cfg.sharding.activation_checkpointing and training, "two_stage": True}
    key = _key(cfg, images, draftp=draftp, sampling={**_SHORT, **size}, sharding={**_PLAIN, **kept})
    rewards = {**cfg.rewards, **({} if training else cfg.held_out_rewards)}
    return _judging(key, folder, _as_key(rewards), training)


# --------------------------------------------------------------------------------------------------------- settings

_PLAIN: dict[str, Any] = {"activation_checkpointing": False, "two_stage": True, "recompute_steps": False}
_LAST_STEP: dict[str, Any] = {"truncation_steps": 1, "gradient": "last_k", "low_variance_samples": 0}
_SHORT: dict[str, Any] = {"steps": 2, "s_churn": 0.0}


def _key(cfg: Config, images: int, **changes: dict[str, Any]) -> str:
    """A cache key: the settings that a piece depends on, for `images` at a time; all others have one value."""
    sections = cfg.model_dump(mode="json", include={"model", "draftp", "sampling", "peft", "sharding"})
    sections["model"] |= {"pretrained": "toy", "offload_text_encoders": False, "config": None, "vae": None}
    sections["model"] |= {"device": "cpu" if cfg.model.device == "cpu" else "auto", "variant": None}
    sections["sharding"] |= {"prompt_cache": None, "prefix_batch_size": None, "fold_lora": False}
    sections["sharding"] |= {"decode_batch_size": None, "shard_size": None, "timeout_minutes": 1.0}
    sections["sharding"] |= {"offload": False, "compile": False}
    if cfg.sharding.attention != "math":
        sections["sharding"]["attention"] = "auto"
    sections["sharding"]["recompute_steps"] = recomputes_steps(cfg)
    sections["trainer"] = {"micro_batch_size": images, "global_batch_size": images}
    sections["draftp"]["kl_coeff"] = float(cfg.draftp.kl_coeff > 0)
    height, width = largest(cfg)
    sections["sampling"] |= {"height": height, "width": width, "sizes": [], "guidance_interval": [0.0, 1.0]}
    for section, values in changes.items():
        sections[section] |= values
    return json.dumps(sections, sort_keys=True)


def _guidance(cfg: Config, steps: range) -> dict[str, Any]:
    return {} if any(map(cfg.sampling.is_guided, steps)) else {"scale": 1.0}


def largest(cfg: Config) -> tuple[int, int]:
    """(height, width) of the largest pictures that are trained on."""
    return max(cfg.sampling.sizes or [(cfg.sampling.height, cfg.sampling.width)], key=lambda size: size[0] * size[1])


def _as_key(settings: Any) -> str:
    return json.dumps({name: setting.model_dump(mode="json") for name, setting in settings.items()}, sort_keys=True)


# --------------------------------------------------------------------------------------- networks, made once for all


def stand_ins(cfg: Config, folder: Path) -> Parts:
    """The networks of `cfg`, shortened and without data."""
    key = _key(
        cfg,
        1,
        draftp={
            "truncation_steps": 1,
            "gradient": "last_k",
            "low_variance_samples": 0,
            "kl_coeff": 0.0,
            "log_kl": False,
        },
    )
    sections = json.loads(key)
    kept = {name: sections["sharding"][name] for name in ("strategy", "activation_checkpointing")}
    model = {**sections["model"], "vae_tile": None}
    return _stand_ins(json.dumps({"model": model, "peft": sections["peft"], "sharding": kept}), folder)


@cache
def _stand_ins(key: str, folder: Path) -> Parts:
    cfg = check_config(json.loads(key))
    with _quiet():
        parts = blank_parts(folder, cfg)
    for network in parts.modules.values():
        stays(network)
    if cfg.sharding.activation_checkpointing:
        checkpoint_activations(parts.unet, parts.vae)
        for others in (module for module in parts.unet.modules() if isinstance(module, RepeatedLayers)):
            others.recomputed = True
    return parts


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and diffusers on weights that are not there
        yield


@cache
def _rewards(key: str) -> BlankRewards:
    with _quiet():
        return BlankRewards({name: RewardConfig(**setting) for name, setting in json.loads(key).items()})


@contextmanager
def _model(cfg: Config, folder: Path) -> Iterator[SDXLDRaFTPModel]:
    """The model of stand-ins; what it does is to be done inside `_counted`."""
    parts = stand_ins(cfg, folder)
    data = cfg.model_dump(mode="json")
    data["model"]["device"] = "cpu"
    # The networks have this already, or `_counted` sees to it.
    data["sharding"] |= {"activation_checkpointing": False, "strategy": "none", "attention": "auto"}
    with _quiet():
        with WithoutData():
            model = SDXLDRaFTPModel(check_config(data), parts)
        yield model


def forget() -> None:
    """Drop every network and every rehearsal that is remembered."""
    for remembered in (_stand_ins, _rewards, _prefix, _steps, _judging, _optimizer_step):
        remembered.cache_clear()


# ------------------------------------------------------------------------------------------------------- the pieces


@cache
def _prefix(key: str, folder: Path, with_lora: bool) -> dict[Phase, int]:
    cfg = check_config(json.loads(key))
    with _model(cfg, folder) as model:
        batch = _batch(cfg)
        with _counted(model, fused=cfg.sharding.attention != "math") as (meter, passing):
            cond = model.encode(batch)
            with meter(Phase.PREFIX), torch.no_grad(), nullcontext() if with_lora else model.base_weights():
                model.sampler.walk(model.networks.tuned(cond), model.networks.start(batch), stop=cfg.sampling.steps - 1)
            return passing()


@cache
def _steps(key: str, folder: Path, k: int, rewards: str) -> dict[Phase, int]:
    sections = json.loads(key)
    sections["draftp"]["truncation_steps"] = k
    sections["sampling"]["steps"] = k
    cfg = check_config(sections)
    with _model(cfg, folder) as model:
        if cfg.sharding.two_stage:
            model.networks.decode = lambda x_0: x_0[:, :3]
            model.reward_model = lambda images, prompts: images.mean((1, 2, 3))
        else:
            model.reward_model = _rewards(rewards)
        for weight in model.trainable_parameters:  # as the micro-batches before have left it
            weight.grad = torch.empty_like(weight)
        with _counted(model, fused=cfg.sharding.attention != "math") as (meter, passing):
            with meter(Phase.ALL):
                model.get_loss_and_metrics(_batch(cfg))
            found = passing()
        for weight in model.trainable_parameters:
            weight.grad = None
    return {name: size for name, size in found.items() if (name == Phase.ALL) != cfg.sharding.two_stage}


@cache
def _judging(key: str, folder: Path, rewards: str, training: bool) -> dict[Phase, int]:
    cfg = check_config(json.loads(key))
    with _model(cfg, folder) as model:
        batch, reward = _batch(cfg), _rewards(rewards)
        model.reward_model, prompts = reward, list(batch.prompts)
        with _counted(model, reward) as (meter, passing):
            x_0 = model.initial_noise(batch).to(model.runtime.latent_dtype)
            if training:
                reward_slope(model.networks, reward, x_0, prompts, 1.0, Work.of(cfg))
            else:
                with meter(Phase.VALIDATION), torch.no_grad():
                    reward(model.decode(x_0), prompts)
            return passing()


@cache
def _optimizer_step(count: int, dtype: torch.dtype, on_gpu: bool) -> int:
    weight = nn.Parameter(torch.empty(count, dtype=dtype, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW([weight], foreach=on_gpu)
    live = WithoutData([weight, weight.grad], value=1)
    with live:
        nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
    return max(0, live.peak - 4 * weight.numel() * weight.element_size())  # beside gradient and two moments


def _batch(cfg: Config) -> Batch:
    count = cfg.trainer.micro_batch_size
    size = (cfg.sampling.height, cfg.sampling.width)
    return Batch(["one prompt"] * count, list(range(count)), size, [None] * count)


@contextmanager
def _counted(model: SDXLDRaFTPModel, *more: nn.Module, fused: bool = True) -> Iterator[tuple[PeakMeter, Any]]:
    """Inside, what is alive is counted by the model's phases; the second thing given says what came beside weights."""
    networks = [*model.parts.modules.values(), *filter(None, [model.base_unet]), *more]
    known = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    gradients = [p.grad for p in model.trainable_parameters if p.grad is not None]
    live = WithoutData([*known, *gradients], fused=fused)
    before = live.now
    meter = PeakMeter(live)
    others = [module for network in networks for module in network.modules() if isinstance(module, RepeatedLayers)]
    for module in others:
        module.live = live
    try:
        with live, model.watched(meter):
            yield meter, lambda: {name: peak - before for name, peak in meter.peaks.items()}
    finally:
        for module in others:
            module.live = None
