"""The arguments of merge-lora, checked without torch: a wrong name costs no import of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from draftcli.config import Precision, check_source, is_single_file
from draftcli.core.models.places import BUILT_IN, checked_file
from draftcli.errors import InputError
from draftcli.runs import find_run, split_scale

FORMAT_NAMES = ("diffusers", "single-file", "lora", "kohya")  # the classes are in formats.OUTPUT_FORMATS
VERIFICATIONS = ("keys", "forward")


def check_options(format_: str, scale: float, dtype: str | None, verify: str) -> None:
    """See that each option is one of those allowed.

    Args:
        format_: --format.
        scale: --scale.
        dtype: --dtype; None: not given.
        verify: --verify.

    Raises:
        InputError: one is not.
    """
    for option, given, allowed in (
        ("--format", format_, FORMAT_NAMES),
        ("--dtype", dtype, get_args(Precision)),
        ("--verify", verify, VERIFICATIONS),
    ):
        if given is not None and given not in allowed:
            raise InputError(f"{option} {given}: allowed are {', '.join(allowed)}")
    if scale == 0 or not math.isfinite(scale):
        raise InputError(f"--scale {scale:g} would change nothing; give a finite number that is not 0")


def check_arguments(inputs: Sequence[str], base: str | None, config: str | None = None, vae: str | None = None) -> None:
    """See that the inputs, the base, its configuration and another VAE are there; no inputs mean the newest run.

    Raises:
        InputError: one is not, a scale is no number, or there is no run.
    """
    for text in inputs:
        parse_input(text)
    if not inputs:
        find_run(None)
    for option, model in (("--base", base), ("--vae", vae)):
        if model is not None and is_single_file(model):
            checked_file(model, option)
        elif model is not None and model not in BUILT_IN:
            check_source(option, model, "a diffusers folder, a hub id such as OWNER/NAME or a .safetensors file")
    if config is not None:
        check_source("--config", config, "a diffusers folder or a hub id such as OWNER/NAME")


def parse_input(text: str) -> tuple[str, float]:
    """The name and the scale of `RUN`, `LORA` or either with `=SCALE`.

    Raises:
        InputError: nothing is there, or the scale is no number.
    """
    name, scale = split_scale(text, _is_there, text)
    if not _is_there(name):
        raise InputError(f"{name}: there is no such run, folder or file")
    return name, scale


def _is_there(name: str) -> bool:
    return Path(name).exists() or (Path("runs") / name / "config.yaml").is_file()
