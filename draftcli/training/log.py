"""What a run writes down: metrics.jsonl, validation.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import secrets
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from draftcli.config import LoggingConfig
from draftcli.errors import InputError
from draftcli.runs import Run, disk_errors


class RunLog:
    """Context manager; use `step` and `validation` inside.

    Args:
        run: whose files are appended to.
        cfg: which other places get the figures.
        first: the step that the session starts from.
    """

    def __init__(self, run: Run, cfg: LoggingConfig, first: int) -> None:
        self.run, self.cfg, self.first = run, cfg, first
        self._stack = ExitStack()
        self._tensorboard: Any = None
        self._wandb: Any = None

    def __enter__(self) -> RunLog:
        if self.cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with self._disk_errors():
                self._tensorboard = SummaryWriter(self.run.folder / "tensorboard", purge_step=self.first + 1)
            self._stack.callback(self._close_tensorboard)
        if self.cfg.wandb is not None:
            self._wandb = _open_wandb(self.run, self.cfg.wandb)
            self._stack.callback(self._wandb.finish)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def _close_tensorboard(self) -> None:
        with self._disk_errors():
            self._tensorboard.close()

    def _disk_errors(self) -> AbstractContextManager[None]:
        """TensorBoard's writer is a thread: what goes wrong in it comes up at any later call."""
        return disk_errors(self.run.folder / "tensorboard")

    def step(self, metrics: dict[str, Any]) -> None:
        """One finished optimizer step; `metrics` has at least step."""
        self._append(self.run.metrics, metrics)
        self._scalars({f"train/{k}": v for k, v in metrics.items() if k != "step"}, metrics["step"])

    def validation(self, result: dict[str, Any], sheet: Path) -> None:
        """One validation: `rewards` maps a name to figures by name; `sheet` is the picture of it."""
        self._append(self.run.validation, result)
        groups = {**result["rewards"], "diversity": result["diversity"]}
        step = result["step"]
        self._scalars({f"validation/{name}/{k}": v for name, f in groups.items() for k, v in f.items()}, step)
        if self._tensorboard is not None:
            import numpy as np
            from PIL import Image

            with self._disk_errors(), Image.open(sheet) as picture:
                self._tensorboard.add_image("validation/pictures", np.asarray(picture), step, dataformats="HWC")
                self._tensorboard.flush()
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({"validation/pictures": wandb.Image(str(sheet))}, step=step)

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(line), allow_nan=False) + "\n")

    def _scalars(self, values: dict[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            with self._disk_errors():
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)


def _open_wandb(run: Run, project: str) -> Any:
    """A run at Weights & Biases that goes on when ours is resumed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"logging.wandb {project!r} needs one more package: pip install 'draftp[wandb]'; or set it to null"
        ) from None
    name = run.folder / "wandb-id.txt"
    with disk_errors(name):
        if not name.is_file():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
    settings = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    try:
        return wandb.init(
            project=project,
            id=name.read_text(encoding="utf-8").strip(),
            name=run.folder.name,
            dir=str(run.folder),
            config=settings,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"logging.wandb {project!r}: {reason}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
