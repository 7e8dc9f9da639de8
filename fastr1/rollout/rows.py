"""What decodes: rows, in tensors that stay where they are, so that a captured step finds them.

A row is the next token of a completion and where it belongs. The first rows decode; behind them there may be rows of
padding, which write nothing but a place that nobody reads. A completion has one row, or several with speculation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LARGEST_STEP = 512  # rows beyond which products, not the weights, take the time of a step on any GPU


def rows_of_step(num_completions: int, rows_per_completion: int) -> int:
    """How many rows a step may have: no more than `LARGEST_STEP` where completions can do with fewer."""
    return min(num_completions * rows_per_completion, max(num_completions, LARGEST_STEP))


class DecodingRows:
    """State of R rows, of up to S completions of B prompts, and the tokens drawn so far.

    Attributes:
        tokens: (R,) int64, the last token drawn, the next step's input.
        keys: (R,) int64, of the noise.
        num_drawn: (R,) int64, tokens drawn so far; 0 in a row of padding.
        first_positions: (R,) int64, the position of a completion's first token.
        has_ended: (R,) bool.
        output_rows: (R,) int64, where a completion's tokens are kept; S in a row of padding.
        cu_rows: (B + 1,) int32, where the rows of each prompt begin.
        prefix_lengths: (B,) int32.
        completion_ids, logps, full_logps: (S + 1, T), by output row; log-probabilities as of `sample_tokens`.
        lengths: (S + 1,) int64, tokens of each completion, its last included.
    """

    def __init__(
        self,
        num_completions: int,
        num_prompts: int,
        completion_length: int,
        device: torch.device,
        rows_per_completion: int = 1,  # at most, in a step
    ) -> None:
        self.num_completions, self.device = num_completions, device
        self.size = rows_of_step(num_completions, rows_per_completion)
        self.speculates = rows_per_completion > 1
        self._table = torch.zeros(5, self.size, dtype=torch.int64, device=device)
        self.tokens, self.keys, self.num_drawn, self.first_positions, self.output_rows = self._table
        self.has_ended = torch.ones(self.size, dtype=torch.bool, device=device)
        self.cu_rows = torch.zeros(num_prompts + 1, dtype=torch.int32, device=device)
        self.prefix_lengths = torch.zeros(num_prompts, dtype=torch.int32, device=device)
        self.completion_ids = torch.zeros(num_completions + 1, completion_length, dtype=torch.int64, device=device)
        self.logps, self.full_logps = torch.zeros(2, num_completions + 1, completion_length, device=device)
        self.lengths = torch.zeros(num_completions + 1, dtype=torch.int64, device=device)

    def start(
        self,
        keys: torch.Tensor,  # (B·G,)
        prompt_lengths: Sequence[int],  # B
        first_positions: Sequence[int],  # B
        num_generations: int,
    ) -> None:
        """B·G completions without a token, in prompt-major order."""
        n = len(keys)
        self.clear(0)
        self.keys[:n] = keys
        self.first_positions[:n] = self._tensor(first_positions).repeat_interleave(num_generations)
        self.output_rows[:n] = torch.arange(n, device=self.device)
        self.has_ended[:n] = False
        self.prefix_lengths.zero_()
        self.prefix_lengths[: len(prompt_lengths)] = self._tensor(prompt_lengths).int()
        self.group([num_generations] * len(prompt_lengths))
        self.lengths.zero_()

    def keep(self, rows: Sequence[int], group_sizes: Sequence[int]) -> torch.Tensor:
        """Move some rows (rising numbers) to the front; the others become padding. Returns their numbers."""
        kept = self._tensor(rows)
        for state in self._states():
            state[: len(rows)] = state[kept]
        self.clear(len(rows))
        self.group(group_sizes)
        return kept

    def lay_out(self, rows: Sequence[Sequence[int]], group_sizes: Sequence[int], size: int) -> None:
        """Rows as they are from now on, each (token, key, tokens drawn before its draw, first position, output row);
        those behind them, up to `size`, become padding."""
        padding = [self._padding[:5]] * (size - len(rows))
        self._table[:, :size] = self._tensor([*rows, *padding]).T
        self.group(group_sizes)

    def suffix_rows(self, num_rows: int) -> torch.Tensor | None:
        """(num_rows,) int32, whose keys and values the first rows go on from; None: each has its own."""
        if not self.speculates:
            return None
        return self.output_rows[:num_rows].clamp(max=self.num_completions - 1).int()

    def group(self, sizes: Sequence[int]) -> None:
        """Set `cu_rows` from the number of rows of each prompt; prompts behind the last have none."""
        ends = torch.zeros(len(self.cu_rows), dtype=torch.int64)
        ends[1 : len(sizes) + 1] = torch.tensor(list(sizes)).cumsum(0)
        ends[len(sizes) + 1 :] = sum(sizes)
        self.cu_rows.copy_(ends)

    def clear(self, first: int) -> None:
        """Make padding of the rows from `first` on: no token drawn, position 1 + 0 − 1 = 0, output nobody reads."""
        for state, value in zip(self._states(), self._padding, strict=True):
            state[first:] = value

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of everything that a step or `clear` writes, and of `cu_rows`, for `restore`."""
        return [state.clone() for state in self._all()]

    def restore(self, copies: Sequence[torch.Tensor]) -> None:
        """Write a `snapshot` back, every tensor where it is."""
        for state, copy in zip(self._all(), copies, strict=True):
            state.copy_(copy)

    @property
    def _padding(self) -> tuple[int, ...]:
        return 0, 0, 0, 1, self.num_completions, True

    def _states(self) -> tuple[torch.Tensor, ...]:
        return (
            self.tokens,
            self.keys,
            self.num_drawn,
            self.first_positions,
            self.output_rows,
            self.has_ended,
        )

    def _all(self) -> tuple[torch.Tensor, ...]:
        return (*self._states(), self.cu_rows, self.completion_ids, self.logps, self.full_logps, self.lengths)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)
