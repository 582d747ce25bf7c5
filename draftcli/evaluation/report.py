"""The files that people open: metrics.json, metrics.csv, pictures.csv and report.html.

The page is one file: pictures, styles and script are inside, nothing is loaded from anywhere, and its content security
policy forbids it. Names and prompts are text, whatever they hold.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Gallery, Item
from draftcli.evaluation.plot import Point, forest, scatter
from draftcli.runs import disk_errors, write_aside

PAGE = Path(__file__).parent / "page"
EMBEDDED = 600  # pictures in the page, over all columns
EDGE = 512  # longest side of an embedded picture, in pixels
SMALL = 128  # below it pictures are shown with hard pixels and kept without loss
GROUPS = {
    "reward": ("Rewards", "Higher is better. A reward that was trained on is no judge of its own training."),
    "diversity": ("Diversity", "Within the pictures of one prompt, on {features}; mean over prompts."),
    "distance": (
        "Distance from the base",
        (
            "All pictures against all of the base's, on {features}, k = {k}. Intervals hold the other set fixed; "
            "distances of whole sets have none. They depend on the number of pictures: compare within one report only."
        ),
    ),
    "sign": ("Signs of drift", "Of pixels alone. None is good or bad by itself; a large change is a question to ask."),
    "cost": ("Cost", "What a picture takes."),
}


def write_outputs(
    folder: Path,
    result: Mapping[str, Any],
    columns: Sequence[Gallery],
    items: Sequence[Item],
    measured: Mapping[str, Measured],
) -> dict[str, Path]:
    """Write everything to `folder`, each file aside and renamed.

    Args:
        folder: made where it is missing.
        result: of `compare`, with "title", "draftp" and "settings" beside.
        columns: what was compared.
        items: prompts and seeds.
        measured: by the columns' names.

    Returns:
        The files by what they are.

    Raises:
        DraftpError: the disk refuses.
    """
    texts = {
        "metrics": ("metrics.json", json.dumps(_finite(result), indent=1, ensure_ascii=False) + "\n"),
        "table": ("metrics.csv", _table(result)),
        "pictures": ("pictures.csv", _pictures(columns, items, measured)),
        "report": ("report.html", render(result, columns, items, measured)),
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.values():
            write_aside(folder / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    return {what: folder / name for what, (name, _) in texts.items()}


def render(
    result: Mapping[str, Any], columns: Sequence[Gallery], items: Sequence[Item], measured: Mapping[str, Measured]
) -> str:
    """report.html as text."""
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    chosen = choose_items(result, items, measured)
    prompts = len({item.prompt for item in items})
    return environment.get_template("page.html").render(
        result=result,
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
        js=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        plots=_plots(result),
        groups=_groups(result),
        settings=[(name.replace("_", " "), value) for name, value in result["settings"].items()],
        prompts=prompts,
        each=len(items) // prompts,
        shown=len(chosen),
        total=len(items),
        data=_finite(_page_data(result, columns, items, measured, chosen)),
    )


def choose_items(
    result: Mapping[str, Any], items: Sequence[Item], measured: Mapping[str, Measured], room: int = EMBEDDED
) -> list[int]:
    """Which items the page shows: a third where the judge fell most against the base, a third where it rose most, and
    a third spread between; all of them where there is room. In the order of `items`.
    """
    count = max(3, room // len(measured))
    if len(items) <= count:
        return list(range(len(items)))
    judge, base = result["judge"], result["base"]
    others = [m.scores[judge] for name, m in measured.items() if name != base] or [measured[base].scores[judge]]
    change = np.nan_to_num(np.mean(others, axis=0) - measured[base].scores[judge])
    order = np.argsort(change, kind="stable")
    third = count // 3
    between = order[third:-third][np.linspace(0, len(items) - 2 * third - 1, count - 2 * third).round().astype(int)]
    return sorted({*order[:third].tolist(), *order[-third:].tolist(), *between.tolist()})


def _table(result: Mapping[str, Any]) -> str:
    """One line a column and metric."""
    keys = [
        "value", "median", "low", "high", "n", "difference", "difference_low", "difference_high",
        "win_rate", "win_low", "win_high", "why",
    ]  # fmt: skip
    rows = [
        [column, metric, *(figure.get(key, "") for key in keys)]
        for column, figures in result["figures"].items()
        for metric, figure in figures.items()
    ]
    return _csv([["column", "metric", *keys], *rows])


def _pictures(columns: Sequence[Gallery], items: Sequence[Item], measured: Mapping[str, Measured]) -> str:
    """One line a picture: its scores and signs."""
    first = measured[columns[0].name]
    head = ["column", "prompt", "seed", "file", *first.scores, *first.signs]
    rows = []
    for column in columns:
        values = {**measured[column.name].scores, **measured[column.name].signs}
        for i, item in enumerate(items):
            rows.append([column.name, item.prompt, item.seed, column.files[i], *(float(v[i]) for v in values.values())])
    return _csv([head, *rows])


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["" if _is_nan(cell) else cell for cell in row] for row in rows])
    return text.getvalue()


def _is_nan(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plots(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One a reward, the judge's first."""
    rewards = [metric["label"] for metric in result["metrics"] if metric["group"] == "reward"]
    rewards.sort(key=lambda reward: reward != result["judge"])
    plots = []
    for reward in rewards:
        points = reward_points(result, reward)
        if len(points) > 1:
            svg = scatter(points, "diversity", reward)
            plots.append({"reward": reward, "trained": reward in result["trained"], "svg": svg})
    return plots


