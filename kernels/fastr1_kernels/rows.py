"""Log-probability and entropy of one token per row of logits, differentiable once: one operator, two backends.

Forward gives log-probabilities, entropies and two numbers a row from which backward makes the gradient of the logits,
in one more reading of them. `gpu.rows` does it in Triton, `torch_rows` elsewhere; `dispatch` has the rule. Inside
`torch.compile` both directions are operators of torch, `fastr1::score_rows` and `fastr1::row_gradients`. Eager code
does without: calling an operator that is written in Python costs more, and the first time imports the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import torch_rows
from .dispatch import uses_triton
from .head import sum_dtype

ONCE = "results of fastr1_kernels are differentiable once: leave create_graph=True out"
Scores = tuple[Tensor, Tensor, Tensor]


def score_rows(
    logits: Tensor,  # (..., V), any strides
    token_ids: Tensor,  # (...,) integers
    mask: Tensor | None = None,  # (...,) bool; masked rows reach nothing and score 0
    *,
    temperature: float = 1.0,
    inplace: bool = False,
    compute_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """logps and entropy, both (N,), float32 or of float64 logits float64; arguments are checked.

    Without `compute_entropy` the entropy is not summed: zeros, without gradient. With `inplace` the backward pass
    overwrites the logits with their gradient; inside `torch.compile`, which plans memory itself, it has no effect.
    """
    mask = None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)
    arguments = (as_grid(logits), token_ids.reshape(-1).contiguous(), mask, float(temperature), compute_entropy)
    is_compiling = torch.compiler.is_compiling()
    logps, entropy, _ = score_rows_op(*arguments) if is_compiling else _ScoreRows.apply(*arguments, inplace)
    return logps, entropy if compute_entropy else entropy.detach()


def as_grid(logits: Tensor) -> Tensor:
    """(..., V) as (B, T, V): a view of up to three axes, beyond that wherever the strides allow."""
    if logits.dim() > 3:
        return logits.flatten(0, -3)
    return logits[None, None] if logits.dim() == 1 else logits[:, None] if logits.dim() == 2 else logits


def compute_scores(
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (N,), N = B·T
    mask: Tensor | None,  # (N,) uint8
    temperature: float,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logps (N,), entropy (N,) and what `write_gradient` needs, (2, N)."""
    if uses_triton(logits):
        from .gpu.rows import launch_scores  # triton exists on Linux only

        return launch_scores(logits, token_ids, mask, temperature, compute_entropy)
    return torch_rows.score(logits, token_ids, mask, temperature, compute_entropy)


def write_gradient(
    out: Tensor,  # (B, T, V), may be the logits
    logits: Tensor,  # (B, T, V)
    token_ids: Tensor,  # (N,)
    mask: Tensor | None,  # (N,) uint8
    d_logps: Tensor | None,  # (N,)
    d_entropy: Tensor | None,  # (N,)
    entropy: Tensor,  # (N,)
    state: Tensor,  # (2, N)
    temperature: float,
) -> None:
    d_logps = torch.zeros_like(entropy) if d_logps is None else d_logps.contiguous()
    d_entropy = None if d_entropy is None else d_entropy.contiguous()
    numbers = (d_logps, d_entropy, entropy, state, temperature)
    if uses_triton(logits):
        from .gpu.rows import launch_gradient  # triton exists on Linux only

        launch_gradient(logits, token_ids, mask, *numbers, out)
    else:
        torch_rows.gradient(logits, token_ids, mask, *numbers, out)


@torch.library.custom_op("fastr1::score_rows", mutates_args=())
def score_rows_op(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, compute_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return compute_scores(logits, token_ids, mask, temperature, compute_entropy)


@score_rows_op.register_fake
def _(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, compute_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = token_ids.shape[0], sum_dtype(logits.dtype)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape in ((n,), (n,), (2, n)))  # type: ignore[return-value]


@torch.library.custom_op("fastr1::row_gradients", mutates_args=())
def row_gradients_op(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    d_logps: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    state: Tensor,
    temperature: float,
) -> Tensor:
    d_logits = _empty_like(logits)
    write_gradient(d_logits, logits, token_ids, mask, d_logps, d_entropy, entropy, state, temperature)
    return d_logits


@row_gradients_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return _empty_like(logits)


def _empty_like(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Scores) -> None:
    logits, token_ids, mask, temperature, _, *inplace = inputs
    ctx.save_for_backward(logits, token_ids, mask, *output[1:])
    ctx.temperature, ctx.inplace = temperature, inplace == [True]
    ctx.set_materialize_grads(False)


def _saved(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None) -> tuple[Any, ...]:
    """The arguments of `row_gradients_op`."""
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    logits, token_ids, mask, entropy, state = ctx.saved_tensors
    return logits.detach(), token_ids, mask, d_logps, d_entropy, entropy, state, ctx.temperature


def _backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    arguments = _saved(ctx, d_logps, d_entropy)
    d_logits = None if d_logps is None and d_entropy is None else row_gradients_op(*arguments)
    return d_logits, None, None, None, None


score_rows_op.register_autograd(_backward, setup_context=_save)


class _ScoreRows(torch.autograd.Function):
    """The operator for eager code, where the gradient may take the place of the logits."""

    @staticmethod
    def forward(*inputs: Any) -> Scores:
        return compute_scores(*inputs[:-1])

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        logits, *arguments = _saved(ctx, d_logps, d_entropy)
        if d_logps is None and d_entropy is None:
            return (None,) * 6
        d_logits = logits if ctx.inplace else _empty_like(logits)
        write_gradient(d_logits, logits, *arguments)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return d_logits, None, None, None, None, None
