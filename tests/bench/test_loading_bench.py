"""The loading bench tells a right output from one of other frames or another filter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The benches are no package. At the end of the path: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
clips = pytest.importorskip("clips", reason="bench/ is not there")
shapes = pytest.importorskip("shapes")
loading = pytest.importorskip("test_loading")

PROVIDERS = ("ours", "PyAV, all frames to RGB", "PyAV, all frames preprocessed")


@pytest.fixture(scope="module")
def group() -> Any:
    return clips.loading_group(shapes.LoadingCase(width=320, height=180, seconds=2, num_frames=5, side=96))


@pytest.mark.parametrize("name", PROVIDERS)
def test_what_runs_everywhere_gives_the_reference(group: Any, name: str) -> None:
    outputs = loading.OPS["load_pixels"][name](group.inputs)()
    assert outputs["frames"].tolist() == [0, 12, 24, 36, 49]
    assert group.errors(outputs) == {"frames": 0.0, "pixels": pytest.approx(0.0, abs=1e-6)}


def test_ours_is_held_to_the_same_pixels_where_no_video_engine_converts_colours(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert group.strict_tolerance == 1e-4
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert group.strict_tolerance == clips.TOLERANCE


def test_other_frames_and_a_resize_without_antialiasing_are_told_apart(group: Any) -> None:
    frames = clips.decode_all(group.inputs)
    chosen = [frames[i] for i in (0, 12, 24, 36, 49)]
    late = torch.stack([torch.from_numpy(clips.preprocess_one(frames[i], 96)) for i in (1, 12, 24, 36, 49)])
    assert group.errors(clips.outputs_of(late))["frames"] >= 1
    small = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in chosen]).float() / 127.5 - 1
    nearest = torch.nn.functional.interpolate(small, (96, 96))
    area = torch.nn.functional.interpolate(small, (96, 96), mode="area")
    errors = {name: group.errors(clips.outputs_of(x))["pixels"] for name, x in (("nearest", nearest), ("area", area))}
    assert errors["area"] < clips.TOLERANCE < errors["nearest"], errors
