"""Losses of group-relative policy optimisation for language models, and the token step of the decoder that samples.

Names are imported when they are first used: `fastr1_kernels.LossOptions` can check a configuration before torch loads.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "LOSSES",
    "GRPOOutput",
    "LossOptions",
    "SampledTokens",
    "add_rms_norm",
    "decode_attention",
    "group_advantages",
    "grpo_loss",
    "gumbel_noise",
    "linear_grpo_loss",
    "linear_logps",
    "rope_and_store",
    "sample_tokens",
    "selective_log_softmax",
    "swiglu",
]

_MODULES = {
    "LOSSES": "options",
    "GRPOOutput": "losses",
    "LossOptions": "options",
    "SampledTokens": "sampling",
    "add_rms_norm": "decoding",
    "decode_attention": "decoding",
    "group_advantages": "advantages",
    "grpo_loss": "losses",
    "gumbel_noise": "sampling",
    "linear_grpo_loss": "losses",
    "linear_logps": "logps",
    "sample_tokens": "sampling",
    "rope_and_store": "decoding",
    "selective_log_softmax": "logps",
    "swiglu": "decoding",
}

if TYPE_CHECKING:
    from .advantages import group_advantages
    from .decoding import add_rms_norm, decode_attention, rope_and_store, swiglu
    from .logps import linear_logps, selective_log_softmax
    from .losses import GRPOOutput, grpo_loss, linear_grpo_loss
    from .options import LOSSES, LossOptions
    from .sampling import SampledTokens, gumbel_noise, sample_tokens
else:

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use finds it without coming here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
