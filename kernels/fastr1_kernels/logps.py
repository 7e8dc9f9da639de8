"""Log-probability of given tokens, from logits or straight from hidden states: the public doors.

On a GPU logits are scored by one Triton kernel (`gpu.rows`), elsewhere by the reference; a linear head is scored in
chunks (`chunked`). `dispatch` is the rule.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import reference
from .checks import check_linear, check_rows, check_token_ids
from .chunked import chunked_linear_logps
from .dispatch import uses_triton
from .options import check_number


@overload
def selective_log_softmax(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., return_entropy: Literal[False] = ...
) -> Tensor: ...
@overload
def selective_log_softmax(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., return_entropy: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...,) integers
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at token_ids; differentiable.

    Returns:
        logps (...), float32 (float64 for float64 logits); with `return_entropy` also the entropy of each row (...),
        differentiable too. Logits of -inf have probability 0. On a GPU one Triton kernel reads the logits once and the
        result is differentiable once; see `dispatch`.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an id outside the vocabulary.
    """
    check_rows("logits", logits, token_ids)
    check_number("temperature", temperature, above=0)
    check_token_ids(token_ids, logits.shape[-1])
    if uses_triton(logits):
        from .gpu.rows import score_rows  # triton exists on Linux only

        scores = score_rows(logits, token_ids, temperature=temperature, compute_entropy=return_entropy)
        logps, entropy = (x.view(token_ids.shape) for x in scores)
    else:
        logps, entropy = reference.selective_log_softmax(logits, token_ids.long(), temperature)
    return (logps, entropy) if return_entropy else logps


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    temperature: float = ...,
    return_entropy: Literal[False] = ...,
    chunk_size: int | None = ...,
) -> Tensor: ...
@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    temperature: float = ...,
    return_entropy: Literal[True],
    chunk_size: int | None = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_logps(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...,) integers
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_log_softmax` of z = logit_scale · (hidden @ weightᵀ + bias), or of softcap · tanh(z / softcap).

    The (..., V) logits never exist as a whole. `chunk_size` is the number of rows at a time, 1,024 if None; the result
    does not depend on it beyond rounding.

    Returns:
        As `selective_log_softmax`. Products are taken in the dtype of the inputs, everything after them in float32;
        the gradient of the head is summed over chunks in float32 and is not computed where it needs none.
        Differentiable once.

    Raises:
        ValueError: wrong shapes, dtypes or devices, an id outside the vocabulary.
    """
    check_rows("hidden", hidden, token_ids)
    check_linear(hidden, weight, bias, softcap, logit_scale, chunk_size)
    check_number("temperature", temperature, above=0)
    check_token_ids(token_ids, weight.shape[0])
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), token_ids.reshape(-1).long()
    logps, entropy = chunked_linear_logps(rows, weight, bias, ids, (softcap, logit_scale, temperature), chunk_size)
    logps, entropy = logps.view(token_ids.shape), entropy.view(token_ids.shape)
    return (logps, entropy) if return_entropy else logps
