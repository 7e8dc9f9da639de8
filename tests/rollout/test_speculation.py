"""Speculation gives the completions that come without it, in fewer steps where the history is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decoder_toys import TextModel, all_kept, build_text_model, no_videos, params_of, prompts_of
from second_family import SecondProcessor

from fastr1.config import RolloutConfig
from fastr1.rollout import RolloutEngine, SamplingParams, build_sampler
from fastr1.rollout.drafts import History
from fastr1.rollout.eager import sample_eagerly
from fastr1.rollout.graphs import StepGraphs
from fastr1.rollout.memory import RolloutMemoryError
from fastr1.rollout.rows import LARGEST_STEP, rows_of_step
from fastr1.rollout.speculation import SpeculativeEngine, count_equal, fitted
from fastr1.schema import Rollout

PROCESSOR = SecondProcessor()
PROMPTS = prompts_of([5, 17, 2, 9])
VIDEOS = no_videos(4)
LENGTH, GUESSED = 24, 5
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "whole softmax": {},
    "truncated": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
}


@pytest.fixture(scope="module", params=["qwen2", "qwen3-vl"])
def model(request: pytest.FixtureRequest) -> TextModel:
    """Without norms of heads, and with them and positions on three axes."""
    return build_text_model(request.param, end_scale=1.3)


@pytest.fixture(scope="module")
def one_model() -> TextModel:
    return build_text_model("qwen3", end_scale=1.3)


class Speculating(SpeculativeEngine):
    """Counts what its steps compute."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[tuple[int, int]] = []  # rows, open completions

    def _run(self) -> None:
        self.steps.append((self.num_rows, len(self.active)))
        super()._run()


def plain(
    model: TextModel, params: SamplingParams, prompts: Sequence[torch.Tensor] = PROMPTS, **options: Any
) -> Rollout:
    return RolloutEngine(model, PROCESSOR, params).sample(prompts, no_videos(len(prompts)), **options)


def remember(
    engine: SpeculativeEngine, rows: Sequence[Sequence[int]], prompts: Sequence[torch.Tensor] = PROMPTS
) -> None:
    """A history: as many texts for every prompt, in prompt-major order."""
    number = len(rows) // len(prompts)
    for i, prompt in enumerate(prompts):
        engine.history.remember(prompt.numpy().tobytes(), rows[i * number : (i + 1) * number])


def assert_same(got: Rollout, want: Rollout) -> None:
    assert all_kept(got) == all_kept(want)
    assert got.completion_ids.tolist() == want.completion_ids.tolist()
    assert got.completion_mask.tolist() == want.completion_mask.tolist()
    assert got.is_truncated.tolist() == want.is_truncated.tolist()
    assert got.texts == want.texts
    torch.testing.assert_close(got.sampler_logps, want.sampler_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.full_logps, want.full_logps, atol=1e-4, rtol=0)


# The same completions


