"""A page on which two columns are compared with a slider: one HTML file beside the pictures, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from draftcli.runs import write_aside
from draftcli.sampling.files import Written

_KEY_NAME = "draftp-hash"
SHARP_UP_TO = 256  # pixels; larger pictures are shown smoothed


def read_page_key(path: Path) -> str | None:
    """The hash of a page's pictures, empty where it has none; None where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf'<meta name="{_KEY_NAME}" content="([0-9a-f]{{16}})">', text)
    return found[1] if found else ""


def write_page(path: Path, written: Written, title: str, note: str, key: str) -> None:
    """Write the page into the folder of the pictures, which it names by relative addresses. Prompts are escaped; `key`
    is stored in it.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    rows: Sequence[dict[str, object]] = [
        {
            "prompt": row[0].picture.prompt.text,
            "seed": row[0].picture.seed,
            "height": row[0].picture.size[0],
            "width": row[0].picture.size[1],
            "small": max(row[0].picture.size) <= SHARP_UP_TO,
            "files": [quote(file.path.name) for file in row],
        }
        for row in written.rows()
    ]
    columns = [{"name": name, "evaluations": count} for name, count in written.evaluations.items()]
    tile = 256 if all(row["small"] for row in rows) else 420
    html = environment.get_template("page.html.j2").render(
        title=title, note=note, rows=rows, columns=columns, tile=tile, key_name=_KEY_NAME, key=key
    )
    write_aside(path, lambda aside: aside.write_text(html, encoding="utf-8"))
