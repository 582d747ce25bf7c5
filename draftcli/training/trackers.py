"""Where figures go beside the run's own files: TensorBoard, Weights & Biases and whatever accelerate has trackers for.

With TensorBoard, Weights & Biases, Trackio and DVCLive a run that is resumed continues its record; with other trackers
each session of a run is a record of its own.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import yaml
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType, clear_environment

from draftcli.config import Config, LoggingConfig, is_hub_id
from draftcli.errors import DraftpError, InputError, brief, first_line, warn
from draftcli.pictures import open_picture
from draftcli.runs import Run, disk_errors

TAKE_TEXT = {"tensorboard", "wandb"}
LISTS_OF_PICTURES = {"swanlab"}  # those whose `log_images` wants lists


def check_trackers(cfg: LoggingConfig) -> None:
    """Raise InputError where accelerate does not know a tracker, or its package is not installed."""
    for name in cfg.trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name[:80], LOGGER_TYPE_TO_CLASS, n=1)
            raise InputError(
                f"unknown logging.trackers {brief(name)}{f', did you mean {near[0]}?' if near else ''}; available: "
                f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name in LoggerType and name not in map(str, get_available_trackers()):
            package = "'draftp[wandb]'" if name == "wandb" else name.replace("_", "-")
            raise InputError(
                f"logging.trackers {name} needs one more package: pip install {package}; or leave {name} out"
            )


class Trackers:
    """The trackers of a session, for the main process alone. Context manager; `log` and `log_sheet` inside.

    A tracker that fails later than at its start, such as one whose server is gone, is dropped with a warning: its
    figures are in the run's files, and the training goes on. TensorBoard's are files too, and end it as those do.

    Args:
        run: whose figures they get.
        cfg: which trackers, and the project that they put the run into.
        first: the step that the session starts from; TensorBoard drops what it has of later ones.

    Raises:
        InputError: a tracker does not start: nobody is logged in, no server answers.
        DraftpError: the disk refuses.
    """

    def __init__(self, run: Run, cfg: LoggingConfig, first: int) -> None:
        self.run, self.cfg, self.first = run, cfg, first
        self._trackers: list[GeneralTracker] = []
        self._stack = ExitStack()

    def __enter__(self) -> Trackers:
        if self.cfg.trackers:
            with clear_environment():  # trackers need this state to write their log, and no other process is involved
                PartialState(cpu=True)
        with ExitStack() as stack:
            for name in dict.fromkeys(self.cfg.trackers):
                tracker = self._start(name)
                stack.callback(self._finish, tracker)
                self._trackers.append(tracker)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log those of `values` that are numbers, after `step`."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in [*self._trackers]:
            with self._failures(tracker):
                tracker.log(numbers, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log words with those trackers that are known to take them."""
        for tracker in [tracker for tracker in self._trackers if tracker.name in TAKE_TEXT]:
            with self._failures(tracker):
                tracker.log({name: text}, step=step)

    def log_sheet(self, path: Path, step: int, caption: str) -> None:
        """Log a contact sheet with those trackers that take pictures; `caption` with those that show one."""
        name = "validation/pictures"
        for tracker in [tracker for tracker in self._trackers if hasattr(tracker, "log_images")]:
            with self._failures(tracker):
                sheet = open_picture(path)
                if tracker.name == "tensorboard":
                    tracker.log_images({name: np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
                    tracker.tracker.flush()
                elif tracker.name == "wandb":  # accelerate's `log_images` knows no captions
                    image = import_module("wandb").Image(sheet, caption=caption)
                    tracker.tracker.log({name: [image]}, step=step)
                else:
                    tracker.log_images({name: [sheet] if tracker.name in LISTS_OF_PICTURES else sheet}, step=step)

    def _start(self, name: str) -> GeneralTracker:
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            # Its settings stay out: accelerate would put them into a new folder of events and hparams at each start.
            tracker = kind(name, self.run.folder, purge_step=self.first + 1)
            with disk_errors(self.run.folder / name):
                tracker.start()
            return tracker
        place = [self.run.folder] if kind.requires_logging_directory else []
        try:
            tracker = kind(self.cfg.project, *place, **_options(name, self.run))
            tracker.start()
            tracker.store_init_configuration(yaml.safe_load(self.run.config.read_text(encoding="utf-8")))
        except DraftpError:
            raise
        except Exception as error:  # of a library that need not be installed, so its errors cannot be named
            hint = "; run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
            raise InputError(f"logging.trackers {name} does not start: {first_line(error)}{hint}") from error
        return tracker

    def _finish(self, tracker: GeneralTracker) -> None:
        if tracker in self._trackers:
            with self._failures(tracker):
                tracker.finish()

    @contextmanager
    def _failures(self, tracker: GeneralTracker) -> Iterator[None]:
        if tracker.name == "tensorboard":  # its writer is a thread: what goes wrong in it comes up at any later call
            with disk_errors(self.run.folder / tracker.name):
                yield
            return
        try:
            yield
        except Exception as error:
            self._trackers.remove(tracker)
            warn(f"logging.trackers {tracker.name} gets no more figures: {first_line(error)}")


def _options(name: str, run: Run) -> dict[str, Any]:
    """What a tracker's own `init` is given, so that its record has the run's name and continues when it is resumed."""
    match name:
        case "wandb":
            settings = {"silent": True, "console": "off"}
            place = {"id": _wandb_id(run), "name": run.folder.name, "dir": str(run.folder)}
            return {**place, "resume": "allow", "settings": settings, "tags": run_tags(run.settings())}
        case "trackio":
            return {"name": run.folder.name, "resume": "allow"}
        case "dvclive":
            return {"dir": str(run.folder / "dvclive"), "resume": True}
        case "mlflow":
            return {"run_name": run.folder.name}
        case _:
            return {}


def run_tags(cfg: Config) -> list[str]:
    """What people look for runs by: the model, what was trained of it, and the rewards."""
    model = cfg.model.pretrained if is_hub_id(cfg.model.pretrained) else Path(cfg.model.pretrained).name
    kind = "lora" if cfg.peft.peft_scheme == "lora" else "full fine-tuning"
    return list(dict.fromkeys(tag[:64] for tag in (model, kind, *cfg.rewards)))  # wandb takes 64 characters


def _wandb_id(run: Run) -> str:
    path = run.folder / "wandb-id.txt"
    with disk_errors(path):
        if not path.is_file():
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()
