"""What a token step needs to know of a decoder of transformers: its modules, layer by layer, and its rotation.

Known are the text decoders of Qwen2, Qwen2.5-VL, Qwen3, Qwen3-VL and Llama. The stack holds the decoder's own modules,
not their weights: whoever owns the parameters may change them in place, gather them, wrap a projection in an adapter or
hang a hook on it, and the next rollout sees it. A decoder that computes something else is refused by name, never
approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation

# Classes of transformers, by what they compute; `liger` exchanges the layers of the same ones.
_DECODERS = ("Qwen2Model", "Qwen2_5_VLTextModel", "Qwen3Model", "Qwen3VLTextModel", "LlamaModel")
# Normalised in float32, rounded, times the weight.
NORMS = ("Qwen2RMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3RMSNorm", "Qwen3VLTextRMSNorm", "LlamaRMSNorm")
# down(act(gate) · up)
MLPS = ("Qwen2MLP", "Qwen3MLP", "Qwen3VLTextMLP", "LlamaMLP")
# Projections, norms of the heads where there are any, x·cos + rotate_half(x)·sin, attention, projection.
ATTENTIONS = ("Qwen2Attention", "Qwen2_5_VLAttention", "Qwen3Attention", "Qwen3VLTextAttention", "LlamaAttention")
# Kinds of rotation whose frequencies do not change with the length of the sequence.
_ROTATIONS = ("default", "linear", "llama3", "yarn")


class UnknownDecoderError(ValueError):
    """The decoder computes something that a token step does not. The message names it."""


@dataclass(frozen=True)
class DecoderLayer:
    """The modules of one layer; a norm is anything with `weight` and `variance_epsilon`."""

    input_norm: Any
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: Any | None  # of every head; both or none
    k_norm: Any | None
    post_attention_norm: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    scale: float  # of attention scores

    @property
    def attention_inputs(self) -> tuple[nn.Module, ...]:
        """Projections of one input, as `SideBySide` takes them; so are those of the MLP."""
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def mlp_inputs(self) -> tuple[nn.Module, ...]:
        return self.gate_proj, self.up_proj


@dataclass(frozen=True)
class DecoderStack:
    """A decoder without its head."""

    embed_tokens: nn.Module
    layers: tuple[DecoderLayer, ...]
    norm: Any
    rotary: Any
    head_dim: int

    @torch.no_grad()
    def rotation(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions 0…M−1 of text, (M, d) each, as the decoder's own rotary embedding gives them.

        Where it has three axes (M-RoPE), text has the same position on all of them.
        """
        weight: Any = self.embed_tokens.weight
        positions = torch.arange(num_positions, device=weight.device)[None]
        if hasattr(self.rotary, "mrope_section"):
            positions = positions[None].expand(3, 1, -1)
        cos, sin = self.rotary(weight[:1, None], positions)
        return cos[0].contiguous(), sin[0].contiguous()

    @property
    def is_plain(self) -> bool:
        """Whether a token step depends on nothing but the parameters: an adapter or a hook may be scaled and switched
        off by numbers of its own."""
        projections = [m for layer in self.layers for name, m in vars(layer).items() if name.endswith("_proj")]
        return all(map(_is_plain, projections)) and not _is_hooked(self.embed_tokens)

    @property
    def copied_bytes(self) -> int:
        """What `SideBySide` takes for the length of a rollout."""
        groups = [group for layer in self.layers for group in (layer.attention_inputs, layer.mlp_inputs)]
        copied = [parameter for group in groups for linear in _copied(group) for parameter in linear.parameters()]
        return sum(parameter.nbytes for parameter in copied)

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that a token step reads, those of the embedding last."""
        modules = [module for layer in self.layers for module in vars(layer).values() if isinstance(module, nn.Module)]
        return [p for module in (*modules, self.norm, self.embed_tokens) for p in module.parameters()]


def _is_plain(module: nn.Module) -> bool:
    """Whether a projection is x·Wᵀ + b and nothing else: no adapter around it, no hook on it, no other `forward`."""
    return type(module) is nn.Linear and not _is_hooked(module) and "forward" not in vars(module)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def project(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a projection gives."""
    if isinstance(module, nn.Linear) and _is_plain(module):
        return F.linear(x, module.weight, module.bias)
    out: torch.Tensor = module(x)
    return out


