"""What settings forbid each other in a training, and which have no effect beside others.

What only the gradient mode can tell is in core/gradient/mode.py, which asks it; that imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Literal

from draftcli.config.outside import is_single_file
from draftcli.config.schema import Config
from draftcli.errors import InputError

Purpose = Literal["training", "drawing"]


USE_K = ("last_k", "low_variance")  # gradient modes with `uses_k`; named here, a wrong K costs no import of torch
NOISY = ("euler_ancestral", "lcm")  # samplers that add fresh noise after each step but the last


def contradictions(cfg: Config) -> Iterator[str]:
    """Which settings cannot stand together, whether one trains or draws, each reason in one line."""
    sampling = cfg.sampling
    if sampling.timesteps and sampling.steps != len(sampling.timesteps):
        yield (
            f"sampling.steps is {sampling.steps}, and sampling.timesteps names {len(sampling.timesteps)} of them: make "
            "them agree, or set timesteps to [] for the grid of sampling.schedule"
        )
    if sampling.guidance_embedding is not None and sampling.scale != 1:
        yield (
            f"sampling.scale is {sampling.scale:g}, and sampling.guidance_embedding has the UNet guide itself: set "
            "scale to 1, or leave it out"
        )
    if sampling.s_churn > 0 and sampling.sampler in NOISY:
        yield f"sampling.s_churn is {sampling.s_churn:g}; {sampling.sampler} adds noise of its own: set it to 0"


def conflicts(cfg: Config) -> Iterator[str]:
    """Why the settings cannot train, each reason in one line."""
    yield from contradictions(cfg)
    steps, k, sharding = cfg.sampling.steps, cfg.draftp.truncation_steps, cfg.sharding
    if k > steps and cfg.draftp.gradient_mode[0] in USE_K:
        yield f"draftp.truncation_steps is {k}, sampling.steps {steps}: K can be at most {steps}"
    try:
        check_batch_size(cfg)
    except InputError as error:
        yield str(error)
    if cfg.draftp.gradient_mode[0] == "low_variance" and not sharding.two_stage:
        yield "draftp.low_variance_samples (gradient low_variance) needs sharding.two_stage true"
    if cfg.draftp.low_variance_samples and cfg.draftp.gradient not in ("last_k", "low_variance"):
        yield "draftp.low_variance_samples already sets the gradient mode low_variance: remove it or draftp.gradient"
    yield from _conflicts_of_the_loss(cfg)
    yield from _conflicts_before_the_gradient(cfg)
    if sharding.offload and not (sharding.two_stage and sharding.recompute_steps is not False):
        yield "sharding.offload needs sharding.two_stage true, and recompute_steps true or unset"
    if cfg.peft.init_from is not None and cfg.peft.peft_scheme == "none":
        yield "peft.init_from starts from a LoRA, but peft_scheme none trains the whole UNet: use model.loras"
    if sharding.offload and sharding.strategy == "fsdp":
        yield "sharding.offload cannot be combined with sharding.strategy fsdp, which splits the weights"
    if sharding.channels_last and sharding.strategy == "fsdp":
        yield "sharding.channels_last cannot be combined with sharding.strategy fsdp, which has its own"
    yield from _conflicts_of_8_bits(cfg)
    if sharding.strategy == "fsdp" and cfg.ema.decay is not None and cfg.ema.device == "cpu":
        yield "ema.device cpu cannot be combined with sharding.strategy fsdp, which splits the average: leave it"


def _conflicts_before_the_gradient(cfg: Config) -> Iterator[str]:
    """Where the walk to the first step with gradient cannot be shortened, or shared between optimizer steps."""
    draftp, sampler = cfg.draftp, cfg.sampling.sampler
    for key, given in (("prefix_steps", draftp.prefix_steps is not None), ("reuse", draftp.reuse > 1)):
        if given and cfg.sampling.s_churn > 0:
            yield f"draftp.{key} cannot be combined with sampling.s_churn, whose noise belongs to the run's own steps"
        if given and sampler in NOISY:
            yield (
                f"draftp.{key} cannot be combined with sampling.sampler {sampler}, which adds noise in each of the "
                "run's own steps: leave it out"
            )
    if draftp.reuse > 1 and not cfg.sharding.two_stage:
        yield f"draftp.reuse {draftp.reuse} needs sharding.two_stage true"


def _conflicts_of_the_loss(cfg: Config) -> Iterator[str]:
    """A coefficient that cannot be steered, and rewards of which no least one can be found."""
    if cfg.draftp.kl_target is not None and cfg.draftp.kl_coeff == 0:
        yield (
            f"draftp.kl_target {cfg.draftp.kl_target:g} steers the coefficient from draftp.kl_coeff on, and that is 0: "
            "give kl_coeff a value above 0, such as 0.1"
        )
    if cfg.draftp.kl_gate == "held_out" and cfg.draftp.kl_by_reward:
        yield "draftp.kl_gate held_out and kl_by_reward both weigh the penalty by image: use only one of them"
    if cfg.draftp.kl_gate == "held_out" and not cfg.held_out:
        yield (
            "draftp.kl_gate held_out compares the trained reward with held-out ones, but there are none: name a "
            "reward in held_out_rewards"
        )
    for name, setting in cfg.rewards.items() if cfg.draftp.combine == "min" else ():
        if setting.weight not in (-1, 0, 1):
            yield (
                f"draftp.combine min has no use for rewards.{name}.weight {setting.weight:g}: give it 1, or -1 where "
                "lower scores are wanted"
            )
        elif setting.weight != 0 and setting.normalise == "none":
            yield f"draftp.combine min compares rewards: give rewards.{name}.normalise std or range"


def _conflicts_of_8_bits(cfg: Config) -> Iterator[str]:
    """Where bitsandbytes could not do what is asked of it."""
    for key, value in (("model.quantize", cfg.model.quantize), ("optim.name", cfg.optim.name)):
        if value not in ("8bit", "adamw8bit"):
            continue
        if cfg.sharding.strategy == "fsdp":
            yield f"{key} {value} cannot be combined with sharding.strategy fsdp; use ddp, or leave it out"
        if cfg.model.precision == "fp64":
            yield f"{key} {value} cannot be combined with model.precision fp64; use fp32, bf16 or fp16"
    if cfg.model.quantize and cfg.peft.peft_scheme == "none":
        yield (
            f"model.quantize {cfg.model.quantize} is for a frozen base, and peft.peft_scheme none trains all of "
            "it; use lora, or optim.name adamw8bit instead"
        )


def check_batch_size(cfg: Config, processes: int = 1) -> None:
    """See that a step's pictures can be shared out evenly: to backwards, and with draftp.reuse m to m groups.

    Args:
        cfg: the settings.
        processes: that train together.

    Raises:
        InputError: they cannot; names the nearest sizes that work.
    """
    micro, total, reuse = cfg.trainer.micro_batch_size, cfg.trainer.global_batch_size, cfg.draftp.reuse
    unit = lcm(micro, reuse) * processes
    for key, divisor in (("trainer.micro_batch_size", micro), ("draftp.reuse", reuse)):
        if total % (divisor * processes):
            near = sorted({max(unit, total // unit * unit), (total // unit + 1) * unit})
            times = f" times {processes} processes" if processes > 1 else ""
            raise InputError(
                f"trainer.global_batch_size {total} is not a multiple of {key} {divisor}{times}; "
                f"the nearest that work: {', '.join(map(str, near))}"
            )


def without_effect(cfg: Config, purpose: Purpose = "training") -> list[str]:
    """Settings that somebody gave, that are allowed, and that yet have no effect or hardly the one meant.

    Args:
        cfg: the settings.
        purpose: drawing: only those that pictures could depend on.
    """
    if purpose == "drawing":
        return list(_idle_sampling(cfg))
    return [*_idle_schedule(cfg), *_idle_method(cfg), *_idle_sampling(cfg), *_idle_sharding(cfg)]


def _idle_schedule(cfg: Config) -> Iterator[str]:
    trainer, sched, given = cfg.trainer, cfg.optim.sched, cfg.trainer.model_fields_set
    validates = bool(trainer.val_check_interval and cfg.data.validation_prompts)
    beyond = f"is beyond trainer.max_steps {trainer.max_steps}"
    if sched.warmup_steps > trainer.max_steps:
        yield f"optim.sched.warmup_steps {sched.warmup_steps} {beyond}: the learning rate never gets there"
    if sched.name == "constant" and sched.warmup_steps > 0:
        yield "optim.sched.warmup_steps has no effect with the schedule constant; use constant_with_warmup"
    if "save_interval" in given and trainer.save_interval > trainer.max_steps:
        yield f"trainer.save_interval {trainer.save_interval} {beyond}: only the end is saved"
    if "val_check_interval" in given and validates and trainer.val_check_interval > trainer.max_steps:
        yield f"trainer.val_check_interval {trainer.val_check_interval} {beyond}: validation at start and end only"
    if "val_check_interval" in given and trainer.val_check_interval > 0 and not cfg.data.validation_prompts:
        yield "trainer.val_check_interval has no effect: data.validation_prompts is empty"
    if cfg.data.validation_cache is not None and not validates:
        yield "data.validation_cache has no effect without validation"
    if cfg.held_out_rewards and not validates and not cfg.draftp.asks_held_out:
        yield "held_out_rewards have no effect without validation"
    if twice := [name for name in cfg.held_out_rewards if name in cfg.rewards]:
        yield f"held_out_rewards {', '.join(twice)} has no effect: it is trained on"
    yield from _idle_monitor(cfg, validates)


def _idle_monitor(cfg: Config, validates: bool) -> Iterator[str]:
    monitor, given = cfg.monitor, cfg.monitor.model_fields_set
    if not validates and (monitor.stop == "hacking" or given & {"patience", "final"}):
        yield "monitor.stop, patience and final have no effect without validation"
    elif monitor.stop == "never" and given & {"patience", "final"}:
        yield "monitor.patience and final have no effect: monitor.stop is never"
    elif monitor.stop is None and not cfg.held_out and given & {"patience", "final"}:
        yield "monitor.patience and final have no effect: without held_out_rewards monitor.stop is never"


def _idle_method(cfg: Config) -> Iterator[str]:
    peft = cfg.peft
    if cfg.draftp.combine == "min" and sum(setting.weight != 0 for setting in cfg.rewards.values()) < 2:
        yield "draftp.combine min has no effect with one reward, except that its scores are normalised"
    for key, is_set in (("kl_gate held_out", cfg.draftp.kl_gate != "none"), ("kl_by_reward", cfg.draftp.kl_by_reward)):
        if is_set and cfg.draftp.kl_coeff == 0:
            yield f"draftp.{key} has no effect with draftp.kl_coeff 0: there is no penalty to weigh"
    for name, setting in cfg.rewards.items():
        if setting.weight == 0:
            yield f"rewards.{name}.weight 0: it is computed and logged, but not trained on"
            if setting.robust is not None:
                yield f"rewards.{name}.robust has no effect with weight 0, and costs a pass of the reward"
    yield from _idle_prefix(cfg)
    if peft.peft_scheme == "none" and peft.model_fields_set & {"rank", "alpha", "target_modules"}:
        yield "peft.rank, alpha and target_modules have no effect: peft_scheme none trains the whole UNet"
    if cfg.ema.decay is None and cfg.ema.model_fields_set - {"decay"}:
        yield "ema.device, in_validation and in_final have no effect without ema.decay"


def _idle_prefix(cfg: Config) -> Iterator[str]:
    draftp, before = cfg.draftp, cfg.sampling.steps - cfg.draftp.truncation_steps
    if draftp.prefix_steps is None and "prefix_sampler" in draftp.model_fields_set:
        yield f"draftp.prefix_sampler {draftp.prefix_sampler} has no effect without draftp.prefix_steps"
    if draftp.prefix_steps is None or draftp.gradient_mode[0] not in ("last_k", "low_variance"):
        return
    calls = draftp.prefix_steps * (2 if draftp.prefix_sampler == "heun" else 1)
    if calls >= before > 0:
        yield (
            f"draftp.prefix_steps {draftp.prefix_steps} of {draftp.prefix_sampler} saves nothing: the run's own "
            f"{before} steps before the gradient take no more evaluations"
        )


def _idle_sampling(cfg: Config) -> Iterator[str]:
    sampling = cfg.sampling
    if cfg.model.config is not None and not is_single_file(cfg.model.pretrained):
        yield f"model.config has no effect: {cfg.model.pretrained} is no single file and has a configuration of its own"
    if sampling.scale == 1 and sampling.negative_prompt is not None:
        yield "sampling.negative_prompt has no effect at sampling.scale 1"
    if sampling.scale == 1 and cfg.draftp.detach_uncond:
        yield "draftp.detach_uncond has no effect at sampling.scale 1, which has no unconditional half"
    if sampling.scale == 1 and sampling.guidance_interval != (0, 1):
        yield "sampling.guidance_interval has no effect at sampling.scale 1"
    if sampling.timesteps and sampling.schedule == "leading":
        yield "sampling.schedule has no effect: sampling.timesteps says which steps are taken"
    edge = max(sampling.height, sampling.width, *(edge for size in sampling.sizes for edge in size))
    if (cfg.model.vae_tile or 0) >= edge:
        yield f"model.vae_tile {cfg.model.vae_tile} has no effect on images of up to {edge} pixels"


def _idle_sharding(cfg: Config) -> Iterator[str]:
    sharding, given = cfg.sharding, cfg.sharding.model_fields_set
    asks_to_fold = "fold_lora" in given and sharding.fold_lora
    if cfg.peft.peft_scheme == "none" and given & {"fold_lora", "fold_tolerance"}:
        yield "sharding.fold_lora and fold_tolerance have no effect: peft_scheme none has no LoRA"
    if sharding.strategy == "fsdp" and asks_to_fold:
        yield "sharding.fold_lora has no effect: fsdp never folds, the weights are spread over several processes"
    if cfg.model.quantize is not None and asks_to_fold:
        yield f"sharding.fold_lora has no effect with model.quantize={cfg.model.quantize}: these weights cannot change"
    if sharding.strategy != "fsdp" and sharding.shard_size is not None:
        yield f"sharding.shard_size has no effect with sharding.strategy {sharding.strategy}; it is for fsdp"
    if not sharding.two_stage and given & {"recompute_steps", "prefix_batch_size", "decode_batch_size"}:
        yield "sharding.recompute_steps, prefix_batch_size and decode_batch_size have no effect: two_stage is false"
    if not sharding.fold_lora and "fold_tolerance" in given:
        yield "sharding.fold_tolerance has no effect: fold_lora is false"
    micro = cfg.trainer.micro_batch_size
    group = cfg.trainer.global_batch_size // cfg.draftp.reuse
    if micro > group:
        yield (
            f"trainer.micro_batch_size {micro} has no effect above {group}: with draftp.reuse {cfg.draftp.reuse}, that "
            "many images belong together"
        )
    if (sharding.decode_batch_size or 0) > micro:
        yield f"sharding.decode_batch_size has no effect above trainer.micro_batch_size {micro}"
