"""What a run would load, train and compute, worked out without weights: on the meta device, offline.

A model that is not a local folder is planned with its family's own configuration, which ships with the package.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from draftcli.config import Config
from draftcli.core.gradient.mode import make_mode, recomputes_steps
from draftcli.core.lora import adapters
from draftcli.core.lora.beginning import follow_init_from
from draftcli.core.lora.files import weight_shapes
from draftcli.core.models.family import drop_vae_encoder
from draftcli.core.models.loading import model_path
from draftcli.core.models.meta import modules_on_meta
from draftcli.core.models.recognition import family_of
from draftcli.core.penalty import make_penalty
from draftcli.core.prefix import evaluations_per_step
from draftcli.planning.blank_networks import shortened_modules
from draftcli.planning.repeated_layers import tensors


@dataclass(frozen=True)
class Plan:
    """Counts of one run.

    Attributes:
        source: where the configuration was read.
        trainable: weights that are trained.
        frozen: weights that are loaded and never change, by part (a frozen copy of the UNet among them for full
            fine-tuning).
        images: per optimizer step.
        forward: UNet evaluations per image in the tuned network's forward passes, a guided one counted twice.
        with_gradient: how many of them carry gradient.
        base: evaluations of the frozen base per image.
        again: evaluations that activation checkpointing repeats in backward, per image.
        folder: with the configuration of the networks.
    """

    source: str
    trainable: int
    frozen: dict[str, int]
    images: int
    forward: float
    with_gradient: float
    base: float
    again: float
    folder: Path


def make_plan(cfg: Config) -> Plan:
    """Work out the plan of `cfg`. No file is written, nothing is fetched.

    Raises:
        InputError: peft.target_modules fits nothing in the UNet, or the sampler cannot train.
    """
    make_mode(cfg)
    make_penalty(cfg.draftp)
    folder = configuration_folder(cfg)
    modules = shortened_modules(folder, cfg.peft.target_modules)
    drop_vae_encoder(modules["vae"])
    family = family_of(cfg.model)
    labels = family.networks
    frozen = {labels[part]: _count(module) for part, module in modules.items()}
    if cfg.peft.peft_scheme == "lora":
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft says that meta weights are not initialised, which is the point
            adapters.attach_lora(modules["unet"], cfg.peft.rank, cfg.peft.alpha, cfg.peft.target_modules)
        trainable = _count(modules["unet"], trained=True)
    else:
        trainable = frozen.pop("unet")
        frozen["frozen copy of the unet"] = trainable
    return Plan(
        source=f"{family.short}'s configuration" if folder == family.config_folder else str(folder),
        trainable=trainable,
        frozen=frozen,
        images=cfg.trainer.global_batch_size,
        **count_evaluations(cfg),
        folder=folder,
    )


def count_evaluations(cfg: Config) -> dict[str, float]:
    """UNet evaluations per image: `forward`, `with_gradient`, `base` and `again`, as in `Plan`."""
    mode, sampling = make_mode(cfg), cfg.sampling
    per_step, again = evaluations_per_step(cfg, mode.first), recomputes_steps(cfg)
    found = mode.evaluations(per_step, cfg.sharding.two_stage and again)
    base = found.with_gradient if cfg.draftp.needs_base or mode.asks_base else 0
    with_gradient = found.with_gradient
    if cfg.draftp.detach_uncond:
        with_gradient = mode.evaluations([1] * sampling.steps, cfg.sharding.two_stage and again).with_gradient
    return {
        "forward": found.without_gradient + found.with_gradient,
        "with_gradient": with_gradient,
        "base": base,
        "again": with_gradient if cfg.sharding.activation_checkpointing else 0,
    }


def configuration_folder(cfg: Config) -> Path:
    """The folder with the configuration of the model's networks: its own, else that of its family in the package."""
    folder, family = Path(model_path(cfg.model.pretrained)), family_of(cfg.model)
    whole = all((folder / part / "config.json").is_file() for part in family.networks)
    return folder if whole else family.config_folder


def following_init_from(cfg: Config) -> Config:
    """The settings with the rank, alpha and targets of peft.init_from; as they are where there is none.

    Raises:
        InputError: it cannot be read or gone on from, or the settings say otherwise.
    """
    if cfg.peft.init_from is None:
        return cfg
    return follow_init_from(cfg, {"unet": weight_shapes(modules_on_meta(configuration_folder(cfg))["unet"])})


def _count(network: torch.nn.Module, trained: bool = False) -> int:
    found = tensors(network, buffers=False)
    return sum(times * weight.numel() for weight, times in found if weight.requires_grad or not trained)
