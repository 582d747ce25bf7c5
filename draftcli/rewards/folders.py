"""Rewards that `draftp rewards train` has left: a folder that is named by its path. Nothing here needs torch.

config.json of such a folder has a section `draftp_reward`. What is trained is one of three: `head`, a few weights on
the features of a CLIP that is elsewhere; `lora`, an adapter of one; `whole`, a CLIP of its own in transformers' format.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from draftcli.errors import InputError, brief

Trained = Literal["head", "lora", "whole"]
CONFIG, SECTION, WEIGHTS = "config.json", "draftp_reward", "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"  # of a LoRA, as peft names it
FOLDER_FORMAT = 1


@dataclass(frozen=True)
class Start:
    """The CLIP that a reward was trained from, as `load_reward` takes it.

    Attributes:
        reward: its name, or the path of another trained reward.
        pretrained: its weights, where they are not the reward's own.
        backbone: its tokenizer and preprocessor, where they are elsewhere.
    """

    reward: str
    pretrained: str | None = None
    backbone: str | None = None


@dataclass(frozen=True)
class RewardFolder:
    """A trained reward as its config.json has it.

    Attributes:
        path: of the folder.
        trained: what was.
        start: from which CLIP.
        network: a hash of that CLIP's weights; empty for `whole`, which has its own.
        fit: how a picture becomes the square that the network sees, see `draftcli.rewards.pixels`.
    """

    path: Path
    trained: Trained
    start: Start
    network: str
    fit: str

    def section(self) -> dict[str, Any]:
        """What config.json says under `draftp_reward`."""
        return {
            "format": FOLDER_FORMAT, "trained": self.trained, "from": asdict(self.start), "network": self.network,
            "fit": self.fit,
        }  # fmt: skip


def is_path(name: str) -> bool:
    """Whether a reward's name is that of a folder rather than of an object or a known reward."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    return ":" not in name and (name.startswith((".", "~")) or "/" in name or os.sep in name)


def read_reward_folder(name: str) -> RewardFolder:
    """The trained reward in the folder `name`.

    Raises:
        InputError: there is no such folder, or no trained reward in it.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise InputError(
            f"reward {name}: there is no such folder; a path names a folder that draftp rewards train left"
        )
    config = path / CONFIG
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        section = found.get(SECTION) if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        section = None
    if section is None:
        raise InputError(
            f"reward {name}: the folder holds no reward of draftp rewards train (its {CONFIG} has no {SECTION}); a "
            f"CLIP's folder goes into the setting pretrained of pickscore or clip"
        )
    try:
        if section["format"] > FOLDER_FORMAT:
            raise InputError(f"reward {name}: written by a newer draftp (format {section['format']}); update draftp")
        trained, start = section["trained"], Start(**section["from"])
        if trained not in get_args(Trained):
            raise ValueError(trained)
        return RewardFolder(path, trained, start, str(section["network"]), str(section["fit"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"reward {name}: {config} is damaged ({SECTION}: {brief(error)}); train it again") from None
