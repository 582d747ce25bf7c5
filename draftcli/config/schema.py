"""Every setting, by section, with its type, range and default; the docstring under a field is its documentation.

Names that a NeMo-Aligner user knows keep their name. What two settings forbid each other is in rules.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from draftcli.config.sampling import SamplingConfig
from draftcli.config.section import Count, CountFromZero, LocalPath, Precision, Section
from draftcli.errors import brief


class ModelConfig(Section):
    """Which model, where and in which precision."""

    pretrained: Annotated[LocalPath, Field(min_length=1)] = "toy"
    """Diffusers folder, hub id, single .safetensors file, or `toy`."""
    family: Literal["auto", "sdxl", "sd1"] = "auto"
    """sdxl: Stable Diffusion XL; sd1: Stable Diffusion 1.x and 2.x; auto: what the model's own files tell."""
    config: LocalPath | None = None
    """Folder or hub id with configuration and tokenizers for a single file; default that of the family's
    base on the hub."""
    vae: LocalPath | None = None
    """Another VAE: diffusers folder, hub id or .safetensors."""
    variant: str | None = None
    """Variant of the files in a folder or on the hub, such as `fp16`."""
    loras: tuple[LocalPath, ...] = ()
    """LoRAs that are part of the base, as PATH or PATH=SCALE: they are merged into its weights at load time, text
    encoders included, and frozen. The run trains and writes its own LoRA on top. `toy-4step` ships with draftp."""
    precision: Precision = "fp32"
    """Precision of the networks' matrix products. Trained weights and latents stay in float32 (float64 with fp64)."""
    quantize: Literal["8bit"] | None = None
    """8bit: train a LoRA on a base whose transformer blocks are stored in 8 bits, half the memory of bf16; needs the
    extra `bitsandbytes`. Images and gradient change by about a percent. sample, anneal and eval use the original base.
    """
    vae_precision: Precision | None = None
    """Default float32: SDXL's own VAE gives NaN in fp16."""
    vae_tile: Annotated[int, Field(ge=64, le=8192, multiple_of=8)] | None = None
    """Decode in overlapping tiles of this many pixels, and again in backward, to save memory. Images and gradient
    change slightly, because the decoder's norms and attention see one tile at a time."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the network predicts; default: as its scheduler configuration says. sample: the image itself, as in
    SDXL-Lightning's one-step model."""
    zero_terminal_snr: bool | None = None
    """Trained with rescaled betas; default: as its scheduler configuration says."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    offload_text_encoders: bool = False
    """Keep the text encoders on the CPU between batches."""


class DraftpConfig(Section):
    """The method."""

    truncation_steps: Count = 1
    """K: the last K sampler steps carry gradient. For the modes last_k and low_variance of draftp.gradient; the others
    have options of their own."""
    kl_coeff: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the KL penalty to the frozen base. With kl_kind eps its effect depends on sampling.scale."""
    kl_kind: str = "eps"
    """What the penalty compares between the fine-tuned model and the base, by mean squared difference. eps: the guided
    noise estimates, as in the reference. conditional: those for the prompt alone, so that kl_coeff does not depend on
    sampling.scale. x0: the images predicted at each step, eps times sigma^2."""
    kl_target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Steer the coefficient so that the penalty stays near this value: after each step it grows or shrinks by a quarter
    of the penalty's relative distance from the target, at most by 5 %. It begins at kl_coeff and stays within 100 times
    that, up and down. Default: the coefficient is kl_coeff throughout."""
    kl_gate: Literal["none", "held_out"] = "none"
    """How much the penalty counts for each image. none: as much for all. held_out: for those that rank higher by the
    trained reward than by held_out_rewards, as much more as the two ranks differ, and not for the others; 1 on average,
    at most 6. Asks held_out_rewards about each image of the training, without gradient."""
    kl_by_reward: bool = False
    """The penalty of an image counts twice the share of the last hundred steps' images whose trained reward was lower:
    little where it is low, up to twice where it is high; 1 on average."""
    combine: Literal["sum", "min"] = "sum"
    """How several rewards are combined. sum: weighted sum. min: for each image, the reward that has gained least since
    the first step, in units of its `normalise`, so that none rises at the expense of another; weights are 1 or -1."""
    log_kl: bool = True
    """Measure the penalty even if kl_coeff is 0, which costs K base evaluations per image."""
    gradient: str | dict[str, Any] = "last_k"
    """Which steps carry gradient: a mode's NAME, or {mode: NAME, option: value}. last_k (the last K), random_k {low,
    high} or {mean, std}, low_variance {samples}, refl {window}, drtune {steps, stop}, sparse {steps, late_bias, tail,
    rescale} or matching {share, scale, weight}; docs/training.md says which to take when."""
    prefix_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of steps, on a grid of their own, from noise to the first step that may carry gradient; 10 to 12 replace
    24. Default: the run's own steps. It applies to training only; all images that are shown or scored use the run's own
    steps."""
    prefix_sampler: Literal["euler", "heun", "ddim", "dpmpp_2m"] = "dpmpp_2m"
    """Sampler for those steps; heun takes two evaluations for each."""
    reuse: Count = 1
    """Use each image's prefix, the steps before the first one that may carry gradient, in this many optimizer steps. A
    step then computes only that share of its prefixes; the others were computed with weights of up to reuse - 1 steps
    before."""
    detach_uncond: bool = False
    """No gradient through the unconditional half of guidance: half of the backward pass, and a different gradient."""
    low_variance_samples: CountFromZero = 0
    """DRaFT-LV: n more samples of the last step per rollout, x_0 noised again and denoised; the loss is their mean. The
    same as gradient {mode: low_variance, samples: n}."""

    @property
    def needs_base(self) -> bool:
        """Whether training asks the base at all: for the penalty, or to log it."""
        return self.kl_coeff > 0 or self.log_kl

    @property
    def asks_held_out(self) -> bool:
        """Whether training, not validation alone, asks the held-out rewards."""
        return self.kl_gate == "held_out" and self.kl_coeff > 0

    @property
    def gradient_mode(self) -> tuple[str, dict[str, Any]]:
        """The gradient mode's name, and its options."""
        if self.low_variance_samples:
            return "low_variance", {"samples": self.low_variance_samples}
        options = {"mode": self.gradient} if isinstance(self.gradient, str) else dict(self.gradient)
        return options.pop("mode", "last_k"), options


