"""A time is kept for a result that matches only; what went wrong is a row."""

from __future__ import annotations

import json
import runpy
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# The benches are no package. At the end of the path: a conftest is there too.
BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))
harness = pytest.importorskip("harness", reason="bench/ is not there")
shapes = pytest.importorskip("shapes")
problems = pytest.importorskip("problems")


class Benchmark:
    """As much of pytest-benchmark's fixture as is used."""

    def __init__(self) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, function: Any, setup: Any, rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            function()
            self.stats.stats.data.append(0.002)


CASE = shapes.Case(op="grpo_loss", head=shapes.CPU_HEAD, rows=16, dtype="float32")


def cases_on_a_cpu() -> list[Any]:
    operations = ("group_advantages", "grpo_loss", shapes.LINEAR, "selective_log_softmax", "linear_logps")
    operations += ("load_pixels", shapes.ROLLOUT, *shapes.UPDATE_OPS)
    return [case for op in operations for case in shapes.cases_of(op, full=False)]


def new_group() -> Any:
    gold = {"x": torch.ones(3, dtype=torch.float64)}
    return harness.Group(CASE, None, gold, {"x": 3**0.5}, 1.0, (4e6, "GB/s"))


def measured(group: Any, name: str, call: Any) -> dict[str, Any]:
    return harness.measure(group, name, lambda _: call, Benchmark(), 3)


