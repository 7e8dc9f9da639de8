"""What the doctor finds, prints and returns."""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastr1 import doctor
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
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)
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
    def chatty() -> list[Check]:
        print("a library greets")
        return [GOOD, OPTIONAL]

    monkeypatch.setattr(doctor, "run_checks", chatty)
    doctor.doctor(as_json=True)
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [check["name"] for check in report["checks"]] == ["torch", "flash-attn"]
    assert report["checks"][1]["remedy"] == "pip install flash-attn"
    assert "a library greets" in captured.err


def test_this_environment_is_described_truthfully() -> None:
    checks = {check.name: check for check in run_checks()}
    for name in ("torch", "triton", "transformers", "deepspeed", "av"):
        assert checks[name].ok, checks[name]
        assert checks[name].detail == metadata.version(name)
    assert set(checks) >= {"python", "torchcodec", "liger-kernel", "flash-attn", "fastr1_kernels", "device"}
    assert checks["deepspeed accelerator"].detail in ("cpu", "cuda")
    assert not [check for check in checks.values() if not check.ok and not check.remedy]


def test_video_round_trip_works_here_and_agrees_with_the_line_about_torchcodec() -> None:
    checks = {check.name: check for check in run_checks()}
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
    fake.describe_backend = lambda: "a decoder"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastr1.video", fake)
    if is_good:
        assert doctor.check_video() == "test read a test clip correctly; a decoder"
    else:
        with pytest.raises(ValueError, match="test read frames of brightness"):
            doctor.check_video()
