"""draftp settings."""

from __future__ import annotations

from typing import Annotated

import typer

from draftcli.cli.completion import complete_sections
from draftcli.cli.options import AsJson, Debug


def settings(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION|KEY",
            help="A section such as draftp, or a setting such as draftp.kl_coeff.  [default: all]",
            autocompletion=complete_sections,
        ),
    ] = None,
    as_json: AsJson = False,
    json_schema: Annotated[
        bool, typer.Option("--json-schema", help="Print a JSON schema of the YAML files, for editors.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the keys only.")] = False,
    debug: Debug = False,
) -> None:
    """List the settings with their defaults, allowed values and meanings.

    Settings go into a YAML file for `--preset`, or are given as `--set KEY=VALUE`. docs/settings.md has the same list.

    **Examples**

    `draftp settings`

    `draftp settings draftp`

    `draftp settings kl_coeff`

    `draftp settings --json-schema > draftp.schema.json` (then begin a YAML file with
    `# yaml-language-server: $schema=draftp.schema.json`)
    """
    import dataclasses
    import textwrap

    from draftcli.cli.console import literal_console, print_json
    from draftcli.config import find_settings, settings_schema
    from draftcli.errors import InputError

    out = literal_console()
    if json_schema and name is not None:
        raise InputError("--json-schema covers all settings; leave out the section")
    if json_schema:
        print_json(settings_schema(), out)
        return
    sections = find_settings(name)
    if as_json:
        print_json([dataclasses.asdict(setting) for section in sections for setting in section.settings], out)
    elif quiet:
        out.print("\n".join(setting.key for section in sections for setting in section.settings))
    else:
        from rich.text import Text

        width = min(out.width, 100) - 4
        for section in sections:
            out.print(Text(f"{section.name}: {section.text}", style="bold"))
            for setting in section.settings:
                value = "is required" if setting.default == "required" else f"= {setting.default}"
                out.print(Text.assemble("  ", (setting.key, "cyan"), f" {value}  ", (f"[{setting.type}]", "dim")))
                for line in textwrap.wrap(setting.text, width):
                    out.print(f"      {line}")
            out.print()
