"""draftp doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from draftcli.cli.completion import complete_presets, complete_settings
from draftcli.cli.options import Debug


def doctor(
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Preset whose model and precision are checked.",
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
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder where runs are stored; its free space is checked.")
    ] = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and failures only.")] = False,
    debug: Debug = False,
) -> None:
    """Check that this machine can train a given preset.

    Checks device, precision, attention, disk and hub; that every trained weight gets a gradient, that the VAE stays
    finite in its precision, and that the model with its adapters off equals the base bit for bit. Exit code 0:
    healthy, possibly with warnings (no GPU, no hub); 1: not healthy.

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
