"""What a run would load, train and compute, worked out without weights: on the meta device, offline.

A model that is not a local folder is planned with SDXL's own configuration, which ships with the package.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from draftcli.config import Config
from draftcli.core import adapters
from draftcli.core.gradient import check_sampler
from draftcli.core.meta import PARTS, modules_on_meta
from draftcli.core.sdxl import SDXL_CONFIG, drop_vae_encoder, model_path

LABELS = {"unet": "unet", "vae": "vae decoder", "text_encoder": "text encoder", "text_encoder_2": "text encoder 2"}


@dataclass(frozen=True)
class Plan:
    """Counts of one run.

    Attributes:
        source: where the configuration was read.
        trainable: weights that are trained.
        frozen: weights that are loaded and never change, by part (a frozen copy of the UNet among them for full
            fine-tuning).
        images: per optimizer step.
        forward: UNet evaluations per image, guidance counted twice, without the base pass.
        with_gradient: how many of them carry gradient.
        base: evaluations of the frozen base per image.
    """

    source: str
    trainable: int
    frozen: dict[str, int]
    images: int
    forward: int
    with_gradient: int
    base: int


def make_plan(cfg: Config) -> Plan:
    """Work out the plan of `cfg`. No file is written, nothing is fetched.

    Raises:
        InputError: peft.target_modules fits nothing in the UNet, or the sampler cannot train.
    """
    check_sampler(cfg.sampling.sampler)
    folder = Path(model_path(cfg.model.pretrained))
    if not all((folder / part / "config.json").is_file() for part in PARTS):
        folder = SDXL_CONFIG
    modules = modules_on_meta(folder)
    drop_vae_encoder(modules["vae"])
    frozen = {LABELS[part]: _count(module) for part, module in modules.items()}
    if cfg.peft.peft_scheme == "lora":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that meta weights are not initialised, which is the point
            adapters.attach_lora(modules["unet"], cfg.peft.rank, cfg.peft.alpha, cfg.peft.target_modules)
        trainable = sum(p.numel() for p in modules["unet"].parameters() if p.requires_grad)
    else:
        trainable = frozen.pop("unet")
        frozen["frozen copy of the unet"] = trainable
    guidance, k = 2, cfg.draftp.truncation_steps
    return Plan(
        source="SDXL's configuration" if folder == SDXL_CONFIG else str(folder),
        trainable=trainable,
        frozen=frozen,
        images=cfg.trainer.global_batch_size,
        forward=cfg.sampling.steps * guidance,
        with_gradient=k * guidance,
        base=k * guidance if cfg.draftp.needs_base else 0,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
