"""Letters and images on a bitmap, for sheets and panels."""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont

WHITE, INK, FAINT, LINE_COLOUR, BLUE = (255, 255, 255), (24, 24, 27), (99, 99, 108), (228, 228, 231), (37, 99, 235)
FONT_SIZES = {"title": 22, "heading": 15, "text": 13, "large": 44, "lead": 20}
# Tried in this order for letters that Pillow's own font lacks.
WIDER_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msgothic.ttc")
Colour = tuple[int, int, int]


class Paper:
    """A white bitmap.

    Args:
        size: width and height in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.image = Image.new("RGB", size, WHITE)
        self._pen = ImageDraw.Draw(self.image)

    def write(self, at: tuple[int, int], text: str, style: str, colour: Colour = INK) -> None:
        """One line of text, its top left corner at `at`; `style` is one of `FONT_SIZES`."""
        self._pen.text(at, text, colour, _font(text, style))

    def place(self, picture: Image.Image, at: tuple[int, int]) -> None:
        """An image with a hair line around it, as a white one on white paper has no edge."""
        x, y = at
        self._pen.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=LINE_COLOUR)
        self.image.paste(picture, at)

    def rule(self, left: int, right: int, y: int, colour: Colour = LINE_COLOUR, width: int = 1) -> None:
        """A horizontal line."""
        self._pen.line((left, y, right, y), fill=colour, width=width)


def line_height(style: str) -> int:
    """Of a line of text, in pixels."""
    return round(1.35 * FONT_SIZES[style])


def text_width(text: str, style: str) -> float:
    """Of a line of text, in pixels."""
    return _font(text, style).getlength(text)


def wrapped(text: str, style: str, width: int, lines: int) -> list[str]:
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
