"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.completion import complete_settings

Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="S",
        help="First seed; image j of each prompt uses seed S + j.  [default: the run's]",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Images generated at once.  [default: by size]")
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting, such as model.device=cuda:1. Repeatable.",
        autocompletion=complete_settings,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
