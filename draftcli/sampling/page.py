"""compare.html: columns of images beside each other, row by row, in one file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from draftcli.pages.embed import EMBEDDED_IMAGES, embedded, is_small
from draftcli.pages.page import render_html
from draftcli.pictures import open_picture
from draftcli.runs import write_aside
from draftcli.sampling.files import File, Written
from draftcli.sampling.scores import KnownScores
from draftcli.sampling.sheet import spread

_TEMPLATE = Path(__file__).parent / "compare.html"
_KEY_NAME = "draftp-hash"


@dataclass(frozen=True)
class PageText:
    """What a page says about its images.

    Attributes:
        title: of the page.
        command: of draftp that made it.
        note: the settings, in a sentence.
        made_by: the run, its settings and the date.
    """

    title: str
    command: str
    note: str
    made_by: str


def read_page_key(path: Path) -> str | None:
    """The hash of a page's pictures, empty where it has none; None where there is no file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf'<meta name="{_KEY_NAME}" content="([0-9a-f]{{16}})">', text)
    return found[1] if found else ""


def write_page(path: Path, written: Written, text: PageText, scores: KnownScores, key: str) -> None:
    """Write the page with its images inside, at most `EMBEDDED_IMAGES` of them. Prompts are escaped; `key` is stored in
    it.
    """
    rows, names = written.rows(), list(written.evaluations)
    shown = [rows[i] for i in spread(len(rows), max(1, EMBEDDED_IMAGES // len(names)))]
    rewards = list(dict.fromkeys(reward for row in shown for file in row for reward in scores.of(file.key)))
    height, width = shown[0][0].picture.size
    data = {
        "columns": names,
        "rewards": rewards,
        "judge": scores.judge if scores.judge in rewards else next(iter(rewards), None),
        "left": 0,
        "right": len(names) - 1,
        "small": (width, height) if is_small((width, height)) else None,
        "view": "all" if len(names) > 2 else "pair",
        "order": "given",
        "items": [_item(i, row, rewards, scores) for i, row in enumerate(shown)],
    }
    html = render_html(
        _TEMPLATE, text.title, ["viewer.js"], data, command=text.command, note=text.note, made_by=text.made_by,
        rewards=rewards, evaluations=written.evaluations, shown=len(shown), total=len(rows), key_name=_KEY_NAME,
        key=key,
    )  # fmt: skip
    write_aside(path, lambda aside: aside.write_text(html, encoding="utf-8"))


def _item(number: int, row: list[File], rewards: list[str], scores: KnownScores) -> dict[str, object]:
    found = {reward: [scores.of(file.key).get(reward) for file in row] for reward in rewards}
    return {
        "number": number,
        "prompt": row[0].picture.prompt.text,
        "seed": row[0].picture.seed,
        "pictures": [embedded(open_picture(file.path)) for file in row],
        "scores": {reward: values for reward, values in found.items() if any(v is not None for v in values)},
    }
