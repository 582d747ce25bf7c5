"""One optimizer step of DRaFT+, ours beside the plain loop (plain_loop.py), phase by phase.

    python benchmarks/train_step.py --preset toy              a CPU, a few minutes
    python benchmarks/train_step.py --preset sdxl --device cuda --set model.precision=bf16
                                                              SDXL's real size, random weights, nothing to download

Both sides draw the same pictures from the same weights, LoRA and seeds, in turn, at equal global batch; the run says
how far their losses and gradients differ. Method and micro-batch are those of the SDXL recipe at both sizes: N 25,
guidance 5, K 1, KL on, one image per backward; `--set` changes any setting for both, `--lever` for ours alone
(`--lever sharding.fold_lora=false`). Times are the best of `--rounds`, after a first step that is timed apart (it
compiles, encodes prompts and fills caches). Memory is what tensors hold at once, weights included.

The last line is `ratio: X.XX`, images a second of ours over the plain loop's.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from meter import LiveBytes, Meter, PeakMeter, clock, matmul_rate, quiet_console
from plain_loop import PlainLoop
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import draftcli
from draftcli.config import Config
from draftcli.core.batch import Batch
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.folding import folded, lost_share
from draftcli.core.lora.adapters import load_lora_state_dict, lora_state_dict
from draftcli.core.models.family import Parts
from draftcli.core.models.loading import load_parts

RECIPE = ["sampling.steps=25", "sampling.scale=5", "draftp.truncation_steps=1", "trainer.micro_batch_size=1"]
RECIPE += ["draftp.prefix_steps=null"]  # the plain loop walks the run's own steps
SIZES = {
    "toy": ("toy", [*RECIPE, "trainer.global_batch_size=8"]),
    "sdxl": ("sdxl-lora", [*RECIPE, "trainer.global_batch_size=8", "model.offload_text_encoders=false"]),
}
NOT_IN_THE_PLAIN_LOOP = {
    "model": ("quantize", "vae_tile"),
    "sampling": ("guidance_interval", "negative_prompt"),
    "draftp": ("low_variance_samples",),
    "peft": ("alpha",),
}
MOVED = 0.02  # standard deviation of the LoRA's B
TEXTS = ["a red circle", "two blue squares on a lawn", "a small green triangle on the left", "night"]
Phase = Callable[[str], AbstractContextManager[Any]]


class Side:
    """One of the two: its networks, and `step(phase)`, which takes an optimizer step and returns the loss."""

    def __init__(self, networks: list[nn.Module], loss_and_gradient: Callable[[Phase], float]) -> None:
        self.networks, self.loss_and_gradient = networks, loss_and_gradient
        self.trained = [p for network in networks for p in network.parameters() if p.requires_grad]
        # A rate of zero: the weights stay where they are, so that every round computes the same.
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.0, weight_decay=0.0)
        self.gradient: Tensor | None = None

    def step(self, phase: Phase) -> float:
        loss = self.loss_and_gradient(phase)
        if self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in self.trained if p.grad is not None]).cpu()
        with phase("optimizer"):
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss


def make_sides(
    cfg: Config, levers: Config, parts: Parts, reward: Any, checkpointing: bool
) -> tuple[SDXLDRaFTPModel, dict[str, Side]]:
    """Our model; ours and the plain loop by name, on the same weights, LoRA and pictures."""
    if cfg.sampling.schedule != "trailing" or cfg.sampling.s_churn or parts.prediction != "epsilon":
        raise SystemExit("the plain loop knows the trailing schedule, no churn and networks that predict eps")
    if cfg.peft.peft_scheme != "lora":
        raise SystemExit("the plain loop trains a LoRA")
    defaults = Config()
    unknown = [
        f"{section}.{name}"
        for section, names in NOT_IN_THE_PLAIN_LOOP.items()
        for name in names
        if getattr(getattr(cfg, section), name) != getattr(getattr(defaults, section), name)
    ]
    if unknown:
        raise SystemExit(f"the plain loop knows no {', '.join(unknown)}; a lever of ours alone is set by --lever")
    modules = {k: copy.deepcopy(v) for k, v in parts.modules.items()}
    modules |= {"tokenizer": parts.tokenizers[0], "tokenizer_2": parts.tokenizers[1]}
    model = SDXLDRaFTPModel(levers, parts)
    model.reward_model = reward
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        modules[name].to(model.runtime.device)
    plain = PlainLoop(
        modules,
        # Under offload ours comes and goes, and may be away when the plain loop asks.
        copy.deepcopy(reward).to(model.runtime.device) if levers.sharding.offload else reward,
        rank=cfg.peft.rank,
        targets=list(cfg.peft.target_modules),
        steps=cfg.sampling.steps,
        scale=cfg.sampling.scale,
        k=cfg.draftp.truncation_steps,
        kl_coeff=cfg.draftp.kl_coeff,
        micro_batch_size=cfg.trainer.micro_batch_size,
        checkpointing=checkpointing,
    )
    move_lora(model.unet)
    load_lora_state_dict(plain.unet, lora_state_dict(model.unet))
    count, size = cfg.trainer.global_batch_size, (cfg.sampling.height, cfg.sampling.width)
    prompts, seeds = [TEXTS[i % len(TEXTS)] for i in range(count)], list(range(count))

    def ours(phase: Phase) -> float:
        with model.watched(phase):
            return model.get_loss_and_metrics(Batch(prompts, seeds, size))[0]

    def theirs(phase: Phase) -> float:
        plain.phase = phase
        return plain.step(prompts, seeds, size)[0]

    judges = [reward] if isinstance(reward, nn.Module) else list(reward.rewards.values())
    judge = [m for m in judges if isinstance(m, nn.Module)]
    their_networks = [m for m in modules.values() if isinstance(m, nn.Module)]
    return model, {
        "ours": Side([*model.parts.modules.values(), *judge], ours),
        "plain": Side([*their_networks, *judge], theirs),
    }


def batch_of(cfg: Config) -> Batch:
    """Prompts and seeds of one optimizer step."""
    count = cfg.trainer.global_batch_size
    prompts = [TEXTS[i % len(TEXTS)] for i in range(count)]
    return Batch(prompts, list(range(count)), (cfg.sampling.height, cfg.sampling.width), [None] * count)


def move_lora(unet: nn.Module) -> None:
    """Move the LoRA's B away from zero, from a fixed seed: a LoRA at its start has no gradient on A."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(MOVED * torch.randn(parameter.shape, generator=generator))


