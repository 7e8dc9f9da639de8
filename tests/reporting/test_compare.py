"""Several runs beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import answer, metrics_row, write_evaluation, write_lines, write_run
from test_page import text_of

from fastr1 import cli
from fastr1.reporting.compare import MAX_CHARTS, build_comparison, compare_charts, group_runs, merge, write_comparison
from fastr1.reporting.held_out import rate, sign_test
from fastr1.reporting.read_run import read_run
from fastr1.reporting.run_log import RunLogError


def run_of(folder: Path, *, seed: int, reward: float = 1.0, num_right: int = 2, **settings: Any) -> Path:
    run = write_run(folder, seed=seed)
    write_lines(run / "metrics.jsonl", [metrics_row(step, reward=reward * step) for step in range(1, 21)])
    write_evaluation(run, "after", [answer(i, i < num_right) for i in range(4)])
    if settings:
        config = json.loads((run / "config.json").read_text())
        config["grpo"] |= settings
        (run / "config.json").write_text(json.dumps(config))
    return run


def test_runs_that_differ_only_in_their_seed_are_a_set(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / f"s{seed}" / "grpo", seed=seed) for seed in (0, 1)]
    folders.append(run_of(tmp_path / "other" / "grpo", seed=0, beta=0.1))
    sets = group_runs([read_run(folder) for folder in folders])
    assert [(found.label, len(found.runs)) for found in sets] == [("s0/grpo and 1 more", 2), ("other/grpo", 1)]


def test_paths_beside_the_run_count_from_there_and_others_as_they_are(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / f"s{seed}" / "grpo", seed=seed) for seed in (0, 1)]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config["data"]["train_file"] = str(folder.parent / "data" / "train.jsonl")
        (folder / "config.json").write_text(json.dumps(config))
    assert len(group_runs([read_run(folder) for folder in folders])) == 1
    config["data"]["train_file"] = str(tmp_path / "elsewhere" / "train.jsonl")
    (folders[1] / "config.json").write_text(json.dumps(config))
    assert len(group_runs([read_run(folder) for folder in folders])) == 2


def test_runs_without_settings_are_alone(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / name, seed=0) for name in ("a", "b")]
    for folder in folders:
        (folder / "config.json").unlink()
    assert [found.label for found in group_runs([read_run(folder) for folder in folders])] == ["a", "b"]


def test_a_set_is_drawn_as_mean_with_its_range(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / f"s{seed}", seed=seed, reward=1.0 + seed) for seed in (0, 1, 2)]
    charts = compare_charts(group_runs([read_run(folder) for folder in folders]))
    assert charts[0].title == "Reward"
    (line,) = charts[0].lines
    assert line.points[1][:2].tolist() == [2.0, 4.0]
    assert line.spread is not None
    assert [part[0] for part in line.spread] == [1.0, 3.0]


def test_means_are_over_the_updates_that_all_runs_have() -> None:
    short, long = (np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0])), (np.array([2, 3, 4]), np.array([4.0, 5.0, 6.0]))
    merged = merge([short, long])
    assert merged is not None
    (steps, mean), spread = merged
    assert (steps.tolist(), mean.tolist()) == ([2, 3], [3.0, 4.0])
    assert spread is not None
    assert [part.tolist() for part in spread] == [[2.0, 3.0], [4.0, 5.0]]
    assert merge([short, (np.array([9]), np.array([0.0]))]) is None
    assert merge([]) is None
    alone = merge([short])
    assert alone is not None
    assert alone[1] is None


def test_final_numbers_are_mean_and_range(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / f"s{seed}", seed=seed, num_right=seed + 1) for seed in (0, 1, 2)]
    folders.append(run_of(tmp_path / "other", seed=0, beta=0.5, num_right=4))
    text = text_of(build_comparison([read_run(folder) for folder in folders]))
    assert "accuracy before 50.0 % 50.0 %" in text
    assert "accuracy after 50.0 % (25.0 % – 75.0 %) 100.0 %" in text
    assert "updates 20 20" in text
    assert "grpo.beta 0.0 0.0 0.0 0.5" in text
    assert "run.seed 0 1 2 0" in text
    assert "0, 1, 2" in text
    assert "grpo.num_generations" not in text


def test_a_run_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, seed=0) for name in ("a", "b")]
    with pytest.raises(RunLogError, match="is named twice, and would count twice in a mean"):
        write_comparison([*runs, f"{runs[0]}/../a/"], tmp_path / "x.html")


def test_a_seed_that_is_there_twice_is_told(tmp_path: Path) -> None:
    runs = [read_run(run_of(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 7), ("c", 7))]
    assert "a and 2 more: 2 runs have the seed 7; the mean counts each of them." in text_of(build_comparison(runs))
    assert "runs have the seed" not in text_of(build_comparison(runs[:2]))


def test_what_accuracy_was_measured_on_stands_below_it(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, seed=0, beta=beta) for name, beta in (("a", 0.0), ("b", 0.1))]
    for file in (runs[1] / "evaluation").iterdir():
        file.unlink()
    write_lines(runs[1] / "metrics.jsonl", [metrics_row(7, **{"eval/accuracy": 0.5, "eval/num_questions": 9.0})])
    text = text_of(build_comparison([read_run(run) for run in runs]))
    assert "accuracy of 4 held-out questions, before and after 9 held-out questions, update 7" in text


def test_a_run_that_lacks_a_number_has_none_and_a_note_is_told(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / name, seed=0, beta=beta) for name, beta in (("a", 0.0), ("b", 0.1))]
    for file in (folders[1] / "evaluation").iterdir():
        file.unlink()
    with open(folders[1] / "metrics.jsonl", "a") as file:
        file.write("{")
    text = text_of(build_comparison([read_run(folder) for folder in folders]))
    assert "accuracy after 50.0 % –" in text
    folders.append(run_of(tmp_path / "c", seed=1, beta=0.1))
    assert "accuracy after 50.0 % –" in text_of(build_comparison([read_run(folder) for folder in folders]))
    assert "b: metrics.jsonl ends in a line cut short" in text


def test_metrics_that_are_left_out_are_counted(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    known = len(metrics_row(1)) - 1
    for number in (MAX_CHARTS - known, MAX_CHARTS - known + 3):
        more = {f"metric_{i}": 1.0 for i in range(number)}
        write_lines(runs[0] / "metrics.jsonl", [metrics_row(1, **more)])
        write_lines(runs[1] / "metrics.jsonl", [metrics_row(1)])
        text = text_of(build_comparison([read_run(run) for run in runs]))
        note = "3 metrics are left out to keep the page small; metrics.jsonl of the runs has them."
        assert (note in text) == (number > MAX_CHARTS - known)


def test_compare_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run_of(tmp_path / name, seed=seed)) for seed, name in enumerate(("a", "b"))]
    target = tmp_path / "new" / "both.html"
    assert cli.main(["compare", *folders, "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert "Runs beside each other" in target.read_text()


def test_compare_command_refuses_the_name_of_another_kind_of_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "compare.png"
    assert cli.main(["compare", str(write_run(tmp_path / "a")), "--output", str(target)]) == 2
    assert f"--output is {target}; the page is HTML" in capsys.readouterr().err
    assert not target.exists()


def test_a_run_without_numbers_is_refused_by_name(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", seed=0)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RunLogError, match=rf"{run} has no rows of metrics.jsonl to compare; leave it out"):
        write_comparison([run], tmp_path / "x.html")


@pytest.mark.parametrize(
    ("fixed", "broken", "expected"), [(5, 0, 2 / 32), (0, 5, 2 / 32), (1, 1, 1.0), (3, 1, 10 / 16)]
)
def test_sign_test_is_the_exact_one(fixed: int, broken: int, expected: float) -> None:
    assert sign_test(fixed, broken) == pytest.approx(expected)


def test_interval_of_a_rate_is_that_of_wilson() -> None:
    # Wilson (1927), 95 %: of 0 in 10 from 0 to 27.8 %; of 5 in 10 from 23.7 to 76.3 %
    assert [round(rate(0, 10)[name], 3) for name in ("share", "low", "high")] == [0.0, 0.0, 0.278]
    assert [round(rate(5, 10)[name], 3) for name in ("share", "low", "high")] == [0.5, 0.237, 0.763]
