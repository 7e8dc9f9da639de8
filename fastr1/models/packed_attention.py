"""Attention of a packed micro-batch: every prompt once, its completions behind it, no padding.

A completion token attends to its whole prompt and, causally, to its own completion. The two parts are computed apart
and merged by their log-sum-exp (lse):

    lse = log(exp(lse_1) + exp(lse_2)),   output = Σ_i exp(lse_i − lse) · output_i

In the backward each part's ordinary flash backward is called with the merged output and lse: it rebuilds its own
probabilities exp(score − lse) from them and the row sums of grad·output, so the gradients are exact and merely added.
Keys and values of a prompt are not copied per completion, nor read once per completion.

FLOPs of the forward, with H heads of size d and prompts of P tokens whose completions have R_g input tokens:
4·H·d·Σ(P² + Σ_g R_g² + P·Σ_g R_g), as torch counts them: causal squares in full. The backward computes the scores again
and takes 2.5 times that. Kernels for dense batches pad short P and R_g to a multiple of 16 (`packed_backends.batches`).
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from fastr1.config import ConfigError, check_value
from fastr1.models.packed_backends import efficient, flash_attn_2, flash_attn_3, flash_attn_4, sdpa, varlen
from fastr1.models.packed_backends.tensors import Inputs, Outputs
from fastr1.models.packed_layout import PackedLayout

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_4": flash_attn_4,
    "varlen": varlen,
    "efficient": efficient,
    "sdpa": sdpa,
}
# Versions of flash-attn in the order they are tried: distribution, module, and majors of compute capability that it has
# kernels for. Not by the module alone: version 2 brings a `flash_attn.cute` along that is an unfinished version 4.
_FLASH_ATTN = {
    "flash_attn_3": ("flash_attn_3", "flash_attn_interface", (9,)),
    "flash_attn_4": ("flash_attn_4", "flash_attn.cute.interface", (9, 10, 11, 12)),
    "flash_attn_2": ("flash_attn", "flash_attn.flash_attn_interface", (8, 9, 10, 12)),
}


def packed_attention(
    query: torch.Tensor,  # (1, H, L, d)
    key: torch.Tensor,  # (1, Hkv, L, d)
    value: torch.Tensor,  # (1, Hkv, L, d)
    layout: PackedLayout,
    scale: float,
    backend: str,
) -> torch.Tensor:  # (1, L, H, d)
    """softmax(scale · query · keyᵀ) · value over what each token of the layout sees; H is a multiple of Hkv.

    `backend` is what `choose_packed_backend` gave. Differentiable once.
    Raises: ValueError where the tensors are not those of the layout.
    """
    if query.shape[0] != 1 or query.shape[2] != layout.num_tokens:
        raise ValueError(
            f"packed attention got queries of shape {tuple(query.shape)} for a layout of {layout.num_tokens} tokens; "
            "give one sequence of all its tokens"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if backend == "eager":
        return eager_packed_attention(q, k, v, layout, scale)[None]
    module = BACKENDS[backend]
    head_dim = q.shape[-1]
    if missing := -head_dim % module.HEAD_DIM_MULTIPLE:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    output: torch.Tensor = _PackedAttention.apply(q, k, v, layout, scale, module)
    return output[None, ..., :head_dim]


def eager_packed_attention(
    query: torch.Tensor,  # (L, H, d)
    key: torch.Tensor,  # (L, Hkv, d)
    value: torch.Tensor,  # (L, Hkv, d)
    layout: PackedLayout,
    scale: float,
) -> torch.Tensor:  # (L, H, d)
    """The same with one softmax over a dense mask of all tokens: what the others are checked against."""
    num_queries_per_key = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_queries_per_key, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    probabilities = scores.masked_fill(~visible(layout, query.device), -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", probabilities, value)


def visible(layout: PackedLayout, device: torch.device) -> torch.Tensor:
    """Which token (row) sees which (column): (L, L) bool."""
    lengths = [*layout.prompt_lengths]
    prompts = [*range(len(layout.prompt_lengths))]
    for prompt, group in enumerate(layout.completion_lengths):
        lengths += group
        prompts += [prompt] * len(group)
    counts = torch.tensor(lengths, device=device)
    segment = torch.arange(len(lengths), device=device).repeat_interleave(counts)
    prompt_of = torch.tensor(prompts, device=device).repeat_interleave(counts)
    order = torch.arange(layout.num_tokens, device=device)
    own = (segment[:, None] == segment) & (order[:, None] >= order)
    prefix = (order[:, None] >= layout.num_prompt_tokens) & (prompt_of[:, None] == segment)
    return own | prefix


class _PackedAttention(torch.autograd.Function):
    """Both parts and their merge, on tokens (L, heads, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: PackedLayout,
        scale: float,
        backend: ModuleType,
    ) -> torch.Tensor:
        head, inputs = layout.num_prompt_tokens, Inputs(query, key, value)
        outputs = backend.forward(inputs, layout.causal, scale)
        if layout.num_tokens > head:
            seen = backend.forward(Inputs(query[head:], key[:head], value[:head]), layout.prefix, scale)
            _merge_(tail_of(outputs, head), seen)
        ctx.save_for_backward(*inputs, *outputs)
        ctx.layout, ctx.scale, ctx.backend = layout, scale, backend
        return outputs.output  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors  # once: gradient checkpointing hands them out once
        inputs, outputs = Inputs(query, key, value), Outputs(output, lse)
        layout, head = ctx.layout, ctx.layout.num_prompt_tokens
        grads = ctx.backend.backward(grad_output, inputs, outputs, layout.causal, ctx.scale)
        if layout.num_tokens > head:
            tail = Inputs(query[head:], key[:head], value[:head])
            shares = ctx.backend.backward(grad_output[head:], tail, tail_of(outputs, head), layout.prefix, ctx.scale)
            grads.query[head:] += shares.query
            for grad, share in zip(grads[1:], shares[1:], strict=True):
                for unread in layout.unread_prompts:
                    share[unread] = 0
                grad[:head] += share
        return *grads, None, None, None


