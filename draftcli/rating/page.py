"""The page on which pictures are rated. It holds no picture and no prompt: its script asks the server for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from draftcli.pages.page import render_html

_TEMPLATE = Path(__file__).parent / "rate.html"


@cache
def rating_page() -> str:
    """Its text."""
    return render_html(_TEMPLATE, "Which image is better?", ["rate.js"])
