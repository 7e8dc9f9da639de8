"""Completions end where they must and depend on nothing but their prompt and key, whatever else the engine did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from decoder_toys import TextModel, all_kept, build_text_model, kept, no_videos, params_of, prompts_of
from distributed_toys import run_on_two_ranks
from second_family import SecondProcessor
from tokenizers import decoders

from fastr1.rollout import RolloutEngine, SamplingParams
from fastr1.rollout.eager import sample_eagerly
from fastr1.rollout.graphs import StepGraphs
from fastr1.rollout.params import find_stop
from fastr1.schema import Rollout
from fastr1_kernels import selective_log_softmax

PROCESSOR = SecondProcessor()
LENGTHS, KEYS, GROUP = [5, 17, 2, 9, 30], [4, 1, 8, 3, 12], 3


@pytest.fixture(scope="module")
def model() -> TextModel:
    return build_text_model("qwen3")


def sample(
    engine: RolloutEngine, which: Sequence[int] = range(5), num_generations: int = GROUP, **options: Any
) -> Rollout:
    """Completions of some of the five prompts, each under its key."""
    prompts, keys = prompts_of(LENGTHS), [KEYS[i] for i in which]
    chosen = [prompts[i] for i in which]
    options = {"num_generations": num_generations, "seed": 2, "prompt_keys": keys, **options}
    return engine.sample(chosen, no_videos(len(chosen)), **options)


def assert_same(got: Rollout, want: Rollout) -> None:
    assert all_kept(got) == all_kept(want)
    assert got.texts == want.texts
    assert torch.equal(got.is_truncated, want.is_truncated)
    torch.testing.assert_close(got.sampler_logps, want.sampler_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(got.full_logps, want.full_logps, atol=1e-4, rtol=0)


def sample_both(
    model: TextModel, params: SamplingParams, lengths: Sequence[int] = LENGTHS, **options: Any
) -> tuple[Rollout, RolloutEngine]:
    """What the engine draws, which is what eager draws."""
    prompts, videos = prompts_of(lengths), no_videos(len(lengths))
    engine = RolloutEngine(model, PROCESSOR, params)
    rollout = engine.sample(prompts, videos, **options)
    assert_same(rollout, sample_eagerly(model, PROCESSOR, prompts, videos, params, **options))
    return rollout, engine


# Independence


@pytest.fixture(scope="module")
def together(model: TextModel) -> list[list[int]]:
    """Completions of all prompts, some of which end early."""
    rows = all_kept(sample(RolloutEngine(model, PROCESSOR, params_of(16))))
    assert len({tuple(row) for row in rows}) > 10
    assert len({len(row) for row in rows}) > 3
    return rows


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_closing_up_changes_nothing(
    model: TextModel, together: list[list[int]], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never, by halves, and whenever a completion ends."""
    monkeypatch.setattr("fastr1.rollout.engine.KEPT_SHARE", share)
    engine, computed = RolloutEngine(model, PROCESSOR, params_of(16)), []
    run = engine._run

    def counted() -> None:
        computed.append((engine.num_rows, sum(c.ended_by is None for c in engine.completions)))
        run()

    monkeypatch.setattr(engine, "_run", counted)
    assert all_kept(sample(engine)) == together
    assert len({open_rows for _, open_rows in computed}) > 3
    if share == 1.0:
        assert all(rows == open_rows for rows, open_rows in computed)
    elif share == 0.0:
        assert {rows for rows, _ in computed} == {5 * GROUP}


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("num_generations", [1, 2, 5])
def test_other_group_sizes_begin_alike(
    model: TextModel, together: list[list[int]], num_generations: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastr1.rollout.engine.KEPT_SHARE", share)
    rows = all_kept(sample(RolloutEngine(model, PROCESSOR, params_of(16)), num_generations=num_generations))
    common = min(GROUP, num_generations)
    for prompt in range(5):
        ours, theirs = rows[prompt * num_generations :], together[prompt * GROUP :]
        assert ours[:common] == theirs[:common]


@pytest.mark.parametrize("which", [[4], [2], [3, 0], [4, 3, 2, 1, 0], [1, 4, 0]], ids=str)
def test_neither_company_nor_order_counts(model: TextModel, together: list[list[int]], which: list[int]) -> None:
    rows = all_kept(sample(RolloutEngine(model, PROCESSOR, params_of(16)), which))
    assert rows == [together[GROUP * i + g] for i in which for g in range(GROUP)]


def _sample_half(rank: int, folder: Path) -> None:
    """What a rank draws: every other prompt."""
    assert dist.get_world_size() == 2
    engine = RolloutEngine(build_text_model("qwen3"), PROCESSOR, params_of(16))
    torch.save(all_kept(sample(engine, range(rank, 5, 2))), folder / f"rows-{rank}.pt")


def test_two_ranks_draw_what_one_draws(together: list[list[int]], tmp_path: Path) -> None:
    run_on_two_ranks(_sample_half, tmp_path)
    for rank in range(2):
        want = [together[GROUP * i + g] for i in range(rank, 5, 2) for g in range(GROUP)]
        assert torch.load(tmp_path / f"rows-{rank}.pt") == want


# One rollout after another


SIZES: list[tuple[Sequence[int], int]] = [
    ([0, 2], 2),  # small at first
    (range(5), GROUP),
    ([4], 1),
    ([2, 0], 5),
    ([4, 4, 1, 4, 3], GROUP),  # longer prompts
]


def test_nothing_of_a_rollout_is_left_for_the_next(model: TextModel) -> None:
    """Room that is kept holds NaN wherever the next rollout has not written."""
    engine = RolloutEngine(model, PROCESSOR, params_of(16))
    kept_arenas = 0
    for which, num_generations in [*SIZES, *SIZES[::-1]]:
        before = engine._arenas
        rollout = sample(engine, which, num_generations)
        assert_same(rollout, sample(RolloutEngine(model, PROCESSOR, params_of(16)), which, num_generations))
        assert engine._arenas is not None
        assert engine._rows is not None
        kept_arenas += engine._arenas is before
        for arena in (
            engine._arenas.prefix_k,
            engine._arenas.prefix_v,
            engine._arenas.suffix_k,
            engine._arenas.suffix_v,
        ):
            for layer in arena:
                layer.fill_(torch.nan)
        engine._rows.logps.fill_(torch.nan)
        engine._rows.completion_ids.fill_(-1)
        engine._rows.lengths.fill_(99)
    assert kept_arenas >= 4


def test_other_lengths_of_completions_follow_each_other(model: TextModel) -> None:
    """With parameters that change between the rollouts of one engine."""
    engine = RolloutEngine(model, PROCESSOR, params_of(16))
    for length in (4, 24, 1, 16):
        engine.params = params_of(length)
        assert_same(sample(engine), sample(RolloutEngine(model, PROCESSOR, params_of(length))))


class Captured:
    """Stands for a CUDA graph: draws as it did when it was captured."""

    def __init__(self, step: Any, neighbour: Any) -> None:
        self.step, self.params = step, step.func.params

    def replay(self) -> None:
        self.step.func.params = self.params
        self.step()


@pytest.mark.parametrize("graphs", [None, StepGraphs(Captured)])
def test_other_ways_to_draw_follow_each_other(model: TextModel, graphs: StepGraphs | None) -> None:
    engine = RolloutEngine(model, PROCESSOR, params_of(16), graphs=graphs)
    drawn = []
    for changes in ({}, {"temperature": 0.0}, {"top_k": 2}, {"temperature": 3.0}, {}):
        engine.params = params_of(16, **changes)
        rollout = sample(engine)
        assert_same(rollout, sample(RolloutEngine(model, PROCESSOR, params_of(16, **changes))))
        drawn.append(all_kept(rollout))
    assert drawn[0] == drawn[-1]
    assert len({str(tokens) for tokens in drawn}) == 4


def test_room_is_given_back_where_it_is_not_kept(model: TextModel, together: list[list[int]]) -> None:
    engine = RolloutEngine(model, PROCESSOR, params_of(16), keeps_arenas=False)
    for _ in range(2):
        assert all_kept(sample(engine)) == together
        assert engine._arenas is None
        assert engine._rows is None
        assert engine.token_step is None


# Ends


def stop_string_of(rows: list[list[int]], num_tokens: int) -> str:
    """Printable text of so many tokens in the middle of a completion."""
    for row in rows:
        for start in range(4, len(row) - num_tokens - 1):
            ids = row[start : start + num_tokens]
            if all(35 <= i < 96 for i in ids):  # ASCII of byte-level BPE: no two bytes of one character
                text = PROCESSOR.tokenizer.decode(ids)
                if len(text.strip()) == len(text) == num_tokens:
                    return str(text)
    raise AssertionError("no completion has such a text")


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(num_tokens: int) -> None:
    model = ascii_model()
    plain, _ = sample_both(model, params_of(24), num_generations=GROUP, seed=1)
    stop = stop_string_of(all_kept(plain), num_tokens)
    rollout, engine = sample_both(
        model, params_of(24, stop_strings=("never said", stop)), num_generations=GROUP, seed=1
    )
    stopped = 0
    for row, completion in enumerate(engine.completions):
        ids, unstopped = kept(rollout, row), kept(plain, row)
        length = find_stop(PROCESSOR.raw_text, torch.tensor(unstopped), 0, (stop,))
        assert ids == unstopped[:length]
        assert (completion.ended_by == "stop string") == (length is not None)
        if length is not None:
            stopped += 1
            assert stop in rollout.texts[row]
            assert stop not in PROCESSOR.decode(torch.tensor(ids[:-1]))
            assert not rollout.is_truncated[row]
    assert 0 < stopped < len(engine.completions)
    lengths = rollout.completion_mask.sum(dim=1)
    assert any(lengths[row] > num_tokens + 2 for row, c in enumerate(engine.completions) if c.ended_by == "stop string")


def ascii_model() -> TextModel:
    """Says some thirty letters and little else."""
    model = build_text_model("qwen2", end_scale=1.0)
    with torch.no_grad():
        head = model.language_model.lm_head.weight
        head[:2] *= 2.0
        head[35:96] *= 3.0
    return model


def test_a_stop_string_in_the_last_token_and_at_the_limit_is_no_truncation() -> None:
    model = ascii_model()
    plain, _ = sample_both(model, params_of(24), num_generations=GROUP, seed=1)
    row = next(row for row in all_kept(plain) if len(row) == 24)
    for limit in range(3, 24):
        text = PROCESSOR.decode(torch.tensor(row[:limit]))
        if text[-1:].isalpha() and text.count(text[-2:]) == 1:
            break
    stop = text[-2:]
    rollout, engine = sample_both(model, params_of(limit, stop_strings=(stop,)), num_generations=GROUP, seed=1)
    index = all_kept(plain).index(row)
    assert engine.completions[index].ended_by == "stop string"
    assert kept(rollout, index) == row[:limit]
    assert not rollout.is_truncated[index]


def spoken(text: str, stop: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], bool]:
    """The token ids of a completion that would say this text, in both ways to sample, and whether it is cut off."""
    model, ids = build_text_model("qwen2"), PROCESSOR.tokenizer(text).input_ids
    length = len(ids)

    def project(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:-1], 259)
        logits[..., ids[len(said) % length]] = 50.0
        said.append(1)
        return logits

    monkeypatch.setattr(model, "project", project, raising=False)
    said: list[int] = []
    prompt, params = (prompts_of([3]), no_videos(1)), params_of(length, stop_strings=(stop,))
    engine = RolloutEngine(model, PROCESSOR, params)
    engine.sample(*prompt)  # the first rollout of an engine runs a step more
    said.clear()
    rollout = engine.sample(*prompt)
    said.clear()
    by_eager = sample_eagerly(model, PROCESSOR, *prompt, params)
    assert_same(rollout, by_eager)
    return kept(rollout, 0), bool(rollout.is_truncated[0])


