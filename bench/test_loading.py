"""How long does one thread need from a video file to the vision tower's input: decode, resize, normalise?"""

from __future__ import annotations

from functools import partial
from typing import Any

import harness
import numpy as np
import pytest
import torch
from clips import Clip, decode_all, loading_group, outputs_of, preprocess_one, wanted
from harness import Call, Group
from providers import load
from shapes import LoadingCase
from torch import Tensor

from fastr1.config import DataConfig
from fastr1.video import load_pixels, preprocess_frames


def ours(clip: Clip) -> Call:
    case = clip.case
    data = DataConfig(num_frames=case.num_frames)
    preprocess = partial(preprocess_frames, height=case.side, width=case.side)
    return lambda: outputs_of(load_pixels(clip.path, data, preprocess, harness.device()))


def normalised(pictures: np.ndarray) -> Tensor:
    """(F, S, S, 3) uint8 to (F, 3, S, S) in [-1, 1] on the device, in as few passes as torch has for it."""
    pixels = torch.from_numpy(pictures).to(harness.device()).permute(0, 3, 1, 2).contiguous().float()
    return pixels.mul_(2 / 255).sub_(1)


def opencv(clip: Clip, interpolation: str) -> Call:
    """Reads on to each wanted frame, and converts and resizes only those."""
    cv2 = load("cv2")
    cv2.setNumThreads(1)
    case, filter_ = clip.case, getattr(cv2, interpolation)

    def call() -> harness.Outputs:
        capture = cv2.VideoCapture(str(clip.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        num_available = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        position, pictures = -1, []
        for index in wanted(num_available, case.num_frames):
            while position < index:
                capture.grab()
                position += 1
            resized = cv2.resize(capture.retrieve()[1], (case.side, case.side), interpolation=filter_)
            pictures.append(cv2.cvtColor(resized, cv2.COLOR_BGR2RGB))
        return outputs_of(normalised(np.stack(pictures)))

    return call


def decord(clip: Clip) -> Call:
    """With its own resize, in the filter graph that converts the colours."""
    reader_class = load("decord").VideoReader
    case = clip.case

    def call() -> harness.Outputs:
        reader = reader_class(str(clip.path), width=case.side, height=case.side, num_threads=1)
        frames = reader.get_batch(wanted(len(reader), case.num_frames)).asnumpy()
        return outputs_of(normalised(frames))

    return call


def decode_all_first(clip: Clip) -> Call:
    """Every frame to RGB, then the wanted ones one by one: what the original does, without its copy in float32."""

    def call() -> harness.Outputs:
        frames = decode_all(clip)
        chosen = [frames[index] for index in wanted(len(frames), clip.case.num_frames)]
        pixels = np.stack([preprocess_one(picture, clip.case.side) for picture in chosen])
        return outputs_of(torch.from_numpy(pixels).to(harness.device()))

    return call


def preprocess_all(clip: Clip) -> Call:
    """Every frame to RGB, resized and normalised, and of those the wanted ones."""

    def call() -> harness.Outputs:
        pixels = [preprocess_one(picture, clip.case.side) for picture in decode_all(clip)]
        chosen = np.stack([pixels[index] for index in wanted(len(pixels), clip.case.num_frames)])
        return outputs_of(torch.from_numpy(chosen).to(harness.device()))

    return call


OPS = {
    "load_pixels": {
        "ours": ours,
        "OpenCV, INTER_AREA": partial(opencv, interpolation="INTER_AREA"),
        "OpenCV, INTER_CUBIC": partial(opencv, interpolation="INTER_CUBIC"),
        "decord, its resize": decord,
        "PyAV, all frames to RGB": decode_all_first,
        "PyAV, all frames preprocessed": preprocess_all,
    }
}


def set_up(case: LoadingCase) -> Group:
    return loading_group(case)


def test_loading(case: LoadingCase, provider: str, make: Any, run: Any, pytestconfig: pytest.Config) -> None:
    if provider == "PyAV, all frames preprocessed" and case.height > 480 and not pytestconfig.getoption("--full"):
        pytest.skip("seconds a call: --full")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(provider, make, rounds=9)
    finally:
        torch.set_num_threads(num_threads)
