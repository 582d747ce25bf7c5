"""The key table of a report, and the same as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from draftcli.evaluation.compare import ColumnComparison
from draftcli.evaluation.figures import EVALUATIONS, Figure
from draftcli.metrics.statistics import has_interval
from draftcli.pages.numbers import signed, significant

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "→": r"$\to$", "–": "--",
}  # fmt: skip


@dataclass(frozen=True)
class KeyTable:
    """The most important figures: a row for each column of the comparison.

    Attributes:
        caption: what it shows, in a sentence.
        heads: of the table's columns.
        rows: as many texts each.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_markdown(self) -> str:
        """A table in Markdown, with its caption below."""
        lines = [[*map(_in_markdown, row)] for row in (self.heads, ["---"] * len(self.heads), *self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.caption}\n"

    def to_latex(self) -> str:
        """A LaTeX table; it needs the package booktabs."""
        body = [" & ".join(map(_in_latex, row)) + r" \\" for row in self.rows]
        return "\n".join(
            [
                r"\begin{table}", r"\centering", f"\\caption{{{_in_latex(self.caption)}}}",
                f"\\begin{{tabular}}{{l{'r' * (len(self.heads) - 1)}}}", r"\toprule",
                " & ".join(map(_in_latex, self.heads)) + r" \\", r"\midrule", *body, r"\bottomrule",
                r"\end{tabular}", r"\end{table}", "",
            ]
        )  # fmt: skip


def key_table(comparison: ColumnComparison) -> KeyTable:
    """Rewards with their change, interval and wins, the diversity kept, and the cost, of every column."""
    base = comparison.base
    rewards = sorted(comparison.rewards, key=lambda reward: reward != comparison.judge)
    heads = [f"{reward} ({comparison.role(reward)})" for reward in rewards]
    rows = []
    for name, figures in comparison.figures.items():
        kept = figures.diversity.diversity_kept
        diversity = "100 %" if name == base else "not measured" if kept is None else kept.words
        cost = figures[EVALUATIONS].value
        rows.append(
            [
                name,
                *(_reward(figures.reward(reward), comparison.better(reward)) for reward in rewards),
                diversity,
                "unknown" if cost is None else f"{cost:g}",
            ]
        )
    caption = (
        f"Mean reward of every column, the change against {base} with its 95 % interval over prompts, and the share of "
        f"pairs in which the column scores better; diversity in percent of that of {base}; UNet evaluations per image."
    )
    return KeyTable(caption, ["column", *heads, "diversity kept", "UNet evaluations"], rows)


def _reward(figure: Figure, better: int) -> str:
    if figure.value is None:
        return "not measured"
    text = significant(figure.value)
    low, high = figure.difference_low, figure.difference_high
    if figure.difference is None:
        return text
    text += f", {signed(figure.difference)}"
    if low is not None and high is not None and has_interval(low, high):
        text += f" ({signed(low)} to {signed(high)})"
    return text if (wins := figure.wins(better)) is None else f"{text}, wins {100 * wins:.3g} %"


def _in_markdown(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _in_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda found: _LATEX[found[0]], " ".join(text.split()))
