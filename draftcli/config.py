"""The settings: preset < file < --set, in one pydantic model; checked, printed, saved in the run folder.

A recipe is one YAML file. `load_config("toy", ["draftp.kl_coeff=0.1"])` takes a preset's name or a file, then overrides
by dotted key. Names that a NeMo-Aligner user knows keep their name. The docstring under a field is its documentation.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from draftcli.errors import InputError, brief

Precision = Literal["fp64", "fp32", "bf16", "fp16"]
Size = Annotated[int, Field(ge=16, le=8192, multiple_of=8)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountFromZero = Annotated[int, Field(ge=0, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]
LONGEST_KEY = 120  # letters of a setting's name that a message repeats


class Section(BaseModel):
    """Settings are frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which SDXL, where and in which precision."""

    pretrained: Annotated[str, Field(min_length=1)] = "toy"
    """Diffusers folder, hub id, single .safetensors file, or `toy`."""
    config: str | None = None
    """Folder or hub id with configuration and tokenizers for a single file; default the hub's SDXL base."""
    vae: str | None = None
    """Another VAE: diffusers folder, hub id or .safetensors."""
    variant: str | None = None
    """Which files of a folder or hub id, such as `fp16`."""
    precision: Precision = "fp32"
    """Of the networks' matrix products. Trained weights and latents stay in float32 (float64 with fp64)."""
    quantize: Literal["8bit"] | None = None
    """8bit: train a LoRA on a base whose transformer blocks are kept in 8 bits, at half of bf16's memory; needs the
    extra `bitsandbytes`. Pictures and gradient change by about a percent. sample, anneal and eval draw with the base as
    it is."""
    vae_precision: Precision | None = None
    """Default float32: SDXL's own VAE gives NaN in fp16."""
    vae_tile: Annotated[int, Field(ge=64, le=8192, multiple_of=8)] | None = None
    """Decode in overlapping tiles of this many pixels, each again in backward: less memory. Pictures and gradient
    change a little, as the decoder's norms and attention see one tile at a time."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the network predicts; default as its scheduler configuration says."""
    zero_terminal_snr: bool | None = None
    """Trained with rescaled betas; default as its scheduler configuration says."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    offload_text_encoders: bool = False
    """Keep the text encoders on the CPU between batches."""


class SamplingConfig(Section):
    """How pictures are drawn, in training as in validation."""

    height: Size = 1024
    width: Size = 1024
    steps: Annotated[int, Field(ge=1, le=1000)] = 25
    """N, sampler steps."""
    scale: Annotated[float, Field(ge=0, le=100)] = 5.0
    """Classifier-free guidance; 1 is none."""
    sampler: Literal["euler", "heun", "ddim", "dpmpp_2m"] = "euler"
    """heun takes two evaluations a step; heun and dpmpp_2m draw only, training is with euler or ddim."""
    schedule: Literal["trailing", "leading"] = "trailing"
    """Step grid. Trailing gives the last step, the only one with gradient when K = 1, five times more leverage."""
    s_churn: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Fresh noise per step (Karras et al. 2022), one draw for tuned and base."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """First and last part of the steps with guidance, [from, to) in shares of N; outside, scale 1 at half the price
    (Kynkäänniemi et al. 2024). It changes the pictures, and other programs that draw with the LoRA must do the same."""
    negative_prompt: str | None = None
    sizes: list[tuple[Size, Size]] = []
    """(height, width) pairs that training draws from, one size a batch; empty: always height x width."""

    def is_guided(self, step: int) -> bool:
        """Whether a sampler step, 0 .. steps - 1, takes two evaluations: with the prompt and without."""
        first, last = self.guidance_interval
        return self.scale != 1 and first <= step / self.steps < last


class DraftpConfig(Section):
    """The method."""

    truncation_steps: Count = 1
    """K: the last K sampler steps carry gradient."""
    kl_coeff: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the KL penalty to the frozen base. It acts on guided noise: its strength moves with sampling.scale."""
    kl_kind: Literal["eps"] = "eps"
    """eps: mean squared difference of the guided noise estimates of tuned and base, as in the reference."""
    log_kl: bool = True
    """Measure the penalty also where kl_coeff is 0, at the price of K base evaluations an image."""
    low_variance_samples: CountFromZero = 0
    """DRaFT-LV: n more samples of the last step per rollout, x_0 noised again and denoised; the loss is their mean."""

    @property
    def needs_base(self) -> bool:
        """Whether training asks the base at all: for the penalty, or to log it."""
        return self.kl_coeff > 0 or self.log_kl


