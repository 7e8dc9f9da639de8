"""Whatever a file of a run holds, there is a page, and what cannot be read is told."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run

from fastr1.reporting.compare import build_comparison
from fastr1.reporting.page import build_page
from fastr1.reporting.read_run import read_run

SUMMARY = {
    "title": "t",
    "chance": 0.2,
    "accuracy": {"cold start": 0.5},
    "before": {"accuracy": 0.5, "num_questions": 4.0},
    "after": {"accuracy": 0.5, "num_questions": 4.0},
    "conditions": {"device": "cpu", "cores": 2, "torch": "2", "date": "d", "commit": "c"},
}
VALUES: list[Any] = [
    *(None, True, -1, 0, 1e308, 10**30, float("nan"), float("inf"), "", "text", "1"),
    *("\ud800", "\0", "\u202e", [], [1], [None], [[]], {}, {"a": 1}),
]


def broken(value: Any, rng: random.Random, share: float) -> Any:
    """The same with about that share of its values replaced by others, and a few left out."""
    if rng.random() < share:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if rng.random() > share / 3}
        return {name: broken(part, rng, share) for name, part in kept.items()}
    return [broken(part, rng, share) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "whole")
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    (run / "hardware.json").write_text(json.dumps({"device": "cpu", "cores": 2, "processes": 1}))
    return run


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of sums of numbers that have none
@pytest.mark.parametrize(
    "name", ["config", "hardware", "summary", "before", "metrics", "rollouts", "bad_samples", "index"]
)
def test_values_of_any_kind_give_a_page(whole: Path, tmp_path: Path, name: str) -> None:
    (file,) = whole.rglob(f"{name}.json*")
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    for seed in range(12):
        rng, run = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(whole, run)
        rows = [broken(json.loads(line), rng, (0.003, 0.02, 0.1)[seed % 3]) for line in lines]
        (run / file.relative_to(whole)).write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "</html>" in build_page(read_run(run)), seed
        runs = [read_run(folder, with_rollouts=False) for folder in (run, whole)]
        assert "</html>" in build_comparison(runs), seed


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\xff\xfe", b"[" * 10**5, b"{", b"null\n[]\n1\n", b'{"step": 1e400}\n']
)
def test_bytes_of_any_kind_give_a_page_that_tells_of_them(whole: Path, tmp_path: Path, content: bytes) -> None:
    for file in [path for path in whole.rglob("*.json*") if path.is_file()]:
        run = tmp_path / file.name
        shutil.copytree(whole, run)
        (run / file.relative_to(whole)).write_bytes(content)
        page = build_page(read_run(run))
        assert "</html>" in page
        if content and not (
            content.startswith(b'{"') and file.name in ("config.json", "hardware.json", "summary.json")
        ):
            assert f"{file.name}" in page.partition("<main")[0], file


@pytest.mark.parametrize("step", [-1, 10**30, 2.5, True, None])
def test_a_row_of_no_update_is_left_out_and_told(whole: Path, tmp_path: Path, step: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("metrics", "rollouts"):
        first, *others = (run / f"{name}.jsonl").read_text().splitlines(keepends=True)
        row = json.dumps({**json.loads(first), "step": step}) + "\n"
        (run / f"{name}.jsonl").write_text("".join([*others, row]))
        found = read_run(run)
        assert found.last_step == 20
        assert any(note.startswith(f"{name}.jsonl: line ") for note in found.notes)
    assert "</html>" in build_page(found)
