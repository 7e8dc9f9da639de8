"""Video language models: the TinyLLaVA-Video architecture, and reading and writing its checkpoints."""

from fastr1.models.loading import ModelFileError, load_model, parse_config, save_model
from fastr1.models.tinyllava import MODULES, TinyLlavaConfig, TinyLlavaVideo

__all__ = [
    "MODULES",
    "ModelFileError",
    "TinyLlavaConfig",
    "TinyLlavaVideo",
    "load_model",
    "parse_config",
    "save_model",
]
