"""The settings: schema.py says what there is, rules.py what goes together, reading.py where they come from."""

from __future__ import annotations

from draftcli.config.listing import (
    Setting,
    SettingsSection,
    all_settings,
    find_settings,
    section_names,
    settings_schema,
    settings_sections,
)
from draftcli.config.outside import check_device_name, check_source, is_hub_id, is_single_file
from draftcli.config.presets import Preset, find_preset, list_presets
from draftcli.config.reading import (
    check_config,
    dump_config,
    load_config,
    parse_reward,
    preset_names,
    presets_folder,
)
from draftcli.config.rules import Purpose, check_batch_size, conflicts, without_effect
from draftcli.config.sampling import SamplingConfig
from draftcli.config.schema import (
    Config,
    DataConfig,
    DraftpConfig,
    EmaConfig,
    LoggingConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    PeftConfig,
    RelativeConfig,
    RewardConfig,
    RewardSource,
    SchedConfig,
    ShardingConfig,
    TrainerConfig,
    trained_signs,
)
from draftcli.config.section import Precision, expand_home

__all__ = [
    "Config",
    "DataConfig",
    "DraftpConfig",
    "EmaConfig",
    "LoggingConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "PeftConfig",
    "Precision",
    "Preset",
    "Purpose",
    "RelativeConfig",
    "RewardConfig",
    "RewardSource",
    "SamplingConfig",
    "SchedConfig",
    "Setting",
    "SettingsSection",
    "ShardingConfig",
    "TrainerConfig",
    "all_settings",
    "check_batch_size",
    "check_config",
    "check_device_name",
    "check_source",
    "conflicts",
    "dump_config",
    "expand_home",
    "find_preset",
    "find_settings",
    "is_hub_id",
    "is_single_file",
    "list_presets",
    "load_config",
    "parse_reward",
    "preset_names",
    "presets_folder",
    "section_names",
    "settings_schema",
    "settings_sections",
    "trained_signs",
    "without_effect",
]
