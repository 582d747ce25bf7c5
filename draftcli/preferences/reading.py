"""The layouts in which people have preferences, each read into `Answers`.

- `preferences.jsonl` of `draftp rate`: {"prompt", "left", "right", "answer", ...} a line; or the folder that it is in.
- A .jsonl of {"prompt", "chosen", "rejected"}, paths relative to the file.
- Pick-a-Pic's columns in a .parquet: caption, jpg_0, jpg_1, label_0, label_1.
- HPDv2's .json: a list of {"prompt", "image_path" or "file_path", "human_preference" or "rank"}.
- A folder with chosen/ and rejected/, in which pictures of one pair have the same name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from draftcli.errors import InputError, brief, first_line
from draftcli.file_kinds import stands_for_a_file
from draftcli.lines import text_lines
from draftcli.preferences.pairs import Answer, Answers, Shown

LAYOUTS = (
    "preferences.jsonl of draftp rate, a .jsonl of {prompt, chosen, rejected}, a .parquet with Pick-a-Pic's columns, "
    "HPDv2's .json, or a folder with chosen/ and rejected/"
)
PREFERENCES = "preferences.jsonl"
LABELS = {"left": 1.0, "right": 0.0, "neither": 0.5}
SKIP = "skip"
ANSWERS = (*LABELS, SKIP)  # that a line of preferences.jsonl can have
PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm"}


def read_answers(path: Path) -> Answers:
    """All answers in a file or folder; `LAYOUTS` says which are known.

    Pictures are not opened. Answers whose pictures are not there are left out, with a sentence that counts them.

    Raises:
        InputError: there is no such file, it is of none of the layouts, a line is not as it should be, or it holds no
            answer that anything can be learned from.
    """
    if (path / PREFERENCES).is_file():
        path = path / PREFERENCES
    read = reader_of(path)
    try:
        found = read(path)
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    return _checked(found)


def reader_of(path: Path) -> Callable[[Path], Answers]:
    """What reads the layout of a file or folder, which is not opened for it.

    Raises:
        InputError: there is no such file, or its name is of none of the layouts.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder; preferences are {LAYOUTS}")
    readers: dict[str, Callable[[Path], Answers]] = {".jsonl": _lines, ".json": _hpd, ".parquet": _pickapic}
    read = _folder if path.is_dir() else readers.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: not a layout of preferences that is known; available are {LAYOUTS}")
    return read


def _checked(found: Answers) -> Answers:
    """Without pairs whose files are not there; raises where nothing can be learned."""
    there: dict[Path, bool] = {}

    def is_there(shown: Shown) -> bool:
        return shown.path is None or there.setdefault(shown.path, shown.path.is_file())

    if not found.answers:
        skipped = f" ({found.skipped} skipped)" if found.skipped else ""
        raise InputError(f"{found.where}: there is no answer in it{skipped}; rate some pairs first")
    kept = [is_there(answer.first) and is_there(answer.second) for answer in found.answers]
    if not all(kept):
        gone = next(str(path) for path, here in there.items() if not here)
        count = f"{len(kept) - sum(kept)} of {len(kept)} pairs"
        if not any(kept):
            raise InputError(f"{found.where}: no image is where it says, the first is {gone}; put the images there")
        found = found.only(kept, [f"{found.where}: {count} are left out, their images are not there: {gone}"])
    if not found.decided:
        raise InputError(
            f"{found.where}: all {len(found.answers)} answers are ties; a taste shows in pairs of which one is better"
        )
    return found


def _lines(path: Path) -> Answers:
    """A .jsonl of either kind."""
    found, torn = json_lines(path)
    items: dict[int, dict[str, Any]] = {}  # without those that were taken back
    for number, item in found.items():
        if not isinstance(item, dict):
            raise InputError(f"{path} line {number + 1}: {brief(item)} is no JSON object")
        if "undo" in item:
            items.pop(_undone(path, number, item["undo"]), None)
        else:
            items[number] = item
    numbers = ", ".join(str(number + 1) for number in torn[:5])
    left_out = (f"{path}: lines that are not JSON are left out: {numbers}",) if torn else ()
    return replace(answers_in(path, items), left_out=left_out)


