"""Scores and gradients of one chunk of logits, in place: the same buffer holds logits, probabilities, then gradients.

For a row of V logits x after scale, cap and temperature τ, with m = max xⱼ, eⱼ = exp(xⱼ - m), S = Σ eⱼ, pⱼ = eⱼ/S:
    log pⱼ = xⱼ - m - log S      H = log S - Σ pⱼ (xⱼ - m)
    ∂L/∂xⱼ = g·(δⱼᵧ - pⱼ) - h·(pⱼ log pⱼ + pⱼ H),   g = ∂L/∂logp, h = ∂L/∂H
Where x = (cap/τ)·tanh(z/cap), tanh is found again from log pⱼ + log S + m.

`TorchChunk` runs everywhere: one buffer (C, V) of float32 (float64), in which a few rows at a time stay in the cache
while they are worked on, and scratch for as many where entropies are wanted; half inputs add a buffer (C, V) of their
own dtype, for the products. Without h it leaves p - δ there, and -g to the rows (C, D) of the products. `TritonChunk`
needs the half-precision buffer alone, because the row kernels of `gpu.rows` do the float32 work in registers.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from . import reference
from .dispatch import uses_triton
from .head import HeadOptions, HeadTensors, multiply_into, sum_dtype
from .rows import as_grid, compute_scores, write_gradient
from .torch_rows import BLOCK_ELEMENTS, moment


def make_chunk(
    hidden: Tensor, head: HeadTensors, options: HeadOptions, rows: int, per_token_temperature: bool
) -> Chunk:
    """Buffers for up to `rows` rows. The row kernels know one temperature, no cap and no kept set."""
    is_plain = options.softcap is None and options.logit_scale > 0 and not per_token_temperature
    is_plain = is_plain and options.top_k is None and options.top_p is None
    kind = TritonChunk if is_plain and uses_triton(hidden) else TorchChunk
    return kind(hidden, head, options, rows)


class Chunk:
    """Up to `rows` rows of logits: `score` or `restore` them, then perhaps `gradient`."""

    state: Tensor  # (2, C), of the rows scored last

    def __init__(self, hidden: Tensor, head: HeadTensors, options: HeadOptions, rows: int) -> None:
        self.head, self.options = head, options
        self.product_dtype = options.logits_dtype or hidden.dtype
        shape = (rows, head.weight.shape[0])
        self.logits = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        self.wide = self.logits
        if self.logits.dtype != self.work_dtype():
            self.wide = torch.empty(shape, dtype=self.work_dtype(), device=hidden.device)

    def work_dtype(self) -> torch.dtype:
        raise NotImplementedError

    def multiply(self, hidden: Tensor) -> Tensor:
        """The product, in the buffer that is worked on."""
        rows = len(hidden)
        product = self.wide[:rows] if self.product_dtype == self.wide.dtype else self.logits[:rows]
        multiply_into(product, hidden, self.head, self.options.lora_scale)
        return product if product.dtype == self.wide.dtype else self.wide[:rows].copy_(product)

    def score(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None, compute_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """logps and entropy (C,) of rows (C, D), zeros for the entropy where it is not computed; `temperature` is (C,),
        or None for that of the options. What the gradient needs beside them is in `state`, (2, C)."""
        raise NotImplementedError

    def restore(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None, entropy: Tensor, state: Tensor
    ) -> None:
        """What `score` leaves behind for `gradient`, from its results: the product once more, and no sums."""
        raise NotImplementedError

    def gradient(self, d_logps: Tensor, d_entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradient of the product of the rows scored last, (C, V), in the dtype of the head and in the widest there
        is, both buffers; and what the rows are still to be multiplied by, (C, 1), None for 1."""
        raise NotImplementedError


