"""report.html: the page as one file.

The verdict comes first, then the key table, the plots, the images and every other figure. Names and prompts are text,
whatever is in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from draftcli.evaluation.compare import ColumnComparison
from draftcli.evaluation.figures import Figure, Figures, Metric
from draftcli.evaluation.key_table import key_table
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Item
from draftcli.evaluation.plot import Point, clear_front, forest, scatter
from draftcli.evaluation.verdict import EvaluationVerdict
from draftcli.metrics.roles import which_is_better
from draftcli.metrics.statistics import has_interval, or_nan
from draftcli.pages.embed import EMBEDDED_IMAGES, embedded, is_small
from draftcli.pages.numbers import signed, significant
from draftcli.pages.page import render_html
from draftcli.pictures import open_picture

_TEMPLATE = Path(__file__).parent / "page" / "report.html"
SCORE_DIGITS = 5  # significant digits of a score inside the page
GROUPS = {
    "reward": ("Rewards", "{better}. A reward that was trained on cannot judge its own training."),
    "diversity": ("Diversity", "Among the images of one prompt, on {features}; the mean over prompts."),
    "distance": (
        "Distance from the base",
        (
            "All images compared with all of {base}, on {features}, k = {k}. The reference set is held fixed when "
            "resampling; set-level distances have no interval. These figures depend on the number of images: compare "
            "them within one report only."
        ),
    ),
    "sign": ("Signs of drift", "Measured on pixels alone. A large change is a reason to look at the images."),
    "cost": ("Cost", "What an image takes."),
}


@dataclass(frozen=True)
class About:
    """What stands around a comparison.

    Attributes:
        title: of the page.
        settings: what a reader needs to repeat it, among them "features" and "k" of the neighbourhoods; also "command"
            and "versions" where they are known.
        bibtex: entries of the methods that were used.
    """

    title: str
    settings: Mapping[str, str | float]
    bibtex: str = ""


def render_page(
    comparison: ColumnComparison,
    about: About,
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    verdict: EvaluationVerdict,
    table: str,
) -> str:
    """report.html as text; `table` is that of metrics.csv, for its button."""
    chosen = choose_items(comparison, items, measured)
    prompts = len({item.prompt for item in items})
    return render_html(
        _TEMPLATE,
        about.title,
        ["viewer.js", "downloads.js"],
        _page_data(comparison, items, measured, chosen),
        comparison=comparison,
        about=about,
        verdict=verdict,
        key=key_table(comparison),
        csv=table,
        plots=_plots(comparison),
        better=_better(comparison),
        groups=_groups(comparison, about),
        settings=[
            (name.replace("_", " ").replace("pictures", "images"), value)
            for name, value in about.settings.items()
            if name != "command"
        ],
        prompts=prompts,
        each=len(items) // prompts,
        shown=len(chosen),
        total=len(items),
    )


def choose_items(
    comparison: ColumnComparison, items: Sequence[Item], measured: Mapping[str, Measured], room: int = EMBEDDED_IMAGES
) -> list[int]:
    """Which items the page shows: all of them where there is room, else a third where the judge's score fell most
    against the base, a third where it rose most, and a third spread between; of different prompts as far as there are
    enough. In the order of `items`.
    """
    count = max(3, room // len(measured))
    if len(items) <= count:
        return list(range(len(items)))
    judge, base = comparison.judge, comparison.base
    others = [m.scores[judge] for name, m in measured.items() if name != base] or [measured[base].scores[judge]]
    change = np.nan_to_num(np.mean(others, axis=0) - measured[base].scores[judge])
    order = np.argsort(change, kind="stable").tolist()
    third = count // 3
    lowest = _of_different_prompts(order, items, third, ())
    highest = _of_different_prompts(order[::-1], items, third, lowest)
    left = [i for i in order if i not in {*lowest, *highest}]
    spread = np.linspace(0, len(left) - 1, min(len(left), count)).round().astype(int)
    evenly = [*(left[i] for i in spread), *left]
    between = _of_different_prompts(evenly, items, count - 2 * third, (*lowest, *highest))
    return sorted({*lowest, *highest, *between})


def _of_different_prompts(order: Sequence[int], items: Sequence[Item], count: int, taken: Sequence[int]) -> list[int]:
    """The first `count` of `order`, one of each prompt that is not among `taken`; where there are too few, more."""
    seen, chosen = {items[i].prompt for i in taken}, list[int]()
    for i in order:
        if items[i].prompt not in seen and len(chosen) < count:
            chosen.append(i)
            seen.add(items[i].prompt)
    more = (i for i in order if i not in {*chosen, *taken})
    return chosen + [i for i, _ in zip(dict.fromkeys(more), range(count - len(chosen)), strict=False)]


def _plots(comparison: ColumnComparison) -> list[dict[str, Any]]:
    """One for each reward, the judge's first."""
    plots = []
    for reward in sorted(comparison.rewards, key=lambda reward: reward != comparison.judge):
        points = reward_points(comparison, reward)
        if len(points) > 1:
            y = reward_label(comparison, reward)
            plots.append(
                {
                    "reward": reward,
                    "trained": reward in comparison.trained,
                    "role": comparison.role(reward),
                    "svg": scatter(points, f"diversity kept, % of {comparison.base}", y, base_lines=True),
                    "has_front": bool(clear_front(points)),
                }
            )
    return plots