class PeftConfig(Section):
    """What is trained."""

    peft_scheme: Literal["lora", "none"] = "lora"
    """lora, or none: the whole UNet."""
    rank: Count = 32
    """Inner width of the LoRA."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the LoRA is alpha / rank; default alpha = rank."""
    target_modules: Annotated[list[str], Field(min_length=1)] = [
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
    ]  # fmt: skip
    """Endings of the UNet's module names: linear layers or convolutions."""


class RelativeConfig(Section):
    """Score a picture by its own difference between two wordings of its prompt (SRPO, arXiv 2509.06942)."""

    positive: Annotated[str, Field(min_length=1)]
    """Control words put before the prompt, such as `Natural lighting`: wanted."""
    negative: Annotated[str, Field(min_length=1)]
    """Control words put before the prompt, such as `Oil painting`: unwanted."""
    strength: Annotated[float, Field(ge=0)] = 0.0
    """k in (1 + k) * positive - negative: how much of the plain reward stays beside the difference."""


class RewardSource(Section):
    """Where a reward comes from and how it is asked; all that a held-out reward needs."""

    pretrained: str | None = None
    """Its weights: hub id, local folder or local file; default the official ones."""
    backbone: str | None = None
    """What its weights stand on (the CLIP under an aesthetic head, the tokenizer's folder), where it lies elsewhere."""
    relative: RelativeConfig | None = None
    """Only for rewards that compare a picture's embedding with its prompt's: clip, pickscore, hpsv2, hpsv2_1, toy."""
    micro_batch_size: Count | None = None
    """At most so many pictures go through it at a time; their activations are recomputed in backward. Less memory,
    about a third more time, the same scores."""


class RewardConfig(RewardSource):
    """One reward's part in the sum."""

    weight: float = 1.0
    normalise: Literal["none", "std", "range"] = "none"
    """Divide by what the scores of the training so far span: their deviation over about the last hundred steps, or
    largest minus smallest. The first step of a run only measures."""
    target: float | None = None
    """Stop pushing where an image's score is above this: min(score, target)."""


def _weight_alone(value: Any) -> Any:
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _by_name(value: Any) -> Any:
    """A list of names, some of them as {name: NAME, ...}, becomes the mapping NAME: {...}."""
    if not isinstance(value, list):
        return {name: source or {} for name, source in value.items()} if isinstance(value, dict) else value
    named: dict[str, Any] = {}
    for item in value:
        source = dict(item) if isinstance(item, dict) else {"name": item}
        name = source.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"expected a name or {{name: NAME, pretrained: ...}}, found {brief(item)}")
        named[name] = source
    return named


class DataConfig(Section):
    """Prompts."""

    prompts: str | Annotated[list[str], Field(min_length=1)] = "toy-train"
    """A .txt, .jsonl or .tar file, the name of a built-in set, a dataset's id (owner/name:column), or a list."""
    validation_prompts: str | list[str] = []
    """Held-out prompts, likewise; empty: no validation."""
    validation_images: Count = 1
    """Pictures per validation prompt, at seeds trainer.seed, trainer.seed + 1, ..."""


class SchedConfig(Section):
    """Learning rate over time, by diffusers.optimization.get_scheduler."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: CountFromZero = 0


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits, 2 bytes a weight instead of 8, for full fine-tuning; needs the extra
    `bitsandbytes`."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    sched: SchedConfig = SchedConfig()


class TrainerConfig(Section):
    """The loop."""

    max_steps: Count = 300
    micro_batch_size: Count = 1
    """Images per backward."""
    global_batch_size: Count = 16
    """Images per optimizer step."""
    gradient_clip_val: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null: no clipping."""
    val_check_interval: CountFromZero = 50
    """Steps between validations (also at the start and the end); 0: never."""
    save_interval: Count = 50
    """Steps between checkpoints (also at the end)."""
    keep_checkpoints: Count = 2
    """The newest so many stay, and the best by the first of held_out_rewards (else by the trained reward on held-out
    prompts)."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234


class EmaConfig(Section):
    """A moving average of the trained weights."""

    decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Such as 0.99: an average over about 1 / (1 - decay) steps; null: no average."""
    device: Literal["same", "cpu"] = "same"
    """Where the average is kept: on the weights' device, or in the computer's memory."""
    in_validation: bool = True
    """Validate the average rather than the weights of the last step."""
    in_final: bool = True
    """Write the average to final/ rather than the weights of the last step."""


