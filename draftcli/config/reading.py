"""Recipes: preset < file < --set, in one frozen object; checked, printed, saved in the run folder.

A recipe is one YAML file. `load_config("toy", ["draftp.kl_coeff=0.1"])` takes a preset's name or a file, then overrides
by dotted key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from draftcli.config.explaining import LONGEST_KEY, explain_error, nearest
from draftcli.config.rules import Purpose, conflicts, contradictions
from draftcli.config.schema import Config, by_name
from draftcli.config.section import expand_home
from draftcli.errors import InputError, brief


def presets_folder() -> Path:
    """Where the recipes are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(p for p in (package / "presets", package.parent / "presets") if p.is_dir())


def preset_names() -> list[str]:
    """The recipes that ship with draftp."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def load_config(
    preset: str | Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    purpose: Purpose = "training",
) -> Config:
    """Read a recipe and apply overrides.

    Args:
        preset: a preset's name, or a YAML file. None: the defaults.
        overrides: `KEY=VALUE` with a dotted key and a YAML value, such as `trainer.max_steps=300`. A later one wins.
        values: settings by dotted key that are no text to be parsed, applied before the overrides.
        purpose: drawing: of a recipe that says how to train, what says how its network was kept small and split is not
            read, as drawing may be elsewhere; overrides may say it anew. See also `check_config`.

    Raises:
        InputError: no such preset or file, invalid YAML, an unknown key (the nearest known one is named), a value
            that is not allowed.
    """
    data = {} if preset is None else _read_yaml(_find(str(preset)))
    if purpose == "drawing":
        data = _for_drawing(data)
    for key, value in (values or {}).items():
        _set(data, key.split("."), value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override[:LONGEST_KEY]}: expected KEY=VALUE, such as --set trainer.max_steps=300")
        _set(data, _split(key.strip()), _parse(text, f"--set {override[:LONGEST_KEY]}"))
    return check_config(data, purpose)


def parse_reward(text: str) -> tuple[str, float]:
    """`NAME` or `NAME=WEIGHT`, as on the command line.

    Raises:
        InputError: no name, or a weight that is no number.
    """
    name, equals, weight = text.partition("=")
    try:
        number = float(weight) if equals else 1.0
    except ValueError:
        number = float("nan")
    if not name or not math.isfinite(number):
        raise InputError(f"--reward {text}: expected NAME or NAME=WEIGHT, such as pickscore=0.5")
    return name, number


def check_config(data: dict[str, Any], purpose: Purpose = "training") -> Config:
    """The settings in `data`, checked.

    Args:
        data: by section.
        purpose: drawing: settings that forbid each other in a training (rules.py) may stand together; nothing trains.

    Raises:
        InputError: as for `load_config`.
    """
    try:
        cfg = Config.model_validate(data)
    except ValidationError as error:
        raise InputError("; ".join(explain_error(e) for e in error.errors()[:3])) from None
    problems = conflicts(cfg) if purpose == "training" else contradictions(cfg)
    if (text := next(problems, None)) is not None:
        raise InputError(text)
    return cfg


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _find(preset: str) -> Path:
    path = Path(expand_home(preset))
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise InputError(f"{preset}: there is no such file")
        return path
    names = preset_names()
    if preset in names:
        return presets_folder() / f"{preset}.yaml"
    raise InputError(
        f"unknown preset {brief(preset)}{nearest(preset, names)}; available: {', '.join(names)}, or give a .yaml file"
    )


def _for_drawing(data: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of pictures; the base is as other programs load it, not in 8 bits."""
    read = {section: values for section, values in data.items() if section not in ("draftp", "sharding")}
    if isinstance(read.get("model"), dict):
        read["model"] = {key: value for key, value in read["model"].items() if key != "quantize"}
    return read


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(
            f"{path}: expected settings by section (model:, sampling:, ...), found a {type(data).__name__}"
        )
    return data


def _parse(text: str, where: str) -> Any:
    try:
        value = _OnceEach(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line, reason = f" at line {mark.line + 1}" if mark else "", f" ({problem[:200]})" if problem else ""
        raise InputError(f"{where}: invalid YAML{line}{reason}") from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-4 as text; people mean the number.
        try:
            return float(value) if value.strip()[:1] in "0123456789+-." and "e" in value.lower() else value
        except ValueError:
            return value
    return value


class _OnceEach(yaml.SafeLoader):
    """PyYAML's safe loader, but a key may stand only once: of two, PyYAML takes the last and is silent."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As the file has it.

        Raises:
            yaml.YAMLError: a key stands in it twice.
        """
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                problem = f"{brief(key.value)} stands at line {seen[key.value]} already; join the two or remove one"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return node


def _set(data: dict[str, Any], keys: list[str], value: Any) -> None:
    node = data
    for key in keys[:-1]:
        child = node.get(key)
        if isinstance(child, list) and key == "held_out_rewards":
            try:
                node[key] = child = by_name(child)
            except ValueError as error:
                raise InputError(f"{key} = {brief(child)}: {error}") from None
        if not isinstance(child, dict):
            # `rewards: {toy: 1.0}` and --set rewards.toy.target=2: the short form becomes the long one.
            child = {} if child is None else {"weight": child}
            node[key] = child
        node = child
    node[keys[-1]] = value


def _split(key: str) -> list[str]:
    """A dotted key in parts; a reward's `package.module:object`, `file.py:object` or folder is one of them."""
    match = re.fullmatch(r"(rewards|held_out_rewards)\.([^:]+:\w+|[^:]*/[^/.]+)(?:\.(.+))?", key)
    if match is None:
        return key.split(".")
    section, name, rest = match.groups()
    return [section, name, *(rest.split(".") if rest else [])]
