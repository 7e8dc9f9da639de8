"""Losses of group-relative policy optimisation for language models, from logits or straight from hidden states.

Names are imported when they are first used: `fastr1_kernels.LossOptions` can check a configuration before torch loads.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "LOSSES",
    "GRPOOutput",
    "LossOptions",
    "group_advantages",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_logps",
    "selective_log_softmax",
]

_MODULES = {
    "LOSSES": "options",
    "GRPOOutput": "losses",
    "LossOptions": "options",
    "group_advantages": "advantages",
    "grpo_loss": "losses",
    "linear_grpo_loss": "losses",
    "linear_logps": "logps",
    "selective_log_softmax": "logps",
}

if TYPE_CHECKING:
    from .advantages import group_advantages
    from .logps import linear_logps, selective_log_softmax
    from .losses import GRPOOutput, grpo_loss, linear_grpo_loss
    from .options import LOSSES, LossOptions
else:

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use finds it without coming here
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