class ShardingConfig(Section):
    """Memory, speed and processes: nothing here changes the gradient beyond rounding."""

    strategy: Literal["none", "ddp", "fsdp"] = "none"
    """How several processes share the work. none, ddp: each has a whole copy, gradients are averaged (one process needs
    neither). fsdp: weights, gradients, optimizer and the frozen base of full fine-tuning are split over them."""
    shard_size: Count | None = None
    """With fsdp: so many neighbouring processes split one copy, and copies work side by side, for several nodes: the
    GPUs of one node. Default: all processes split one copy."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10080)] = 120
    """How long one process waits for another before all give up; longer than the longest validation or saving."""
    activation_checkpointing: bool = False
    """Recompute the activations of UNet and VAE in backward: less memory, about a third more time in gradient steps."""
    two_stage: bool = True
    """First decoder and reward with their backward, then the gradient steps: the peak is the larger, not the sum."""
    recompute_steps: bool | None = None
    """Run each gradient step again when its backward comes, so that memory does not grow with K: one more forward pass
    a step. Default: where K is above 1 and activation_checkpointing on, with offload, and where
    draftp.low_variance_samples is above 0."""
    prefix_batch_size: Count | None = None
    """Images drawn together where no gradient is needed; default 8, at least trainer.micro_batch_size."""
    decode_batch_size: Count | None = None
    """Images per backward of decoder and reward; default trainer.micro_batch_size."""
    fold_lora: bool = True
    """Fold the LoRA into the weights where no gradient is needed: faster, for a second copy of the adapted weights."""
    fold_tolerance: Annotated[float, Field(ge=0)] = 0.01
    """Don't fold where rounding would take a larger share of the LoRA: that of an early one in bf16 is nearly all."""
    offload: bool = False
    """Keep on the GPU only what a phase needs, the UNet or decoder and rewards; the other's frozen weights wait in the
    computer's memory. Two transfers a step; gradient steps are recomputed (recompute_steps)."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of the UNet's attention, one of torch's; auto: the one torch thinks best. math keeps the whole matrix."""
    compile: bool = False
    """torch.compile on the UNet's blocks: minutes in the first step, for fewer and larger kernels afterwards."""
    prompt_cache: str | None = None
    """Folder that keeps the prompts' embeddings for later runs; in memory they are kept anyway."""
    channels_last: bool = False
    """Lay out the UNet's and the decoder's convolutions channels last."""


class LoggingConfig(Section):
    """Where figures go beside metrics.jsonl."""

    trackers: list[Annotated[str, Field(min_length=1)]] = ["tensorboard"]
    """By accelerate's names: tensorboard, wandb, mlflow, trackio, comet_ml, aim, ... All but tensorboard need a package
    of their own (wandb is an extra of draftp). WANDB_MODE=offline keeps the figures for wandb on this machine."""
    project: Annotated[str, Field(min_length=1)] = "draftp"
    """The project, or experiment, that trackers other than tensorboard put the run into."""

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, data: Any) -> Any:
        """The first version's `tensorboard: true|false` and `wandb: PROJECT|null` add a tracker or take it away."""
        if not isinstance(data, dict) or not data.keys() & {"tensorboard", "wandb"}:
            return data
        data = {"trackers": ["tensorboard"], **data}
        wanted: dict[str, bool] = {}
        if "tensorboard" in data:
            given = data.pop("tensorboard")
            if not isinstance(given, bool):
                raise ValueError(f"tensorboard is {brief(given)}; it can be true or false")
            wanted["tensorboard"] = given
        if "wandb" in data:
            project = data.pop("wandb")
            wanted["wandb"] = project is not None
            if project is not None:
                data["project"] = project
        if isinstance(data["trackers"], list):
            kept = [name for name in data["trackers"] if name not in [*wanted] or wanted[name]]
            data["trackers"] = kept + [name for name, is_wanted in wanted.items() if is_wanted and name not in kept]
        return data


