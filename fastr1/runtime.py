"""What GRPO, SFT and evaluation share around their loops: device and dtype, model loading, clips, signals, export."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastr1.config import DataConfig, TrainConfig
from fastr1.data.records import BadSampleLedger
from fastr1.data.tokenizer import load_tokenizer
from fastr1.engine import Engine
from fastr1.models import TinyLlavaVideo, load_model, save_model
from fastr1.schema import Sample, SftSample
from fastr1.video import VideoError, load_clip, preprocess_frames

logger = logging.getLogger(__name__)


def resolve_device() -> torch.device:
    """This process's CUDA device where there is one (the launcher's LOCAL_RANK), else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a config name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_policy(config: TrainConfig) -> tuple[TinyLlavaVideo, PreTrainedTokenizerBase]:
    """The model to train with its frozen parts, and its tokenizer, from `config.model`."""
    device = resolve_device()
    tokenizer = load_tokenizer(config.model.path)
    model = load_model(
        config.model.path,
        dtype=resolve_dtype(config.model.dtype, device),
        device=device,
        attn_implementation=config.model.attn_implementation,
    )
    model.freeze(config.model.freeze)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model, tokenizer


def image_size_of(model: TinyLlavaVideo) -> int:
    """Side of the frames that the vision tower takes, in pixels."""
    size = model.config.vision.image_size
    assert isinstance(size, int)  # the towers of this family take squares
    return size


def load_pixels(path: Path, data: DataConfig, model: TinyLlavaVideo) -> torch.Tensor:
    """The preprocessed frames (F, 3, S, S) of a video on the device of the model. Thread-safe.

    Raises: VideoError where it cannot be decoded.
    """
    device = model.device
    clip = load_clip(path, num_frames=data.num_frames, max_frames=data.max_frames, device=device, backend=data.backend)
    return preprocess_frames(clip.frames.to(device), image_size=image_size_of(model))


def pixel_loader(
    data: DataConfig, model: TinyLlavaVideo, ledger: BadSampleLedger
) -> Callable[[Sample | SftSample], torch.Tensor | None]:
    """`load_pixels` of a sample, for training.

    A video that cannot be decoded goes to the ledger, which raises under policy "error"; under "skip" the result is
    None. It is never another video.
    """

    def load(sample: Sample | SftSample) -> torch.Tensor | None:
        try:
            return load_pixels(sample.video_path, data, model)
        except VideoError as error:
            ledger.record(sample.origin, str(error))
            return None

    return load


class StopRequest:
    """Set by Ctrl-C or SIGTERM: the loop finishes its step, saves and leaves. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Install the handlers for the duration of the loop."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {s: signal.signal(s, self._handle) for s in signals}
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        logger.warning("%s received: finishing this step, then saving", self.signal_name)

    def agreed(self, engine: Engine) -> bool:
        """Whether any rank was asked to stop; every rank calls this after each update."""
        return engine.sum_across_ranks(torch.tensor(float(bool(self)))).item() > 0


def export_model(engine: Engine, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the trained model in the Hugging Face layout, in the training dtype. All ranks call it."""
    state = engine.consolidated_state_dict()
    if state is not None:
        model: Any = engine.module
        save_model(model, path, tokenizer=tokenizer, state_dict=state)
        logger.info("model written to %s", path)
    engine.barrier()
