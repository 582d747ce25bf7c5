"""The prompts of a run: those it trains on, and those held out for validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from draftcli.config import Config, SamplingConfig
from draftcli.prompts import PromptList, PromptSequence, read_prompts


@dataclass(frozen=True)
class PromptSets:
    """Both sets; `source` is data.prompts, for messages."""

    source: str | list[str]
    training: PromptSequence
    validation: PromptSequence

    def notes_for(self, sampling: SamplingConfig) -> list[str]:
        """What people should know of them where pictures are drawn as `sampling` says, a line each."""
        return list(dict.fromkeys(self.training.notes_for(sampling) + self.validation.notes_for(sampling)))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of them: sha256 and count of the training's, and the sha256 of the validation's."""
        return {
            "sha256": self.training.sha256,
            "count": len(self.training),
            "validation": self.validation.sha256,
        }

    def changes_since(self, facts: Mapping[str, Any]) -> list[str]:
        """In words, what is no longer as it was when a checkpoint got its `facts`."""
        now, changes = self.facts, []
        if facts["sha256"] != now["sha256"]:
            changes.append(
                f"data.prompts {self.source} has changed since this run started: it had {facts['count']} prompts "
                f"and now has {now['count']}; the new ones are used"
            )
        if facts.get("validation", now["validation"]) != now["validation"]:
            changes.append(
                "data.validation_prompts have changed since this run started: earlier scores, also those that choose "
                "the best step, are of other images"
            )
        return changes


def read_prompt_sets(cfg: Config) -> PromptSets:
    """Read data.prompts and data.validation_prompts.

    Raises:
        InputError: one of them cannot be read.
    """
    held_out: PromptSequence = PromptList()
    if cfg.data.validation_prompts:
        held_out = read_prompts(cfg.data.validation_prompts, "data.validation_prompts")
    return PromptSets(cfg.data.prompts, read_prompts(cfg.data.prompts), held_out)
