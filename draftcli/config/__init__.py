"""The settings: schema.py says what there is, rules.py what goes together, reading.py where they come from."""

from __future__ import annotations

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
    OptimConfig,
    PeftConfig,
    RelativeConfig,
    RewardConfig,
    RewardSource,
    SchedConfig,
    ShardingConfig,
    TrainerConfig,
)
from draftcli.config.section import Precision, expand_home

__all__ = [
    "Config",
    "DataConfig",
    "DraftpConfig",
    "EmaConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "PeftConfig",
    "Precision",
    "Purpose",
    "RelativeConfig",
    "RewardConfig",
    "RewardSource",
    "SamplingConfig",
    "SchedConfig",
    "ShardingConfig",
    "TrainerConfig",
    "check_batch_size",
    "check_config",
    "conflicts",
    "dump_config",
    "expand_home",
    "load_config",
    "parse_reward",
    "preset_names",
    "presets_folder",
    "without_effect",
]
