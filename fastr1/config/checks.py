"""Range, choice and conflict checks of a configuration, run before torch is loaded.

Each rule is stated once: modules that take a setting as an argument ask `check_value`, `check_reward` or
`check_deepspeed` for the same refusal.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

from fastr1.config.fields import GRPOConfig, ModelPart, RewardConfig, TrainConfig, choices_of
from fastr1.config.losses import loss_options
from fastr1.config.unread import show, unread_settings


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
    "data_efficiency": "run.seed",
}

# What else of DeepSpeed's has one value here.
_DEEPSPEED_ALWAYS = {
    ("zero_allow_untested_optimizer",): True,
    ("zero_force_ds_cpu_optimizer",): False,
    ("compile", "deepcompile"): False,
}

_AT_LEAST_ZERO: tuple[Callable[[Any], bool], str] = (lambda value: value >= 0, "0 or more")
_ABOVE_ZERO: tuple[Callable[[Any], bool], str] = (lambda value: value > 0, "more than 0")
_AT_LEAST_ONE: tuple[Callable[[Any], bool], str] = (lambda value: value >= 1, "1 or more")
_SHARE: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value <= 1, "between 0 and 1")
_DECAY: tuple[Callable[[Any], bool], str] = (lambda value: 0 <= value < 1, "at least 0 and less than 1")
_GIVEN: tuple[Callable[[Any], bool], str] = (lambda value: value != "", "set; it has no default")

_PATHS = (
    *("model.path", "data.train_file", "data.video_root", "data.eval_file", "data.eval_video_root"),
    *("run.output_dir", "run.resume_from_checkpoint"),
)

# None always passes: it is only reachable where the field allows it.
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model.path": _GIVEN,
    "model.attn_implementation": _GIVEN,
    "data.train_file": _GIVEN,
    "data.video_root": (lambda value: value != "", 'set; "." is the current directory'),
    "data.eval_file": (lambda value: value != "", "an annotation file or null"),
    "data.eval_video_root": (lambda value: value != "", "a folder, or null for data.video_root"),
    "data.num_frames": (lambda value: value == -1 or value >= 1, "1 or more, or -1 for one frame per second"),
    "data.max_frames": _AT_LEAST_ONE,
    "data.max_bad_fraction": _SHARE,
    "data.num_decode_threads": _AT_LEAST_ONE,
    "reward.functions": (lambda value: len(value) >= 1, "a list of at least one reward function"),
    "reward.max_think_chars": _AT_LEAST_ONE,
    "reward.num_workers": (lambda value: value >= 0, "0 or more; 0 runs rewards in the training process"),
    "reward.timeout_seconds": _ABOVE_ZERO,
    "grpo.num_generations": (lambda value: value >= 2, "2 or more: a group of one has no advantage to learn from"),
    "grpo.top_k": (lambda value: value >= 0, "0 or more; 0 samples from the full vocabulary"),
    "grpo.top_p": (lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "grpo.min_p": (lambda value: 0 <= value <= 1, "0 to 1; 0 samples from the full vocabulary"),
    "grpo.stop_strings": (lambda value: "" not in value, "strings that are not empty"),
    "grpo.advantage_noise_std": _AT_LEAST_ZERO,
    "grpo.num_iterations": _AT_LEAST_ONE,
    "grpo.max_num_gen_batches": _AT_LEAST_ONE,
    "grpo.steps_per_generation": _AT_LEAST_ONE,
    "rollout.num_speculative_tokens": (lambda value: 0 <= value <= 32, "0 to 32; 0 guesses nothing ahead"),
    "optim.learning_rate": _AT_LEAST_ZERO,
    "optim.warmup_ratio": _SHARE,
    "optim.weight_decay": _AT_LEAST_ZERO,
    "optim.adam_beta1": _DECAY,
    "optim.adam_beta2": _DECAY,
    "optim.adam_epsilon": _ABOVE_ZERO,
    "optim.max_grad_norm": (lambda value: value >= 0, "0 or more; 0 does not clip"),
    "optim.num_train_epochs": (lambda value: 0 < value <= 1e9, "more than 0 and at most 1e9"),
    "optim.max_steps": (lambda value: value == -1 or value >= 1, "1 or more, or -1 to use optim.num_train_epochs"),
    "optim.per_device_train_batch_size": _AT_LEAST_ONE,
    "optim.gradient_accumulation_steps": _AT_LEAST_ONE,
    "optim.max_tokens_per_micro_batch": _AT_LEAST_ONE,
    "run.output_dir": _GIVEN,
    "run.seed": (lambda value: 0 <= value < 2**63, "0 or more and less than 2**63"),
    "run.logging_steps": _AT_LEAST_ONE,
    "run.save_steps": (lambda value: value >= 0, "0 or more; 0 leaves checkpoints to run.save_minutes"),
    "run.save_minutes": (lambda value: value >= 0, "0 or more; 0 leaves checkpoints to run.save_steps"),
    "run.save_total_limit": _AT_LEAST_ONE,
    "run.eval_steps": (lambda value: value >= 0, "0 or more; 0 never evaluates during training"),
    "run.eval_samples": _AT_LEAST_ONE,
    "run.per_device_eval_batch_size": _AT_LEAST_ONE,
    "run.report_frames": (lambda value: value >= 0, "0 or more MiB; 0 writes no contact sheets"),
    "run.resume_from_checkpoint": (lambda value: value != "", 'a checkpoint folder, "last" or null'),
}


def check_config(config: TrainConfig) -> None:
    """Refuses values out of range, unknown choices and settings that contradict each other.

    Raises: ConfigError for the first problem found, with the full key and the value received.
    """
    for key, value in _settings(config):
        check_value(key, value)
    for problem in unread_settings(config):
        raise ConfigError(problem)
    check_reward(config.reward)
    _check_loss(config.grpo)
    _check_conflicts(config)
    check_deepspeed(config.deepspeed, config.model.dtype)


def check_value(key: str, value: Any) -> None:
    """Refuses a value that the setting called `key` ("data.policy") may not have, whatever the other settings.

    Raises: ConfigError naming key, value and what is allowed.
    """
    choices = _CHOICES.get(key, ())
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise ConfigError(f"{key} is {item!r}; choose from {', '.join(choices)}")
    if choices and isinstance(value, tuple) and len(set(value)) != len(value):
        raise ConfigError(f"{key} names an entry twice: {list(value)}")
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(f"{key} is {show(value)}; it must be finite")
        if type(item) is int and abs(item) >= 2**63:
            raise ConfigError(f"{key} is {show(value)}; it must be less than 2**63")
        if isinstance(item, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in item):
            raise ConfigError(f"{key} is {show(value)}; it holds a zero byte or half of a surrogate pair: remove it")
    if key in _PATHS and value is not None and value.split("/")[0] == "~":
        written = os.path.expanduser(value)
        raise ConfigError(f"{key} is {value!r}; ~ is a name like any other here, write {written!r}")
    is_valid, words = _LIMITS.get(key, (None, ""))
    if value is not None and is_valid is not None and not is_valid(value):
        raise ConfigError(f"{key} is {show(value)}; it must be {words}")


def check_reward(reward: RewardConfig) -> None:
    """Refuses rewards that name no function, weigh none, or have constants out of range. Raises: ConfigError."""
    for field in dataclasses.fields(reward):
        check_value(f"reward.{field.name}", getattr(reward, field.name))
    if len(set(reward.functions)) != len(reward.functions):
        raise ConfigError(f"reward.functions names a function twice: {list(reward.functions)}; use reward.weights")
    _check_reward_calls(reward)
    if reward.weights is None:
        return
    if len(reward.weights) != len(reward.functions):
        raise ConfigError(
            f"reward.weights has {len(reward.weights)} numbers for {len(reward.functions)} reward.functions"
        )
    if not any(reward.weights):
        raise ConfigError(
            f"reward.weights is {list(reward.weights)}; nothing would be rewarded, make one of them non-zero"
        )


def _check_reward_calls(reward: RewardConfig) -> None:
    """Refuses settings about calls that nothing would read."""
    if reward.timeout_reward is not None and reward.timeout_seconds is None:
        raise ConfigError(
            f"reward.timeout_reward is {reward.timeout_reward} but reward.timeout_seconds is not set, so no call times "
            "out; set it too, or leave both out"
        )
    if not any(":" in name for name in reward.functions):
        for name in ("num_workers", "timeout_seconds"):
            value = getattr(reward, name)
            if value != getattr(RewardConfig, name):
                raise ConfigError(
                    f"reward.{name} is {value} but reward.functions is {list(reward.functions)}, all built in, and "
                    "these run in the training process: leave it out"
                )


def check_deepspeed(deepspeed: dict[str, Any], dtype: str) -> None:
    """Refuses what a DeepSpeed configuration must not say; `dtype` is that of the model ("auto" while not known).

    Raises: ConfigError naming the key and what to set instead.
    """
    cleaned = without_auto(deepspeed)
    for key, field in DEEPSPEED_OWNED_KEYS.items():
        if key in cleaned:
            raise ConfigError(f"deepspeed.{key} is {cleaned[key]!r}; it is not read, remove it and set {field} instead")
    for path, needed in _DEEPSPEED_ALWAYS.items():
        value: Any = cleaned
        for name in path:
            value = value.get(name, needed) if isinstance(value, dict) else needed
        if value is not needed:
            dotted = ".".join(path)
            raise ConfigError(f"deepspeed.{dotted} is {value!r}; it is always {str(needed).lower()} here: leave it out")
    zero = cleaned.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f'deepspeed.zero_optimization is {zero!r}; it must be an object such as {{"stage": 1}}')
    stage = zero.get("stage", 1)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage is {stage!r}; choose from 0, 1, 2, 3")
    if not zero.get("compute_grad_norm", True):
        raise ConfigError("deepspeed.zero_optimization.compute_grad_norm is false; remove it, the norm is logged")
    if stage == 0 and dtype == "bfloat16":
        raise ConfigError(
            "deepspeed.zero_optimization.stage is 0 with model.dtype 'bfloat16', so gradients would be summed in it; "
            "choose stage 1 (the same memory on one process) or float32"
        )


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration without the entries that are "auto", nor the sections that are empty without them."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        cleaned = without_auto(value) if isinstance(value, dict) else value
        if cleaned != "auto" and (cleaned != {} or value == {}):
            kept[key] = cleaned
    return kept


def _settings(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Every setting as ("section.name", value) but those of reward and deepspeed, which have checks of their own."""
    yield "task", config.task
    for section in ("model", "data", "grpo", "rollout", "optim", "run"):
        part = getattr(config, section)
        for field in dataclasses.fields(part):
            yield f"{section}.{field.name}", getattr(part, field.name)