def out_of_memory() -> Any:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_rows_of_every_kind(tmp_path: Path) -> None:
    group = new_group()
    measured(group, "ours", lambda: {"x": torch.ones(3)})
    measured(group, "wrong", lambda: {"x": torch.ones(3) * 1.01})
    measured(group, "large", out_of_memory)

    def absent(_: Any) -> Any:
        raise harness.UnavailableError("peer is not installed")

    harness.measure(group, "peer", absent, Benchmark(), 3)
    measured(group, "slow", lambda: {"x": torch.ones(3)})
    for _ in range(2):
        harness.append_rows([group], harness.machine_info(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert len(rows) == 10  # appended
    ours, wrong, large, peer, slow = rows[:5]
    assert [r["status"] for r in rows[:5]] == ["ok", "mismatch", "out of memory", "skipped", "ok"]
    assert (ours["match"], wrong["match"]) == (True, False)
    assert all("median_ms" not in r for r in (wrong, large, peer))
    assert ours["median_ms"] == pytest.approx(2.0)
    assert ours["rate"] == pytest.approx(2e-0)
    assert (ours["floor_fraction"], slow["time_over_ours"]) == (pytest.approx(0.5), pytest.approx(1.0))
    assert peer["reason"] == "peer is not installed"
    assert all(r["spread"] is not None for r in rows)
    for name in ("commit", "dirty", "device", "driver", "torch", "triton", "seed", "shape", "dtype", "provider"):
        assert name in ours


@pytest.mark.parametrize(
    ("name", "quick_ms", "slow_ms", "number", "rounds"),
    [
        ("peer", 1e6, 1e6, 1 + 1 + 3, 3),
        ("peer", 0.0, 1e6, 1 + 3, 3),  # the first call's memory
        ("peer", 0.0, 0.0, 1 + 1, 1),
        ("ours", 0.0, 0.0, 1 + 1 + 1, 1),  # again, for the spread
        ("torch.compile", 0.0, 0.0, 1 + 1 + 3, 3),
    ],
)
def test_a_slow_call_is_made_less_often(
    monkeypatch: pytest.MonkeyPatch, name: str, quick_ms: float, slow_ms: float, number: int, rounds: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(harness, "CPU_QUICK_CALL_MS", quick_ms)
    monkeypatch.setattr(harness, "CPU_SLOW_MS", harness.CPU_SLOW_MS if slow_ms else 0.0)
    monkeypatch.setattr(harness, "SLOW_CALL_MS", slow_ms)
    calls = []

    def call() -> Any:
        calls.append(len(calls))
        return {"x": torch.ones(3)}

    row = measured(new_group(), name, call)
    assert (len(calls), row["rounds"]) == (number, rounds)
    assert row["peak_bytes"] is None or row["peak_bytes"] >= 0


def test_a_call_of_minutes_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ENDLESS_CALL_MS", 0.0)
    calls = []

    def call() -> Any:
        calls.append(len(calls))
        return {"x": torch.ones(3)}

    row = measured(new_group(), "peer", call)
    assert (len(calls), row["rounds"], row["median_ms"]) == (1, 1, row["first_ms"])


def test_the_first_result_is_the_one_that_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CPU_QUICK_CALL_MS", 0.0)
    results = iter([1.01, 1.0, 1.0, 1.0])
    row = measured(new_group(), "peer", lambda: {"x": torch.ones(3) * next(results)})
    assert row["status"] == "mismatch"
    assert "median_ms" not in row


def marks_of_bench(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], bool]:
    """(label of a case, provider) of all benches on a CPU → whether they are marked `slow`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    conftest = runpy.run_path(str(BENCH / "conftest.py"))
    found: dict[tuple[str, str], bool] = {}

    def collect(_: Any, params: list[Any]) -> None:
        for param in params:
            assert [mark.name for mark in param.marks] in ([], ["slow"])
            found[param.values[0].label, param.values[1]] = bool(param.marks)

    for name in ("advantages", "grpo_loss", "linear_loss", "loading", "logps", "report_frames", "rollout", "step"):
        # By path: a test of another room has the same name.
        module = SimpleNamespace(**runpy.run_path(str(BENCH / f"test_{name}.py")))
        config = SimpleNamespace(getoption=lambda _: False)
        metafunc = SimpleNamespace(fixturenames=["provider"], module=module, config=config, parametrize=collect)
        conftest["pytest_generate_tests"](metafunc)
    return found


def test_what_is_not_slow_has_every_operation_and_takes_less_than_three_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_slow = marks_of_bench(monkeypatch)
    assert {label.partition(",")[0] for label, _ in is_slow} - {
        label.partition(",")[0] for (label, _), slow in is_slow.items() if not slow
    } == {"report_frames"}
    cases = {(case.op, str(case.shape), case.frozen): case.label for case in cases_on_a_cpu()}
    rows = [json.loads(line) for path in (BENCH / "results").glob("*.jsonl") for line in path.read_text().splitlines()]
    rows = [row for row in rows if "first_ms" in row and row["device"].startswith("CPU")]
    seconds = {}
    for row in rows:  # of the last run
        key = (cases.get((row["op"], str(row["shape"]), row["frozen"]), ""), row["provider"])
        if is_slow.get(key) is False:
            calls = (1 + (row["provider"] == "ours")) * row.get("rounds", 0)
            seconds[key] = (row["first_ms"] + calls * row.get("median_ms", 0.0)) / 1e3
    # What else they take, on the machine of the rows: 30 s of set-ups, 25 s of compiling, 10 s of imports.
    assert 20 < sum(seconds.values()) < 180 - 65


def test_other_errors_are_raised_and_so_are_missing_outputs() -> None:
    def broken() -> Any:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        measured(new_group(), "ours", broken)
    with pytest.raises(ValueError, match="expected"):
        measured(new_group(), "ours", lambda: {"y": torch.ones(3)})


def test_reference_has_the_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.HEADS, "tiny", (6, 11))
    monkeypatch.setattr(problems, "REFERENCE_ROWS", 5)
    case = shapes.Case(op=shapes.LINEAR, head="tiny", rows=24, dtype="float32", dead=0.3)
    group = problems.loss_group(case, linear=True)
    inputs = group.inputs
    assert 0 < int(inputs.mask.sum()) < 24
    wide = [x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight)]
    logits = wide[0] @ wide[1].T
    logps = logits.log_softmax(-1).gather(-1, inputs.token_ids[..., None])[..., 0]
    loss = problems.masked_loss(logps, inputs)
    torch.testing.assert_close(group.gold["loss"], loss.detach())
    gradients = torch.autograd.grad(loss, wide)
    torch.testing.assert_close([group.gold["hidden"], group.gold["weight"]], list(gradients), check_dtype=False)


def test_a_reference_is_let_go_before_the_next_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the largest do not fit on a GPU. Cold and warm cache, and a frozen head, share one."""
    monkeypatch.setitem(shapes.HEADS, "tiny", (6, 11))
    case = shapes.Case(op=shapes.LINEAR, head="tiny", rows=24, dtype="float32")
    first = problems.loss_group(case, linear=True)
    again = problems.loss_group(replace(case, cold=True, frozen=True), linear=True)
    assert again.gold["hidden"] is first.gold["hidden"]
    kept, compute = weakref.ref(first.gold["hidden"]), problems.compute_reference
    del first, again

    def computing(*arguments: Any) -> Any:
        assert kept() is None
        return compute(*arguments)

    monkeypatch.setattr(problems, "compute_reference", computing)
    problems.loss_group(replace(case, rows=16), linear=True)


def test_targets_are_those_of_one_case_on_one_device() -> None:
    main = {"op": shapes.LINEAR, "head": shapes.MAIN_HEAD, "rows": 8192, "dtype": "bfloat16"}
    assert shapes.target_ms(shapes.Case(**main), "NVIDIA H200") == 22.0
    assert shapes.target_ms(shapes.Case(**main, frozen=True), "NVIDIA H200") == 14.2
    for device, changes in (("NVIDIA H100", {}), ("NVIDIA H200", {"rows": 2048}), ("NVIDIA H200", {"dead": 0.4})):
        assert shapes.target_ms(shapes.Case(**(main | changes)), device) is None


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_cases_are_distinct(monkeypatch: pytest.MonkeyPatch, has_gpu: bool, full: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    operations = ("group_advantages", "grpo_loss", shapes.LINEAR, "selective_log_softmax", "linear_logps")
    cases = [case for op in operations for case in shapes.cases_of(op, full)]
    assert len({case.label for case in cases}) == len(cases) >= len(operations)
    assert all(case.rows % problems.SEQUENCES == 0 for case in cases)
    if has_gpu and full:
        assert {shapes.target_ms(case, "NVIDIA H200") for case in cases} == {None, *shapes.TARGETS_MS.values()}
