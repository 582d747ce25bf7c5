"""What can be wrong with `draftp rewards train` and is found without torch: a wrong name costs no import of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from draftcli.config import check_device_name
from draftcli.errors import InputError
from draftcli.preferences.reading import reader_of
from draftcli.rewards.catalogue import check_names, known_rewards
from draftcli.rewards.folders import CONFIG, SECTION, is_path


def check_training(
    preferences: Path, start: str | None, judges: Sequence[str], device: str, output: Path, overwrite: bool
) -> None:
    """See that what was given is there, that its form is right, and that the reward may be written.

    Args:
        preferences: a file or folder, see `read_answers`.
        start: see `find_start`.
        judges: names of known rewards.
        device: as in `model.device`.
        output: see `check_output`.
        overwrite: likewise.

    Raises:
        InputError: it is not.
    """
    check_output(output, overwrite)
    reader_of(preferences)
    check_start_name(start)
    check_names(judges)
    check_device_name(device, "--device")


def check_start_name(name: str | None) -> None:
    """See that `--from` names a reward or a folder that is there; None is the default.

    Raises:
        InputError: it does not.
    """
    if name is None:
        return
    if not is_path(name) or name in known_rewards():
        check_names([name])
    elif not Path(name).expanduser().is_dir():
        raise InputError(f"--from {name}: there is no such folder")


def check_output(output: Path, overwrite: bool) -> None:
    """See that the folder may be written.

    Raises:
        InputError: something is there, and it is not a trained reward that may be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        known = SECTION in json.loads((output / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise InputError(f"--output {output}: something else is there; take another folder")
    if not overwrite:
        raise InputError(
            f"--output {output}: a trained reward is there; add --overwrite to replace it, or take another folder. A "
            "run that was trained on it will not go on with another one"
        )