def _all_choices() -> dict[str, tuple[str, ...]]:
    """Dotted key → allowed values, from the types of the fields."""
    found: dict[str, tuple[str, ...]] = {}
    for name, hint in get_type_hints(TrainConfig).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{key}": choices_of(inner) for key, inner in get_type_hints(hint).items()}
        else:
            found[name] = choices_of(hint)
    return found


_CHOICES = _all_choices()


def _check_conflicts(config: TrainConfig) -> None:
    """Settings that are fine alone but would contradict or silently disable each other together."""
    data, run = config.data, config.run
    if set(config.model.freeze) == set(get_args(ModelPart)):
        raise ConfigError(f"model.freeze is {list(config.model.freeze)}; nothing is left to train, remove one")
    _check_steps(config)
    if data.max_frames is not None and data.num_frames != -1:
        raise ConfigError(
            f"data.max_frames is {data.max_frames} but data.num_frames is {data.num_frames}; the cap belongs to "
            "one frame per second: set data.num_frames to -1 or data.max_frames to null"
        )
    if config.rollout.backend == "eager" and config.rollout.num_speculative_tokens:
        raise ConfigError(
            f"rollout.num_speculative_tokens is {config.rollout.num_speculative_tokens} but rollout.backend is "
            "'eager', which guesses nothing ahead; set it to 0, or choose the backend 'engine'"
        )
    if run.eval_steps > 0 and data.eval_file is None:
        raise ConfigError(
            f"run.eval_steps is {run.eval_steps} but data.eval_file is not set; set it or run.eval_steps to 0"
        )