def reward_label(comparison: ColumnComparison, reward: str) -> str:
    """What `reward_points` has on the vertical axis, with its unit."""
    unit = f"% of {comparison.base}" if _is_positive(comparison, reward) else "in the reward's own unit"
    return f"change of {reward}, {unit}{'' if comparison.better(reward) > 0 else ' (lower is better)'}"


def reward_points(comparison: ColumnComparison, reward: str) -> list[Point]:
    """The columns that have both a reward and a diversity, as points of a plot: diversity kept in percent of the base,
    and the reward's change, in percent of the base where that is certainly positive. The base is at (100, 0).
    """
    points = []
    positive = _is_positive(comparison, reward)
    before = comparison.figures[comparison.base].reward(reward).value
    scale = 100 / before if positive and before else 1.0
    for name, figures in comparison.figures.items():
        is_base = name == comparison.base
        kept, change = figures.diversity.diversity_kept, figures.reward(reward)
        if is_base and figures.diversity.value is not None and change.value is not None:
            x, y = (100.0, math.nan, math.nan), (0.0, math.nan, math.nan)
        elif kept is None or not is_known(change.difference):
            continue
        else:
            x = (100 * kept.share, 100 * kept.low, 100 * kept.high)
            low, high = scale * or_nan(change.difference_low), scale * or_nan(change.difference_high)
            y = (scale * change.difference, low, high)
        points.append(
            Point(
                name,
                x,
                y,
                on_front=name in comparison.fronts[reward],
                is_base=is_base,
                recommended=reward == comparison.judge and name == comparison.recommendation.column,
            )
        )
    return points


def _is_positive(comparison: ColumnComparison, reward: str) -> bool:
    """Whether the base's mean is above 0 for certain, so that a share of it means something."""
    figure = comparison.figures[comparison.base].reward(reward)
    return figure.value is not None and figure.value > 0 and or_nan(figure.low) > 0


def _groups(comparison: ColumnComparison, about: About) -> list[dict[str, Any]]:
    """The tables: one a group of metrics, a row a column."""
    groups = []
    for key, (title, text) in GROUPS.items():
        metrics = [metric for metric in comparison.metrics if metric.group == key]
        heads = [_head(metric, comparison) for metric in metrics]
        reaches = [_reach(comparison.figures.values(), metric) for metric in metrics]
        rows = []
        for name, found in comparison.figures.items():
            cells = [_cell(found[m], m, reach) for m, reach in zip(metrics, reaches, strict=True)]
            reasons = {cell["why"] for cell in cells}
            rows.append({"name": name, "cells": cells, "alike": reasons.pop() if len(reasons) == 1 else None})
        note = text.format(
            features=about.settings["features"], k=about.settings["k"], base=comparison.base, better=_better(comparison)
        )
        groups.append({"title": title, "about": note, "metrics": heads, "rows": rows})
    return groups


