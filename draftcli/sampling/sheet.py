"""Contact sheets: pictures with captions, to see at one look what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from draftcli.runs import write_aside
from draftcli.sampling.embedded import KEY, save

PAPER, INK, FAINT, LINE_COLOUR = (255, 255, 255), (24, 24, 27), (113, 113, 122), (228, 228, 231)
MARGIN, GAP = 32, 8
LEFT = 200  # width of the captions beside a table's rows
FONT_SIZES = {"title": 22, "heading": 15, "text": 13}
# Tried in this order for letters that Pillow's own font lacks.
WIDER_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msgothic.ttc")


@dataclass(frozen=True)
class Cell:
    """Pictures of one prompt side by side: images (n, 3, H, W) in [0, 1] or n of Pillow's, a caption, and a note under
    each.
    """

    images: Tensor | Sequence[Image.Image]
    caption: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Heading:
    """What stands over a column of a table."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table: a caption and a note beside its pictures."""

    caption: str
    note: str
    images: Sequence[Image.Image]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers from 0, from the first to the last: a sheet of them stands for all."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit RGB, rounded."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def enlarged(picture: Image.Image, edge: int) -> Image.Image:
    """At most `edge` pixels on its longer side. A small one grows by a whole factor, every pixel a sharp square."""
    longer = max(picture.size)
    if longer <= edge:
        factor = edge // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    factor = edge / longer
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def write_sheet(
    path: Path, cells: Sequence[Cell], title: str, across: int = 3, edge: int = 192, note: str = "", key: str = ""
) -> None:
    """Write a PNG sheet of `cells`, `across` in a row, each picture at most `edge` pixels on its longer side; `key` is
    stored in it, for `read_key`.
    """
    across = min(across, len(cells))
    shown = [[enlarged(_as_pil(image), edge) for image in cell.images] for cell in cells]
    wide, high = _largest(shown)
    count = max(map(len, shown))
    width, height = count * wide + (count - 1) * GAP, 2 * _line("text") + 6 + high + 6 + _line("text")
    rows = -(-len(cells) // across)
    head = _head(title, note)
    size = (MARGIN + across * (width + MARGIN), head + rows * (height + MARGIN))
    sheet, pen = _paper((max(size[0], _title_width(title, note)), size[1]), title, note)
    for i, (cell, pictures) in enumerate(zip(cells, shown, strict=True)):
        left, top = MARGIN + (i % across) * (width + MARGIN), head + (i // across) * (height + MARGIN)
        for j, line in enumerate(_wrapped(cell.caption, "text", width, 2)):
            _write(pen, (left, top + j * _line("text")), line, "text")
        for j, (picture, words) in enumerate(zip(pictures, cell.notes, strict=True)):
            x = left + j * (wide + GAP)
            _place(sheet, pen, picture, (x, top + 2 * _line("text") + 6))
            below = top + 2 * _line("text") + 6 + picture.height + 6
            _write(pen, (x, below), _wrapped(words, "text", wide, 1)[0], "text", FAINT)
    write_aside(path, lambda aside: save(sheet, aside, "png", f"{KEY}: {key}" if key else ""))


def write_table(
    path: Path,
    headings: Sequence[Heading],
    rows: Sequence[Row],
    title: str,
    note: str = "",
    edge: int = 192,
    key: str = "",
) -> None:
    """Write a PNG table: a row's caption at the left, its pictures under the headings of their columns; `key` as in
    `write_sheet`.
    """
    shown = [[enlarged(picture, edge) for picture in row.images] for row in rows]
    wide, high = _largest(shown)
    head = _head(title, note)
    table_top = head + _line("heading") + _line("text") + 10
    step = high + GAP + 8
    size = (MARGIN + LEFT + len(headings) * (wide + GAP) + MARGIN - GAP, table_top + len(rows) * step + MARGIN - 16)
    sheet, pen = _paper((max(size[0], _title_width(title, note)), size[1]), title, note)
    columns = [MARGIN + LEFT + c * (wide + GAP) for c in range(len(headings))]
    for x, heading in zip(columns, headings, strict=True):
        _write(pen, (x, head), _wrapped(heading.name, "heading", wide - GAP, 1)[0], "heading")
        _write(pen, (x, head + _line("heading")), _wrapped(heading.note, "text", wide - GAP, 1)[0], "text", FAINT)
    for r, (row, pictures) in enumerate(zip(rows, shown, strict=True)):
        top = table_top + r * step
        lines = _wrapped(row.caption, "text", LEFT - 24, max(1, high // _line("text") - 1))
        for j, line in enumerate(lines):
            _write(pen, (MARGIN, top + j * _line("text")), line, "text")
        _write(pen, (MARGIN, top + len(lines) * _line("text") + 2), row.note, "text", FAINT)
        for x, picture in zip(columns, pictures, strict=True):
            _place(sheet, pen, picture, (x, top))
    write_aside(path, lambda aside: save(sheet, aside, "png", f"{KEY}: {key}" if key else ""))


def _as_pil(image: Tensor | Image.Image) -> Image.Image:
    return to_pil(image) if isinstance(image, Tensor) else image


def _largest(pictures: Sequence[Sequence[Image.Image]]) -> tuple[int, int]:
    sizes = [picture.size for row in pictures for picture in row]
    return max(width for width, _ in sizes), max(height for _, height in sizes)


def _paper(size: tuple[int, int], title: str, note: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (MARGIN, MARGIN - 6), title, "title")
    _write(pen, (MARGIN, MARGIN - 6 + _line("title")), note, "text", FAINT)
    return sheet, pen


def _head(title: str, note: str) -> int:
    """Where the pictures begin."""
    return MARGIN + _line("title") + (_line("text") if note else 0) + 14


def _title_width(title: str, note: str) -> int:
    longest = max(_font(title, "title").getlength(title), _font(note, "text").getlength(note))
    return round(2 * MARGIN + longest)


def _place(sheet: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, at: tuple[int, int]) -> None:
    """With a hair line around it, as a white picture on white paper has no edge."""
    x, y = at
    pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=LINE_COLOUR)
    sheet.paste(picture, at)


def _line(style: str) -> int:
    return round(1.35 * FONT_SIZES[style])


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, style: str, colour: tuple[int, int, int] = INK
) -> None:
    pen.text(at, text, colour, _font(text, style))


def _wrapped(text: str, style: str, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; what does not fit ends in an ellipsis."""
    font, done, words = _font(text, style), [""], " ".join(text.split())[:1000]
    for word in words.split(" "):
        longer = f"{done[-1]} {word}".strip()
        if font.getlength(longer) <= width or not done[-1]:
            done[-1] = longer
        else:
            done.append(word)
    cut, done = len(done) > lines, done[:lines]
    for i, line in enumerate(done):
        if font.getlength(line) > width or (cut and i == lines - 1):
            while line and font.getlength(line + "…") > width:
                line = line[:-1]  # noqa: PLW2901
            done[i] = line.rstrip() + "…"
    return done


@cache
def _wider_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in WIDER_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


@cache
def _plain_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _font(text: str, style: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    plain = all(ord(letter) < 0x180 or letter in "…–—’‘“”" for letter in text)
    return (_plain_font if plain else _wider_font)(FONT_SIZES[style])
