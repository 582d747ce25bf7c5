"""From pydantic's errors to one line that names the setting, what came, what is allowed and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, TypeGuard

from pydantic import BaseModel

from draftcli.config.schema import Config, RelativeConfig, RewardConfig, RewardSource
from draftcli.config.section import Section
from draftcli.errors import brief

LONGEST_KEY = 120  # letters of a setting's name that a message repeats


def nearest(word: str, known: Sequence[str]) -> str:
    """ ", did you mean WORD?" for the nearest of the known words; empty where none is near."""
    close = difflib.get_close_matches(word[:LONGEST_KEY], known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `location` knows."""
    section: Any = Config
    for part in location:
        if part in ("rewards", "held_out_rewards"):
            section = RewardConfig if part == "rewards" else RewardSource
            continue
        if part == "relative":
            section = RelativeConfig
            continue
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)


def explain_error(error: Any) -> str:
    """One of `ValidationError.errors()` in one line."""
    location = tuple(part for part in error["loc"] if not str(part).startswith("function-"))
    key = ".".join(str(part) for part in location)[:LONGEST_KEY]
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        sections = {name: field.annotation for name, field in Config.model_fields.items()}
        elsewhere = [f"{name}.{k}" for name, s in sections.items() if _is_section(s) for k in s.model_fields]
        near = nearest(str(location[-1]), known) or nearest(key, elsewhere)
        where = ".".join(map(str, location[:-1]))[:LONGEST_KEY]
        allowed = f"; available in {where}: " if where else "; sections: "
        return f"unknown setting {key}{near or allowed + ', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {brief(error['input'])}: {message[:1].lower()}{message[1:]}"


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)
