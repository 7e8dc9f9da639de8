"""The engine on every decoder that it knows, against transformers and plain loops; others are refused by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from decoder_toys import (
    FAMILIES,
    VIDEO,
    TextModel,
    all_kept,
    build_text_model,
    for_generation,
    greedy_by_full_forwards,
    no_videos,
    params_of,
    prompts_of,
)
from second_family import SecondProcessor
from torch import nn
from transformers import (
    GPT2Config,
    GPT2Model,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)
from transformers.models.qwen2 import modeling_qwen2
from twin_toys import packed_logits, padded_logits

from fastr1.models.decoder_stack import UnknownDecoderError, describe_decoder
from fastr1.rollout import RolloutEngine
from fastr1.rollout.eager import sample_eagerly
from fastr1_kernels import selective_log_softmax

LENGTH = 12
RAGGED = [5, 17, 2, 9]
PROCESSOR = SecondProcessor()
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"{family} tied": (family, {"is_tied": True}) for family in ("qwen2", "qwen3", "qwen3-vl")},
    **{f"qwen2 {kv} kv heads": ("qwen2", {"num_key_value_heads": kv}) for kv in (4, 1)},
    **{f"qwen3-vl {kv} kv heads": ("qwen3-vl", {"num_key_value_heads": kv}) for kv in (4, 1)},
    "qwen3 wide heads": ("qwen3", {"head_dim": 16}),  # heads · head_dim is not D
    "llama one layer": ("llama", {"num_hidden_layers": 1}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e2, "factor": 4.0}}),
    "llama llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e2,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e2,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
}


def generate(whole: Any, prompt: torch.Tensor, **video: torch.Tensor) -> list[int]:
    """transformers' own loop over one prompt."""
    out = whole.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=list(PROCESSOR.end_token_ids),
        pad_token_id=PROCESSOR.pad_token_id,
        **video,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> TextModel:
    family, options = VARIANTS[request.param]
    return build_text_model(family, **options)


@pytest.fixture(scope="module")
def expected(model: TextModel) -> list[list[int]]:
    """Of the ragged prompts; made before the engine has touched the model."""
    whole = for_generation(model)
    return [generate(whole, prompt) for prompt in prompts_of(RAGGED)]


@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_greedy_equals_generate(model: TextModel, expected: list[list[int]], group: int) -> None:
    engine = RolloutEngine(model, PROCESSOR, params_of(LENGTH, temperature=0))
    rollout = engine.sample(prompts_of(RAGGED), no_videos(4), num_generations=group)
    assert len({tuple(ids) for ids in expected}) > 2
    assert all_kept(rollout) == [ids for ids in expected for _ in range(group)]


