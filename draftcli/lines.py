"""Files of lines, such as index.jsonl: what ends a line, for reading and for writing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def text_lines(path: Path, errors: str = "strict") -> list[str]:
    r"""The lines of a text file, blank ones among them, without their ends and without a byte order mark.

    Lines end at \n, \r\n or \r. The other line breaks that Unicode knows may stand inside a prompt and end nothing.

    Args:
        path: of a UTF-8 file.
        errors: what becomes of bytes that are not UTF-8, as for `open`.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8, and `errors` is strict.
    """
    return path.read_text(encoding="utf-8-sig", errors=errors).split("\n")


def json_line(item: Mapping[str, Any]) -> str:
    """`item` as one line of a .jsonl file, its end included; a line for every reader, whatever ends one for it."""
    text = json.dumps(item, ensure_ascii=False)  # JSON escapes \n, \v, \f and the like by itself
    return re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"
