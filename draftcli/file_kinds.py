"""What a file is that cannot be read as its name says: what failed downloads and copies leave."""

from __future__ import annotations

import json
from pathlib import Path

_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head>")
_STARTS = {
    b"GGUF": "it is a GGUF file, whose weights are quantised; take the model as .safetensors",
    b"PK\x03\x04": "it is a pickled or zipped file under another name; convert it to .safetensors, or unpack it",
    b"\x1f\x8b": "it is packed by gzip; unpack it",
    b"7z\xbc\xaf": "it is a 7z archive; unpack it",
    b"Rar!": "it is a RAR archive; unpack it",
}
_LONGEST_HEADER = 10**8  # bytes; safetensors reads no longer one


def unreadable(file: Path, error: object) -> str:
    """Why `file` cannot be read and what to do, to be put behind its name in a message.

    Args:
        file: which a library gave up.
        error: what the library said, for the case that the file does not show why.
    """
    return what_it_is(file) or f"cannot be read, it may be damaged ({error})"


def stands_for_a_file(start: bytes) -> str | None:
    """What came in place of a file, where it is a git-lfs pointer or a web page.

    Args:
        start: the first bytes of it.
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(_POINTER):
        return (
            "it is a git-lfs pointer, which only stands for the file; run `git lfs pull` in its folder, or download "
            "the file itself"
        )
    if text[:16].lower().startswith(_PAGES):
        return "it is a web page, as servers send it in place of a file that needs a login; download it again"
    return None


def what_it_is(file: Path) -> str | None:
    """What a file is instead of weights or configuration, and what to do; None where it does not show that."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(256)
    except OSError:
        return None
    if not start.strip(b"\0"):
        damage = "it begins with zeros, as after a loss of power" if size else "it is empty"
        return f"cannot be read, it is damaged: {damage}; download or copy it again"
    if start.lstrip().startswith(b"{") and file.suffix != ".json":
        return "it is a server's answer in JSON, as where a download needs a login; download it again"
    known = next((known for mark, known in _STARTS.items() if start.startswith(mark)), None)
    cut = _cut_short(file, size) if file.suffix == ".safetensors" else None
    return stands_for_a_file(start) or known or cut


def _cut_short(file: Path, size: int) -> str | None:
    """Whether the header of a .safetensors says that there is more of it than there is."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                return None
            header = json.loads(opened.read(length)) if length + 8 <= size else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    if size >= whole:
        return None
    return f"cannot be read, it is damaged: cut short at {size} bytes; download or copy it again"
