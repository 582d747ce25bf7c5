"""Pictures from elsewhere are what a viewer shows, or are refused by name."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from draftcli.errors import InputError
from draftcli.pictures import READABLE, open_picture

PACKAGE = Path(__file__).parents[1] / "draftcli"
Pixels = np.ndarray


def scene() -> Pixels:
    """(24, 40, 3) uint8: four quarters of their own colour, so that every turn shows."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:12, :20], pixels[:12, 20:] = (200, 40, 60), (30, 180, 90)
    pixels[12:, :20], pixels[12:, 20:] = (20, 60, 220), (240, 220, 30)
    return pixels


def soft() -> Pixels:
    """Colours that sRGB holds whichever primaries they are written in."""
    return (scene() * 0.4 + 80).round().astype(np.uint8)


def gray_scene() -> Pixels:
    """(24, 40) uint8: 40 shades."""
    return np.tile(np.linspace(0, 255, 40).round().astype(np.uint8), (24, 1))


def in_three(gray: Pixels) -> Pixels:
    return np.repeat(gray[..., None], 3, axis=2)


def over_white(pixels: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255
    return np.round(pixels * share + 255 * (1 - share))


def opened(path: str) -> Pixels:
    picture = open_picture(Path(path))
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def same(path: str, expected: Pixels, within: int = 0) -> None:
    found = opened(path)
    assert found.shape == expected.shape
    assert np.abs(found - expected.astype(int)).max() <= within


# --------------------------------------------------------------------------------------------------------- EXIF's turns

# By EXIF's number, how the stored pixels come from those that are shown.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("number", STORED)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_picture_is_upright(number, suffix):
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(STORED[number](scene()))).save(f"turned.{suffix}", exif=exif, **options)
    same(f"turned.{suffix}", scene(), within=3 if suffix == "jpg" else 0)


def test_damaged_exif_stops_nobody():
    Image.fromarray(scene()).save("broken.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    same("broken.png", scene())


# ------------------------------------------------------------------------------------------------------ bits and modes


def png(path: str, kind: int, bits: int, rows: Pixels, **chunks: bytes) -> None:
    """A PNG of colour type `kind` from (H, ...) numbers, as Pillow cannot write every kind."""
    height, width = rows.shape[:2]
    raw = rows.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    lines = b"".join(b"\0" + line.tobytes() for line in raw)
    body = {b"IHDR": struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)}
    body |= {name.encode(): data for name, data in chunks.items()} | {b"IDAT": zlib.compress(lines), b"IEND": b""}
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in body.items())
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def tiff(path: str, bits: int, photometric: int, data: bytes) -> None:
    """A gray little-endian TIFF of 40 x 24 pixels."""
    tags = {256: 40, 257: 24, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 24, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    Path(path).write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)


def in_12_bits(values: Pixels) -> bytes:
    pairs = values.reshape(-1, 2).astype(int)
    return bytes(b for x, y in pairs.tolist() for b in (x >> 4, (x & 15) << 4 | y >> 8, y & 255))


def wide(pixels: Pixels) -> Pixels:
    """The same in 16 bits."""
    return pixels.astype(np.uint16) * 257


def alpha_scene() -> Pixels:
    alpha = np.full((24, 40), 255, np.uint8)
    alpha[:12, :20], alpha[12:, 20:] = 0, 100
    return alpha


def gray_16_png() -> Pixels:
    Image.fromarray(wide(gray_scene())).save("x.png")
    return in_three(gray_scene())


def colour_16_png() -> Pixels:
    png("x.png", 2, 16, wide(scene()))
    return scene()


def gray_alpha_16_png() -> Pixels:
    png("x.png", 4, 16, np.stack([wide(gray_scene()), wide(alpha_scene())], axis=2))
    return over_white(in_three(gray_scene()), alpha_scene())


def gray_16_with_a_clear_shade() -> Pixels:
    png("x.png", 0, 16, wide(gray_scene()), tRNS=struct.pack(">H", 0))
    return np.where(in_three(gray_scene()) == 0, 255, in_three(gray_scene()))


def gray_16_tiff_big_endian() -> Pixels:
    Image.frombytes("I;16B", (40, 24), wide(gray_scene()).astype(">u2").tobytes()).save("x.tif")
    return in_three(gray_scene())


def gray_16_tiff_where_zero_is_white() -> Pixels:
    tiff("x.tif", 16, 0, wide(255 - gray_scene()).astype("<u2").tobytes())
    return in_three(gray_scene())


def gray_12_tiff() -> Pixels:
    tiff("x.tif", 12, 1, in_12_bits(np.round(gray_scene() / 255 * 4095)))
    return in_three(gray_scene())


def gray_16_ppm() -> Pixels:
    Path("x.pgm").write_bytes(b"P5 40 24 65535\n" + wide(gray_scene()).astype(">u2").tobytes())
    return in_three(gray_scene())


def gray_png() -> Pixels:
    Image.fromarray(gray_scene()).save("x.png")
    return in_three(gray_scene())


