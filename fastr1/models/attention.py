"""Which attention a model can compute with, known before one is built."""

from __future__ import annotations

import difflib

import torch
from transformers import AttentionInterface
from transformers.utils import import_utils

from fastr1.config import ConfigError


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a `model.attn_implementation` that transformers does not have, or that cannot run here.

    Names of kernels to be downloaded are refused too: nothing is fetched while training.
    Raises: ConfigError naming the value and the remedy.
    """
    setting = f"model.attn_implementation is {name!r}"
    known = ["eager", *sorted(key for key in AttentionInterface().valid_keys() if "|" not in key)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
        raise ConfigError(f"{setting}, which transformers does not have; {meant}")
    if name.startswith(("flash_attention", "flex_attention")) and device.type != "cuda":
        raise ConfigError(f"{setting}, which needs a GPU, and training runs on {device.type}; use 'sdpa'")
    if name.startswith("flash_attention"):
        if dtype is not torch.bfloat16:
            raise ConfigError(f"{setting}, which needs model.dtype 'bfloat16'; use that, or 'sdpa'")
        is_installed = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", lambda: False)
        if not is_installed():
            raise ConfigError(f"{setting}, whose package cannot be used here; install flash-attn, or use 'sdpa'")
