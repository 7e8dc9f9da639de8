"""A decoder of transformers over a packed micro-batch, its classes unmodified.

The attention layers look up a function by the name in the model's configuration. `forward_packed` puts "packed|NAME"
where NAME was configured, for good: the function of that name computes packed attention where the call came with a
`packed_layout`, and what NAME computes where not. Nothing is switched back, so a layer that gradient checkpointing
computes again in the backward finds what it found in the forward, and every other call (the plain loop of the rollout)
goes on to use NAME.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastr1.models.packed_attention import packed_attention
from fastr1.models.packed_layout import PackedLayout

PREFIX = "packed|"
# Keyword arguments that layers hand to their attention, and what each would need that packed attention does not have.
_REFUSED = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}


def forward_packed(
    decoder: Any,
    embeds: torch.Tensor,  # (1, L, D)
    layout: PackedLayout,
    *,
    position_ids: torch.Tensor | None = None,
    cache: Any | None = None,
    backend: str,
) -> torch.Tensor:  # (1, L, D)
    """Hidden states of every token of a packed micro-batch, after the last norm of the decoder.

    Args:
        decoder: a text model of transformers without its head: Llama, Qwen2, Qwen3, or the text model of Qwen2.5-VL
            or Qwen3-VL.
        position_ids: (1, L), or (3, 1, L) where the model has positions in time, height and width; counted from the
            layout if None.
        cache: whose `update` every layer gives its keys and values of the L tokens, and takes them back from.
        backend: from `choose_packed_backend`.

    Raises: ValueError for embeddings that are not of the layout, and for layers with a sliding window, attention
        dropout, soft-capped scores, sinks or a position bias.
    """
    if embeds.shape[:-1] != (1, layout.num_tokens):
        raise ValueError(
            f"forward_packed got embeddings of shape {tuple(embeds.shape)} for a layout of {layout.num_tokens} tokens; "
            f"they must be (1, {layout.num_tokens}, D)"
        )
    _accept_layouts(decoder.config)
    hidden: torch.Tensor = decoder(
        inputs_embeds=embeds,
        # A mask of four dimensions is handed on as it is; packed attention looks at the layout instead.
        attention_mask=embeds.new_empty(1, 1, 1, 1),
        position_ids=layout.positions(embeds.device) if position_ids is None else position_ids,
        past_key_values=cache,
        use_cache=False,
        packed_layout=layout,
        packed_backend=backend,
    ).last_hidden_state
    return hidden


def _accept_layouts(config: Any) -> None:
    """Have the attention layers of a configuration accept a `packed_layout`."""
    name = config._attn_implementation
    if name.startswith(PREFIX):
        return
    if PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
        unpacked = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(PREFIX + name, _with_layout(unpacked))
        if name in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    config._attn_implementation = PREFIX + name


def _with_layout(unpacked: Callable[..., Any] | None) -> Callable[..., Any]:
    """Packed attention for calls with a `packed_layout`; else `unpacked`, or a module's own eager attention if None."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,  # (B, H, L, d)
        key: torch.Tensor,  # (B, Hkv, L, d)
        value: torch.Tensor,  # (B, Hkv, L, d)
        attention_mask: torch.Tensor | None,
        *,
        packed_layout: PackedLayout | None = None,
        packed_backend: str = "",
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if packed_layout is None:
            function = unpacked or sys.modules[type(module).__module__].eager_attention_forward
            output: tuple[torch.Tensor, torch.Tensor | None] = function(
                module, query, key, value, attention_mask, **kwargs
            )
            return output
        _check_layer(module, kwargs)
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return packed_attention(query, key, value, packed_layout, scale, packed_backend), None

    return attention


def _check_layer(module: nn.Module, arguments: dict[str, Any]) -> None:
    layer = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', None)}"
    for name, meaning in _REFUSED.items():
        if arguments.get(name) is not None:
            raise ValueError(f"{layer} has {meaning} ({name}), which packed attention does not compute")
    if arguments.get("dropout"):
        raise ValueError(
            f"{layer} has attention dropout {arguments['dropout']}, which packed attention does not compute; set "
            "attention_dropout to 0 in the configuration of the model"
        )
