"""Sampling in plain torch: what `gpu.sampling` does where no kernel runs.

On a CPU the noise of every column is made up to its bits only, because two logarithms cost more than all the rest. With
p the softmax, w the uniform number and E = -log1p(-w) >= w of a column, the score is log(p/E), at most log(p/w). So the
largest p/w of every 64 neighbours are taken; the best 64 are scored, and after them those 64 whose bound reaches the
score found, which are few, whatever the distribution. Rows are independent and scores are those of the specification,
so that the token is the same as without the shortcut. Elsewhere (float64 on a GPU) nothing may read a value: the
reference itself runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .noise import column_words, gumbel, gumbel_noise, noise_bits, row_words, rows_at_a_time, unsigned_float
from .reference_sampling import lowest_argmax, sample_tokens
from .truncation import Truncation

CHUNK = 64  # columns that share a bound
SMALL = 4096  # columns up to which the noise of all is no dearer
NUCLEUS = 1024  # largest logits that are sorted first; where they do not reach top_p, all are


def sample(
    logits: Tensor,  # (R, V)
    keys: Tensor,  # (R,)
    positions: Tensor,  # (R,)
    temperature: float,
    truncation: Truncation,
    allowed: Tensor | None,  # (V,) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, logps, full_logps, each (R,)."""
    if logits.device.type != "cpu":
        noise = gumbel_noise(keys, positions, logits.shape[1]) if temperature > 0 else None
        drawn = sample_tokens(logits.float(), noise, temperature=temperature, allowed=allowed, **vars(truncation))
        return drawn
    n, vocabulary = logits.shape
    tokens, (logps, full_logps) = torch.empty(n, dtype=torch.int64), torch.empty(2, n)
    draw = _Draw(vocabulary, keys, positions) if temperature > 0 else None
    blocked = None if allowed is None else (~allowed).nonzero()[:, 0]
    fallback = 0 if allowed is None else int(allowed.int().argmax())
    step = rows_at_a_time(logits)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        z, kept, drawn_sum, full_sum = _distributions(logits[rows], temperature, truncation, blocked)
        token = lowest_argmax(kept) if draw is None else draw(rows, kept, drawn_sum)
        known = drawn_sum.isfinite() & full_sum.isfinite()
        token = torch.where(known[:, None], token[:, None], fallback)
        tokens[rows] = token[:, 0]
        logit = z.gather(1, token)[:, 0]
        logps[rows] = torch.where(known, logit - drawn_sum, math.nan)
        full_logps[rows] = torch.where(known, logit - full_sum, math.nan)
    return tokens, logps, full_logps


def _distributions(
    logits: Tensor, temperature: float, truncation: Truncation, blocked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z and the same with -inf where a column is not kept, (B, V) float32; log Σ exp of either, (B,), kept first."""
    x = logits.float()
    z = x if temperature in (0, 1) else x / temperature
    if blocked is None or len(blocked) == 0:
        kept, full_sum = z, log_sum_exp(z)
        drawn_sum = full_sum
    else:
        kept = z.index_fill(1, blocked, -math.inf)
        x = x if truncation.keeps_all else x.index_fill(1, blocked, -math.inf)
        drawn_sum = log_sum_exp(kept)
        full_sum = torch.logaddexp(drawn_sum, z[:, blocked].logsumexp(1))
    if temperature > 0 and not truncation.keeps_all:
        bound = _bound(x, drawn_sum, temperature, truncation)
        kept = torch.where(x >= bound, kept, -math.inf)
        drawn_sum = log_sum_exp(kept)
    return z, kept, drawn_sum, full_sum


def log_sum_exp(z: Tensor) -> Tensor:
    """(B,) of (B, V). The softmax of a row is one pass of torch, `logsumexp` four; its largest value is 1 / Σ."""
    return z.amax(1) - z.softmax(1).amax(1).log()


def _bound(x: Tensor, log_sum: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """What a kept logit is at least, (B, 1); `log_sum` of x / temperature."""
    bound = torch.full_like(x[:, :1], -math.inf)
    if truncation.top_k > 0:
        bound = x.topk(min(truncation.top_k, x.shape[1])).values[:, -1:]
    if truncation.top_p < 1:
        if truncation.top_k > 0:
            x = torch.where(x >= bound, x, -math.inf)
            log_sum = log_sum_exp(x / temperature)
        bound = torch.stack([_nucleus_bound(*row, temperature, truncation.top_p) for row in zip(x, log_sum)])[:, None]
    if truncation.min_p > 0:
        bound = bound.maximum(x.amax(1, keepdim=True) + temperature * math.log(truncation.min_p))
    return bound


def _nucleus_bound(x: Tensor, log_sum: Tensor, temperature: float, top_p: float) -> Tensor:
    """The least logit of a row (V,) that top_p keeps, 0-d."""
    for size in (min(NUCLEUS, len(x)), len(x)):
        ordered = x.topk(size).values if size < len(x) else x.sort(descending=True).values
        mass = (ordered / temperature - log_sum).exp().cumsum(0)
        if mass[-1] >= top_p:
            break
    return ordered[min(int((mass < top_p).sum()), size - 1)]


class _Draw:
    """argmax of z + noise for blocks of rows of one call; keeps what the blocks share."""

    def __init__(self, vocabulary: int, keys: Tensor, positions: Tensor) -> None:
        self.vocabulary = vocabulary
        self.k0, self.k1 = (word[:, None] for word in row_words(keys, positions))
        self.columns = column_words(-(-vocabulary // CHUNK) * CHUNK, keys.device)

    def __call__(self, rows: slice, z: Tensor, log_sum: Tensor) -> Tensor:
        """The tokens of some rows, (B,); z is (B, V) with -inf where a column is not kept, `log_sum` of it (B,)."""
        k0, k1 = self.k0[rows], self.k1[rows]
        if self.vocabulary <= SMALL:
            return lowest_argmax(z + gumbel(noise_bits(self.columns[: self.vocabulary], k0, k1)))
        # The largest p/w of each chunk, w in units of 2⁻³².
        uniform = unsigned_float(noise_bits(self.columns, k0, k1)).add_(0.5)
        ratio = uniform.reciprocal_()
        ratio[:, : self.vocabulary].mul_(z.softmax(1))
        ratio[:, self.vocabulary :] = 0
        largest = ratio.view(len(z), -1, CHUNK).amax(2)
        each = torch.arange(len(z))
        found = self._score(z, k0, k1, each, largest.argmax(1))[0].amax(1)
        rounding = 1e-4 + 1e-6 * log_sum.abs()
        reaches = largest >= ((found - log_sum - rounding).exp() * 2.0**-32)[:, None]
        row, chunk = reaches.nonzero(as_tuple=True)
        score, column = self._score(z, k0, k1, row, chunk)
        top = torch.full((len(z),), -math.inf).scatter_reduce(0, row, score.amax(1), "amax")
        lowest = torch.where(score == top[row, None], column, self.vocabulary - 1).amin(1)
        return torch.full((len(z),), self.vocabulary - 1).scatter_reduce(0, row, lowest, "amin")

    def _score(self, z: Tensor, k0: Tensor, k1: Tensor, row: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and columns of some chunks of some rows, (n, CHUNK)."""
        column = chunk[:, None] * CHUNK + torch.arange(CHUNK)
        noise = gumbel(noise_bits(self.columns[column], k0[row], k1[row]))
        inside = column < self.vocabulary
        column = column.clamp(max=self.vocabulary - 1)
        return (z[row[:, None], column] + noise).masked_fill(~inside, -math.inf), column
