"""draftp train."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.config import Config
    from draftcli.training.loop import Outcome


# What to run after a training, where this version has the command.
NEXT = {
    "sample": "draftp sample {}",
    "anneal": "draftp anneal {} --weight linear",
    "eval": "draftp eval {}",
    "merge-lora": "draftp merge-lora {}",
}


def train(
    context: typer.Context,
    preset: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A recipe that ships with draftp, or a YAML file.")
    ] = "toy",
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, such as trainer.max_steps=300. Repeatable."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Prompts to train on: .txt, .jsonl, .tar, a built-in set, or a dataset's id."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=WEIGHT]", help="Reward to train on, in place of the preset's. Repeatable."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder.  [default: runs/NAME-OF-PRESET]")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Train with so many processes on this machine, as torchrun starts them.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and what they amount to; touch nothing.")
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose batches, checkpointing, offloading and tiles that fit a GPU of 12GB, 16GB, 24GB, 40GB, 80GB "
            "or any other size, and say what each costs. What --set gives stays.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Tune an SDXL on differentiable rewards with DRaFT+. The same command again resumes.

    **Examples**

    `draftp train --preset toy` (a tiny SDXL, on any laptop, a minute or two)

    `draftp train --preset sdxl-lora --prompts my_prompts.txt --output runs/mine`

    `draftp train --preset sdxl-lora --reward pickscore=1.0 --set draftp.kl_coeff=0.2`

    `draftp train --preset sdxl-full --dry-run`

    `draftp train --preset sdxl-lora --fit 16GB --dry-run`
    """
    from draftcli.config import check_batch_size, dump_config, load_config, parse_reward

    values: dict[str, object] = {}
    if prompts:
        values["data.prompts"] = prompts
    if reward:
        values["rewards"] = dict(map(parse_reward, reward))
    cfg = load_config(preset, override or [], values)
    if processes > 1 and "RANK" not in os.environ and not dry_run:
        if not fit:  # which chooses the micro-batch
            check_batch_size(cfg.trainer.micro_batch_size, cfg.trainer.global_batch_size, processes)
        from draftcli.training.launch import launch

        raise typer.Exit(launch(processes, sys.argv[1:], int(60 * cfg.sharding.timeout_minutes)))
    alone = os.environ.get("RANK", "0") == "0"  # under torchrun one process talks for all
    for warning in cfg.warnings() if alone else []:
        typer.echo(f"warning: {warning}", err=True)
    from draftcli.cli.console import open_console

    console = open_console(quiet or not alone, debug)
    from draftcli.core.engine.ranks import world_size
    from draftcli.errors import InputError

    ranks = world_size() if "WORLD_SIZE" in os.environ else processes
    if alone and processes not in (1, ranks):
        typer.echo(f"warning: --processes {processes} has no effect: the launcher has started {ranks}", err=True)
    if fit:
        given = frozenset(text.partition("=")[0].strip() for text in override or [])
        try:
            cfg = _fitted(cfg, fit, given, ranks, say=alone and not quiet)
        except InputError as error:  # each process comes to it
            if alone:
                raise
            raise typer.Exit(error.exit_code) from error
    if dry_run:
        typer.echo(dump_config(cfg))
        _print_plan(cfg, ranks)
        return
    from draftcli.training.loop import train as run_training

    folder = output or Path("runs") / Path(preset).stem
    console.print(f"run {folder}: {cfg.model.pretrained}, {cfg.trainer.max_steps} steps", highlight=False)
    known = context.find_root().command
    _print_outcome(run_training(cfg, folder, console), folder, console, list(getattr(known, "commands", ())))


def _fitted(cfg: Config, size: str, given: frozenset[str], ranks: int, say: bool) -> Config:
    from draftcli.planning.fit import fit, parse_size

    bytes_there = parse_size(size)
    from rich.console import Console

    from draftcli.planning.memory import GB, MemoryPlan, memory_plan
    from draftcli.planning.plan import configuration_folder

    folder = configuration_folder(cfg)
    with Console(stderr=True, quiet=not say).status("working out what fits") as status:
        tried = 0

        def plan(some: Config) -> MemoryPlan:
            nonlocal tried
            tried += 1
            status.update(f"working out what fits {size}: settings {tried}")
            return memory_plan(some, folder, ranks)

        found = fit(cfg, bytes_there, plan, given, ranks)
    if say:
        typer.echo(f"fit {size}: needs {found.plan.needed / GB:.1f} GB")
        for choice in found.choices:
            typer.echo(f"  {choice.setting}={_yaml(choice.value)}  costs {choice.cost}")
    return found.cfg


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_plan(cfg: Config, ranks: int) -> None:
    from draftcli.planning.memory import memory_lines
    from draftcli.planning.plan import make_plan
    from draftcli.prompts import read_prompts
    from draftcli.rewards import check_names

    check_names([*cfg.rewards, *cfg.held_out_rewards])
    if cfg.data.validation_prompts:
        read_prompts(cfg.data.validation_prompts, "data.validation_prompts")
    plan = make_plan(cfg)
    total = plan.images * (plan.forward + plan.base + plan.again)
    lines = [
        f"model        {cfg.model.pretrained} (counted from {plan.source})",
        f"prompts      {len(read_prompts(cfg.data.prompts))} from {cfg.data.prompts}",
        f"rewards      {', '.join(cfg.rewards) or 'none'}; held out: {', '.join(cfg.held_out_rewards) or 'none'}",
        f"trainable    {plan.trainable:,} parameters",
        f"frozen       {sum(plan.frozen.values()):,} parameters",
        *(f"             {count:>13,} {name}" for name, count in plan.frozen.items()),
        f"a step       {plan.images} images; {total:,} UNet evaluations",
        (
            f"an image     {plan.forward} UNet evaluations in {cfg.sampling.steps} steps (a guided one counts twice), "
            f"{plan.with_gradient} of them with gradient, and {plan.base} of the base"
            + (f"; {plan.again} again in backward" if plan.again else "")
        ),
        f"the run      {cfg.trainer.max_steps} steps, {cfg.trainer.max_steps * plan.images:,} images",
    ]
    typer.echo("\n".join(lines))
    if sys.stderr.isatty():
        typer.echo("memory is worked out now, on tensors without data: for SDXL some seconds", err=True)
    typer.echo("\n".join(memory_lines(cfg, plan.folder, ranks)))


def _print_outcome(outcome: Outcome, folder: Path, console: Console, commands: list[str]) -> None:
    from draftcli.training.live import duration

    if outcome.already_done:
        console.print(f"{folder} is finished ({outcome.step} steps); raise trainer.max_steps to go on", highlight=False)
    elif outcome.finished:
        skipped = f", {outcome.skipped} skipped" if outcome.skipped else ""
        console.print(f"finished {outcome.step} steps{skipped} in {duration(outcome.seconds)}", highlight=False)
    for what, paths in outcome.written.items():
        console.print(f"{what:<11} {' '.join(map(str, paths))}", highlight=False, soft_wrap=True)
    if outcome.interrupted:
        saved = f"stopped after step {outcome.step}, saved" if outcome.step else "stopped before the first step"
        console.print(f"{saved}; the same command again goes on", highlight=False)
        raise typer.Exit(130)
    for i, line in enumerate(text.format(folder) for name, text in NEXT.items() if name in commands):
        console.print(f"{'' if i else 'next':<11} {line}", highlight=False, soft_wrap=True)
