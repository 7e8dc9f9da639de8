"""TRL's log-probability functions (1.16), and `patch_trl`, which puts them into an imported TRL.

Different on purpose:
- half-precision logits give float32, as TRL does on a GPU; `rounding="torch"` rounds like torch, as TRL on a CPU;
- entropy is finite where a logit is -inf;
- a linear head gives log-probabilities and entropy only, see `chunked_log_probs`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import logps as doors
from .. import reference
from ..checks import check_shape, check_token_ids
from ..dispatch import uses_triton
from ..options import check_choice, check_count, check_number, require


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...) or (..., K)
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # as index, without K; rows of 0 give 0
    *,
    rounding: str = "float32",  # or "torch": in the dtype of the logits at every step, with the same bits
) -> Tensor:
    """log softmax(logits / temperature) at the index: its shape, differentiable."""
    check_choice("rounding", rounding, ("float32", "torch"))
    check_number("temperature", temperature, above=0)
    require(
        index.dim() in (logits.dim(), logits.dim() - 1), f"index has shape {tuple(index.shape)}: give (…) or (…, K)"
    )
    if row_mask is not None:
        check_shape("row_mask", row_mask, tuple(logits.shape[:-1]), logits.device)
        row_mask = row_mask.bool()
        index = torch.where(row_mask if index.dim() < logits.dim() else row_mask[..., None], index, 0)
    if rounding == "float32" and index.dim() < logits.dim():
        logps = doors.selective_log_softmax(logits, index, temperature=temperature)
        return logps if row_mask is None else torch.where(row_mask, logps, 0.0)
    check_token_ids(index, logits.shape[-1])
    columns = index if index.dim() == logits.dim() else index[..., None]
    logits = reference.upcast(logits) if rounding == "float32" else logits
    if temperature != 1:
        logits = logits / temperature
    if logits.dtype in (torch.float32, torch.float64):
        logps = logits.gather(-1, columns.long()) - logits.logsumexp(-1, keepdim=True)
    else:
        logps = logits.log_softmax(-1).gather(-1, columns.long())
    logps = logps if row_mask is None else torch.where(row_mask[..., None], logps, 0.0)
    return logps if index.dim() == logits.dim() else logps.squeeze(-1)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row in nats (...), differentiable once; `chunk_size` rows at a time where there is no kernel."""
    return _score(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device), 1.0, chunk_size)[1]


def selective_log_softmax_and_entropy(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...)
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # as index
) -> tuple[Tensor, Tensor]:
    """Both (...) in one pass over the logits; 0 where masked."""
    if row_mask is not None:
        check_shape("row_mask", row_mask, tuple(index.shape), logits.device)
        index = torch.where(row_mask.bool(), index, 0)
    logps, entropy = _score(logits, index, temperature, None)
    if row_mask is not None:
        logps, entropy = (torch.where(row_mask.bool(), x, 0.0) for x in (logps, entropy))
    return logps, entropy if entropy_requires_grad else entropy.detach()


def _score(logits: Tensor, index: Tensor, temperature: float, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if chunk_size is None or uses_triton(logits) or logits.numel() == 0:
        return doors.selective_log_softmax(logits, index, temperature=temperature, return_entropy=True)
    rows = zip(logits.reshape(-1, logits.shape[-1]).split(chunk_size), index.reshape(-1).split(chunk_size), strict=True)
    parts = [doors.selective_log_softmax(z, i, temperature=temperature, return_entropy=True) for z, i in rows]
    logps, entropy = (torch.cat(x).view(index.shape) for x in zip(*parts, strict=True))
    return logps, entropy


Scores = tuple[Tensor, "Tensor | None", None, None, None]


def chunked_log_probs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
) -> Scores:
    """(logps, entropy or None, None, None, None) of a linear head: what `ChunkedLogProbFunction.apply` gives.

    `chunk_size` is TRL's number of vocabulary columns at a time; here it is checked and changes nothing, because chunks
    are of rows and their number is this package's. Under autocast the product is taken in autocast's dtype and the
    gradient of a float32 head is rounded to it, which TRL's is not.

    Raises:
        ValueError: `outputs` beside "log_probs" and "entropy"; a head that DeepSpeed ZeRO-3 has sharded, which is
            there in the forward pass only.
    """
    check_count("chunk_size", chunk_size)
    unknown = set(outputs) - {"log_probs", "entropy"}
    require(not unknown, f"outputs={outputs}: this function has log_probs and entropy only")
    require(not hasattr(weight, "ds_id"), "a head sharded by DeepSpeed ZeRO-3 is not supported: use ZeRO 0 to 2")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    score = partial(
        doors.linear_logps,
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        bias=None if bias is None else bias.to(dtype),
        softcap=final_logit_softcapping,
        logit_scale=logit_scale,
        temperature=temperature,
    )
    logps, entropy = score(return_entropy=True) if "entropy" in outputs else (score(), None)
    return logps, entropy, None, None, None


class ChunkedLogProbFunction:
    """`chunked_log_probs` under the name and method of TRL's autograd function."""

    apply = staticmethod(chunked_log_probs)


def patch_trl() -> Callable[[], None]:
    """Put the functions of this module in the place of TRL's, and return the function that puts TRL's back.

    GRPO and RLOO trainers made before or after then score their completions here. Trainers that ask the head for more
    than log-probabilities and entropy (SFT, KTO and others) keep TRL's own function for it.

    Raises:
        ImportError: TRL is not installed.
        ValueError: it has none of these functions: another version.
    """
    utils = import_module("trl.trainer.utils")
    names = ("_ChunkedLogProbFunction", *_REPLACEMENTS)
    missing = [name for name in names if name not in vars(utils)]
    require(not missing, f"trl.trainer.utils has no {', '.join(missing)}: this patch is for TRL 1.16")
    theirs: Any = utils._ChunkedLogProbFunction

    class Patched:
        @staticmethod
        def apply(*arguments: Any) -> Any:
            outputs = arguments[8] if len(arguments) > 8 else ()
            ours = len(arguments) > 8 and set(outputs) <= {"log_probs", "entropy"}
            return chunked_log_probs(*arguments) if ours else theirs.apply(*arguments)

    replacements: dict[str, object] = {"_ChunkedLogProbFunction": Patched, **_REPLACEMENTS}
    undo: list[tuple[Any, str, object]] = []
    for module in [m for name, m in sys.modules.items() if name.startswith("trl.trainer.") or name == "trl.trainer"]:
        for name, replacement in replacements.items():
            # Only what is the function of `utils`, however a trainer imported it; lazy modules are not made to load.
            if name in vars(module) and vars(module)[name] is vars(utils)[name] and module is not utils:
                undo.append((module, name, vars(module)[name]))
                setattr(module, name, replacement)
    for name, replacement in replacements.items():
        undo.append((utils, name, vars(utils)[name]))
        setattr(utils, name, replacement)

    def restore() -> None:
        while undo:
            setattr(*undo.pop())

    return restore


_REPLACEMENTS: dict[str, object] = {
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
}