def json_lines(path: Path) -> tuple[dict[int, Any], list[int]]:
    """What the lines of a .jsonl hold, by their number from 0, and the numbers of those that are not JSON.

    Blank lines are in neither. A line that is not JSON may be one that was being written when the power went.

    Raises:
        OSError: the file cannot be read.
    """
    found: dict[int, Any] = {}
    torn: list[int] = []
    for number, line in enumerate(text_lines(path, errors="surrogateescape")):
        if not line.strip():
            continue
        try:
            line.encode()  # else it was cut within a letter
            found[number] = json.loads(line)
        except (ValueError, RecursionError):
            torn.append(number)
    return found, torn


def answers_in(path: Path, items: Mapping[int, Mapping[str, Any]]) -> Answers:
    """What lines of a .jsonl say, none of which was taken back.

    Args:
        path: of the file, beside which the pictures are.
        items: the lines, by their number from 0.

    Raises:
        InputError: a line is not as it should be.
    """
    rated = [item["answer"] for item in items.values() if "answer" in item]
    answers = [_of_line(path, f"line {n + 1}", item) for n, item in items.items() if item.get("answer") != SKIP]
    return Answers(str(path), tuple(answers), rated.count(SKIP), sides_by_chance=len(rated) == len(items))


def _of_line(path: Path, called: str, item: Mapping[str, Any]) -> Answer:
    if "answer" in item:
        sides, label = ("left", "right"), item["answer"]
        if not isinstance(label, str) or label not in LABELS:
            raise InputError(f"{path} {called}: answer is {brief(label)}; it can be {', '.join(ANSWERS)}")
    elif {"chosen", "rejected"} <= item.keys():
        sides, label = ("chosen", "rejected"), "left"
    else:
        raise InputError(
            f"{path} {called}: has {brief(sorted(item))}; an answer has prompt, left, right and answer, as draftp rate "
            "writes them, or prompt, chosen and rejected"
        )
    first, second = (_pictured(path, called, item, side) for side in sides)
    return Answer(_prompt(path, called, item), first, second, LABELS[label], item.get("repeats") is True, called)


def _undone(path: Path, number: int, undone: object) -> int:
    if isinstance(undone, bool) or not isinstance(undone, int) or not 0 <= undone < number:
        raise InputError(f"{path} line {number + 1}: undo is {brief(undone)}; it is the number of an earlier line")
    return undone


def _prompt(path: Path, called: str, item: Mapping[str, Any], key: str = "prompt") -> str:
    prompt = item.get(key)
    if not isinstance(prompt, str):
        raise InputError(f"{path} {called}: {key} is {brief(prompt)}; it must be text")
    return prompt


def _pictured(path: Path, called: str, item: Mapping[str, Any], side: str) -> Shown:
    value = item.get(side)
    place = value.get("picture") if isinstance(value, Mapping) else value
    if not isinstance(place, str) or not place:
        raise InputError(f"{path} {called}: {side} is {brief(value)}; it must say which image, by its path")
    return _file(path.parent / place)


def _file(path: Path) -> Shown:
    return Shown(str(path), path)


def _hpd(path: Path) -> Answers:
    """HPDv2: `human_preference` has 1 for the preferred, of a `rank` the lower is better; every two are a pair."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: {brief(items)} is no list of answers; {LAYOUTS}")
    answers = [answer for number, item in enumerate(items) for answer in _hpd_pairs(path, f"item {number}", item)]
    return Answers(str(path), tuple(answers))


def _hpd_pairs(path: Path, called: str, item: Any) -> Iterator[Answer]:
    if not isinstance(item, dict):
        raise InputError(f"{path} {called}: {brief(item)} is no JSON object")
    files = item.get("image_path", item.get("file_path"))
    # Of both lists, larger is better from here on.
    order = item["human_preference"] if "human_preference" in item else [-r for r in _numbers(item.get("rank"))]
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files) or len(files) < 2:
        raise InputError(f"{path} {called}: image_path is {brief(files)}; it must be a list of two images or more")
    if len(_numbers(order)) != len(files):
        raise InputError(
            f"{path} {called}: human_preference or rank must have a number for each of {len(files)} images"
        )
    prompt = _prompt(path, called, item)
    shown = [_file(_in_hpd(path, file)) for file in files]
    for i, j in combinations(range(len(files)), 2):
        label = 0.5 if order[i] == order[j] else float(order[i] > order[j])
        yield Answer(prompt, shown[i], shown[j], label, called=called)


def _numbers(values: Any) -> list[float]:
    whole = isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return values if whole else []


def _in_hpd(path: Path, file: str) -> Path:
    """Pictures are beside the JSON, or, as HPDv2 has them, in a folder of the JSON's name."""
    inside = path.parent / path.stem / file
    return inside if inside.is_file() else path.parent / file


