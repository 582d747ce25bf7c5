"""One optimizer step of DRaFT+, ours beside the plain loop (plain_loop.py), phase by phase.

    python benchmarks/train_step.py --preset toy              a CPU, a few minutes
    python benchmarks/train_step.py --preset sdxl --device cuda --set model.precision=bf16
                                                              SDXL's real size, random weights, nothing to download
    python benchmarks/train_step.py --preset sdxl --height 256 --width 256 --device cpu --set model.precision=fp32 \
        --set trainer.global_batch_size=1 --reward toy --side plain --once
                                                              the same on a CPU with 24 GiB of memory, a side at a time

Both sides draw the same pictures from the same weights, LoRA and seeds, in turn, at equal global batch; the run says
how far their losses and gradients differ. Method and micro-batch are those of the SDXL recipe at both sizes: N 25,
guidance 5, K 1, KL on, one image per backward; `--set` changes any setting for both, `--lever` for ours alone
(`--lever sharding.fold_lora=false`). Times are the best of `--rounds`, after a first step that is timed apart (it
compiles, encodes prompts and fills caches). Memory is what tensors hold at once, weights included. With `--once`, for
networks whose step takes minutes, there is one step, timed and counted at once.

The last line is `ratio: X.XX`, images a second of ours over the plain loop's, where both sides are there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from meter import FlopCount, LiveBytes, Meter, PeakMeter, clock, matmul_rate, quiet_console
from plain_loop import PlainLoop
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import draftcli
from draftcli.config import Config
from draftcli.core.batch import Batch
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.engine.folding import folded, lost_share
from draftcli.core.engine.runtime import choose_runtime
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

    def __init__(
        self, unet: nn.Module, others: Iterable[nn.Module], loss_and_gradient: Callable[[Phase], float]
    ) -> None:
        self.unet, self.networks, self.loss_and_gradient = unet, [unet, *others], loss_and_gradient
        self.trained = [p for network in self.networks for p in network.parameters() if p.requires_grad]
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
    check_plain(cfg, parts)
    theirs = replace(
        parts,
        unet=copy.deepcopy(parts.unet),
        vae=copy.deepcopy(parts.vae),
        text_encoders=[copy.deepcopy(encoder) for encoder in parts.text_encoders],
    )
    model = our_model(levers, parts, reward)
    # Under offload ours comes and goes, and may be away when the plain loop asks.
    asked = copy.deepcopy(reward).to(model.runtime.device) if levers.sharding.offload else reward
    plain = plain_loop(cfg, theirs, asked, model.runtime.device, checkpointing)
    load_lora_state_dict(plain.unet, lora_state_dict(model.unet))
    return model, {"ours": our_side(cfg, model, reward), "plain": plain_side(cfg, plain, theirs, reward)}


def check_plain(cfg: Config, parts: Parts) -> None:
    """Raise SystemExit where a setting is not the plain loop's."""
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


def our_model(levers: Config, parts: Parts, reward: Any) -> SDXLDRaFTPModel:
    """Our model, with a LoRA that is not at its start."""
    model = SDXLDRaFTPModel(levers, parts)
    model.reward_model = reward
    move_lora(model.unet)
    return model


def plain_loop(cfg: Config, parts: Parts, reward: Any, device: torch.device, checkpointing: bool) -> PlainLoop:
    """The plain loop on networks of its own, which are moved to the device; with a LoRA that is not at its start."""
    for network in parts.modules.values():
        network.to(device)
    loop = PlainLoop(
        {**parts.modules, "tokenizer": parts.tokenizers[0], "tokenizer_2": parts.tokenizers[1]},
        reward,
        rank=cfg.peft.rank,
        targets=list(cfg.peft.target_modules),
        steps=cfg.sampling.steps,
        scale=cfg.sampling.scale,
        k=cfg.draftp.truncation_steps,
        kl_coeff=cfg.draftp.kl_coeff,
        micro_batch_size=cfg.trainer.micro_batch_size,
        checkpointing=checkpointing,
    )
    move_lora(loop.unet)
    return loop


def our_side(cfg: Config, model: SDXLDRaFTPModel, reward: Any) -> Side:
    """A step of ours."""
    batch = batch_of(cfg)

    def step(phase: Phase) -> float:
        with model.watched(phase):
            return model.get_loss_and_metrics(batch)[0]

    return Side(model.unet, others(model.parts, reward), step)


def plain_side(cfg: Config, loop: PlainLoop, parts: Parts, reward: Any) -> Side:
    """A step of the plain loop."""
    batch = batch_of(cfg)

    def step(phase: Phase) -> float:
        loop.phase = phase
        return loop.step([*batch.prompts], [*batch.seeds], batch.size)[0]

    return Side(loop.unet, others(parts, reward), step)


def others(parts: Parts, reward: Any) -> list[nn.Module]:
    """The networks beside the UNet, those of the reward included."""
    judges = [reward] if isinstance(reward, nn.Module) else list(reward.rewards.values())
    return [parts.vae, *parts.text_encoders, *(judge for judge in judges if isinstance(judge, nn.Module))]


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
        counter = FlopCount()
        meter = Meter(counter.read)
        with counter:
            side.step(meter)
        found[name] |= {"flops": counter.total, "phase_flops": dict(meter.totals)}
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


def measure_once(side: Side, read: Callable[[], float]) -> dict[str, Any]:
    """What `measure` and `peak_bytes` find, of a single step: for networks whose step takes minutes."""
    live = LiveBytes([t for network in side.networks for t in (*network.parameters(), *network.buffers())])
    counter = FlopCount()
    seconds, flops, peaks = Meter(read), Meter(counter.read), PeakMeter(live)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with seconds(name), flops(name), peaks(name):
            yield

    began = read()
    with live, counter:
        loss = side.step(phase)
    took = read() - began
    return {
        "seconds": took, "all_seconds": [took], "first": took, "loss": loss, "phases": dict(seconds.totals),
        "flops": counter.total, "phase_flops": dict(flops.totals),
        "peak": live.peak, "peaks": dict(peaks.peaks),
    }  # fmt: skip


