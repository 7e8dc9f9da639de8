"""Configuration: every setting and default (`fields`), reading and writing JSON (`loading`), refusals (`checks`)."""

from fastr1.config.checks import ConfigError, check_config
from fastr1.config.fields import (
    INSTRUCTION,
    DataConfig,
    GRPOConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    RunConfig,
    TrainConfig,
)
from fastr1.config.loading import config_to_dict, load_config, save_config

__all__ = [
    "INSTRUCTION",
    "ConfigError",
    "DataConfig",
    "GRPOConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RunConfig",
    "TrainConfig",
    "check_config",
    "config_to_dict",
    "load_config",
    "save_config",
]
