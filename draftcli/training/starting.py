"""What can be wrong with a training and is found without torch: a wrong name costs no import of it."""

from __future__ import annotations

from pathlib import Path

from draftcli.config import Config
from draftcli.core.models.places import check_model_files
from draftcli.errors import InputError
from draftcli.prompts import find_prompts
from draftcli.rewards import check_sources
from draftcli.runs import Run


def check_start(cfg: Config, folder: Path) -> None:
    """See that what the settings name is there.

    Args:
        cfg: the settings.
        folder: of the run.

    Raises:
        InputError: there is no such file, prompt set or reward, or the folder is something else than a run.
    """
    check_model_files(cfg.model)
    if cfg.peft.init_from is not None and not Path(cfg.peft.init_from).exists():
        raise InputError(f"peft.init_from {cfg.peft.init_from}: there is no such file or folder")
    for setting, source in (
        ("data.prompts", cfg.data.prompts),
        ("data.validation_prompts", cfg.data.validation_prompts),
    ):
        if isinstance(source, str):
            find_prompts(source, setting)
    check_sources({**cfg.rewards, **cfg.held_out})
    Run(folder).check_place()
