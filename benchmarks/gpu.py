"""SDXL at its real size on one GPU, random weights: what the plan foretells, beside what the GPU does.

    python benchmarks/gpu.py OUT                      everything, about ten minutes on an H100
    python benchmarks/gpu.py OUT recipes step         the stages that are named
    python benchmarks/gpu.py OUT --preset toy --device cpu     a trial of the script itself

Stages: `recipes` (each recipe's memory by phase against its plan, seconds an image), `limits` (whether recipes run
where the allocator gets no more than the plan says that they need), `step` (train_step.py: ours beside the plain
loop), `pictures` (whether pictures are finite, by the precision of UNet and decoder), `levers` (each lever beside the
step without it). Each row is printed and added to OUT/gpu.jsonl as soon as it is measured. Memory is what the caching
allocator handed out, in bytes; `used` is what the driver says that the process holds, context and fragmentation
included.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from levers import settings_of
from meter import Meter, clock, quiet_console
from torch import Tensor
from train_step import batch_of, move_lora
from train_step import main as train_step

import draftcli
from draftcli.config import Config
from draftcli.core.draftp import SDXLDRaFTPModel
from draftcli.core.models.family import Parts
from draftcli.core.models.loading import load_parts
from draftcli.core.phase import Phase
from draftcli.errors import InputError
from draftcli.planning.memory import CONTEXT, memory_plan
from draftcli.planning.plan import configuration_folder
from draftcli.training.optimizer import make_optimizer

RECIPES = ("sdxl-lora-12gb", "sdxl-lora-24gb", "sdxl-lora-80gb", "sdxl-full")
# The lever, and what has to be set on both sides for it to have something to do; N is 10, two images a step.
LEVERS: list[tuple[str, str]] = [
    ("sharding.two_stage=false", ""),
    ("sharding.activation_checkpointing=false", ""),
    ("sharding.recompute_steps=true", "draftp.truncation_steps=4,sharding.recompute_steps=false"),
    ("sharding.prefix_batch_size=1", ""),
    ("sharding.fold_lora=true,sharding.fold_tolerance=1", ""),
    ("trainer.micro_batch_size=2", ""),
    ("sharding.offload=true", ""),
    ("sharding.channels_last=true", ""),
    ("sharding.attention=flash", ""),
    ("sharding.attention=efficient", ""),
    ("sharding.attention=cudnn", ""),
    ("sharding.attention=math", ""),
    ("model.vae_tile=512", ""),
    ("model.vae_precision=bf16", ""),
    ("model.precision=fp16", ""),
    ("draftp.log_kl=false", "draftp.kl_coeff=0"),
    ("draftp.detach_uncond=true", ""),
    ("sampling.guidance_interval=[0.2;0.8]", ""),
    ("draftp.low_variance_samples=1", ""),
    ("draftp.gradient=refl", ""),
    ("draftp.gradient=drtune", ""),
    ("draftp.gradient=sparse", ""),
    ("draftp.gradient=matching", ""),
    ("draftp.prefix_steps=null", ""),
    ("sharding.compile=true", ""),
]
Row = dict[str, Any]


class Peaks:
    """`peaks(phase)` is a context; `found[phase]` the most bytes allocated in it, phases inside it included."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.found: defaultdict[str, int] = defaultdict(int)

    def _most(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = self._most()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            self.found[str(phase)] = max(self.found[str(phase)], self._most())
            self.found["all"] = max(self.found["all"], before, self._most())


class Bench:
    """What the stages share: the options, the weights, and where rows go.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.sdxl = options, options.preset == "sdxl"
        self.until = time.monotonic() + 60 * options.minutes
        self.console = quiet_console(width=160)
        options.out.mkdir(parents=True, exist_ok=True)

    def put(self, stage: str, row: Row) -> None:
        """Keep a row, and show it."""
        line = json.dumps({"stage": stage, **row}, default=str)
        with (self.options.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def config(self, recipe: str, settings: list[str]) -> Config:
        """A recipe on this device; in a trial the toy's."""
        device = f"model.device={self.options.device}"
        return draftcli.load_config(recipe if self.sdxl else "toy", [device, *settings, *self.options.set])

    def _make(self, precision: str, vae_precision: str | None) -> Parts:
        from sdxl_size import random_sdxl

        vae = [] if vae_precision is None else [f"model.vae_precision={vae_precision}"]
        return random_sdxl(self.config("sdxl-lora", [f"model.precision={precision}", *vae]))

    _kept = functools.lru_cache(maxsize=1)(_make)

    def kept(self, cfg: Config) -> Parts:
        """The weights that models of `cfg` are copies of."""
        return self._kept(cfg.model.precision, cfg.model.vae_precision)

    @functools.cached_property
    def reward(self) -> Any:
        """PickScore's network with random weights; in a trial the toy's reward."""
        from sdxl_size import random_pickscore

        return random_pickscore() if self.sdxl else draftcli.get_reward_model(self.config("toy", []))

    def model(self, cfg: Config, alone: bool = False) -> SDXLDRaFTPModel:
        """A model of `cfg`, its LoRA away from its start; `alone`: no other copy of its weights stays on the device."""
        if self.sdxl:
            parts = self._make(cfg.model.precision, cfg.model.vae_precision) if alone else copy.deepcopy(self.kept(cfg))
            if cfg.peft.peft_scheme == "none":
                parts.unet.float()  # as loading does: trained weights are float32
            if cfg.sharding.offload:
                for module in parts.modules.values():
                    module.cpu()
        else:
            parts = load_parts(cfg.model)
        model = SDXLDRaFTPModel(cfg, parts)
        model.reward_model = self.reward.cpu() if self.sdxl else self.reward
        move_lora(model.unet)
        return model


def recipes(bench: Bench) -> Iterator[Row]:
    """Memory by phase against the plan's, in a second optimizer step, and seconds an image."""
    for name in bench.options.recipe or RECIPES if bench.sdxl else ("toy",):
        yield _recipe(bench, name)
        _empty()


def _recipe(bench: Bench, name: str) -> Row:
    cfg = bench.config(name, ["trainer.global_batch_size=8"])
    plan = memory_plan(cfg, configuration_folder(cfg))
    return {
        "recipe": name,
        "planned": {str(phase): size for phase, size in plan.phases.items()},
        "planned_peak": plan.peak,
        "needed": plan.needed,
        **_two_steps(bench, cfg),
    }


def _two_steps(bench: Bench, cfg: Config) -> Row:
    """Two optimizer steps as training takes them; the second is measured."""
    model, batch = bench.model(cfg, alone=True), batch_of(cfg)
    read, peaks = clock(model.runtime.device), Peaks(model.runtime.device)
    optimizer = make_optimizer(model.trainable_parameters, cfg.optim)
    seconds: list[float] = []
    losses: list[float] = []
    meter = Meter(read)
    for _ in range(2):
        peaks.found.clear()
        meter.totals.clear()

        @contextmanager
        def watch(phase: str) -> Iterator[None]:
            with meter(str(phase)), peaks(phase):
                yield

        began = read()
        with model.watched(watch):
            losses.append(model.get_loss_and_metrics(batch)[0])
        with watch(Phase.OPTIMIZER):
            torch.nn.utils.clip_grad_norm_(model.trainable_parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(read() - began)
    return {
        "measured": dict(peaks.found),
        "seconds": dict(meter.totals),
        **_held(),
        "seconds_an_image": seconds[1] / len(batch),
        "first_step": seconds[0],
        "losses": losses,
    }


def limits(bench: Bench) -> Iterator[Row]:
    """Whether a recipe runs where the allocator gets no more than the plan says that it needs, its context apart."""
    fit = ["sharding.activation_checkpointing=true", "model.vae_tile=512"]
    cases = [("sdxl-lora-12gb", []), ("sdxl-lora", fit), ("sdxl-lora-24gb", [])] if bench.sdxl else [("toy", [])]
    for name, settings in cases:
        cfg = bench.config(name, ["trainer.global_batch_size=8", "sampling.steps=3", *settings])
        plan = memory_plan(cfg, configuration_folder(cfg))
        for extra in (0.0, 0.5e9, 1e9, 2e9):
            allowed = plan.needed - CONTEXT + extra
            row: Row = {"recipe": name, "settings": settings, "needed": plan.needed, "allowed": allowed}
            with _at_most(allowed):
                try:
                    found = _two_steps(bench, cfg)
                except torch.OutOfMemoryError as error:
                    yield {**row, "error": str(error)[:200]}
                    continue
            yield {**row, "ran": True, **found}
            break


@contextmanager
def _at_most(bytes_: float) -> Iterator[None]:
    """Inside, the caching allocator takes no more from the device."""
    _empty()
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_per_process_memory_fraction(bytes_ / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        _empty()


def step(bench: Bench) -> Iterator[Row]:
    """Ours beside the plain loop."""
    arguments = ["--preset", bench.options.preset, "--device", bench.options.device, "--rounds", "2"]
    arguments += ["--json", str(bench.options.out / "step.json"), "--set", "trainer.global_batch_size=4"]
    for setting in [*bench.options.set, *(["model.precision=bf16"] if bench.sdxl else [])]:
        arguments += ["--set", setting]
    _empty()
    yield {"ratio": train_step(arguments)}


def pictures(bench: Bench) -> Iterator[Row]:
    """Two pictures from the same noise by precision of the UNet, decoded in each precision of the decoder."""
    exact: Tensor | None = None
    for precision in ("fp32", "bf16", "fp16"):
        row, x_0 = _picture(bench, precision, exact)
        exact = x_0 if exact is None else exact
        yield row
        _empty()


@torch.no_grad()
def _picture(bench: Bench, precision: str, exact: Tensor | None) -> tuple[Row, Tensor]:
    cfg = bench.config(
        "sdxl-lora", [f"model.precision={precision}", "trainer.global_batch_size=2", "trainer.micro_batch_size=1"]
    )
    model, batch = bench.model(cfg), batch_of(cfg)
    x_0 = model.sampler.walk(model.networks.tuned(model.encode(batch)), model.networks.start(batch))
    exact = x_0 if exact is None else exact
    row: Row = {"unet": precision, "x_0_error": float((x_0 - exact).norm() / exact.norm())}
    row["x_0_finite"] = bool(torch.isfinite(x_0).all())
    plain: Tensor | None = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.vae.to(dtype)
        image = model.decode(exact).float()
        plain = image if plain is None else plain
        row[f"decoder {dtype}"] = {
            "finite": bool(torch.isfinite(image).all()),
            "largest_difference": float((image - plain).abs().nan_to_num(9).max()),
        }
    return row, x_0


def levers(bench: Bench) -> Iterator[Row]:
    """Each lever beside the step without it."""
    shared = ["sampling.steps=10", "trainer.global_batch_size=2", "trainer.micro_batch_size=1"]
    shared += ["model.offload_text_encoders=false"]
    plain: dict[str, Row] = {}
    for lever, both in LEVERS:
        if time.monotonic() > bench.until:
            yield {"lever": lever, "not_measured": "out of time"}
            continue
        settings = [*shared, *settings_of(both)]
        if both not in plain:
            plain[both] = _measured(bench, settings)
        before = plain[both]
        row: Row = {"lever": lever, "both": both, "without": {k: v for k, v in before.items() if k != "gradient"}}
        try:
            after = _measured(bench, [*settings, *settings_of(lever)])
        except (RuntimeError, InputError) as error:
            yield {**row, "error": str(error)[:300]}
            continue
        if len(after["gradient"]) == len(before["gradient"]):
            difference = (after["gradient"] - before["gradient"]).norm() / before["gradient"].norm()
            row["gradient_difference"] = float(difference)
        row["loss_difference"] = abs(after["loss"] - before["loss"])
        yield {**row, "with": {k: v for k, v in after.items() if k != "gradient"}}


def _measured(bench: Bench, settings: list[str]) -> Row:
    """Seconds, memory and gradient of a training step, after one that is timed apart."""
    cfg = bench.config("sdxl-lora", settings)
    if bench.sdxl:
        bench.kept(cfg)
    _empty()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    model, batch = bench.model(cfg), batch_of(cfg)
    read, peaks, seconds, loss = clock(model.runtime.device), Peaks(model.runtime.device), [], 0.0
    meter = Meter(read)
    for watch in (peaks, meter):
        model.unet.zero_grad(set_to_none=True)
        began = read()
        with model.watched(watch):
            loss = model.get_loss_and_metrics(batch)[0]
        seconds.append(read() - began)
    scale = model.grad_scaler.get_scale() if model.grad_scaler.is_enabled() else 1.0
    gradient = torch.cat([p.grad.flatten().float() for p in model.trainable_parameters if p.grad is not None])
    return {
        "first": seconds[0],
        "seconds": seconds[1],
        "phases": {str(phase): took for phase, took in meter.totals.items()},
        "peak": peaks.found["all"] - before,
        "loss": loss,
        "gradient": gradient / scale,
    }


STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "recipes": recipes,
    "limits": limits,
    "step": step,
    "pictures": pictures,
    "levers": levers,
}


def main() -> None:
    """Run the stages in order, and go on after one that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; none: all")
    parser.add_argument("--preset", choices=["sdxl", "toy"], default="sdxl")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all stages")
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="for the stage recipes: this one alone")
    parser.add_argument("--minutes", type=float, default=60, help="after so many no lever is begun")
    options = parser.parse_args()
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    bench = Bench(options)
    bench.put("versions", _versions(options.device))
    for stage in options.stages or STAGES:
        began, rows = time.monotonic(), STAGES[stage](bench)
        try:
            for row in rows:
                bench.put(stage, row)
        except (RuntimeError, InputError) as error:  # out of memory is a RuntimeError
            bench.put(stage, {"error": str(error)[:300]})
        bench.put(stage, {"stage_seconds": time.monotonic() - began})


def _versions(device: str) -> Row:
    import diffusers
    import peft

    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"device": name, "torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}


def _held() -> Row:
    """What the driver and the allocator hold."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"used": total - free, "reserved": torch.cuda.max_memory_reserved()}


def _empty() -> None:
    """Give back what the model before held, so that the next one's figures are its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