@pytest.mark.parametrize("draws", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("group", [1, 8])
def test_one_rollout_after_another_is_that_without_speculation(
    model: TextModel, draws: dict[str, Any], group: int
) -> None:
    """Without a history, with one, and with that of other seeds; completions of many lengths."""
    params = params_of(LENGTH, **draws)
    engine = Speculating(model, PROCESSOR, params, GUESSED)
    for seed in (0, 0, 1, 1):
        options = {"num_generations": group, "seed": seed}
        engine.steps = []
        got, want = engine.sample(PROMPTS, VIDEOS, **options), plain(model, params, **options)
        assert_same(got, want)
        lengths = want.completion_mask.sum(dim=1)
        if group == 8 and draws.get("temperature") != 0:
            assert len(lengths.unique()) > 3
    assert any(rows > number for rows, number in engine.steps)
    assert got.metrics["draft_acceptance_rate"] > 0


def test_it_is_what_the_plain_loop_draws(model: TextModel) -> None:
    params = params_of(LENGTH)
    sampler = build_sampler(model, PROCESSOR, params, RolloutConfig(num_speculative_tokens=GUESSED))
    for _ in range(2):
        got = sampler(PROMPTS, VIDEOS, num_generations=3, seed=5)
        assert got.metrics["mean_acceptance_length"] >= 1
        assert_same(got, sample_eagerly(model, PROCESSOR, PROMPTS, VIDEOS, params, num_generations=3, seed=5))


@pytest.mark.parametrize("number", [1, 2, 16, 32])
def test_any_number_of_guesses_gives_the_same(one_model: TextModel, number: int) -> None:
    params = params_of(LENGTH)
    want = plain(one_model, params, num_generations=4)
    engine = Speculating(one_model, PROCESSOR, params, number)
    remember(engine, all_kept(want))
    assert_same(engine.sample(PROMPTS, VIDEOS, num_generations=4), want)
    assert max(rows for rows, _ in engine.steps) <= 16 * (1 + number)


@pytest.mark.parametrize("number", [0, -1])
def test_no_guesses_are_no_speculation(one_model: TextModel, number: int) -> None:
    with pytest.raises(ValueError, match=f"num_speculative_tokens is {number}; give 1 or more"):
        SpeculativeEngine(one_model, PROCESSOR, params_of(LENGTH), number)


def test_a_changed_model_is_guessed_by_its_past(one_model: TextModel) -> None:
    params, engine = params_of(LENGTH), Speculating(one_model, PROCESSOR, params_of(LENGTH), GUESSED)
    engine.sample(PROMPTS, VIDEOS, num_generations=4)
    weight = one_model.decoder.layers[0].mlp.up_proj.weight
    old = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
        got = engine.sample(PROMPTS, VIDEOS, num_generations=4)
        assert_same(got, plain(one_model, params, num_generations=4))
        assert 0 < got.metrics["draft_acceptance_rate"] < 1
    finally:
        with torch.no_grad():
            weight.copy_(old)


# From any history


def test_a_history_that_is_right_saves_steps(model: TextModel) -> None:
    """Every guess of it is right: tokens of a step, and steps, follow from the lengths."""
    params = params_of(LENGTH)
    want = plain(model, params)
    assert want.completion_mask.sum() > 60
    for prompt, row in enumerate(all_kept(want)):  # alone, so that there is one text to follow
        engine = Speculating(model, PROCESSOR, params, GUESSED)
        remember(engine, [row] * 12, [PROMPTS[prompt]])
        got = engine.sample([PROMPTS[prompt]], no_videos(1), prompt_keys=[prompt])
        assert all_kept(got) == [row]
        # The first token is drawn behind the prompt, and the last one of every step is not guessed.
        assert engine.num_steps == -(-(len(row) - 1) // (GUESSED + 1))
        assert sum(rows for rows, _ in engine.steps) == len(row) - 1
        assert engine.costs.read_suffix_tokens == sum(range(len(row)))  # every row its own, and those before it
        if engine.num_steps:
            assert got.metrics["decode_steps"] == engine.num_steps
            assert got.metrics["mean_acceptance_length"] == pytest.approx((len(row) - 1) / engine.num_steps)
            assert got.metrics["draft_acceptance_rate"] == 1.0


def test_a_history_that_is_wrong_costs_rows_and_nothing_else(one_model: TextModel) -> None:
    """Of every token followed by another than what comes."""
    params = params_of(LENGTH, temperature=0)
    want = plain(one_model, params)
    steps = int(want.completion_mask.sum(dim=1).max()) - 1
    wrong = [[token for pair in zip(row, [258] * len(row), strict=True) for token in pair] for row in all_kept(want)]
    assert not any(258 in row for row in all_kept(want))
    engine = Speculating(one_model, PROCESSOR, params, GUESSED)
    remember(engine, [row for row in wrong for _ in range(12)])
    got = engine.sample(PROMPTS, VIDEOS)
    assert_same(got, want)
    assert got.metrics["draft_acceptance_rate"] == 0
    assert got.metrics["mean_acceptance_length"] == 1
    assert engine.num_steps == steps
    assert sum(rows - number for rows, number in engine.steps) > 20


def test_keys_and_values_of_wrong_guesses_are_never_read(one_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess of a token whose embedding is not a number."""
    params, bad = params_of(LENGTH, temperature=0), 258
    want = plain(one_model, params)
    engine = Speculating(one_model, PROCESSOR, params, GUESSED)
    remember(engine, [[token for t in row for token in (t, bad)] for row in all_kept(want) for _ in range(12)])
    embedding = one_model.decoder.embed_tokens

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, embedding.weight).masked_fill((ids == bad)[:, None], torch.nan)

    monkeypatch.setattr(embedding, "forward", embed)
    prompts = [prompt.clamp(max=bad - 1) for prompt in PROMPTS]
    assert all(torch.equal(a, b) for a, b in zip(prompts, PROMPTS, strict=True))
    assert_same(engine.sample(PROMPTS, VIDEOS), want)
    assert sum(rows - number for rows, number in engine.steps) > 20


def test_the_history_is_that_of_the_text_whatever_the_keys(one_model: TextModel) -> None:
    """Keys are others in every epoch; a prompt may come twice; other prompts have nothing to go by."""
    params = params_of(LENGTH, temperature=0)
    engine = Speculating(one_model, PROCESSOR, params, GUESSED)
    engine.sample(PROMPTS[:2], no_videos(2), num_generations=8, prompt_keys=[0, 1])
    twice = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    got = engine.sample(twice, no_videos(3), num_generations=8, prompt_keys=[100, 101, 102])
    assert_same(got, plain(one_model, params, twice, num_generations=8, prompt_keys=[100, 101, 102]))
    assert got.metrics["mean_acceptance_length"] > 3
    got = engine.sample(PROMPTS[2:], no_videos(2), prompt_keys=[0, 1])
    assert got.metrics["mean_acceptance_length"] < 2


def test_a_bounded_history_forgets(one_model: TextModel) -> None:
    engine = Speculating(one_model, PROCESSOR, params_of(LENGTH, temperature=0), GUESSED)
    engine.history = History(max_tokens=10)
    engine.sample(PROMPTS, VIDEOS, num_generations=8)
    assert engine.history.num_tokens <= 10


# Ends


def ascii_model(end_scale: float = 2.0) -> TextModel:
    """Says some thirty letters and little else."""
    model = build_text_model("qwen2", end_scale=1.0)
    with torch.no_grad():
        model.language_model.lm_head.weight[:2] *= end_scale
        model.language_model.lm_head.weight[35:96] *= 3.0
    return model


def test_a_stop_string_counts_before_what_the_same_step_brings_behind_it() -> None:
    """An end token, or the last token that there is room for."""
    model, limit, has_ended = ascii_model(3.0), 14, set()
    for seed in range(16):
        for prompt, row in enumerate(all_kept(plain(model, params_of(limit), seed=seed))):
            stop = PROCESSOR.decode(torch.tensor(row[-3:-1]))
            if len(row) < 6 or len(stop) != 2:
                continue
            params, alone = params_of(limit, stop_strings=(stop,)), [PROMPTS[prompt]]
            engine = Speculating(model, PROCESSOR, params, 16)
            remember(engine, [row] * 16, alone)
            got = engine.sample(alone, no_videos(1), seed=seed, prompt_keys=[prompt])
            assert_same(got, plain(model, params, alone, seed=seed, prompt_keys=[prompt]))
            assert engine.num_steps == 1
            assert engine.completions[0].ended_by == "stop string"
            has_ended.add(row[-1] in PROCESSOR.end_token_ids)
    assert has_ended == {True, False}


def test_stop_strings_end_where_they_end() -> None:
    """Also in the middle of what a step has brought."""
    model = ascii_model()
    rows = all_kept(plain(model, params_of(LENGTH), num_generations=8))
    texts = [PROCESSOR.decode(torch.tensor(row[place : place + 2])) for row in rows[::4] for place in (5, 12)]
    params = params_of(LENGTH, stop_strings=tuple(text for text in texts if len(text) == 2))
    want = plain(model, params, num_generations=8)
    stopped = [len(ids) < len(row) for ids, row in zip(all_kept(want), rows, strict=True)]
    assert len(params.stop_strings) > 3
    assert 8 < sum(stopped) < 32
    engine = Speculating(model, PROCESSOR, params, GUESSED)
    for _ in range(2):
        assert_same(engine.sample(PROMPTS, VIDEOS, num_generations=8), want)
        assert [c.ended_by == "stop string" for c in engine.completions] == stopped
        # What is foretold goes on behind the stop string.
        remember(engine, [row for row in rows for _ in range(2)])
    assert engine.num_steps < 8


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_the_limit_is_kept(one_model: TextModel, length: int) -> None:
    """Nothing is drawn beyond it, whatever the history says."""
    long = all_kept(plain(one_model, params_of(LENGTH), num_generations=4))
    engine = Speculating(one_model, PROCESSOR, params_of(length), GUESSED)
    remember(engine, [row for row in long for _ in range(3)])
    for _ in range(2):
        got = engine.sample(PROMPTS, VIDEOS, num_generations=4)
        assert_same(got, plain(one_model, params_of(length), num_generations=4))
        assert got.completion_ids.shape[1] <= length


def test_the_limit_may_change_between_rollouts(one_model: TextModel) -> None:
    engine = Speculating(one_model, PROCESSOR, params_of(6), GUESSED)
    for length in (6, 24, 2, 16):
        engine.params = params_of(length)
        assert_same(
            engine.sample(PROMPTS, VIDEOS, num_generations=3), plain(one_model, params_of(length), num_generations=3)
        )


class Media(TextModel):
    """With an id that stands for a video."""

    media_token_ids = (77, 200)


def test_ids_that_stand_for_a_video_are_never_drawn() -> None:
    model = build_text_model("qwen2", kind=Media)
    with torch.no_grad():
        model.language_model.lm_head.weight[[77, 200]] *= 5
    params = params_of(LENGTH)
    engine = Speculating(model, PROCESSOR, params, GUESSED)
    remember(engine, [[77, 200] * 8] * 4 * 12)
    for _ in range(2):
        got = engine.sample(PROMPTS, VIDEOS, num_generations=4)
        assert_same(got, plain(model, params, num_generations=4))
        assert not torch.isin(got.completion_ids, torch.tensor([77, 200])).any()


# What a step computes


class Replayed:
    """Stands for a CUDA graph: runs again what was captured, with the numbers of then."""

    def __init__(self, step: Callable[[], None], neighbour: Replayed | None) -> None:
        self.replay = step


def test_replayed_steps_give_the_same(one_model: TextModel) -> None:
    """In buckets with padding, over rollouts of several sizes."""
    graphs = StepGraphs(Replayed)
    engine = Speculating(one_model, PROCESSOR, params_of(LENGTH), GUESSED, graphs=graphs)
    for number, group, seed in ((1, 1, 0), (4, 6, 0), (4, 6, 1), (2, 3, 2), (4, 1, 3), (4, 6, 0)):
        options = {"num_generations": group, "seed": seed}
        got = engine.sample(PROMPTS[:number], no_videos(number), **options)
        assert_same(got, plain(one_model, params_of(LENGTH), PROMPTS[:number], **options))
    assert 0 < graphs.num_captures < graphs.num_replays
    captured = graphs.num_captures
    engine.sample(PROMPTS, VIDEOS, num_generations=6, seed=0)
    assert graphs.num_captures <= captured + 2
    step = engine.token_step
    assert step is not None
    key = step.key(8)
    step.max_group += 1
    assert step.key(8) != key


def test_rows_of_a_prompt_are_bounded_by_what_its_graph_was_made_for(one_model: TextModel) -> None:
    engine = Speculating(one_model, PROCESSOR, params_of(LENGTH), 3)
    engine.sample(PROMPTS, VIDEOS, num_generations=5)
    assert engine.token_step is not None
    assert engine.token_step.max_group == 20


def test_completions_that_have_ended_take_no_rows(one_model: TextModel) -> None:
    engine = Speculating(one_model, PROCESSOR, params_of(LENGTH), GUESSED)
    got = engine.sample(PROMPTS, VIDEOS, num_generations=8)
    lengths = got.completion_mask.sum(dim=1)
    assert engine.steps[0][1] == int((lengths > 1).sum())
    assert engine.steps[-1][1] < 32
    decoded = int(lengths.sum()) - 32
    assert got.metrics["wasted_rows"] == pytest.approx(1 - decoded / sum(rows for rows, _ in engine.steps))
    forwards = sum(number for _, number in engine.steps)
    assert got.metrics["mean_acceptance_length"] == pytest.approx(decoded / forwards)


def test_a_step_has_no_more_rows_than_there_is_room_for(one_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastr1.rollout.rows.LARGEST_STEP", 20)
    params = params_of(LENGTH)
    want = plain(one_model, params, num_generations=4)
    engine = Speculating(one_model, PROCESSOR, params, 8)
    remember(engine, [row for row in all_kept(want) for _ in range(4)])
    assert_same(engine.sample(PROMPTS, VIDEOS, num_generations=4), want)
    assert max(rows for rows, _ in engine.steps) == 20


def test_room_for_guesses_is_planned(one_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2**20
    monkeypatch.setattr("fastr1.rollout.engine.free_bytes", lambda device: free)
    plain(one_model, params_of(LENGTH), num_generations=20)
    with pytest.raises(RolloutMemoryError, match=r"rollout\.num_speculative_tokens to"):
        SpeculativeEngine(one_model, PROCESSOR, params_of(LENGTH), 32).sample(PROMPTS, VIDEOS, num_generations=20)


def test_rows_of_a_step() -> None:
    assert [rows_of_step(n, 1) for n in (1, 64, 600)] == [1, 64, 600]
    assert [rows_of_step(n, 5) for n in (1, 64, 200, 600)] == [5, 320, LARGEST_STEP, 600]


def test_drafts_are_cut_alike() -> None:
    drafts = [[1, 2, 3, 4], [5], [], [6, 7, 8]]
    assert fitted(drafts, 8) == drafts
    assert fitted(drafts, 7) == [[1, 2, 3], [5], [], [6, 7, 8]]
    assert fitted(drafts, 6) == [[1, 2], [5], [], [6, 7]]
    assert fitted(drafts, 2) == [[], [], [], []]
    assert fitted([], 0) == []


def test_equal_tokens_are_counted_from_the_first() -> None:
    assert count_equal([1, 2, 3], [1, 2, 3, 9]) == 3
    assert count_equal([1, 2, 3], [1, 4, 3, 9]) == 1
    assert count_equal([1, 2], [5, 2, 9]) == 0
    assert count_equal([], [5]) == 0
