"""Contact sheets: images with captions, to see at one look what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from draftcli import __version__
from draftcli.pages.embed import SHARP_UP_TO, enlarged
from draftcli.pages.numbers import signed, significant
from draftcli.runs import write_aside
from draftcli.sampling.embedded import KEY, save
from draftcli.sampling.paper import FAINT, Paper, line_height, text_width, wrapped

MARGIN, GAP = 32, 8
LEFT = 200  # width of the captions beside a table's rows
FOOTER = line_height("text") + 12  # height of the line at the bottom of a sheet, in pixels


@dataclass(frozen=True)
class Cell:
    """Images of one prompt.

    Attributes:
        images: (n, 3, H, W) in [0, 1], or n of Pillow's.
        caption: above them.
        notes: one under each image; a line break begins another line.
        across: how many are side by side, such as the columns that are compared; 0: all of them.
    """

    images: Tensor | Sequence[Image.Image]
    caption: str
    notes: Sequence[str]
    across: int = 0


@dataclass(frozen=True)
class Heading:
    """What stands over a column of a table."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: a caption, a note beside its images, and a note under each of them.

    A row with the caption of the row above it belongs to the same prompt, which is not written again.
    """

    caption: str
    note: str
    images: Sequence[Image.Image]
    notes: Sequence[str] = ()


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers from 0, from the first to the last: a sheet of them stands for all."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def sheet_edge(size: tuple[int, int], large: int) -> int:
    """The longest side in pixels that an image of `size` gets on a sheet; `large` where it is not a small one."""
    return SHARP_UP_TO if max(size) <= SHARP_UP_TO else large


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit RGB, rounded."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def score_line(name: str, score: float, base: float | None = None) -> str:
    """A score with its name, and where the base's is given, how much higher or lower it is."""
    plain = f"{name.rpartition(':')[2]} {significant(score)}"
    text = plain if base is None else f"{plain} ({signed(score - base)})"
    return text.replace("−", "-")  # which Pillow's own font has


def made_by_line(run: str, settings: str) -> str:
    """The footer of a sheet: the run, its settings, the date, the version."""
    return " · ".join(filter(None, [run, settings, date.today().isoformat(), f"draftp {__version__}"]))


