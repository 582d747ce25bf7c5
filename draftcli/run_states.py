"""How runs stand: what each has done, what it scored last, and what was made of it. Nothing is written or locked."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from draftcli.disk import lock_file
from draftcli.errors import InputError
from draftcli.lines import text_lines
from draftcli.runs import LOCK, Run, ValidationLine, no_run

_TAIL = 2**18  # bytes at the end of a log in which its last line is looked for


class RunState(StrEnum):
    """What a run is doing."""

    FINISHED = "finished"
    """trainer.max_steps are taken and final/ is written."""
    TRAINING = "training"
    """A process is writing it."""
    STOPPED = "stopped"
    """It has a checkpoint that the same command goes on from."""
    ENDED_BY_MONITOR = "ended by its monitor"
    """It looked like reward hacking, and final/ is written; draftp train --set monitor.stop=never goes on."""
    NO_WEIGHTS = "no weights"
    """It ended before its first checkpoint."""
    DAMAGED = "damaged"
    """config.yaml cannot be read."""


@dataclass(frozen=True)
class RunStatus:
    """How one run stands.

    Attributes:
        folder: of the run.
        state: what it is doing.
        step: the last optimizer step that was logged; 0: none.
        max_steps: how many it is to take; None where its settings cannot be read.
        changed: when its log, or where there is none its settings, last changed, in seconds since 1970.
        reward: the mean reward of the last step.
        validation: its last validation.
        held_out: rewards of the validation that it is not trained on.
        made: what was made of it, by the name of the command, with counts or formats.
    """

    folder: Path
    state: RunState
    step: int
    max_steps: int | None
    changed: float
    reward: float | None
    validation: ValidationLine | None
    held_out: tuple[str, ...]
    made: dict[str, str]

    @property
    def steps(self) -> str:
        """Steps taken and to be taken, in words."""
        return f"{self.step}/{self.max_steps}" if self.max_steps is not None else str(self.step)

    @property
    def scores(self) -> str:
        """The last validation's scores, base -> tuned, held-out ones with a *; else the last step's reward."""
        if self.validation is not None:
            each = self.validation["rewards"].items()
            return "; ".join(
                f"{name}{'*' if name in self.held_out else ''} {_digits(f.get('base'))} -> {_digits(f.get('tuned'))}"
                for name, f in each
            )
        return "" if self.reward is None else f"reward {_digits(self.reward)} in training"


def run_statuses(names: Iterable[str] = ()) -> list[RunStatus]:
    """How runs stand, the one that changed last first.

    Args:
        names: folders of runs, or their names under runs/. None: every run under runs/.

    Raises:
        InputError: a name is that of no run.
    """
    folders = [_folder(name) for name in names] or [config.parent for config in Path("runs").glob("*/config.yaml")]
    return sorted(map(run_status, folders), key=lambda run: run.changed, reverse=True)


def run_status(folder: Path) -> RunStatus:
    """How the run in `folder` stands."""
    run = Run(folder)
    settings = _settings(run)
    step, validation = _last(run.metrics), _last(run.validation)
    done = max([step.get("step", 0), *(int(path.name.partition("-")[2]) for path in run.checkpoints()[:1])])
    max_steps = _get(settings, "trainer", "max_steps")
    max_steps = max_steps if type(max_steps) is int else None
    log = run.metrics if run.metrics.is_file() else run.config
    held_out = _get(settings, "held_out_rewards")
    return RunStatus(
        folder=folder,
        state=_state(run, settings, max_steps),
        step=done,
        max_steps=max_steps,
        changed=log.stat().st_mtime,
        reward=step.get("reward"),
        validation=validation if isinstance(validation.get("rewards"), dict) else None,  # type: ignore[arg-type]
        held_out=tuple(held_out or ()),
        made=_made(folder),
    )


def _folder(name: str) -> Path:
    found = next((path for path in (Path(name), Path("runs") / name) if (path / "config.yaml").is_file()), None)
    if found is None:
        raise InputError(no_run(name))
    return found


def _state(run: Run, settings: dict[str, Any], max_steps: int | None) -> RunState:
    if _is_being_written(run.folder / LOCK):
        return RunState.TRAINING
    if not settings:
        return RunState.DAMAGED
    if max_steps is not None and run.finished(max_steps):
        return RunState.FINISHED
    if (stop := run.stopped()) is not None and run.has_final(stop["final"]):
        return RunState.ENDED_BY_MONITOR
    return RunState.STOPPED if run.weights() is not None else RunState.NO_WEIGHTS


def _is_being_written(lock: Path) -> bool:
    """Whether a process holds the lock.

    It is tried only where the process that it names may be there: while it is tried, no training could start.
    """
    try:
        words = lock.read_text(encoding="utf-8", errors="replace").split()  # process NUMBER on HOST
        is_ours = words[3:] == [socket.gethostname()] and Path("/proc/self").exists()
        if is_ours and not Path("/proc", words[1]).exists():
            return False
        with lock.open("rb") as file:
            return not lock_file(file.fileno())
    except OSError:
        return False


def _made(folder: Path) -> dict[str, str]:
    """What sample, anneal, eval and merge-lora left where they write by default."""
    made = {}
    for name in ("sample", "anneal"):
        index = folder / name / "index.jsonl"
        if index.is_file():
            count = sum(bool(line) for line in text_lines(index, errors="replace"))
            made[name] = f"{count} image{'' if count == 1 else 's'}"
    if (folder / "eval" / "report.html").is_file():
        made["eval"] = "report.html"
    exported = sorted(path.name for path in (folder / "export").glob("*") if path.suffix != ".json")
    if exported := [name for name in exported if not name.startswith(".")]:
        made["merge-lora"] = ", ".join(exported)
    return made


def _settings(run: Run) -> dict[str, Any]:
    try:
        found = yaml.safe_load(run.config.read_text(encoding="utf-8-sig"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _get(settings: dict[str, Any], *keys: str) -> Any:
    value: Any = settings
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _last(log: Path) -> dict[str, Any]:
    """The last whole line of a log that has a step; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill, or by where we began to read
            continue
        if isinstance(found, dict) and type(found.get("step")) is int:
            return found
    return {}


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
