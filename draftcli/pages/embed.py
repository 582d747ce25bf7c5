"""Images inside a page, and the rule by which small ones are enlarged, in pages and on sheets alike."""

from __future__ import annotations

import base64
import io

from PIL import Image

EMBEDDED_EDGE = 512  # longest side of an embedded image, in pixels
EMBEDDED_IMAGES = 600  # in one page, over all columns
SHARP_UP_TO = 192  # pixels; an image whose longer side is at most this is enlarged by a whole factor, to at most this


def is_small(size: tuple[int, int]) -> bool:
    """Whether an image of this size in pixels is enlarged with sharp pixels, and embedded without loss."""
    return max(size) <= SHARP_UP_TO


def enlarged(picture: Image.Image, edge: int) -> Image.Image:
    """At most `edge` pixels on its longer side. A small one grows by a whole factor, every pixel a sharp square."""
    longer = max(picture.size)
    if longer <= edge:
        factor = edge // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    factor = edge / longer
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def embedded(picture: Image.Image, edge: int = EMBEDDED_EDGE) -> str:
    """An image as a data URI: small ones as WebP without loss, large ones as WebP at most `edge` pixels long."""
    data, shown = io.BytesIO(), picture.copy()
    shown.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    if is_small(shown.size):
        shown.save(data, "WEBP", lossless=True)
    else:
        shown.save(data, "WEBP", quality=82)
    return data_uri(data.getvalue(), "image/webp")


def data_uri(content: bytes, kind: str) -> str:
    """`content` as a data URI of the media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
