"""The bench of updates: its providers agree, a wrong gradient is told apart, and the full size can be built."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_toys import build_model, build_tokenizer

from fastr1.models.tinyllava import TinyLlavaProcessor

# The benches are no package. At the end of the path: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
update_work = pytest.importorskip("update_work", reason="bench/ is not there")
update_shapes = pytest.importorskip("update_shapes")
update_steps = pytest.importorskip("update_steps")
bench = pytest.importorskip("test_step")

TINY = replace(
    update_shapes.DEMO, num_prompts=2, prompt_length=50, num_generations=3, mean_length=5, max_length=9, max_tokens=128
)
CASES = {
    "train": TINY,
    "reference": replace(TINY, op="reference", beta=0.5),
    "update": replace(TINY, op="update", beta=0.5),
}


@pytest.fixture(scope="module", params=CASES)
def group(request: pytest.FixtureRequest) -> Any:
    return bench.set_up(CASES[request.param])


def test_all_providers_compute_the_same(group: Any) -> None:
    for name, make in bench.OPS[group.case.op].items():
        if name != "TRL GRPOTrainer":
            errors = group.errors(make(group.inputs)())
            assert max(errors.values()) < group.strict_tolerance, (name, errors)


def test_a_second_call_finds_the_same_weights(group: Any) -> None:
    call = bench.OPS[group.case.op]["ours"](group.inputs)
    call()
    assert max(group.errors(call()).values()) < group.strict_tolerance


def test_other_completions_and_another_reference_are_told_apart() -> None:
    group = bench.set_up(CASES["update"])
    group.inputs.batch.advantages[0] += 0.1
    errors = group.errors(bench.OPS["update"]["ours"](group.inputs)())
    assert min(errors[name] for name in ("connector", "embedding", "layers")) > group.strict_tolerance
    group = bench.set_up(CASES["update"])
    group.inputs.reference = group.inputs.model
    errors = group.errors(bench.OPS["update"]["ours"](group.inputs)())
    assert errors["layers"] > group.strict_tolerance


def test_missing_gradients_are_an_error(group: Any) -> None:
    outputs = dict(group.gold)
    outputs.pop(next(iter(outputs)))
    with pytest.raises(ValueError, match="1 outputs are missing"):
        group.errors(outputs)


def test_phases_of_an_update_are_reported() -> None:
    group = bench.set_up(CASES["update"])
    bench.OPS["update"]["ours"](group.inputs)()
    assert list(group.inputs.phases_ms) == ["vision", "rollout", "reference", "train", "optimizer"]


def test_trl_gives_the_gradients_of_the_case() -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    group = bench.set_up(replace(update_shapes.TEXT, op="update", num_prompts=2, num_generations=3, max_tokens=1024))
    errors = group.errors(bench.OPS["update"]["TRL GRPOTrainer"](group.inputs)())
    assert max(errors.values()) < group.strict_tolerance, errors


def test_forced_lengths_have_the_mean_and_the_longest_of_the_case() -> None:
    for number, mean, longest in ((64, 28, 64), (64, 300, 512), (8, 300, 512), (8, 100, 100)):
        lengths = update_work.completion_lengths(number, mean, longest)
        assert (len(lengths), max(lengths)) == (number, longest)
        assert sum(lengths) / number == pytest.approx(mean, abs=0.25)
        assert lengths == update_work.completion_lengths(number, mean, longest)


def test_the_paper_update_runs_at_a_reduced_size_from_mp4_files() -> None:
    small = replace(
        update_shapes.PAPER,
        model="demo",
        num_prompts=2,
        prompt_length=60,
        num_generations=2,
        mean_length=6,
        max_length=9,
        num_frames=8,
        video_size=(64, 48),
    )
    group = bench.set_up(small)
    assert group.inputs.videos[0].shape == (8, 3, 48, 48)
    for name in ("ours", "before", "original's schedule"):
        errors = group.errors(bench.OPS["update"][name](group.inputs)())
        assert max(errors.values()) < group.strict_tolerance, (name, errors)
    assert next(iter(group.inputs.phases_ms)) == "wait for clips"


@pytest.mark.parametrize("case", [update_shapes.PAPER, update_shapes.LONG_VIDEO], ids=lambda case: case.name)
def test_the_full_size_is_that_of_the_paper(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_work.harness, "device", lambda: torch.device("meta"))
    model = update_work.make_model(case)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes["language_model"] == 3_085_938_688
    assert 0.40e9 < sizes["vision_tower"] < 0.44e9
    assert model.dtype is torch.bfloat16
    tokens = model.visual_tokens([torch.empty(case.num_frames, 3, 384, 384, device="meta", dtype=torch.bfloat16)])
    assert tokens[0].shape == (case.num_queries, 2048)


@pytest.mark.parametrize("backend", ["engine", "eager"])
def test_rollout_ends_where_it_is_told_and_leaves_ended_rows_out(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    processor = TinyLlavaProcessor(tokenizer, model.config)
    prompts = [processor.prompt_ids(f"Why{'?' * i}", instruction="") for i in range(2)]
    lengths = [3, 9, 1, 5, 2, 12]
    decoded = []
    project = type(model).project
    monkeypatch.setattr(type(model), "project", lambda *a: decoded.append(len(a[1])) or project(*a))
    with torch.no_grad():
        tokens = model.visual_tokens([torch.zeros(4, 3, 28, 28)] * 2)
    with update_steps.ending_at(lengths, 3, end_id=5) as forced:
        rollout = update_steps.sample(model, prompts, tokens, 20, 3, forced, backend)
    assert rollout.completion_mask.sum(dim=1).tolist() == lengths
    assert not rollout.is_truncated.any()
    if backend == "engine":
        assert decoded.pop(0) == 6  # the warm-up, on padding alone
    assert len(decoded) == max(lengths)
    assert decoded[-3:] == [1, 1, 1]
    assert sum(decoded[1:]) <= 6 + 6 + 6 * 3 + 3  # as by halves


def test_before_decodes_all_completions_to_the_end() -> None:
    work = bench.set_up(CASES["update"]).inputs
    decoded = []
    decoder = work.model.decoder
    handle = decoder.register_forward_pre_hook(
        lambda _, __, kw: decoded.append(kw["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    with torch.no_grad():
        tokens = work.model.visual_tokens(work.videos)
    ids = update_steps.sample_before(work.model, work.batch.prompt_ids, tokens, 9, 3)
    handle.remove()
    assert ids.shape == (6, 9)
    assert decoded == [(2, 50), *[(6, 1)] * 8]
