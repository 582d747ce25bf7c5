"""draftp runs."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.completion import complete_runs
from draftcli.cli.options import AsJson, Debug


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders of runs, or their names under runs/.  [default: all under runs/]",
            autocompletion=complete_runs,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the folders only.")] = False,
    debug: Debug = False,
) -> None:
    """List your runs, the newest first: progress, latest scores, and what was made from them.

    A run is `finished`, `training`, `stopped` (the same `draftp train` resumes it), `ended by its monitor` if it looked
    like reward hacking, has `no weights` if it ended before its first checkpoint, or is `damaged` if its settings
    cannot be read. Scores are those of the last validation, base -> tuned; held-out rewards are marked with *.

    **Examples**

    `draftp runs`

    `draftp runs mine runs/other`

    `draftp runs --json`
    """
    import dataclasses
    from datetime import datetime

    from draftcli.cli.console import literal_console, print_json, print_table
    from draftcli.run_states import run_statuses

    out = literal_console()
    found = run_statuses(names or ())
    if as_json:
        print_json([{**dataclasses.asdict(run), "folder": str(run.folder)} for run in found], out)
    elif quiet:
        out.print("\n".join(str(run.folder) for run in found), end="\n" if found else "")
    elif not found:
        out.print("no runs under runs/; train one: draftp train --preset toy")
    else:
        rows = [
            (
                str(run.folder),
                run.state,
                run.steps,
                f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}",
                run.scores,
                "; ".join(f"{command}: {made}" for command, made in run.made.items()),
            )
            for run in found
        ]
        print_table(("run", "state", "steps", "last step", "scores", "made from it"), rows, out)
