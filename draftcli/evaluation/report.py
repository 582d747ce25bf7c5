"""report.html: the page as one file.

Pictures, styles and script are inside, nothing is loaded from anywhere, and its content security policy forbids it.
Names and prompts are text, whatever is in them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import numpy as np
from PIL import Image

from draftcli import __version__
from draftcli.evaluation.compare import ColumnComparison
from draftcli.evaluation.figures import Figure, Figures, Metric
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Item
from draftcli.evaluation.plot import Point, forest, scatter
from draftcli.pictures import open_picture

PAGE = Path(__file__).parent / "page"
EMBEDDED = 600  # pictures in the page, over all columns
EMBEDDED_EDGE = 512  # longest side of an embedded picture, in pixels
SMALL_PICTURE = 128  # longest side, in pixels, below which pictures are shown with hard pixels and kept without loss
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


@dataclass(frozen=True)
class About:
    """What stands around a comparison.

    Attributes:
        title: of the page.
        settings: what a reader needs to repeat it, among them "features" and "k" of the neighbourhoods.
    """

    title: str
    settings: Mapping[str, str | float]


def render_page(
    comparison: ColumnComparison, about: About, items: Sequence[Item], measured: Mapping[str, Measured]
) -> str:
    """report.html as text."""
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    chosen = choose_items(comparison, items, measured)
    prompts = len({item.prompt for item in items})
    return environment.get_template("page.html").render(
        comparison=comparison,
        about=about,
        version=__version__,
        css=(PAGE / "page.css").read_text(encoding="utf-8"),
        js=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        plots=_plots(comparison),
        groups=_groups(comparison, about),
        settings=[(name.replace("_", " "), value) for name, value in about.settings.items()],
        prompts=prompts,
        each=len(items) // prompts,
        shown=len(chosen),
        total=len(items),
        data=finite(_page_data(comparison, items, measured, chosen)),
    )


def choose_items(
    comparison: ColumnComparison, items: Sequence[Item], measured: Mapping[str, Measured], room: int = EMBEDDED
) -> list[int]:
    """Which items the page shows: a third where the judge fell most against the base, a third where it rose most, and
    a third spread between; all of them where there is room. In the order of `items`.
    """
    count = max(3, room // len(measured))
    if len(items) <= count:
        return list(range(len(items)))
    judge, base = comparison.judge, comparison.base
    others = [m.scores[judge] for name, m in measured.items() if name != base] or [measured[base].scores[judge]]
    change = np.nan_to_num(np.mean(others, axis=0) - measured[base].scores[judge])
    order = np.argsort(change, kind="stable")
    third = count // 3
    between = order[third:-third][np.linspace(0, len(items) - 2 * third - 1, count - 2 * third).round().astype(int)]
    return sorted({*order[:third].tolist(), *order[-third:].tolist(), *between.tolist()})


def finite(value: Any) -> Any:
    """The same JSON value with null for what is not finite: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plots(comparison: ColumnComparison) -> list[dict[str, Any]]:
    """One a reward, the judge's first."""
    plots = []
    for reward in sorted(comparison.rewards, key=lambda reward: reward != comparison.judge):
        points = reward_points(comparison, reward)
        if len(points) > 1:
            svg = scatter(points, "diversity", reward)
            plots.append({"reward": reward, "trained": reward in comparison.trained, "svg": svg})
    return plots


def reward_points(comparison: ColumnComparison, reward: str) -> list[Point]:
    """The columns that have both a reward and a diversity, as points of a plot."""
    points = []
    for name, figures in comparison.figures.items():
        x, y = _with_interval(figures.diversity), _with_interval(figures.reward(reward))
        if x is None or y is None or not math.isfinite(x[0] + y[0]):
            continue
        points.append(
            Point(
                name,
                x,
                y,
                on_front=name in comparison.fronts[reward],
                is_base=name == comparison.base,
                recommended=reward == comparison.judge and name == comparison.recommendation.column,
            )
        )
    return points


def _with_interval(figure: Figure) -> tuple[float, float, float] | None:
    """A value with the interval of its difference to the base, moved to where the value is; the base has none.

    How much prompts differ among themselves is in the tables; between columns it says nothing.
    """
    if figure.value is None:
        return None
    if figure.difference is None or figure.difference_low is None or figure.difference_high is None:
        return figure.value, math.nan, math.nan
    shift = figure.value - figure.difference
    return figure.value, shift + figure.difference_low, shift + figure.difference_high


