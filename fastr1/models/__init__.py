"""Video language models: what a family offers (`family`), and a folder for each."""

from fastr1.models.devices import parse_device
from fastr1.models.family import (
    DecoderLayout,
    ModelFileError,
    Processor,
    VideoLanguageModel,
    build_model,
    load_model,
    load_processor,
    save_model,
)
from fastr1.models.liger import apply_liger

__all__ = [
    "DecoderLayout",
    "ModelFileError",
    "Processor",
    "VideoLanguageModel",
    "apply_liger",
    "build_model",
    "load_model",
    "load_processor",
    "parse_device",
    "save_model",
]