def tail_of(outputs: Outputs, head: int) -> Outputs:
    """The outputs of the completions, as views."""
    return Outputs(outputs.output[head:], outputs.lse[:, head:])


def _merge_(into: Outputs, other: Outputs) -> None:
    """Turn the outputs of one part into those of both, in place."""
    merged = torch.logaddexp(into.lse, other.lse)
    weight, other_weight = ((x.lse - merged).exp_().t()[..., None] for x in (into, other))
    into.output.copy_(into.output * weight + other.output * other_weight)
    into.lse.copy_(merged)


_logged: set[str] = set()


def choose_packed_backend(setting: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of packed attention that a setting of `PackedAttention` means on a device; logged once.

    "auto" is flash-attn where it is installed for the GPU, else "varlen", both in half precision; else "efficient" on
    a GPU, "sdpa" on a CPU: the setting "sdpa" means these two. What is set and cannot run here is refused.
    Raises: ConfigError naming the setting and the remedy.
    """
    check_value("model.packed_attn_implementation", setting)
    flash = _flash_attn_for(device, dtype) if setting in ("auto", "flash_attn") else None
    has_varlen = _can_run_flash(device, dtype)
    dense = "efficient" if device.type == "cuda" else "sdpa"
    chosen = {
        "auto": flash or ("varlen" if has_varlen else dense),
        "flash_attn": flash,
        "varlen": "varlen" if has_varlen else None,
        "sdpa": dense,
        "eager": "eager",
    }[setting]
    if chosen is None:
        if has_varlen:
            needs = "a flash-attn with kernels for this GPU, and none is installed"
        else:
            got = f"{dtype} on {device.type}".replace("torch.", "")
            needs = f"a GPU of compute capability 8.0 or later and model.dtype 'bfloat16', and got {got}"
        raise ConfigError(f"model.packed_attn_implementation is {setting!r}, which needs {needs}; use 'auto' or 'sdpa'")
    if chosen not in _logged:
        _logged.add(chosen)
        logger.info("packed attention: %s", chosen)
    return chosen


def _can_run_flash(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_attn_for(device: torch.device, dtype: torch.dtype) -> str | None:
    """The first installed version of flash-attn that has kernels for a device and a dtype.

    Raises: ConfigError where that cannot be imported.
    """
    if not _can_run_flash(device, dtype):
        return None
    major, _ = torch.cuda.get_device_capability(device)
    for name, (distribution, module, majors) in _FLASH_ATTN.items():
        if major in majors and _is_installed(distribution):
            _check_import(module)
            return name
    return None


@functools.cache  # files are read, and every packed pass asks
def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _check_import(module: str) -> None:
    """A flash-attn that was built for another torch is known before a model is loaded."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"flash-attn is installed and {module} cannot be imported ({error}); build it for torch "
            f"{torch.__version__}, uninstall it, or set model.packed_attn_implementation to 'varlen'"
        ) from error
