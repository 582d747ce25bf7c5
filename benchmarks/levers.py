"""What each lever does by itself: seconds, memory and gradient of a training step with it and without.

    python benchmarks/levers.py --threads 1                   toy size, a CPU, about ten minutes
    python benchmarks/levers.py --preset sdxl --device cuda --set model.precision=bf16
                                                              SDXL's real size, random weights
    python benchmarks/levers.py sharding.offload=true         one lever alone; several settings by commas

The step is that of train_step.py: N 25, guidance 5, K 1, KL on, one image per backward, eight images. Each lever is
measured in turn with the step without it, the best of `--rounds` each; the first step, which compiles and encodes
prompts, is timed apart. Memory is what tensors hold at once, weights included: on a CPU what waits in the computer's
memory too. `loss` is by how much it differs, `gradient` the norm of the difference over the norm without the lever.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from meter import LiveBytes, clock, quiet_console
from rich.table import Table
from torch import Tensor
from train_step import SIZES, batch_of, move_lora

import draftcli
from draftcli.config import Config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.models.loading import load_parts

# The lever, and what has to be set on both sides for it to have something to do.
LEVERS: list[tuple[str, str]] = [
    ("sharding.two_stage=false", ""),
    ("sharding.recompute_steps=true", ""),
    ("sharding.recompute_steps=true", "draftp.truncation_steps=5"),
    ("sharding.activation_checkpointing=true", ""),
    ("sharding.prefix_batch_size=1", ""),
    ("sharding.fold_lora=false", ""),
    ("trainer.micro_batch_size=8", ""),
    ("sharding.decode_batch_size=1", "trainer.micro_batch_size=8"),
    ("sharding.offload=true", ""),
    ("sharding.channels_last=true", ""),
    ("sharding.attention=math", ""),
    ("sharding.attention=flash", ""),
    ("sharding.compile=true", ""),
    ("model.vae_tile=64", "sampling.height=128,sampling.width=128"),
    ("model.vae_precision=bf16", ""),
    ("model.precision=bf16", ""),
    ("draftp.log_kl=false", "draftp.kl_coeff=0"),
    ("sampling.guidance_interval=[0.2;0.8]", ""),
    ("draftp.low_variance_samples=1", ""),
]


class Measured:
    """A model, and what its training step takes."""

    def __init__(self, cfg: Config, sdxl_size: bool) -> None:
        if sdxl_size:
            from sdxl_size import random_pickscore, random_sdxl

            self.model = SDXLDRaFTPModel(cfg, random_sdxl(cfg))
            self.model.reward_model = random_pickscore()
        else:
            self.model = SDXLDRaFTPModel(cfg, load_parts(cfg.model))
            self.model.reward_model = draftcli.get_reward_model(cfg)
        move_lora(self.model.unet)
        self.batch = batch_of(cfg)
        self.read = clock(self.model.runtime.device)
        self.best = float("inf")
        self.first = self.seconds()
        self.best = float("inf")
        self.gradient = self._gradient()

    def seconds(self) -> float:
        """Of one step; the best is kept."""
        self.model.unet.zero_grad(set_to_none=True)
        began = self.read()
        self.loss = self.model.get_loss_and_metrics(self.batch)[0]
        self.best = min(self.best, taken := self.read() - began)
        return taken

    def _gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.trainable_parameters if p.grad is not None]).cpu()

    def peak(self) -> int:
        """Most bytes of tensors alive in one step."""
        networks = [*self.model.parts.modules.values()]
        judges: Any = getattr(self.model.reward_model, "rewards", {"": self.model.reward_model})
        networks += [judge for judge in judges.values() if isinstance(judge, torch.nn.Module)]
        live = LiveBytes([t for network in networks for t in (*network.parameters(), *network.buffers())])
        self.model.unet.zero_grad(set_to_none=True)
        with live:
            self.model.get_loss_and_metrics(self.batch)
        return live.peak


def main() -> None:
    """Measure, and print the table row by row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lever", nargs="*", help="settings by commas; none: all of them")
    parser.add_argument("--preset", choices=[*SIZES], default="toy")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for both sides")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    preset, settings = SIZES[options.preset]
    settings = [*settings, f"model.device={options.device}", *options.set]
    console = quiet_console(width=140)
    table = Table(title=f"{preset} with {' '.join(settings)}; torch {torch.__version__}", title_justify="left")
    for title in (
        "lever",
        "both sides",
        "s without",
        "s with",
        "first step s",
        "MB without",
        "MB with",
        "loss",
        "gradient",
    ):
        table.add_column(title, justify="left" if title in ("lever", "both sides") else "right")
    for lever, both in [(lever, "") for lever in options.lever] or LEVERS:
        cfg = [*settings, *settings_of(both)]
        plain, pulled = (
            Measured(draftcli.load_config(preset, overrides), options.preset == "sdxl")
            for overrides in (cfg, [*cfg, *settings_of(lever)])
        )
        for _ in range(options.rounds):
            plain.seconds()
            pulled.seconds()
        difference = float((pulled.gradient - plain.gradient).norm() / plain.gradient.norm())
        peaks = [f"{side.peak() / 1e6:.1f}" for side in (plain, pulled)]
        row = [lever, both, f"{plain.best:.2f}", f"{pulled.best:.2f}", f"{pulled.first:.1f}", *peaks]
        row += [f"{abs(pulled.loss - plain.loss):.0e}", f"{difference:.0e}"]
        table.add_row(*row)
        console.print(" | ".join(row))
    console.print(table)


def settings_of(text: str) -> list[str]:
    """`a=1,b=[2;3]` -> settings; a semicolon stands for a comma in a value."""
    return [setting.replace(";", ",") for setting in text.split(",") if setting]


if __name__ == "__main__":
    main()
