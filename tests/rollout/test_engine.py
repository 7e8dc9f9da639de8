"""The engine's own parts: closing up, graphs replayed with padding, what it reports."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from trainer_toys import INSTRUCTION, build_model, build_tokenizer, problem

from fastr1.models.tinyllava import TinyLlavaProcessor, TinyLlavaVideo
from fastr1.models.tinyllava.prompts import build_prompt, tokenize_with_image
from fastr1.rollout import RolloutEngine, SamplingParams, engine, token_step
from fastr1.rollout.eager import sample_eagerly
from fastr1.rollout.graphs import BUCKETS, StepGraphs, bucket_of
from fastr1.schema import Rollout

PARAMS = SamplingParams(12)


class Replayed:
    """Stands for a CUDA graph: runs again what was captured, with the numbers of then."""

    def __init__(self, step: Callable[[], None], neighbour: Replayed | None) -> None:
        self.replay = step


# Doors of the kernels that a step calls, and which of their arguments outlive it: a graph finds these where they were.
DOORS: dict[str, tuple[int, ...]] = {
    "add_rms_norm": (2,),
    "rope_and_store": (3, 4, 6, 7),
    "decode_attention": (1, 2, 3, 4, 5, 6),
    "swiglu": (),
    "sample_tokens": (1, 2),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by every call of a door: its numbers, the shapes of its tensors and where those are that outlive it."""
    seen: list[Any] = []

    def spied(name: str, door: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [(x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
            places = [args[i].data_ptr() for i in DOORS[name]]
            seen.append((name, tensors, places, {k: v for k, v in options.items() if k[1:] != "_norm"}))
            return door(*args, **options)

        return call

    for name in DOORS:
        monkeypatch.setattr(token_step, name, spied(name, getattr(token_step, name)))
    return seen


class Captured:
    """A graph that finds out whether a replay would be right: what the step launches now is what it launched then."""

    def __init__(self, launches: list[Any], step: Callable[[], None], neighbour: Any) -> None:
        self.step, self.launches = step, launches
        self.then: list[Any] | None = None

    def replay(self) -> None:
        start = len(self.launches)
        self.step()
        now = self.launches[start:]
        self.then = self.then or now
        assert now == self.then


@pytest.fixture(scope="module")
def toy() -> tuple[TinyLlavaVideo, TinyLlavaProcessor, list[torch.Tensor], list[torch.Tensor]]:
    """A model, and five prompts of different lengths with their visual tokens."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, eos_scale=3.0)
    processor = TinyLlavaProcessor(tokenizer, model.config)
    texts = [build_prompt(problem(i), instruction=INSTRUCTION) for i in range(5)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        videos = [model.encode(torch.randn(4, 3, 28, 28, generator=generator)) for _ in texts]
        tokens = list(model.visual_tokens(videos))
    return model, processor, [torch.tensor(tokenize_with_image(text, tokenizer)) for text in texts], tokens


def assert_same(ours: Rollout, theirs: Rollout) -> None:
    assert ours.completion_ids.tolist() == theirs.completion_ids.tolist()
    assert ours.completion_mask.tolist() == theirs.completion_mask.tolist()
    assert ours.is_truncated.tolist() == theirs.is_truncated.tolist()
    assert ours.texts == theirs.texts
    torch.testing.assert_close(ours.sampler_logps, theirs.sampler_logps, atol=1e-5, rtol=0)


def test_ended_rows_leave(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a step computes: fewer than if all went on to the end, and no fewer than there are tokens."""
    model, processor, prompts, tokens = toy
    computed: list[int] = []
    sampler = RolloutEngine(model, processor, PARAMS)
    monkeypatch.setattr(engine, "KEPT_SHARE", 1.0)
    run = RolloutEngine._run
    monkeypatch.setattr(RolloutEngine, "_run", lambda self: (computed.append(self.num_rows), run(self))[1])
    rollout = sampler.sample(prompts, tokens, num_generations=6)
    lengths = rollout.completion_mask.sum(dim=1)
    assert computed == [int((lengths > step).sum()) for step in range(1, len(computed) + 1)]
    assert computed[-1] < 30
    assert rollout.metrics["wasted_rows"] == 0


def test_a_graph_is_replayed_only_where_its_launches_are_those_of_now(toy, launches: list[Any]) -> None:
    """Rollouts of other lengths, groups and numbers of prompts, in arenas that are kept and in others."""
    model, processor, prompts, tokens = toy
    graphs = StepGraphs(partial(Captured, launches))
    sampler = RolloutEngine(model, processor, replace(PARAMS, temperature=0.8, top_k=30), graphs=graphs)
    for first, last, group in ((3, 5, 6), (0, 2, 6), (0, 1, 12), (2, 3, 4), (0, 5, 6), (0, 5, 1), (1, 2, 6), (3, 5, 6)):
        sampler.sample(prompts[first:last], tokens[first:last], num_generations=group)
    assert graphs.num_replays > 2 * graphs.num_captures
    graphs.clear()
    for number in (1, 5):  # no graph of few rows for many
        shown = prompts[:number], tokens[:number]
        ours = sampler.sample(*shown, num_generations=6)
        assert_same(ours, sample_eagerly(model, processor, *shown, sampler.params, num_generations=6))


@pytest.mark.parametrize("steps_per_look", [1, 3, 16])
def test_replayed_steps_give_what_plain_steps_give(toy, steps_per_look: int) -> None:
    """Buckets with padding, looks that come late, several rollouts of different sizes on the same graphs."""
    model, processor, prompts, tokens = toy
    graphs = StepGraphs(Replayed)
    sampler = RolloutEngine(model, processor, PARAMS, graphs=graphs, steps_per_look=steps_per_look)
    for number, group, seed in ((5, 6, 0), (5, 6, 1), (2, 3, 2), (5, 1, 3)):
        theirs = sample_eagerly(
            model, processor, prompts[:number], tokens[:number], PARAMS, num_generations=group, seed=seed
        )
        ours = sampler.sample(prompts[:number], tokens[:number], num_generations=group, seed=seed)
        assert_same(ours, theirs)
    assert 0 < graphs.num_captures < graphs.num_replays
    captured = graphs.num_captures
    sampler.sample(prompts, tokens, num_generations=6, seed=1)
    assert graphs.num_captures == captured  # known from the second rollout


def test_graph_is_not_replayed_where_its_key_has_changed(toy) -> None:
    """Another length of the arena, group or weight in another place: captured again."""
    model, processor, prompts, tokens = toy
    graphs = StepGraphs(Replayed)
    sampler = RolloutEngine(model, processor, PARAMS, graphs=graphs)
    sampler.sample(prompts[:1], tokens[:1], num_generations=4)
    step = sampler.token_step
    assert step is not None
    key = step.key(4)
    assert key == step.key(4)
    assert key != step.key(8)
    step.max_group = 5
    assert key != step.key(4)
    step.max_group = 4
    weight = model.decoder.layers[0].mlp.up_proj.weight
    old = weight.data
    captured = graphs.num_captures
    weight.data = old.clone()
    sampler.sample(prompts[:1], tokens[:1], num_generations=4)
    assert key != step.key(4)
    assert graphs.num_captures > captured
    weight.data = old
    captured = graphs.num_captures
    sampler.sample(prompts[:1], tokens[:1], num_generations=4)
    assert key == step.key(4)
    assert graphs.num_captures > captured  # those of before were dropped
    sampler.sample(prompts, tokens, num_generations=6)  # larger arenas
    assert sampler.token_step.key(4) != key


def test_graphs_of_a_hooked_projection_hold_for_one_rollout(toy) -> None:
    """What a hook or an adapter multiplies with is no address: it may be another number in the next rollout."""
    model, processor, prompts, tokens = toy
    graphs = StepGraphs(Replayed)
    sampler = RolloutEngine(model, processor, PARAMS, graphs=graphs)
    hook = model.decoder.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    captured = []
    for _ in range(3):
        sampler.sample(prompts, tokens, num_generations=2)
        captured.append(graphs.num_captures)
    assert 0 < captured[0] < captured[1] < captured[2]
    hook.remove()
    for _ in range(2):
        sampler.sample(prompts, tokens, num_generations=2)
        captured.append(graphs.num_captures)
    assert captured[-1] == captured[-2]


class FakeGraph:
    """A graph with the rule of the allocator: the handle of a pool is worth nothing once its graphs are gone."""

    living: ClassVar[weakref.WeakSet[FakeGraph]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.handle: object = None

    def pool(self) -> object:
        return self.handle

    def replay(self) -> None:
        """Counted by `StepGraphs`."""


def test_captures_share_a_pool_while_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave other threads alone, which load clips onto the same GPU."""

    @contextmanager
    def capture(graph: FakeGraph, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        assert pool is None or any(other.handle is pool for other in FakeGraph.living)
        graph.handle = pool or object()
        FakeGraph.living.add(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphs, steps = StepGraphs(), []
    for key in (8, 16):
        assert key not in graphs
        graphs.capture(key, lambda: steps.append("captured"))
    assert steps == ["captured"] * 2
    assert len({graph.handle for graph in FakeGraph.living}) == 1
    graphs.clear()
    assert not FakeGraph.living
    assert 8 not in graphs
    graphs.capture(8, lambda: None)
    graphs.replay(8)
    assert (graphs.num_captures, graphs.num_replays) == (3, 1)


@torch.no_grad()
def test_warm_up_leaves_no_trace(toy) -> None:
    model, processor, prompts, tokens = toy
    sampler = RolloutEngine(model, processor, PARAMS)
    sampler.sample(prompts, tokens, num_generations=2)
    rows, arenas = sampler._rows, sampler._arenas
    before = [x.clone() for x in (*rows.snapshot(), *arenas.suffix_k, *arenas.suffix_v)]
    sampler.token_step.refresh(sampler.stack, PARAMS, 2)
    sampler._warm_up(lambda: sampler.token_step(8))
    for old, new in zip(before, (*rows.snapshot(), *arenas.suffix_k, *arenas.suffix_v), strict=True):
        assert torch.equal(old, new)


def test_buckets() -> None:
    assert [bucket_of(n, 1000) for n in (1, 8, 9, 64, 65, 512, 700)] == [8, 8, 16, 64, 96, 512, 1000]
    assert bucket_of(5, 6) == 6
    assert list(BUCKETS) == sorted(BUCKETS)


def test_arenas_are_kept_or_freed(toy) -> None:
    model, processor, prompts, tokens = toy
    keeping = RolloutEngine(model, processor, PARAMS)
    first = keeping.sample(prompts, tokens)
    arenas = keeping._arenas
    assert arenas is not None
    assert_same(keeping.sample(prompts, tokens), first)
    assert keeping._arenas is arenas
    freeing = RolloutEngine(model, processor, PARAMS, keeps_arenas=False)
    assert_same(freeing.sample(prompts, tokens), first)
    assert freeing._arenas is None
    assert_same(freeing.sample(prompts, tokens), first)


# What it reports


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances by a second whenever it is looked at."""
    clock = iter(range(1000))
    monkeypatch.setattr("fastr1.rollout.costs.time.perf_counter", lambda: float(next(clock)))


def test_warming_up_is_counted_apart(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas, a first step and every capture, once; again where arenas are too small."""
    model, processor, prompts, tokens = toy
    ticking(monkeypatch)
    graphs = StepGraphs(Replayed)
    sampler = RolloutEngine(model, processor, PARAMS, graphs=graphs)

    def sample(number: int) -> tuple[float, int]:
        before = graphs.num_captures
        found = sampler.sample(prompts[:number], tokens[:number], num_generations=2, seed=1).metrics
        assert found["decode_tokens_per_second"] > 0
        captured = graphs.num_captures - before
        assert sampler.costs.decode_seconds == 1 + captured  # the clock is looked at for each of them
        return found["warm_up_seconds"], captured

    for number, others in ((2, 2), (5, 1)):
        seconds, captured = sample(number)
        assert captured > 0
        assert seconds == others + captured
        assert sample(number) == (0, 0)
    seconds, captured = sample(2)
    assert seconds == captured > 0  # a graph of fewer rows, in arenas that are there


def test_metrics(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against counts by hand, with a clock that advances by one second."""
    model, processor, prompts, tokens = toy
    ticking(monkeypatch)
    rollout = RolloutEngine(model, processor, replace(PARAMS, temperature=0)).sample(prompts, tokens, num_generations=2)
    lengths, found = rollout.completion_mask.sum(dim=1), rollout.metrics
    assert found["prefill_tokens_per_second"] == sum(model.prompt_lengths(prompts, tokens))
    assert found["warm_up_seconds"] == 2  # arenas, and a step on padding
    assert found["tokens_per_second"] == int(lengths.sum()) / 4
    assert found["decode_tokens_per_second"] == int(lengths.sum()) - 10
    assert found["decode_steps"] == int(lengths.max()) - 1
    text = model.layout
    weights = sum(p.numel() for p in model.decoder.layers.parameters()) + text.vocab_size * text.hidden_size
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim
    least = found["decode_steps"] * (weights + sum(model.prompt_lengths(prompts, tokens)) * token)
    assert found["decode_gb_per_second"] * 1e9 / 4 >= least
    assert found["decode_gb_per_second"] * 1e9 / 4 <= least + token * 10 * int(lengths.max()) ** 2


def test_partitioned_weights_are_not_captured(toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO stage 3: they are elsewhere after the next gathering."""
    model, processor, prompts, tokens = toy
    graphs = StepGraphs(Replayed)
    monkeypatch.setattr(model.decoder.norm.weight, "ds_id", 3, raising=False)
    sampler = RolloutEngine(model, processor, PARAMS, graphs=graphs)
    ours = sampler.sample(prompts, tokens, num_generations=2)
    assert graphs.num_captures == 0
    assert_same(ours, sample_eagerly(model, processor, prompts, tokens, PARAMS, num_generations=2))
