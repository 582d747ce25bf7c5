"""Every setting with its type, default and meaning, for people and for editors; read from the schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from draftcli.config.explaining import nearest
from draftcli.config.schema import Config
from draftcli.errors import InputError, brief

_HUGE = 10**9  # a bound that large is there to catch mistakes and tells nobody anything
_NAMED = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: dotted, as --set takes it; NAME stands for that of a reward.
        type: what it may be, in words.
        default: as YAML has it.
        text: what it does.
    """

    key: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class SettingsSection:
    """The settings that stand together in a recipe.

    Attributes:
        name: its key in a recipe.
        text: what it is about.
        settings: in the order of the schema.
    """

    name: str
    text: str
    settings: tuple[Setting, ...]


def section_names() -> list[str]:
    """The sections of a recipe, in their order."""
    return list(Config.model_fields)


@cache
def settings_sections() -> tuple[SettingsSection, ...]:
    """All settings, by section."""
    schema = Config.model_json_schema()
    found = []
    for name, node in schema["properties"].items():
        is_named = "additionalProperties" in node  # by the names of rewards
        section = _resolved(node["additionalProperties"] if is_named else node, schema)
        text = node.get("description") or section.get("description", "")
        prefix = f"{name}.NAME" if is_named else name
        found.append(SettingsSection(name, _one_line(text), tuple(_settings(section, prefix, schema))))
    return tuple(found)


def all_settings() -> list[Setting]:
    """All settings, in the order of the schema."""
    return [setting for section in settings_sections() for setting in section.settings]


def find_settings(name: str | None) -> list[SettingsSection]:
    """The sections, with those of their settings that `name` asks for.

    Args:
        name: a section (`draftp`), the beginning of a key (`optim.sched`), a key (`draftp.kl_coeff`) or its end
            (`kl_coeff`). None: all.

    Raises:
        InputError: there is no such section or setting; names the nearest.
    """
    if name is None:
        return list(settings_sections())
    found = []
    for section in settings_sections():
        kept = tuple(s for s in section.settings if f".{name}." in f".{s.key}." and _is_edge(name, s.key))
        if kept:
            found.append(SettingsSection(section.name, section.text, kept))
    if not found:
        keys = [setting.key for setting in all_settings()]
        known = [*section_names(), *keys, *(key.rpartition(".")[2] for key in keys)]
        raise InputError(
            f"unknown section or setting {brief(name)}{nearest(name, known)}; sections: {', '.join(section_names())}"
        )
    return found


def settings_schema() -> dict[str, Any]:
    """A JSON schema of recipes, with which an editor completes and checks them.

    It also allows the short forms that a recipe may have: a reward's weight alone, held-out rewards as a list.
    """
    schema = Config.model_json_schema()
    rewards, held_out = (schema["properties"][name] for name in ("rewards", "held_out_rewards"))
    rewards["additionalProperties"] = {"anyOf": [rewards["additionalProperties"], {"type": "number"}]}
    source = held_out.pop("additionalProperties")
    by_name = {"type": "object", "additionalProperties": {"anyOf": [source, {"type": "null"}]}}
    del held_out["type"]
    held_out["anyOf"] = [by_name, {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "object"}]}}]
    logging = schema["$defs"]["LoggingConfig"]["properties"]
    logging["tensorboard"] = {"type": "boolean", "deprecated": True, "description": "Use trackers."}
    logging["wandb"] = {"type": ["string", "null"], "deprecated": True, "description": "Use trackers and project."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of draftp"}


def _is_edge(name: str, key: str) -> bool:
    """Whether a part of a key is its beginning or its end; one in its middle is a mere NAME."""
    return f"{key}.".startswith(f"{name}.") or key.endswith(f".{name}")


def _settings(section: dict[str, Any], prefix: str, schema: dict[str, Any]) -> Iterator[Setting]:
    required = section.get("required", ())
    for name, node in section["properties"].items():
        key, inner = f"{prefix}.{name}", _resolved(node, schema)
        text = _one_line(node.get("description") or inner.get("description", ""))
        if "properties" in inner and "anyOf" not in node:
            yield from _settings(inner, key, schema)
            continue
        default = "required" if name in required else _as_yaml(node.get("default"))
        yield Setting(key, _in_words(node), default, text)
        for choice in node.get("anyOf", ()):
            if "$ref" in choice:
                yield from _settings(_resolved(choice, schema), key, schema)


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _in_words(node: dict[str, Any]) -> str:
    """The type that a node of a JSON schema allows."""
    if "anyOf" in node:
        names = [name for choice in node["anyOf"] for name in map(_as_yaml, choice.get("enum", ()))]
        return _either([*names, *(_in_words(choice) for choice in node["anyOf"] if "enum" not in choice)])
    if "enum" in node or "const" in node:
        return _either([_as_yaml(value) for value in node.get("enum", [node.get("const")])])
    if "$ref" in node or node.get("type") == "object":
        return "mapping"
    if "prefixItems" in node:
        return f"[{', '.join(map(_in_words, node['prefixItems']))}]"
    if node.get("type") == "array":
        return f"list of {_in_words(node['items'])}"
    return _NAMED[node["type"]] + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    high = None if high is not None and high >= _HUGE else high
    parts = []
    if low is not None and high is not None:
        parts.append(f"{low:g} to {high:g}")
    elif low is not None:
        parts.append(f"{low:g} or more")
    elif high is not None:
        parts.append(f"{high:g} or less")
    if "exclusiveMinimum" in node:
        parts.append(f"above {node['exclusiveMinimum']:g}")
    if node.get("exclusiveMaximum", _HUGE) < _HUGE:
        parts.append(f"below {node['exclusiveMaximum']:g}")
    if "multipleOf" in node:
        parts.append(f"a multiple of {node['multipleOf']}")
    return f" ({', '.join(parts)})" if parts else ""


def _either(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())
