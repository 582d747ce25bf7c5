"""What a setting may name outside of draftp, checked by its form: neither torch nor the network is asked."""

from __future__ import annotations

import re
from pathlib import Path

from draftcli.errors import InputError


def is_single_file(source: str) -> bool:
    """Whether a model is one file rather than a folder or a hub id."""
    return source.endswith((".safetensors", ".ckpt"))


def is_hub_id(source: str) -> bool:
    """Whether a model is one of the Hub rather than a file, a folder or a built-in one."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None
    return is_id and not is_single_file(source) and not Path(source).exists()


def check_source(setting: str, source: str, allowed: str) -> None:
    """See that `source` is a file or folder that is there, or may be an id of the Hub.

    Args:
        setting: what the user calls it.
        source: its value.
        allowed: what can be given, for the message.

    Raises:
        InputError: it is neither.
    """
    if not Path(source).exists() and not is_hub_id(source):
        raise InputError(f"{setting} {source!r}: there is no such file or folder; give {allowed}")


def check_device_name(device: str, setting: str = "model.device") -> None:
    """Raise InputError where `device` names none that draftp knows; `setting` is what the user calls it."""
    if re.fullmatch(r"auto|(cpu|mps)(:0)?|cuda(:\d+)?", device) is None:
        raise InputError(f"{setting} {device!r}: allowed are auto, cpu, cuda, cuda:N and mps")
