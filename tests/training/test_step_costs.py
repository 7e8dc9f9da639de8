"""What the packed step costs: bytes at the peak and floating-point operations, against formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counters import peak_bytes
from torch.utils.flop_counter import FlopCounterMode
from trainer_toys import build_tokenizer, toy_config
from twin_toys import pack, padded_logits

from fastr1.models import DecoderLayout, VideoLanguageModel
from fastr1.models.packed_backends import batches
from fastr1.models.tinyllava import TinyLlavaProcessor, build_model
from fastr1.training.passes import completion_states
from fastr1_kernels import grpo_loss, linear_grpo_loss

GROUP, PROMPTS = 6, 3
VOCABULARY, CHUNK = 5000, 64


def wide_model(*, tied: bool = True) -> tuple[VideoLanguageModel, TinyLlavaProcessor]:
    """A decoder whose activations and logits outweigh everything else."""
    tokenizer = build_tokenizer()
    text = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(0)
    model = build_model(toy_config(tokenizer, **text))
    return model.train(), TinyLlavaProcessor(tokenizer, model.config)


class Step:
    """Forward and backward of every completion, in one micro-batch, and its padded twin."""

    def __init__(self, model: VideoLanguageModel, processor: TinyLlavaProcessor) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.prompts = [processor.prompt_ids("Why? " * (3 + 2 * i), instruction="Say.") for i in range(PROMPTS)]
        pixels = torch.randn(4, 3, 28, 28, generator=generator)
        with torch.no_grad():
            self.videos = [model.encode(pixels)] * PROMPTS
            self.tokens = [*model.visual_tokens(self.videos)]
        self.lengths = [40, 3, 17, 9, 28, 1] * PROMPTS
        self.mask = torch.arange(40)[None] < torch.tensor(self.lengths)[:, None]
        self.ids = torch.randint(3, 250, self.mask.shape, generator=generator)
        self.advantages = torch.randn(len(self.lengths), generator=generator)
        (self.micro_batch,) = pack(model, self.prompts, self.tokens, self.mask)

    def packed(self) -> None:
        flat, device = self.ids.flatten(), torch.device("cpu")
        width = self.mask.shape[1]
        states = completion_states(self.model, self.micro_batch, self.prompts, self.tokens, self.ids)
        weight, bias = self.model.head
        out = linear_grpo_loss(
            states,
            weight,
            flat[self.micro_batch.places(width, device)],
            bias=bias,
            cu_seqlens=self.micro_batch.cu_seqlens(device),
            advantages=self.advantages,
            normalizer=7.0,
            chunk_size=CHUNK,
        )
        out.loss.backward()

    def padded(self) -> None:
        logits = padded_logits(self.model, self.prompts, self.videos, self.ids, self.mask)
        grpo_loss(logits, self.ids, mask=self.mask, advantages=self.advantages, normalizer=7.0).loss.backward()


def bound_of_bytes(step: Step, head_is_trained: bool) -> int:
    """e·[L·layers·(8·D + 2·KV + 4·F) + 6·L·D + 3·N·D + C·V + 2·V·D] and the gradients of the decoder's parameters.

    Per layer and token: what two norms, attention and the gated unit keep for the backward pass. Then embeddings and
    last norm; the N rows of hidden states, their gradient and its place among the L; the logits of one chunk; the
    gradients of head and embedding.
    """
    layout = step.model.layout
    key_values = layout.num_kv_heads * layout.head_dim
    per_layer = 8 * layout.hidden_size + 2 * key_values + 4 * layout.intermediate_size
    num_tokens, num_rows = step.micro_batch.layout.num_tokens, sum(step.lengths)
    numbers = num_tokens * layout.num_layers * per_layer + 6 * num_tokens * layout.hidden_size
    numbers += 3 * num_rows * layout.hidden_size + CHUNK * layout.vocab_size
    numbers += sum(p.numel() for p in step.model.decoder.layers.parameters())
    if head_is_trained:
        numbers += 2 * layout.vocab_size * layout.hidden_size
    return 4 * numbers


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen head"])
def test_peak_bytes_are_those_of_activations_and_one_chunk_of_logits(trained: bool) -> None:
    model, processor = wide_model()
    model.freeze(["vision_tower", "connector"])
    model.decoder.embed_tokens.requires_grad_(trained)
    step = Step(model, processor)
    step.packed()
    model.zero_grad()
    peak, bound = peak_bytes(step.packed), bound_of_bytes(step, trained)
    assert 0.7 * bound < peak <= bound
    model.zero_grad()
    padded = peak_bytes(step.padded)
    logits = 4 * len(step.lengths) * step.mask.shape[1] * VOCABULARY
    assert padded > 2 * peak
    assert padded - peak > logits


def test_checkpointing_keeps_the_inputs_of_layers_and_what_one_of_them_needs() -> None:
    model, processor = wide_model()
    model.freeze(["vision_tower", "connector"])
    step = Step(model, processor)
    step.packed()
    peaks = []
    for recomputes in (False, True):
        if recomputes:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        peaks.append(peak_bytes(step.packed))
    layout = model.layout
    # of what two norms and the gated unit of every layer but one keep: 4·F alone
    spared = 4 * step.micro_batch.layout.num_tokens * (layout.num_layers - 1) * 4 * layout.intermediate_size
    assert peaks[0] - peaks[1] > spared


def flops_of_parameters(layout: DecoderLayout) -> int:
    """Of one token, forward: twice the weights of the layers."""
    heads = layout.num_heads * layout.head_dim
    key_values = layout.num_kv_heads * layout.head_dim
    per_layer = layout.hidden_size * (2 * heads + 2 * key_values + 3 * layout.intermediate_size)
    return 2 * layout.num_layers * per_layer


def flops_of_attention(step: Step) -> int:
    """Forward: 4·H·d for every pair of tokens of both parts, causal squares in full."""
    layout, packed = step.model.layout, step.micro_batch.layout
    pairs = 0
    for prompt, group in zip(packed.prompt_lengths, packed.completion_lengths, strict=True):
        pairs += prompt**2 + sum(length**2 for length in group) + prompt * sum(group)
    return 4 * layout.num_layers * layout.num_heads * layout.head_dim * pairs


def attention_flops(*shapes: Any) -> int:
    (_, heads, queries, width), (_, _, keys, _) = shapes[0], shapes[1]
    return 4 * shapes[0][0] * heads * queries * keys * width


COUNTED = {  # operators that torch's counter does not know
    torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **_: attention_flops(q, k),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, *a, **_: (
        attention_flops(q, k) * 5 // 2
    ),
}


def test_operations_are_those_of_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MAX_PADDED", 0)  # dense kernels pad short completions to the next 16 tokens
    model, processor = wide_model()
    model.freeze(["vision_tower", "connector"])
    step = Step(model, processor)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        step.packed()
    layout, num_rows = model.layout, sum(step.lengths)
    # the first layer's input needs a gradient: the embedding is trained
    body = 3 * flops_of_parameters(layout) * step.micro_batch.layout.num_tokens
    head = 3 * 2 * num_rows * layout.hidden_size * layout.vocab_size
    attention = flops_of_attention(step) * 7 // 2
    assert counter.get_total_flops() == pytest.approx(body + head + attention, rel=0.01)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as unshared:
        step.padded()
    prompts, longest = list(step.micro_batch.prompt_lengths), max(step.micro_batch.prompt_lengths)
    padded_tokens = GROUP * len(prompts) * (longest + step.mask.shape[1] - 1)
    assert unshared.get_total_flops() > 3 * flops_of_parameters(layout) * padded_tokens
    assert unshared.get_total_flops() > 2.5 * counter.get_total_flops()


def test_frozen_head_makes_no_gradient_of_its_weight() -> None:
    model, processor = wide_model(tied=False)
    model.freeze(["vision_tower", "connector"])
    step = Step(model, processor)
    totals = []
    for trained in (True, False):
        model.head[0].requires_grad_(trained)
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            step.packed()
        totals.append(counter.get_total_flops())
    layout = model.layout
    assert totals[0] - totals[1] == 2 * sum(step.lengths) * layout.hidden_size * layout.vocab_size


def test_checkpointed_tower_keeps_its_layers_inputs_alone() -> None:
    peaks = []
    for recomputes in (False, True):
        model, _ = wide_model()
        if recomputes:
            model.enable_gradient_checkpointing()
        pixels = torch.randn(32, 3, 28, 28)

        def see(model: VideoLanguageModel = model, pixels: torch.Tensor = pixels) -> Any:
            return model.encode(pixels)

        see()
        peaks.append(peak_bytes(see))
    assert peaks[1] < 0.6 * peaks[0]
