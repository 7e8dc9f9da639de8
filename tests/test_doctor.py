"""What the doctor finds, prints and returns."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastr1_kernels
from fastr1 import cli, doctor
from fastr1.config import DataConfig, ModelConfig, RolloutConfig, TrainConfig
from fastr1.doctor import Check, format_report, run_checks

GOOD = Check("torch", True, "2.13.0")
MISSING = Check("deepspeed", False, "not installed", essential=True, remedy="pip install deepspeed")
OPTIONAL = Check("flash-attn", False, "not installed", essential=False, remedy="pip install flash-attn")


@pytest.mark.parametrize(
    ("checks", "code"), [([GOOD], 0), ([GOOD, OPTIONAL], 0), ([GOOD, MISSING], 1), ([MISSING, OPTIONAL], 1)]
)
def test_exit_code_follows_the_essentials(
    checks: list[Check], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "run_checks", lambda config: checks)
    assert doctor.doctor() == code
    assert doctor.doctor(as_json=True) == code
    assert f'"ok": {"false" if code else "true"}' in capsys.readouterr().out


def test_report_names_what_is_missing_and_what_to_do() -> None:
    text = format_report([GOOD, MISSING, OPTIONAL])
    assert "MISSING deepspeed   not installed" in text
    assert "-> pip install deepspeed" in text
    assert "-> pip install flash-attn" in text
    assert text.endswith("Training needs: deepspeed.")
    assert format_report([GOOD, OPTIONAL]).endswith("Everything that training needs works.")


def test_json_output_is_nothing_but_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(config: TrainConfig | None) -> list[Check]:
        print("a library greets")
        return [GOOD, OPTIONAL]

    monkeypatch.setattr(doctor, "run_checks", chatty)
    doctor.doctor(as_json=True)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [check["name"] for check in report["checks"]] == ["torch", "flash-attn"]
    assert report["checks"][1]["remedy"] == "pip install flash-attn"
    assert "a library greets" in captured.err


@pytest.fixture(scope="module")
def checks() -> dict[str, Check]:
    """What is found here."""
    return {check.name: check for check in run_checks()}


def test_this_environment_is_described_truthfully(checks: dict[str, Check]) -> None:
    for name in ("torch", "triton", "transformers", "deepspeed", "av"):
        assert checks[name].ok, checks[name]
        assert checks[name].detail == metadata.version(name)
    assert set(checks) >= {"python", "torchcodec", "liger-kernel", "flash-attn", "fastr1_kernels", "device"}
    assert checks["deepspeed accelerator"].detail in ("cpu", "cuda")
    assert re.fullmatch(r".+: \S+ TFLOP/s in matrix products, \S+ GB/s in copies", checks["speed"].detail)
    assert checks["attention"].ok, checks["attention"]
    assert re.match(
        r"(float32 on cpu: training sdpa \(\w+\), rollout engine \(scaled_dot_product_\w+; its tokens by plain torch"
        r"|bfloat16 on cuda:0: training \w+ \(.+\), rollout engine \(.+; its tokens by a Triton kernel)\), vision sdpa",
        checks["attention"].detail,
    )
    assert not [check for check in checks.values() if not check.ok and not check.remedy]


def test_every_kernel_is_run(checks: dict[str, Check]) -> None:
    found = {name.removeprefix("kernel "): check for name, check in checks.items() if name.startswith("kernel ")}
    functions = {getattr(fastr1_kernels, name).__name__ for name in fastr1_kernels.__all__ if name[0].islower()}
    assert {name.partition(",")[0] for name in found} == functions
    assert [check for check in found.values() if not check.ok] == []
    assert all(re.match(r"(interpreted on the CPU|launched on .*), relative", check.detail) for check in found.values())


@pytest.mark.parametrize(("way", "is_essential"), [("interpreted on the CPU", False), ("launched on a GPU", True)])
def test_a_kernel_that_is_wrong_matters_where_training_uses_it(
    monkeypatch: pytest.MonkeyPatch, way: str, is_essential: bool
) -> None:
    findings = [
        {"name": "grpo_loss", "ok": False, "detail": f"not {way}: RuntimeError: no such instruction"},
        {"name": "linear_logps", "ok": False, "detail": f"{way}, relative error inf, which is more than 0.0001"},
    ]
    output = "a library greets\n" + "\n".join(map(json.dumps, findings))
    done = subprocess.CompletedProcess("", 1, output, "")
    monkeypatch.setattr(doctor, "_run_selfcheck", lambda: done)
    report = doctor._run_kernels()
    assert [(check.name, check.ok, check.essential) for check in report] == [
        ("kernel grpo_loss", False, is_essential),
        ("kernel linear_logps", False, is_essential),
    ]
    assert all(check.remedy for check in report)


def test_a_check_of_the_kernels_that_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.CompletedProcess("", -11, "", "Segmentation fault\n")
    monkeypatch.setattr(doctor, "_run_selfcheck", lambda: dead)
    (check,) = doctor._run_kernels()
    assert (check.ok, check.detail) == (False, "did not run: Segmentation fault")


@pytest.mark.parametrize(
    ("rollout", "found"),
    [
        (RolloutConfig("eager"), r"rollout eager \(products and softmax\)"),
        (RolloutConfig("engine"), r"rollout engine \(scaled_dot_product_flash_\w+; its tokens by"),
        (
            RolloutConfig("engine", num_speculative_tokens=2),
            r"rollout engine \(scaled_dot_product_flash_\w+; its tokens",
        ),
    ],
)
def test_attention_is_that_of_training_and_of_what_samples(rollout: RolloutConfig, found: str) -> None:
    config = TrainConfig(model=ModelConfig(attn_implementation="eager", dtype="bfloat16"), rollout=rollout)
    detail = doctor.check_attention(config)
    assert re.match(r"bfloat16 on \S+: training \w+ \(\w+", detail)
    assert re.search(found, detail)
    assert ", vision eager (" in detail


def test_attention_that_is_not_packed_in_training_is_found() -> None:
    config = TrainConfig(model=ModelConfig(packed_attn_implementation="eager", gradient_checkpointing=True))
    detail = doctor.check_attention(config)
    assert "training eager (products and softmax), rollout engine (products and softmax; its tokens" in detail


def test_attention_and_decoder_are_those_of_the_configuration() -> None:
    config = TrainConfig(data=DataConfig(backend="pyav"))
    assert doctor.check_video(config.data.backend).startswith("pyav")
    with pytest.raises(Exception, match="flash"):
        doctor.check_attention(TrainConfig(model=ModelConfig(attn_implementation="flash_attention_nine")))


def test_command_takes_a_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[TrainConfig | None] = []
    monkeypatch.setattr(doctor, "doctor", lambda as_json, config: seen.append(config) or 0)
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--config", "grpo", "--set", "data.backend=pyav"]) == 0
    assert cli.main(["doctor", "--set", "data.backend=pyav"]) == 2
    assert "give --config too" in capsys.readouterr().err
    assert seen[0] is None
    assert seen[1] is not None
    assert (seen[1].data.backend, seen[1].grpo.loss_type) == ("pyav", "dapo")


def test_deepspeed_does_not_warn_that_there_is_no_gpu() -> None:
    importlib.import_module("fastr1.training")
    library = importlib.util.find_spec("deepspeed")
    assert library is not None
    assert library.origin is not None
    source = (Path(library.origin).parent / "accelerator" / "real_accelerator.py").read_text()
    (warning,) = re.findall(r'accel_logger\.warning\(\s*"(.*?)"', source)  # what it says in the installed version
    logger = logging.getLogger("DeepSpeed")
    assert not logger.filter(logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, warning, (), None))
    assert logger.filter(logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, "overflow", (), None))


def test_video_round_trip_works_here_and_agrees_with_the_line_about_torchcodec(checks: dict[str, Check]) -> None:
    assert checks["video decoding"].ok, checks["video decoding"]
    on_gpu = torch.cuda.is_available() and checks["torchcodec"].ok
    assert checks["video decoding"].detail.startswith("torchcodec" if on_gpu else "pyav")


def test_a_library_that_is_installed_but_broken_is_told_from_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("Could not load libavutil.so\n  tried 4, 5, 6")

    broken = doctor._Library("torch", "torch", True, "reinstall")
    monkeypatch.setattr(importlib, "import_module", fail)
    check = doctor._check_library(broken)
    assert not check.ok
    assert "does not import: RuntimeError: Could not load libavutil.so tried 4, 5, 6" in check.detail
    assert metadata.version("torch") in check.detail
    missing = doctor._check_library(doctor._Library("fastr1-no-such", "x", True, "install it"))
    assert (missing.ok, missing.detail, missing.remedy) == (False, "not installed", "install it")


def test_test_clip_has_the_brightness_it_claims(tmp_path: Path) -> None:
    import av

    levels = doctor._write_brightening_clip(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        means = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert len(means) == len(levels) == 12
    assert max(abs(mean - level) for mean, level in zip(means, levels, strict=True)) < 4


@pytest.mark.parametrize(("offset", "is_good"), [(0, True), (1, False), (-1, False)])
def test_video_check_notices_a_neighbouring_frame(monkeypatch: pytest.MonkeyPatch, offset: int, is_good: bool) -> None:
    import torch

    from fastr1.schema import Clip

    def load_clip(path: Path, *, num_frames: int, device: str, backend: str) -> Clip:
        indices = tuple(range(1, 1 + num_frames))
        frames = torch.stack([torch.full((3, 4, 4), 42 + 15 * (i + offset), dtype=torch.uint8) for i in indices])
        return Clip(frames, indices, (0.0,) * num_frames, 24.0, 1.0, "test")

    fake = ModuleType("fastr1.video")
    fake.load_clip = load_clip  # type: ignore[attr-defined]
    fake.describe_backend = lambda backend: "a decoder"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastr1.video", fake)
    if is_good:
        assert doctor.check_video() == "test read a test clip correctly; a decoder"
    else:
        with pytest.raises(ValueError, match="test read frames of brightness"):
            doctor.check_video()
