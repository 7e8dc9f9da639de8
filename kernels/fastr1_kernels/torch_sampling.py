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

from .noise import column_words, gumbel, gumbel_noise, noise_bits, row_words
from .reference_sampling import sample_tokens
from .truncation import Truncation

BLOCK_ELEMENTS = 2**20  # logits worked on at a time
CHUNK = 64  # columns that share a bound
SMALL = 4096  # columns up to which the noise of all is no dearer
NUCLEUS = (1024, 16384)  # largest logits that are sorted first; where they do not reach top_p, all are


def sample(
    logits: Tensor,  # (R, V)
    keys: Tensor,  # (R,)
    positions: Tensor,  # (R,)
    temperature: float,
    truncation: Truncation,
    allowed: Tensor | None,  # (V,) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, logps, full_logps, each (R,)."""
    n, vocabulary = logits.shape
    if logits.device.type != "cpu":
        noise = gumbel_noise(keys, positions, vocabulary) if temperature > 0 else None
        options = vars(truncation) | {"temperature": temperature, "allowed": allowed}
        return sample_tokens(logits.float(), noise, **options)
    tokens, (logps, full_logps) = torch.empty(n, dtype=torch.int64), torch.empty(2, n)
    blocked = None if allowed is None or allowed.all() else (~allowed).nonzero()[:, 0]
    fallback = 0 if allowed is None else int(allowed.int().argmax())
    step = max(1, min(n, BLOCK_ELEMENTS // vocabulary))
    share = torch.empty(step, vocabulary)
    draw = _Draw(vocabulary, keys, positions, step) if temperature > 0 else None
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        p = share[: rows.stop - start]
        z, kept, drawn_sum, full_sum = _distributions(logits[rows], temperature, truncation, blocked, p)
        token = kept.argmax(1) if draw is None else draw(rows, kept, p, drawn_sum)
        known = drawn_sum.isfinite() & full_sum.isfinite()
        token = torch.where(known, token, fallback)
        tokens[rows] = token
        logit = z.gather(1, token[:, None])[:, 0]
        logps[rows] = torch.where(known, logit - drawn_sum, math.nan)
        full_logps[rows] = logps[rows] if full_sum is drawn_sum else torch.where(known, logit - full_sum, math.nan)
    return tokens, logps, full_logps


def _distributions(
    logits: Tensor, temperature: float, truncation: Truncation, blocked: Tensor | None, p: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z and the same with -inf where a column is not kept, (B, V) float32; log Σ exp of either, (B,), kept first.

    `p` becomes the softmax of what is kept.
    """
    x = logits.float()
    z = x if temperature in (0, 1) else x / temperature
    if blocked is None:
        kept, full_sum = z, log_sum_exp(z, p)
        drawn_sum = full_sum
    else:
        kept = z.index_fill(1, blocked, -math.inf)
        x = x if truncation.keeps_all else x.index_fill(1, blocked, -math.inf)
        drawn_sum = log_sum_exp(kept, p)
        full_sum = torch.logaddexp(drawn_sum, z[:, blocked].logsumexp(1))
    if temperature > 0 and not truncation.keeps_all:
        bound = _bound(x, drawn_sum, temperature, truncation)
        kept = torch.where(x >= bound, kept, -math.inf)
        drawn_sum = log_sum_exp(kept, p)
    return z, kept, drawn_sum, full_sum


def log_sum_exp(z: Tensor, p: Tensor) -> Tensor:
    """(B,) of (B, V), and the softmax in `p`: one pass of torch where `logsumexp` has four. Its largest is 1 / Σ."""
    torch.softmax(z, 1, out=p)
    return z.amax(1) - p.amax(1).log()


def _bound(x: Tensor, log_sum: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """What a kept logit is at least, (B, 1); `log_sum` of x / temperature."""
    bound = torch.full_like(x[:, :1], -math.inf)
    if truncation.top_k > 0:
        bound = x.topk(min(truncation.top_k, x.shape[1])).values[:, -1:]
    if truncation.top_p < 1:
        if truncation.top_k > 0:
            x = torch.where(x >= bound, x, -math.inf)
            log_sum = (x / temperature).logsumexp(1)
        bound = torch.stack(
            [_nucleus_bound(*row, temperature, truncation.top_p) for row in zip(x, log_sum, strict=True)]
        )[:, None]
    if truncation.min_p > 0:
        bound = bound.maximum(x.amax(1, keepdim=True) + temperature * math.log(truncation.min_p))
    return bound


def _nucleus_bound(x: Tensor, log_sum: Tensor, temperature: float, top_p: float) -> Tensor:
    """The least logit of a row (V,) that top_p keeps, 0-d."""
    for size in (*(n for n in NUCLEUS if n < len(x)), len(x)):
        ordered = x.topk(size).values if size < len(x) else x.sort(descending=True).values
        mass = (ordered / temperature - log_sum).exp().cumsum(0)
        if mass[-1] >= top_p:
            break
    return ordered[min(int((mass < top_p).sum()), size - 1)]


class _Draw:
    """argmax of z + noise for blocks of rows of one call; keeps what the blocks share."""

    def __init__(self, vocabulary: int, keys: Tensor, positions: Tensor, step: int) -> None:
        self.vocabulary = vocabulary
        self.k0, self.k1 = (word[:, None] for word in row_words(keys, positions))
        width = -(-vocabulary // CHUNK) * CHUNK
        self.columns = column_words(width, keys.device)
        if vocabulary > SMALL:
            self.bits, self.shifted = torch.empty(2, step, width, dtype=torch.int32)
            self.ratio = torch.empty(step, width)

    def __call__(self, rows: slice, z: Tensor, p: Tensor, log_sum: Tensor) -> Tensor:
        """The tokens of some rows, (B,); z is (B, V) with -inf where a column is not kept, p and `log_sum` of it."""
        k0, k1, b = self.k0[rows], self.k1[rows], len(z)
        if self.vocabulary <= SMALL:
            return (z + gumbel(noise_bits(self.columns[: self.vocabulary], k0, k1))).argmax(1)
        bits = noise_bits(self.columns, k0, k1, (self.bits[:b], self.shifted[:b]))
        # The largest p/w of each chunk, w in units of 2⁻³².
        ratio = self.ratio[:b].copy_(bits.view(torch.uint32)).add_(0.5)
        torch.div(p, ratio[:, : self.vocabulary], out=ratio[:, : self.vocabulary])
        ratio[:, self.vocabulary :] = 0
        largest = ratio.view(b, -1, CHUNK).amax(2)
        found = self._score(z, k0, k1, torch.arange(b), largest.argmax(1))[0].amax(1)
        rounding = 1e-4 + 1e-6 * log_sum.abs()
        reaches = largest >= ((found - log_sum - rounding).exp() * 2.0**-32)[:, None]
        row, chunk = reaches.nonzero(as_tuple=True)
        score, column = self._score(z, k0, k1, row, chunk)
        best, place = score.max(1)
        top = torch.full((b,), -math.inf).scatter_reduce(0, row, best, "amax")
        column = torch.where(best == top[row], column.gather(1, place[:, None])[:, 0], self.vocabulary - 1)
        return torch.full((b,), self.vocabulary - 1).scatter_reduce(0, row, column, "amin")

    def _score(self, z: Tensor, k0: Tensor, k1: Tensor, row: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and columns of some chunks of some rows, (n, CHUNK)."""
        column = chunk[:, None] * CHUNK + torch.arange(CHUNK)
        noise = gumbel(noise_bits(self.columns[column], k0[row], k1[row]))
        outside = column >= self.vocabulary
        column = column.clamp(max=self.vocabulary - 1)
        return (z[row[:, None], column] + noise).masked_fill(outside, -math.inf), column