def _head(metric: Metric, comparison: ColumnComparison) -> dict[str, Any]:
    """The head of a table's column."""
    if metric.group != "reward":
        return {**asdict(metric), "tag": None, "trained": None}
    return {**asdict(metric), "tag": comparison.role(metric.label), "trained": metric.label in comparison.trained}


def _better(comparison: ColumnComparison) -> str:
    return which_is_better(comparison.rewards, comparison.trained)


def _reach(figures: Iterable[Figures], metric: Metric) -> float:
    """How far the bars of a metric's differences go, so that they compare over the rows."""
    ends = [abs(end or 0.0) for f in figures for end in (f[metric].difference_low, f[metric].difference_high)]
    return max([end for end in ends if math.isfinite(end)], default=0.0)


def _cell(figure: Figure, metric: Metric, reach: float) -> dict[str, Any]:
    """The texts of a table's cell."""
    if figure.value is None:
        return {"why": figure.why}
    cell: dict[str, Any] = {"why": None, "value": significant(figure.value) if metric.digits else f"{figure.value:g}"}
    cell["interval"] = cell["difference"] = cell["wins"] = None
    cell["kept"] = None if figure.diversity_kept is None else figure.diversity_kept.words
    if is_known(figure.low) and is_known(figure.high) and has_interval(figure.low, figure.high):
        cell["interval"] = f"{significant(figure.low)} to {significant(figure.high)}"
    value, low, high = figure.difference, figure.difference_low, figure.difference_high
    if is_known(value) and is_known(low) and is_known(high):
        cell["difference"] = signed(value)
        better = figure.direction * metric.better
        cell["kind"] = "up" if better > 0 else "down" if better < 0 else ""
        cell["forest"] = forest(value, low, high, reach, cell["kind"])
        if metric.group == "reward" and (wins := figure.wins(metric.better)) is not None:
            cell["wins"] = f"{100 * wins:.3g} %"
    return cell


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether a figure is a number: neither missing nor NaN."""
    return value is not None and not math.isnan(value)


def cell(figure: Figure) -> str:
    """A figure in few letters of ASCII, for any terminal; a star where it differs from the base beyond its interval."""
    if figure.value is None:
        return "-"
    return significant(figure.value).replace("−", "-").replace("–", "-") + ("*" if figure.direction else " ")


def _page_data(
    comparison: ColumnComparison,
    items: Sequence[Item],
    measured: Mapping[str, Measured],
    chosen: Sequence[int],
) -> dict[str, Any]:
    """What the viewer needs: the scores of all items, and the images of the chosen ones."""
    columns = comparison.columns
    names = [column.name for column in columns]
    size = open_picture(columns[0].files[0]).size
    pictures = {i: [embedded(open_picture(column.files[i])) for column in columns] for i in chosen}
    return {
        "columns": names,
        "rewards": list(comparison.rewards),
        "judge": comparison.judge,
        "better": {reward: comparison.better(reward) for reward in comparison.rewards},
        "left": 0,
        "right": names.index(comparison.recommendation.column or names[-1]),
        "small": size if is_small(size) else None,
        "view": "pair",
        "order": "spread",
        "items": [
            {
                "number": i,
                "prompt": item.prompt,
                "seed": item.seed,
                "pictures": pictures.get(i),
                "scores": {
                    reward: [float(f"{measured[name].scores[reward][i]:.{SCORE_DIGITS}g}") for name in names]
                    for reward in comparison.rewards
                },
            }
            for i, item in enumerate(items)
        ],
    }
