"""The model card that goes beside the trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from draftcli import __version__
from draftcli.built_in import BUILT_IN_LORAS
from draftcli.config import Config
from draftcli.contents import base_loras_contents
from draftcli.core.gradient.mode import make_mode
from draftcli.core.lora.adapters import LORA_FILE
from draftcli.core.models.places import BUILT_IN, base_lora
from draftcli.core.models.recognition import family_of
from draftcli.metrics.statistics import has_interval, or_nan
from draftcli.runs import ValidationLine
from draftcli.training.card_head import card_head
from draftcli.training.result import diversity_kept

LOADING = {
    "lora": f'pipe.load_lora_weights("PATH/TO/final", weight_name="{LORA_FILE}")',
    "none": 'pipe.unet = UNet2DConditionModel.from_pretrained("PATH/TO/final/unet")',
}


def _base(cfg: Config) -> str:
    if cfg.model.pretrained in BUILT_IN:
        return f'pipe = {family_of(cfg.model).pipeline}.from_pretrained(model_path("{cfg.model.pretrained}"))'
    loader = "from_single_file" if cfg.model.pretrained.endswith(".safetensors") else "from_pretrained"
    return f"pipe = {family_of(cfg.model).pipeline}.{loader}({json.dumps(cfg.model.pretrained, ensure_ascii=False)})"


# What to draw with in diffusers, by sampling.sampler; for the others the model's own scheduler does.
SCHEDULERS = {
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", ', timestep_spacing="trailing"'),
    "lcm": ("LCMScheduler", ""),
}


def _scheduler(cfg: Config) -> list[str]:
    """The line that puts it in, where there is one."""
    name, options = SCHEDULERS.get(cfg.sampling.sampler, ("", ""))
    return [f"pipe.scheduler = diffusers.{name}.from_config(pipe.scheduler.config{options})"] if name else []


def _steps(cfg: Config) -> str:
    if cfg.sampling.sampler == "euler_ancestral":  # whose scheduler takes no timesteps
        return f"num_inference_steps={cfg.sampling.steps}"
    if cfg.sampling.timesteps:
        return f"timesteps={cfg.sampling.timesteps}"
    if cfg.sampling.schedule == "leading":
        return f"num_inference_steps={cfg.sampling.steps}"
    return f"timesteps=draftcli.timesteps({cfg.sampling.steps})"


def _penalty(cfg: Config) -> str:
    draftp = cfg.draftp
    kind = "" if draftp.kl_kind == "eps" else f" ({draftp.kl_kind})"
    weights = ", counting by disagreement with the held-out rewards" if draftp.asks_held_out else ""
    weights = weights or (", counting by reward" if draftp.kl_by_reward and draftp.kl_coeff > 0 else "")
    if draftp.kl_target is None:
        return f"KL coefficient {draftp.kl_coeff:g}{kind}{weights}"
    return f"KL coefficient from {draftp.kl_coeff:g} on, steered to a penalty{kind} of {draftp.kl_target:g}{weights}"


def _prefix(cfg: Config) -> str:
    """How training got to the steps with gradient, where that was not in the steps that pictures are drawn in, or not
    for each optimizer step.
    """
    draftp = cfg.draftp
    steps = None if draftp.prefix_steps is None else f"{draftp.prefix_steps} steps of {draftp.prefix_sampler}"
    shared = "" if draftp.reuse == 1 else f"each walk there shared by {draftp.reuse} optimizer steps, "
    return ("" if steps is None else f"before them {steps} instead of the run's own, ") + shared


def _base_loras(cfg: Config) -> list[str]:
    """The lines that merge those of model.loras, as they were in training."""
    lines = []
    for path, scale in map(base_lora, cfg.model.loras):
        place = json.dumps(path.name if _is_built_in(path) else str(path), ensure_ascii=False)
        lines += [f"pipe.load_lora_weights({f'lora_path({place})' if _is_built_in(path) else place})"]
        lines += [f"pipe.fuse_lora(lora_scale={scale:g})", "pipe.unload_lora_weights()"]
    return lines


def _is_built_in(lora: Path) -> bool:
    return lora in BUILT_IN_LORAS.values()


def _goes_with(cfg: Config) -> list[str]:
    """What the weights need beside the base model; LoRAs by content, as files are called otherwise elsewhere."""
    vae = [f"Its images were decoded with the VAE {cfg.model.vae} (model.vae), not with the base model's.", ""]
    return [*_goes_with_loras(cfg), *(vae if cfg.model.vae else [])]


def _goes_with_loras(cfg: Config) -> list[str]:
    if not cfg.model.loras:
        return []
    hashes = list(base_loras_contents(cfg.model.loras).values())
    named = [f"`{path.name}` at scale {scale:g}" for path, scale in map(base_lora, cfg.model.loras)]
    known = f" (sha256 {', '.join(digest[:12] for digest in hashes)})" if hashes else ""
    return [
        (
            f"It was trained on {cfg.model.pretrained} with {', '.join(named)}{known} merged into it (model.loras), "
            "and goes together with them: what is here does not contain them."
        ),
        "",
    ]


def _files(cfg: Config, kohya: str | None) -> list[str]:
    """Which file is for which program."""
    if cfg.peft.peft_scheme == "none":
        elsewhere = "For ComfyUI, A1111 and Forge: `draftp merge-lora RUN --format single-file`."
        return [f"`unet/` is the whole UNet, for diffusers. {elsewhere}", ""]
    row = f"`{kohya}`" if kohya else "made by `draftp merge-lora RUN --format kohya`"
    return [
        "| program | file | where it goes |",
        "|---|---|---|",
        f"| diffusers, draftp | `{LORA_FILE}` | `pipe.load_lora_weights` |",
        f"| ComfyUI | {row} | `models/loras` |",
        f"| A1111, Forge | {row} | `models/Lora` |",
        "",
        f"ComfyUI applies only a part of `{LORA_FILE}`, without an error; Forge refuses it, and A1111 ignores it.",
        "",
    ]


def model_card(
    cfg: Config,
    title: str,
    step: int,
    validation: ValidationLine | None,
    data: dict[str, Any],
    kohya: str | None = None,
    sheet: str | None = None,
    ended_early: str | None = None,
) -> str:
    """Markdown with the Hub's YAML head: what it is, how to load it, how it was made, what was measured.

    Args:
        cfg: the run's settings.
        title: what people call the run.
        step: that the weights are of.
        validation: its last validation up to `step`.
        data: `count` and `sha256` of its prompts.
        kohya: name of the file with the LoRA by kohya's names; None: there is none.
        sheet: name of the validation's sheet beside the card; None: there is none.
        ended_early: why the run ended before its last step, in words; None: it did not.
    """
    base = [path for path, _ in map(base_lora, cfg.model.loras)]
    averaged = cfg.ema.decay is not None and cfg.ema.in_final
    lora = cfg.peft.peft_scheme == "lora"
    lines = [
        "---",
        card_head(cfg, title, validation, sheet).strip(),
        "---",
        "",
        f"# {cfg.model.pretrained} tuned on {', '.join(cfg.trained)} with DRaFT+",
        "",
        (
            f"Made by draftp {__version__}: {step} steps of {cfg.trainer.global_batch_size} images, "
            f"{'LoRA rank ' + str(cfg.peft.rank) if lora else 'full fine-tuning'}, {make_mode(cfg).describe()}, "
            f"{_prefix(cfg)}{_penalty(cfg)}"
            + (f", started from the LoRA {Path(cfg.peft.init_from).name}" if cfg.peft.init_from else "")
            + (f", moving average of the weights with decay {cfg.ema.decay:g}" if averaged else "")
            + f"; {data['count']} prompts (sha256 {data['sha256'][:12]}), seed {cfg.trainer.seed}."
        ),
        "",
        *([f"The run was {ended_early}.", ""] if ended_early else []),
        *(["<Gallery />", ""] if sheet else []),  # where the Hub shows the pictures of `widget`
        *_goes_with(cfg),
        *_files(cfg, kohya),
        "```python",
        *(["import diffusers"] if _scheduler(cfg) else []),
        "import draftcli",
        f"from diffusers import {family_of(cfg.model).pipeline}" + ("" if lora else ", UNet2DConditionModel"),
        *(["from draftcli.core.models.loading import model_path"] if cfg.model.pretrained in BUILT_IN else []),
        *(["from draftcli.core.models.places import lora_path"] if any(map(_is_built_in, base)) else []),
        "",
        _base(cfg),
        *_scheduler(cfg),
        *_base_loras(cfg),
        LOADING[cfg.peft.peft_scheme],
        f"pipe(prompt, {_steps(cfg)}, guidance_scale={cfg.sampling.guidance:g})",
        "```",
        "",
    ]
    if validation:
        lines += [
            f"Measured on {validation['images']} held-out images, base and tuned at the same seeds:",
            "",
            "| reward | base | tuned | difference | 95 % interval | trained on |",
            "|---|---|---|---|---|---|",
        ]
        yes = {1: "yes", -1: "yes, lower is better"}
        for name, figures in validation["rewards"].items():
            f = {key: or_nan(value) for key, value in figures.items()}
            interval = f"{f['low']:+.4f} to {f['high']:+.4f}" if has_interval(f["low"], f["high"]) else "none"
            lines.append(
                f"| {name} | {f['base']:.4f} | {f['tuned']:.4f} | {f['difference']:+.4f} | "
                f"{interval} | {yes.get(cfg.trained.get(name, 0), 'no')} |"
            )
        f = {key: or_nan(value) for key, value in validation["diversity"].items()}
        lines += [
            "",
            f"Diversity, the mean distance of two images in pixels: {f['base']:.4f} before, {f['tuned']:.4f} after"
            + (f", {kept.words} of the base's." if (kept := diversity_kept(validation)) else "."),
            "",
        ]
    return "\n".join(lines)