@pytest.mark.parametrize(
    ("text", "stop", "end"),
    [
        ("one\n\ntwo", "\n\n", 5),  # an end of line as the last token, before anything follows it
        ("one two", "e ", 4),
        (" \tone", "\t", 2),  # before the first letter
        ("un café noir", "é", 8),  # two bytes, two tokens
        ("日本語", "本", 6),
        ("a<pad>b", "<pad>", 2),  # a token that the text of a completion leaves out
        ("never", "no", None),
    ],
)
def test_stop_strings_are_found_in_what_was_said(
    text: str, stop: str, end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, is_truncated = spoken(text, stop, monkeypatch)
    assert ids == PROCESSOR.tokenizer(text).input_ids[:end]
    assert is_truncated == (end is None)


def test_half_a_character_hides_no_stop_string() -> None:
    """Bytes side by side are a text together or none of them is: the second of three takes the end of line along."""
    tokens = ["a", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "b"]
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def decode(ids: torch.Tensor) -> str:
        return str(decoder.decode([tokens[i] for i in ids]))

    ids = torch.arange(len(tokens))
    assert [decode(ids[:length])[1:] for length in (2, 3, 4, 6)] == ["\n", 2 * "\ufffd", 3 * "\ufffd", "\n€b"]
    for length in range(2, 7):
        assert find_stop(decode, ids[:length], 0, ("\n",)) == 2
        assert find_stop(decode, ids[:length], 1, ("x", "\n")) == 2
    assert [find_stop(decode, ids[:length], 0, ("€",)) for length in (3, 4, 5, 6)] == [None, None, 5, 5]
    assert find_stop(decode, ids[:4], 0, ("b",)) is None


def test_stop_strings_are_looked_for_before_spaces_are_cleaned_up() -> None:
    processor = SecondProcessor()
    tokenizer: Any = processor.tokenizer
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = torch.tensor(tokenizer("so , yes").input_ids)
    assert processor.decode(ids) == "so, yes"
    assert processor.raw_text(ids) == "so , yes"


def test_each_end_has_its_name(model: TextModel) -> None:
    rollout, engine = sample_both(model, params_of(16), num_generations=GROUP, seed=2, prompt_keys=KEYS)
    ends = []
    for row, completion in enumerate(engine.completions):
        last = kept(rollout, row)[-1]
        ends.append(completion.ended_by)
        assert completion.ended_by == ("end token" if last in PROCESSOR.end_token_ids else "length")
        assert bool(rollout.is_truncated[row]) == (completion.ended_by == "length")
    assert set(ends) == {"end token", "length"}


def test_one_token_is_the_limit(model: TextModel) -> None:
    rollout, engine = sample_both(model, params_of(1), num_generations=20, seed=3)
    assert rollout.completion_ids.shape == (100, 1)
    assert engine.num_steps == 0  # drawn from the prefill alone
    assert {c.ended_by for c in engine.completions} == {"end token", "length"}


class Biased(TextModel):
    """Its head has a bias, which says what it wants."""

    wanted: tuple[int, ...] = (1,)  # an end

    @property
    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        bias = torch.zeros(self.decoder.config.vocab_size).index_fill(0, torch.tensor(self.wanted), 60.0)
        return self.language_model.lm_head.weight, bias


def test_all_end_at_the_first_token() -> None:
    rollout, engine = sample_both(build_text_model("qwen3", kind=Biased), params_of(9), num_generations=GROUP)
    assert all_kept(rollout) == [[1]] * 15
    assert engine.num_steps == 0
    assert not rollout.is_truncated.any()
    assert rollout.texts == [""] * 15


class Media(Biased):
    """Wants nothing but the two ids that stand for a video."""

    wanted = media_token_ids = (77, 200)


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str
)
def test_ids_that_stand_for_a_video_are_never_drawn(changes: dict[str, Any]) -> None:
    model = build_text_model("qwen2", kind=Media)
    rollout, _ = sample_both(model, params_of(8, **changes), num_generations=GROUP)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    assert not torch.isin(ids[mask], torch.tensor(Media.media_token_ids)).any()
    with torch.no_grad():
        logits = model.padded_logits(prompts_of(LENGTHS), no_videos(5), ids, mask)
    logits[..., list(Media.media_token_ids)] = -torch.inf
    assert (logits.softmax(-1).amax(-1)[mask] < 0.999).any()
    expected = drawn_from(logits, changes).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampler_logps[mask], expected[mask], atol=1e-4, rtol=0)


