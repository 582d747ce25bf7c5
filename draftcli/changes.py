"""What differs between the sessions of one run, and what of it would make it another run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftcli.errors import brief

# What may differ between the sessions of one run; anything else would make it another run.
MAY_CHANGE = (
    *("trainer.max_steps", "trainer.val_check_interval", "trainer.save_interval", "trainer.keep_checkpoints"),
    *("trainer.micro_batch_size", "model.offload_text_encoders", "ema.device"),  # memory alone, as all of sharding
    "data.validation_cache",  # where figures are kept that are the same anywhere
)
MAY_CHANGE_SECTIONS = ("logging", "monitor", "sharding")
# Files that may be edited where they are: a checkpoint knows their prompts, and a warning says that they are others.
MAY_BE_EDITED = ("data.prompts", "data.validation_prompts")
Change = tuple[str, Any, Any]  # a setting by its dotted key, its old value and its new one


def differences(old: Any, new: Any, key: str = "") -> list[Change]:
    """Every setting, below `key`, that is not the same in both."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        return [d for n in names for d in differences(old.get(n), new.get(n), f"{key}.{n}" if key else str(n))]
    return [] if old == new else [(key, old, new)]


def change_in_words(change: Change) -> str:
    """For people."""
    key, old, new = change
    return f"{key} was {brief(old)}, is {brief(new)}"


def refused_changes(changed: Sequence[Change], contents: Mapping[str, str | None]) -> list[str]:
    """In words, what makes it another run: a setting, but no path of the same files; other files under an old path.

    Args:
        changed: what differs in the settings.
        contents: by setting, what is different in the files that it names; None where nothing is.
    """
    refused = [
        change_in_words(change) + (f", where {contents[change[0]]}" if contents.get(change[0]) else "")
        for change in changed
        if not _may_change(change[0]) and contents.get(change[0], "unknown") is not None
    ]
    keys = {*MAY_BE_EDITED, *(key for key, *_ in changed)}
    return refused + [f"{key} is as it was, but {what}" for key, what in contents.items() if what and key not in keys]


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.partition(".")[0] in MAY_CHANGE_SECTIONS
