"""One HTML file from a template: styles, scripts and images are inside, and nothing is loaded from anywhere.

The content security policy allows nothing but that. Prompts and names are text, whatever is in them.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from draftcli import __version__
from draftcli.pages.embed import data_uri

SHARED = Path(__file__).parent


def render_html(template: Path, title: str, scripts: Sequence[str] = (), data: Any = None, **values: Any) -> str:
    """The text of a page.

    Args:
        template: extends base.html; it may include what lies beside it, and the shared parts.
        title: of the page.
        scripts: names of scripts, shared or beside the template, in their order.
        data: what the scripts read, as JSON; NaN becomes null.
        values: what the template reads beside them.
    """
    found = [next(f / name for f in (template.parent, SHARED) if (f / name).is_file()) for name in scripts]
    script = "\n".join(path.read_text(encoding="utf-8") for path in found)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["download"] = _download
    return environment.get_template(template.name).render(
        title=title,
        version=__version__,
        css=(SHARED / "page.css").read_text(encoding="utf-8"),
        js=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=finite(data),
        **values,
    )


def finite(value: Any) -> Any:
    """The same JSON value with null for what is not finite: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _download(text: str, kind: str = "text/plain") -> str:
    """The address of a link that saves `text` as a file."""
    return data_uri(text.encode(), f"{kind};charset=utf-8")