def one_bit(**options: int) -> Pixels:
    light = gray_scene() > 128
    Image.fromarray(light).save("x.png", **options)
    return in_three(np.where(light, 255, 0))


def one_bit_with_clear_black() -> Pixels:
    return np.full_like(one_bit(transparency=0), 255)


def palette_png() -> Pixels:
    Image.fromarray(scene()).quantize(4).save("x.png")
    return scene()


def palette_with_alphas() -> Pixels:
    picture = Image.fromarray(scene()).quantize(4)
    alphas = bytes([0, 85, 170, 255])
    picture.save("x.png", transparency=alphas)
    return over_white(scene(), np.frombuffer(alphas, np.uint8)[np.asarray(picture)])


def gif_with_a_clear_colour() -> Pixels:
    picture = Image.fromarray(scene()).quantize(4)
    picture.save("x.gif", transparency=2)
    return over_white(scene(), np.where(np.asarray(picture) == 2, 0, 255))


def rgba_png() -> Pixels:
    Image.fromarray(np.dstack([scene(), alpha_scene()])).save("x.png")
    return over_white(scene(), alpha_scene())


def rgba_webp() -> Pixels:
    Image.fromarray(np.dstack([scene(), alpha_scene()])).save("x.webp", lossless=True, exact=True)
    return over_white(scene(), alpha_scene())


def gray_with_alpha() -> Pixels:
    Image.merge("LA", [Image.fromarray(gray_scene()), Image.fromarray(alpha_scene())]).save("x.png")
    return over_white(in_three(gray_scene()), alpha_scene())


def rgb_with_a_clear_colour() -> Pixels:
    Image.fromarray(scene()).save("x.png", transparency=(200, 40, 60))
    return over_white(scene(), np.where((scene() == (200, 40, 60)).all(2), 0, 255))


def cmyk_tiff() -> Pixels:
    Image.fromarray(scene()).convert("CMYK").save("x.tif")
    return scene()


def lab_tiff() -> Pixels:
    Image.fromarray(soft()).convert("LAB").save("x.tif")
    return soft()


def cmyk_jpeg() -> Pixels:
    Image.fromarray(scene()).convert("CMYK").save("x.jpg", quality=100, subsampling=0)
    return scene()


def ycck_jpeg() -> Pixels:
    """Adobe's: what Pillow stores inverted as C, M, Y is brightness and two colour differences instead."""
    planes = [255 - np.asarray(plane) for plane in Image.fromarray(255 - scene()).convert("YCbCr").split()]
    key = np.zeros_like(planes[0])
    picture = Image.merge("CMYK", [Image.fromarray(plane) for plane in (*planes, key)])
    picture.save("x.jpg", quality=100, subsampling=0)
    data = Path("x.jpg").read_bytes()
    at = data.index(b"Adobe") + 11
    Path("x.jpg").write_bytes(data[:at] + b"\2" + data[at + 1 :])
    return scene()


def a_cameras_jpeg_with_a_second_picture() -> Pixels:
    Image.fromarray(scene()).save("x.jpg", "MPO", quality=100, subsampling=0, save_all=True, append_images=[
        Image.new("RGB", (40, 24), "black")
    ])  # fmt: skip
    return scene()


MODES = [
    gray_16_png, colour_16_png, gray_alpha_16_png, gray_16_with_a_clear_shade, gray_16_tiff_big_endian,
    gray_16_tiff_where_zero_is_white, gray_12_tiff, gray_16_ppm, gray_png, one_bit, one_bit_with_clear_black,
    palette_png, palette_with_alphas, gif_with_a_clear_colour, rgba_png, rgba_webp, gray_with_alpha,
    rgb_with_a_clear_colour, cmyk_tiff, lab_tiff, cmyk_jpeg, ycck_jpeg, a_cameras_jpeg_with_a_second_picture,
]  # fmt: skip


@pytest.mark.parametrize("make", MODES, ids=lambda make: make.__name__)
def test_every_mode_is_the_plain_picture(make):
    expected = make()
    (path,) = Path().glob("x.*")
    same(str(path), expected, within=3 if path.suffix == ".jpg" or make is lab_tiff else 1)


# ------------------------------------------------------------------------------------------------------------- profiles

WHITE = np.array([0.3127, 0.3290])  # D65
D50 = np.array([0.9642, 1.0, 0.8249])
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_d50(primaries: tuple[tuple[float, float], ...]) -> Pixels:
    """(3, 3): linear colours of `primaries` with white D65 to XYZ as seen under D50."""
    xyz = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    white = np.array([WHITE[0] / WHITE[1], 1, (1 - WHITE.sum()) / WHITE[1]])
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD
    return adapt @ (xyz * np.linalg.solve(xyz, white))


