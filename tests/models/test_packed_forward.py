"""Decoders of transformers over packed micro-batches equal themselves over padded rows that share nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from fastr1.models import packed_forward as module
from fastr1.models.packed_forward import forward_packed
from fastr1.models.packed_layout import PackedLayout

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaModel, LlamaConfig, {}),
    "qwen2": (Qwen2Model, Qwen2Config, {}),
    "qwen3": (Qwen3Model, Qwen3Config, {"head_dim": 8}),
    "qwen2.5-vl": (
        Qwen2_5_VLTextModel,
        Qwen2_5_VLTextConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    ),
    "qwen3-vl": (
        Qwen3VLTextModel,
        Qwen3VLTextConfig,
        {
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
    ),
}
LAYOUTS = {
    "ragged": PackedLayout([5, 9, 1], [[3, 0, 4], [0, 0], [7, 7, 1]]),
    "one-each": PackedLayout([6, 3], [[4], [0]]),
}


def decoder(family: str, *, kv_heads: int = 2, attention: str = "sdpa", **options: Any) -> Any:
    """Two layers, random weights that do not leave attention near uniform."""
    model, config, more = FAMILIES[family]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    made = model(config(**sizes, **heads, initializer_range=0.2, attn_implementation=attention, **more, **options))
    return made.train()


def enable_checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def padded_rows(layout: PackedLayout, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, ...) → every prompt with every completion behind it, zeros at the end: (rows, longest, ...), and the mask."""
    rows, start, tail = [], 0, layout.num_prompt_tokens
    for length, group in zip(layout.prompt_lengths, layout.completion_lengths, strict=True):
        for more in group:
            rows.append(torch.cat([packed[start : start + length], packed[tail : tail + more]]))
            tail += more
        start += length
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def unshared(model: Any, embeds: torch.Tensor, layout: PackedLayout, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states that predict the tokens of the completions, (N, D), by the padded forward."""
    rows, mask = padded_rows(layout, embeds[0])
    row_positions = torch.stack([padded_rows(layout, p)[0] for p in positions.flatten(0, -2)])
    row_positions = row_positions[0] if len(row_positions) == 1 else row_positions
    hidden = model(inputs_embeds=rows, attention_mask=mask, position_ids=row_positions, use_cache=False)
    prompts = [n for n, g in zip(layout.prompt_lengths, layout.completion_lengths, strict=True) for _ in g]
    lengths = [more for group in layout.completion_lengths for more in group]
    states = zip(hidden.last_hidden_state, prompts, lengths, strict=True)
    return torch.cat([row[prompt - 1 : prompt + more] for row, prompt, more in states])


def packed(
    model: Any, embeds: torch.Tensor, layout: PackedLayout, positions: torch.Tensor, backend: str
) -> torch.Tensor:
    hidden = forward_packed(model, embeds, layout, position_ids=positions, backend=backend)
    return hidden[0, layout.predicting_states("cpu")]


def result(model: Any, layout: PackedLayout, forward: Callable[..., torch.Tensor], *more: Any) -> list[torch.Tensor]:
    """Hidden states, and gradients of the embeddings and of every parameter."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, layout.num_tokens, 32, generator=generator, requires_grad=True)
    hidden = forward(model, embeds, layout, *more)
    weights = torch.randn(hidden.shape, generator=generator)
    parameters = [p for name, p in model.named_parameters() if name != "embed_tokens.weight"]
    return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), [embeds, *parameters])]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_and_unshared(family: str, kv_heads: int, checkpointing: bool) -> None:
    layout = LAYOUTS["ragged"]
    model, positions = decoder(family, kv_heads=kv_heads), layout.positions("cpu")
    expected = result(model, layout, unshared, positions)
    if checkpointing:
        enable_checkpointing(model)
    assert_same(result(model, layout, packed, positions, "sdpa"), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_backends_and_configured_attentions_go_together(name: str, backend: str, attention: str) -> None:
    layout, model = LAYOUTS[name], decoder("qwen2", attention=attention)
    positions = layout.positions("cpu")
    assert_same(result(model, layout, packed, positions, backend), result(model, layout, unshared, positions))


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_positions_in_time_height_and_width(family: str) -> None:
    layout, model = LAYOUTS["ragged"], decoder(family)
    positions = torch.randint(0, 40, (3, 1, layout.num_tokens), generator=torch.Generator().manual_seed(2))
    got = result(model, layout, packed, positions, "sdpa")
    assert_same(got, result(model, layout, unshared, positions))
    counted = result(model, layout, packed, layout.positions("cpu"), "sdpa")
    assert (got[0] - counted[0]).abs().max() > 0.01


def test_positions_are_those_of_the_layout_where_none_are_given() -> None:
    layout, model = LAYOUTS["ragged"], decoder("qwen2")
    embeds = torch.randn(1, layout.num_tokens, 32)
    given = forward_packed(model, embeds, layout, position_ids=layout.positions("cpu"), backend="sdpa")
    assert torch.equal(forward_packed(model, embeds, layout, backend="sdpa"), given)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpacked_calls_compute_what_they_did(family: str, attention: str) -> None:
    layout, model = LAYOUTS["ragged"], decoder(family, attention=attention).eval()
    embeds, mask = torch.randn(2, 7, 32), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])

    def rollout() -> list[torch.Tensor]:
        first = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        second = model(inputs_embeds=embeds[:, :1], attention_mask=longer, past_key_values=first.past_key_values)
        return [first.last_hidden_state[:, 2:], second.last_hidden_state]

    before = rollout()
    forward_packed(model, torch.randn(1, layout.num_tokens, 32), layout, backend="sdpa")
    assert all(torch.equal(x, y) for x, y in zip(rollout(), before, strict=True))


