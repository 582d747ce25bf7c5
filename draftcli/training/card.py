"""The model card that goes beside the trained weights."""

from __future__ import annotations

from typing import Any

import yaml

from draftcli import __version__
from draftcli.config import Config

LOADING = {
    "lora": 'pipe.load_lora_weights("PATH/TO/final")',
    "none": 'pipe.unet = UNet2DConditionModel.from_pretrained("PATH/TO/final/unet")',
}


def model_card(cfg: Config, validation: dict[str, Any] | None) -> str:
    """Markdown with the Hub's YAML head: what it is, how to load it, how it was made, what was measured."""
    lora = cfg.peft.peft_scheme == "lora"
    head = {
        "base_model": cfg.model.pretrained,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion-xl", "draft", "reward-fine-tuning", *(["lora"] if lora else [])],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {cfg.model.pretrained} tuned on {', '.join(cfg.rewards)} with DRaFT+",
        "",
        (
            f"Made by draftp {__version__}: {cfg.trainer.max_steps} steps of {cfg.trainer.global_batch_size} pictures, "
            f"{'LoRA rank ' + str(cfg.peft.rank) if lora else 'full fine-tuning'}, gradient through the last "
            f"{cfg.draftp.truncation_steps} of {cfg.sampling.steps} sampler steps, "
            f"KL coefficient {cfg.draftp.kl_coeff:g}."
        ),
        "",
        "```python",
        "import draftcli",
        "from diffusers import StableDiffusionXLPipeline" + ("" if lora else ", UNet2DConditionModel"),
        "",
        f'pipe = StableDiffusionXLPipeline.from_pretrained("{cfg.model.pretrained}")',
        LOADING[cfg.peft.peft_scheme],
        f"pipe(prompt, timesteps=draftcli.timesteps({cfg.sampling.steps}), guidance_scale={cfg.sampling.scale:g})",
        "```",
        "",
    ]
    if validation:
        lines += [
            f"Measured on {validation['images']} held-out pictures, base and tuned at the same seeds:",
            "",
            "| reward | base | tuned | difference | 95 % interval | trained on |",
            "|---|---|---|---|---|---|",
        ]
        for name, f in validation["rewards"].items():
            lines.append(
                f"| {name} | {f['base']:.4f} | {f['tuned']:.4f} | {f['difference']:+.4f} | "
                f"{f['low']:+.4f} to {f['high']:+.4f} | {'yes' if name in cfg.rewards else 'no'} |"
            )
        lines.append("")
    return "\n".join(lines)
