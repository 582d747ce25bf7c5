"""draftp presets."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.completion import complete_presets
from draftcli.cli.options import AsJson, Debug


def presets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Print this preset.  [default: list all]", autocompletion=complete_presets),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the names only.")] = False,
    debug: Debug = False,
) -> None:
    """List the presets with the hardware they need, or print one of them.

    A preset is a YAML file with the settings of a run. To make your own, start from a copy of one.

    **Examples**

    `draftp presets`

    `draftp presets sdxl-lora`

    `draftp presets sdxl-lora > mine.yaml` (change it, then `draftp train --preset mine.yaml`)
    """
    from draftcli.cli.console import literal_console, print_json
    from draftcli.config import find_preset, list_presets

    out = literal_console()
    found = [find_preset(name)] if name else list_presets()
    if as_json:
        facts = [
            {
                "name": preset.name,
                "summary": preset.summary,
                "hardware": preset.hardware,
                "measured": preset.is_measured,
                "duration": preset.duration,
                "result": preset.result,
                "command": preset.command,
                "file": str(preset.path),
            }
            for preset in found
        ]
        print_json(facts[0] if name else facts, out)
    elif quiet:
        out.print("\n".join(preset.name for preset in found))
    elif name:
        out.print(found[0].text, end="")
    else:
        from draftcli.cli.console import print_table

        rows = [(preset.name, preset.summary, preset.needs, preset.status) for preset in found]
        print_table(("preset", "what it trains", "hardware", "status"), rows, out)
        out.print("\nPrint one: draftp presets NAME. Memory and cost of one: draftp train --preset NAME --dry-run")
