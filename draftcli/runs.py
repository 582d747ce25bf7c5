"""Run folders: what is in one, and the settings it was started with.

runs/NAME/
    config.yaml          everything the run was started with, resolved
    metrics.jsonl        one line a step
    validation.jsonl     one line a validation
    samples/             base beside tuned, same seeds
    step-000200/         a checkpoint
    final/               the LoRA as diffusers loads it, or the trained UNet
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from draftcli.config import Config, dump_config
from draftcli.errors import DraftpError, InputError

# What may differ between the sessions of one run; anything else would make it another run.
MAY_CHANGE = ("trainer.max_steps", "trainer.val_check_interval", "trainer.save_interval", "trainer.keep_checkpoints")
MAY_CHANGE_SECTIONS = ("logging", "sharding")


class Run:
    """The folder of one training run.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.metrics = folder / "metrics.jsonl"
        self.validation = folder / "validation.jsonl"
        self.samples = folder / "samples"
        self.final = folder / "final"

    def step_folder(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self.folder / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, the newest first. Checkpoints in the making have another name."""
        return sorted(self.folder.glob("step-[0-9]*"), reverse=True)

    def open(self, cfg: Config) -> None:
        """Make the folder, or see that it is this very run.

        Raises:
            InputError: the folder is something else, or was started with other settings.
            DraftpError: it cannot be written.
        """
        if self.config.is_file():
            changed = _differences(_load(self.config), yaml.safe_load(dump_config(cfg)))
            refused = [c for c in changed if not _may_change(c[0])]
            if refused and self.checkpoints():  # before the first checkpoint there is nothing to keep
                listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in refused[:3])
                raise InputError(
                    f"{self.folder} was started with other settings ({listed}); "
                    "keep them to resume, or take another --output"
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} exists and is no run (it has no config.yaml); choose another --output")
        with disk_errors(self.folder):
            self.samples.mkdir(parents=True, exist_ok=True)
            write_aside(self.config, lambda path: path.write_text(dump_config(cfg), encoding="utf-8"))

    def last_validation(self) -> dict[str, Any] | None:
        """The newest line of validation.jsonl."""
        lines = self.validation.read_text(encoding="utf-8").splitlines() if self.validation.is_file() else []
        return json.loads(lines[-1]) if lines else None

    def forget_after(self, step: int) -> None:
        """Drop log lines of steps after `step`, which a resumed run will take again: no step is counted twice."""
        for path in (self.metrics, self.validation):
            if path.is_file():
                lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
                text = "".join(line + "\n" for line in lines)
                write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file or folder beside `path`, then rename it: `path` is never half written.

    What was at `path` is replaced.
    """
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    if aside.is_file():
        with aside.open("rb") as file:
            os.fsync(file.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    aside.replace(path)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """What the operating system refuses becomes one line: disk full, read-only, no permission."""
    try:
        yield
    except OSError as error:
        raise DraftpError(f"{error.filename or where}: cannot be written ({error.strerror or error})") from error


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


def _load(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: not the settings of a run; choose another --output")
    return data


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{key}.{n}" if key else str(n))]
    return [] if old == new else [(key, old, new)]


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.partition(".")[0] in MAY_CHANGE_SECTIONS