class PeftConfig(Section):
    """What is trained."""

    peft_scheme: Literal["lora", "none"] = "lora"
    """lora, or none: the whole UNet."""
    rank: Count = 32
    """Inner width of the LoRA."""
    init_from: LocalPath | None = None
    """LoRA to start from; rank, alpha and target_modules follow it. The base does not include it."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the LoRA is alpha / rank; default alpha = rank."""
    target_modules: Annotated[list[str], Field(min_length=1)] = [
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2",
    ]  # fmt: skip
    """Endings of the UNet's module names: linear layers or convolutions."""


class RelativeConfig(Section):
    """Score an image by its own difference between two wordings of its prompt (SRPO, arXiv 2509.06942)."""

    positive: Annotated[str, Field(min_length=1)]
    """Control words put before the prompt, such as `Natural lighting`: wanted."""
    negative: Annotated[str, Field(min_length=1)]
    """Control words put before the prompt, such as `Oil painting`: unwanted."""
    strength: Annotated[float, Field(ge=0)] = 0.0
    """k in (1 + k) * positive - negative: how much of the plain reward is added to the difference."""


class RewardSource(Section):
    """Where a reward comes from and how it is asked; all that a held-out reward needs."""

    pretrained: LocalPath | None = None
    """The reward's weights: hub id, local folder or local file; default: the official ones."""
    backbone: LocalPath | None = None
    """The reward's backbone (the CLIP under an aesthetic head, the tokenizer's folder), if it is stored elsewhere."""
    relative: RelativeConfig | None = None
    """Only for rewards that compare an image's embedding with that of its prompt: clip, pickscore, hpsv2, hpsv2_1, ict,
    toy.
    """
    micro_batch_size: Count | None = None
    """Number of images that go through the reward at a time; their activations are recomputed in backward. Less memory,
    about a third more time, the same scores."""


class RewardConfig(RewardSource):
    """One reward's part in the sum."""

    weight: float = 1.0
    """Weight of this reward in the sum. Negative: lower scores are better."""
    normalise: Literal["none", "std", "range"] = "none"
    """Divide by the spread of the scores so far: their standard deviation over about the last hundred steps, or largest
    minus smallest. The first step of a run only collects statistics."""
    target: float | None = None
    """Stop pushing images that score above this: min(score, target); with a negative weight max(score, target)."""
    robust: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Take the reward's gradient at the worst image within this distance rather than at the image itself (RSA-FT). The
    distance is Euclidean over all values of an image, 0 to 1 each: one of rho moves a value of an H x W image by rho /
    sqrt(3 H W) in root mean square. One more forward and backward pass of the reward; its score stays that of the
    image. The paper takes 0.01."""


def trained_signs(weights: dict[str, float]) -> dict[str, int]:
    """The rewards that `weights` train on, in their order: 1 where higher scores are wanted, -1 where lower."""
    return {name: 1 if weight > 0 else -1 for name, weight in weights.items() if weight}


def _weight_alone(value: Any) -> Any:
    return {"weight": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def by_name(value: Any) -> Any:
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

    prompts: LocalPath | Annotated[list[str], Field(min_length=1)] = "toy-train"
    """A .txt, .jsonl, .tar, .csv, .tsv or .parquet file, a folder of .txt files, the name of a built-in set, a
    dataset's id (owner/name:column), or a list."""
    validation_prompts: LocalPath | list[str] = []
    """Held-out prompts, likewise; empty: no validation."""
    validation_images: Count = 1
    """Images per validation prompt, at seeds trainer.seed, trainer.seed + 1, ..."""
    validation_cache: LocalPath | None = None
    """Folder that stores the base's images and scores of validation for other runs with the same base, rewards, prompts
    and seeds; each run keeps its own anyway."""


