"""draftp train."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftcli.cli.completion import complete_presets, complete_rewards, complete_settings
from draftcli.cli.console import literal_console, open_console, print_table, quoted, written_label
from draftcli.cli.options import Debug, Quiet
from draftcli.errors import warn

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.config import Config
    from draftcli.planning.fit import Fit
    from draftcli.training.result import TrainingResult


DEFAULT_PRESET = "toy"
# What to run after a training, with its folder.
NEXT = ("draftp sample {}", "draftp anneal {} --weight linear", "draftp eval {}", "draftp merge-lora {}")


def train(
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Built-in preset, or a YAML file.  [default: toy]",
            autocompletion=complete_presets,
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, such as trainer.max_steps=300. Repeatable; draftp settings lists them.",
            autocompletion=complete_settings,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to train on: .txt, .jsonl, .tar, .csv, .parquet, folder of .txt, built-in set, or a "
            "dataset's id.",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT]",
            help="Reward to train on, in place of the preset's. Repeatable.",
            autocompletion=complete_rewards,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run's folder.  [default: runs/NAME-OF-PRESET]")
    ] = None,
    processes: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Number of training processes (GPUs) on this machine."),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the compute and memory that a step needs, and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --dry-run: also print all settings as YAML.")
    ] = False,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Choose batch sizes, checkpointing, offloading and tiles that fit a GPU of this size (16GB), and "
            "print what each costs. Settings given by --set are kept.",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune Stable Diffusion on differentiable rewards with DRaFT+. Run the same command again to resume.

    **Examples**

    `draftp train --preset toy` (a tiny SDXL, on any laptop; 50 seconds on two cores)

    `draftp train --preset sdxl-lora --prompts my_prompts.txt --output runs/mine`

    `draftp train --preset sdxl-lora --reward pickscore=1.0 --set draftp.kl_coeff=0.2`

    `draftp train --preset sdxl-full --dry-run` (the compute and memory of a step)

    `draftp train --preset sdxl-lora --fit 16GB --dry-run`
    """
    from draftcli.config import load_config, parse_reward
    from draftcli.planning.size import parse_size

    values: dict[str, object] = {}
    if prompts:
        values["data.prompts"] = prompts
    if reward:
        values["rewards"] = dict(map(parse_reward, reward))
    recipe = preset or DEFAULT_PRESET
    cfg = load_config(recipe, override or [], values)
    folder = output or Path("runs") / Path(recipe).stem
    size = parse_size(fit) if fit else None
    if "RANK" not in os.environ:  # of several processes, open_run lets one speak for all
        from draftcli.training.starting import check_start

        check_start(cfg, folder)
    from draftcli.training.launch import this_process

    process = this_process(processes)
    if process.is_launcher and not dry_run:
        raise typer.Exit(_launch(cfg, processes, fits=fit is not None))
    if process.is_main and not dry_run:
        _announce(cfg, folder, preset, literal_console(quiet=quiet))
    console = open_console(quiet or not process.is_main, debug, in_logs=not dry_run)
    if process.is_main and verbose and not dry_run:
        warn("--verbose has no effect without --dry-run")
    if dry_run:
        from draftcli.core.models.loading import check_unloaded

        check_unloaded(cfg.model, cfg.sampling)
    if cfg.peft.init_from is not None:
        from draftcli.planning.plan import following_init_from

        with process.one_speaker():
            cfg = following_init_from(cfg)
    from draftcli.core.gradient.mode import idle_beside_mode

    given = frozenset(text.partition("=")[0].strip() for text in override or [])
    with process.one_speaker():
        idle = idle_beside_mode(cfg, given)
    if process.is_main:
        _warn(cfg, idle, processes, process.size)
    found = None
    if size is not None:
        with process.one_speaker():
            found = _fitted(cfg, size, given, process.size, console)
        cfg = found.cfg
    if dry_run:
        _print_plan(cfg, found, process.size, verbose)
        return
    if found is not None:
        _print_choices(found, console)
    from draftcli.training.loop import train as run_training

    _print_result(run_training(cfg, folder, console), folder, console)