def profile(space: bytes, gamma: float, primaries: tuple[tuple[float, float], ...] = SRGB) -> bytes:
    """An ICC profile (version 2) of gray, or of three primaries, with a pure power as its curve."""

    def numbers(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"test\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79), b"wtpt": numbers(D50)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        columns = to_d50(primaries).T
        tags |= {name: numbers(c) for name, c in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)}
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, at + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = at + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + numbers(D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def srgb_of(pixels: Pixels, gamma: float, primaries: tuple[tuple[float, float], ...] = SRGB) -> Pixels:
    """What a colour-managed viewer shows: by the formulas, in float64."""
    linear = (pixels / 255) ** gamma
    linear = (linear @ (np.linalg.inv(to_d50(SRGB)) @ to_d50(primaries)).T).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize(
    ("primaries", "gamma"), [(DISPLAY_P3, 2.2), (ADOBE_RGB, 2.19921875), (SRGB, 1.0)], ids=["P3", "Adobe RGB", "linear"]
)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_colours_of_a_profile_become_srgb(suffix, primaries, gamma):
    expected = srgb_of(soft(), round(gamma * 256) / 256, primaries)
    assert np.abs(expected - soft()).max() > 5
    options = {"webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(soft()).save(f"x.{suffix}", icc_profile=profile(b"RGB ", gamma, primaries), **options)
    same(f"x.{suffix}", expected.round(), within=2)


def test_a_gray_profile_and_transparency_together():
    gray = profile(b"GRAY", 1.8)
    Image.merge("LA", [Image.fromarray(gray_scene()), Image.fromarray(alpha_scene())]).save("x.png", icc_profile=gray)
    shown = srgb_of(in_three(gray_scene()), 461 / 256)
    same("x.png", over_white(shown, alpha_scene()).round(), within=2)


@pytest.mark.parametrize(
    "icc",
    [b"no profile", profile(b"GRAY", 1.8), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
    ids=["damaged", "about gray", "sRGB itself"],
)
def test_a_profile_that_says_nothing_changes_nothing(icc):
    Image.fromarray(scene()).save("x.png", icc_profile=icc)
    same("x.png", scene(), within=1)


# -------------------------------------------------------------------------------------------------------------- refused


def animated(path: str, **options: object) -> None:
    frames = [Image.new("RGB", (40, 24), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


def other_colours(gamma: int, red: int) -> None:
    chromaticity = struct.pack(">8I", 31270, 32900, red, 33000, 30000, 60000, 15000, 6000)
    png("x.png", 2, 8, scene(), gAMA=struct.pack(">I", gamma), cHRM=chromaticity)


REFUSED = {
    "GIF": (lambda: animated("x.gif"), "it holds 2 frames or pages"),
    "WebP": (lambda: animated("x.webp"), "it holds 2 frames or pages"),
    "APNG": (lambda: animated("x.png"), "it holds 2 frames or pages"),
    "pages": (lambda: animated("x.tif"), "it holds 2 frames or pages"),
    "float TIFF": (lambda: Image.new("F", (4, 4)).save("x.tif"), "floats or 32-bit numbers"),
    "32-bit TIFF": (lambda: Image.new("I", (4, 4)).save("x.tif"), "floats or 32-bit numbers"),
    "PFM": (lambda: Image.new("F", (4, 4)).save("x.pfm", "PPM"), "floats or 32-bit numbers"),
    "linear PNG": (lambda: other_colours(100000, 64000), "its colours are not sRGB, and it has no ICC profile"),
    "PNG of other primaries": (lambda: other_colours(45455, 68000), "its colours are not sRGB"),
    "EPS": (lambda: Image.fromarray(scene()).save("x.eps"), "cannot be read as an image"),
    "text": (lambda: Path("x.png").write_text("a fox"), "cannot be read as an image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_viewers_do_not_agree_on_is_refused_in_one_line(kind):
    make, words = REFUSED[kind]
    make()
    (path,) = Path().glob("x.*")
    with pytest.raises(InputError) as refused:
        open_picture(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_chunks_that_say_srgb_and_one_frame_of_an_animation_are_plain():
    other_colours(45455, 64000)
    same("x.png", scene())
    Image.fromarray(scene()).save("one.webp", save_all=True, lossless=True)
    same("one.webp", scene())


def _text(**texts: str) -> PngInfo:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text, zip=True)
    return info


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"pnginfo": _text(workflow="w" * 3_000_000)},
        lambda: {"pnginfo": _text(**{f"text{i}": "w" * 1_000_000 for i in range(70)})},
        lambda: {"icc_profile": bytes(2_000_000)},
    ],
    ids=["one", "many", "profile"],
)
def test_a_png_may_carry_long_text(options):
    """Such as ComfyUI's workflows; Pillow opens no more than 1 MiB of one and 64 of all by itself."""
    Image.fromarray(scene()).save("x.png", **options())
    same("x.png", scene())


def test_pictures_are_opened_in_one_place():
    """Beside it only the text in our own files is read."""
    places = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if re.search(r"\bImage\.open\(", file.read_text(encoding="utf-8"))
    }
    assert places == {"pictures.py", "sampling/embedded.py"}
    known = {*Image.registered_extensions().values(), "AVIF"}  # Pillow before 11.3 has no AVIF
    assert set(READABLE) <= known
