"""The plan of a run as tables for people: what it trains, what a step computes, and the memory of each phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from draftcli.config import Config
from draftcli.planning.ledger import RATES, SMALL_RATES, make_ledger
from draftcli.planning.memory import GB, memory_plan
from draftcli.planning.plan import Plan, make_plan
from draftcli.planning.rehearsal import largest
from draftcli.planning.shares import per_rank
from draftcli.training.prompt_sets import PromptSets


@dataclass(frozen=True)
class PlanTable:
    """One table.

    Attributes:
        headings: of its columns; all empty: none is shown.
        rows: a text for each column. All columns but the first of a table with headings are numbers.
        note: a line below it; empty: none.
    """

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def plan_tables(cfg: Config, prompts: PromptSets, ranks: int = 1) -> list[PlanTable]:
    """Work out what `cfg` amounts to. No weights are loaded, nothing is fetched or written.

    Args:
        cfg: the settings.
        prompts: that it trains on.
        ranks: processes that share the training.

    Raises:
        InputError: as `make_plan` and `memory_plan`.
    """
    plan = make_plan(cfg)
    tables = [PlanTable(("", ""), list(_facts(cfg, plan, prompts))), _evaluations(cfg, plan), _memory(cfg, plan, ranks)]
    tables.append(_work(cfg, plan))
    return [*tables, _shares(cfg, plan)] if cfg.sharding.strategy == "fsdp" else tables


def _facts(cfg: Config, plan: Plan, prompts: PromptSets) -> Iterator[tuple[str, str]]:
    trainer, sampling = cfg.trainer, cfg.sampling
    frozen = ", ".join(f"{name} {count:,}" for name, count in plan.frozen.items())
    yield "model", f"{cfg.model.pretrained} (counted from {plan.source})"
    yield "prompts", f"{len(prompts.training)} from {cfg.data.prompts}"
    asked = " (asked in training as well)" if cfg.draftp.asks_held_out else ""
    yield "rewards", f"{', '.join(cfg.rewards) or 'none'}; held out: {', '.join(cfg.held_out) or 'none'}{asked}"
    yield "trainable", f"{plan.trainable:,} parameters"
    yield "frozen", f"{sum(plan.frozen.values()):,} parameters: {frozen}"
    yield "images", f"{sampling.height} x {sampling.width}, {sampling.steps} steps of {sampling.sampler}"
    batch = f"{trainer.max_steps} steps of {plan.images} images, {trainer.max_steps * plan.images:,} images in all"
    yield "run", batch


def _evaluations(cfg: Config, plan: Plan) -> PlanTable:
    """UNet evaluations by what they are for."""
    parts = {
        "tuned, without gradient": plan.forward - plan.with_gradient,
        "tuned, with gradient": plan.with_gradient,
        "base": plan.base,
        "again in backward (activation checkpointing)": plan.again,
    }
    total = sum(parts.values())
    rows = [(name, *_counts(count, plan.images)) for name, count in parts.items() if count]
    headings = ("UNet evaluations (with guidance two a sampler step)", "an image", "a step")
    reuse = cfg.draftp.reuse
    shared = f"walks that {reuse} steps have in common are counted in shares; the first step makes all of its own"
    return PlanTable(headings, [*rows, ("total", *_counts(total, plan.images))], shared if reuse > 1 else "")


def _counts(count: float, images: int) -> tuple[str, str]:
    return f"{count:.4g}", f"{count * images:,.6g}"


def _work(cfg: Config, plan: Plan) -> PlanTable:
    """FLOP of an image by phase, and the seconds that they take at some rates."""
    ledger, (height, width) = make_ledger(cfg, plan.folder), largest(cfg)
    unit, size, rates = ("TFLOP", 1e12, RATES) if ledger.total >= 1e12 else ("GFLOP", 1e9, SMALL_RATES)

    def row(name: str, flop: float) -> tuple[str, ...]:
        return name, f"{flop / size:.2f}", *(f"{flop / size / rate:.3g}" for rate in rates)

    rows = [row(phase, flop) for phase, flop in ledger.flop.items() if flop]
    moved = f"{ledger.moved / 1e9:.2f} GB of weights go to the GPU and from it in each step" if ledger.moved else ""
    headings = (f"work of an image, {height} x {width}, counted", unit, *(f"s at {rate} {unit}/s" for rate in rates))
    return PlanTable(headings, [*rows, row("total", ledger.total)], moved)


def _memory(cfg: Config, plan: Plan, ranks: int) -> PlanTable:
    memory, (height, width) = memory_plan(cfg, plan.folder, ranks), largest(cfg)
    always, digits = sum(memory.resident.values()), 2 if memory.peak > GB else 3
    device = "a CPU" if cfg.model.device == "cpu" else "a GPU"
    whose = device if ranks == 1 else f"{device}, each of {ranks} processes"

    def row(name: str, size: int) -> tuple[str, str]:
        return name, f"{size / GB:.{digits}f}"

    rows = [row("resident", always)]
    rows += [row(f"  {name}", part) for name, part in memory.resident.items() if part >= 0.005 * always]
    rows += [row(f"{name}{' (peak)' if name == memory.worst else ''}", most) for name, most in memory.phases.items()]
    if memory.allowance:
        rows.append(row("for context and fragmentation", memory.allowance))
    rows.append(row("needed: peak and allowance" if memory.allowance else "needed", memory.needed))
    note = f"not counted: the networks of {', '.join(memory.uncounted)}" if memory.uncounted else ""
    return PlanTable((f"memory on {whose}, {height} x {width}, estimated", "GB (10^9 bytes)"), rows, note)


def _shares(cfg: Config, plan: Plan) -> PlanTable:
    """What each process of fsdp holds, over numbers of them."""
    counts = [count for count in (1, 2, 4, 8, 16) if count == 1 or count % (cfg.sharding.shard_size or 1) == 0]
    rows = []
    for count, share in per_rank(cfg, plan.folder, counts).items():
        trained = share["trained"] / GB
        parts = (trained, trained, 2 * trained, share["frozen"] / GB, share["whole"] / GB)
        rows.append(
            (f"{count} {'process' if count == 1 else 'processes'}", *(f"{p:.2f}" for p in (*parts, sum(parts))))
        )
    headings = ("fsdp, GB a process", "trained", "gradient", "AdamW", "frozen", "whole (VAE, text, rewards)", "sum")
    return PlanTable(headings, rows)
