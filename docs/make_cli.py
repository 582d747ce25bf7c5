"""Write docs/cli.md from the commands' own help; a test compares it. Run: python docs/make_cli.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "train",
    "sample",
    "anneal",
    "eval",
    "merge-lora",
    "rate",
    "rewards list",
    "rewards check",
    "rewards train",
    "doctor",
    "presets",
    "runs",
    "settings",
)


def cli_page() -> str:
    """The page as it should be."""
    env = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    parts = ["# The command line\n", "Made by `make docs` from the commands' own help.\n"]
    for command in ((), *(name.split() for name in COMMANDS)):
        call = [sys.executable, "-m", "draftcli", *command, "--help"]
        text = subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout
        text = text.replace("python -m draftcli", "draftp")
        lines = [line.rstrip() for line in text.splitlines()]
        title = " ".join(["draftp", *command])
        parts.append(f"## {title}\n\n```text\n" + "\n".join(lines).strip("\n") + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(cli_page(), encoding="utf-8")
