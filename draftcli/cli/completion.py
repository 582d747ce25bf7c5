"""What a shell completes after TAB: names that are at hand here. `draftp --install-completion` switches it on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def complete_presets(incomplete: str) -> list[str]:
    """Presets that ship with draftp."""
    from draftcli.config import preset_names

    return _starting(incomplete, preset_names())


def complete_runs(incomplete: str) -> list[str]:
    """Runs under runs/, by their name or their path, as it was begun."""
    found = sorted(config.parent for config in Path("runs").glob("*/config.yaml"))
    return _starting(incomplete, [*(run.name for run in found), *map(str, found)] if incomplete else map(str, found))


def complete_rewards(incomplete: str) -> list[str]:
    """Rewards that draftp or a plug-in brings."""
    from draftcli.rewards.catalogue import known_rewards

    return _starting(incomplete, known_rewards())


def complete_settings(incomplete: str) -> list[str]:
    """Settings, as --set takes them: KEY=."""
    from draftcli.config import all_settings

    return _starting(incomplete, (f"{s.key}=" for s in all_settings() if ".NAME" not in s.key))


def complete_sections(incomplete: str) -> list[str]:
    """Sections of the settings, and the settings themselves."""
    from draftcli.config import all_settings, section_names

    return _starting(incomplete, [*section_names(), *(setting.key for setting in all_settings())])


def _starting(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
