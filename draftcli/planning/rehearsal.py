"""What comes and goes in a training step: the step itself, taken on tensors without data.

The real modules, the real code of core/backward.py and a real AdamW run on torch's meta device: every shape, dtype and
saved activation is there, and no data. What is alive is counted operator by operator, so that whatever a setting does
to memory (checkpointing, two stages, tiles, batches) it does here too.

The step is taken in pieces that depend on few settings each (prefix; gradient steps; decoder and reward), so that
settings that differ little share most of their rehearsals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from draftcli.config import Config, RewardSource, check_config
from draftcli.core.backward import Work, reward_slope
from draftcli.core.batch import Batch
from draftcli.core.draftp import DRaFTPModel
from draftcli.core.engine.eight_bit import EightBitLinear
from draftcli.core.engine.sharding import checkpoint_activations
from draftcli.core.gradient.mode import make_mode, recomputes_steps
from draftcli.core.image_weights import HeldOutGate
from draftcli.core.lora.adapters import lora_layers
from draftcli.core.models.family import Parts
from draftcli.core.penalty import Penalty, guided_difference
from draftcli.core.phase import Phase
from draftcli.core.prefix import make_prefix
from draftcli.core.schedule import make_schedule
from draftcli.planning.blank_networks import BlankRewards, blank_parts, stays
from draftcli.planning.live_bytes import PeakMeter
from draftcli.planning.repeated_layers import RepeatedLayers, size_of, tensors
from draftcli.planning.without_data import WithoutData
from draftcli.training.optimizer import moment_bytes

_P = ParamSpec("_P")
_T = TypeVar("_T")
NamedRewards = tuple[tuple[str, RewardSource], ...]  # rewards by name, in an order that does not depend on the run

_REMEMBERED: list[dict[Any, Any]] = []


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
        folder: with the configurations of the model's networks.
    """
    parts = stand_ins(cfg, folder)
    unet, in_full = size_of(tensors(parts.unet)), cfg.peft.peft_scheme == "none"
    weights = [(p, times) for p, times in tensors(parts.unet, buffers=False) if p.requires_grad or in_full]
    trained = size_of(weights)
    found = {"unet": unet, "frozen copy of the unet": unet} if in_full else {"LoRA": trained, "unet": unet - trained}
    for name, network in parts.modules.items():
        if name != "unet":
            found[parts.family.networks[name]] = size_of(tensors(network))
    rewards = _rewards(_named(cfg.rewards))
    held_out = _rewards(_named(cfg.held_out if validates(cfg) or cfg.draftp.asks_held_out else {}))
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
    draftp = dict(_LAST_STEP)
    if cfg.draftp.prefix_steps is not None:
        draftp |= {"prefix_steps": min(2, cfg.draftp.prefix_steps), "prefix_sampler": cfg.draftp.prefix_sampler}
    sampling = {**_SHORT, **_guidance(cfg, range(cfg.sampling.steps))}
    settings = _relevant(cfg, images, draftp=draftp, sampling=sampling, sharding=_PLAIN, model={"vae_tile": None})
    return _prefix(settings, folder, with_lora)


def steps_of(cfg: Config, folder: Path, images: int) -> dict[Phase, int]:
    """Bytes that come and go from the latents at the first gradient step to the weights' gradient, for one
    micro-batch of `images`; the decoder and the rewards take nothing here. Without sharding.two_stage they are in it.

    Graphs that are kept grow by as much with each gradient step: beyond three they are counted at two and three. Where
    some of the steps are guided they are counted as if all were.
    """
    mode, again = make_mode(cfg), recomputes_steps(cfg)
    k = mode.longest
    sampling = _guidance(cfg, range(cfg.sampling.steps - k, cfg.sampling.steps))
    draftp = {"gradient": "last_k", "truncation_steps": k} if mode.like_last_k else {}
    model = {"vae_tile": None} if cfg.sharding.two_stage else {}
    settings = _relevant(cfg, images, draftp=draftp, sampling=sampling, model=model)
    rewards = ((), ()) if cfg.sharding.two_stage else (_named(cfg.rewards), _asked_in_training(cfg))
    if cfg.sharding.two_stage and again:
        return _steps(settings, folder, min(k, 2), *rewards)
    if k <= 3:
        return _steps(settings, folder, k, *rewards)
    two, three = (_steps(settings, folder, count, *rewards) for count in (2, 3))
    return {name: size + (k - 3) * (size - two[name]) for name, size in three.items()}