def _pickapic(path: Path) -> Answers:
    with path.open("rb") as file:
        if told := stands_for_a_file(file.read(256)):
            raise InputError(f"{path}: {told}")
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{path}: a .parquet needs one more package: pip install 'draftp[datasets]'") from None
    answers: list[Answer] = []
    skipped = 0
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if lacking := [name for name in PICKAPIC if name not in columns]:
            raise InputError(f"{path}: lacks Pick-a-Pic's {', '.join(lacking)}; its columns are: {', '.join(columns)}")
        wanted = [*PICKAPIC, *(["has_label"] if "has_label" in columns else [])]
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=wanted):
            for cells in batch.to_pylist():
                row += 1
                if cells.get("has_label") is False or cells["label_0"] is None:
                    skipped += 1
                    continue
                answers.append(_pickapic_pair(path, f"row {row}", cells))
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a parquet file, or a damaged one ({first_line(error)})") from None
    return Answers(str(path), tuple(answers), skipped)


def _pickapic_pair(path: Path, called: str, cells: Mapping[str, Any]) -> Answer:
    labels = (cells["label_0"], cells["label_1"])
    if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise InputError(f"{path} {called}: label_0 and label_1 are {brief(labels)}; they are 1 and 0, or both 0.5")
    first, second = (_in_cell(path, called, cells, name) for name in ("jpg_0", "jpg_1"))
    return Answer(_prompt(path, called, cells, "caption"), first, second, float(labels[0]), called=called)


def _in_cell(path: Path, called: str, cells: Mapping[str, Any], name: str) -> Shown:
    data = cells[name].get("bytes") if isinstance(cells[name], Mapping) else cells[name]
    if not isinstance(data, bytes):
        raise InputError(f"{path} {called}: {name} holds {brief(data)}; it must be the bytes of an image")
    return Shown(f"{path} {called} {name}", data=data)


def _folder(path: Path) -> Answers:
    """chosen/ and rejected/; a picture's prompt is in a .txt of its name beside the chosen one, where there is one."""
    sides = [path / name for name in ("chosen", "rejected")]
    if lacking := [side.name for side in sides if not side.is_dir()]:
        raise InputError(f"{path}: has no folder {' and no folder '.join(lacking)}; preferences are {LAYOUTS}")
    chosen, rejected = ({file.stem: file for file in sorted(side.iterdir()) if file.suffix.lower() in _SUFFIXES}
                        for side in sides)  # fmt: skip
    alone = sorted(chosen.keys() ^ rejected.keys())
    both = [name for name in chosen if name in rejected]
    if not both:
        raise InputError(f"{path}: no image of chosen/ has the name of one of rejected/; those of a pair are the same")
    left_out = ()
    if alone:
        left_out = (f"{path}: {len(alone)} images are left out, as only one side has them: {alone[0]}",)
    answers = [Answer(_prompt_beside(chosen[name]), _file(chosen[name]), _file(rejected[name]), 1.0, called=name)
               for name in both]  # fmt: skip
    return Answers(str(path), tuple(answers), left_out=left_out)


def _prompt_beside(picture: Path) -> str:
    text = picture.with_suffix(".txt")
    return " ".join(text.read_text(encoding="utf-8-sig").split()) if text.is_file() else ""
