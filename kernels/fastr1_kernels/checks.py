"""Checks of what a call is given: every refusal is a `ValueError` with the value received and the remedy.

Checks of values (token ids, rewards, cu_seqlens, mask, normalizer) read the tensor, which on a GPU waits for the device
once each; `check_values=False` leaves them out. What can be checked without tensors is in `options`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .head import HeadOptions, HeadTensors
from .options import SCALES, LossOptions, check_choice, check_count, check_number, require


@dataclass(frozen=True, kw_only=True, eq=False)
class LossArguments:
    """What a call of a loss gives beside its rows and token ids. "Per token" is the shape of token_ids."""

    options: LossOptions
    mask: Tensor | None = None  # per token, bool or 0/1 integers, True = loss token; None: all
    cu_seqlens: Tensor | None = None  # (B + 1,) integers, packed input only: sequence b is rows [b] to [b + 1]
    rewards: Tensor | None = None  # (R,), of this call (R = B) or, with sequence_index, of the whole update
    num_generations: int | None = None  # G: rewards come in consecutive groups of G
    group_ids: Tensor | None = None  # (R,) integers: the group of each reward, for uneven groups
    sequence_index: Tensor | None = None  # (B,) integers: the row of `rewards` that belongs to each sequence
    advantages: Tensor | None = None  # (B,) or per token; instead of rewards
    old_logps: Tensor | None = None  # per token, of the policy before the update; None: on-policy
    ref_logps: Tensor | None = None  # per token, of the reference policy
    sampler_logps: Tensor | None = None  # per token, of the engine that sampled
    normalizer: float | Tensor | None = None  # loss tokens or sequences of the whole update: LOSSES[loss_type].counts
    return_entropy: bool = False
    check_values: bool = True  # False: nothing reads values of a tensor, so that nothing waits for the device

    @property
    def has_entropy(self) -> bool:
        """Entropies are computed where the call asks for them or its loss reads them."""
        return self.return_entropy or self.options.reads_entropy


def check_shape(name: str, x: object, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}: give a tensor")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}: move it to {device}")


def check_integers(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_shape(name, x, shape, device)
    ok = not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
    if not ok:
        raise ValueError(f"{name} has dtype {x.dtype}: give integers")


def check_floats(name: str, x: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_shape(name, x, shape, device)
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}: give floating point")


def check_rows(name: str, rows: Tensor, token_ids: Tensor) -> None:
    """`rows` (..., n) floating point beside `token_ids` (...)."""
    if not (isinstance(rows, Tensor) and rows.is_floating_point()):
        raise ValueError(f"{name}: give a floating-point tensor")
    if rows.dim() == 0 or rows.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}: the last axis is empty")
    check_integers("token_ids", token_ids, tuple(rows.shape[:-1]), rows.device)


def check_token_ids(token_ids: Tensor, vocabulary: int, mask: Tensor | None = None) -> None:
    """Every id, or every id of a loss token, is a column. Ids of other tokens may be anything (-100, padding)."""
    bad = (token_ids < 0) | (token_ids >= vocabulary)
    bad = bad if mask is None else bad & mask
    if bad.any():
        received = token_ids[bad][0].item()
        raise ValueError(f"token id {received} is outside the vocabulary of {vocabulary}: fix it or mask it out")


def check_head(hidden: Tensor, head: HeadTensors, options: HeadOptions, chunk_size: int | None) -> None:
    weight, _, lora_a, lora_b = head
    require(isinstance(weight, Tensor) and weight.dim() == 2, "weight: give a (V, D) tensor")
    require((lora_a is None) == (lora_b is None), "lora_a and lora_b: give both or none")
    rank = 0 if lora_a is None else lora_a.shape[0]
    vocabulary, size = weight.shape[0], hidden.shape[-1]
    shapes = {"weight": (vocabulary, size), "bias": (vocabulary,), "lora_a": (rank, size), "lora_b": (vocabulary, rank)}
    for name, shape in shapes.items():
        if (x := getattr(head, name)) is not None:
            check_floats(name, x, shape, hidden.device)
            if x.dtype != hidden.dtype:
                raise ValueError(f"{name} is {x.dtype} and hidden {hidden.dtype}: cast one to the other")
    if options.softcap is not None:
        check_number("softcap", options.softcap, above=0)
    check_number("logit_scale", options.logit_scale)
    check_number("lora_scale", options.lora_scale)
    dtypes = (None, hidden.dtype) if hidden.dtype == torch.float64 else (None, hidden.dtype, torch.float32)
    received = options.logits_dtype
    if received not in dtypes:
        raise ValueError(f"logits_dtype={received} for {hidden.dtype}: give torch.float32, or leave it out")
    if options.top_k is not None:
        check_count("top_k", options.top_k)
    if options.top_p is not None:
        check_number("top_p", options.top_p, above=0)
        if options.top_p > 1:
            raise ValueError(f"top_p={options.top_p}: give a probability, at most 1")
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)


def check_temperatures(temperature: Tensor, token_ids: Tensor, mask: Tensor | None, check_values: bool) -> None:
    """One temperature per token."""
    check_floats("temperature", temperature, tuple(token_ids.shape), token_ids.device)
    if check_values:
        bad = ~((temperature > 0) & temperature.isfinite())
        bad = bad if mask is None else bad & mask
        require(not bad.any(), "temperature: give finite numbers > 0 for every token")


def _check_normalizer(normalizer: float | Tensor | None, check_values: bool) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer has shape {tuple(normalizer.shape)}: give a 0-d tensor or a number")
        if check_values and not normalizer >= 0:
            raise ValueError(f"normalizer={normalizer.item()}: give a finite number >= 0")
    elif normalizer is not None:
        check_number("normalizer", normalizer, at_least=0)


def check_grad_scale(grad_scale: float | Tensor | None) -> None:
    if isinstance(grad_scale, Tensor):
        if grad_scale.dim() != 0:
            raise ValueError(f"grad_scale has shape {tuple(grad_scale.shape)}: give a 0-d tensor or a number")
    elif grad_scale is not None:
        check_number("grad_scale", grad_scale, above=0)


def check_advantage_options(scale_rewards: str, eps: float, noise_std: float = 0.0) -> None:
    check_choice("scale_rewards", scale_rewards, SCALES)
    check_number("eps", eps, at_least=0)
    check_number("noise_std", noise_std, at_least=0)


def _check_rewards(rewards: Tensor, check_values: bool) -> None:
    if not isinstance(rewards, Tensor):
        raise ValueError(f"rewards is a {type(rewards).__name__}: give a tensor")
    ok = rewards.dim() == 1 and len(rewards) > 0 and not rewards.is_complex()
    if not ok:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)} and dtype {rewards.dtype}: give (B,) real numbers, B >= 1"
        )
    if check_values and (infinite := rewards.isinf()).any():
        position = int(infinite.nonzero()[0, 0])
        value = rewards[position].item()
        raise ValueError(f"reward {position} is {value}: give a finite number, or NaN for a completion without score")


def check_groups(
    rewards: Tensor, num_generations: int | None, group_ids: Tensor | None, check_values: bool = True
) -> None:
    """Rewards, and exactly one description of their groups."""
    _check_rewards(rewards, check_values)
    if (num_generations is None) == (group_ids is None):
        raise ValueError(f"num_generations={num_generations} and group_ids: give exactly one of them")
    if group_ids is not None:
        check_integers("group_ids", group_ids, (len(rewards),), rewards.device)
    if num_generations is not None:
        check_count("num_generations", num_generations)
        if len(rewards) % num_generations != 0:
            raise ValueError(
                f"{len(rewards)} rewards are not whole groups of num_generations={num_generations}: use group_ids"
            )


def check_inplace(logits: Tensor) -> None:
    """Refuse logits whose gradient cannot take their place."""
    if _overlaps(logits):
        raise ValueError(f"inplace=True: logits of strides {logits.stride()} share memory, give a copy")
    is_parameter = logits.requires_grad and logits.is_leaf and torch.is_grad_enabled()
    require(not is_parameter, "inplace=True would overwrite logits that are a leaf of the graph: leave it out")


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory: an axis steps by less than what the axes of smaller strides reach."""
    reach = 0
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (n - 1)
    return False


