"""What a run writes down: metrics.jsonl, validation.jsonl, and the same figures for its trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftcli.metrics.statistics import paired
from draftcli.runs import Run, ValidationLine, disk_errors, write_aside
from draftcli.training.monitor import Monitor, validation_score
from draftcli.training.page import write_train_page
from draftcli.training.result import sheet_caption
from draftcli.training.trackers import Trackers


class RunLog:
    """Appends to a run's files, and passes the figures on.

    Args:
        run: whose files.
        trackers: of this session, entered.
    """

    def __init__(self, run: Run, trackers: Trackers) -> None:
        self.run, self.trackers = run, trackers

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One finished optimizer step; `metrics` has at least step."""
        _append(self.run.metrics, metrics)
        self.trackers.log({f"train/{k}": v for k, v in metrics.items() if k != "step"}, metrics["step"])

    def validation(self, result: ValidationLine, sheet: Path) -> None:
        """One validation, and the file with its contact sheet."""
        _append(self.run.validation, result)
        groups = {**result["rewards"], "diversity": result["diversity"], **result.get("signs", {})}
        figures = {f"validation/{name}/{k}": v for name, group in groups.items() for k, v in group.items()}
        figures["monitor/alarm"] = float(result.get("alarm") is not None)
        self.trackers.log(figures, result["step"])
        self.trackers.log_sheet(sheet, result["step"], sheet_caption(result))
        write_train_page(self.run)

    def stopped(self, why: str, step: int) -> None:
        """The monitor ended the run after `step`: its line of metrics.jsonl says why, once, and so do the trackers."""
        lines = self.run.steps()
        if lines and "stopped" not in lines[-1]:
            lines[-1]["stopped"] = why
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with disk_errors(self.run.metrics):
                write_aside(self.run.metrics, lambda aside: aside.write_text(text, encoding="utf-8"))
            self.trackers.log_text("monitor/stopped", why, step)


def complete_validation(result: ValidationLine, run: Run, monitor: Monitor) -> None:
    """Add what a line says beside the figures of its pictures: its score, what the steps before it say, the verdict."""
    step = result["step"]
    result["score"] = validation_score(result, monitor.weights, monitor.held_out)
    recent = since_last_validation(run, step)
    result["training_reward"] = None if monitor.normalised else recent["training_reward"]
    if "batch_spread" in recent:
        result["signs"] = {**result.get("signs", {}), "batch_spread": recent["batch_spread"]}
    verdict = monitor.judge([*run.validations(), result])
    result["alarm"] = verdict.alarm
    if verdict.alarm is not None and verdict.stops:
        # In a run of an older version, or whose monitor was told to stop midway, it may not be there.
        is_there = verdict.final == step or run.step_folder(verdict.final).is_dir()
        result["stopped"] = {"why": verdict.alarm, "final": verdict.final if is_there else step}


def since_last_validation(run: Run, step: int) -> dict[str, Any]:
    """What the training steps between the validation before and `step` say of their own images.

    Returns:
        `training_reward`, their mean reward, None where it is not known; and, where it is, `batch_spread`: figures of
        the deviation of the trained reward within a batch, of which base is the mean over the steps before the first
        validation.
    """
    validated = sorted(line["step"] for line in run.validations() if line["step"] < step)
    since, first = max(validated, default=0), next((at for at in validated if at > 0), step)
    # A step that was skipped changed nothing, and images on which a reward was silent count 0: neither compares.
    whole = [line for line in run.steps() if line["step"] <= step and "skipped" not in line]
    whole = [line for line in whole if not any(key.startswith("silent/") for key in line)]

    def of(key: str, after: int, until: int) -> list[float]:
        values = [line.get(key) for line in whole if after < line["step"] <= until]
        return [value for value in values if isinstance(value, float)]

    rewards, spreads, at_first = of("reward", since, step), of("reward_std", since, step), of("reward_std", 0, first)
    found: dict[str, Any] = {"training_reward": sum(rewards) / len(rewards) if rewards else None}
    if spreads and at_first:
        base = sum(at_first) / len(at_first)
        found["batch_spread"] = paired([base] * len(spreads), spreads)
    return found


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_without_nan(line), allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
