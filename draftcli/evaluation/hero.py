"""hero.png: the result in one panel, of the size that pages show when a link is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from draftcli import __version__
from draftcli.evaluation.compare import ColumnComparison
from draftcli.evaluation.measure import Measured
from draftcli.evaluation.pictures import Item
from draftcli.evaluation.verdict import EvaluationVerdict
from draftcli.metrics.statistics import has_interval
from draftcli.pages.embed import enlarged
from draftcli.pages.numbers import signed
from draftcli.pictures import open_picture
from draftcli.runs import write_aside
from draftcli.sampling.paper import BLUE, FAINT, INK, Paper, line_height, wrapped

SIZE = (1200, 675)
PAIRS = 3  # of images: one from the middle of each third, sorted by the judge's change
_MARGIN, _EDGE, _GAP, _TOP = 48, 192, 8, 56
_TEXT_LEFT = _MARGIN + 2 * _EDGE + _GAP + 48


def write_hero(
    path: Path,
    comparison: ColumnComparison,
    title: str,
    verdict: EvaluationVerdict,
    items: Sequence[Item],
    measured: Mapping[str, Measured],
) -> None:
    """Write the panel: three pairs of images at the left, the most important figures and the verdict at the right."""
    panel = Paper(SIZE)
    names, column = [c.name for c in comparison.columns], verdict.column
    pair = [comparison.columns[0], comparison.columns[names.index(column)]]
    for c, gallery in enumerate(pair):
        x = _MARGIN + c * (_EDGE + _GAP)
        panel.write((x, 20), wrapped(gallery.name, "lead", _EDGE, 1)[0], "lead", BLUE if c else INK)
        for row, i in enumerate(typical_pairs(comparison, column, items, measured)):
            picture = enlarged(open_picture(gallery.files[i]), _EDGE)
            panel.place(picture, (x + (_EDGE - picture.width) // 2, _TOP + row * (_EDGE + _GAP)))
    wide = SIZE[0] - _TEXT_LEFT - _MARGIN
    for i, line in enumerate(wrapped(title, "lead", wide, 2)):
        panel.write((_TEXT_LEFT, 20 + i * line_height("lead")), line, "lead")
    top = 100
    for number, words in _figures(comparison, column):
        panel.write((_TEXT_LEFT, top), wrapped(number, "large", wide, 1)[0], "large", BLUE)
        panel.write((_TEXT_LEFT, top + line_height("large") - 4), wrapped(words, "lead", wide, 1)[0], "lead", FAINT)
        top += line_height("large") + line_height("lead") + 14
    for line in wrapped(verdict.sentence.replace("−", "-"), "lead", wide, 9):
        panel.write((_TEXT_LEFT, top), line, "lead")
        top += line_height("lead") + 2
    for use in verdict.uses[:1]:
        text = f"For {use.purpose}: {use.column} ({use.why})".replace("−", "-")
        for i, line in enumerate(wrapped(text, "heading", wide, 3)):
            panel.write((_TEXT_LEFT, top + 14 + i * line_height("heading")), line, "heading", FAINT)
    panel.rule(_TEXT_LEFT, SIZE[0] - _MARGIN, 622)
    pairs = f"Pairs: the middle of each third, sorted by the change of {comparison.judge} · draftp {__version__}"
    panel.write((_TEXT_LEFT, 632), wrapped(pairs, "text", wide, 1)[0], "text", FAINT)
    write_aside(path, lambda aside: panel.image.save(aside, format="PNG"))


def typical_pairs(
    comparison: ColumnComparison, column: str, items: Sequence[Item], measured: Mapping[str, Measured]
) -> list[int]:
    """Which items the panel shows: sorted by how much the judge's score changed, the middle of each third; all where
    there are no more than three.
    """
    if len(items) <= PAIRS:
        return list(range(len(items)))
    judge = comparison.judge
    change = np.nan_to_num(measured[column].scores[judge] - measured[comparison.base].scores[judge])
    middles = (np.arange(PAIRS) + 0.5) / PAIRS
    return np.argsort(change, kind="stable")[np.floor(middles * len(change)).astype(int)].tolist()


def _figures(comparison: ColumnComparison, column: str) -> list[tuple[str, str]]:
    """A large number and a few words on it: the judge's change, and the diversity kept."""
    found = []
    figures, judge = comparison.figures[column], comparison.judge
    change, kept = figures.reward(judge), figures.diversity.diversity_kept
    if change.difference is not None:
        low, high = change.difference_low, change.difference_high
        known = low is not None and high is not None and has_interval(low, high)
        interval = f", 95 % {signed(low)} to {signed(high)}" if known else ", no interval"  # type: ignore[arg-type]
        found.append((signed(change.difference), f"{judge} ({comparison.role(judge)}){interval}"))
    if kept is not None:
        found.append((f"{100 * kept.share:.3g} %", f"diversity kept, {kept.words.partition(' (')[2].rstrip(')')}"))
    return [(number.replace("−", "-"), words.replace("−", "-")) for number, words in found]
