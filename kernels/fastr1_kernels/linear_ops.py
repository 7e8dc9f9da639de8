"""The functions of a linear head as operators of torch: what `torch.compile` puts into its graph.

A loop over chunks, whose number depends on a length, and gradients that are made in the forward pass do not belong into
a compiled graph. Each function is one operator there, with its shapes for the compiler and its gradient: an operator of
its own for `fastr1::linear_logps`, a product with the upstream gradient for `fastr1::linear_grpo_loss`. Outside a
compiled graph `linear` is called directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .checks import LossArguments
from .head import HeadOptions, HeadTensors, sum_dtype
from .linear import linear_loss, linear_rows, logps_gradients, score_chunks
from .options import OPTIONS_SCHEMA, LossOptions, option_values
from .rows import ONCE
from .token_loss import LossOutput, metric_names

_HEAD_SCHEMA = "Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b"
_HEAD_OPTIONS_SCHEMA = (
    "float lora_scale, ScalarType? logits_dtype, float logit_scale, float? softcap, int? top_k, float? top_p"
)


def compiled_linear_logps(
    hidden: Tensor,  # (N, D)
    head: HeadTensors,
    token_ids: Tensor,  # (N,)
    temperatures: Tensor | None,  # (N,)
    chunk_size: int,
    options: HeadOptions,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor]:
    values = _head_values(options) | {"temperature": options.temperature}
    sizes = (chunk_size, compute_entropy)
    logps, entropy, _ = linear_logps_op(hidden, *head, token_ids, temperatures, *sizes, **values)
    return logps, entropy


def _linear_logps(hidden: Tensor, *arguments: Any, **values: Any) -> tuple[Tensor, Tensor, Tensor]:
    *head, token_ids, temperatures, chunk_size, compute_entropy = arguments
    rows = linear_rows(hidden, token_ids, temperatures, chunk_size)
    return score_chunks(rows, HeadTensors(*head), HeadOptions(**values), compute_entropy)


_LOGPS_SCHEMA = f"(Tensor hidden, {_HEAD_SCHEMA}, Tensor token_ids, Tensor? temperatures, int chunk_size"
linear_logps_op = torch.library.custom_op(
    "fastr1::linear_logps",
    _linear_logps,
    mutates_args=(),
    schema=f"{_LOGPS_SCHEMA}, bool compute_entropy, *, {_HEAD_OPTIONS_SCHEMA}, float temperature) "
    "-> (Tensor, Tensor, Tensor)",
)


@linear_logps_op.register_fake
def _(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in ((n,), (n,), (2, n)))  # type: ignore[return-value]


def _linear_logps_backward(hidden: Tensor, *arguments: Any, needed: list[bool], **values: Any) -> list[Tensor]:
    *head, token_ids, temperatures, chunk_size, entropy, state, d_logps, d_entropy = arguments
    rows, numbers = linear_rows(hidden, token_ids, temperatures, chunk_size), (entropy, state, d_logps, d_entropy)
    gradients = logps_gradients(rows, HeadTensors(*head), HeadOptions(**values), *numbers, tuple(needed))
    return [hidden.new_empty(0) if x is None else x for x in gradients]


linear_logps_backward_op = torch.library.custom_op(
    "fastr1::linear_logps_backward",
    _linear_logps_backward,
    mutates_args=(),
    schema=f"{_LOGPS_SCHEMA}, Tensor entropy, Tensor state, Tensor? d_logps, Tensor? d_entropy, *, bool[] needed, "
    f"{_HEAD_OPTIONS_SCHEMA}, float temperature) -> Tensor[]",
)


@linear_logps_backward_op.register_fake
def _(hidden: Tensor, *arguments: Any, needed: list[bool], **_: Any) -> list[Tensor]:
    return _new_gradients((hidden, *arguments[:4]), needed)


def _new_gradients(inputs: tuple[Tensor | None, ...], needed: list[bool]) -> list[Tensor]:
    """Of contiguous memory; empty where not needed."""
    hidden = inputs[0]
    assert hidden is not None
    return [hidden.new_empty(x.shape if need and x is not None else 0) for x, need in zip(inputs, needed, strict=True)]


def _save_logps(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    *tensors, chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.chunk_size, ctx.values = chunk_size, keyword_only_inputs
    ctx.set_materialize_grads(False)


def _logps_backward(ctx: Any, d_logps: Tensor | None, d_entropy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    *tensors, entropy, state = ctx.saved_tensors
    if d_logps is None and d_entropy is None:
        return (None,) * 9
    needed = list(ctx.needs_input_grad[:5])
    numbers = (ctx.chunk_size, entropy, state, d_logps, d_entropy)
    gradients = linear_logps_backward_op(*tensors, *numbers, needed=needed, **ctx.values)
    return *(x if need else None for x, need in zip(gradients, needed, strict=True)), *(None,) * 4


linear_logps_op.register_autograd(_logps_backward, setup_context=_save_logps)


def compiled_linear_loss(
    hidden: Tensor,  # (B, T, D) or (N, D)
    head: HeadTensors,
    token_ids: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # as token_ids, bool
    temperatures: Tensor | None,  # as token_ids
    arguments: LossArguments,
    options: HeadOptions,
    chunk_size: int | None,
    num_loss_tokens: int | None,
) -> LossOutput:
    """The output of `linear.linear_loss`, from one operator, without the values of any tensor."""
    a = arguments
    normalizer = a.normalizer
    if normalizer is not None and not isinstance(normalizer, Tensor):
        normalizer = torch.full((), normalizer, dtype=torch.float64, device=hidden.device)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, *head)]
    loss, _, sums, count, logps, entropy, advantages, _ = linear_loss_op(
        hidden,
        *head,
        token_ids,
        mask,
        temperatures,
        a.cu_seqlens,
        a.rewards,
        a.group_ids,
        a.sequence_index,
        a.advantages,
        a.old_logps,
        a.ref_logps,
        a.sampler_logps,
        normalizer,
        a.num_generations,
        chunk_size,
        num_loss_tokens,
        a.return_entropy,
        needed,
        **_head_values(options),
        **option_values(a.options),
    )
    names = metric_names(a)
    sums = sums.detach()
    metrics = {name: (sums[i], count) for i, name in enumerate(names)}
    entropies = entropy.detach() if a.has_entropy else None
    return loss, metrics, logps.detach(), entropies, advantages.detach()


def _linear_loss(hidden: Tensor, *inputs: Any, **values: Any) -> tuple[Any, ...]:
    head, (token_ids, mask, temperatures), given, numbers = inputs[:4], inputs[4:7], inputs[7:16], inputs[16:]
    num_generations, chunk_size, num_loss_tokens, return_entropy, needed = numbers
    head_options = HeadOptions(temperature=values["temperature"], **{n: values.pop(n) for n in _HEAD_OPTIONS})
    tensors = dict(zip(_GIVEN, given, strict=True))
    arguments = LossArguments(
        options=LossOptions(**values),
        mask=mask,
        num_generations=num_generations,
        return_entropy=return_entropy,
        check_values=False,
        **tensors,
    )
    with _recording():
        leaves = [
            x if x is None else x.detach().requires_grad_(n) for x, n in zip((hidden, *head), needed, strict=True)
        ]
        sizes = (chunk_size, num_loss_tokens)
        rows, leaf_head = leaves[0], HeadTensors(*leaves[1:])  # type: ignore[arg-type]
        output, unit = linear_loss(rows, leaf_head, token_ids, mask, temperatures, arguments, head_options, *sizes)  # type: ignore[arg-type]
        loss, metrics, *per_token = output
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        # Over a power of two near the largest weight: gradients of its order would be lost in float16.
        found = iter(torch.autograd.grad(loss, wanted, (1 / unit).to(loss.dtype)) if wanted else ())
    gradients = [hidden.new_empty(0) if x is None or not x.requires_grad else next(found) for x in leaves]
    assert tuple(metrics) == metric_names(arguments)
    sums = torch.stack([total for total, _ in metrics.values()])
    count = next(iter(metrics.values()))[1].clone()
    logps, entropy, advantages = (
        hidden.new_empty(0) if x is None else x.clone(memory_format=torch.contiguous_format) for x in per_token
    )
    return loss.detach(), unit, sums, count, logps, entropy, advantages, gradients


_GIVEN = (
    *("cu_seqlens", "rewards", "group_ids", "sequence_index", "advantages"),
    *("old_logps", "ref_logps", "sampler_logps", "normalizer"),
)
_HEAD_OPTIONS = ("lora_scale", "logits_dtype", "logit_scale", "softcap", "top_k", "top_p")
linear_loss_op = torch.library.custom_op(
    "fastr1::linear_grpo_loss",
    _linear_loss,
    mutates_args=(),
    schema=f"(Tensor hidden, {_HEAD_SCHEMA}, Tensor token_ids, Tensor mask, Tensor? temperatures, Tensor? cu_seqlens, "
    "Tensor? rewards, Tensor? group_ids, Tensor? sequence_index, Tensor? advantages, Tensor? old_logps, "
    "Tensor? ref_logps, Tensor? sampler_logps, Tensor? normalizer, int? num_generations, "
    "int? chunk_size, SymInt? num_loss_tokens, bool return_entropy, bool[] needed, *, "
    f"{_HEAD_OPTIONS_SCHEMA}, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
)


@linear_loss_op.register_fake
def _(hidden: Tensor, *inputs: Any, **values: Any) -> tuple[Any, ...]:
    dtype, token_ids, needed = sum_dtype(hidden.dtype), inputs[4], inputs[-1]
    rewards, _, index, advantages, old, ref, sampler = inputs[8:15]
    loss_values = {name: x for name, x in values.items() if name not in _HEAD_OPTIONS}
    given = {"rewards": rewards, "old_logps": old, "ref_logps": ref, "sampler_logps": sampler}
    arguments = LossArguments(options=LossOptions(**loss_values), return_entropy=inputs[-2], **given)
    names = metric_names(arguments)
    if advantages is None:
        shape = rewards.shape if index is None else index.shape
        advantage_dtype = sum_dtype(rewards.dtype)
    else:
        shape, advantage_dtype = advantages.shape, sum_dtype(advantages.dtype)
    loss, unit, count = (hidden.new_empty((), dtype=d) for d in (dtype, torch.float64, torch.int64))
    sums = hidden.new_empty(len(names), dtype=dtype)
    logps = hidden.new_empty(token_ids.shape, dtype=dtype)
    entropy = torch.empty_like(logps) if arguments.has_entropy else hidden.new_empty(0)
    used = hidden.new_empty(shape, dtype=advantage_dtype)
    return loss, unit, sums, count, logps, entropy, used, _new_gradients((hidden, *inputs[:4]), needed)


def _save_loss(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(output[1], *output[-1])
    ctx.num_inputs = len(inputs)
    ctx.needed = inputs[-1]


def _loss_backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    unit, *gradients = ctx.saved_tensors
    factor = d_loss * unit
    wide = (x.to(sum_dtype(x.dtype)) * factor if need else None for x, need in zip(gradients, ctx.needed, strict=True))
    return *(None if x is None else x.to(y.dtype) for x, y in zip(wide, gradients, strict=True)), *(None,) * (
        ctx.num_inputs - 5
    )


linear_loss_op.register_autograd(_loss_backward, setup_context=_save_loss)


def _head_values(options: HeadOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _HEAD_OPTIONS}


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, where torch switches it off: the loss of tokens is differentiated by it."""
    keys = torch._C.DispatchKey
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        keys.AutogradFunctionality,
        keys.AutogradOther,
        keys.AutogradCPU,
        keys.AutogradCUDA,
        keys.ADInplaceOrView,
    ):
        off = off.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off), torch.enable_grad():
        yield
