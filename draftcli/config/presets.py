"""The presets that ship with draftp, as their own headers describe them.

A header is the comment that a file opens with: a summary, then a field a line, its name first.

    # hardware   one GPU with 24 GB; the plan predicts 23.9e9
    # duration   not yet measured
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from draftcli.config.explaining import nearest
from draftcli.config.reading import preset_names, presets_folder
from draftcli.errors import InputError, brief

_FIELD = re.compile(r"(hardware|duration|result|command) {2,}(\S.*)")
_CONTINUED = re.compile(r" {3,}(\S.*)")
_UNKNOWN = "not yet measured"


@dataclass(frozen=True)
class Preset:
    """One preset.

    Attributes:
        name: as --preset takes it.
        path: its file.
        summary: what it trains, in a sentence.
        hardware: what it needs, and how that is known.
        duration: how long it took, on what, and when it was measured.
        result: what came out, with intervals.
        command: that starts it.
    """

    name: str
    path: Path
    summary: str
    hardware: str
    duration: str
    result: str
    command: str

    @property
    def needs(self) -> str:
        """The hardware in a few words."""
        return re.split(r"[;:(]", self.hardware)[0].strip()

    @property
    def is_measured(self) -> bool:
        """Whether it has been run on the hardware that it is for."""
        return not self.duration.startswith(_UNKNOWN)

    @property
    def status(self) -> str:
        """Whether it has been run, and how long that took."""
        return f"measured: {self.duration.partition(' (')[0]}" if self.is_measured else "not yet run on this hardware"

    @property
    def text(self) -> str:
        """The whole file."""
        return self.path.read_text(encoding="utf-8")


def list_presets() -> list[Preset]:
    """All presets, by name."""
    return [find_preset(name) for name in preset_names()]


def find_preset(name: str) -> Preset:
    """The preset `name`.

    Raises:
        InputError: there is none of that name; names the nearest one.
    """
    names = preset_names()
    if name not in names:
        raise InputError(f"unknown preset {brief(name)}{nearest(name, names)}; available: {', '.join(names)}")
    path = presets_folder() / f"{name}.yaml"
    return Preset(name, path, **_header(path.read_text(encoding="utf-8")))


def _header(text: str) -> dict[str, str]:
    """The summary and the fields of a preset's text. Without a duration or result, these are not yet measured."""
    found: dict[str, str] = {"summary": "", "hardware": "", "duration": "", "result": "", "command": ""}
    current = "summary"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        body = line.removeprefix("#").removeprefix(" ")
        if field := _FIELD.fullmatch(body):
            current, words = field[1], field[2]
        elif current == "summary" and body.strip():
            words = body.strip()
        elif current and (more := _CONTINUED.fullmatch(body)):
            words = more[1]
        else:  # the end of a field, or the notes below them
            current = ""
            continue
        found[current] = f"{found[current]} {words}".strip()
    return {**found, **{name: found[name] or _UNKNOWN for name in ("duration", "result")}}
