"""Prompts in a table: .csv, .tsv and .parquet, a row each.

The column of prompts is called prompt, text or caption, in letters of either case, the first that is there. Where there
are columns negative_prompt, seed, height and width, they are read as well. Rows are loaded.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from draftcli.errors import InputError, first_line
from draftcli.file_kinds import stands_for_a_file
from draftcli.prompts.files import prompt_from_item
from draftcli.prompts.notation import Notation
from draftcli.prompts.prompt import Prompt, PromptList, PromptSequence

TABLE_FILES = (".csv", ".tsv", ".parquet")
_PROMPT_COLUMNS = ("prompt", "text", "caption")
_OTHER_COLUMNS = ("negative_prompt", "seed", "height", "width")
# How messages call a row, and its cells by the names of the columns.
_Rows = Iterator[tuple[str, dict[str, Any]]]


def read_table(path: Path, where: str) -> PromptSequence:
    """The prompts of a table, in its order. Rows whose cells are all empty are left out.

    Args:
        path: a .csv, .tsv or .parquet.
        where: what it is called in error messages.

    Raises:
        InputError: it has no column of prompts, a row that cannot be read, or none at all; or pyarrow is missing.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if told := stands_for_a_file(file.read(256)):
            raise InputError(f"{where}: {told}")
    columns, rows = (_parquet if path.suffix.lower() == ".parquet" else _csv)(path, where)
    names = _columns(columns, where)
    notation, prompts = Notation(), list[Prompt]()
    for called, cells in rows:
        found = {name: cells[column] for name, column in names.items()}
        if all(cell in (None, "") for cell in cells.values()):
            continue
        try:
            prompts.append(prompt_from_item(_item(found)))
        except (ValueError, InputError) as error:
            raise InputError(f"{where} {called}: {error}") from None
        notation.add(prompts[-1])
    if not prompts:
        raise InputError(f"{where}: there is no prompt in it")
    unread = [column for column in columns if column not in names.values()]
    note = [f"{where}: columns that were not read: {', '.join(unread)}"] if unread else []
    return PromptList(prompts, (*note, *notation.notes(where)))


def _columns(columns: Sequence[str], where: str) -> dict[str, str]:
    """The names of the columns to read, by what they hold."""
    by_lower: dict[str, str] = {}
    for column in columns:
        by_lower.setdefault(column.strip().lower(), column)
    prompts = next((by_lower[name] for name in _PROMPT_COLUMNS if name in by_lower), None)
    if prompts is None:
        there = ", ".join(columns) or "none"
        raise InputError(f"{where}: name its column of prompts prompt, text or caption; its columns are: {there}")
    if len({"height", "width"} & by_lower.keys()) == 1:
        raise InputError(f"{where}: of the columns height and width one is missing; an image's size needs both")
    return {"prompt": prompts, **{name: by_lower[name] for name in _OTHER_COLUMNS if name in by_lower}}


def _item(cells: dict[str, Any]) -> dict[str, Any]:
    """A row as a line of .jsonl has it."""
    numbers = {name: _whole(name, cells.get(name)) for name in ("seed", "height", "width")}
    size = [numbers["height"], numbers["width"]]
    return {
        "prompt": _text("prompt", cells["prompt"]) or "",
        "negative_prompt": _text("negative_prompt", cells.get("negative_prompt")),
        "seed": numbers["seed"],
        "size": None if size == [None, None] else size,
    }


def _text(name: str, cell: object) -> str | None:
    if cell is None or isinstance(cell, str):
        return cell or None
    raise ValueError(f"{name} must be text")


def _whole(name: str, cell: object) -> int | None:
    if cell is None or isinstance(cell, int):
        return cell
    text = str(cell).strip()
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise ValueError(f"{name} {text[:80]!r} must be a whole number")
    return int(text)


def _csv(path: Path, where: str) -> tuple[list[str], _Rows]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise InputError(f"{where}: not text, as it holds zero bytes; if it is UTF-16, save it as UTF-8")
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)  # Excel's are of the country
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise InputError(f"{where} line 1: {error}") from None

    def rows() -> _Rows:
        try:
            for cells in reader:
                if len(cells) > len(columns):
                    raise InputError(
                        f"{where} line {reader.line_num}: more cells than columns; quote a cell with commas"
                    )
                padded = [*cells, *[""] * (len(columns) - len(cells))]
                yield f"line {reader.line_num}", dict(zip(columns, padded, strict=True))
        except csv.Error as error:
            raise InputError(f"{where} line {reader.line_num}: {error}") from None

    return columns, rows()


def _parquet(path: Path, where: str) -> tuple[list[str], _Rows]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{where}: a .parquet needs one more package: pip install 'draftp[datasets]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{where}: not a parquet file, or a damaged one ({first_line(error)})") from None
    columns = list(file.schema_arrow.names)

    def rows() -> _Rows:
        wanted = [column for column in columns if column.strip().lower() in (*_PROMPT_COLUMNS, *_OTHER_COLUMNS)]
        number = 0
        try:
            for batch in file.iter_batches(columns=wanted):
                for cells in batch.to_pylist():
                    number += 1
                    yield f"row {number}", cells
        except pyarrow.ArrowException as error:
            raise InputError(f"{where}: damaged after row {number} ({first_line(error)})") from None

    return columns, rows()