def check_layout(token_ids: Tensor, cu_seqlens: Tensor | None, check_values: bool = True) -> int:
    """The number of sequences B of padded token_ids (B, T), or of packed token_ids (N,) with cu_seqlens."""
    shape = tuple(token_ids.shape)
    if token_ids.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens is for packed token_ids (N,): token_ids has shape {shape}")
        return shape[0]
    if token_ids.dim() != 1:
        raise ValueError(f"token_ids has shape {shape}: give (B, T), or (N,) with cu_seqlens")
    if cu_seqlens is None:
        raise ValueError(f"packed token_ids {shape} need cu_seqlens, the (B + 1,) boundaries of the sequences")
    check_integers("cu_seqlens", cu_seqlens, (cu_seqlens.numel(),), token_ids.device)
    if not check_values:
        require(cu_seqlens.numel() > 0, "cu_seqlens is empty: give the (B + 1,) boundaries of the sequences")
        return cu_seqlens.numel() - 1
    bounds = cu_seqlens.tolist()
    ok = bool(bounds) and bounds[0] == 0 and bounds[-1] == shape[0] and bounds == sorted(bounds)
    if not ok:
        raise ValueError(f"cu_seqlens={bounds}: boundaries must rise from 0 to the {shape[0]} rows of token_ids")
    return len(bounds) - 1


