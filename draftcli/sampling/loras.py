"""How pictures name the LoRAs that they were drawn with: as AUTOMATIC1111's web UI does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open

from draftcli.core.lora.reading import FILE_NAMES, find_lora

_SHORT = 12  # hexadecimal digits that the web UI shows of a hash


@dataclass(frozen=True)
class NamedLora:
    """A LoRA in the words of a picture's text and of index.jsonl.

    Attributes:
        name: the file's, or where every file of its kind is called the same, the run's or the folder's.
        scale: what its effect was multiplied with.
        hash: 12 hexadecimal digits, from the file's own metadata or of its tensors, as the web UI finds them.
        in_base: whether the base has it too (model.loras), at this scale whatever the tuned network's LoRAs have.
    """

    name: str
    scale: float
    hash: str
    in_base: bool = False

    def scaled(self, factor: float) -> NamedLora:
        """The same at `factor` times its scale."""
        return replace(self, scale=round(self.scale * factor, 6))

    def to_json(self) -> dict[str, object]:
        """For a line of index.jsonl."""
        return {"name": self.name, "scale": self.scale, "hash": self.hash}


def named_loras(loras: Sequence[tuple[Path, float]], base: Sequence[tuple[Path, float]] = ()) -> list[NamedLora]:
    """The names and hashes of LoRA files or folders, each with its scale.

    Args:
        loras: those of the tuned network.
        base: those of model.loras, which come first.

    Raises:
        InputError: a path holds no LoRA.
    """
    return [*(_named(path, scale, in_base=True) for path, scale in base), *(_named(*lora) for lora in loras)]


def _named(path: Path, scale: float, in_base: bool = False) -> NamedLora:
    file = find_lora(path)
    return NamedLora(_name(file), scale, _web_ui_hash(_by_kohyas_names(file))[:_SHORT], in_base)


def with_tags(prompt: str, loras: Sequence[NamedLora]) -> str:
    """The prompt with what tells the web UI to load the LoRAs: `a fox <lora:style:0.8>`."""
    return " ".join([*([prompt] if prompt else []), *(f"<lora:{lora.name}:{lora.scale:g}>" for lora in loras)])


def hashes_setting(loras: Sequence[NamedLora]) -> dict[str, str]:
    """The web UI's setting by which it finds the LoRAs under other names; none where there is no LoRA."""
    return {"Lora hashes": ", ".join(f"{lora.name}: {lora.hash}" for lora in loras)} if loras else {}


def _name(file: Path) -> str:
    name, folder = file.stem, file.resolve().parent
    if file.name in FILE_NAMES:
        name = folder.parent.name if folder.name == "final" else folder.name
        if re.fullmatch(r"step-\d+", folder.name):
            name = f"{folder.parent.name}-{folder.name}"
    return re.sub(r'[<>:,"\r\n]+', "_", name)  # what ends a name in the web UI's text


def _by_kohyas_names(file: Path) -> Path:
    """The file beside diffusers' own that people load in the web UI, where a run has left one; else `file`."""
    return next(file.parent.glob("*-kohya.safetensors"), file) if file.name in FILE_NAMES else file


def _web_ui_hash(file: Path) -> str:
    """That of the metadata, else the sha256 of everything behind the header, which other metadata does not change."""
    with safe_open(file, "pt") as stream:
        stored = (stream.metadata() or {}).get("sshs_model_hash", "")
    if re.fullmatch(r"[0-9a-f]{12,}", stored):
        return stored
    digest = hashlib.sha256()
    with file.open("rb") as data:
        data.seek(8 + int.from_bytes(data.read(8), "little"))
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
