"""Settings inside a picture's file, as the tools that people open it with read them."""

from pathlib import Path

import piexif
import piexif.helper
import pytest
from PIL import Image

from draftcli.sampling.embedded import KEY, parameters, read, read_key, save

TEXTS = {
    "plain": parameters("a red dog", None, {"Steps": 3, "Seed": 7}),
    "of all scripts": parameters('a "quoted" fox, ß 日本語 😀', "dull\u2028grey", {"Steps": 3}),
    "of two lines": parameters("a fox\nin snow", "dull", {"Model": "a, b: c"}),
    "empty": parameters("", None, {"Steps": 3}),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_exif_is_what_the_web_ui_writes(suffix, text):
    """To the last byte: it makes the block with piexif, which others read it with too."""
    path = Path(f"x.{suffix}")
    save(Image.new("RGB", (8, 8)), path, suffix, text)
    comment = piexif.helper.UserComment.dump(text, encoding="unicode")
    block = piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})
    with Image.open(path) as picture:
        assert picture.info["exif"].removeprefix(b"Exif\0\0") == block.removeprefix(b"Exif\0\0")
    read_back = piexif.load(str(path))["Exif"][piexif.ExifIFD.UserComment]
    assert isinstance(read_back, bytes)
    assert piexif.helper.UserComment.load(read_back) == text
    assert read(path) == text


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_endless_prompt_keeps_its_settings(suffix):
    path = Path(f"x.{suffix}")
    save(Image.new("RGB", (8, 8)), path, suffix, parameters("fox " * 40_000, None, {KEY: "0123456789abcdef"}))
    assert read_key(path) == "0123456789abcdef"


def test_a_file_of_an_earlier_version_is_read():
    """It had the type BYTE."""
    exif = Image.Exif()
    exif[0x8769] = {0x9286: b"UNICODE\0" + f"a fox\n{KEY}: 0123456789abcdef".encode("utf-16-be")}
    Image.new("RGB", (8, 8)).save("old.jpg", exif=exif)
    assert read_key(Path("old.jpg")) == "0123456789abcdef"


def test_a_picture_without_a_hash_is_told_from_no_picture():
    Image.new("RGB", (8, 8)).save("theirs.png")
    save(Image.new("RGB", (64, 64)), Path("cut.png"), "png", f"{KEY}: 0123456789abcdef")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:-40])
    Path("text.png").write_text("a fox")
    assert read_key(Path("theirs.png")) == ""
    assert [read_key(Path(name)) for name in ("cut.png", "text.png", "nowhere.png")] == [None] * 3
    assert read_key(Path("cut.png"), whole=False) == "0123456789abcdef"
