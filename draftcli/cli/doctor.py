"""draftp doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftcli.cli.completion import complete_presets, complete_settings


def doctor(
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="The recipe whose model and precision are checked.",
            autocompletion=complete_presets,
        ),
    ] = "toy",
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting, as in train. Repeatable.",
            autocompletion=complete_settings,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where runs would be stored.")] = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and failures only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check this machine and a recipe's model: would a training work?

    Device, precision, attention, disk and hub; whether every trained weight gets gradient, whether the VAE stays finite
    in its precision, whether the adapters switched off are the base, bit for bit. Exit code 0: healthy, also with
    warnings (no GPU, no hub); 1: not.

    **Examples**

    `draftp doctor`

    `draftp doctor --preset sdxl-lora`

    `draftp doctor --preset sdxl-lora --set model.vae_precision=fp16`
    """
    from draftcli.cli.console import open_console
    from draftcli.config import load_config

    cfg = load_config(preset, override or [])
    console = open_console(False, debug)
    from rich.table import Table
    from rich.text import Text

    from draftcli.planning.doctor import examine
    from draftcli.progress import busy

    with busy(console, "checking this machine and the model"):
        findings = list(examine(cfg, output))
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        if not quiet or finding.state != "ok":
            table.add_row(finding.what, Text(finding.state, style=colours[finding.state]), finding.words)
    if table.row_count:
        console.print(table)
    failed = sum(finding.state == "failed" for finding in findings)
    console.print(f"not healthy: {failed} failed" if failed else "healthy")
    if failed:
        raise typer.Exit(1)
