"""draftp train."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftcli.cli.console import busy, literal_console, open_console, quoted
from draftcli.errors import warn

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.config import Config
    from draftcli.training.result import TrainingResult


DEFAULT_PRESET = "toy"
# What to run after a training, with its folder.
NEXT = ("draftp sample {}", "draftp anneal {} --weight linear", "draftp eval {}", "draftp merge-lora {}")


def train(
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="A recipe that ships with draftp, or a YAML file.  [default: toy]"),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, such as trainer.max_steps=300. Repeatable."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to train on: .txt, .jsonl, .tar, folder of .txt, built-in set, or a dataset's id.",
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

    `draftp train --preset toy` (a tiny SDXL, on any laptop; 73 seconds on two cores)

    `draftp train --preset sdxl-lora --prompts my_prompts.txt --output runs/mine`

    `draftp train --preset sdxl-lora --reward pickscore=1.0 --set draftp.kl_coeff=0.2`

    `draftp train --preset sdxl-full --dry-run`

    `draftp train --preset sdxl-lora --fit 16GB --dry-run`
    """
    from draftcli.config import dump_config, load_config, parse_reward

    values: dict[str, object] = {}
    if prompts:
        values["data.prompts"] = prompts
    if reward:
        values["rewards"] = dict(map(parse_reward, reward))
    recipe = preset or DEFAULT_PRESET
    cfg = load_config(recipe, override or [], values)
    folder = output or Path("runs") / Path(recipe).stem
    if "RANK" not in os.environ:  # of several processes, open_run lets one speak for all
        from draftcli.training.starting import check_start

        check_start(cfg, folder)
    from draftcli.training.launch import this_process

    process = this_process(processes)
    if process.is_launcher and not dry_run:
        raise typer.Exit(_launch(cfg, processes, fits=fit is not None))
    console = open_console(quiet or not process.is_main, debug)
    if dry_run:
        from draftcli.core.models.loading import check_unloaded

        check_unloaded(cfg.model)
    if process.is_main:
        _warn(cfg, processes, process.size)
    if fit:
        given = frozenset(text.partition("=")[0].strip() for text in override or [])
        with process.one_speaker():
            cfg = _fitted(cfg, fit, given, process.size, console)
    if dry_run:
        out = literal_console()
        out.print(dump_config(cfg))
        _print_plan(cfg, process.size, out)
        return
    from draftcli.training.loop import train as run_training

    if preset is None:
        console.print(f"preset {recipe}, as no --preset was given")
    console.print(f"run {folder}: {cfg.model.pretrained}, {cfg.trainer.max_steps} steps")
    _print_result(run_training(cfg, folder, console), folder, console)


def _launch(cfg: Config, processes: int, fits: bool) -> int:
    from draftcli.config import check_batch_size
    from draftcli.training.launch import launch

    if not fits:  # --fit chooses the micro-batch, in each process
        check_batch_size(cfg.trainer.micro_batch_size, cfg.trainer.global_batch_size, processes)
    return launch(processes, sys.argv[1:], int(60 * cfg.sharding.timeout_minutes))


def _warn(cfg: Config, processes: int, started: int) -> None:
    from draftcli.config import without_effect

    for text in without_effect(cfg):
        warn(text)
    if processes not in (1, started):
        warn(f"--processes {processes} has no effect: the launcher has started {started}")


def _fitted(cfg: Config, size: str, given: frozenset[str], ranks: int, console: Console) -> Config:
    from draftcli.planning.fit import fit, parse_size
    from draftcli.planning.memory import GB, MemoryPlan, memory_plan
    from draftcli.planning.plan import configuration_folder

    bytes_there, folder, tried = parse_size(size), configuration_folder(cfg), 0
    with busy(literal_console(stderr=True, quiet=console.quiet), "working out what fits") as status:

        def plan(some: Config) -> MemoryPlan:
            nonlocal tried
            tried += 1
            status.update(f"working out what fits {size}: settings {tried}")
            return memory_plan(some, folder, ranks)

        found = fit(cfg, bytes_there, plan, given, ranks)
    if not console.quiet:
        out = literal_console()
        out.print(f"fit {size}: needs {found.plan.needed / GB:.1f} GB")
        for choice in found.choices:
            out.print(f"  {choice.setting}={_yaml(choice.value)}  costs {choice.cost}")
    return found.cfg


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_plan(cfg: Config, ranks: int, console: Console) -> None:
    from draftcli.planning.memory import memory_lines
    from draftcli.planning.plan import make_plan
    from draftcli.rewards import check_names
    from draftcli.training.prompt_sets import read_prompt_sets

    check_names([*cfg.rewards, *cfg.held_out_rewards])
    prompts = read_prompt_sets(cfg)
    for text in prompts.notes_for(cfg.sampling):
        warn(text)
    plan = make_plan(cfg)
    total = plan.images * (plan.forward + plan.base + plan.again)
    lines = [
        f"model        {cfg.model.pretrained} (counted from {plan.source})",
        f"prompts      {len(prompts.training)} from {cfg.data.prompts}",
        f"rewards      {', '.join(cfg.rewards) or 'none'}; held out: {', '.join(cfg.held_out_rewards) or 'none'}",
        f"trainable    {plan.trainable:,} parameters",
        f"frozen       {sum(plan.frozen.values()):,} parameters",
        *(f"             {count:>13,} {name}" for name, count in plan.frozen.items()),
        f"a step       {plan.images} images; {total:,.6g} UNet evaluations",
        (
            f"an image     {plan.forward:.4g} UNet evaluations in {cfg.sampling.steps} steps "
            "(a guided one counts twice), "
            f"{plan.with_gradient:.4g} of them with gradient, and {plan.base:.4g} of the base"
            + (f"; {plan.again:.4g} again in backward" if plan.again else "")
        ),
        f"the run      {cfg.trainer.max_steps} steps, {cfg.trainer.max_steps * plan.images:,} images",
    ]
    console.print("\n".join(lines))
    if sys.stderr.isatty():
        print("memory is worked out now, on tensors without data: for SDXL some seconds", file=sys.stderr)
    console.print("\n".join(memory_lines(cfg, plan.folder, ranks)))


def _print_result(result: TrainingResult, folder: Path, console: Console) -> None:
    from draftcli.training.live import duration

    if result.already_done:
        console.print(f"{folder} is finished ({result.step} steps); raise trainer.max_steps to go on")
    elif result.finished:
        skipped = f", {result.skipped} skipped" if result.skipped else ""
        console.print(f"finished {result.step} steps{skipped} in {duration(result.seconds)}")
    for what, paths in result.written.items():
        console.print(f"{what:<11} {' '.join(map(str, paths))}")
    if result.interrupted:
        saved = f"stopped after step {result.step}, saved" if result.step else "stopped before the first step"
        console.print(f"{saved}; the same command again goes on")
        raise typer.Exit(130)
    for label, command in zip(["next", *[""] * len(NEXT)], NEXT, strict=False):
        console.print(f"{label:<11} {command.format(quoted(folder))}")
