"""Range, choice and conflict checks of a configuration, run before any model is built (standard library only)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastr1.config.fields import TrainConfig


class ConfigError(ValueError):
    """The configuration is wrong. The message names the key, the value received and the remedy."""


# Keys of a DeepSpeed configuration that follow from the fields named here.
DEEPSPEED_OWNED_KEYS = {
    "train_batch_size": "optim.per_device_train_batch_size and optim.gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "optim.per_device_train_batch_size",
    "gradient_accumulation_steps": "optim.gradient_accumulation_steps",
    "managed_gradient_accumulation": "optim.gradient_accumulation_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.learning_rate, optim.weight_decay and optim.adam_*",
    "scheduler": "optim.lr_scheduler_type and optim.warmup_ratio",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}

_MODULES = ("vision_tower", "connector", "language_model")

_CHOICES: dict[str, tuple[str, ...]] = {
    "task": ("grpo", "sft"),
    "model.dtype": ("auto", "bfloat16", "float32"),
    "model.freeze": _MODULES,
    "data.policy": ("error", "skip"),
    "data.backend": ("auto", "torchcodec", "pyav"),
    "reward.mode": ("code", "paper"),
    "grpo.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "tinyllava_video_r1"),
    "grpo.scale_rewards": ("group", "batch", "none"),
    "grpo.importance_sampling_level": ("token", "sequence"),
    "optim.lr_scheduler_type": ("cosine", "linear", "constant"),
    "run.report_to": ("jsonl", "tensorboard"),
}

_AT_LEAST_ZERO: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "0 or more")
_ABOVE_ZERO: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "more than 0")
_AT_LEAST_ONE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 1, "1 or more")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value <= 1, "between 0 and 1")
_DECAY: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < 1, "at least 0 and less than 1")
_GIVEN: tuple[Callable[[Any], bool], str] = (lambda value: value != "", "set; it has no default")

# None always passes: it is only reachable where the field allows it.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model.path": _GIVEN,
    "model.attn_implementation": _GIVEN,
    "data.train_file": _GIVEN,
    "data.video_root": (lambda value: value != "", 'set; "." is the current directory'),
    "data.num_frames": (lambda value: value == -1 or value >= 1, "1 or more, or -1 for one frame per second"),
    "data.max_frames": _AT_LEAST_ONE,
    "data.max_bad_fraction": _SHARE,
    "data.num_decode_threads": _AT_LEAST_ONE,
    "reward.functions": (lambda value: len(value) >= 1, "a list of at least one reward function"),
    "reward.max_think_chars": _AT_LEAST_ONE,
    "grpo.num_generations": (lambda value: value >= 2, "2 or more: a group of one has no advantage to learn from"),
    "grpo.max_completion_length": _AT_LEAST_ONE,
    "grpo.temperature": _ABOVE_ZERO,
    "grpo.top_k": (lambda value: value >= 0, "0 or more; 0 samples from the full vocabulary"),
    "grpo.top_p": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "grpo.beta": _AT_LEAST_ZERO,
    "grpo.epsilon": _AT_LEAST_ZERO,
    "grpo.epsilon_high": _AT_LEAST_ZERO,
    "grpo.advantage_eps": _ABOVE_ZERO,
    "grpo.advantage_noise_std": _AT_LEAST_ZERO,
    "optim.learning_rate": _AT_LEAST_ZERO,
    "optim.warmup_ratio": _SHARE,
    "optim.weight_decay": _AT_LEAST_ZERO,
    "optim.adam_beta1": _DECAY,
    "optim.adam_beta2": _DECAY,
    "optim.adam_epsilon": _ABOVE_ZERO,
    "optim.max_grad_norm": (lambda value: value >= 0, "0 or more; 0 does not clip"),
    "optim.num_train_epochs": _ABOVE_ZERO,
    "optim.max_steps": (lambda value: value == -1 or value >= 1, "1 or more, or -1 to use optim.num_train_epochs"),
    "optim.per_device_train_batch_size": _AT_LEAST_ONE,
    "optim.gradient_accumulation_steps": _AT_LEAST_ONE,
    "run.output_dir": _GIVEN,
    "run.seed": _AT_LEAST_ZERO,
    "run.logging_steps": _AT_LEAST_ONE,
    "run.save_steps": (lambda value: value >= 0, "0 or more; 0 writes no checkpoint, only the final model"),
    "run.save_total_limit": _AT_LEAST_ONE,
    "run.eval_steps": (lambda value: value >= 0, "0 or more; 0 never evaluates during training"),
    "run.eval_samples": _AT_LEAST_ONE,
    "run.resume_from_checkpoint": (lambda value: value != "", 'a checkpoint folder, "last" or null'),
}


def check_config(config: TrainConfig) -> None:
    """Refuses values out of range, unknown choices and settings that contradict each other.

    Raises: ConfigError for the first problem found, with the full key and the value received.
    """
    for key, choices in _CHOICES.items():
        value = _get(config, key)
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise ConfigError(f"{key} is {item!r}; choose from {', '.join(choices)}")
        if isinstance(value, tuple) and len(set(value)) != len(value):
            raise ConfigError(f"{key} names an entry twice: {list(value)}")
    for key, (is_valid, words) in _LIMITS.items():
        value = _get(config, key)
        if value is not None and not is_valid(value):
            raise ConfigError(f"{key} is {_show(value)}; it must be {words}")
    _check_conflicts(config)
    _check_deepspeed(config)


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration without the entries that are "auto", nor the sections that are empty without them."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        cleaned = without_auto(value) if isinstance(value, dict) else value
        if cleaned != "auto" and (cleaned != {} or value == {}):
            kept[key] = cleaned
    return kept


def _get(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _show(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _check_conflicts(config: TrainConfig) -> None:
    """Settings that are fine alone but would contradict or silently disable each other together."""
    data, reward, grpo, run = config.data, config.reward, config.grpo, config.run
    if set(config.model.freeze) == set(_MODULES):
        raise ConfigError(f"model.freeze is {list(config.model.freeze)}; nothing is left to train, remove one")
    if data.max_frames is not None and data.num_frames != -1:
        raise ConfigError(
            f"data.max_frames is {data.max_frames} but data.num_frames is {data.num_frames}; the cap belongs to "
            "one frame per second: set data.num_frames to -1 or data.max_frames to null"
        )
    if reward.weights is not None and len(reward.weights) != len(reward.functions):
        raise ConfigError(
            f"reward.weights has {len(reward.weights)} numbers for {len(reward.functions)} reward.functions"
        )
    if reward.weights is not None and not any(reward.weights):
        raise ConfigError(
            f"reward.weights is {list(reward.weights)}; nothing would be rewarded, make one of them non-zero"
        )
    upper = "epsilon" if grpo.epsilon_high is None else "epsilon_high"
    if grpo.delta is not None and grpo.delta <= 1 + getattr(grpo, upper):
        raise ConfigError(
            f"grpo.delta is {grpo.delta}; it bounds the ratio from above and must be more than 1 + grpo.{upper} = "
            f"{1 + getattr(grpo, upper)}"
        )
    if grpo.loss_type == "tinyllava_video_r1":
        _refuse_clipping_options(config)
    if run.eval_steps > 0 and data.eval_file is None:
        raise ConfigError(
            f"run.eval_steps is {run.eval_steps} but data.eval_file is not set; set it or run.eval_steps to 0"
        )


def _refuse_clipping_options(config: TrainConfig) -> None:
    """The loss of the original has no ratio to clip, so options about the ratio would have no effect."""
    defaults = type(config.grpo)()
    for name in ("epsilon", "epsilon_high", "delta", "importance_sampling_level"):
        value = getattr(config.grpo, name)
        if value != getattr(defaults, name):
            raise ConfigError(
                f"grpo.{name} is {value!r} but grpo.loss_type 'tinyllava_video_r1' does not clip; remove it or choose "
                "the loss type grpo"
            )


def _check_deepspeed(config: TrainConfig) -> None:
    deepspeed = without_auto(config.deepspeed)
    for key, field in DEEPSPEED_OWNED_KEYS.items():
        if key in deepspeed:
            raise ConfigError(
                f"deepspeed.{key} is {deepspeed[key]!r}; it is not read, remove it and set {field} instead"
            )
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f'deepspeed.zero_optimization is {zero!r}; it must be an object such as {{"stage": 1}}')
    stage = zero.get("stage", 1)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage is {stage!r}; choose from 0, 1, 2, 3")
    if stage == 0 and config.model.dtype == "bfloat16":
        raise ConfigError(
            "deepspeed.zero_optimization.stage is 0 with model.dtype 'bfloat16', so gradients would be summed in it; "
            "choose stage 1 (the same memory on one process) or float32"
        )