def test_layers_computed_again_find_their_layout_whatever_ran_in_between() -> None:
    layout, model = LAYOUTS["ragged"], decoder("qwen2")
    positions = layout.positions("cpu")
    expected = result(model, layout, packed, positions, "sdpa")
    enable_checkpointing(model)

    def interrupted(*arguments: Any) -> torch.Tensor:
        hidden = packed(*arguments)
        with torch.no_grad():
            model(inputs_embeds=torch.randn(2, 4, 32), attention_mask=torch.ones(2, 4))
            forward_packed(model, torch.randn(1, 4, 32), PackedLayout([3], [[1]]), backend="eager")
        return hidden

    assert_same(result(model, layout, interrupted, positions, "sdpa"), expected)


def test_no_mask_of_all_tokens_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return query.transpose(1, 2)

    def check(function: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: nn.Module, q: Any, k: Any, v: Any, attention_mask: Any, **options: Any) -> Any:
            seen.append(attention_mask.shape)
            return function(module, q, k, v, attention_mask, **options)

        return attention

    monkeypatch.setattr(module, "packed_attention", look)
    for family in FAMILIES:
        model = decoder(family)
        forward_packed(model, torch.randn(1, 6, 32), PackedLayout([4], [[2]]), backend="sdpa")
        name = model.config._attn_implementation
        monkeypatch.setitem(
            module.AttentionInterface._global_mapping, name, check(module.ALL_ATTENTION_FUNCTIONS[name])
        )
        forward_packed(model, torch.randn(1, 6, 32), PackedLayout([4], [[2]]), backend="sdpa")
    assert len(seen) >= 2 * len(FAMILIES)
    assert set(seen) == {(1, 1, 1, 1)}


def test_the_configuration_is_saved_as_it_was() -> None:
    model = decoder("qwen2")
    before = model.config.to_dict()
    forward_packed(model, torch.randn(1, 6, 32), PackedLayout([4], [[2]]), backend="sdpa")
    assert model.config.to_dict() == before


def test_layers_with_a_sliding_window_are_refused() -> None:
    model = decoder("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match=r"Qwen2Attention of layer 1 has a sliding window \(sliding_window\)"):
        forward_packed(model, torch.randn(1, 6, 32), PackedLayout([4], [[2]]), backend="sdpa")


def test_attention_dropout_is_refused_in_training_only() -> None:
    model, layout, embeds = decoder("llama", attention_dropout=0.1), PackedLayout([4], [[2]]), torch.randn(1, 6, 32)
    with pytest.raises(
        ValueError, match=r"LlamaAttention of layer 0 has attention dropout 0\.1.* set attention_dropout"
    ):
        forward_packed(model, embeds, layout, backend="sdpa")
    forward_packed(model.eval(), embeds, layout, backend="sdpa")


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_scores_that_are_not_plain_are_refused(name: str) -> None:
    model, x = decoder("llama"), torch.randn(1, 4, 6, 8)
    attention = module._with_layout(None)
    options = {"packed_layout": PackedLayout([4], [[2]]), "packed_backend": "sdpa", name: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"LlamaAttention of layer 1 has .* \({name}\), which packed"):
        attention(model.layers[1].self_attn, x, x, x, None, **options)


def test_embeddings_of_another_layout_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 6, 32\) for a layout of 6 tokens; they must be \(1, 6, D\)"):
        forward_packed(decoder("llama"), torch.randn(2, 6, 32), PackedLayout([4], [[2]]), backend="sdpa")
