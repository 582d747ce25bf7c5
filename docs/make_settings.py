"""Write docs/settings.md from the settings' own types and docstrings; a test compares it. Run: make docs"""

from __future__ import annotations

from pathlib import Path

from draftcli.config import Setting, settings_sections

HEAD = """# Settings

Made by `make docs` from `draftcli/config/schema.py`. `draftp settings` prints the same list, `draftp settings draftp`
one section of it, and `draftp settings --json-schema` a JSON schema with which editors complete and check a YAML file.

A setting stands in its section of a YAML file, or is given as `--set KEY=VALUE`. `NAME` is the name of a reward.
"""


def settings_page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for section in settings_sections():
        rows = "\n".join(map(_row, section.settings))
        head = "| setting | allowed | default | what it does |\n|---|---|---|---|"
        parts.append(f"## {section.name}\n\n{section.text}\n\n{head}\n{rows}\n")
    return "\n".join(parts)


def _row(setting: Setting) -> str:
    cells = (f"`{setting.key}`", setting.type, f"`{setting.default}`" if setting.default else "the empty text")
    return "| " + " | ".join((*cells, setting.text.replace("|", "\\|"))) + " |"


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(settings_page(), encoding="utf-8")
