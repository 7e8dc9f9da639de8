"""Sampling: greedy against Hugging Face `generate`, draws against softmax, log-probabilities against the forward."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from shared_data import shared_path
from trainer_toys import INSTRUCTION, build_model, build_tokenizer, problem
from twin_toys import packed_logits, padded_logits

from fastr1.config import RolloutConfig
from fastr1.models import load_model, load_processor
from fastr1.models.tinyllava import TinyLlavaProcessor, TinyLlavaVideo
from fastr1.models.tinyllava.prompts import build_prompt, tokenize_with_image
from fastr1.rollout import SamplingParams, sample_completions
from fastr1.rollout.noise import completion_keys
from fastr1.schema import Rollout
from fastr1_kernels import selective_log_softmax

LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> TinyLlavaVideo:
    return build_model(tokenizer, eos_scale=3.0)


@pytest.fixture(scope="module")
def processor(model, tokenizer) -> TinyLlavaProcessor:
    return TinyLlavaProcessor(tokenizer, model.config)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[torch.Tensor]:
    """Four prompts of different lengths."""
    texts = [build_prompt(problem(i), instruction=INSTRUCTION) for i in range(4)]
    ids = [torch.tensor(tokenize_with_image(text, tokenizer)) for text in texts]
    assert len({len(row) for row in ids}) == 4
    return ids


@pytest.fixture(scope="module")
def videos(model) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [model.encode(torch.randn(4, 3, 28, 28, generator=generator)) for _ in range(4)]


def generate_greedily(model: TinyLlavaVideo, prompt: torch.Tensor, video: torch.Tensor, eos: int) -> list[int]:
    """The oracle: transformers' own loop, one unpadded prompt at a time; ends at the first end-of-sequence token."""
    with torch.no_grad():
        embeds = model.embed_prompt(prompt, model.visual_tokens([video])[0])[None]
        out = model.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=LENGTH,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    return out[0].tolist()


def kept(rollout: Rollout, row: int) -> list[int]:
    return rollout.completion_ids[row][rollout.completion_mask[row]].tolist()


