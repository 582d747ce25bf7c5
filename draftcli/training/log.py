"""What a run writes down: metrics.jsonl, validation.jsonl, and the same figures for its trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftcli.runs import Run, ValidationLine, disk_errors
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
        groups = {**result["rewards"], "diversity": result["diversity"]}
        figures = {f"validation/{name}/{k}": v for name, group in groups.items() for k, v in group.items()}
        self.trackers.log(figures, result["step"])
        self.trackers.log_sheet(sheet, result["step"], sheet_caption(result))
        write_train_page(self.run)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_without_nan(line), allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