def judging_of(cfg: Config, folder: Path, images: int, training: bool = True) -> dict[Phase, int]:
    """Bytes that come and go while `images` are decoded and judged together, and in the backward of that; not in
    training: while held-out rewards judge them as well, without gradient, at the size of validation.
    """
    size = {} if training else {"height": cfg.sampling.height, "width": cfg.sampling.width}
    draftp = {**_LAST_STEP, "kl_coeff": 0.0}
    kept = {"activation_checkpointing": cfg.sharding.activation_checkpointing and training, "two_stage": True}
    settings = _relevant(cfg, images, draftp=draftp, sampling={**_SHORT, **size}, sharding={**_PLAIN, **kept})
    rewards = {**cfg.rewards, **({} if training else cfg.held_out)}
    return _judging(settings, folder, _named(rewards), _asked_in_training(cfg) if training else None)


# --------------------------------------------------------------------------------------------------------- settings

_PLAIN: dict[str, Any] = {"activation_checkpointing": False, "two_stage": True, "recompute_steps": False}
_LAST_STEP: dict[str, Any] = {"truncation_steps": 1, "gradient": "last_k", "low_variance_samples": 0}
_SHORT: dict[str, Any] = {"steps": 2, "s_churn": 0.0}


def _relevant(cfg: Config, images: int, **changes: dict[str, Any]) -> Config:
    """The settings that a piece depends on, for `images` at a time; all others have one value, as it is remembered by
    them.
    """
    sections = cfg.model_dump(mode="json", include={"model", "draftp", "sampling", "peft", "sharding"})
    sections["model"] |= {"pretrained": "toy", "offload_text_encoders": False, "config": None, "vae": None}
    sections["model"] |= {"device": "cpu" if cfg.model.device == "cpu" else "auto", "variant": None, "family": "auto"}
    sections["sharding"] |= {"prompt_cache": None, "prefix_batch_size": None, "fold_lora": False}
    sections["sharding"] |= {"decode_batch_size": None, "shard_size": None, "timeout_minutes": 1.0}
    sections["sharding"] |= {"offload": False, "compile": False}
    if cfg.sharding.attention != "math":
        sections["sharding"]["attention"] = "auto"
    sections["sharding"]["recompute_steps"] = recomputes_steps(cfg)
    sections["trainer"] = {"micro_batch_size": images, "global_batch_size": images}
    sections["draftp"] |= {"kl_coeff": float(cfg.draftp.kl_coeff > 0), "kl_target": None, "prefix_steps": None}
    sections["draftp"] |= {"prefix_sampler": "dpmpp_2m", "kl_gate": "none", "kl_by_reward": False, "reuse": 1}
    height, width = largest(cfg)
    sections["sampling"] |= {"height": height, "width": width, "sizes": [], "timesteps": []}
    sections["sampling"] |= {"guidance_interval": [0.0, 1.0]}
    sections["model"]["loras"], sections["peft"]["init_from"] = [], None
    for section, values in changes.items():
        sections[section] |= values
    return check_config(sections)


def _changed(cfg: Config, **changes: dict[str, Any]) -> Config:
    sections = cfg.model_dump(mode="json")
    for section, values in changes.items():
        sections[section] |= values
    return check_config(sections)


def _guidance(cfg: Config, steps: range) -> dict[str, Any]:
    return {} if any(map(cfg.sampling.is_guided, steps)) else {"scale": 1.0}


def largest(cfg: Config) -> tuple[int, int]:
    """(height, width) of the largest pictures that are trained on."""
    return max(cfg.sampling.sizes or [(cfg.sampling.height, cfg.sampling.width)], key=lambda size: size[0] * size[1])


def _named(rewards: Mapping[str, RewardSource]) -> NamedRewards:
    return tuple(sorted(rewards.items()))


def _asked_in_training(cfg: Config) -> NamedRewards:
    """The held-out rewards that each image of the training is shown to."""
    return _named(cfg.held_out if cfg.draftp.asks_held_out else {})


