"""draftp rewards."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from draftcli.cli.completion import complete_rewards
from draftcli.cli.help import PlainCommand, PlainGroup
from draftcli.cli.options import Debug

if TYPE_CHECKING:
    from rich.console import Console

    from draftcli.preferences.train import TrainReport

app = typer.Typer(cls=PlainGroup, help="List the reward models, test one, or train your own.", no_args_is_help=True)


@app.command("list", cls=PlainCommand)
def list_rewards(
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the names only.")] = False,
    debug: Debug = False,
) -> None:
    """List the rewards: what they measure, and where their weights come from.

    **Examples**

    `draftp rewards list`

    `draftp rewards list --quiet`
    """
    from draftcli.cli.console import literal_console
    from draftcli.rewards.catalogue import BUILT_IN_REWARDS, known_rewards, plug_ins

    out = literal_console()
    if quiet:
        out.print("\n".join(known_rewards()))
        return
    for name, entry in BUILT_IN_REWARDS.items():
        out.print(f"{name:<16}{entry.measures}")
        facts = [f"sees {entry.sees}"]
        if entry.weights:
            facts.append(f"weights {entry.weights} ({entry.licence or 'licence not stated'})")
        if entry.parameters:
            facts.append(f"{entry.memory} in memory")
        out.print(f"{'':<16}{'; '.join(facts)}")
    for name, package in plug_ins().items():
        out.print(f"{name:<16}plug-in of {package}")
    out.print("Your own: package.module:object or file.py:object. `draftp rewards check NAME` tests one.")
    out.print("Trained on your own choices: the folder written by `draftp rewards train`.")
    out.print("More: docs/rewards.md")


@app.command("check", cls=PlainCommand)
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A built-in name, package.module:object, file.py:object or the folder of a trained reward.",
            autocompletion=complete_rewards,
        ),
    ],
    pretrained: Annotated[
        str | None, typer.Option(metavar="ID|PATH", help="The reward's weights: hub id, folder or file.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="The reward's backbone model, if it is not bundled with its weights."),
    ] = None,
    size: Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="Size of the test images.")] = "256x192",
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the verdict only.")] = False,
    debug: Debug = False,
) -> None:
    """Load a reward, score noise and a flat image, and say whether it can be trained on.

    Checks range, determinism, gradient (missing, zero, not finite, wrong), whether images of a batch influence one
    another, and memory. Exit code 0: usable, for training or, if the reward says so, for evaluation only; 1: not
    usable; 2: it gives no scores at all.

    **Examples**

    `draftp rewards check toy`

    `draftp rewards check my_package.rewards:sharpness --size 1024x1024`

    `draftp rewards check hpsv2_1 --pretrained /models/HPS_v2.1_compressed.pt --device cuda`
    """
    import re

    from draftcli.errors import InputError

    if not (match := re.fullmatch(r"(\d+)x(\d+)", size)) or "0" in match.groups():
        raise InputError(f"--size {size}: expected HEIGHTxWIDTH, such as 1024x768")
    from draftcli.cli.console import open_console
    from draftcli.config import RewardSource, check_device_name
    from draftcli.rewards import check_sources

    source = RewardSource(pretrained=pretrained, backbone=backbone)
    check_sources({name: source})
    check_device_name(device, "--device")
    console = open_console(False, debug)
    from torch import nn

    from draftcli.core.engine.runtime import choose_runtime
    from draftcli.rewards.check import check_reward
    from draftcli.rewards.registry import load_from

    where = choose_runtime(device, "fp32", "--device").device
    reward = load_from(name, source)
    if isinstance(reward, nn.Module):
        reward.to(where)
    verdict = check_reward(reward, (int(match[1]), int(match[2])))
    if not quiet:
        for finding in verdict.findings:
            mark = {True: "ok", False: "BAD", None: ""}[finding.good]
            console.print(f"{finding.what:<12} {mark:<4} {finding.words}")
    console.print(f"{name}: {verdict.words}")
    differentiable = getattr(reward, "differentiable", True)
    if not (verdict.trains or (verdict.judges and not differentiable)):
        raise typer.Exit(1)


@app.command("train", cls=PlainCommand)
def train(
    preferences: Annotated[
        Path,
        typer.Argument(
            metavar="PREFERENCES",
            help="preferences.jsonl of draftp rate, another .jsonl, HPDv2's .json, Pick-a-Pic's .parquet or a folder.",
        ),
    ],
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME|DIR",
            help="The CLIP to start from: clip, pickscore, hpsv2_1, toy or a folder.  [default: clip]",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Folder of its tokenizer and preprocessor, if they are stored elsewhere."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="WHAT",
            help="head: a linear score on its frozen features; lora or whole: the CLIP itself.  [default: head below "
            "3000 pairs, then lora]",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Largest number of epochs, with lora and whole.  [default: 20]"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Pairs per step, with lora and whole.  [default: 16]")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(metavar="X", min=0, help="Learning rate, with lora and whole.  [default: 1e-4, whole 3e-6]"),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Rank of the LoRA, with lora.  [default: 16]")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the reward.")] = Path("my-taste"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a trained reward.")] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A known reward to compare with. Repeatable.  [default: pickscore and aesthetic, if their weights are "
            "on this machine]",
            autocompletion=complete_rewards,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the split into held-out prompts.")] = 0,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    debug: Debug = False,
) -> None:
    """Train a reward on somebody's choices between two images, and report how well it agrees with them.

    All reported figures are measured on pairs whose prompts the reward has not seen. The path of the folder can be used
    wherever a reward's name can.

    **Examples**

    `draftp rewards train preferences.jsonl`

    `draftp rewards train preferences.jsonl --from pickscore --output taste/mine`

    `draftp rewards train liked/` (a folder with chosen/ and rejected/)

    `draftp rewards train pick-a-pic.parquet --from clip --train lora --device cuda`
    """
    from draftcli.cli.console import open_console
    from draftcli.errors import InputError, warn

    if kind not in (None, "head", "lora", "whole"):
        raise InputError(f"--train {kind}: allowed are head, lora and whole")
    from draftcli.preferences.request import check_training

    check_training(preferences, start, tuple(judge or ()), device, output, overwrite)
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "rank": rank}
    given = {name: value for name, value in given.items() if value is not None}
    console = open_console(quiet, debug)
    from draftcli.preferences.finetune import FineTuning
    from draftcli.preferences.train import TrainRequest, train_on_preferences

    report = train_on_preferences(
        TrainRequest(
            preferences=preferences,
            output=output,
            start=start,
            backbone=backbone,
            train=kind,
            tuning=FineTuning(**given),
            judges=tuple(judge) if judge else None,
            device=device,
            seed=seed,
            overwrite=overwrite,
        ),
        console,
    )
    used = {"head": (), "whole": ("epochs", "batch_size", "lr"), "lora": given}[report.reward.trained]
    for name in (name for name in given if name not in used):
        warn(f"--{name.replace('_', '-')} has no effect with --train {report.reward.trained}")
    _print_trained(report, console)


def _print_trained(report: TrainReport, console: Console) -> None:
    from draftcli.errors import warn
    from draftcli.preferences.agreement import advice, agreement_table

    preferences, found = report.preferences, report.found
    pairs = len(preferences.answers)
    notes = [*preferences.left_out, *filter(None, [preferences.habit()])]
    if not preferences.splits_prompts:
        notes.append(f"{preferences.where}: only one prompt, so pairs were held out instead of prompts")
    told = advice(found, pairs)
    for text in [*notes, *(told if not found.beats_chance else [])]:
        warn(text)
    ties = f", {pairs - preferences.decided} of them ties" if preferences.decided < pairs else ""
    console.print(f"{'pairs':<12} {pairs}{ties}")
    kinds = {"head": "a head on", "lora": "a LoRA of", "whole": "all weights of"}
    console.print(f"{'trained':<12} {kinds[report.reward.trained]} {report.reward.start.reward}")
    for name, words in agreement_table(found):
        console.print(f"{name:<12} {words}")
    for text in told if found.beats_chance else ():
        console.print(f"{'':<12} {text}")
    folder = report.reward.path
    named = folder if len(folder.parts) > 1 or folder.is_absolute() else f"./{folder}"
    console.print(f"{'written':<12} {named}")
    console.print(f"{'next':<12} draftp train --reward {shlex.quote(f'{named}=1.0')}")