class SchedConfig(Section):
    """Learning rate over time, by diffusers.optimization.get_scheduler."""

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the learning rate changes; linear and cosine fall to 0 at trainer.max_steps."""
    warmup_steps: CountFromZero = 0
    """Steps in which the learning rate rises to optim.lr; constant has none."""


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits, 2 bytes a weight instead of 8, for full fine-tuning; needs the extra
    `bitsandbytes`."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's weight decay."""
    sched: SchedConfig = SchedConfig()


class TrainerConfig(Section):
    """The loop."""

    max_steps: Count = 300
    """Optimizer steps of the whole run."""
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
    """Number of newest checkpoints to keep. The best one by the first of held_out_rewards (else by the trained reward
    on held-out prompts) and those that monitor.final may need are kept too."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of everything random in training, and of the images in validation."""


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


class MonitorConfig(Section):
    """Watching for reward hacking at each validation, and what follows; docs/training.md has the rule."""

    stop: Literal["never", "hacking"] | None = None
    """hacking: the run ends by itself where it looks like reward hacking, and final/ is written. never: it warns and
    goes on. Default: hacking where held_out_rewards names something, else never."""
    patience: Count = 1
    """Number of validations in a row that must look like it before the run ends; 2 or more tolerate a bad one."""
    final: Literal["best", "last"] = "best"
    """Step that final/ is written from when a run was ended in this way. best: among the validations before things went
    wrong, the one with the highest trained reward. last: the step at which the run ended."""


class ShardingConfig(Section):
    """Memory, speed and processes: nothing here changes the gradient beyond rounding."""

    strategy: Literal["none", "ddp", "fsdp"] = "none"
    """How several processes share the work. none, ddp: each has a whole copy, gradients are averaged (one process needs
    neither). fsdp: weights, gradients, optimizer and the frozen base of full fine-tuning are split over them."""
    shard_size: Count | None = None
    """With fsdp: number of neighbouring processes that split one copy; the copies work side by side. With several
    nodes, the number of GPUs of one node. Default: all processes split one copy."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10080)] = 120
    """How long one process waits for another before all give up; longer than the longest validation or saving."""
    activation_checkpointing: bool = False
    """Recompute the activations of UNet and VAE in backward: less memory, about a third more time in gradient steps."""
    two_stage: bool = True
    """First decoder and reward with their backward, then the gradient steps: the peak is the larger, not the sum."""
    recompute_steps: bool | None = None
    """Run each gradient step again when its backward comes, so that memory does not grow with K: one more forward pass
    a step. Default: where several steps in a row carry gradient (K above 1, random_k) and activation_checkpointing is
    on, with offload, and where draftp.gradient cannot do otherwise."""
    prefix_batch_size: Count | None = None
    """Images generated together in the steps without gradient and in validation; default 8, at least
    trainer.micro_batch_size."""
    decode_batch_size: Count | None = None
    """Images per backward of decoder and reward; default trainer.micro_batch_size."""
    fold_lora: bool = True
    """Fold the LoRA into the weights where no gradient is needed: faster, for a second copy of the adapted weights."""
    fold_tolerance: Annotated[float, Field(ge=0)] = 0.01
    """Do not fold if rounding would lose a larger share of the LoRA; early in training in bf16 it loses nearly all."""
    offload: bool = False
    """Keep on the GPU only what a phase needs, the UNet or decoder and rewards; the other's frozen weights wait in the
    computer's memory. Two transfers a step; gradient steps are recomputed (recompute_steps)."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Kernel of the UNet's attention, one of torch's; auto: the one torch thinks best. math keeps the whole matrix."""
    compile: bool = False
    """torch.compile on the UNet's blocks: minutes in the first step, for fewer and larger kernels afterwards."""
    prompt_cache: LocalPath | None = None
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
    held_out_rewards: Annotated[dict[str, RewardSource], BeforeValidator(by_name)] = Field(
        default={}, validate_default=True
    )
    """Evaluated in validation, never trained on: [NAME, ...], or NAME: {pretrained, ...}."""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    ema: EmaConfig = EmaConfig()
    monitor: MonitorConfig = MonitorConfig()
    sharding: ShardingConfig = ShardingConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def trained(self) -> dict[str, int]:
        """As `trained_signs` has it."""
        return trained_signs({name: reward.weight for name, reward in self.rewards.items()})

    @property
    def held_out(self) -> dict[str, RewardSource]:
        """Those of held_out_rewards that are held out: a recipe's own may be trained on, as --reward has it."""
        return {name: source for name, source in self.held_out_rewards.items() if name not in self.rewards}
