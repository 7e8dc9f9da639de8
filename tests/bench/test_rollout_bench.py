"""The bench of rollouts: every provider gives what the case asks for, and a rollout that differs is told apart."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastr1.roofline import Machine

# The benches are no package. At the end of the path: a conftest is there too.
sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
shapes = pytest.importorskip("rollout_shapes", reason="bench/ is not there")
harness = pytest.importorskip("harness")
update_work = pytest.importorskip("update_work")
bench = pytest.importorskip("test_rollout")

TINY = replace(shapes.DEMO, num_prompts=2, prompt_length=50, num_generations=3, mean_length=5, max_length=9)
PROVIDERS = bench.OPS[shapes.ROLLOUT]


@pytest.fixture(scope="module")
def group() -> Any:
    return bench.set_up(TINY)


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "generate_batch"])
def test_providers_match_and_a_second_call_does_too(group: Any, name: str) -> None:
    call = PROVIDERS[name](group.inputs)
    for _ in range(2):
        errors = group.errors(call())
        assert set(errors) >= (
            {"shape", "lengths", "token_ids", "logps"} if name in ("ours", "eager loop") else {"shape"}
        )
        assert max(errors.values()) < group.strict_tolerance, errors


def test_bfloat16_is_judged_by_log_probabilities() -> None:
    group = bench.set_up(replace(TINY, dtype="bfloat16"))
    errors = group.errors(PROVIDERS["ours"](group.inputs)())
    assert set(errors) == {"shape", "lengths", "logps"}
    assert max(errors.values()) < group.strict_tolerance, errors


def test_what_differs_is_told_apart(group: Any) -> None:
    outputs = PROVIDERS["ours"](group.inputs)()
    ids, logps, lengths = (outputs[name].clone() for name in ("token_ids", "logps", "lengths"))
    row = lengths.argmax()
    ids[row, 2] += 1
    logps[row, 0] += 0.5
    lengths[row] -= 1
    for name, changed in (("token_ids", ids), ("logps", logps), ("lengths", lengths)):
        assert group.errors({**outputs, name: changed})[name] > group.strict_tolerance
    assert group.errors({"shape": torch.tensor([6, 8])}) == {"shape": 1.0}
    with pytest.raises(ValueError, match="outputs"):
        group.errors({"shape": outputs["shape"], "token_ids": ids})


def test_continuous_batching_is_left_out_where_there_are_videos(group: Any) -> None:
    with pytest.raises(harness.UnavailableError, match="no videos"):
        PROVIDERS["generate_batch"](group.inputs)


def test_floor_is_the_time_of_the_weights_where_they_are_read_alone(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, model = sys.modules["rollout_judge"], group.inputs.model
    slow_memory = Machine("none", gemm_flops_per_second=1e30, bytes_per_second=1e6)
    monkeypatch.setattr(judge, "probe_machine", lambda *_: slow_memory)
    first, second, third = (judge.floor_ms(model, 1, [n], 1) for n in (1, 2, 3))
    decoder = model.language_model
    matrices = sum(p.numel() for name, p in decoder.named_parameters() if p.dim() == 2)
    assert second - first == pytest.approx(4 * matrices / 1e3, rel=0.01)
    assert third - second > second - first  # the keys and values of one more token


def test_rates_and_goals_of_a_row() -> None:
    (main,) = [case for case in shapes.LARGE if case.name == shapes.MAIN]
    row = shapes.stated(main, "ours", 256.0, 64 * 128, "NVIDIA H200")
    assert (row["tokens_per_second"], row["step_ms"]) == (32_000.0, 2.0)
    assert row["target_step_ms"] == 2.2
    assert "target_step_ms" not in shapes.stated(main, "ours", 256.0, 64 * 128, "NVIDIA H100")
    assert shapes.stated(main, "generate", 256.0, 64 * 128, "NVIDIA H100")["target_ratio"] == 10.0
    assert shapes.rollout_target_ms(main, "NVIDIA H200") == pytest.approx(281.6)
    names = {case.name for case in (shapes.DEMO, shapes.EQUAL, *shapes.LARGE, shapes.TEXT)}
    assert len(names) == 15
    assert {name for name, _ in shapes.TARGET_RATIOS} <= names


@pytest.mark.parametrize(("model", "size"), [("3B", 3_085_938_688), ("1.5B", 1_543_714_304), ("0.5B", 494_032_768)])
def test_large_models_have_the_size_of_their_name(model: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_work.harness, "device", lambda: torch.device("meta"))
    case = next(case for case in shapes.LARGE if case.model == model)
    assert sum(p.numel() for p in update_work.make_model(case).language_model.parameters()) == size
