"""Seconds and memory of one training step against K, N, picture size, micro-batch and LoRA rank, each alone.

    python benchmarks/growth.py growth.png                    toy size, a CPU, minutes
    python benchmarks/growth.py growth.png --preset sdxl --device cuda --set model.precision=bf16
                                                              SDXL's real size, random weights
    python benchmarks/growth.py growth.png --preset sdxl --plan
                                                              memory alone, as --dry-run foretells it, for a GPU

Writes the picture and, beside it, growth.json. Needs the extra `plots`. Memory is what tensors hold
at once, weights included; `steps run again` is sharding.recompute_steps: memory is flat in K.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from levers import Measured
from meter import quiet_console

import draftcli
from draftcli.planning.memory import memory_plan
from draftcli.planning.plan import configuration_folder

mpl.use("Agg")
from matplotlib import pyplot as plt

mpl.rcParams["svg.fonttype"] = "none"  # letters as letters

BASE = {"sampling.steps": 10, "draftp.truncation_steps": 1, "trainer.micro_batch_size": 1, "peft.rank": 16}
SIZES = {
    "toy": ("toy", {"sampling.height": (64, 96, 128, 192)}),
    "sdxl": ("sdxl-lora", {"sampling.height": (512, 768, 1024, 1536)}),
}
SWEEPS: dict[str, tuple[int, ...]] = {
    "draftp.truncation_steps": (1, 2, 5, 10, 25),
    "sampling.steps": (5, 10, 25, 50),
    "trainer.micro_batch_size": (1, 2, 4, 8),
    "peft.rank": (4, 16, 64, 128),
}
NAMES = {
    "draftp.truncation_steps": "K, of N = 25",
    "sampling.steps": "N",
    "sampling.height": "edge, pixels",
    "trainer.micro_batch_size": "images per backward",
    "peft.rank": "LoRA rank",
}


def cost(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[float | None, float]:
    """Best seconds an image of two steps after the first one, None where nothing is run; peak megabytes."""
    preset = SIZES[options.preset][0]
    count = settings["trainer.micro_batch_size"]
    values = {**BASE, **settings, "trainer.global_batch_size": count, "model.device": options.device}
    values["sampling.width"] = values["sampling.height"] = settings.get("sampling.height", options.edge)
    cfg = draftcli.load_config(preset, options.set, values)
    if options.plan:
        return None, memory_plan(cfg, configuration_folder(cfg)).peak / 1e6
    measured = Measured(cfg, options.preset == "sdxl")
    for _ in range(2):
        measured.seconds()
    return measured.best / count, measured.peak() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--preset", choices=[*SIZES], default="toy")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plan", action="store_true", help="don't run, foretell the memory")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sweeps = {**SWEEPS, **SIZES[options.preset][1]}
    options.edge = {"toy": 64, "sdxl": 1024}[options.preset]
    console, figures = quiet_console(), []
    for key, values in sweeps.items():
        for again in (False, True) if key == "draftp.truncation_steps" else (False,):
            for value in values:
                of = {"sampling.steps": 25} if key == "draftp.truncation_steps" else {}
                settings = {**BASE, **of, key: value, "sharding.recompute_steps": again}
                began = time.perf_counter()
                seconds, megabytes = cost(options, settings)
                line = {"key": key, "value": value, "again": again, "seconds": seconds, "megabytes": megabytes}
                figures.append(line)
                console.print(f"{line} ({time.perf_counter() - began:.0f} s)")
    options.picture.with_suffix(".json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    draw(figures, [*sweeps], options.picture)


def draw(figures: list[dict[str, Any]], keys: list[str], picture: Path) -> None:
    """Seconds, where there are any, above megabytes, a column for each thing that grows."""
    units = [unit for unit in ("seconds", "megabytes") if figures[0][unit] is not None]
    size = (3 * len(keys), 3 * len(units))
    figure, axes = plt.subplots(
        len(units), len(keys), figsize=size, sharex="col", squeeze=False, constrained_layout=True
    )
    for column, key in zip(axes.T, keys, strict=True):
        for again, label in ((False, "graph kept"), (True, "steps run again")):
            lines = [f for f in figures if f["key"] == key and f["again"] == again]
            for axis, unit in zip(column, units, strict=True):
                axis.plot([f["value"] for f in lines], [f[unit] for f in lines], "o-", label=label if lines else None)
        for axis in column:
            axis.set_ylim(bottom=0)
        column[-1].set_xlabel(NAMES[key])
    axes[0][0].legend()
    for row, unit in zip(axes, units, strict=True):
        row[0].set_ylabel({"seconds": "seconds an image", "megabytes": "peak MB"}[unit])
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
