"""The model that a configuration trains, as it is before the first update."""

from __future__ import annotations

from fastr1.config import TrainConfig
from fastr1.models import VideoLanguageModel, apply_liger, load_model


def load_policy(config: TrainConfig) -> VideoLanguageModel:
    """The model as trained, its frozen parts without gradient; also the reference."""
    settings = config.model
    model = load_model(settings.path, dtype=settings.dtype, attn_implementation=settings.attn_implementation)
    apply_liger(model.decoder, settings.use_liger_kernel)
    model.freeze(settings.freeze)
    model.packed_attn_implementation = settings.packed_attn_implementation
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model