def remembered(piece: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache what `piece` returns; as functools.cache, which a Config cannot be a key of, as it has lists in it."""
    found: dict[tuple[Any, ...], _T] = {}
    _REMEMBERED.append(found)

    @wraps(piece)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        key = tuple(arg.model_dump_json() if isinstance(arg, Config) else arg for arg in (*args, *kwargs.items()))
        if key not in found:
            found[key] = piece(*args, **kwargs)
        return found[key]

    return call


def forget() -> None:
    """Drop every network and every rehearsal that is remembered."""
    for found in _REMEMBERED:
        found.clear()


# --------------------------------------------------------------------------------------- networks, made once for all


def stand_ins(cfg: Config, folder: Path) -> Parts:
    """The networks of `cfg`, shortened and without data."""
    draftp = {**_LAST_STEP, "kl_coeff": 0.0, "log_kl": False}
    settings = _relevant(cfg, 1, draftp=draftp, model={"vae_tile": None})
    kept = settings.sharding.model_dump(include={"strategy", "activation_checkpointing"})
    sections = settings.model_dump(mode="json", include={"model", "peft"})
    return _stand_ins(check_config({**sections, "sharding": kept}), folder)


@remembered
def _stand_ins(cfg: Config, folder: Path) -> Parts:
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


@remembered
def _rewards(rewards: NamedRewards) -> BlankRewards:
    with _quiet():
        return BlankRewards(dict(rewards))


@contextmanager
def _model(cfg: Config, folder: Path) -> Iterator[DRaFTPModel]:
    """The model of stand-ins; what it does is to be done inside `_counted`."""
    parts = stand_ins(cfg, folder)
    # The networks have these already, or `_counted` sees to them.
    sharding = {"activation_checkpointing": False, "strategy": "none", "attention": "auto"}
    with _quiet():
        with WithoutData():
            model = DRaFTPModel(_changed(cfg, model={"device": "cpu"}, sharding=sharding), parts)
        yield model


def of_one_evaluation(cfg: Config) -> tuple[Config, NamedRewards, NamedRewards]:
    """What the work of one UNet evaluation, of a decode, of the rewards and of the held-out ones that training asks
    depends on, and nothing else.
    """
    draftp = {**_LAST_STEP, "kl_coeff": 0.0, "log_kl": False, "detach_uncond": False}
    sharding = {**_PLAIN, "activation_checkpointing": cfg.sharding.activation_checkpointing}
    settings = _relevant(cfg, 1, draftp=draftp, sampling={**_SHORT, "scale": 1.0}, sharding=sharding)
    return settings, _named(cfg.rewards), _asked_in_training(cfg)


@contextmanager
def one_image(
    cfg: Config, folder: Path, *rewards: NamedRewards
) -> Iterator[tuple[DRaFTPModel, Batch, list[BlankRewards]]]:
    """The model, the batch and the rewards of one image, all without data, by what `of_one_evaluation` gives."""
    with _model(cfg, folder) as model:
        yield model, _batch(cfg), [_rewards(named) for named in rewards]


# ------------------------------------------------------------------------------------------------------- the pieces


@remembered
def _prefix(cfg: Config, folder: Path, with_lora: bool) -> dict[Phase, int]:
    with _model(cfg, folder) as model:
        batch, prefix = _batch(cfg), make_prefix(cfg, cfg.sampling.steps - 1, make_schedule(cfg.sampling.steps))
        with _counted(model, fused=cfg.sharding.attention != "math") as (meter, passing):
            cond, sampler = model.encode(batch), replace(model.sampler, prefix=prefix)
            with meter(Phase.PREFIX), torch.no_grad(), nullcontext() if with_lora else model.base_weights():
                sampler.walk(model.networks.tuned(cond), model.networks.start(batch), stop=cfg.sampling.steps - 1)
            return passing()


@remembered
def _steps(cfg: Config, folder: Path, k: int, rewards: NamedRewards, asked: NamedRewards) -> dict[Phase, int]:
    cfg = _changed(cfg, draftp={"truncation_steps": k}, sampling={"steps": k})
    with _model(cfg, folder) as model:
        if cfg.sharding.two_stage:
            model.networks.decode = lambda x_0: x_0[:, :3]
            model.reward_model = lambda images, prompts: images.mean((1, 2, 3))
        else:
            model.reward_model = _rewards(rewards)
            if asked:
                model.penalty.weights = HeldOutGate({"held out": _rewards(asked)})
        for weight in model.trainable_parameters:  # as the micro-batches before have left it
            weight.grad = torch.empty_like(weight)
        with _counted(model, fused=cfg.sharding.attention != "math") as (meter, passing):
            with meter(Phase.ALL):
                model.get_loss_and_metrics(_batch(cfg))
            found = passing()
        for weight in model.trainable_parameters:
            weight.grad = None
    return {name: size for name, size in found.items() if (name == Phase.ALL) != cfg.sharding.two_stage}


@remembered
def _judging(cfg: Config, folder: Path, rewards: NamedRewards, asked: NamedRewards | None) -> dict[Phase, int]:
    """`asked`: the held-out rewards that training asks as well; None: in validation."""
    with _model(cfg, folder) as model:
        batch, reward, held_out = _batch(cfg), _rewards(rewards), _rewards(asked or ())
        model.reward_model, prompts = reward, list(batch.prompts)
        with _counted(model, reward, held_out) as (meter, passing):
            x_0 = model.initial_noise(batch).to(model.runtime.latent_dtype)
            if asked is not None:
                weights = HeldOutGate({"held out": held_out}) if asked else None
                penalty = Penalty(guided_difference, 1.0, weights=weights)
                reward_slope(model.networks, reward, x_0, prompts, 1.0, Work.of(cfg), penalty)
            else:
                with meter(Phase.VALIDATION), torch.no_grad():
                    reward(model.decode(x_0), prompts)
            return passing()


@remembered
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
def _counted(model: DRaFTPModel, *more: nn.Module, fused: bool = True) -> Iterator[tuple[PeakMeter, Any]]:
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