def measure(sides: dict[str, Side], read: Callable[[], float], rounds: int) -> dict[str, dict[str, Any]]:
    """By side: seconds of the first step, of the best round, of its phases; FLOPs and peak bytes by phase."""
    found: dict[str, dict[str, Any]] = {name: {"seconds": math.inf, "all_seconds": []} for name in sides}
    for name, side in sides.items():
        began = read()
        found[name]["loss"] = side.step(Meter(read))
        found[name]["first"] = read() - began
    for _ in range(rounds):
        for name, side in sides.items():
            meter, began = Meter(read), read()
            side.step(meter)
            seconds = read() - began
            found[name]["all_seconds"].append(seconds)
            if seconds < found[name]["seconds"]:
                found[name] |= {"seconds": seconds, "phases": dict(meter.totals)}
    for name, side in sides.items():
        counter = FlopCounterMode(display=False)
        meter = Meter(counter.get_total_flops)
        with counter:
            side.step(meter)
        found[name] |= {"flops": counter.get_total_flops(), "phase_flops": dict(meter.totals)}
    return found


def peak_bytes(side: Side) -> tuple[int, dict[str, int]]:
    """Most bytes of tensors alive in one step, and by phase."""
    weights = [t for network in side.networks for t in (*network.parameters(), *network.buffers())]
    moments = [t for state in side.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    live = LiveBytes([*weights, *moments])
    meter = PeakMeter(live)
    with live:
        side.step(meter)
    return live.peak, dict(meter.peaks)


@torch.no_grad()
def folding_error(model: SDXLDRaFTPModel) -> str:
    """How far folding moves x_K of one picture, and what rounding takes from the LoRA, in words."""
    cfg = model.cfg
    batch = Batch(TEXTS[:1], [0], (cfg.sampling.height, cfg.sampling.width), [None])
    tuned, start = model.networks.tuned(model.encode(batch)), model.networks.start(batch)
    until = cfg.sampling.steps - cfg.draftp.truncation_steps
    plain, share = model.sampler.walk(tuned, start, stop=until), lost_share(model.unet)
    with folded(model.unet, math.inf):
        error = float((model.sampler.walk(tuned, start, stop=until) - plain).norm() / plain.norm())
    verdict = "folded" if share <= cfg.sharding.fold_tolerance else "refused"
    return f"folding moves x_K by {error:.1e} of its norm, rounding takes {share:.1e} of the LoRA: {verdict}"


def report(found: dict[str, dict[str, Any]], images: int, evaluations: float, rate: float, console: Console) -> None:
    """The table by phase, then the figures of the whole step."""
    table = Table(title="one optimizer step by phase", title_justify="left")
    for title in ("phase", "ours s", "plain s", "ours GFLOP", "plain GFLOP", "ours peak MB", "plain peak MB"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for phase in list(dict.fromkeys([*found["ours"]["phases"], *found["plain"]["phases"]])):
        cells: list[str] = []
        for key, scale, digits in (("phases", 1, 3), ("phase_flops", 1e9, 1), ("peaks", 1e6, 0)):
            for side in found.values():
                value = side[key].get(phase)
                cells.append("" if value is None else f"{value / scale:.{digits}f}")
        table.add_row(phase, *cells)
    console.print(table)
    for name, side in found.items():
        rounds = " ".join(f"{s:.2f}" for s in side["all_seconds"])
        console.print(
            f"{name}: {images / side['seconds']:.3f} images/s ({side['seconds']:.2f} s a step, best of {rounds}; "
            f"first step {side['first']:.1f} s), {side['flops'] / images / 1e9:.1f} GFLOP an "
            f"image, {side['flops'] / side['seconds'] / rate:.2f} of the matmul rate, peak {side['peak'] / 1e6:.0f} MB",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"UNet evaluations an image, forward: {evaluations:g}")


def main(arguments: list[str] | None = None) -> float:
    """Run the benchmark; returns the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="toy", help="toy, sdxl (random weights), or any recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both sides")
    parser.add_argument("--lever", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, on a machine that others use too")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--keep-activations", action="store_true", help="the plain loop without checkpointing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = quiet_console()
    preset, settings = SIZES.get(options.preset, (options.preset, []))
    settings = [*settings, f"model.device={options.device}", *options.set]
    cfg, levers = draftcli.load_config(preset, settings), draftcli.load_config(preset, [*settings, *options.lever])
    if options.preset == "sdxl":
        from sdxl_size import random_pickscore, random_sdxl

        parts, reward = random_sdxl(cfg), random_pickscore()
    else:
        parts, reward = load_parts(cfg.model), draftcli.get_reward_model(cfg)
    model, sides = make_sides(cfg, levers, parts, reward, not options.keep_activations)
    device, images = model.runtime.device, cfg.trainer.global_batch_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    read = clock(device, options.cpu_time)
    rate = matmul_rate(read, device, model.runtime.dtype)
    console.print(
        f"{'CPU' if options.cpu_time else 'wall'} seconds; {platform.machine()} {device} ({name}), "
        f"{model.runtime.dtype}, matmul {rate / 1e9:.0f} GFLOP/s; torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}; {preset} with "
        f"{' '.join([*settings, *options.lever])}",
        highlight=False,
        soft_wrap=True,
    )
    found = measure(sides, read, options.rounds)
    rows: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    for side_name, side in sides.items():
        found[side_name]["peak"], found[side_name]["peaks"] = peak_bytes(side)
    hook.remove()
    report(found, images, sum(rows) / images, rate, console)
    ours, plain = sides["ours"].gradient, sides["plain"].gradient
    assert ours is not None
    assert plain is not None
    difference = float((ours - plain).norm() / plain.norm())
    console.print(
        f"same step: losses {found['ours']['loss']:.6f} and {found['plain']['loss']:.6f}, gradients differ by "
        f"{difference:.1e} of their norm",
        highlight=False,
    )
    console.print(folding_error(model))
    prefix = found["plain"]["phases"]["prefix"] / found["ours"]["phases"]["prefix"]
    ratio = found["plain"]["seconds"] / found["ours"]["seconds"]
    if options.json:
        options.json.write_text(
            json.dumps({**found, "ratio": ratio, "prefix_ratio": prefix}, indent=1), encoding="utf-8"
        )
    console.print(f"prefix ratio: {prefix:.2f}\nratio: {ratio:.2f}")
    return ratio


if __name__ == "__main__":
    main()
