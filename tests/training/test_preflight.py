"""What is refused before any model is built, and the dry run that does only this."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_toys import ROOT, make_config, write_world

import fastr1.training.loop
from fastr1.cli import main
from fastr1.config import ConfigError, config_to_dict, load_config, save_config
from fastr1.models import ModelFileError
from fastr1.models.attention import check_attention
from fastr1.rewards import RewardError
from fastr1.schema import DataError
from fastr1.train import main as train_main
from fastr1.training.checkpoint import CheckpointError
from fastr1.training.distributed import build_deepspeed_config
from fastr1.training.grpo import prepare_grpo, run_grpo
from fastr1.training.sft import run_sft
from fastr1.video import BackendError, VideoError, torchcodec_backend


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastr1.training.loop, "load_policy", lambda config: pytest.fail("a model was built"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward__functions": ("think_fromat",)}, RewardError, "did you mean 'think_format'"),
        (
            {"reward__functions": ("no_such_module:f",)},
            RewardError,
            "start in the folder of 'no_such_module' or put that on PYTHONPATH",
        ),
        ({"reward__functions": ("trainer_toys:vowel",)}, RewardError, "'trainer_toys' has no function 'vowel'"),
        ({"model__attn_implementation": "spda"}, ConfigError, "attn_implementation is 'spda'.* did you mean 'sdpa'"),
        pytest.param(
            {"model__use_liger_kernel": True, "data__train_file": "nope.jsonl"},  # known before any data is read
            ConfigError,
            "model.use_liger_kernel is True, which needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ({"model__path": "nowhere"}, ModelFileError, r"nowhere/config\.json: not found; point model\.path"),
        ({"deepspeed": {"zero_optimisation": {}}}, ConfigError, "deepspeed.zero_optimisation is .*'zero_optimization'"),
        ({"run__resume_from_checkpoint": "last"}, CheckpointError, "no complete checkpoint in"),
        ({"run__resume_from_checkpoint": "runs/nope"}, CheckpointError, "checkpoint runs/nope does not exist"),
        ({"run__output_dir": "/proc/fastr1"}, DataError, r"run.output_dir is /proc/fastr1.*written to /proc \("),
        ({"data__train_file": "nope.jsonl"}, DataError, "annotation file nope.jsonl does not exist"),
    ],
)
def test_is_refused_before_a_model_is_built(
    world: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_grpo(make_config(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_incomplete_weights_are_refused(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "base", model)
    config = make_config(world, tmp_path / "run", model__path=str(model))
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for kept, message in ((content[:-1], "bytes instead of"), (content[:100], "no header"), (b"", "no header")):
        weights.write_bytes(kept)
        with pytest.raises(ModelFileError, match=rf"model\.safetensors: .*{message}.*copy it again"):
            run_grpo(config)
    weights.unlink()
    with pytest.raises(ModelFileError, match=r"model: no weights \(\*\.safetensors\)"):
        run_grpo(config)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-2.safetensors"}}')
    with pytest.raises(ModelFileError, match=r"model-00002-of-2\.safetensors: not found; the checkpoint is incomplete"):
        run_grpo(config)


def test_output_folder_that_is_a_file_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(DataError, match=rf"run.output_dir is {tmp_path}/run, .*\(Not a directory\)"):
        run_grpo(make_config(world, tmp_path / "run"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read_only"
    folder.mkdir()
    folder.chmod(stat.S_IREAD | stat.S_IEXEC)
    yield folder
    folder.chmod(stat.S_IRWXU)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_that_cannot_be_written_is_refused(world: Path, read_only: Path) -> None:
    with pytest.raises(DataError, match=r"nothing can be written to .*read_only \(Permission denied\)"):
        run_grpo(make_config(world, read_only / "a" / "run"))


def test_decoder_is_tried_on_the_first_clip(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "world"
    shutil.copytree(world, broken)
    (broken / "0.mp4").write_bytes(b"not a video")
    with pytest.raises(VideoError, match=r"0\.mp4"):
        run_grpo(make_config(broken, tmp_path / "run"))
    for index in range(5):
        (broken / f"{index}.mp4").write_bytes(b"not a video")
    skip = {"data__policy": "skip", "data__max_bad_fraction": 0.9}
    with pytest.raises(pytest.fail.Exception, match="a model was built"):  # one clip can be decoded: go on
        run_grpo(make_config(broken, tmp_path / "run", **skip))
    (broken / "5.mp4").write_bytes(b"not a video")
    with pytest.raises(VideoError, match=r"5\.mp4"):
        run_grpo(make_config(broken, tmp_path / "run", **skip))
    monkeypatch.setattr(
        torchcodec_backend,
        "load_torchcodec",
        lambda: raise_(torchcodec_backend.TorchcodecUnavailableError("no FFmpeg")),
    )
    with pytest.raises(BackendError, match='backend "torchcodec" cannot be loaded: no FFmpeg'):
        run_grpo(make_config(world, tmp_path / "run", data__backend="torchcodec"))


def test_first_held_out_clip_is_decoded_too(world: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for index in range(6):
        (held_out / f"{index}.mp4").write_bytes(b"not a video")
    evaluated = {"data__eval_file": str(world / "questions.jsonl"), "data__eval_video_root": str(held_out)}
    with pytest.raises(VideoError, match=r"held_out/0\.mp4"):
        run_grpo(make_config(world, tmp_path / "run", **evaluated, run__eval_steps=2))
    with pytest.raises(pytest.fail.Exception, match="a model was built"):  # they are not looked at
        run_grpo(make_config(world, tmp_path / "run", **evaluated))


def test_a_run_does_not_write_into_its_model(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "base", model)
    for output in (model, model / "runs" / "1", tmp_path / "other" / ".." / "model"):
        with pytest.raises(DataError, match=rf"run\.output_dir is {output}, in the folder of model\.path, {model}"):
            run_grpo(make_config(world, output, model__path=str(model)))
    with pytest.raises(pytest.fail.Exception, match="a model was built"):
        run_grpo(make_config(world, tmp_path / "model-2", model__path=str(model)))


def test_a_run_folder_in_the_place_of_a_model_is_told_apart(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "earlier"
    shutil.copytree(world / "base", run / "final")
    (run / "checkpoints" / "step-000001").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    for place, what in (
        (run, "the folder of a run"),
        (run / "checkpoints" / "step-000001", "a checkpoint to go on from"),
    ):
        with pytest.raises(DataError, match=rf"{place} is {what}, not a model: its model is {run}/final"):
            run_grpo(make_config(world, tmp_path / "run", model__path=str(place)))


@pytest.mark.parametrize(
    ("eval_steps", "said"), [(0, "run.eval_steps is 0"), (3, "run.eval_steps is 3"), (2, None), (1, None)]
)
def test_held_out_questions_that_are_never_asked_are_told(
    world: Path, tmp_path: Path, eval_steps: int, said: str | None
) -> None:
    held_out = {"data__eval_file": str(world / "questions.jsonl"), "run__eval_steps": eval_steps}
    line = prepare_grpo(make_config(world, tmp_path / "run", **held_out)).describe()  # of two updates
    assert line.endswith(f"; data.eval_file is not evaluated: {said}") == (said is not None)
    assert ("eval_file" in line) == (said is not None)


def raise_(error: Exception) -> None:
    raise error


def test_sft_is_checked_too_but_not_for_rewards(world: Path, tmp_path: Path) -> None:
    sft = {"task": "sft", "data__train_file": str(world / "coldstart.json")}
    with pytest.raises(ConfigError, match="attn_implementation"):
        run_sft(make_config(world, tmp_path, **sft, model__attn_implementation="eagre"))
    with pytest.raises(pytest.fail.Exception, match="a model was built"):
        run_sft(make_config(world, tmp_path, **sft, reward__functions=("not_there",)))


# Attention


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("sdpa", "cpu", torch.float32, None),
        ("eager", "cuda", torch.bfloat16, None),
        ("flash_attention_2", "cpu", torch.float32, "needs a GPU, and training runs on cpu; use 'sdpa'"),
        ("flex_attention", "cpu", torch.float32, "needs a GPU"),
        ("flash_attention_2", "cuda", torch.float32, "needs model.dtype 'bfloat16'"),
        ("flash_attention", "cuda", torch.bfloat16, "did you mean 'flash_attention_"),
        ("kernels-community/flash-attn", "cuda", torch.bfloat16, "which transformers does not have"),
        ("paged|sdpa", "cuda", torch.bfloat16, "is 'paged|sdpa', which transformers does not have"),
    ],
)
def test_attention_names(name: str, device: str, dtype: torch.dtype, message: str | None) -> None:
    if message is None:
        check_attention(name, torch.device(device), dtype)
        return
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        check_attention(name, torch.device(device), dtype)


def test_attention_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import import_utils

    for is_there in (False, True):
        monkeypatch.setattr(import_utils, "is_flash_attn_2_available", lambda found=is_there: found)
        if is_there:
            check_attention("flash_attention_2", torch.device("cuda"), torch.bfloat16)
        else:
            with pytest.raises(ConfigError, match="install flash-attn, or use 'sdpa'"):
                check_attention("flash_attention_2", torch.device("cuda"), torch.bfloat16)


# DeepSpeed's keys


def check_keys(deepspeed: dict[str, Any]) -> None:
    build_deepspeed_config(deepspeed, fastr1.config.OptimConfig(), torch.bfloat16)


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"steps_per_pint": 10}, "steps_per_pint is 10; DeepSpeed knows no such key; did you mean 'steps_per_print'?"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com is True; .*'overlap_comm'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memry": True}}},
            "deepspeed.zero_optimization.offload_param.pin_memry is True; .* did you mean 'pin_memory'",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.device is 'gpu': Input should be 'none', 'cpu' or 'nvme'",
        ),
        ({"zero_optimization": {"stage3_max_live_parameters": "x"}}, "stage3_max_live_parameters is 'x': Input should"),
        # sections that DeepSpeed itself reads without a look at what else is in them
        ({"activation_checkpointing": {"profil": 1}}, "deepspeed.activation_checkpointing.profil is 1; .*'profile'"),
        ({"flops_profiler": {"enabled": False, "profilestep": 1}}, "flops_profiler.profilestep .*'profile_step'"),
        ({"aio": {"block_sizes": 1}}, "deepspeed.aio.block_sizes .*'block_size'"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype .*'grad_accum_dtype'"),
        ({"checkpoint": {"parallel_write": {"stage": 1}}}, "checkpoint.parallel_write.stage is 1; .*pipeline_stage"),
        ({"timers": {"throughput": {"synchronised": 1}}}, "deepspeed.timers.throughput.synchronised .*'synchronized'"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency .* it is not read, remove it and set run.seed"),
        ({"qqq": 1}, "deepspeed.qqq is 1; DeepSpeed knows no such key; beside it are .*wall_clock_breakdown"),
        # refusals of DeepSpeed's own
        ({"amp": {"enabled": True}}, "deepspeed: .*AMP integration has been removed"),
        ({"communication_data_type": "fp33"}, "deepspeed: Invalid communication_data_type.*fp33"),
    ],
)  # fmt: skip
def test_unknown_deepspeed_keys_are_refused_with_what_was_meant(deepspeed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        check_keys(deepspeed)


@pytest.mark.parametrize(
    "deepspeed",
    [
        {},
        {
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "offload_param": {"device": "cpu"},
            }
        },
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}},
        {"steps_per_print": 10, "wall_clock_breakdown": True, "comms_logger": {"enabled": True}, "log_level": "info"},
        {"activation_checkpointing": {"partition_activations": True}, "flops_profiler": {"enabled": False}},
        {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16", "timers": {"throughput": {}}},
        {"tensorboard": {"enabled": False, "output_path": "x"}, "compile": {"deepcompile": False}},
    ],
)
def test_known_deepspeed_keys_pass(deepspeed: dict[str, Any]) -> None:
    check_keys(deepspeed)


def test_shipped_configurations_pass() -> None:
    for file in sorted((ROOT / "configs").glob("*.json")):
        config = load_config(file)
        build_deepspeed_config(config.deepspeed, config.optim, torch.bfloat16)
        check_attention(config.model.attn_implementation, torch.device("cpu"), torch.float32)


# The dry run


@pytest.mark.parametrize("task", ["grpo", "sft"])
def test_dry_run_checks_prints_the_effective_configuration_and_leaves_nothing(
    world: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = str(world / ("coldstart.json" if task == "sft" else "questions.jsonl"))
    config = make_config(world, tmp_path / "run", task=task, data__train_file=data)
    save_config(config, tmp_path / "config.json")
    command = ["sft" if task == "sft" else "train", "--config", str(tmp_path / "config.json"), "--dry-run"]
    with caplog.at_level("INFO"):
        assert main([*command, "--set", "run.seed=7"]) == 0
    expected = make_config(world, tmp_path / "run", task=task, data__train_file=data, run__seed=7)
    assert json.loads(capsys.readouterr().out) == config_to_dict(expected)
    assert "nothing is wrong: 6 samples, 2 updates on cpu, float32; videos: pyav" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    assert main([*command, "--set", "deepspeed.steps_per_pint=3"]) == 2
    assert "did you mean 'steps_per_print'?" in capsys.readouterr().err


def test_dry_run_through_the_script(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(make_config(world, tmp_path / "run"), tmp_path / "config.json")
    assert train_main(["--config", str(tmp_path / "config.json"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["num_frames"] == 4
    assert not (tmp_path / "run").exists()
