"""Log-probability of given tokens, from logits or straight from hidden states: the public doors.

Logits are scored by `rows`, in one Triton kernel on a GPU; a linear head is scored in chunks (`linear`).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .checks import check_head, check_rows, check_temperatures, check_token_ids
from .dispatch import may_read_values
from .head import HeadOptions, HeadTensors
from .linear import chunked_linear_logps, default_chunk_size, linear_rows
from .linear_ops import compiled_linear_logps
from .options import check_number
from .rows import score_rows


@overload
def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
    check_values: bool = ...,
) -> Tensor: ...
@overload
def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = ...,
    return_entropy: Literal[True],
    check_values: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...,) integers
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    check_values: bool = True,  # False, or inside torch.compile: ids are not read, nothing waits for the device
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at token_ids; differentiable.

    Returns:
        logps (...), float32 (float64 for float64 logits); with `return_entropy` also the entropy of each row (...),
        differentiable too. Both are differentiable once. Logits of -inf have probability 0. They are read once, on a
        GPU by one Triton kernel.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an id outside the vocabulary.
    """
    check_rows("logits", logits, token_ids)
    check_number("temperature", temperature, above=0)
    if may_read_values(check_values):
        check_token_ids(token_ids, logits.shape[-1])
    scores = score_rows(logits, token_ids, temperature=temperature, compute_entropy=return_entropy)
    logps, entropy = (x.view(token_ids.shape) for x in scores)
    return (logps, entropy) if return_entropy else logps


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    lora_a: Tensor | None = ...,
    lora_b: Tensor | None = ...,
    lora_scale: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    logits_dtype: torch.dtype | None = ...,
    temperature: float | Tensor = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    return_entropy: Literal[False] = ...,
    chunk_size: int | None = ...,
    check_values: bool = ...,
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    lora_a: Tensor | None = ...,
    lora_b: Tensor | None = ...,
    lora_scale: float = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    logits_dtype: torch.dtype | None = ...,
    temperature: float | Tensor = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    return_entropy: Literal[True],
    chunk_size: int | None = ...,
    check_values: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_logps(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...,) integers
    *,
    bias: Tensor | None = None,  # (V,)
    lora_a: Tensor | None = None,  # (r, D)
    lora_b: Tensor | None = None,  # (V, r)
    lora_scale: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,  # or (...,)
    top_k: int | None = None,
    top_p: float | None = None,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    check_values: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_log_softmax` of z = logit_scale · (hidden @ weightᵀ + bias), or of softcap · tanh(z / softcap).

    The (..., V) logits never exist as a whole. `chunk_size` is the number of rows at a time; None is 512 on a CPU, on a
    GPU 4,096, or 2,048 with a frozen head. The result does not depend on it beyond rounding.

    With `lora_a`, `lora_b` the weight is weight + lora_scale · lora_b @ lora_a, which is never computed. `logits_dtype`
    torch.float32 keeps the products of half inputs unrounded. `top_k`, `top_p` score under the distribution that a
    sampler truncates to: the top_k largest logits, of these the fewest that reach top_p, equal logits together,
    and always the token.
    `check_values=False` leaves out what reads values from the device, and so waits for it.

    Returns:
        As `selective_log_softmax`. Products are taken in the dtype of the inputs, everything after them in float32;
        the gradients of the head are summed over chunks in float32 and are not computed where they are not needed.
        Differentiable once.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an id outside the vocabulary.
    """
    check_rows("hidden", hidden, token_ids)
    temperatures = temperature.detach().reshape(-1) if isinstance(temperature, Tensor) else None
    head, options = (
        HeadTensors(weight, bias, lora_a, lora_b),
        HeadOptions(
            lora_scale=lora_scale,
            logits_dtype=logits_dtype,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=1.0 if isinstance(temperature, Tensor) else temperature,
            top_k=top_k,
            top_p=top_p,
        ),
    )
    check_head(hidden, head, options, chunk_size)
    check_number("temperature", options.temperature, above=0)
    check_values = may_read_values(check_values)
    if isinstance(temperature, Tensor):
        check_temperatures(temperature, token_ids, None, check_values)
    if check_values:
        check_token_ids(token_ids, weight.shape[0])
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1)
    is_frozen = not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head))
    size = chunk_size or default_chunk_size(hidden, is_frozen)
    if torch.compiler.is_compiling():
        logps, entropy = compiled_linear_logps(flat, head, ids, temperatures, size, options, return_entropy)
    else:
        rows = linear_rows(flat, ids, temperatures, size)
        logps, entropy = chunked_linear_logps(rows, head, options, return_entropy)
    logps, entropy = logps.view(token_ids.shape), entropy.view(token_ids.shape)
    return (logps, entropy) if return_entropy else logps
