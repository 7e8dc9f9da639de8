"""The linear head of a language model: logits of a chunk of rows, and the gradients that come back through it.

With W (V, D), optional bias c, and optional low-rank weights A (r, D), Bₗ (V, r) of factor s, before scale and cap:
    z = h Wᵀ + s·(h Aᵀ) Bₗᵀ + c
    dh = dz W + s·(dz Bₗ) A      dW += dzᵀ h      dA += s·(dz Bₗ)ᵀ h      dBₗ += s·dzᵀ (h Aᵀ)      dc += Σ dz
The weights' gradients are summed over chunks in float32 (float64 for float64); those not needed are neither computed
nor allocated. W + s·Bₗ A, (V, D), never exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class HeadTensors(NamedTuple):
    """What of a head can be trained."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    lora_a: Tensor | None = None  # (r, D)
    lora_b: Tensor | None = None  # (V, r)


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """What is done to the product; the order is that of the fields."""

    lora_scale: float = 1.0
    logits_dtype: torch.dtype | None = None  # of the product, once; None: as hidden
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply_into(out: Tensor, hidden: Tensor, head: HeadTensors, lora_scale: float) -> None:
    """out = z of the formula above, (C, V), rounded once to the dtype of `out`: that of `hidden`, or float32."""
    weight, bias, lora_a, lora_b = head
    if out.dtype == hidden.dtype:
        if bias is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(bias, hidden, weight.T, out=out)
        if lora_a is not None and lora_b is not None:
            out.addmm_(hidden @ lora_a.T, lora_b.T, alpha=lora_scale)
        return
    _wide_product(out, hidden, weight.T)
    if lora_a is not None and lora_b is not None:
        low = out.new_empty(len(hidden), len(lora_a))
        _wide_product(low, hidden, lora_a.T)
        out.addmm_(low, lora_b.T.to(out.dtype), alpha=lora_scale)
    if bias is not None:
        out.add_(bias)


def _wide_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """float32 out = left @ right of half-precision factors."""
    if out.is_cuda and torch.version.hip is None:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
        return
    wide = left.to(out.dtype)
    for start in range(0, right.shape[1], 4096):  # no float32 copy of a whole head
        columns = slice(start, start + 4096)
        out[:, columns] = wide @ right[:, columns].to(out.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """total = beta · total + alpha · left @ right, summed in the dtype of `total`, which is not read with beta 0."""
    if left.dtype != right.dtype or (left.dtype != total.dtype and not (total.is_cuda and torch.version.hip is None)):
        left, right = left.to(total.dtype), right.to(total.dtype)
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=alpha, beta=beta)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=alpha, beta=beta, out=total)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """x · factor, in the dtype of x; in place."""
    return x if factor is None else x.mul_(factor)


class HeadGradients:
    """Sums the gradients of `hidden` (N, D) and of the head over chunks of rows.

    The largest of them, that of the weight, is written by the first chunk and only then added to.
    """

    def __init__(self, hidden: Tensor, head: HeadTensors, needed: tuple[bool, ...], lora_scale: float) -> None:
        """`needed` tells which of hidden and the fields of the head need a gradient."""
        self.head, self.lora_scale = head, lora_scale
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        self.is_empty = True
        self.sums = [
            torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device) if x is not None and need else None
            for x, need in zip(head[1:], needed[2:], strict=True)
        ]
        weight = head.weight
        self.sums.insert(
            0, torch.empty(weight.shape, dtype=sum_dtype(weight.dtype), device=weight.device) if needed[1] else None
        )

    def add(self, rows: slice | Tensor, hidden: Tensor, d_logits: Tensor, wide: Tensor, factor: Tensor | None) -> None:
        """Add a chunk: its `rows` of the gradient of hidden, hidden itself (C, D), dz in its dtype and in float32 (or
        twice the same), and what the rows of dz are still to be multiplied by, (C, 1)."""
        weight, _, lora_a, lora_b = self.head
        d_weight, d_bias, d_lora_a, d_lora_b = self.sums
        if self.hidden is not None:
            if isinstance(rows, slice):
                torch.mm(d_logits, weight, out=self.hidden[rows])
                if factor is not None:
                    self.hidden[rows].mul_(factor)
            else:
                self.hidden.index_copy_(0, rows, _scaled(d_logits @ weight, factor))
        weighted = hidden if factor is None else hidden * factor
        if d_weight is not None:
            add_product(d_weight, wide.T, weighted, beta=0.0 if self.is_empty else 1.0)
        self.is_empty = False
        if d_bias is not None:
            d_bias += wide.sum(0, dtype=d_bias.dtype) if factor is None else (factor.T @ wide).squeeze(0)
        if lora_a is None or lora_b is None:
            return
        d_low = _scaled(d_logits @ lora_b, factor)  # (C, r)
        if self.hidden is not None:
            d_hidden = self.lora_scale * (d_low @ lora_a)
            if isinstance(rows, slice):
                self.hidden[rows] += d_hidden
            else:
                self.hidden.index_add_(0, rows, d_hidden)
        if d_lora_a is not None:
            add_product(d_lora_a, d_low.T, hidden, self.lora_scale)
        if d_lora_b is not None:
            add_product(d_lora_b, wide.T, _scaled(hidden @ lora_a.T, factor), self.lora_scale)

    def results(self) -> list[Tensor | None]:
        """The gradients of hidden and of the fields of the head, None where not needed."""
        if self.is_empty and self.sums[0] is not None:
            self.sums[0].zero_()
        return [self.hidden, *self.sums]


def scale_to(total: Tensor | None, dtype: torch.dtype, factor: Tensor | None) -> Tensor | None:
    """total · factor (0-d; None is 1) rounded once to `dtype`; in place where that is its dtype already."""
    if total is None:
        return None
    if factor is None:
        return total.to(dtype)
    out = total if total.dtype == dtype else total.new_empty(total.shape, dtype=dtype)
    # A 0-d factor would be rounded to the dtype of a half-precision total first.
    return torch.mul(total, factor.to(sum_dtype(total.dtype)).view(1), out=out)