@pytest.fixture(autouse=True, params=["engine", "eager"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to sample pass every test."""
    monkeypatch.setattr(__name__ + ".CONFIG", RolloutConfig(backend=request.param))
    return request.param


CONFIG = RolloutConfig()


def draw(model, processor, prompts, videos, **kwargs) -> Rollout:
    params = SamplingParams(**{"max_completion_length": LENGTH, **kwargs.pop("params", {})})
    with torch.no_grad():
        visual_tokens = model.visual_tokens(videos)
    return sample_completions(model, processor, prompts, visual_tokens, params, config=CONFIG, **kwargs)


# Greedy


@pytest.mark.parametrize("group", [1, 2, 3])
def test_greedy_equals_generate_on_ragged_prompts(model, processor, prompts, videos, group) -> None:
    rollout = draw(model, processor, prompts, videos, params={"temperature": 0}, num_generations=group)
    expected = [
        generate_greedily(model, p, v, processor.end_token_ids[0]) for p, v in zip(prompts, videos, strict=True)
    ]
    assert len({tuple(ids) for ids in expected}) == 4
    for row in range(4 * group):
        assert kept(rollout, row) == expected[row // group]


@pytest.mark.parametrize("group", [1, 4])
def test_greedy_equals_recorded_tokens_and_generate_on_conformance_model(group) -> None:
    folder = shared_path("fixtures/tinyllava/group")
    expected = load_file(shared_path("fixtures/tinyllava/group_expected.safetensors"))
    model, processor = load_model(folder, device="cpu", dtype="float32"), load_processor(folder)
    prompts = [expected["prompt_ids"], expected["prompt_ids"][8:], expected["prompt_ids"][:-5]]
    with torch.no_grad():
        features = model.encode(expected["pixel_values"])
    videos = [features, features.flip(0), features]
    rollout = draw(model, processor, prompts, videos, params={"temperature": 0}, num_generations=group)
    for row in range(group):
        assert kept(rollout, row) == expected["greedy_ids"].flatten().tolist()
    for row in range(3 * group):
        i = row // group
        assert kept(rollout, row) == generate_greedily(model, prompts[i], videos[i], processor.end_token_ids[0])


# Draws


def test_draws_depend_on_neither_batching_nor_order(model, processor, prompts, videos) -> None:
    keys = [11, 5, 8, 3]
    together = draw(model, processor, prompts, videos, num_generations=3, seed=4, prompt_keys=keys)
    order = [2, 0, 3, 1]
    shuffled = draw(
        model,
        processor,
        [prompts[i] for i in order],
        [videos[i] for i in order],
        num_generations=3,
        seed=4,
        prompt_keys=[keys[i] for i in order],
    )
    texts = set()
    for i in range(4):
        alone = draw(model, processor, [prompts[i]], [videos[i]], num_generations=3, seed=4, prompt_keys=[keys[i]])
        for g in range(3):
            expected = kept(alone, g)
            assert kept(together, 3 * i + g) == expected
            assert kept(shuffled, 3 * order.index(i) + g) == expected
            texts.add(tuple(expected))
    assert len(texts) == 12


def test_draws_of_a_smaller_group_are_the_first_of_a_larger_one(model, processor, prompts, videos) -> None:
    large = draw(model, processor, prompts[:1], videos[:1], num_generations=5)
    small = draw(model, processor, prompts[:1], videos[:1], num_generations=2)
    assert [kept(small, g) for g in range(2)] == [kept(large, g) for g in range(2)]


def test_seed_and_key_change_the_draws(model, processor, prompts, videos) -> None:
    rollouts = [
        draw(model, processor, prompts[:1], videos[:1], seed=seed, prompt_keys=[key])
        for seed, key in ((0, 0), (1, 0), (0, 1), (-1, 0))
    ]
    assert len({tuple(kept(rollout, 0)) for rollout in rollouts}) == 4


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_follow_softmax(model, processor, prompts, videos, temperature) -> None:
    """Chi-square over the 12 likeliest tokens and the rest, with 6,000 draws; 99.9 % quantile of 12 degrees: 32.9."""
    num_draws, top = 6000, 12
    rollout = draw(
        model,
        processor,
        prompts[:1],
        videos[:1],
        params={"max_completion_length": 1, "temperature": temperature},
        num_generations=num_draws,
    )
    with torch.no_grad():
        one = torch.zeros(1, 1, dtype=torch.long)
        logits = padded_logits(model, prompts[:1], videos[:1], one, torch.ones(1, 1, dtype=torch.bool))[0, 0]
    probabilities = (logits / temperature).softmax(-1)
    likeliest = probabilities.topk(top).indices
    expected = torch.cat([probabilities[likeliest], 1 - probabilities[likeliest].sum(0, keepdim=True)]) * num_draws
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(probabilities)).float()
    observed = torch.cat([counts[likeliest], num_draws - counts[likeliest].sum(0, keepdim=True)])
    assert expected.min() > 20
    assert ((observed - expected) ** 2 / expected).sum() < 32.9


def test_top_k_and_top_p_restrict_the_draws(model, processor, prompts, videos) -> None:
    with torch.no_grad():
        one = torch.zeros(1, 1, dtype=torch.long)
        logits = padded_logits(model, prompts[:1], videos[:1], one, torch.ones(1, 1, dtype=torch.bool))[0, 0]
    probabilities, order = logits.softmax(-1).sort(descending=True)
    top_p = 0.3
    nucleus = int((probabilities.cumsum(0) < top_p).sum()) + 1
    for params, allowed in (({"top_k": 4}, order[:4]), ({"top_p": top_p}, order[:nucleus])):
        rollout = draw(
            model,
            processor,
            prompts[:1],
            videos[:1],
            params={"max_completion_length": 1, **params},
            num_generations=500,
        )
        drawn = rollout.completion_ids[:, 0]
        assert set(drawn.tolist()) == set(allowed.tolist())
        restricted = logits[allowed].log_softmax(-1)
        position = (drawn[:, None] == allowed).int().argmax(dim=1)
        torch.testing.assert_close(rollout.sampler_logps[:, 0], restricted[position], atol=1e-5, rtol=0)
        torch.testing.assert_close(rollout.full_logps[:, 0], logits.log_softmax(-1)[drawn], atol=1e-5, rtol=0)


# What comes back with the tokens


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [0, 3])
def test_logps_equal_those_of_the_training_forward(model, processor, prompts, videos, temperature, top_k) -> None:
    params = {"temperature": temperature, "top_k": top_k}
    rollout = draw(model, processor, prompts, videos, params=params, num_generations=3)
    with torch.no_grad():
        logits = packed_logits(model, prompts, videos, rollout.completion_ids, rollout.completion_mask)
    logps = selective_log_softmax(logits, rollout.completion_ids, temperature=temperature)
    mask = rollout.completion_mask
    torch.testing.assert_close(rollout.full_logps[mask], logps[mask], atol=1e-4, rtol=0)
    torch.testing.assert_close(rollout.sampler_logps[mask] > logps[mask] + 1e-2, torch.full_like(mask[mask], top_k > 0))
    if not top_k:
        torch.testing.assert_close(rollout.sampler_logps, rollout.full_logps, atol=1e-5, rtol=0)
    assert (rollout.sampler_logps[~mask] == 0).all()
    assert (rollout.full_logps[~mask] == 0).all()


def test_mask_stops_at_the_first_end_of_sequence(model, processor, prompts, videos) -> None:
    eos = processor.end_token_ids[0]
    rollout = draw(model, processor, prompts, videos, num_generations=6)
    finished = 0
    for row in range(24):
        ids, length = kept(rollout, row), int(rollout.completion_mask[row].sum())
        assert rollout.completion_mask[row].tolist() == [i < length for i in range(rollout.completion_mask.shape[1])]
        assert eos not in ids[:-1]
        assert bool(rollout.is_truncated[row]) == (ids[-1] != eos)
        assert length == LENGTH if rollout.is_truncated[row] else length <= LENGTH
        assert (rollout.completion_ids[row][length:] == processor.pad_token_id).all()
        assert rollout.texts[row] == processor.tokenizer.decode([i for i in ids if i != eos]).strip()
        finished += ids[-1] == eos
    assert 0 < finished < 24


def test_sampling_ends_early_once_every_completion_has(model, processor, prompts, videos) -> None:
    short = [key for key in range(40) if not _is_truncated(model, processor, prompts, videos, key)]
    assert short
    rollout = draw(model, processor, prompts[:1], videos[:1], prompt_keys=short[:1])
    assert rollout.completion_ids.shape[1] == int(rollout.completion_mask.sum()) < LENGTH


def _is_truncated(model, processor, prompts, videos, key: int) -> bool:
    rollout = draw(model, processor, prompts[:1], videos[:1], params={"max_completion_length": 8}, prompt_keys=[key])
    return bool(rollout.is_truncated[0])


# Keys


def test_keys_are_distinct() -> None:
    keys = torch.cat([completion_keys(seed, range(64), 16) for seed in range(8)])
    assert len(keys.unique()) == len(keys)
    assert completion_keys(0, [5], 3).tolist() == completion_keys(0, [9, 5], 3)[3:].tolist()
