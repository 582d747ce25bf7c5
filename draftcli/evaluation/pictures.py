"""What is compared: galleries, the columns of the report, each with one picture of every prompt and seed."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftcli.errors import InputError, brief
from draftcli.lines import text_lines
from draftcli.pictures import open_picture
from draftcli.sampling.names import INDEX


@dataclass(frozen=True)
class Item:
    """One row of the comparison: a prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Gallery:
    """One picture of every item.

    Attributes:
        name: short and unique, as the report shows it.
        files: file i shows item i.
        source: where they come from, for people.
        evaluations: UNet evaluations a picture took; None where it is unknown.
        seconds: seconds a picture took; likewise.
    """

    name: str
    files: tuple[Path, ...]
    source: str = ""
    evaluations: float | None = None
    seconds: float | None = None


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's index.jsonl, each with at least "file", "prompt" and "seed".

    Raises:
        InputError: there is none, a line is not what it should be, or a picture lies outside the folder.
    """
    path = folder / INDEX
    try:
        lines = text_lines(path)
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{folder}: no readable {INDEX} in it; a folder of images needs one, with a line such as "
            '{"file": "0001.png", "prompt": "a fox", "seed": 0} for every image'
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path} line {number}: not valid JSON") from None
        kinds = (("file", str), ("prompt", str), ("seed", int))
        whole = isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds)
        if not whole or not _is_text(entry["file"] + entry["prompt"]):
            raise InputError(f"{path} line {number}: expected an object with file (text), prompt (text), seed (number)")
        if not (folder / entry["file"]).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: {entry['file']!r} lies outside the folder")
        entries.append(entry)
    if not entries:
        raise InputError(f"{path}: it contains no images")
    return entries


def _is_text(text: str) -> bool:
    """False where half a character, or the end of a C string, is in it: no file has such a name."""
    try:
        return "\0" not in text.encode().decode()
    except UnicodeEncodeError:
        return False


def items_of(entries: Sequence[dict[str, Any]]) -> list[Item]:
    """The items of an index, those of a prompt next to each other, prompts in the order they come, seeds ascending."""
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(entry["prompt"] for entry in entries))}
    found = {Item(entry["prompt"], entry["seed"]) for entry in entries}
    return sorted(found, key=lambda item: (order[item.prompt], item.seed))


def entries_by_item(folder: Path, wanted: Container[Item] | None = None) -> dict[Item, dict[str, Any]]:
    """The line of a folder's index.jsonl for every item; of several about the same picture the last.

    Args:
        folder: with an index.jsonl.
        wanted: the items of which there must be no two pictures; None: all.

    Raises:
        InputError: as `read_entries`, or an item is there in several ways.
    """
    first: dict[Item, dict[str, Any]] = {}
    found: dict[Item, dict[str, Any]] = {}
    for entry in read_entries(folder):
        item = Item(entry["prompt"], entry["seed"])
        other = first.setdefault(item, entry)
        if (wanted is None or item in wanted) and not _is_same_picture(entry, other):
            raise InputError(
                f"{folder}: seed {item.seed} of {brief(item.prompt)} was generated in several ways "
                f"({other['file']} and {entry['file']}), and only one can be compared; use a separate folder for each, "
                f"or keep one line for each prompt and seed in {INDEX}"
            )
        found[item] = entry
    return found


def folder_gallery(folder: Path, items: Sequence[Item], name: str | None = None) -> Gallery:
    """The pictures of a folder made elsewhere, one for each of `items`.

    Raises:
        InputError: a picture is missing, is outside the folder, or is there in several ways.
    """
    files = {item: folder / entry["file"] for item, entry in entries_by_item(folder, set(items)).items()}
    missing = [item for item in items if item not in files or not files[item].is_file()]
    if missing:
        first = missing[0]
        raise InputError(
            f"{folder}: {len(missing)} of {len(items)} images are missing, the first is seed {first.seed} of "
            f"{first.prompt!r}; columns are compared on the same prompts and seeds"
        )
    return Gallery(name or folder.name, tuple(files[item] for item in items), source=str(folder))


def _is_same_picture(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two lines of an index are about one file, or say that two were made of the same."""
    same_hash = entry.get("hash") is not None and entry.get("hash") == other.get("hash")
    return entry["file"] == other["file"] or same_hash


def read_picture(path: Path) -> np.ndarray:
    """(3, H, W) float32 in [0, 1], as viewers show it.

    Raises:
        InputError: as `open_picture`.
    """
    return np.asarray(open_picture(path), np.float32).transpose(2, 0, 1) / 255
