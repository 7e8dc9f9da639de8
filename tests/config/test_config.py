"""Loading, overriding, checking and saving configurations."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fastr1.config import (
    GRPOConfig,
    TrainConfig,
    config_to_dict,
    load_config,
    loss_options,
    save_config,
    shipped_configs,
)
from fastr1.config.checks import DEEPSPEED_OWNED_KEYS, ConfigError, without_auto
from fastr1.config.fields import choices_of
from fastr1_kernels.options import LOSSES, SCALES, LossOptions

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.json"))
MINIMAL = {"model": {"path": "m"}, "data": {"train_file": "t.jsonl", "video_root": "v"}}


def write(folder: Path, tree: Any, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "saved" / "config.json")
    assert load_config(tmp_path / "saved" / "config.json") == config


def test_there_are_shipped_configs() -> None:
    assert {"grpo.json", "demo_coldstart.json", "nextqa_grpo.json", "nextqa_coldstart.json"} <= {
        path.name for path in CONFIGS
    }


def test_shipped_config_is_found_by_its_name_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_config(shipped_configs()["grpo"])
    (tmp_path / "grpo").mkdir()  # a folder is no configuration
    for name in ("grpo", "grpo.json"):
        caplog.clear()
        assert load_config(name) == shipped
        assert caplog.messages == [f"no file {name} here: taking the shipped {shipped_configs()['grpo']}"]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")  # one process of a run says it
    assert load_config("grpo") == shipped
    write(tmp_path, MINIMAL, "grpo.json")
    assert load_config("grpo.json").model.path == "m"  # a file here comes first
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["grpp", "configs/grpo.json", "data/grpo"])
def test_a_name_that_is_neither_file_nor_shipped_lists_those_that_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(Path(name))
    assert message.startswith(f"cannot read {name}: No such file")
    assert "shipped configuration: demo_coldstart, grpo, nextqa_coldstart, nextqa_grpo" in message
    assert ("(--config grpo is the shipped one)" in message) == ("grpo" in name)


def test_model_path_inside_the_package(minimal: Path) -> None:
    config = load_config(minimal, ["model.path=fastr1:demo/base_model"])
    assert (Path(config.model.path) / "config.json").is_file()
    assert "shipped is fastr1:demo/base_model" in error_of(minimal, "model.path=fastr1:demo/bas_model")


def test_original_settings_of_the_paper_run() -> None:
    config = load_config(next(path for path in CONFIGS if path.name == "nextqa_grpo.json"))
    grpo, optim, reward = config.grpo, config.optim, config.reward
    assert (grpo.num_generations, grpo.beta, grpo.top_k, grpo.advantage_noise_std) == (8, 0.01, 50, 0.02)
    assert (grpo.max_completion_length, grpo.temperature, grpo.advantage_eps) == (512, 1.0, 1e-4)
    assert (optim.learning_rate, optim.lr_scheduler_type, optim.warmup_ratio) == (1e-6, "cosine", 0.03)
    assert (reward.base, reward.length_bonus, reward.max_think_chars, reward.bad_format) == (0.5, 0.5, 1200, -2.0)
    assert config.data.num_frames == 16
    assert config.model.freeze == ("vision_tower",)


def test_missing_keys_take_the_defaults_of_the_dataclasses(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.grpo == TrainConfig().grpo
    assert config.optim == TrainConfig().optim
    assert config.deepspeed == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("optim.learning_rate=1e-6", "optim", "learning_rate", 1e-6),
        ("optim.learning_rate=1", "optim", "learning_rate", 1.0),  # an integer where a number is asked for
        ("grpo.leave_one_out=true", "grpo", "leave_one_out", True),
        ('model.freeze=["connector"]', "model", "freeze", ("connector",)),
        ("model.freeze=[]", "model", "freeze", ()),
        ("data.train_file=a=b.jsonl", "data", "train_file", "a=b.jsonl"),  # split at the first = only
        ("data.eval_file=x.jsonl", "data", "eval_file", "x.jsonl"),
        ("data.eval_file=null", "data", "eval_file", None),
        ("run.output_dir=2024", "run", "output_dir", "2024"),  # a name made of digits stays a name
        ('run.output_dir="true"', "run", "output_dir", "true"),
        ("run.resume_from_checkpoint=1e3", "run", "resume_from_checkpoint", "1e3"),
        ("grpo.delta=null", "grpo", "delta", None),
        ("reward.weights=[2]", "reward", "weights", (2.0,)),
    ],
)
def test_override_sets_one_field(minimal: Path, override: str, section: str, name: str, value: Any) -> None:
    before, after = config_to_dict(load_config(minimal)), load_config(minimal, [override])
    found = getattr(getattr(after, section), name)
    assert (found, type(found)) == (value, type(value))
    before[section][name] = list(value) if isinstance(value, tuple) else value
    assert config_to_dict(after) == before


def test_later_overrides_win_and_the_file_is_weaker_than_both(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "run": {"seed": 1}})
    assert load_config(path).run.seed == 1
    assert load_config(path, ["run.seed=2", "run.seed=3"]).run.seed == 3


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.learnig_rate=1", ["'optim.learnig_rate'", "did you mean 'optim.learning_rate'"]),
        ("optim.lr=1", ["'optim.lr'", "learning_rate, "]),
        ("learning_rate=1", ["did you mean 'optim.learning_rate'"]),
        ("gpro.beta=1", ["did you mean 'grpo.beta'"]),
        ("model.num_generations=4", ["did you mean 'grpo.num_generations'"]),
        ("xyz=1", ["the sections are task, model"]),
        ("grpo.top_k.x=1", ["'grpo.top_k.x'"]),
        ("grpo=1", ["grpo is a section"]),
        ("grpo.beta", ["section.key=value"]),
        ("=1", ["section.key=value"]),
        ("grpo.beta=high", ["grpo.beta must be a number", '"high"']),
        ("grpo.beta=true", ["grpo.beta must be a number", "true"]),
        ("grpo.beta=null", ["grpo.beta must be a number", "null"]),
        ("grpo.beta=NaN", ["finite"]),
        ("grpo.epsilon=1e999", ["finite"]),
        ("grpo.top_k=1.5", ["grpo.top_k must be an integer", "1.5"]),
        ("grpo.top_k=true", ["grpo.top_k must be an integer", "true"]),
        ("grpo.leave_one_out=1", ["must be true or false", "got 1"]),
        ("model.path=null", ["model.path must be a string"]),
        ("model.freeze=connector", ['model.freeze must be a list such as ["connector"], got the string "connector"']),
        ("model.freeze=[1]", ["model.freeze[0] must be a string", "got 1"]),
        ('deepspeed={"a": 1, "a": 2}', ["'a' appears twice"]),
        ("deepspeed=3", ["deepspeed must be an object", "3"]),
        ("deepspeed=none.json", ["cannot read none.json"]),
        ("deepspeed.zero_optimization.stage.x=3", ["the entry above 'x' is 1"]),
    ],
)
def test_bad_override_is_named_with_its_remedy(minimal: Path, override: str, parts: list[str]) -> None:
    message = error_of(minimal, override)
    assert message.startswith(f"--set {override}")
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"optim": {"learning_rat": 1}}, ["unknown key 'optim.learning_rat'", "'optim.learning_rate'"]),
        ({"optim": 3}, ["optim must be an object, got 3"]),
        ({"grpo": {"num_generations": "8"}}, ["grpo.num_generations must be an integer", 'the string "8"']),
        ({"grpo": {"num_generations": 8.0}}, ["grpo.num_generations must be an integer", "8.0"]),
        ({"data": {"train_file": 3}}, ["data.train_file must be a string", "got 3"]),
        ({"deepspeed": [1]}, ["deepspeed must be an object", "[1]"]),
        ({"deepspeed": "zero.json"}, ["deepspeed: cannot read", "zero.json"]),
        ([1], ["holds [1]", "one JSON object"]),
        ('{"run": {"seed": 1, "seed": 2}}', ["'seed' appears twice"]),
        ('{"run": }', ["not valid JSON", "line 1"]),
        ('{"task": "sft"}  // cold start', ["not valid JSON", "JSON has no comments"]),
    ],
)
def test_bad_file_is_named_with_the_key(tmp_path: Path, tree: Any, parts: list[str]) -> None:
    path = write(tmp_path, tree)
    message = error_of(path)
    assert message.startswith(str(path))
    for part in parts:
        assert part in message, message


def test_a_byte_order_mark_means_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps(MINIMAL))
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert load_config(path).model.path == "m"


@pytest.mark.parametrize(
    "key",
    [
        *("model.path", "data.train_file", "data.video_root", "data.eval_file", "data.eval_video_root"),
        *("run.output_dir", "run.resume_from_checkpoint"),
    ],
)
def test_a_tilde_which_no_shell_replaced_is_refused(minimal: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    load_config(minimal, ["data.eval_file=e", f"{key}=a/~/b"])
    for value, meant in (("~/run", "/me/run"), ("~", "/me")):
        message = error_of(minimal, "data.eval_file=e", f"{key}={value}")
        assert f"{key} is {value!r}; ~ is a name like any other here, write {meant!r}" in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.json") in error_of(tmp_path / "none.json")


# Last good value (None: there is none) and first bad value of every limit.
LIMITS = [
    ("grpo.num_generations", "2", "1"),
    ("grpo.max_completion_length", "1", "0"),
    ("grpo.temperature", "0.01", "0"),
    ("grpo.top_k", "0", "-1"),
    ("grpo.top_p", "1", "1.1"),
    ("grpo.top_p", "0.1", "0"),
    ("grpo.min_p", "1", "1.1"),
    ("grpo.min_p", "0", "-0.1"),
    ("grpo.stop_strings", '["</answer>"]', '["</answer>", ""]'),
    ("grpo.beta", "0", "-0.1"),
    ("grpo.advantage_eps", "0", "-1"),
    ("grpo.advantage_noise_std", "0", "-1"),
    ("rollout.backend", "eager", "vllm"),
    ("rollout.num_speculative_tokens", "0", "-1"),
    ("rollout.num_speculative_tokens", "32", "33"),
    ("optim.learning_rate", "0", "-1e-6"),
    ("optim.warmup_ratio", "1", "1.01"),
    ("optim.warmup_ratio", "0", "-0.01"),
    ("optim.weight_decay", "0", "-1"),
    ("optim.adam_beta1", "0", "1"),
    ("optim.adam_beta2", "0.99", "1"),
    ("optim.adam_epsilon", "1e-12", "0"),
    ("optim.max_grad_norm", "0", "-1"),
    ("optim.num_train_epochs", "0.5", "0"),
    ("optim.num_train_epochs", "1e9", "1e10"),
    ("optim.max_steps", "-1", "0"),
    ("optim.max_steps", "1", "-2"),
    ("optim.per_device_train_batch_size", "1", "0"),
    ("optim.gradient_accumulation_steps", "1", "0"),
    ("optim.max_tokens_per_micro_batch", "1", "0"),
    ("grpo.num_iterations", "1", "0"),
    ("grpo.max_num_gen_batches", "1", "0"),
    ("grpo.steps_per_generation", "1", "0"),
    ("data.num_frames", "-1", "0"),
    ("data.num_frames", "1", "-2"),
    ("data.max_bad_fraction", "1", "1.5"),
    ("data.num_decode_threads", "1", "0"),
    ("reward.max_think_chars", "1", "0"),
    ("reward.functions", '["a:b"]', "[]"),
    ("reward.weights", "[0.5]", "[1, 2]"),
    ("run.seed", "0", "-1"),
    ("run.seed", "9223372036854775807", "9223372036854775808"),
    ("run.logging_steps", "1", "0"),
    ("run.save_steps", "0", "-1"),
    ("run.save_minutes", "0", "-0.1"),
    ("run.save_total_limit", "1", "0"),
    ("run.eval_samples", "1", "0"),
    ("run.per_device_eval_batch_size", "1", "0"),
    ("run.eval_steps", "0", "-1"),
    ("run.report_frames", "0", "-1"),
    ("run.report_to", "[]", '["mlflow"]'),
    ("run.report_to", '["jsonl"]', '["jsonl", "jsonl"]'),
    ("run.output_dir", "x", '""'),
    ("run.resume_from_checkpoint", "last", '""'),
    ("task", "sft", "ppo"),
    ("model.path", "x", '""'),
    ("model.dtype", "float32", "float16"),
    ("model.freeze", '["vision_tower", "connector"]', '["vision"]'),
    ("model.freeze", '["language_model"]', '["vision_tower", "connector", "language_model"]'),
    ("data.train_file", "x", '""'),
    ("data.video_root", ".", '""'),
    ("data.policy", "skip", "ignore"),
    ("data.backend", "pyav", "decord"),
    ("reward.mode", "paper", "strict"),
    ("grpo.loss_type", "dapo", "ppo"),
    ("grpo.scale_rewards", "none", "std"),
    ("optim.lr_scheduler_type", "linear", "step"),
    ("deepspeed.zero_optimization.stage", "3", "4"),
    ("deepspeed.zero_optimization.stage", "0", "true"),
    ("deepspeed.zero_optimization", '{"stage": 2}', "2"),
]


# Without these, a value other than the default has no effect.
READ_WITH = {
    "data.max_bad_fraction": ["data.policy=skip"],
    "run.eval_samples": ["data.eval_file=e.jsonl"],
    "run.per_device_eval_batch_size": ["data.eval_file=e.jsonl"],
}


@pytest.mark.parametrize(("key", "good", "bad"), LIMITS)
def test_limit_separates_the_last_good_from_the_first_bad_value(minimal: Path, key: str, good: str, bad: str) -> None:
    load_config(minimal, [f"{key}={good}", *READ_WITH.get(key, [])])
    message = error_of(minimal, f"{key}={bad}")
    assert re.match(re.escape(f"{minimal} --set {key}={bad}: {key}") + "[ =]", message), message


def test_every_field_with_a_number_is_limited_or_knowingly_free() -> None:
    checked = {key for key, _, _ in LIMITS}
    loss = {field.name for field in fields(LossOptions)}  # the kernels refuse them, see the tables below
    loss_fields = {f"grpo.{name}" for name in loss}
    free = {"reward.base", "reward.length_bonus", "reward.correct", "reward.bad_format", "data.max_frames"}
    free |= {"reward.num_workers", "reward.timeout_seconds", "reward.timeout_reward"}  # with each other, see below
    numeric = {
        f"{section}.{field.name}"
        for section in ("model", "data", "reward", "grpo", "rollout", "optim", "run")
        for field in fields(getattr(TrainConfig(), section))
        if "int" in str(field.type) or "float" in str(field.type)
    }
    assert numeric == (checked & numeric) | (loss_fields & numeric) | free


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.max_frames=8"], "data.max_frames is 8 but data.num_frames is 16"),
        (["data.max_frames=0", "data.num_frames=-1"], "data.max_frames is 0"),
        (["run.eval_steps=5"], "data.eval_file is not set"),
        (
            ["rollout.num_speculative_tokens=4", "rollout.backend=eager"],
            "rollout.num_speculative_tokens is 4 but rollout.backend is 'eager'",
        ),
        (["grpo.epsilon=0.3"], "grpo.epsilon=0.3 has no effect"),
        (["grpo.epsilon_high=0.3"], "grpo.epsilon_high=0.3 has no effect"),
        (["grpo.delta=3"], "grpo.delta=3.0 has no effect"),
        (["grpo.importance_sampling_level=sequence"], "has no effect"),
        (["grpo.loss_type=grpo", "grpo.delta=1.2"], "grpo.delta=1.2: give a finite number > 1.2"),
        (["reward.weights=[0.0]"], "nothing would be rewarded"),
        (["reward.num_workers=-1"], "reward.num_workers is -1; it must be 0 or more"),
        (["reward.timeout_seconds=0"], "reward.timeout_seconds is 0.0; it must be more than 0"),
        (
            ["reward.num_workers=1"],
            "reward.num_workers is 1 but reward.functions is ['tinyllava_video_r1'], all built in",
        ),
        (["reward.timeout_seconds=2"], "reward.timeout_seconds is 2.0 but reward.functions is"),
        (['reward.functions=["a:b"]', "reward.timeout_reward=0"], "reward.timeout_seconds is not set"),
        (
            ["grpo.loss_type=grpo", "grpo.epsilon_high=0.5", "grpo.delta=1.3"],
            "grpo.delta=1.3: give a finite number > 1.5",
        ),
        (["grpo.loss_type=grpo", "grpo.epsilon=-0.1"], "grpo.epsilon=-0.1"),
        (["grpo.loss_type=grpo", "grpo.epsilon_high=-1"], "grpo.epsilon_high=-1"),
        (["grpo.loss_type=cispo"], "grpo.epsilon_high=None: loss_type='cispo' cuts the ratio"),
        (["grpo.loss_type=luspo"], "grpo.importance_sampling_level='token': loss_type='luspo' needs 'sequence'"),
        (["grpo.loss_type=sapo", "grpo.sapo_temperature_pos=0"], "grpo.sapo_temperature_pos=0.0"),
        (["grpo.loss_type=grpo", "grpo.sapo_temperature_pos=2"], "grpo.sapo_temperature_pos=2.0 has no effect"),
        (["grpo.loss_type=grpo", "grpo.beta=0", "grpo.kl_estimator=k1"], "has no effect with grpo.beta=0"),
        (["grpo.loss_type=cispo", "grpo.epsilon_high=0"], "grpo.epsilon_high=0: the largest ratio is 0"),
        (["grpo.beta=1" + "0" * 400], "finite"),
        (["grpo.kl_estimator=k4"], "grpo.kl_estimator is 'k4'; choose from k1, k2, k3"),
        (["grpo.kl_estimator=k1"], "grpo.kl_estimator='k1' has no effect on loss_type='tinyllava_video_r1'"),
        (["model.dtype=bfloat16", "deepspeed.zero_optimization.stage=0"], "summed in it"),
        (["task=sft", "grpo.beta=0.1"], "grpo.beta is 0.1, which task 'sft' does not read: leave it out"),
        (["task=sft", 'reward.functions=["a:b"]'], "reward.functions is ['a:b'], which task 'sft' does not read"),
        (
            ["task=sft", "grpo.max_completion_length=9", "data.instruction=Think."],
            "data.instruction is 'Think.', grpo.max_completion_length is 9, which task 'sft' does not read without "
            "data.eval_file: leave them out",
        ),
        (
            ["task=sft", "rollout.backend=eager", "rollout.num_speculative_tokens=2"],
            "rollout.backend is 'eager', rollout.num_speculative_tokens is 2, which task 'sft' does not read: leave",
        ),
        (
            ["task=sft", "data.eval_file=e.jsonl", "rollout.num_speculative_tokens=2"],
            "rollout.num_speculative_tokens is 2, which task 'sft' does not read: leave it out",
        ),
        (
            ["data.eval_video_root=v"],
            "data.eval_video_root is 'v' but data.eval_file is not set, so nothing is evaluated",
        ),
        (["run.eval_samples=5"], "run.eval_samples is 5 but data.eval_file is not set"),
        (["run.per_device_eval_batch_size=4"], "run.per_device_eval_batch_size is 4 but data.eval_file is not set"),
        (["data.max_bad_fraction=0.5"], "data.max_bad_fraction is 0.5 but data.policy is 'error', which stops at the"),
        (
            ['run.allow_changed=["run.seed"]'],
            "run.allow_changed is ['run.seed'] but run.resume_from_checkpoint is not set, so nothing is compared",
        ),
        (
            ['reward.functions=["think_format", "a:b"]', "reward.bad_format=-1"],
            "reward.bad_format is -1.0, which only the reward 'tinyllava_video_r1' reads, and reward.functions is "
            "['think_format', 'a:b']: name it there, or leave this out",
        ),
        (['reward.functions=["a:b"]', "reward.mode=paper"], "reward.mode is 'paper', which only the reward"),
        (["grpo.sampler_cap=2"], "grpo.sampler_cap is 2.0, which has no effect without grpo.sampler_correction"),
        (
            ["grpo.sampler_correction=token_mask", "grpo.sampler_floor=0.1"],
            "grpo.sampler_floor is 0.1 but grpo.sampler_correction is 'token_mask', and only 'icepop' reads it",
        ),
        (
            ["grpo.scale_rewards=none", "grpo.advantage_eps=0.1"],
            "grpo.advantage_eps is 0.1, which has no effect with grpo.scale_rewards 'none'",
        ),
        (["data.eval_file="], "data.eval_file is ''; it must be an annotation file or null"),
        (["data.eval_file=e", "data.eval_video_root="], "data.eval_video_root is ''; it must be a folder, or null for"),
        (["run.save_steps=9223372036854775808"], "run.save_steps is 9223372036854775808; it must be less than 2**63"),
        (['data.instruction="cut \\ud83d"'], "data.instruction is 'cut \\ud83d'; it holds a zero byte or half of a"),
        (['run.output_dir="a\\u0000b"'], "run.output_dir is 'a\\x00b'; it holds a zero byte"),
        (
            ["deepspeed.zero_allow_untested_optimizer=false"],
            "zero_allow_untested_optimizer is False; it is always true",
        ),
        (
            ["deepspeed.zero_force_ds_cpu_optimizer=true"],
            "zero_force_ds_cpu_optimizer is True; it is always false here",
        ),
        (
            ["deepspeed.compile.deepcompile=true"],
            "deepspeed.compile.deepcompile is True; it is always false here: leave",
        ),
    ],
)
def test_contradicting_settings_are_refused(minimal: Path, overrides: list[str], part: str) -> None:
    assert part in error_of(minimal, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.max_frames=8", "data.num_frames=-1"],
        ['reward.functions=["a:b"]', "reward.num_workers=2", "reward.timeout_seconds=0.5", "reward.timeout_reward=-1"],
        ["run.eval_steps=5", "data.eval_file=e.jsonl"],
        ["task=sft", "run.eval_steps=5", "data.eval_file=e.jsonl", "grpo.max_completion_length=9"],
        # evaluation is off for a while
        [
            "task=sft",
            "data.eval_file=e.jsonl",
            'grpo.stop_strings=["."]',
            "rollout.backend=eager",
            "data.instruction=a",
        ],
        ["data.eval_file=e.jsonl", "data.eval_video_root=v", "run.eval_samples=5", "run.per_device_eval_batch_size=4"],
        ["optim.num_train_epochs=3", "optim.max_steps=2"],
        ["task=sft", "rollout.keep_arenas=false", "run.roofline=false"],  # as it is anyway
        ["data.policy=skip", "data.max_bad_fraction=0.5"],
        ["run.resume_from_checkpoint=last", 'run.allow_changed=["run.seed"]'],
        ['reward.functions=["a:b", "tinyllava_video_r1"]', "reward.weights=[1, 0]", "reward.base=1"],
        ["grpo.sampler_correction=icepop", "grpo.sampler_cap=2", "grpo.sampler_floor=0.1"],
        ["grpo.sampler_correction=token_truncate", "grpo.sampler_cap=2"],
        ["grpo.scale_rewards=batch", "grpo.advantage_eps=0.1"],
        ["deepspeed.zero_allow_untested_optimizer=true", "deepspeed.zero_force_ds_cpu_optimizer=false"],
        ["deepspeed.zero_allow_untested_optimizer=auto", "deepspeed.compile.deepcompile=false"],
        ["grpo.loss_type=grpo", "grpo.epsilon=0", "grpo.epsilon_high=0.28", "grpo.delta=1.5"],
        ["grpo.loss_type=dr_grpo", "grpo.importance_sampling_level=sequence"],
        ["grpo.loss_type=cispo", "grpo.epsilon_high=5"],
        ["grpo.loss_type=luspo", "grpo.importance_sampling_level=sequence"],
        ["grpo.loss_type=sapo", "grpo.sapo_temperature_neg=1.2"],
        ["grpo.loss_type=grpo", "grpo.kl_estimator=k1", "grpo.entropy_coef=0.01"],
        ["model.dtype=float32", "deepspeed.zero_optimization.stage=0"],
    ],
)
def test_settings_that_fit_together_are_accepted(minimal: Path, overrides: list[str]) -> None:
    load_config(minimal, overrides)


@pytest.mark.parametrize("key", sorted(DEEPSPEED_OWNED_KEYS))
def test_owned_deepspeed_key_names_the_key_to_use_instead(tmp_path: Path, key: str) -> None:
    message = error_of(write(tmp_path, {**MINIMAL, "deepspeed": {key: {"enabled": True}}}))
    assert f"deepspeed.{key}" in message
    assert DEEPSPEED_OWNED_KEYS[key] in message
    for name in ("train_batch_size", "bf16", "optimizer", "gradient_clipping"):
        assert name in DEEPSPEED_OWNED_KEYS


def test_remedies_for_deepspeed_keys_name_fields_that_exist() -> None:
    known = {
        f"{section}.{field.name}"
        for section in ("model", "optim", "run")
        for field in fields(getattr(TrainConfig(), section))
    }
    for words in DEEPSPEED_OWNED_KEYS.values():
        for word in words.replace(",", "").split():
            assert word == "and" or word in known or word == "optim.adam_*", word


def test_auto_entries_of_a_deepspeed_file_are_not_owned_values(tmp_path: Path) -> None:
    deepspeed = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
    config = load_config(write(tmp_path, {**MINIMAL, "deepspeed": deepspeed}))
    assert without_auto(config.deepspeed) == {"zero_optimization": {"stage": 2}}
    assert without_auto({"activation_checkpointing": {}}) == {"activation_checkpointing": {}}


def test_deepspeed_path_is_relative_to_the_config_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", {"zero_optimization": {"stage": 3}}, "zero.json")
    write(tmp_path / "b", {"zero_optimization": {"stage": 2}}, "zero.json")
    path = write(tmp_path / "a", {**MINIMAL, "deepspeed": "zero.json"})
    monkeypatch.chdir(tmp_path / "b")
    assert load_config(path).deepspeed["zero_optimization"]["stage"] == 3
    assert load_config(path, ["deepspeed=zero.json"]).deepspeed["zero_optimization"]["stage"] == 2


def test_deepspeed_override_keeps_the_other_entries(tmp_path: Path) -> None:
    path = write(tmp_path, {**MINIMAL, "deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": True}}})
    config = load_config(path, ["deepspeed.zero_optimization.stage=1", "deepspeed.steps_per_print=100"])
    assert config.deepspeed == {"zero_optimization": {"stage": 1, "overlap_comm": True}, "steps_per_print": 100}


def test_loss_options_take_every_field_of_their_name(minimal: Path) -> None:
    settings = ["loss_type=grpo", "epsilon=0.1", "epsilon_high=0.3", "delta=2", "kl_estimator=k2", "entropy_coef=0.5"]
    grpo = load_config(
        minimal,
        [f"grpo.{setting}" for setting in (*settings, "temperature=0.7", "beta=0.2", "sampler_correction=icepop")],
    ).grpo
    options = loss_options(grpo)
    shared = {field.name for field in fields(LossOptions)} & {field.name for field in fields(grpo)}
    assert {
        "beta",
        "epsilon",
        "temperature",
        "entropy_coef",
        "importance_sampling_level",
        "max_completion_length",
    } < shared
    for name in shared:
        assert getattr(options, name) == getattr(grpo, name), name
    assert options.log_ratio_clamp == LossOptions().log_ratio_clamp


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_kernels_can_be_configured(minimal: Path, name: str) -> None:
    needs = {"epsilon_high": "5.0", "importance_sampling_level": "sequence"}
    extra = [f"grpo.{option}={value}" for option, value in needs.items() if option in LOSSES[name].needs]
    assert load_config(minimal, [f"grpo.loss_type={name}", *extra]).grpo.loss_type == name


def test_choices_of_the_loss_are_those_of_the_kernels() -> None:
    assert choices_of(get_type_hints(GRPOConfig)["scale_rewards"]) == SCALES
    for name in ("scale_rewards", "importance_sampling_level", "kl_estimator"):
        for choice in choices_of(get_type_hints(GRPOConfig)[name]):
            needs = {"loss_type": "luspo"} if choice == "sequence" else {"loss_type": "grpo"}
            LossOptions(**{**needs, name: choice}).check()