class SideBySide:
    """Projections of the same input. On a CPU plain ones are copied into one matrix, for the length of a rollout: three
    products of a few rows take twice the time of one. Elsewhere nothing is copied."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self._joined: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if linears := _copied(modules):
            weight = torch.cat([linear.weight.detach() for linear in linears])
            has_bias = linears[0].bias is not None
            self._joined = weight, torch.cat([linear.bias.detach() for linear in linears]) if has_bias else None
            self._sizes = [linear.out_features for linear in linears]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self._joined is None:
            return tuple(project(module, x) for module in self._modules)
        return F.linear(x, *self._joined).split(self._sizes, dim=1)


def _copied(modules: Sequence[nn.Module]) -> list[nn.Linear]:
    """Projections of one input that are copied into one matrix: all of them or none."""
    linears = [module for module in modules if isinstance(module, nn.Linear) and _is_plain(module)]
    on_cpu = all(linear.weight.device.type == "cpu" for linear in linears)
    have_bias = {linear.bias is not None for linear in linears}
    return linears if len(linears) == len(modules) and on_cpu and len(have_bias) == 1 else []


def is_of_transformers(module: nn.Module) -> bool:
    """Whether the class of a module is one of transformers; others of the same name may compute something else."""
    return type(module).__module__.startswith("transformers.models.")


def describe_decoder(decoder: Any) -> DecoderStack:
    """The stack of a decoder. Raises UnknownDecoderError, for classes, rotations, activations and windows."""
    name = type(decoder).__name__
    _require(name, "the decoder", decoder, _DECODERS)
    config = decoder.config
    kind = config.rope_parameters["rope_type"]
    if kind not in _ROTATIONS:
        raise UnknownDecoderError(f"{name} rotates by {kind!r}, known are {', '.join(_ROTATIONS)}; {_REMEDY}")
    layers = tuple(_describe_layer(name, i, layer) for i, layer in enumerate(decoder.layers))
    _require(name, "the last norm", decoder.norm, NORMS)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return DecoderStack(decoder.embed_tokens, layers, decoder.norm, decoder.rotary_emb, head_dim)


_REMEDY = 'set rollout.backend to "eager"'


def refuse_hooks(decoder: Any) -> None:
    """Raises UnknownDecoderError where a forward hook hangs on a module that a token step does not call: the decoder,
    a layer, attention, an MLP or a norm. Projections and the embedding are called with theirs."""
    called = {id(decoder.embed_tokens), *(id(m) for name, m in decoder.named_modules() if "_proj" in name)}
    for name, module in decoder.named_modules():
        if _is_hooked(module) and id(module) not in called:
            raise UnknownDecoderError(
                f"{type(decoder).__name__} has a forward hook on {name or 'itself'}, which a token step does not call; "
                f"remove the hook, or {_REMEDY}"
            )


def _describe_layer(decoder: str, index: int, layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    where = f"{decoder} layer {index}"
    _require(where, "attention", attention, ATTENTIONS)
    _require(where, "the MLP", mlp, MLPS)
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)) if norm]
    for norm in norms:
        _require(where, "a norm", norm, NORMS)
    if not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        raise UnknownDecoderError(f"{where} gates by {type(mlp.act_fn).__name__}, known is SiLU; {_REMEDY}")
    if getattr(attention, "sliding_window", None) is not None:
        raise UnknownDecoderError(f"{where} has a sliding window of {attention.sliding_window} tokens; {_REMEDY}")
    return DecoderLayer(
        layer.input_layernorm,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
        layer.post_attention_layernorm,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
        attention.scaling,
    )


def _require(where: str, what: str, module: nn.Module, known: tuple[str, ...]) -> None:
    kind = type(module)
    if kind.__name__ not in known or not is_of_transformers(module):
        name = kind.__name__ if kind.__name__ not in known else f"{kind.__name__} of {kind.__module__}"
        raise UnknownDecoderError(f"{where}: {what} is {name}, known are {', '.join(known)} of transformers; {_REMEDY}")