def write_sheet(
    path: Path,
    cells: Sequence[Cell],
    title: str,
    across: int = 3,
    edge: int = SHARP_UP_TO,
    note: str = "",
    key: str = "",
    footer: str = "",
) -> None:
    """Write a PNG sheet of `cells`, `across` in a row, each image at most `edge` pixels on its longer side; `key` is
    stored in it, for `read_key`.
    """
    across = min(across, len(cells))
    shown = [[enlarged(_as_pil(image), edge) for image in cell.images] for cell in cells]
    wide, high = _largest(shown)
    count = max(cell.across or len(pictures) for cell, pictures in zip(cells, shown, strict=True))
    deep = max(-(-len(pictures) // (cell.across or len(pictures))) for cell, pictures in zip(cells, shown, strict=True))
    below = max(len(words.split("\n")) for cell in cells for words in cell.notes) * line_height("text")
    step = high + 6 + below + GAP
    width, height = count * wide + (count - 1) * GAP, 2 * line_height("text") + 6 + deep * step
    rows = -(-len(cells) // across)
    head = _head(title, note)
    size = (MARGIN + across * (width + MARGIN), head + rows * (height + MARGIN - GAP) + (FOOTER if footer else 0))
    sheet = _paper(size, title, note, footer)
    for i, (cell, pictures) in enumerate(zip(cells, shown, strict=True)):
        left, top = MARGIN + (i % across) * (width + MARGIN), head + (i // across) * (height + MARGIN - GAP)
        for j, line in enumerate(wrapped(cell.caption, "text", width, 2)):
            sheet.write((left, top + j * line_height("text")), line, "text")
        top += 2 * line_height("text") + 6
        for j, (picture, words) in enumerate(zip(pictures, cell.notes, strict=True)):
            row, column = divmod(j, cell.across or len(pictures))
            at = left + column * (wide + GAP), top + row * step
            sheet.place(picture, at)
            _write_notes(sheet, words, (at[0], at[1] + picture.height + 6), wide)
    _save(sheet, path, key)


def write_table(
    path: Path,
    headings: Sequence[Heading],
    rows: Sequence[Row],
    title: str,
    note: str = "",
    edge: int = SHARP_UP_TO,
    key: str = "",
    footer: str = "",
) -> None:
    """Write a PNG table: a row's caption at the left, its images under the headings of their columns; `key` as in
    `write_sheet`.
    """
    shown = [[enlarged(picture, edge) for picture in row.images] for row in rows]
    wide, high = _largest(shown)
    head = _head(title, note)
    table_top = head + line_height("heading") + line_height("text") + 10
    below = max((len(words.split("\n")) for row in rows for words in row.notes), default=0) * line_height("text")
    step = high + below + GAP + 8
    width = MARGIN + LEFT + len(headings) * (wide + GAP) + MARGIN - GAP
    size = (width, table_top + len(rows) * step + MARGIN - 16 + (FOOTER if footer else 0))
    sheet = _paper(size, title, note, footer)
    columns = [MARGIN + LEFT + c * (wide + GAP) for c in range(len(headings))]
    for x, heading in zip(columns, headings, strict=True):
        sheet.write((x, head), wrapped(heading.name, "heading", wide - GAP, 1)[0], "heading")
        sheet.write((x, head + line_height("heading")), wrapped(heading.note, "text", wide - GAP, 1)[0], "text", FAINT)
    for r, (row, pictures) in enumerate(zip(rows, shown, strict=True)):
        top = table_top + r * step
        lines = [] if r and row.caption == rows[r - 1].caption else _caption(row.caption, high)
        for j, line in enumerate(lines):
            sheet.write((MARGIN, top + j * line_height("text")), line, "text")
        sheet.write((MARGIN, top + len(lines) * line_height("text") + 2), row.note, "text", FAINT)
        for c, (x, picture) in enumerate(zip(columns, pictures, strict=True)):
            sheet.place(picture, (x, top))
            if row.notes:
                _write_notes(sheet, row.notes[c], (x, top + picture.height + 4), wide)
    _save(sheet, path, key)


def _caption(text: str, high: int) -> list[str]:
    return wrapped(text, "text", LEFT - 24, max(1, high // line_height("text") - 1))


def _write_notes(sheet: Paper, words: str, at: tuple[int, int], wide: int) -> None:
    for i, line in enumerate(words.split("\n")):
        sheet.write((at[0], at[1] + i * line_height("text")), wrapped(line, "text", wide, 1)[0], "text", FAINT)


def _as_pil(image: Tensor | Image.Image) -> Image.Image:
    return to_pil(image) if isinstance(image, Tensor) else image


def _largest(pictures: Sequence[Sequence[Image.Image]]) -> tuple[int, int]:
    sizes = [picture.size for row in pictures for picture in row]
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _paper(size: tuple[int, int], title: str, note: str, footer: str) -> Paper:
    longest = max(text_width(title, "title"), text_width(note, "text"), text_width(footer, "text"))
    sheet = Paper((max(size[0], round(2 * MARGIN + longest)), size[1]))
    sheet.write((MARGIN, MARGIN - 6), title, "title")
    sheet.write((MARGIN, MARGIN - 6 + line_height("title")), note, "text", FAINT)
    sheet.write((MARGIN, size[1] - FOOTER), footer, "text", FAINT)
    return sheet


def _head(title: str, note: str) -> int:
    """Where the images begin."""
    return MARGIN + line_height("title") + (line_height("text") if note else 0) + 14


def _save(sheet: Paper, path: Path, key: str) -> None:
    write_aside(path, lambda aside: save(sheet.image, aside, "png", f"{KEY}: {key}" if key else ""))
