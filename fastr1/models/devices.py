"""Where a model lives and in which precision, from the names a configuration uses."""

from __future__ import annotations

import os

import torch


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
