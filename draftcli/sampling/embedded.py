"""The settings of a picture inside its file, as AUTOMATIC1111's web UI writes them and the ecosystem's viewers read
them: the prompt, "Negative prompt: ...", and one line of "Key: value" pairs.

PNG holds it as the text chunk `parameters`; JPEG and WebP as EXIF's UserComment in UTF-16, byte by byte as piexif does,
which the web UI writes it with.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

from PIL import ExifTags, Image, PngImagePlugin

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
KEY = "draftp hash"
_UNICODE = b"UNICODE\0"
_LONGEST = 15_000  # letters: a JPEG's EXIF block holds 64 KB


def parameters(prompt: str, negative: str | None, settings: dict[str, object]) -> str:
    """The text, as in AUTOMATIC1111's `infotext`. Values with a comma, colon or line break are quoted, as there."""
    pairs = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items())
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), pairs])


def save(image: Image.Image, path: Path, suffix: str, text: str) -> None:
    """Write `image` with its settings, if any; `suffix` is one of FORMATS, whatever `path` ends in."""
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        if text:
            info.add_text("parameters", text)
        image.save(path, format="PNG", pnginfo=info)
        return
    # From the end, where the settings are, if a prompt is endless.
    exif = _exif(_UNICODE + text[-_LONGEST:].encode("utf-16-be"))
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}[suffix]
    image.save(path, format=FORMATS[suffix], exif=exif, **options)


def _exif(comment: bytes) -> bytes:
    """An EXIF block with nothing but UserComment.

    Pillow would write the type BYTE for it. EXIF says UNDEFINED, and readers stop at anything else.
    """
    undefined, long = 7, 4
    first, second, value = 8, 26, 40  # where the two directories and the comment begin
    header = struct.pack(">2sHI", b"MM", 42, first)
    pointer = struct.pack(">HHHIII", 1, ExifTags.IFD.Exif, long, 1, second, 0)  # one entry, and no further directory
    entry = struct.pack(">HHHII", 1, ExifTags.Base.UserComment, undefined, len(comment), value)
    return b"Exif\0\0" + header + pointer + entry + comment


def read(path: Path, whole: bool = True) -> str:
    """The text in a file; empty where there is none. With `whole` the pixels are read too, to the last one.

    Raises:
        OSError: the file is not there, is no picture, or is not whole.
    """
    try:
        with Image.open(path) as image:
            if whole:
                image.load()  # a file cut short is noticed
            text, comment = image.info.get("parameters"), b""
            if text is None:  # of a PNG, Pillow looks for EXIF behind the pixels too, and reads them all
                comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    except Exception as error:  # Pillow reports damage in as many ways as there are formats
        raise OSError(str(error)) from error
    if isinstance(text, str):
        return text
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment[len(_UNICODE) :].decode("utf-16-be", errors="replace")
    return ""


def read_key(path: Path, whole: bool = True) -> str | None:
    """The hash of weights and settings stored in a picture, empty where it has none; None where there is no picture, or
    it is not whole.
    """
    try:
        text = read(path, whole)
    except OSError:
        return None
    last = text.split("\n")[-1]
    found = re.search(rf"(?:^|, ){KEY}: ([0-9a-f]{{16}})$", last)
    return found[1] if found else ""


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
