"""Log-probabilities and losses of a linear head, a chunk of rows at a time: the (N, V) logits never exist as a whole.

Loss, gradients in the forward pass (`loss_of_chunks`): per chunk one product makes the logits; they are scored, and
become their own gradient, in place; two products add the chunk to the gradients of hidden and head. The backward pass
multiplies by the upstream gradient. Log-probabilities (`linear_logps`), whose upstream gradient is not known yet: the
backward pass makes the logits of each chunk again. Products over (rows, V, D):

    loss            3    2 with a frozen head    1 without gradient
    logps           4    3                       1
    rows that are masked out: none; rows without signal (`TokenLoss.has_signal`): 1, for their logps and entropy

A loss that ties the tokens of a sequence together takes whole sequences per chunk. Where one does not fit, or where the
loss needs the entropies of the whole call and that is more than a chunk, it is composed of `linear_logps` (4 products).

Memory for C rows per chunk, e bytes per element of hidden, M rows: e·C·V + 4·V·D (trained head only) + e·M·D, and
4·C·V more where half-precision logits are scored in plain torch (see `chunk`). Sums have a fixed order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import torch_rows
from .checks import LossArguments
from .chunk import Chunk, make_chunk
from .head import HeadGradients, HeadOptions, HeadTensors, scale_to, sum_dtype
from .rows import ONCE
from .token_loss import LossOutput, TokenLoss

GPU_CHUNK_SIZE, GPU_FROZEN_CHUNK_SIZE, CPU_CHUNK_SIZE = 4096, 2048, 512


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of the N are computed, in which order, and in which chunks."""

    hidden: Tensor  # (N, D)
    token_ids: Tensor  # (N,) int64
    temperature: Tensor | None  # (N,)
    mask: Tensor | None  # (N,) bool where rows that are computed may be masked, else None
    order: Tensor | None  # (M,) the computed rows; None: all as they are
    chunks: list[slice]  # of the order
    signal: int  # the first chunks have a gradient

    def index(self, chunk: slice) -> slice | Tensor:
        return chunk if self.order is None else self.order[chunk]

    def inputs(self, chunk: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """The chunk's rows of hidden (C, D), their token ids and temperatures."""
        rows = self.index(chunk)
        hidden, ids = self.hidden[rows], self.token_ids[rows]
        temperature = None if self.temperature is None else self.temperature[rows]
        if self.mask is None:
            return hidden, ids, temperature
        # What stands in a masked row, NaN included, must not reach the products.
        live = self.mask[rows]
        temperature = None if temperature is None else torch.where(live, temperature, 1.0)
        return torch.where(live[:, None], hidden, 0.0), torch.where(live, ids, 0), temperature

    def live(self, chunk: slice, values: Tensor) -> Tensor:
        """The chunk's values (C,), 0 where masked."""
        return values if self.mask is None else torch.where(self.mask[self.index(chunk)], values, 0.0)

    def buffers(self, head: HeadTensors, options: HeadOptions) -> Chunk:
        longest = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)
        return make_chunk(self.hidden, head, options, longest, self.temperature is not None)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Zeros for logps and entropy, (N,)."""
        dtype = sum_dtype(self.hidden.dtype)
        return self.hidden.new_zeros(len(self.hidden), dtype=dtype), self.hidden.new_zeros(
            len(self.hidden), dtype=dtype
        )


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Products in the dtype of their inputs, whatever surrounds the call."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def default_chunk_size(hidden: Tensor, is_frozen: bool) -> int:
    if hidden.device.type == "cpu":
        return CPU_CHUNK_SIZE
    return GPU_FROZEN_CHUNK_SIZE if is_frozen else GPU_CHUNK_SIZE


def even_chunks(start: int, stop: int, size: int) -> list[slice]:
    """As few chunks of at most `size` rows as there can be, of nearly equal length."""
    number = -(-(stop - start) // size)
    bounds = [start + (stop - start) * i // number for i in range(number + 1)] if number else []
    return [slice(a, b) for a, b in pairwise(bounds)]


def chunks_of_sequences(lengths: list[int], size: int) -> list[slice] | None:
    """Chunks of whole sequences of these lengths; None where one is longer than `size`."""
    if max(lengths, default=0) > size:
        return None
    chunks, start, stop = [], 0, 0
    for length in lengths:
        if stop + length - start > size:
            chunks.append(slice(start, stop))
            start = stop
        stop += length
    return [*chunks, slice(start, stop)] if stop > start else chunks


def linear_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    head: HeadTensors,
    token_ids: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # as token_ids, bool
    temperatures: Tensor | None,  # as token_ids
    arguments: LossArguments,
    options: HeadOptions,
    chunk_size: int | None,
    num_loss_tokens: int | None,
) -> tuple[LossOutput, Tensor]:
    """The fields of `GRPOOutput` for checked arguments, and the unit that gradients are best computed in (0-d)."""
    loss = TokenLoss(token_ids, mask, arguments, is_narrow=hidden.dtype == torch.float16)
    has_grad = torch.is_grad_enabled()
    trained = has_grad and any(x is not None and x.requires_grad for x in head)
    rows, is_whole = plan_rows(
        hidden.reshape(-1, hidden.shape[-1]),
        token_ids.reshape(-1).long(),
        None if temperatures is None else temperatures.detach().reshape(-1),
        loss,
        size=chunk_size or default_chunk_size(hidden, is_frozen=not trained),
        check_values=arguments.check_values,
        num_loss_tokens=num_loss_tokens,
    )
    if is_whole and (trained or (has_grad and hidden.requires_grad)):
        return loss_of_chunks(rows, head, options, loss), loss.unit
    return loss.output(*chunked_linear_logps(rows, head, options, loss.has_entropy)), loss.unit


def linear_rows(hidden: Tensor, token_ids: Tensor, temperatures: Tensor | None, chunk_size: int) -> Rows:
    """All rows (N, D) as they come."""
    chunks = even_chunks(0, len(hidden), chunk_size)
    return Rows(hidden, token_ids.long(), temperatures, mask=None, order=None, chunks=chunks, signal=len(chunks))


def plan_rows(
    hidden: Tensor,  # (N, D)
    token_ids: Tensor,  # (N,)
    temperature: Tensor | None,  # (N,)
    loss: TokenLoss,
    *,
    size: int,
    check_values: bool,
    num_loss_tokens: int | None,
) -> tuple[Rows, bool]:
    """The rows to compute, and whether a chunk holds all that its gradient depends on.

    With `check_values` the mask and the advantages are read: masked rows are left out, those without signal come last.
    Without it nothing is read: all rows are computed, or the `num_loss_tokens` unmasked ones.
    """
    n = len(hidden)
    key = torch.where(loss.mask, torch.where(loss.has_signal(), 0, 1), 2)
    order, lengths, live, signal, mask = None, None, n, n, loss.mask
    if check_values:
        per_sequence = loss.sequences.sum(key == 0)
        *lengths, signal, live = torch.cat([per_sequence, torch.stack([(key == 0).sum(), (key < 2).sum()])]).tolist()
        order = torch.argsort(key, stable=True)[:live] if signal < n else None
    elif num_loss_tokens is not None:
        live = signal = min(num_loss_tokens, n)
        order = torch.argsort(key.clamp(min=1), stable=True)[:live]
    elif loss.sequences.is_padded:
        lengths = [loss.sequences.longest] * loss.sequences.number
    chunks: list[slice] | None = even_chunks(0, signal, size)
    needs_all = loss.options.top_entropy_quantile < 1
    if not loss.is_per_token and signal > size:
        chunks = None if lengths is None else chunks_of_sequences(lengths, size)
    is_whole = chunks is not None and not (needs_all and (len(chunks) > 1 or live > signal))
    with_signal = chunks if chunks is not None else even_chunks(0, signal, size)
    chunks = [*with_signal, *even_chunks(signal, live, size)]
    kept_mask = None if check_values else mask
    return Rows(hidden, token_ids, temperature, kept_mask, order, chunks, len(with_signal)), is_whole


def loss_of_chunks(rows: Rows, head: HeadTensors, options: HeadOptions, loss: TokenLoss) -> LossOutput:
    """The fields of `GRPOOutput`; the gradients are computed here, and wait for the upstream gradient."""
    inputs = (rows.hidden, *head)
    needed = tuple(x is not None and x.requires_grad for x in inputs)
    logps, entropy = rows.outputs()
    with torch.no_grad(), without_autocast(rows.hidden):
        buffers = rows.buffers(head, options)
        gradients = HeadGradients(rows.hidden, head, needed, options.lora_scale)
        for i, chunk in enumerate(rows.chunks):
            index = rows.index(chunk)
            hidden, ids, temperature = rows.inputs(chunk)
            scores = buffers.score(hidden, ids, temperature, loss.has_entropy)
            logps[index], entropy[index] = (rows.live(chunk, x) for x in scores)
            if i < rows.signal:
                numbers = (
                    index if isinstance(index, Tensor) else torch.arange(index.start, index.stop, device=logps.device)
                )
                d_logps, d_entropy = loss.gradients(logps[index], entropy[index], numbers)
                gradients.add(index, hidden, *buffers.gradient(d_logps, d_entropy))
        value, *others = loss.output(logps, entropy)
    value = _GivenGradients.apply(value, gradients.results(), loss.unit, *inputs)
    return value, *others


class _GivenGradients(torch.autograd.Function):
    """The loss, with gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], unit: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(unit, *gradients)
        ctx.dtypes = [torch.float32 if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        unit, *sums = ctx.saved_tensors
        scale = d_loss * unit
        factor = None if torch_rows.may_read(scale) and scale == 1 else scale
        # The sums are given away: a second backward pass through retain_graph=True is refused by autograd.
        torch.autograd.graph.increment_version([x for x in sums if x is not None])
        return None, None, None, *(scale_to(x, dtype, factor) for x, dtype in zip(sums, ctx.dtypes, strict=True))


def chunked_linear_logps(
    rows: Rows, head: HeadTensors, options: HeadOptions, compute_entropy: bool
) -> tuple[Tensor, Tensor]:
    """logps and entropy (N,), zeros in the rows that are not computed; differentiable once."""
    logps, entropy, _ = _LinearLogps.apply(rows.hidden, *head, rows, options, compute_entropy)
    return logps, entropy


def score_chunks(
    rows: Rows, head: HeadTensors, options: HeadOptions, compute_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logps and entropy (N,), and what the gradient needs of a row beside its entropy, (2, N)."""
    logps, entropy = rows.outputs()
    state = logps.new_zeros(2, len(logps))
    with without_autocast(rows.hidden):
        buffers = rows.buffers(head, options)
        for chunk in rows.chunks:
            index = rows.index(chunk)
            scores = buffers.score(*rows.inputs(chunk), compute_entropy)
            logps[index], entropy[index] = (rows.live(chunk, x) for x in scores)
            state[:, index] = buffers.state
    return logps, entropy, state


def logps_gradients(
    rows: Rows,
    head: HeadTensors,
    options: HeadOptions,
    entropy: Tensor,  # (N,)
    state: Tensor,  # (2, N)
    d_logps: Tensor | None,  # (N,)
    d_entropy: Tensor | None,  # (N,)
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of hidden and of the fields of the head, None where not needed."""
    hidden = rows.hidden
    gradients = HeadGradients(hidden, head, needed, options.lora_scale)
    d_logps = torch.zeros_like(entropy) if d_logps is None else d_logps
    with without_autocast(hidden):
        buffers = rows.buffers(head, options)
        for chunk in rows.chunks[: rows.signal]:
            index = rows.index(chunk)
            inputs = rows.inputs(chunk)
            buffers.restore(*inputs, entropy[index], state[:, index])
            g = rows.live(chunk, d_logps[index])
            h = None if d_entropy is None else rows.live(chunk, d_entropy[index])
            gradients.add(index, inputs[0], *buffers.gradient(g, h))
    results = zip(gradients.results(), (hidden, *head), strict=True)
    return [None if x is None or y is None else x.to(y.dtype) for x, y in results]


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        rows: Rows,
        options: HeadOptions,
        compute_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = HeadTensors(weight, bias, lora_a, lora_b)
        outputs = score_chunks(rows, head, options, compute_entropy)
        ctx.save_for_backward(hidden, *head, rows.token_ids, rows.temperature, rows.mask, rows.order, *outputs[1:])
        ctx.chunks, ctx.signal, ctx.options = rows.chunks, rows.signal, options
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # torch's own guard drops the second derivative silently where the upstream gradient is a constant.
            raise RuntimeError(ONCE)
        hidden, weight, bias, lora_a, lora_b, token_ids, temperature, mask, order, entropy, state = ctx.saved_tensors
        if d_logps is None and d_entropy is None:
            return (None,) * 8
        head = HeadTensors(weight, bias, lora_a, lora_b)
        rows = Rows(hidden, token_ids, temperature, mask, order, ctx.chunks, ctx.signal)
        upstream, needed = (d_logps, d_entropy), ctx.needs_input_grad[:5]
        return *logps_gradients(rows, head, ctx.options, entropy, state, *upstream, needed), None, None, None
