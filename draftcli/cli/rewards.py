"""draftp rewards."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.completion import complete_rewards
from draftcli.cli.help import PlainCommand, PlainGroup
from draftcli.cli.options import Debug

app = typer.Typer(cls=PlainGroup, help="List the reward models, or test one.", no_args_is_help=True)


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
    out.print("More: docs/rewards.md")


@app.command("check", cls=PlainCommand)
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A built-in name, package.module:object or file.py:object.",
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
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:N or mps.")] = "cpu",
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
    from draftcli.rewards import check_names

    check_names([name])
    console = open_console(False, debug)
    from torch import nn

    from draftcli.config import RewardSource
    from draftcli.rewards.check import check_reward
    from draftcli.rewards.registry import load_from

    reward = load_from(name, RewardSource(pretrained=pretrained, backbone=backbone))
    if isinstance(reward, nn.Module):
        reward.to(device)
    verdict = check_reward(reward, (int(match[1]), int(match[2])))
    if not quiet:
        for finding in verdict.findings:
            mark = {True: "ok", False: "BAD", None: ""}[finding.good]
            console.print(f"{finding.what:<12} {mark:<4} {finding.words}")
    console.print(f"{name}: {verdict.words}")
    differentiable = getattr(reward, "differentiable", True)
    if not (verdict.trains or (verdict.judges and not differentiable)):
        raise typer.Exit(1)