def reward_points(result: Mapping[str, Any], reward: str) -> list[Point]:
    """The columns that have both a reward and a diversity, as points of a plot."""
    points = []
    for name, figures in result["figures"].items():
        x, y = figures["cosine_diversity"], figures[f"reward/{reward}"]
        if x["value"] is None or y["value"] is None:
            continue
        points.append(
            Point(
                name,
                _with_interval(x),
                _with_interval(y),
                on_front=name in result["fronts"][reward],
                is_base=name == result["base"],
                recommended=reward == result["judge"] and name == result["recommendation"]["column"],
            )
        )
    return points


def _with_interval(figure: Mapping[str, Any]) -> tuple[float, float, float]:
    """A value with the interval of its difference to the base, moved to where the value is; the base has none.

    How much prompts differ among themselves is in the tables; between columns it says nothing.
    """
    value, difference = figure["value"], figure.get("difference")
    if difference is None:
        return value, float("nan"), float("nan")
    low, high = figure["difference_low"], figure["difference_high"]
    return value, value + low - difference, value + high - difference


def _groups(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tables: one a group of metrics, a row a column."""
    figures, groups = result["figures"], []
    for key, (title, about) in GROUPS.items():
        metrics = []
        for metric in (m for m in result["metrics"] if m["group"] == key):
            tag = trained = None
            if key == "reward":
                trained = metric["label"] in result["trained"]
                tag = "trained on" if trained else "held out"
            metrics.append({**metric, "tag": tag, "trained": trained, "reach": _reach(figures, metric["key"])})
        rows = [
            {"name": name, "cells": [_cell(found[metric["key"]], metric) for metric in metrics]}
            for name, found in figures.items()
        ]
        said = about.format(features=result["settings"]["features"], k=result["settings"]["k"])
        groups.append({"title": title, "about": said, "metrics": metrics, "rows": rows})
    return groups


def _reach(figures: Mapping[str, Mapping[str, Any]], key: str) -> float:
    """How far the bars of a metric's differences go, so that they compare over the rows."""
    ends = [abs(f[key].get(end) or 0.0) for f in figures.values() for end in ("difference_low", "difference_high")]
    return max([end for end in ends if math.isfinite(end)], default=0.0)


def _cell(figure: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    """What a table's cell says."""
    if figure["value"] is None:
        return {"why": figure["why"]}
    digits = metric["digits"]
    cell: dict[str, Any] = {"why": None, "value": number(figure["value"], digits)}
    cell["interval"] = cell["difference"] = cell["wins"] = None
    if not _is_nan(figure.get("low")):
        cell["interval"] = f"{number(figure['low'], digits)} to {number(figure['high'], digits)}"
    if not _is_nan(figure.get("difference")) and not _is_nan(figure["difference_low"]):
        value, low, high = (figure[k] for k in ("difference", "difference_low", "difference_high"))
        sure = int(low > 0) - int(high < 0)
        cell["difference"] = f"{'+' if value > 0 else ''}{number(value, digits)}"
        cell["kind"] = "" if not metric["better"] or not sure else "up" if sure == metric["better"] else "down"
        cell["forest"] = forest(value, low, high, metric["reach"], cell["kind"])
        if metric["group"] == "reward":
            cell["wins"] = f"{100 * figure['win_rate']:.0f} %"
    return cell


def number(value: float, digits: int) -> str:
    """With `digits` after the point, more where the value is so small that two figures of it would not show."""
    small = 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(8, max(digits, small))}f}".replace("-", "−")


def cell(figure: Mapping[str, Any], digits: int) -> str:
    """A figure in few letters, for a terminal: with a star where it differs from the base beyond its interval."""
    if figure["value"] is None:
        return "-"
    sure = figure.get("difference_low") is not None and not figure["difference_low"] <= 0 <= figure["difference_high"]
    return number(figure["value"], digits) + ("*" if sure else " ")


def _page_data(
    result: Mapping[str, Any],
    columns: Sequence[Gallery],
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    chosen: Sequence[int],
) -> dict[str, Any]:
    """What the script of the page needs."""
    rewards = list(measured[columns[0].name].scores)
    names = [column.name for column in columns]
    with Image.open(columns[0].files[0]) as first:
        small = max(first.size) < SMALL
    right = result["recommendation"]["column"] or names[-1]
    return {
        "columns": names,
        "rewards": rewards,
        "judge": result["judge"],
        "left": result["base"],
        "right": right,
        "small": small,
        "items": [
            {
                "number": i,
                "prompt": items[i].prompt,
                "seed": items[i].seed,
                "pictures": [_embedded(column.files[i]) for column in columns],
                "scores": {reward: [float(measured[name].scores[reward][i]) for name in names] for reward in rewards},
            }
            for i in chosen
        ],
    }


def _embedded(path: Path) -> str:
    """A picture as a data URI: small ones without loss, large ones as WebP at most `EDGE` pixels long."""
    data = io.BytesIO()
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    if max(picture.size) < SMALL:
        picture.save(data, "WEBP", lossless=True)
    else:
        picture.save(data, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