class Config(Section):
    """Everything a run is started with."""

    model: ModelConfig = ModelConfig()
    sampling: SamplingConfig = SamplingConfig()
    draftp: DraftpConfig = DraftpConfig()
    peft: PeftConfig = PeftConfig()
    rewards: dict[str, Annotated[RewardConfig, BeforeValidator(_weight_alone)]] = Field(
        default={}, validate_default=True
    )
    """NAME: WEIGHT, or NAME: {weight, normalise, target, ...}; NAME is built in, a plug-in's or package.module:object.
    """
    held_out_rewards: Annotated[dict[str, RewardSource], BeforeValidator(_by_name)] = Field(
        default={}, validate_default=True
    )
    """Logged in validation, never trained on: [NAME, ...], or NAME: {pretrained, ...}."""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    ema: EmaConfig = EmaConfig()
    sharding: ShardingConfig = ShardingConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        steps, k = self.sampling.steps, self.draftp.truncation_steps
        if k > steps:
            raise ValueError(f"draftp.truncation_steps is {k}, sampling.steps {steps}: K can be at most {steps}")
        micro, total = self.trainer.micro_batch_size, self.trainer.global_batch_size
        if total % micro:
            near = sorted({max(micro, total // micro * micro), (total // micro + 1) * micro})
            raise ValueError(
                f"trainer.global_batch_size {total} is not a multiple of trainer.micro_batch_size {micro}; "
                f"the nearest that work: {', '.join(map(str, near))}"
            )
        low, high = self.sampling.guidance_interval
        if low > high:
            raise ValueError(f"sampling.guidance_interval is [{low:g}, {high:g}]: the first number is the smaller one")
        if self.draftp.low_variance_samples and not self.sharding.two_stage:
            raise ValueError("draftp.low_variance_samples needs sharding.two_stage true")
        if self.sharding.offload and not (self.sharding.two_stage and self.sharding.recompute_steps is not False):
            raise ValueError("sharding.offload needs sharding.two_stage true, and recompute_steps not to be false")
        if self.sharding.offload and self.sharding.strategy == "fsdp":
            raise ValueError("sharding.offload does not go with sharding.strategy fsdp, which splits the weights")
        if self.sharding.channels_last and self.sharding.strategy == "fsdp":
            raise ValueError("sharding.channels_last does not go with sharding.strategy fsdp, which has its own")
        self._check_8_bits()
        if self.sharding.strategy == "fsdp" and self.ema.decay is not None and self.ema.device == "cpu":
            raise ValueError(
                "ema.device cpu does not go with sharding.strategy fsdp, which splits the average: leave it"
            )
        return self

    def _check_8_bits(self) -> None:
        """Raise ValueError where bitsandbytes could not do what is asked of it."""
        for key, value in (("model.quantize", self.model.quantize), ("optim.name", self.optim.name)):
            if value not in ("8bit", "adamw8bit"):
                continue
            if self.sharding.strategy == "fsdp":
                raise ValueError(f"{key} {value} does not go with sharding.strategy fsdp; use ddp, or leave it out")
            if self.model.precision == "fp64":
                raise ValueError(f"{key} {value} does not go with model.precision fp64; use fp32, bf16 or fp16")
        if self.model.quantize and self.peft.peft_scheme == "none":
            raise ValueError(
                f"model.quantize {self.model.quantize} is for a frozen base, and peft.peft_scheme none trains all of "
                "it; use lora, or optim.name adamw8bit instead"
            )

    def warnings(self) -> list[str]:
        """Settings that somebody gave, that are allowed, and that yet have no effect or hardly the one meant."""
        trainer, sched = self.trainer, self.optim.sched
        validates = bool(trainer.val_check_interval and self.data.validation_prompts)
        given, sharding = trainer.model_fields_set, self.sharding
        lora_settings = self.peft.model_fields_set & {"rank", "alpha", "target_modules"}
        edge = max(self.sampling.height, self.sampling.width, *(edge for size in self.sampling.sizes for edge in size))
        beyond = f"is beyond trainer.max_steps {trainer.max_steps}"
        rules = [
            (
                sched.warmup_steps > trainer.max_steps,
                f"optim.sched.warmup_steps {sched.warmup_steps} {beyond}: the learning rate never gets there",
            ),
            (
                sched.name == "constant" and sched.warmup_steps > 0,
                "optim.sched.warmup_steps has no effect with the schedule constant; use constant_with_warmup",
            ),
            (
                "save_interval" in given and trainer.save_interval > trainer.max_steps,
                f"trainer.save_interval {trainer.save_interval} {beyond}: only the end is saved",
            ),
            (
                "val_check_interval" in given and validates and trainer.val_check_interval > trainer.max_steps,
                f"trainer.val_check_interval {trainer.val_check_interval} {beyond}: validation at start and end only",
            ),
            (
                "val_check_interval" in given and trainer.val_check_interval > 0 and not self.data.validation_prompts,
                "trainer.val_check_interval has no effect: data.validation_prompts is empty",
            ),
            (bool(self.held_out_rewards) and not validates, "held_out_rewards have no effect without validation"),
            *(
                (setting.weight == 0, f"rewards.{name}.weight 0: it is computed and logged, and trains nothing")
                for name, setting in self.rewards.items()
            ),
            (
                self.peft.peft_scheme == "none" and bool(lora_settings),
                "peft.rank, alpha and target_modules have no effect: peft_scheme none trains the whole UNet",
            ),
            (
                self.ema.decay is None and bool(self.ema.model_fields_set - {"decay"}),
                "ema.device, in_validation and in_final have no effect without ema.decay",
            ),
            (
                self.sampling.scale == 1 and self.sampling.negative_prompt is not None,
                "sampling.negative_prompt has no effect at sampling.scale 1",
            ),
            (
                self.sampling.scale == 1 and self.sampling.guidance_interval != (0, 1),
                "sampling.guidance_interval has no effect at sampling.scale 1",
            ),
            (
                self.peft.peft_scheme == "none" and bool(sharding.model_fields_set & {"fold_lora", "fold_tolerance"}),
                "sharding.fold_lora and fold_tolerance have no effect: peft_scheme none has no LoRA",
            ),
            (
                sharding.strategy == "fsdp" and "fold_lora" in sharding.model_fields_set and sharding.fold_lora,
                "sharding.fold_lora has no effect: fsdp never folds, the weights lie on several processes",
            ),
            (
                self.model.quantize is not None and "fold_lora" in sharding.model_fields_set and sharding.fold_lora,
                f"sharding.fold_lora has no effect: model.quantize {self.model.quantize} leaves no room to fold into",
            ),
            (
                sharding.strategy != "fsdp" and sharding.shard_size is not None,
                f"sharding.shard_size has no effect with sharding.strategy {sharding.strategy}; it is for fsdp",
            ),
            (
                not sharding.two_stage
                and bool(sharding.model_fields_set & {"recompute_steps", "prefix_batch_size", "decode_batch_size"}),
                "sharding.recompute_steps, prefix_batch_size and decode_batch_size have no effect: two_stage is false",
            ),
            (
                not sharding.fold_lora and "fold_tolerance" in sharding.model_fields_set,
                "sharding.fold_tolerance has no effect: fold_lora is false",
            ),
            (
                (sharding.decode_batch_size or 0) > trainer.micro_batch_size,
                f"sharding.decode_batch_size has no effect above trainer.micro_batch_size {trainer.micro_batch_size}",
            ),
            (
                (self.model.vae_tile or 0) >= edge,
                f"model.vae_tile {self.model.vae_tile} has no effect on pictures of up to {edge} pixels",
            ),
            (
                sharding.recompute_steps is False and self.draftp.low_variance_samples > 0,
                "sharding.recompute_steps false has no effect: draftp.low_variance_samples recomputes",
            ),
        ]
        return [text for holds, text in rules if holds]


def presets_folder() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(p for p in (package / "presets", package.parent / "presets") if p.is_dir())


def preset_names() -> list[str]:
    """The recipes that ship with draftp."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def load_config(
    preset: str | Path | None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Config:
    """Read a recipe and apply overrides.

    Args:
        preset: a preset's name, or a YAML file. None: the defaults.
        overrides: `KEY=VALUE` with a dotted key and a YAML value, such as `trainer.max_steps=300`. A later one wins.
        values: settings by dotted key that are no text to be parsed, applied before the overrides.

    Raises:
        InputError: no such preset or file, invalid YAML, an unknown key (the nearest known one is named), a value
            that is not allowed.
    """
    data = {} if preset is None else _read_yaml(_find(str(preset)))
    for key, value in (values or {}).items():
        _set(data, key.split("."), value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override[:LONGEST_KEY]}: expected KEY=VALUE, such as --set trainer.max_steps=300")
        _set(data, _split(key.strip()), _parse(text, f"--set {override[:LONGEST_KEY]}"))
    return check_config(data)


def parse_reward(text: str) -> tuple[str, float]:
    """`NAME` or `NAME=WEIGHT`, as on the command line.

    Raises:
        InputError: no name, or a weight that is no number.
    """
    name, equals, weight = text.partition("=")
    try:
        number = float(weight) if equals else 1.0
    except ValueError:
        number = float("nan")
    if not name or not math.isfinite(number):
        raise InputError(f"--reward {text}: expected NAME or NAME=WEIGHT, such as pickscore=0.5")
    return name, number


def check_config(data: dict[str, Any]) -> Config:
    """The settings in `data`, checked.

    Raises:
        InputError: as for `load_config`.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise InputError("; ".join(_explain(e) for e in error.errors()[:3])) from None


def check_batch_size(micro: int, total: int, processes: int) -> None:
    """See that a step's pictures can be shared out evenly.

    Args:
        micro: trainer.micro_batch_size.
        total: trainer.global_batch_size.
        processes: that train together.

    Raises:
        InputError: they cannot; names the nearest sizes that work.
    """
    unit = micro * processes
    if total % unit:
        near = sorted({max(unit, total // unit * unit), (total // unit + 1) * unit})
        raise InputError(
            f"trainer.global_batch_size {total} is not a multiple of trainer.micro_batch_size {micro} times "
            f"{processes} processes; the nearest that work: {', '.join(map(str, near))}"
        )


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find(preset: str) -> Path:
    path = Path(preset)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise InputError(f"{preset}: there is no such file")
        return path
    names = preset_names()
    if preset in names:
        return presets_folder() / f"{preset}.yaml"
    raise InputError(
        f"unknown preset {brief(preset)}{_nearest(preset, names)}; there are: {', '.join(names)}, or give a .yaml file"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: expected settings by section (model:, sampling:, ...), found a {type(data).__name__}"
        )
    return data


def _parse(text: str, where: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{where}: invalid YAML{f' at line {mark.line + 1}' if mark else ''}") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text; people mean the number.
        try:
            return float(value) if value.strip()[:1] in "0123456789+-." and "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    node = data
    for key in keys[:-1]:
        child = node.get(key)
        if isinstance(child, list) and key == "held_out_rewards":
            try:
                node[key] = child = _by_name(child)
            except ValueError as error:
                raise InputError(f"{key} = {brief(child)}: {error}") from None
        if not isinstance(child, dict):
            # `rewards: {toy: 1.0}` and --set rewards.toy.target=2: the short form becomes the long one.
            child = {} if child is None else {"weight": child}
            node[key] = child
        node = child
    node[keys[-1]] = value


def _split(key: str) -> list[str]:
    """A dotted key in parts; a reward's `package.module:object` is one of them."""
    match = re.fullmatch(r"(rewards|held_out_rewards)\.([\w.]+:\w+)(?:\.(.+))?", key)
    if match is None:
        return key.split(".")
    section, name, rest = match.groups()
    return [section, name, *(rest.split(".") if rest else [])]


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:LONGEST_KEY], known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `location` knows."""
    section: Any = Config
    for part in location:
        if part in ("rewards", "held_out_rewards"):
            section = RewardConfig if part == "rewards" else RewardSource
            continue
        if part == "relative":
            section = RelativeConfig
            continue
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)


def _explain(error: Any) -> str:
    location = tuple(part for part in error["loc"] if not str(part).startswith("function-"))
    key = ".".join(str(part) for part in location)[:LONGEST_KEY]
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        sections = {name: field.annotation for name, field in Config.model_fields.items()}
        elsewhere = [f"{name}.{k}" for name, s in sections.items() if _is_section(s) for k in s.model_fields]
        near = _nearest(str(location[-1]), known) or _nearest(key, elsewhere)
        where = ".".join(map(str, location[:-1]))[:LONGEST_KEY] or "the settings"
        return f"unknown setting {key}{near or f'; {where} knows: ' + ', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {brief(error['input'])}: {message[:1].lower()}{message[1:]}"


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)
