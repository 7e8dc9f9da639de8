"""One token per row of logits, drawn or greedy, with its log-probabilities: the public door.

A draw is argmax(logits/temperature + noise) over the columns that truncation and `allowed` keep, and the noise is a
hash of (key, position, column), see `noise`. On a GPU one Triton kernel reads the logits once (`gpu.sampling`),
elsewhere plain torch does it a few rows at a time (`torch_sampling`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import torch_sampling
from .checks import check_integers, check_shape
from .dispatch import may_read_values, uses_triton
from .noise import gumbel_noise as _gumbel_noise
from .options import check_count, check_number
from .truncation import Truncation


class SampledTokens(NamedTuple):
    """What `sample_tokens` gives."""

    token_ids: Tensor  # (R,) int64
    logps: Tensor  # (R,) float32, under the distribution that was drawn from
    full_logps: Tensor  # (R,) float32, under the softmax of all columns: what a trainer scores


@torch.no_grad()
def sample_tokens(
    logits: Tensor,  # (R, V) floating point, any strides
    keys: Tensor,  # (R,) int64: the stream of a row
    positions: Tensor,  # (R,) int64: the place in the stream, added to the key
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: Tensor | None = None,  # (V,) bool; False columns are never drawn
    check_values: bool = True,
) -> SampledTokens:
    """argmax over the kept columns of z + gumbel_noise(keys, positions, V), z = logits / temperature in float32.

    Kept are the allowed columns that pass, one after the other, `top_k` (0: off), the top_k largest; `top_p`, of these
    the fewest whose probabilities reach top_p; and `min_p`, a probability of at least min_p times the largest. Equal
    logits are kept or left out together, so that ties may keep more than top_k. With `temperature=0` the token is the
    lowest column of the largest allowed logit, and both log-probabilities are those at temperature 1, not truncated.

    A row's token depends on its logits, key and position, and on nothing else of the call.

    Returns:
        `SampledTokens`: `logps` under the softmax of the kept columns, `full_logps` under that of all columns, allowed
        or not. A row without a distribution (a NaN or +inf in it, or no allowed column above -inf) is an error; with
        `check_values=False`, which never waits for the device, its log-probabilities are NaN and its token is some
        allowed column, or column 0 without one.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options, a row without a distribution.
    """
    _check_arguments(logits, keys, positions, allowed)
    truncation = Truncation(top_k=top_k, top_p=top_p, min_p=min_p)
    truncation.check()
    check_number("temperature", temperature, at_least=0)
    if uses_triton(logits):
        from .gpu.sampling import launch_sampling  # triton exists on Linux only

        drawn = SampledTokens(*launch_sampling(logits, keys, positions, float(temperature), truncation, allowed))
    else:
        drawn = SampledTokens(*torch_sampling.sample(logits, keys, positions, temperature, truncation, allowed))
    if may_read_values(check_values):
        _check_distributions(drawn.logps, logits, allowed)
    return drawn


def gumbel_noise(
    keys: Tensor,  # (R,) int64
    positions: Tensor,  # (R,) int64
    vocab_size: int,
) -> Tensor:
    """The noise that `sample_tokens` adds, (R, V) float32; its formula is in `noise`."""
    check_count("vocab_size", vocab_size)
    _check_streams(keys, positions, keys.shape[:1] if isinstance(keys, Tensor) else ())
    return _gumbel_noise(keys, positions, vocab_size)


def _check_arguments(logits: Tensor, keys: Tensor, positions: Tensor, allowed: Tensor | None) -> None:
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        raise ValueError(f"logits is {getattr(logits, 'dtype', type(logits).__name__)}: give a floating-point tensor")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: give (R, V) with V >= 1")
    _check_streams(keys, positions, logits.shape[:1], logits.device)
    if allowed is not None:
        check_shape("allowed", allowed, (logits.shape[1],), logits.device)
        if allowed.dtype != torch.bool:
            raise ValueError(f"allowed has dtype {allowed.dtype}: give bool")


def _check_streams(keys: Tensor, positions: Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> None:
    for name, x in (("keys", keys), ("positions", positions)):
        check_integers(name, x, tuple(shape), device or keys.device)
        if x.dtype != torch.int64:
            raise ValueError(f"{name} has dtype {x.dtype}: give int64")


def _check_distributions(logps: Tensor, logits: Tensor, allowed: Tensor | None) -> None:
    bad = logps.isnan()
    if not bad.any():
        return
    row = int(bad.nonzero()[0])
    values = logits[row]
    if values.isnan().any() or values.isposinf().any():
        column = int((values.isnan() | values.isposinf()).nonzero()[0])
        raise ValueError(
            f"logit {column} of row {row} is {values[column].item()}: look for what the model computed it from"
        )
    count = values.numel() if allowed is None else int(allowed.sum())
    raise ValueError(f"row {row} of the logits is -inf in all {count} allowed columns: allow one that is not")