def _groups(comparison: ColumnComparison, about: About) -> list[dict[str, Any]]:
    """The tables: one a group of metrics, a row a column."""
    groups = []
    for key, (title, text) in GROUPS.items():
        metrics = [metric for metric in comparison.metrics if metric.group == key]
        heads = [_head(metric, comparison) for metric in metrics]
        reaches = [_reach(comparison.figures.values(), metric) for metric in metrics]
        rows = [
            {"name": name, "cells": [_cell(found[m], m, reach) for m, reach in zip(metrics, reaches, strict=True)]}
            for name, found in comparison.figures.items()
        ]
        note = text.format(features=about.settings["features"], k=about.settings["k"])
        groups.append({"title": title, "about": note, "metrics": heads, "rows": rows})
    return groups


def _head(metric: Metric, comparison: ColumnComparison) -> dict[str, Any]:
    """The head of a table's column."""
    trained = tag = None
    if metric.group == "reward":
        trained = metric.label in comparison.trained
        tag = "trained on" if trained else "held out"
    return {**asdict(metric), "tag": tag, "trained": trained}


def _reach(figures: Iterable[Figures], metric: Metric) -> float:
    """How far the bars of a metric's differences go, so that they compare over the rows."""
    ends = [abs(end or 0.0) for f in figures for end in (f[metric].difference_low, f[metric].difference_high)]
    return max([end for end in ends if math.isfinite(end)], default=0.0)


def _cell(figure: Figure, metric: Metric, reach: float) -> dict[str, Any]:
    """The texts of a table's cell."""
    if figure.value is None:
        return {"why": figure.why}
    digits = metric.digits
    cell: dict[str, Any] = {"why": None, "value": number(figure.value, digits)}
    cell["interval"] = cell["difference"] = cell["wins"] = None
    cell["kept"] = None if figure.diversity_kept is None else figure.diversity_kept.words
    if is_known(figure.low) and is_known(figure.high):
        cell["interval"] = f"{number(figure.low, digits)} to {number(figure.high, digits)}"
    value, low, high = figure.difference, figure.difference_low, figure.difference_high
    if is_known(value) and is_known(low) and is_known(high):
        cell["difference"] = f"{'+' if value > 0 else ''}{number(value, digits)}"
        better = figure.direction * metric.better
        cell["kind"] = "up" if better > 0 else "down" if better < 0 else ""
        cell["forest"] = forest(value, low, high, reach, cell["kind"])
        if metric.group == "reward" and figure.win_rate is not None:
            cell["wins"] = f"{100 * figure.win_rate:.0f} %"
    return cell


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether a figure is a number: neither missing nor NaN."""
    return value is not None and not math.isnan(value)


def number(value: float, digits: int) -> str:
    """With `digits` after the point, more where the value is so small that two figures of it would not show."""
    small = 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(8, max(digits, small))}f}".replace("-", "−")


def cell(figure: Figure, digits: int) -> str:
    """A figure in few letters of ASCII, for any terminal; a star where it differs from the base beyond its interval."""
    if figure.value is None:
        return "-"
    return number(figure.value, digits).replace("−", "-") + ("*" if figure.direction else " ")


def _page_data(
    comparison: ColumnComparison,
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    chosen: Sequence[int],
) -> dict[str, Any]:
    """What the script of the page needs."""
    columns = comparison.columns
    names = [column.name for column in columns]
    small = max(open_picture(columns[0].files[0]).size) < SMALL_PICTURE
    return {
        "columns": names,
        "rewards": list(comparison.rewards),
        "judge": comparison.judge,
        "left": comparison.base,
        "right": comparison.recommendation.column or names[-1],
        "small": small,
        "items": [
            {
                "number": i,
                "prompt": items[i].prompt,
                "seed": items[i].seed,
                "pictures": [embedded(column.files[i]) for column in columns],
                "scores": {
                    reward: [float(measured[name].scores[reward][i]) for name in names] for reward in comparison.rewards
                },
            }
            for i in chosen
        ],
    }


def embedded(path: Path) -> str:
    """A picture as a data URI: small ones without loss, large ones as WebP at most `EMBEDDED_EDGE` pixels long."""
    data = io.BytesIO()
    picture = open_picture(path)
    picture.thumbnail((EMBEDDED_EDGE, EMBEDDED_EDGE), Image.Resampling.LANCZOS)
    if max(picture.size) < SMALL_PICTURE:
        picture.save(data, "WEBP", lossless=True)
    else:
        picture.save(data, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
