"""Liger's RMSNorm, SwiGLU and rotary embedding in the decoder of a model, layer by layer.

The modules of the decoder stay what they are, with their parameters and the names of these; only their `forward` is
another, on the instance. Nothing of transformers is replaced for other models. Rotation is a function of the modelling
file and no module: attention's own `forward` runs unchanged, with Liger's function in the place of that one name.

Known are the text decoders of Qwen2, Qwen2.5-VL, Qwen3, Qwen3-VL and Llama. Their norms multiply with the weight in the
dtype of the input after normalising in fp32 (Liger's casting mode "llama", offset 0).
Source: liger-kernel 0.8, arXiv 2410.10989.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from fastr1.config import ConfigError
from fastr1.models.decoder_stack import ATTENTIONS, MLPS, NORMS, is_of_transformers

_ROTATION = "apply_rotary_pos_emb"

logger = logging.getLogger(__name__)


def resolve_liger(setting: bool | None, device: torch.device) -> bool:
    """Whether to use Liger's layers on a device: None is where there are a GPU and the package.

    Raises: ConfigError where they are asked for and cannot run.
    """
    is_installed = importlib.util.find_spec("liger_kernel") is not None
    can_run = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if setting is None:
        return is_installed and device.type == "cuda"
    if setting and not is_installed:
        raise ConfigError("model.use_liger_kernel is True, but liger-kernel is not installed; install it, or use null")
    if setting and not can_run:
        raise ConfigError(f"model.use_liger_kernel is True, which needs a GPU, and training runs on {device}; use null")
    return setting


def apply_liger(decoder: nn.Module, setting: bool | None) -> None:
    """Give a decoder that was loaded for training the layers that `model.use_liger_kernel` asks for, and say so.

    Raises: ConfigError where they are asked for by True and cannot run, or the decoder is not known. With None such a
    decoder keeps its layers.
    """
    device = next(decoder.parameters()).device
    if not resolve_liger(setting, device):
        return
    unknown = unknown_layers(decoder)
    if unknown and setting is None:
        logger.warning("model.use_liger_kernel: %s keeps its own layers: %s", type(decoder).__name__, unknown)
        return
    use_liger_layers(decoder)
    logger.info("%s computes norms, MLPs and rotation with Liger's kernels", type(decoder).__name__)


def use_liger_layers(decoder: nn.Module) -> None:
    """Let every norm, MLP and attention of a decoder of transformers compute with Liger's kernels from now on.

    Values and gradients are those of the plain layers up to rounding. A backward pass overwrites what the forward pass
    of an MLP saved, so a graph can be gone through once.

    Raises: ConfigError naming what is not known in this decoder, before anything was changed.
    """
    if unknown := unknown_layers(decoder):
        raise ConfigError(
            f"model.use_liger_kernel is True, but {type(decoder).__name__} has {unknown}; use null or false"
        )
    for module in decoder.modules():
        name = type(module).__name__
        if name in NORMS:
            module.forward = MethodType(_norm, module)
        elif name in MLPS:
            module.forward = MethodType(_mlp, module)
        elif name in ATTENTIONS:
            module.forward = MethodType(_with_rotation(type(module).forward), module)


def unknown_layers(decoder: nn.Module) -> str:
    """What of a decoder keeps Liger's layers from being used, or nothing."""
    kinds = {type(module): (type(module).__name__, module) for module in decoder.modules()}
    known = {*NORMS, *MLPS, *ATTENTIONS}
    endings = ("Norm", "MLP", "Attention", "MoeBlock", "Experts")
    layers = [(name, module) for name, module in kinds.values() if name.endswith(endings)]
    strange = [name for name, module in layers if name not in known or not is_of_transformers(module)]
    found = [", ".join(strange) + ", not known here"] if strange else []
    for name, module in sorted(layers, key=lambda layer: layer[0]):
        if name in MLPS and not isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
            found.append(f"an MLP gated by {type(module.act_fn).__name__}, not by SiLU")
        if name in ATTENTIONS and _ROTATION not in type(module).forward.__code__.co_names:
            found.append(f"{name} without {_ROTATION}, as another version of transformers has it")
    return " and ".join(found) if layers else "no layer that is known here"


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """The gradient is not written over that of the output, which may be needed elsewhere (`in_place`)."""
    from liger_kernel.ops import LigerRMSNormFunction

    out: torch.Tensor = LigerRMSNormFunction.apply(
        hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None
    )
    return out


def _mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    out: torch.Tensor = self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
    return out


def _rotate(
    query: torch.Tensor,  # (B, heads, L, head_dim), written over where it lies by token, as a projection leaves it
    key: torch.Tensor,  # (B, kv heads, L, head_dim), the same
    cos: torch.Tensor,  # (B or 1, L, head_dim), its halves equal
    sin: torch.Tensor,  # the same
) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.ops import LigerRopeFunction

    rotated: tuple[torch.Tensor, torch.Tensor] = LigerRopeFunction.apply(query, key, cos, sin)
    return rotated


def _with_rotation(forward: Any) -> FunctionType:
    """The same code, for which one global name stands for Liger's function."""
    names = {**forward.__globals__, _ROTATION: _rotate}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
