"""A picture from any file as viewers show it: upright, in 8 bits, in sRGB, over white."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from draftcli.errors import InputError, first_line

# What is opened, by Pillow's names. Others hold layers or programs (PSD, EPS), which viewers do not show alike.
READABLE = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
# Of a PNG's text and ICC profile Pillow unpacks 1 MiB, of all its text 64; workflows that ComfyUI puts in are larger.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # by Pillow's mode, the ICC profiles that can be about it
_SRGB_GAMMA, _SRGB_PRIMARIES = 0.45455, (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


def open_picture(path: Path | io.BytesIO, called: str = "") -> Image.Image:
    """The picture in a file as viewers show it, in 8-bit RGB.

    It is turned as EXIF says; 16 bits become 8, their white 255; an ICC profile is converted to sRGB, and one that is
    damaged or about other colours than the picture's counts for nothing, as in browsers; CMYK without a profile becomes
    RGB by the plain formula, as there; transparent parts lie on white.

    Args:
        path: of the file, or its bytes.
        called: what messages call it; empty: by its path.

    Raises:
        InputError: not a picture, or not whole; several frames or pages; floats or 32-bit numbers, which have no white;
            a PNG whose colours are described by something else than a profile.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow remarks on, such as damaged EXIF, stops no viewer
            Image.init()
            with Image.open(path, formats=[name for name in READABLE if name in Image.OPEN]) as file:
                reason = _refused(file)
                if reason is None:
                    return _as_shown(file)
    except Exception as error:  # Pillow reports damage in as many ways as there are formats
        raise InputError(f"{called or path}: cannot be read as an image ({first_line(error)})") from None
    raise InputError(f"{called or path}: {reason}; save the image to be scored as a plain PNG or JPEG")


def _refused(file: Image.Image) -> str | None:
    """Why viewers would not all show one and the same picture."""
    frames = getattr(file, "n_frames", 1)
    if frames > 1 and file.format != "MPO":  # a camera's JPEG with a depth or brightness map behind the picture
        return f"it holds {frames} frames or pages, and an image has one"
    if file.mode == "F" or (file.mode == "I" and file.format == "TIFF"):
        return "its pixels are floats or 32-bit numbers, which do not say what white is"
    if not {"icc_profile", "srgb"} & file.info.keys() and {"gamma", "chromaticity"} <= file.info.keys():
        primaries = np.abs(np.subtract(file.info["chromaticity"], _SRGB_PRIMARIES)).max()
        if abs(file.info["gamma"] - _SRGB_GAMMA) > 0.01 or primaries > 0.01:
            return "its colours are not sRGB, and it has no ICC profile (its chunks gAMA and cHRM say so)"
    return None


def _as_shown(file: Image.Image) -> Image.Image:
    picture = _in_8_bits(ImageOps.exif_transpose(file), file)
    alpha = None
    if picture.has_transparency_data:
        whole = picture.convert("LA" if picture.mode in ("1", "L", "LA") else "RGBA")
        alpha, picture = whole.getchannel("A"), whole.convert(whole.mode[:-1])
    picture = picture.convert({"1": "L", "P": "RGB"}.get(picture.mode, picture.mode))
    shown = _in_srgb(picture, file.info.get("icc_profile"))
    return shown if alpha is None else Image.composite(shown, Image.new("RGB", shown.size, "white"), alpha)


def _in_8_bits(picture: Image.Image, file: Image.Image) -> Image.Image:
    """Gray of up to 16 bits in mode L or LA; Pillow reduces colours by itself. `file` is where `picture` comes from."""
    if not picture.mode.startswith("I"):
        return picture
    tags = getattr(file, "tag_v2", {})  # of TIFF
    white = 2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1
    pixels = np.asarray(picture).astype(int)
    shown = np.round(pixels * 255 / white).clip(0, 255).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        shown = 255 - shown  # TIFF's "white is zero"
    gray = Image.fromarray(shown)
    if isinstance(clear := picture.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(pixels == clear, 0, 255).astype(np.uint8)))
    return gray


def _in_srgb(picture: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is not None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if profile.profile.xcolor_space.strip() == _SPACES.get(picture.mode):
                intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
                srgb = ImageCms.createProfile("sRGB")
                converted = ImageCms.profileToProfile(picture, profile, srgb, intent, outputMode="RGB")
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return picture.convert("RGB")