def _launch(cfg: Config, processes: int, fits: bool) -> int:
    from draftcli.config import check_batch_size
    from draftcli.training.launch import launch

    if not fits:  # --fit chooses the micro-batch, in each process
        check_batch_size(cfg, processes)
    return launch(processes, sys.argv[1:], int(60 * cfg.sharding.timeout_minutes))


def _warn(cfg: Config, idle: list[str], processes: int, started: int) -> None:
    from draftcli.config import without_effect

    for text in [*without_effect(cfg), *idle]:
        warn(text)
    if processes not in (1, started):
        warn(f"--processes {processes} has no effect: the launcher has started {started}")


def _announce(cfg: Config, folder: Path, preset: str | None, console: Console) -> None:
    if preset is None:
        console.print(f"preset {DEFAULT_PRESET}, as no --preset was given")
    console.print(f"run {folder}: {cfg.model.pretrained}, {cfg.trainer.max_steps} steps")


def _fitted(cfg: Config, size: int, given: frozenset[str], ranks: int, console: Console) -> Fit:
    from draftcli.planning.fit import fit
    from draftcli.planning.memory import GB, MemoryPlan, memory_plan
    from draftcli.planning.plan import configuration_folder
    from draftcli.progress import busy

    folder, tried = configuration_folder(cfg), 0
    asked = f"finding settings that fit {size / GB:.4g} GB"
    with busy(literal_console(stderr=True, quiet=console.quiet), asked) as activity:

        def plan(some: Config) -> MemoryPlan:
            nonlocal tried
            tried += 1
            found = memory_plan(some, folder, ranks)
            activity.update(f"{asked}: settings {tried} need {found.needed / GB:.1f} GB")
            return found

        return fit(cfg, size, plan, given, ranks)


def _print_choices(found: Fit, console: Console) -> None:
    from draftcli.planning.memory import GB

    console.print(f"these settings need {found.plan.needed / GB:.1f} GB")
    for choice in found.choices:
        console.print(f"  {choice.setting}={_yaml(choice.value)}  costs {choice.cost}")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_plan(cfg: Config, found: Fit | None, ranks: int, verbose: bool) -> None:
    """Everything is worked out before the first line is printed, so that an error stands alone."""
    from draftcli.config import dump_config
    from draftcli.planning.overview import plan_tables
    from draftcli.progress import busy
    from draftcli.rewards import check_names
    from draftcli.training.prompt_sets import read_prompt_sets

    check_names([*cfg.rewards, *cfg.held_out_rewards])
    prompts = read_prompt_sets(cfg)
    for text in prompts.notes_for(cfg.sampling):
        warn(text)
    with busy(literal_console(stderr=True), "estimating the compute and memory of a step"):
        tables = plan_tables(cfg, prompts, ranks)
    out = literal_console()
    if verbose:
        out.print(dump_config(cfg))
    if found is not None:
        _print_choices(found, out)
        out.print()
    for table in tables:
        numbers = range(1, len(table.headings)) if any(table.headings) else ()
        print_table(table.headings, table.rows, out, numbers)
        out.print(f"{table.note}\n" if table.note else "")
    if not verbose:
        out.print("--verbose prints the settings as well")


def _print_result(result: TrainingResult, folder: Path, console: Console) -> None:
    from draftcli.progress import duration

    if result.already_done:
        console.print(f"{folder} is finished ({result.step} steps); raise trainer.max_steps to continue")
    elif result.ended_early is not None:
        console.print(f"{result.ended_early} (took {duration(result.seconds)})", soft_wrap=True)
    elif result.finished:
        skipped = f", {result.skipped} skipped" if result.skipped else ""
        console.print(f"finished {result.step} steps{skipped} in {duration(result.seconds)}")
    for what, paths in result.written.items():
        console.print(f"{written_label(what):<11} {' '.join(map(str, paths))}")
    if result.interrupted:
        saved = f"stopped after step {result.step}, saved" if result.step else "stopped before the first step"
        console.print(f"{saved}. Run the same command to resume")
        raise typer.Exit(130)
    for label, command in zip(["next", *[""] * len(NEXT)], NEXT, strict=False):
        console.print(f"{label:<11} {command.format(quoted(folder))}")