@pytest.mark.parametrize("prompts_together", [1, 2, 3])
def test_greedy_does_not_depend_on_the_batch(
    model: TextModel, expected: list[list[int]], prompts_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on how many prompts are prefilled at a time."""
    monkeypatch.setattr("fastr1.rollout.engine.PREFILL_TOKENS", 8)
    engine, prompts = RolloutEngine(model, PROCESSOR, params_of(LENGTH, temperature=0)), prompts_of(RAGGED)
    rows = []
    for start in range(0, 4, prompts_together):
        some = prompts[start : start + prompts_together]
        rows += all_kept(engine.sample(some, no_videos(len(some))))
    assert rows == expected


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logps_equal_those_of_the_padded_forward(model: TextModel, temperature: float) -> None:
    prompts, videos = prompts_of(RAGGED), no_videos(4)
    engine = RolloutEngine(model, PROCESSOR, params_of(LENGTH, temperature=temperature))
    rollout = engine.sample(prompts, videos, num_generations=3, seed=5)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    with torch.no_grad():
        logits = model.padded_logits(prompts, videos, ids, mask)
    logps = selective_log_softmax(logits, ids, temperature=temperature)
    torch.testing.assert_close(rollout.sampler_logps[mask], logps[mask], atol=1e-4, rtol=0)
    assert len({tuple(row) for row in all_kept(rollout)}) > 6
    assert int(mask.sum()) > 40


def test_engine_draws_what_eager_draws(model: TextModel) -> None:
    prompts, videos = prompts_of(RAGGED), no_videos(4)
    options = {"num_generations": 3, "seed": 9, "prompt_keys": [4, 1, 8, 3]}
    params = params_of(LENGTH, top_k=50, top_p=0.9, min_p=0.01)
    got = RolloutEngine(model, PROCESSOR, params).sample(prompts, videos, **options)
    want = sample_eagerly(model, PROCESSOR, prompts, videos, params, **options)
    assert all_kept(got) == all_kept(want)
    assert got.texts == want.texts
    assert torch.equal(got.is_truncated, want.is_truncated)
    torch.testing.assert_close(got.sampler_logps, want.sampler_logps, atol=1e-4, rtol=0)


# Positions


class VideoPositions(TextModel):
    """The first half of a prompt stands for a video: 2 rows and as many columns as it takes, seen at one time. Text
    goes on behind the largest position of it, as in Qwen2.5-VL."""

    step = 1  # between columns

    def prompt_positions(self, prompt_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
        place = torch.arange(num_tokens // 2)
        video = torch.stack([torch.zeros_like(place), place % 2, place // 2 * self.step])
        first_text = int(video.amax()) + 1 if len(place) else 0
        text = first_text + torch.arange(num_tokens - len(place))
        return torch.cat([video, text.expand(3, -1)], dim=1), first_text + len(text)


class FarPositions(VideoPositions):
    """The position of the first token of a completion is above the number of tokens before it."""

    step = 7


class TimePositions(TextModel):
    """One axis, and every prompt begins at 6."""

    def prompt_positions(self, prompt_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
        return torch.arange(num_tokens) + 6, num_tokens + 6


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", [VideoPositions, FarPositions])
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_positions_in_time_height_and_width(family: str, kind: type[TextModel], group: int) -> None:
    model, prompts = build_text_model(family, kind=kind), prompts_of(RAGGED)
    ends = [model.prompt_positions(prompt, len(prompt))[1] for prompt in prompts]
    assert any(end != len(prompt) for end, prompt in zip(ends, prompts, strict=True))
    want = [greedy_by_full_forwards(model, prompt, LENGTH, PROCESSOR.end_token_ids) for prompt in prompts]
    counted = build_text_model(family)
    assert want != [greedy_by_full_forwards(counted, prompt, LENGTH, PROCESSOR.end_token_ids) for prompt in prompts]
    engine = RolloutEngine(model, PROCESSOR, params_of(LENGTH, temperature=0))
    assert all_kept(engine.sample(prompts, no_videos(4), num_generations=group)) == [
        x for x in want for _ in range(group)
    ]


class WithVideo(TextModel):
    """Prompts hold `VIDEO` where the tokens of a video go; transformers itself says where these lie."""

    grid = torch.tensor([[2, 4, 6]])  # time, height and width, in patches; 2 × 2 of them are a token

    def embed_prompt(self, prompt_ids: torch.Tensor, visual_tokens: torch.Tensor) -> torch.Tensor:
        text = self.decoder.embed_tokens(prompt_ids)
        return text.masked_scatter((prompt_ids == VIDEO)[:, None], visual_tokens)

    def prompt_positions(self, prompt_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
        kinds = 2 * (prompt_ids == VIDEO).int()
        found, shift = self.whole.model.get_rope_index(prompt_ids[None], kinds[None], video_grid_thw=self.grid)
        return found[:, 0], num_tokens + int(shift)


@pytest.mark.parametrize("group", [1, 3])
def test_greedy_equals_generate_with_a_video(group: int) -> None:
    model = build_text_model("qwen2.5-vl", kind=WithVideo)
    model.__dict__["whole"] = whole = for_generation(model, VIDEO)
    texts = [prompt[prompt != VIDEO] for prompt in prompts_of([4, 9, 6])]
    prompts = [torch.cat([text[:2], torch.full((12,), VIDEO), text[2:]]) for text in texts]
    patches = [torch.randn(48, 96, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        for parameter in whole.model.visual.merger.parameters():
            parameter.mul_(9)  # so that a video counts
        videos = [whole.model.get_video_features(p, model.grid).pooler_output[0] for p in patches]
    want = []
    for prompt, pixels in zip(prompts, patches, strict=True):
        shown = {"pixel_values_videos": pixels, "video_grid_thw": model.grid}
        want.append(generate(whole, prompt, mm_token_type_ids=2 * (prompt == VIDEO).int()[None], **shown))
    engine = RolloutEngine(model, PROCESSOR, params_of(LENGTH, temperature=0))
    rows = all_kept(engine.sample(prompts, videos, num_generations=group))
    assert rows == [ids for ids in want for _ in range(group)]
    assert len({tuple(ids) for ids in want}) == 3
    others = all_kept(engine.sample(prompts, videos[::-1]))
    assert others[0] != want[0]


@pytest.mark.parametrize("kind", [VideoPositions, FarPositions])
@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_training_and_the_loop_use_the_positions_that_were_sampled_at(family: str, kind: type[TextModel]) -> None:
    model, prompts, videos = build_text_model(family, kind=kind), prompts_of(RAGGED), no_videos(4)
    engine = RolloutEngine(model, PROCESSOR, params_of(LENGTH))
    rollout = engine.sample(prompts, videos, num_generations=3, seed=5)
    loop = sample_eagerly(model, PROCESSOR, prompts, videos, params_of(LENGTH), num_generations=3, seed=5)
    assert all_kept(rollout) == all_kept(loop)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    for forward in (padded_logits, packed_logits):
        with torch.no_grad():
            logps = selective_log_softmax(forward(model, prompts, videos, ids, mask), ids)
            counted = selective_log_softmax(forward(build_text_model(family), prompts, videos, ids, mask), ids)
        torch.testing.assert_close(rollout.sampler_logps[mask], logps[mask], atol=1e-4, rtol=0)
        assert (counted - logps)[mask].abs().max() > 0.1


def test_positions_of_one_axis_that_do_not_begin_at_zero() -> None:
    """Rotation is relative: shifted prompts and completions give the tokens of those that are not."""
    prompts, params = prompts_of(RAGGED), params_of(LENGTH, temperature=0)
    models = [build_text_model("qwen2", kind=kind) for kind in (TextModel, TimePositions)]
    plain, shifted = (RolloutEngine(m, PROCESSOR, params).sample(prompts, no_videos(4)) for m in models)
    assert all_kept(shifted) == all_kept(plain)


# Refusals


def bare(decoder: type[nn.Module], config: Any, **options: Any) -> Any:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return decoder(config(**{**sizes, "intermediate_size": 16, "vocab_size": 20, **options}))


ROPE = {"rope_theta": 1e4, "factor": 2.0}
qwen2 = partial(bare, Qwen2Model, Qwen2Config)
UNKNOWN = {
    "sliding window": (
        partial(qwen2, use_sliding_window=True, sliding_window=7, max_window_layers=1),
        "Qwen2Model layer 1 has a sliding window of 7 tokens",
    ),
    "another activation": (partial(qwen2, hidden_act="gelu"), "Qwen2Model layer 0 gates by GELU"),
    "dynamic rotation": (partial(qwen2, rope_parameters={"rope_type": "dynamic", **ROPE}), "rotates by 'dynamic'"),
    "another class": (partial(bare, MistralModel, MistralConfig), "Mistral"),
    "mixture of experts": (
        partial(bare, Qwen3MoeModel, Qwen3MoeConfig, num_experts=2, moe_intermediate_size=8),
        "Qwen3Moe",
    ),
    "another build": (lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)), "GPT2Model"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_decoders_are_refused_by_name(name: str) -> None:
    build, message = UNKNOWN[name]
    with pytest.raises(UnknownDecoderError, match=message) as caught:
        describe_decoder(build())
    assert 'set rollout.backend to "eager"' in str(caught.value)


def test_a_decoder_with_a_changed_module_is_refused() -> None:
    """A norm that computes something else under a layer that is known."""
    decoder = qwen2()
    decoder.layers[1].input_layernorm = nn.LayerNorm(16)
    with pytest.raises(UnknownDecoderError, match="layer 1: a norm is LayerNorm"):
        describe_decoder(decoder)


def test_a_decoder_of_a_class_of_its_own_is_refused() -> None:
    """It may compute something else around layers that are known."""

    class Scaled(Qwen2Model):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, inputs_embeds=2 * kwargs.pop("inputs_embeds"), **kwargs)

    with pytest.raises(UnknownDecoderError, match="Scaled"):
        describe_decoder(bare(Scaled, Qwen2Config))


def test_a_module_of_a_known_name_that_is_not_of_transformers_is_refused() -> None:
    """Code that comes with a checkpoint takes over names, and changes what they do."""

    class Qwen2MLP(modeling_qwen2.Qwen2MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    decoder = qwen2()
    decoder.layers[1].mlp = Qwen2MLP(decoder.config)
    with pytest.raises(
        UnknownDecoderError, match="layer 1: the MLP is Qwen2MLP of test_architectures, known are Qwen2MLP"
    ):
        describe_decoder(decoder)
