"""TinyLLaVA-Video: SigLIP, group resampler, Qwen2 (arXiv 2501.15513, 2504.09641)."""

from fastr1.models.tinyllava.loading import build_model, load_model
from fastr1.models.tinyllava.network import TinyLlavaVideo
from fastr1.models.tinyllava.processor import TinyLlavaProcessor, load_processor

__all__ = ["TinyLlavaProcessor", "TinyLlavaVideo", "build_model", "load_model", "load_processor"]