def drawn_from(logits: torch.Tensor, changes: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of what is drawn from, by their definitions: a token is kept where the likelier ones do not
    fill top_p, where it is among the top_k, and where it is at least min_p times as likely as the likeliest."""
    logits = logits / (changes.get("temperature", 1.0) or 1.0)
    probabilities = logits.softmax(-1)
    keep = torch.ones_like(logits, dtype=torch.bool)
    if "top_k" in changes:
        keep &= logits >= logits.topk(changes["top_k"]).values[..., -1:]
    if "top_p" in changes:
        likelier = probabilities[..., None, :] > probabilities[..., None]
        keep &= (likelier * probabilities[..., None, :]).sum(-1) < changes["top_p"]
    if "min_p" in changes:
        keep &= probabilities >= changes["min_p"] * probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(~keep, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_is_likely_enough(model: TextModel, min_p: float) -> None:
    changes = {"min_p": min_p, "temperature": 1.3}
    rollout, _ = sample_both(model, params_of(12, **changes), num_generations=GROUP, seed=4)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    with torch.no_grad():
        logits = model.padded_logits(prompts_of(LENGTHS), no_videos(5), ids, mask)
    logps = drawn_from(logits, changes).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampler_logps[mask], logps[mask], atol=1e-4, rtol=0)
    plain = selective_log_softmax(logits, ids, temperature=1.3)
    assert (logps[mask] - plain[mask]).max() > 0.01
    if min_p == 1.0:
        assert (rollout.sampler_logps == 0).all()


@pytest.mark.parametrize("changes", [{"top_p": 0.5}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.2}], ids=str)
def test_equal_logits_are_kept_or_left_out_together(changes: dict[str, Any]) -> None:
    """Four rows of the head are one: the loop must not choose among them either."""
    model = build_text_model("qwen2")
    with torch.no_grad():
        model.language_model.lm_head.weight[3:].view(64, 4, -1)[:] = model.language_model.lm_head.weight[3::4, None]
    rollout, _ = sample_both(model, params_of(12, **changes), num_generations=GROUP, seed=4)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    with torch.no_grad():
        logits = model.padded_logits(prompts_of(LENGTHS), no_videos(5), ids, mask).round(decimals=4)
    logps = drawn_from(logits, changes).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(rollout.sampler_logps[mask], logps[mask], atol=1e-3, rtol=0)


@pytest.mark.parametrize("lengths", [[1], [40], [4, 40, 4], [40, 1, 3]], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_one_prompt_and_prompts_ten_times_as_long(model: TextModel, lengths: list[int], group: int) -> None:
    rollout, _ = sample_both(model, params_of(16), lengths, num_generations=group, seed=6)
    assert len(rollout.texts) == group * len(lengths)


# Refusals


@pytest.fixture(params=["engine", "eager"])
def draw(request: pytest.FixtureRequest) -> Any:
    def draw_by_engine(model: TextModel, prompts: list[torch.Tensor], **options: Any) -> Rollout:
        return RolloutEngine(model, PROCESSOR, params_of(4)).sample(prompts, no_videos(len(prompts)), **options)

    def draw_by_eager(model: TextModel, prompts: list[torch.Tensor], **options: Any) -> Rollout:
        return sample_eagerly(model, PROCESSOR, prompts, no_videos(len(prompts)), params_of(4), **options)

    return draw_by_engine if request.param == "engine" else draw_by_eager


def test_what_cannot_be_sampled_is_refused_in_words(draw: Any) -> None:
    model, prompts = build_text_model("qwen2"), prompts_of([3, 5])
    for options, message in (
        ({"num_generations": 0}, "2 prompts with 0 completions each"),
        ({"prompt_keys": [1]}, "1 prompt_keys for 2 prompts"),
        ({"prompt_keys": [1, 2, 3]}, "3 prompt_keys for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(model, prompts, **options)
    with pytest.raises(ValueError, match="0 prompts"):
        draw(model, [])
    for token in (-200, 259):
        model.media_token_ids = (7, token)
        with pytest.raises(ValueError, match=f"media_token_ids has {token}, which is no id of a vocabulary of 259"):
            draw(model, prompts)
    with pytest.raises(ValueError, match="max_completion_length is 0"):
        params_of(0)


def test_a_model_in_training_mode_is_refused(draw: Any) -> None:
    """With gradient checkpointing it would keep no cache, and sample without its prompts."""
    model = build_text_model("qwen2")
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        draw(model, prompts_of([3]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["layers.1.mlp.down_proj.weight", "norm.weight"])
def test_a_model_that_has_diverged_is_an_error(draw: Any, where: str, value: float) -> None:
    model = build_text_model("qwen2")
    with torch.no_grad():
        model.decoder.get_parameter(where).flatten()[0] = value
    with pytest.raises(ValueError, match=r"6 of 6 completions, the first is number 0, .*with a NaN"):
        draw(model, prompts_of([3, 5]), num_generations=3)


# Other sizes and dtypes


def test_arenas_of_another_dtype_are_not_used(model: TextModel) -> None:
    model = build_text_model("qwen3")
    engine = RolloutEngine(model, PROCESSOR, params_of(8))
    first = sample(engine)
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)
        assert all_kept(sample(engine)) == all_kept(sample(RolloutEngine(model, PROCESSOR, params_of(8))))
    engine.model = build_text_model("qwen3")
    assert all_kept(sample(engine)) == all_kept(first)
