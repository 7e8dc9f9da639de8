"""Hooks of pytest and pytest-benchmark: which cases run, what its JSON says, and the rows of this run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from shapes import cases_of, is_slow

GROUPS: dict[Any, harness.Group] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benches: every shape of the list, for a GPU")
    parser.addoption("--no-rows", action="store_true", help="benches: do not append to bench/results")


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(harness.SEED)
    harness.machine_info()
    config.stash_start = time.monotonic()  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case` of the module's OPS, and `provider` of its PROVIDERS for that operation, cases one after the other."""
    if "provider" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    pairs = [
        pytest.param(case, name, make, id=f"{case.label}-{name}", marks=[pytest.mark.slow] * is_slow(case, name))
        for op, providers in metafunc.module.OPS.items()
        for case in cases_of(op, full)
        for name, make in providers.items()
        if not (case.frozen and name == "torch.compile" and not torch.cuda.is_available())  # minutes of compilation
    ]
    metafunc.parametrize(("case", "provider", "make"), pairs)


@pytest.fixture
def group(case: Any, request: pytest.FixtureRequest) -> harness.Group:
    """Inputs, reference and floor of the case; those of the case before are let go."""
    if case not in GROUPS:
        for other in GROUPS.values():
            other.inputs, other.gold = None, {}
        harness.free_memory()
        torch._dynamo.reset()
        try:
            GROUPS[case] = request.module.set_up(case)
        except (RuntimeError, MemoryError) as error:
            if not harness.is_out_of_memory(error):
                raise
            del error
            harness.free_memory()
            pytest.skip("no memory for the inputs and the reference of this case")
    return GROUPS[case]


@pytest.fixture
def run(group: harness.Group, benchmark: Any) -> Callable[..., dict[str, Any]]:
    """Measure one provider; one that does not run here is skipped, ours fails where it computes something else."""

    def run_provider(name: str, make: Callable[[Any], harness.Call], rounds: int) -> dict[str, Any]:
        row = harness.measure(group, name, make, benchmark, rounds)
        benchmark.group = group.case.label
        benchmark.extra_info.update(row)
        if row["status"] == "skipped":
            pytest.skip(row["reason"])
        if row["status"] == "mismatch" and name.startswith("ours"):
            pytest.fail(f"{name} differs from the reference: {row['errors']}")
        if row["status"] != "ok":
            pytest.skip(row["status"])
        return row

    return run_provider


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.update(harness.machine_info())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.update(harness.commit_info())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["rows"] = [row for group in GROUPS.values() for row in harness.complete_rows(group)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if GROUPS and not session.config.getoption("--no-rows") and not session.config.getoption("benchmark_disable"):
        harness.append_rows(list(GROUPS.values()), harness.machine_info())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Every case: time, times as long as ours, memory, part of the floor."""
    for group in GROUPS.values():
        spread = "" if group.spread is None else f", unchanged code differs by {group.spread:.1%}"
        floor = "" if group.floor_ms is None else f", floor {group.floor_ms:,.1f} ms"
        terminalreporter.write_line(f"\n{group.case.label}{floor}{spread}")
        for row in harness.complete_rows(group):
            terminalreporter.write_line(line_of(row))
    seconds = time.monotonic() - config.stash_start  # type: ignore[attr-defined]
    terminalreporter.write_line(f"\nbenches took {seconds:.0f} s on {harness.device_name()}")


def line_of(row: dict[str, Any]) -> str:
    if "median_ms" not in row:
        return f"  {row['provider']:32} {row['status']}: {row.get('reason') or row.get('errors') or ''}"
    mib = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
    ratio = "" if row["time_over_ours"] is None else f"{row['time_over_ours']:.2f} × ours"
    floor = "" if row["floor_fraction"] is None else f"{row['floor_fraction']:.0%} of the floor"
    verdict = {None: "", True: "passes", False: "misses its target"}[row.get("passes")]
    return f"  {row['provider']:32} {row['median_ms']:>10,.2f} ms  {ratio:>12} {mib:>12}  {floor} {verdict}"
