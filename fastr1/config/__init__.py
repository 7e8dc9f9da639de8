"""Configuration: every setting and default (`fields`), reading and writing JSON (`loading`), refusals (`checks`)."""

from fastr1.config.checks import ConfigError, check_config, check_deepspeed, check_reward, check_value, without_auto
from fastr1.config.fields import (
    INSTRUCTION,
    Backend,
    Control,
    DataConfig,
    Dtype,
    GRPOConfig,
    ModelConfig,
    ModelPart,
    OptimConfig,
    Policy,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from fastr1.config.loading import config_to_dict, load_config, save_config
from fastr1.config.losses import loss_options
from fastr1.config.shipped import PACKAGE, find_config, find_shipped, shipped_configs

__all__ = [
    "INSTRUCTION",
    "PACKAGE",
    "Backend",
    "ConfigError",
    "Control",
    "DataConfig",
    "Dtype",
    "GRPOConfig",
    "ModelConfig",
    "ModelPart",
    "OptimConfig",
    "Policy",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "check_config",
    "check_deepspeed",
    "check_reward",
    "check_value",
    "config_to_dict",
    "find_config",
    "find_shipped",
    "load_config",
    "loss_options",
    "save_config",
    "shipped_configs",
    "without_auto",
]
