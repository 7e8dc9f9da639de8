"""Where a model lives and in which precision, from the names a configuration uses."""

from __future__ import annotations

import os

import torch

from fastr1.config import ConfigError


def parse_device(name: str | None) -> torch.device:
    """The device called "cpu", "cuda" or "cuda:1"; None is this process's GPU where there is one, else the CPU.

    Raises: ConfigError for another name or a GPU that is not here.
    """
    if name is None:
        return resolve_device()
    kind, colon, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise ConfigError(f"device is {name!r}; choose cpu, cuda, or cuda:N for one of several GPUs")
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        found = f"this machine has cuda:0 to cuda:{count - 1}" if count else "torch finds no GPU here"
        raise ConfigError(f"device is {name!r}, but {found}; choose cpu, or a GPU that is here")
    return resolve_device() if name == "cuda" else torch.device(name)


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
