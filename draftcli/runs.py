"""Run folders: what is in one, and the settings it was started with.

runs/NAME/
    config.yaml          everything the run was started with, resolved
    contents.json        hashes of the files that the settings name
    metrics.jsonl        one line a step
    validation.jsonl     one line a validation
    training.html        both as a page, rewritten at each validation
    tensorboard/         the same figures, where logging.trackers has it
    samples/             base beside tuned, same seeds
    step-000200/         a checkpoint
    final/               the LoRA as diffusers loads it and as ComfyUI does, or the trained UNet
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from draftcli.changes import Change, change_in_words, differences, refused_changes
from draftcli.config import Config, check_config, dump_config, load_config
from draftcli.contents import BASE_LORAS, base_loras_contents, contents_of, read_contents, what_changed
from draftcli.disk import beside, disk_errors, lock_file, write_aside
from draftcli.errors import InputError
from draftcli.lines import text_lines
from draftcli.run_lines import StopRecord, ValidationLine

LOCK = ".lock"  # its text says who holds it, which is why this is not filelock's: that one empties the file
STEP_FOLDER = r"step-([0-9]{1,18})"  # a checkpoint's name
FINAL_STEP = "step.txt"  # in final/: the step that it is of, as a run can be taken further and killed again


@dataclass(frozen=True)
class Opening:
    """What a run's folder is to be opened with, as `Run.check` found it.

    Attributes:
        settings: the text of config.yaml.
        contents: the text of contents.json.
        changes: in words, what differs from the session before.
        is_other: it is another run than the one that was begun here, of which there is nothing to keep.
    """

    settings: str
    contents: str
    changes: tuple[str, ...]
    is_other: bool


class Run:
    """The folder of one training run.

    Args:
        folder: need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.contents = folder / "contents.json"
        self.metrics = folder / "metrics.jsonl"
        self.validation = folder / "validation.jsonl"
        self.page = folder / "training.html"
        self.samples = folder / "samples"
        self.final = folder / "final"
        self.base = self.samples / "base.safetensors"

    @property
    def kohya_file(self) -> Path:
        """The LoRA by kohya's names: what it is called is what people see in their program's list."""
        name = self.folder.resolve().name.encode()[:200].decode(errors="ignore")  # names end at 255 bytes
        return self.final / f"{name}-kohya.safetensors"

    def step_folder(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self.folder / f"step-{step:06d}"

    def sheet(self, step: int) -> Path:
        """Where the sheet of the validation after `step` is."""
        return self.samples / f"step-{step:06d}-sheet.png"

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, the newest first. Checkpoints in the making, and on their way out, have another name."""
        named = ((re.fullmatch(STEP_FOLDER, path.name), path) for path in self.folder.glob("step-*"))
        return [path for _, path in sorted(((int(name[1]), path) for name, path in named if name), reverse=True)]

    def open(self, cfg: Config) -> list[str]:
        """Make the folder's files, or see that it is this very run. Call it inside `locked`.

        Returns and raises what `check` and `begin` do.
        """
        return self.begin(self.check(cfg))

    def check(self, cfg: Config) -> Opening:
        """See that the folder is new, or this very run's. Nothing is written.

        Raises:
            InputError: the run was started with other settings, or with other files under the same names.
        """
        settings = yaml.safe_load(dump_config(cfg))
        kept, found = read_contents(self.contents), contents_of(settings)
        other = {key: what_changed(kept[key], files) for key, files in found.items() if key in kept}
        changed: list[Change] = []
        refused: list[str] = []
        if self.config.is_file():
            changed = differences(_resolved(_load(self.config)), settings)
            refused = refused_changes(changed, other)
            if refused and self.checkpoints():  # before the first checkpoint there is nothing to keep
                raise InputError(
                    f"{self.folder} was started with other settings ({'; '.join(refused[:3])}); "
                    "keep them to resume, or take another --output"
                )
        words = [change_in_words(change) + (", the same files" if change[0] in other else "") for change in changed]
        return Opening(dump_config(cfg), json.dumps({**kept, **found}, indent=1), tuple(words), bool(refused))

    def check_base_loras(self, cfg: Config) -> None:
        """See that the LoRAs under the base are still those that the run was trained on.

        Raises:
            InputError: one of them is another file by now.
        """
        kept = read_contents(self.contents).get(BASE_LORAS, {})
        if cfg.model.loras and (what := what_changed(kept, base_loras_contents(cfg.model.loras))):
            raise InputError(
                f"{self.folder} was trained with model.loras of which {what} now; put it back, or say with "
                "--set model.loras=[...] what to take instead"
            )

    def begin(self, opening: Opening) -> list[str]:
        """Make the folder's files, and remove what a killed process left half done.

        Returns:
            the settings that differ from those of the session before, and may: a path may where its files are the same.
            Nothing where no session has taken a step yet.

        Raises:
            DraftpError: it cannot be written.
        """
        has_begun = bool(self.checkpoints() or self.steps())
        with disk_errors(self.folder):
            if opening.is_other:  # what was logged is of other settings
                self.metrics.unlink(missing_ok=True)
                self.validation.unlink(missing_ok=True)
            for left in [*self.folder.glob(".*.partial"), *self.folder.glob(".*.removed")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            write_aside(self.config, lambda path: path.write_text(opening.settings, encoding="utf-8"))
            if not self.contents.is_file() or self.contents.read_text(encoding="utf-8") != opening.contents:
                write_aside(self.contents, lambda path: path.write_text(opening.contents, encoding="utf-8"))
            self.samples.mkdir(exist_ok=True)
        return list(opening.changes) if has_begun else []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process can be in here. The lock goes with the process, however it ends.

        Where no run was begun inside, the folder and what was made for it are gone afterwards.

        Raises:
            InputError: another process is writing this run, or the folder is something else.
            DraftpError: the folder cannot be written.
        """
        self.check_place()
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a+b", buffering=0)
        with file:
            if not lock_file(file.fileno()) or not self._has_lock(file.fileno()):
                file.seek(0)
                who = file.read().decode(errors="replace").strip() or "unknown"
                raise InputError(
                    f"{self.folder} is being written by another process ({who}); wait for it, or take another --output"
                )
            with disk_errors(self.folder):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            try:
                yield
            finally:
                if not self.config.is_file():
                    self._remove_empty(made)

    def check_place(self) -> None:
        """Raise InputError where the folder is there and is something else than a run."""
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {self.folder.name}
        begun = {LOCK, beside(self.config).name}  # by a process that was killed before it had written its settings
        if self.folder.exists() and self.config.name not in names and names - begun:
            raise InputError(f"{self.folder} exists and is not a run (it has no config.yaml); choose another --output")

    def _has_lock(self, handle: int) -> bool:
        """Whether an open file is the lock that is in the folder now: one that failed to start has removed its own."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(handle), (self.folder / LOCK).stat())
        return False

    def _remove_empty(self, folders: Sequence[Path]) -> None:
        """Remove the lock and those of the folders, the innermost first, that have nothing in them."""
        with suppress(OSError):
            (self.folder / LOCK).unlink()
            for folder in folders:
                folder.rmdir()

    def weights(self) -> Path | None:
        """The folder of the weights that stand for the run: final/, or its newest checkpoint. None: there are none."""
        return next((folder for folder in (self.final, *self.checkpoints()) if _holds_weights(folder)), None)

    def finished(self, step: int) -> bool:
        """Whether `step` was the last, and everything is written: final/ says of which step it is."""
        return self.has_final(step) and self.step_folder(step).is_dir()

    def settings(self) -> Config:
        """The settings that it was started with. Raises InputError where they are damaged."""
        return load_config(self.config)

    def validations(self) -> list[ValidationLine]:
        """The lines of validation.jsonl."""
        return _whole_lines(self.validation)  # type: ignore[return-value]

    def steps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return _whole_lines(self.metrics)

    def best(self) -> int | None:
        """The step with the highest score in validation, the first of equals; the untrained network does not count."""
        scored = [(line["step"], line.get("score")) for line in self.validations() if line["step"] > 0]
        known = {step: score for step, score in scored if isinstance(score, int | float)}
        return max(known, key=lambda step: known[step]) if known else None

    def stopped(self) -> StopRecord | None:
        """Why the monitor ended the run at its last validation; None: it did not."""
        return next(reversed(self.validations()), {}).get("stopped")  # type: ignore[return-value]

    def has_final(self, step: int) -> bool:
        """Whether final/ is written, and of `step`."""
        marker = self.final / FINAL_STEP
        return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").strip() == str(step)

    def forget_after(self, step: int) -> None:
        """Drop log lines of steps after `step`, which a resumed run will take again: no step is counted twice."""
        for path in (self.metrics, self.validation):
            if path.is_file():
                lines = [line for line in _lines(path) if _step_of(line) <= step]
                text = "".join(line + "\n" for line in lines)
                with disk_errors(path):
                    write_aside(path, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))


def find_run(name: str | None) -> tuple[Run, Path]:
    """A run, and the folder of the weights that stand for it.

    Args:
        name: a run's folder, its name under runs/, or one checkpoint of it (runs/toy/step-000020). None: the newest
            run under runs/ that has weights.

    Returns:
        the run; and its final/, where it is not finished its newest checkpoint, or the checkpoint that was named.

    Raises:
        InputError: there is none, it is not a run, or nothing has been trained in it yet.
    """
    if name is None:
        configs = sorted(Path("runs").glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
        runs = [Run(config.parent) for config in configs]
        if not runs:
            raise InputError(
                "there is no run under runs/; name a run's folder, or train one: draftp train --preset toy"
            )
        run = next((run for run in runs if run.weights() is not None), runs[0])
    else:
        folder = next((path for path in (Path(name), Path("runs") / name) if path.is_dir()), Path(name))
        run = Run(folder)
        if not run.config.is_file() and (folder.parent / "config.yaml").is_file() and _holds_weights(folder):
            return Run(folder.parent), folder
        if not run.config.is_file():
            raise InputError(f"{no_run(name)}. For other models give --model")
    if not run.config.read_bytes().strip():  # which would be read as the defaults
        raise InputError(f"{run.config} is empty, as after a loss of power; for its weights give --model and --lora")
    weights = run.weights()
    if weights is None:
        raise InputError(
            f"{run.folder} has no weights yet, neither final/ nor a checkpoint; finish it with draftp train"
        )
    return run, weights


def no_run(name: str) -> str:
    """For messages: that `name` is not a run, and which ones are there."""
    there = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    return f"{name} is not a run (it has no config.yaml); runs here: {', '.join(there) or 'none'}"


def unfinished_note(run: Run, weights: Path, name: str | None) -> str | None:
    """What `find_run(name)` took, where that is not what people expect: a checkpoint that they did not name."""
    if weights == run.final or (name is not None and Path(name).name == weights.name):
        return None
    return f"{run.folder} is not finished; taking {weights}"


def _holds_weights(folder: Path) -> bool:
    return (folder / "pytorch_lora_weights.safetensors").is_file() or (folder / "unet").is_dir()


def unet_files(folder: Path) -> list[Path]:
    """The weights of a UNet that was trained in full, in their order.

    Args:
        folder: the `unet` folder in a run's final/ or in a checkpoint.

    Raises:
        InputError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: there is no UNet in it (no .safetensors); name another checkpoint of the run")
    return files


def split_scale(text: str, is_there: Callable[[str], bool], given: str) -> tuple[str, float]:
    """The name and the scale of `NAME` (scale 1) or `NAME=SCALE`. A name that exists as it stands may contain a `=`.

    Args:
        text: to be split.
        is_there: whether something has this name.
        given: how messages call it.

    Raises:
        InputError: the scale is no finite number.
    """
    if "=" not in text or is_there(text):
        return text, 1.0
    name, _, number = text.rpartition("=")
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise InputError(f"{given}: expected PATH or PATH=SCALE with a number, such as style.safetensors=0.7")
    return name, scale


def _lines(path: Path) -> list[str]:
    return text_lines(path, errors="replace") if path.is_file() else []


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(path) if math.isfinite(_step_of(line))]


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        step = None  # a line cut short by a kill
    return step if type(step) is int else math.inf


def _load(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InputError(f"{path} is damaged: not the settings of a run; choose another --output")
    return data


def _resolved(data: dict[str, Any]) -> dict[str, Any]:
    """Settings that an older version did not know are at their defaults."""
    try:
        return yaml.safe_load(dump_config(check_config(data)))
    except InputError:
        return data
