"""draftp rate."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftcli.cli.completion import complete_presets, complete_rewards, complete_runs
from draftcli.cli.options import BatchSize, Debug, Override, Seed
from draftcli.cli.sample import Loras, Model, Prompts

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.rating.rate import RatingResult


def rate(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|FOLDER",
            help="A run or one of its checkpoints, or two; a folder of images with an index.jsonl, or two.  "
            "[default: the newest run]",
            autocompletion=complete_runs,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Use a preset's model before any training, with its sampling and prompts, instead of a run.",
            autocompletion=complete_presets,
        ),
    ] = None,
    model: Model = None,
    lora: Loras = None,
    base: Annotated[
        bool, typer.Option("--base", help="Compare the run with its base, in place of two seeds of the run.")
    ] = False,
    pairs: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many different pairs; one in ten is shown again later.")
    ] = 100,
    prompt: Prompts = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="As for train: .txt, .jsonl, ..., or a built-in set.  [default: the prompts that the run trains on]",
        ),
    ] = None,
    seed: Seed = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A reward: how far it agrees with you is said at the end. Repeatable.",
            autocompletion=complete_rewards,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.  [default: the run's, or auto]")
    ] = None,
    batch_size: BatchSize = None,
    override: Override = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port of the page; 0 takes any free one.")
    ] = 0,
    open_: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser, if it has a screen.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for preferences.jsonl and images.  [default: rate in the run's]"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the page's address, warnings and errors only.")] = False,
    debug: Debug = False,
) -> None:
    """Choose the better of two images, again and again, on a page that only this machine serves.

    Pairs are generated while you rate: two seeds of one prompt, a run beside its base (--base) or two runs at the same
    seed. The page never says which is which. Each answer is saved before the next pair is shown. Ctrl-C or Finish ends
    the session, and the same command continues it.

    **Examples**

    `draftp rate --preset toy` (the toy's base, two seeds of one prompt)

    `draftp rate runs/mine --base --pairs 200 --judge pickscore --judge aesthetic`

    `draftp rate runs/mine runs/other --prompts my_prompts.txt`

    `draftp rate pictures/drawn-elsewhere --output my-taste`
    """
    from draftcli.rating.request import RatingRequest, check_rating

    request = RatingRequest(
        names=names or (),
        model=model,
        preset=preset,
        loras=lora or (),
        overrides=override or (),
        prompts=prompt or (),
        prompt_file=prompts,
        base=base,
        pairs=pairs,
        seed=seed,
        device=device,
        batch_size=batch_size,
        judges=judge or (),
        port=port,
        output=output,
    )
    candidates = check_rating(request)
    from draftcli.cli.console import literal_console, open_console

    draws = bool(candidates.sources or request.judges)
    console = open_console(quiet, debug) if draws else literal_console(quiet=quiet)
    from draftcli.rating.rate import rate_pictures

    def announce(address: str) -> None:
        literal_console().print(f"rate at  {address}")
        console.print("press Ctrl-C here, or Finish on the page, to save and quit")
        if open_ and _has_screen():
            webbrowser.open(address)

    _print_result(rate_pictures(request, candidates, console, announce), console)


def _has_screen() -> bool:
    """False where a browser could only open inside the terminal."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _print_result(result: RatingResult, console: Console) -> None:
    from draftcli.rating.agreement import in_percent

    summary = result.summary
    console.print(
        f"{summary.answered} of {result.total} answered: {summary.preferences} preferences, {summary.ties} times "
        f"neither, {summary.skipped} skipped"
    )
    if summary.repeated:
        console.print(f"the same answer to {summary.steady:g} of {summary.repeated} pairs that were shown twice")
    if summary.wins is not None and summary.wins.n:
        first, second = result.columns
        console.print(f"{second} was better than {first} in {in_percent(summary.wins)}")
    for name, agrees in result.judges.items():
        console.print(f"{name} agrees in {in_percent(agrees)}" if agrees.n else f"{name} has no score for these pairs")
    console.print(f"answers  {result.path}")
