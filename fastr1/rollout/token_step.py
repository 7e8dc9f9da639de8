"""One token behind every row that decodes, on the decoder's own modules.

A token of a row goes through the layers: norm, three projections, rotation with the write of its key and value, the
attention over the prompt's keys (once for all its completions) and the row's own, output projection, norm, MLP; then
head and draw. Nothing here reads the device: what shapes the step is R and what the arenas and rows were made for, so
that a CUDA graph of it can be replayed for any lengths.

Bytes of a step: the weights once, keys and values of every prompt once and of every completion once; 2·N·R FLOPs with N
the weights, and those of the attention.
"""

from __future__ import annotations

from typing import Any

import torch

from fastr1.models.decoder_stack import DecoderStack, SideBySide, project
from fastr1.rollout.kv import KeyValueArenas
from fastr1.rollout.params import SamplingParams
from fastr1.rollout.rows import DecodingRows
from fastr1_kernels import add_rms_norm, decode_attention, rope_and_store, sample_tokens, swiglu


class TokenStep:
    """Steps of one rollout after another, each begun with `refresh`. Stack and model are the trainer's own."""

    def __init__(
        self,
        stack: DecoderStack,
        model: Any,  # for `project` and `head`
        rows: DecodingRows,
        arenas: KeyValueArenas,
        num_positions: int,  # those of the tokens are below
        end_ids: torch.Tensor,
        allowed: torch.Tensor | None = None,  # (V,) bool; False: never drawn
    ) -> None:
        self.model, self.rows, self.arenas = model, rows, arenas
        self.end_ids, self.allowed = end_ids, allowed
        self.addresses: tuple[int, ...] = ()
        self.cos, self.sin = stack.rotation(num_positions)

    def refresh(self, stack: DecoderStack, params: SamplingParams, max_group: int) -> None:
        """Begin a rollout, of up to so many rows a prompt: weights, adapters and how tokens are drawn may be others,
        the tensors of this step stay where they are."""
        self.stack, self.params, self.max_group = stack, params, max_group
        own = (*self.model.head, self.cos, self.sin, self.end_ids, self.rows.tokens)
        self.addresses = tuple(x.data_ptr() for x in (*stack.parameters(), *own) if x is not None)
        self.attention_inputs = [SideBySide(*layer.attention_inputs) for layer in stack.layers]
        self.mlp_inputs = [SideBySide(*layer.mlp_inputs) for layer in stack.layers]

    def finish(self) -> None:
        """End a rollout: copies of weights are given up."""
        self.attention_inputs = self.mlp_inputs = []

    def __call__(self, num_rows: int) -> None:
        """Forward the last token of the first rows, and draw their next one."""
        self.draw(self.model.project(self.hidden(num_rows)))

    def key(self, num_rows: int) -> tuple[object, ...]:
        """Everything beside the rows' state that a step of so many rows depends on: numbers that shape or are given to
        launches, and where weights and arenas are."""
        return (num_rows, self.arenas.room, self.max_group, self.params, self.addresses)

    def hidden(self, num_rows: int) -> torch.Tensor:
        """States (R, D) behind the last tokens, after the last norm; their keys and values are in the arena."""
        stack, rows, arenas = self.stack, self.rows, self.arenas
        drawn = rows.num_drawn[:num_rows]
        places = (drawn - 1).int()  # of the token among those of its completion; -1: padding
        positions = rows.first_positions[:num_rows] + drawn - 1
        seen, suffix_rows = drawn.int(), rows.suffix_rows(num_rows)
        x: torch.Tensor = stack.embed_tokens(rows.tokens[:num_rows])
        residual: torch.Tensor | None = None
        for index, layer in enumerate(stack.layers):
            normed, residual = _norm(layer.input_norm, x, residual)
            q, k, v = (x.unflatten(1, (-1, stack.head_dim)) for x in self.attention_inputs[index](normed))
            options: dict[str, Any] = {"suffix_rows": suffix_rows}
            if layer.q_norm is not None and layer.k_norm is not None:
                options |= {"q_norm": layer.q_norm.weight, "k_norm": layer.k_norm.weight}
                options["eps"] = layer.q_norm.variance_epsilon
            suffix_k, suffix_v = arenas.suffix_k[index], arenas.suffix_v[index]
            q = rope_and_store(q, k, v, self.cos, self.sin, positions, suffix_k, suffix_v, places, **options)
            out = decode_attention(
                q.contiguous(),
                arenas.prefix_k[index],
                arenas.prefix_v[index],
                rows.prefix_lengths,
                rows.cu_rows,
                suffix_k,
                suffix_v,
                seen,
                scale=layer.scale,
                max_group=min(self.max_group, num_rows),
                max_suffix_length=arenas.room.completion_length,
                suffix_rows=suffix_rows,
            )
            normed, residual = _norm(layer.post_attention_norm, project(layer.o_proj, out.flatten(1)), residual)
            x = project(layer.down_proj, swiglu(*self.mlp_inputs[index](normed)))
        return _norm(stack.norm, x, residual)[0]

    def draw(self, logits: torch.Tensor) -> None:
        """Draw the next token of the first rows from their logits (R, V), and keep it."""
        rows, params, num_rows = self.rows, self.params, len(logits)
        drawn, has_ended = rows.num_drawn[:num_rows], rows.has_ended[:num_rows]
        token, logp, full_logp = sample_tokens(
            logits,
            rows.keys[:num_rows],
            drawn,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            allowed=self.allowed,
            check_values=False,
        )
        output_rows = rows.output_rows[:num_rows]
        rows.completion_ids.index_put_((output_rows, drawn), token)
        rows.logps.index_put_((output_rows, drawn), logp)
        rows.full_logps.index_put_((output_rows, drawn), full_logp)
        rows.lengths.index_add_(0, output_rows, (~has_ended).long())
        rows.tokens[:num_rows] = token
        has_ended |= (token[:, None] == self.end_ids).any(dim=1)
        drawn += output_rows < rows.num_completions  # not in a row of padding


def _norm(norm: Any, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
