"""The size of a device, as --fit takes it. Without torch: a typo costs no import of it."""

from __future__ import annotations

import re

from draftcli.errors import InputError

_UNITS = {"MB": 1e6, "MIB": 2**20, "GB": 1e9, "GIB": 2**30, "TB": 1e12, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of `24GB`, `16GiB`, `500MB`, `24G`; a number alone is GB.

    Raises:
        InputError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?B?)?\s*", text, re.IGNORECASE)
    unit = (match[2] or "GB").upper() if match else ""
    unit = unit if unit.endswith("B") else f"{unit}B"
    if match is None or unit not in _UNITS or float(match[1]) <= 0:
        raise InputError(f"--fit {text}: expected a size with a unit, such as 12GB, 16GB, 24GB, 40GB or 80GB")
    return int(float(match[1]) * _UNITS[unit])