def check_mask(mask: Tensor | None, token_ids: Tensor, check_values: bool = True) -> Tensor:
    """The mask as bool, all True where None is given."""
    if mask is None:
        return torch.ones_like(token_ids, dtype=torch.bool)
    check_shape("mask", mask, tuple(token_ids.shape), token_ids.device)
    if mask.is_floating_point():
        raise ValueError(f"mask has dtype {mask.dtype}: give bool or 0/1 integers")
    if mask.dtype != torch.bool and check_values:
        bad = (mask != 0) & (mask != 1)
        if bad.any():
            raise ValueError(f"mask contains {mask[bad][0].item()}: give bool or 0/1 integers")
    return mask.bool()


def check_loss_arguments(arguments: LossArguments, token_ids: Tensor, mask: Tensor, num_sequences: int) -> None:
    """Check everything but the logits and the values of the ids."""
    options = arguments.options
    options.check()
    _check_normalizer(arguments.normalizer, arguments.check_values)
    options.check_need("normalizer", arguments.normalizer, is_missing=arguments.normalizer is None)
    for name in ("old_logps", "ref_logps", "sampler_logps"):
        if (logps := getattr(arguments, name)) is not None:
            check_floats(name, logps, tuple(token_ids.shape), token_ids.device)
    if options.beta and arguments.ref_logps is None:
        raise ValueError(f"beta={options.beta} needs ref_logps: give them, or beta=0")
    if options.loss.is_on_policy and arguments.old_logps is not None:
        raise ValueError(f"old_logps has no effect on the on-policy loss_type={options.loss_type!r}: use 'grpo'")
    if options.off_policy_threshold is not None and arguments.old_logps is None and arguments.sampler_logps is None:
        raise ValueError("off_policy_threshold has no effect on-policy: give old_logps or sampler_logps")
    is_zero = not isinstance(arguments.normalizer, Tensor) and arguments.normalizer == 0
    if arguments.check_values and is_zero and mask.any():
        raise ValueError("normalizer=0, but this call has loss tokens: count them in")
    _check_advantage_source(arguments, token_ids, num_sequences)


def _check_advantage_source(arguments: LossArguments, token_ids: Tensor, num_sequences: int) -> None:
    rewards, advantages, index = arguments.rewards, arguments.advantages, arguments.sequence_index
    require((rewards is None) != (advantages is None), "give exactly one of rewards and advantages")
    if advantages is not None:
        for name in ("num_generations", "group_ids", "sequence_index"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{name} describes rewards: leave it out with advantages")
        per_sequence = isinstance(advantages, Tensor) and tuple(advantages.shape) == (num_sequences,)
        bounds = arguments.cu_seqlens
        if bounds is not None and per_sequence and num_sequences == len(token_ids):
            message = "one per sequence or one per row? Lay the call out as (B, T)"
            is_same = arguments.check_values and bool((bounds.diff() == 1).all())
            if not is_same:
                raise ValueError(f"advantages {tuple(advantages.shape)} with as many sequences as rows: {message}")
        shape = (num_sequences,) if per_sequence else tuple(token_ids.shape)
        check_floats("advantages", advantages, shape, token_ids.device)
        return
    assert rewards is not None
    if index is None:
        check_shape("rewards", rewards, (num_sequences,), token_ids.device)
    else:
        check_integers("sequence_index", index, (num_sequences,), token_ids.device)
        check_shape("rewards", rewards, (len(rewards),), token_ids.device)
        if arguments.check_values and ((index < 0) | (index >= len(rewards))).any():
            raise ValueError(f"sequence_index={index.tolist()} leaves the {len(rewards)} rewards")
    check_groups(rewards, arguments.num_generations, arguments.group_ids, arguments.check_values)