def _check_steps(config: TrainConfig) -> None:
    """Several steps of the optimizer on one rollout."""
    grpo, accumulation = config.grpo, config.optim.gradient_accumulation_steps
    steps = grpo.steps_per_generation or accumulation
    if steps % accumulation:
        raise ConfigError(
            f"grpo.steps_per_generation is {steps}; it must be a multiple of optim.gradient_accumulation_steps, "
            f"{accumulation}"
        )
    num_steps = steps // accumulation * grpo.num_iterations
    if num_steps > 1 and loss_options(grpo).loss.is_on_policy:
        raise ConfigError(
            f"grpo.num_iterations={grpo.num_iterations} and grpo.steps_per_generation={grpo.steps_per_generation} take "
            f"{num_steps} steps of the optimizer per rollout, and grpo.loss_type={grpo.loss_type!r} knows no older "
            "policy: leave them out, or use 'grpo' or 'dapo'"
        )
    from_all = [name for name in ("beta", "entropy_coef", "advantage_noise_std") if getattr(grpo, name) != 0]
    if grpo.max_num_gen_batches > 1 and from_all:
        raise ConfigError(
            f"grpo.max_num_gen_batches={grpo.max_num_gen_batches} has no effect with grpo.{from_all[0]}, which gives "
            "every group a signal: leave one of them out"
        )


# The one objective that reads an option; the kernels take it with the others too, where it does nothing.
_READ_BY = {"epsilon": "clipped", "sapo_temperature_pos": "sigmoid", "sapo_temperature_neg": "sigmoid"}


def _check_loss(grpo: GRPOConfig) -> None:
    """The rules of the loss's own package, in the words of the configuration; and what a run would ignore."""
    options = loss_options(grpo)
    try:
        options.check()
    except ValueError as error:
        raise ConfigError(f"grpo.{error}") from None
    for name, objective in _READ_BY.items():
        value, default = getattr(grpo, name), getattr(GRPOConfig, name)
        if value != default and options.loss.objective != objective:
            raise ConfigError(
                f"grpo.{name}={value!r} has no effect on grpo.loss_type={grpo.loss_type!r}, whose objective is "
                f"{options.loss.objective}: leave it out, or choose a loss that is {objective}"
            )
    if grpo.beta == 0 and grpo.kl_estimator != GRPOConfig.kl_estimator:
        raise ConfigError(f"grpo.kl_estimator={grpo.kl_estimator!r} has no effect with grpo.beta=0: leave it out")
