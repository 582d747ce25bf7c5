"""The files that an evaluation leaves: metrics.json, metrics.csv, pictures.csv, report.html and hero.png."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from draftcli import __version__
from draftcli.evaluation.compare import ColumnComparison
from draftcli.evaluation.figures import Figure
from draftcli.evaluation.hero import write_hero
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Item
from draftcli.evaluation.report import About, render_page
from draftcli.evaluation.verdict import find_verdict
from draftcli.pages.page import finite
from draftcli.runs import disk_errors, write_aside

FORMAT, VERSION = "draftp-eval", 1
HERO = "hero.png"


def write_outputs(
    folder: Path, comparison: ColumnComparison, about: About, items: Sequence[Item], measured: Mapping[str, Measured]
) -> dict[str, Path]:
    """Write everything to `folder`, each file aside and renamed.

    Args:
        folder: made where it is missing.
        comparison: its columns' pictures are embedded in the page.
        about: title and settings.
        items: prompts and seeds.
        measured: by the columns' names.

    Returns:
        The files by what they are.

    Raises:
        DraftpError: the disk refuses.
    """
    prompts = len({item.prompt for item in items})
    verdict = find_verdict(comparison, prompts, len(items) // prompts)
    table = _table(comparison)
    everything = finite(_everything(folder, comparison, about, items, measured))
    texts = {
        "metrics": ("metrics.json", json.dumps(everything, indent=1, ensure_ascii=False) + "\n"),
        "table": ("metrics.csv", table),
        "pictures": ("pictures.csv", _pictures(comparison, items, measured)),
        "report": ("report.html", render_page(comparison, about, items, measured, verdict, table)),
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.values():
            write_aside(folder / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
        write_hero(folder / HERO, comparison, about.title, verdict, items, measured)
    return {**{what: folder / name for what, (name, _) in texts.items()}, "hero": folder / HERO}


def _everything(
    folder: Path, comparison: ColumnComparison, about: About, items: Sequence[Item], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """metrics.json: figures and conclusions, and every picture's scores for those who want to compute more."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "draftp": __version__,
        "title": about.title,
        "settings": dict(about.settings),
        **comparison.to_json(),
        "items": [{"prompt": item.prompt, "seed": item.seed} for item in items],
        "pictures": {
            column.name: {
                "files": [Path(os.path.relpath(file, folder)).as_posix() for file in column.files],
                "scores": {name: scores.tolist() for name, scores in measured[column.name].scores.items()},
            }
            for column in comparison.columns
        },
    }


def _table(comparison: ColumnComparison) -> str:
    """One line a column and metric."""
    names = [field.name for field in fields(Figure)]
    rows = [
        [column, key, *(getattr(figure, name) for name in names)]
        for column, figures in comparison.figures.items()
        for key, figure in figures.by_key.items()
    ]
    return _csv([["column", "metric", *names], *rows])


def _pictures(comparison: ColumnComparison, items: Sequence[Item], measured: Mapping[str, Measured]) -> str:
    """One line a picture: its scores and signs."""
    first = measured[comparison.base]
    head = ["column", "prompt", "seed", "file", *first.scores, *first.signs]
    rows = []
    for column in comparison.columns:
        values = {**measured[column.name].scores, **measured[column.name].signs}
        for i, item in enumerate(items):
            rows.append([column.name, item.prompt, item.seed, column.files[i], *(float(v[i]) for v in values.values())])
    return _csv([head, *rows])


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    """CSV, in which what is missing or NaN is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["" if _is_nan(cell) else cell for cell in row] for row in rows])
    return text.getvalue()


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and math.isnan(cell)  # None is written as an empty cell by itself
