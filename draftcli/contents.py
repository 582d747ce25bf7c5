"""What the files say that settings name: enough to know them again at another place, or changed at the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from draftcli.built_in import BUILT_IN_LORAS, BUILT_IN_MODELS

WHOLE = 2**26  # bytes: larger files are known by their size and by PIECES pieces of PIECE bytes, spread over them
PIECES, PIECE = 256, 2**16
BASE_LORAS = "model.loras"
_SINGLE = ("model.pretrained", "model.config", "model.vae", "data.prompts", "data.validation_prompts")
_SECTIONS, _OF_A_REWARD = ("rewards", "held_out_rewards"), ("pretrained", "backbone")


def contents_of(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Hashes of the files of this machine that settings name, by dotted key; what the hub has is not among them."""
    paths = {key: Path(value).expanduser() for key, value in _places(settings) if value not in BUILT_IN_MODELS}
    found = {key: fingerprints(path) for key, path in paths.items() if path.exists()}
    if isinstance(start := (settings.get("peft") or {}).get("init_from"), str):
        found["peft.init_from"] = _of_lora(Path(start).expanduser())
    if loras := base_loras_contents((settings.get("model") or {}).get("loras")):
        found[BASE_LORAS] = loras
    return found


def base_loras_contents(loras: Any) -> dict[str, str]:
    """Hashes of the files of model.loras. A name says which of how many a LoRA is and its scale, so that one more, one
    less, another order or another scale is a change.
    """
    texts = [text for text in loras if isinstance(text, str)] if isinstance(loras, list | tuple) else []
    found: dict[str, str] = {}
    for i, text in enumerate(texts, 1):
        is_name = text in BUILT_IN_LORAS or Path(text).expanduser().exists()
        name, _, scale = (text, "", "1") if is_name else text.rpartition("=")
        for file, digest in _of_lora(BUILT_IN_LORAS.get(name, Path(name).expanduser())).items():
            found[f"LoRA {i} of {len(texts)} x {_as_number(scale)} {file}".rstrip()] = digest
    return found


def _as_number(text: str) -> str:
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def _of_lora(path: Path) -> dict[str, str]:
    """Of a LoRA's file, or of those of its folder: in a run's, those of final/."""
    if not path.is_dir():
        return fingerprints(path) if path.is_file() else {}
    files = sorted(path.glob("*.safetensors")) or sorted((path / "final").glob("*.safetensors"))
    return {file.name: _hash_of(file) for file in files}


def read_contents(path: Path) -> dict[str, dict[str, str]]:
    """What `contents_of` gave, from the JSON file that an earlier session has left; empty where it is not there."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    known = known if isinstance(known, dict) else {}
    return {key: files for key, files in known.items() if isinstance(files, dict)}


def fingerprints(path: Path) -> dict[str, str]:
    """A hash of every file at `path`, by its name in that folder, hidden ones left out; a file's own name is "".

    Weights of gigabytes are not read through: a change that is in none of 256 pieces of a large file is not seen.
    """
    if path.is_file():
        return {"": _hash_of(path)}
    names = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: _hash_of(file) for name, file in names.items() if not any(p[0] == "." for p in name.split("/"))}


def what_changed(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """In words, what is no longer as `fingerprints` once gave it; None: nothing. Files that came since do not count."""
    gone = [name for name in before if name not in now]
    other = [name for name in before if name in now and now[name] != before[name]]
    if not gone and not other:
        return None
    first = (gone or other)[0] or "the file"
    more = f" and {len(gone) + len(other) - 1} more" if len(gone) + len(other) > 1 else ""
    return f"{first}{more} {'is not there' if gone else 'is another'}"


def _places(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _SINGLE:
        section, _, name = key.partition(".")
        value = (settings.get(section) or {}).get(name)
        if isinstance(value, str):
            yield key, value
    for section in _SECTIONS:
        rewards = settings.get(section)
        for reward, source in rewards.items() if isinstance(rewards, dict) else ():
            if (path := _path_of(reward)) is not None:
                yield f"{section}.{reward}", path
            for name in _OF_A_REWARD if isinstance(source, dict) else ():
                if isinstance(value := source.get(name), str):
                    yield f"{section}.{reward}.{name}", value


def _path_of(reward: str) -> str | None:
    """The file that a reward's name `file.py:object` has, or the folder that `draftp rewards train` left and that names
    it; see rewards/references.py and rewards/folders.py. None: the name is no path.
    """
    if (file := reward.rpartition(":")[0]).endswith(".py"):
        return file
    config = Path(reward).expanduser() / "config.json"
    with suppress(OSError, ValueError):  # too long for a path, or with a zero byte
        return reward if '"draftp_reward"' in config.read_text(encoding="utf-8", errors="replace") else None
    return None


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(PIECES):
            file.seek(i * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
        return digest.hexdigest()
