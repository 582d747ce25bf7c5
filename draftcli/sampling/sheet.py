"""Contact sheets: pictures with captions, to see at one look what changed."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from draftcli.runs import write_aside

PAPER, INK, FAINT = (255, 255, 255), (24, 24, 27), (113, 113, 122)
MARGIN, GAP, LINE = 24, 6, 17


@dataclass(frozen=True)
class Cell:
    """Pictures of one prompt side by side: images (n, 3, H, W) in [0, 1], a caption, and a note under each."""

    images: Tensor
    caption: str
    notes: Sequence[str]


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit RGB, rounded."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def write_sheet(path: Path, cells: Sequence[Cell], title: str, across: int = 3, edge: int = 160) -> None:
    """Write a PNG sheet of `cells`, `across` in a row, each picture `edge` pixels on its longer side."""
    font, bold = ImageFont.load_default(13), ImageFont.load_default(18)
    count = max(len(cell.images) for cell in cells)
    width = count * edge + (count - 1) * GAP
    chars = max(8, int(width / 6.6))
    captions = [textwrap.wrap(cell.caption, chars)[:2] for cell in cells]
    height = edge + 4 * LINE
    rows = -(-len(cells) // across)
    sheet = Image.new(
        "RGB",
        (MARGIN + across * (width + MARGIN), MARGIN + 2 * LINE + rows * (height + MARGIN)),
        PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 8), title, INK, bold)
    for i, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        left = MARGIN + (i % across) * (width + MARGIN)
        top = MARGIN + 2 * LINE + (i // across) * (height + MARGIN)
        for j, line in enumerate(caption):
            pen.text((left, top + j * LINE), line, INK, font)
        for j, (image, note) in enumerate(zip(cell.images, cell.notes, strict=True)):
            x = left + j * (edge + GAP)
            picture = to_pil(image)
            small = max(picture.size) < edge
            factor = edge / max(picture.size)
            size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
            resample = Image.Resampling.BICUBIC if small else Image.Resampling.LANCZOS
            sheet.paste(picture.resize(size, resample), (x, top + 2 * LINE + 4))
            pen.text((x, top + 2 * LINE + 6 + edge), note, FAINT, font)
    write_aside(path, lambda aside: sheet.save(aside, format="PNG"))