class TorchChunk(Chunk):
    """Its buffer holds logits, then probabilities; state is m and log S."""

    def __init__(self, hidden: Tensor, head: HeadTensors, options: HeadOptions, rows: int) -> None:
        super().__init__(hidden, head, options, rows)
        self.block = rows
        if hidden.device.type == "cpu":
            self.block = min(max(BLOCK_ELEMENTS // self.wide.shape[1], 1), rows)

    def work_dtype(self) -> torch.dtype:
        return sum_dtype(self.logits.dtype)

    def score(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None, compute_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        x = self._start(hidden, token_ids, temperature)
        state, (logps, entropy) = torch.zeros(2, 2, len(x), 1, dtype=x.dtype, device=x.device).unbind()
        self.top, self.log_total = state
        for rows in self._blocks(len(x)):
            p = x[rows]
            self._shape(p, rows)
            token = p.gather(1, self.token_ids[rows])
            torch.amax(p, 1, keepdim=True, out=self.top[rows])
            shifted = torch.sub(p, self.top[rows], out=self.scratch[: len(p)]) if compute_entropy else None
            torch.softmax(p, 1, out=p)
            # The probability of the largest is 1 / S.
            log_total = torch.amax(p, 1, keepdim=True, out=self.log_total[rows]).log_().neg_()
            logps[rows] = token - self.top[rows] - log_total
            if shifted is not None:
                entropy[rows] = log_total - moment(shifted, p, log_total)
        self.entropy, self.state = entropy, state.squeeze(2)
        return logps.squeeze(1), entropy.squeeze(1)

    def restore(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None, entropy: Tensor, state: Tensor
    ) -> None:
        x = self._start(hidden, token_ids, temperature)
        self.entropy = entropy[:, None]
        self.top, self.log_total = state[..., None]
        for rows in self._blocks(len(x)):
            self._shape(x[rows], rows)
            torch.softmax(x[rows], 1, out=x[rows])

    def gradient(self, d_logps: Tensor, d_entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        d = self.wide[: len(d_logps)]
        factor = self._over_temperature(self.options.logit_scale, slice(None))  # ∂x/∂z, but for the cap
        g = d_logps.to(d.dtype)[:, None] * factor
        h = None if d_entropy is None else d_entropy.to(d.dtype)[:, None] * factor
        for rows in self._blocks(len(d)):
            p, ids = d[rows], self.token_ids[rows]
            slope = None if self.options.softcap is None else self._cap_slope(p, rows)
            token: Tensor | float = -1.0
            if h is not None:
                token, weighted = g[rows], torch.special.xlogy(p, p, out=self.scratch[: len(p)]).mul_(-h[rows])
                p.mul_(-(g[rows] + h[rows] * self.entropy[rows])).add_(weighted)
            p.scatter_(1, ids, p.gather(1, ids) + token)
            if slope is not None:
                p.mul_(slope)
        d_logits = self.logits[: len(d)]
        # Without h the factor of a row is left to rows of (C, D), which are narrower.
        return (d if d_logits.dtype == d.dtype else d_logits.copy_(d)), d, -g if h is None else None

    @cached_property
    def scratch(self) -> Tensor:
        return self.wide.new_empty(self.block, self.wide.shape[1])

    def _start(self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None) -> Tensor:
        x = self.multiply(hidden)
        self.token_ids = token_ids[:, None]
        self.temperature = None if temperature is None else temperature.to(x.dtype)[:, None]
        return x

    def _shape(self, x: Tensor, rows: slice) -> None:
        """Scale, cap and temperature, then -inf outside the kept set; in place."""
        o = self.options
        if o.softcap is not None:
            x.mul_(o.logit_scale / o.softcap).tanh_().mul_(self._over_temperature(o.softcap, rows))
        elif self.temperature is not None or o.logit_scale != o.temperature:
            x.mul_(self._over_temperature(o.logit_scale, rows))
        if o.top_k is not None or o.top_p is not None:
            kept = reference.kept_columns(x, self.token_ids[rows].squeeze(1), o.top_k, o.top_p)
            x.masked_fill_(~kept, -math.inf)

    def _over_temperature(self, factor: float, rows: slice) -> float | Tensor:
        return factor / (self.options.temperature if self.temperature is None else self.temperature[rows])

    def _cap_slope(self, p: Tensor, rows: slice) -> Tensor:
        """1 - tanh² from the probabilities; 0 where they are 0."""
        assert self.options.softcap is not None
        inverse = 1 / self._over_temperature(self.options.softcap, rows)
        tanh = p.log().add_(self.top[rows] + self.log_total[rows]).mul_(inverse).clamp_(-1, 1)
        return tanh.square_().neg_().add_(1)

    def _blocks(self, rows: int) -> list[slice]:
        return [slice(start, min(start + self.block, rows)) for start in range(0, rows, self.block)]


class TritonChunk(Chunk):
    def work_dtype(self) -> torch.dtype:
        return self.product_dtype

    def score(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None, compute_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        self.rows, self.token_ids = as_grid(self.multiply(hidden)), token_ids
        scores = compute_scores(self.rows, token_ids, None, self._temperature(), compute_entropy)
        logps, self.entropy, self.state = scores
        return logps, self.entropy

    def restore(
        self, hidden: Tensor, token_ids: Tensor, temperature: Tensor | None, entropy: Tensor, state: Tensor
    ) -> None:
        self.rows, self.token_ids, self.entropy = as_grid(self.multiply(hidden)), token_ids, entropy
        self.state = state

    def gradient(self, d_logps: Tensor, d_entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        write_gradient(
            self.rows,
            self.rows,
            self.token_ids,
            None,
            d_logps.float(),
            None if d_entropy is None else d_entropy.float(),
            self.entropy,
            self.state,
            self._temperature(),
        )
        d, d_logits = self.wide[: len(d_logps)], self.logits[: len(d_logps)]
        return (d if d.dtype == d_logits.dtype else d_logits.copy_(d)), d, None

    def _temperature(self) -> float:
        return self.options.temperature / self.options.logit_scale
