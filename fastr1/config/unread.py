"""Settings that differ from their defaults and that nothing would read, because of what the others say.

A value without effect is refused with what to do about it: who wrote it expects something of it. Not refused are those
that one switch turns off for a while: `data.eval_file` and what belongs to it stay where `run.eval_steps` is 0, and
`optim.num_train_epochs` beside `optim.max_steps`. Nor is `false` where it is what happens anyway (`run.roofline`,
`rollout.keep_arenas`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fastr1.config.fields import TrainConfig

_TINYLLAVA_REWARD = "tinyllava_video_r1"
_ITS_CONSTANTS = ("mode", "base", "length_bonus", "correct", "max_think_chars", "bad_format")
# What supervised fine-tuning answers its held-out questions with.
_TO_ANSWER = ("data.instruction", "grpo.max_completion_length", "grpo.stop_strings", "rollout.backend")


def unread_settings(config: TrainConfig) -> Iterator[str]:
    """A sentence with name, value and remedy about each of them."""
    changed = dict(_changed(config))
    if config.task == "sft":
        yield from _unread_by_supervised(config, changed)
    for reason, names in _unread_names(config):
        for name in names:
            if name in changed:
                yield f"{name} is {show(changed[name])}{reason}"


def show(value: Any) -> str:
    """As it was written, nearly."""
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def _changed(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """("section.name", value) of every setting that is not at its default."""
    default = TrainConfig()
    for section in ("model", "data", "reward", "grpo", "rollout", "optim", "run"):
        part = getattr(config, section)
        for field in dataclasses.fields(part):
            if getattr(part, field.name) != getattr(getattr(default, section), field.name):
                yield f"{section}.{field.name}", getattr(part, field.name)


def _unread_by_supervised(config: TrainConfig, changed: dict[str, Any]) -> Iterator[str]:
    """All at once, which are many in the configuration of a GRPO run."""
    asks = config.data.eval_file is not None
    found = [
        name
        for name in changed
        if name.startswith(("grpo.", "reward.")) or name in (*_TO_ANSWER, "rollout.num_speculative_tokens")
        if not (asks and name in _TO_ANSWER)
    ]
    if found:
        values = ", ".join(f"{name} is {show(changed[name])}" for name in found)
        unless = " without data.eval_file" if set(found) <= set(_TO_ANSWER) else ""
        yield f"{values}, which task 'sft' does not read{unless}: leave {'it' if len(found) == 1 else 'them'} out"


def _unread_names(config: TrainConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Why they are not read and what to do, behind a name and its value; and the names."""
    data, reward, grpo, run = config.data, config.reward, config.grpo, config.run
    names: tuple[str, ...]
    if data.eval_file is None:
        names = ("data.eval_video_root", "run.eval_samples", "run.per_device_eval_batch_size")
        yield " but data.eval_file is not set, so nothing is evaluated: set it, or leave this out", names
    if data.policy == "error":
        reason = " but data.policy is 'error', which stops at the first bad row: choose 'skip', or leave this out"
        yield reason, ("data.max_bad_fraction",)
    if run.resume_from_checkpoint is None:
        reason = " but run.resume_from_checkpoint is not set, so nothing is compared: set it, or leave this out"
        yield reason, ("run.allow_changed",)
    if _TINYLLAVA_REWARD not in reward.functions:
        reason = f", which only the reward {_TINYLLAVA_REWARD!r} reads, and reward.functions is "
        names = tuple(f"reward.{name}" for name in _ITS_CONSTANTS)
        yield f"{reason}{show(reward.functions)}: name it there, or leave this out", names
    if grpo.sampler_correction == "none":
        yield ", which has no effect without grpo.sampler_correction: set it too", ("grpo.sampler_cap",)
    if grpo.sampler_correction != "icepop":
        reason = f"{grpo.sampler_correction!r}, and only 'icepop' reads it: leave it out"
        yield f" but grpo.sampler_correction is {reason}", ("grpo.sampler_floor",)
    if grpo.scale_rewards == "none":
        yield ", which has no effect with grpo.scale_rewards 'none': leave it out", ("grpo.advantage_eps",)