def count(side: Side, read: Callable[[], float], images: int, once: bool) -> dict[str, Any]:
    """What one more step needs: UNet evaluations an image (forward), and the most bytes; with `once` all figures."""
    rows: list[int] = []
    hook = side.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    if once:
        found = measure_once(side, read)
    else:
        peak, peaks = peak_bytes(side)
        found = {"peak": peak, "peaks": peaks}
    hook.remove()
    return found | {"evaluations": sum(rows) / images}


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


def report(found: dict[str, dict[str, Any]], images: int, rate: float, console: Console) -> None:
    """The table by phase, then the figures of the whole step."""
    table = Table(title="one optimizer step by phase", title_justify="left")
    titles = [f"{name} {unit}" for unit in ("s", "GFLOP", "peak MB") for name in found]
    for title in ("phase", *titles):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for phase in dict.fromkeys(phase for side in found.values() for phase in side["phases"]):
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
        console.print(f"{name}: UNet evaluations an image, forward: {side['evaluations']:g}")


def compare(found: dict[str, dict[str, Any]], sides: dict[str, Side], console: Console) -> float:
    """Say how far the sides' losses and gradients differ, and how fast they are; returns the ratio."""
    ours, plain = sides["ours"].gradient, sides["plain"].gradient
    assert ours is not None
    assert plain is not None
    difference = float((ours - plain).norm() / plain.norm())
    console.print(
        f"same step: losses {found['ours']['loss']:.6f} and {found['plain']['loss']:.6f}, gradients differ by "
        f"{difference:.1e} of their norm",
        highlight=False,
    )
    prefix = found["plain"]["phases"]["prefix"] / found["ours"]["phases"]["prefix"]
    ratio = found["plain"]["seconds"] / found["ours"]["seconds"]
    console.print(f"prefix ratio: {prefix:.2f}\nratio: {ratio:.2f}")
    return ratio


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="toy", help="toy, sdxl (random weights), or any recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of both sides")
    parser.add_argument("--lever", action="append", default=[], metavar="KEY=VALUE", help="a setting of ours alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--height", type=int, help="of the pictures; default: the preset's")
    parser.add_argument("--width", type=int, help="of the pictures; default: the preset's")
    parser.add_argument("--reward", help="default: the preset's, for sdxl PickScore with random weights")
    parser.add_argument("--side", choices=("ours", "plain"), help="it alone, where memory is too small for both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="a single step, timed and counted at once; no rounds")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, on a machine that others use too")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--keep-activations", action="store_true", help="the plain loop without checkpointing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args(arguments)


def load(options: argparse.Namespace, cfg: Config) -> tuple[Parts, Any]:
    """Networks and reward of the preset."""
    if options.preset != "sdxl":
        given = draftcli.get_reward_model(options.reward or cfg)
        return load_parts(cfg.model), given
    from sdxl_size import random_pickscore, random_sdxl

    return random_sdxl(cfg), draftcli.get_reward_model(options.reward) if options.reward else random_pickscore()


def main(arguments: list[str] | None = None) -> float:
    """Run the benchmark; returns the ratio, NaN with one side alone."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = quiet_console()
    preset, settings = SIZES.get(options.preset, (options.preset, []))
    sizes = [f"sampling.{edge}={value}" for edge in ("height", "width") if (value := getattr(options, edge))]
    settings = [*settings, f"model.device={options.device}", *sizes, *options.set]
    cfg, levers = draftcli.load_config(preset, settings), draftcli.load_config(preset, [*settings, *options.lever])
    parts, reward = load(options, cfg)
    runtime, images = choose_runtime(levers.model.device, levers.model.precision), cfg.trainer.global_batch_size
    model: SDXLDRaFTPModel | None = None
    if options.side is None:
        model, sides = make_sides(cfg, levers, parts, reward, not options.keep_activations)
    elif options.side == "ours":
        model = our_model(levers, parts, reward)
        sides = {"ours": our_side(cfg, model, reward)}
    else:
        check_plain(cfg, parts)
        loop = plain_loop(cfg, parts, reward, runtime.device, not options.keep_activations)
        sides = {"plain": plain_side(cfg, loop, parts, reward)}
    device = runtime.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    read = clock(device, options.cpu_time)
    rate = matmul_rate(read, device, runtime.dtype)
    console.print(
        f"{'CPU' if options.cpu_time else 'wall'} seconds; {platform.machine()} {device} ({name}), "
        f"{runtime.dtype}, matmul {rate / 1e9:.0f} GFLOP/s; torch "
        f"{torch.__version__}, diffusers {diffusers.__version__}, peft {peft.__version__}; {preset} with "
        f"{' '.join([*settings, *options.lever])}",
        highlight=False,
        soft_wrap=True,
    )
    found: dict[str, dict[str, Any]] = {} if options.once else measure(sides, read, options.rounds)
    for side_name, side in sides.items():
        found.setdefault(side_name, {}).update(count(side, read, images, options.once))
    report(found, images, rate, console)
    if model is not None and not options.once:
        console.print(folding_error(model))
    ratio = compare(found, sides, console) if len(sides) == 2 else math.nan
    if options.json:
        options.json.write_text(json.dumps({**found, "ratio": ratio}, indent=1), encoding="utf-8")
    return ratio


if __name__ == "__main__":
    main()
