"""The settings of a picture inside its file, as AUTOMATIC1111's web UI writes them and the ecosystem's viewers read
them: the prompt, "Negative prompt: ...", and one line of "Key: value" pairs.

PNG holds it as the text chunk `parameters`; JPEG and WebP as EXIF's UserComment in UTF-16 (as piexif writes it).
"""

from __future__ import annotations

import json
import re
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
    """Write `image` with its settings; `suffix` is one of FORMATS, whatever `path` ends in."""
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", text)
        image.save(path, format="PNG", pnginfo=info)
        return
    exif = Image.Exif()
    # From the end, where the settings are, if a prompt is endless.
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: _UNICODE + text[-_LONGEST:].encode("utf-16-be")}
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}[suffix]
    image.save(path, format=FORMATS[suffix], exif=exif.tobytes(), **options)


def read(path: Path) -> str:
    """The text in a file; empty where there is none.

    Raises:
        OSError: the file is not there, is no picture, or is not whole.
    """
    try:
        with Image.open(path) as image:
            image.load()  # to the last pixel, so that a file cut short is noticed
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            text = image.info.get("parameters")
    except Exception as error:  # Pillow reports damage in as many ways as there are formats
        raise OSError(str(error)) from error
    if isinstance(text, str):
        return text
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment[len(_UNICODE) :].decode("utf-16-be", errors="replace")
    return ""


def read_key(path: Path) -> str | None:
    """The hash of weights and settings stored in a file; None where it is not there, not whole, or not ours."""
    try:
        text = read(path)
    except OSError:
        return None
    last = text.splitlines()[-1:] or [""]
    found = re.search(rf"(?:^|, ){KEY}: ([0-9a-f]{{16}})$", last[0])
    return found[1] if found else None


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value
