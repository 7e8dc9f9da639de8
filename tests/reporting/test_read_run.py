"""A run folder in any state gives a run, and says what is missing or broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import NUM_STEPS, metrics_row, rollouts, sheet_row, write_config, write_lines, write_run

from fastr1.reporting.read_run import NUM_UPDATES_SHOWN, read_run
from fastr1.reporting.run_log import RunLogError


def test_a_whole_run_has_everything_and_no_notes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    assert run.notes == []
    assert (run.last_step, run.total_steps, run.is_finished) == (NUM_STEPS, NUM_STEPS, True)
    assert run.series["reward"][1].tolist() == [step / 20 for step in range(1, NUM_STEPS + 1)]
    assert (run.picks.num_groups, run.picks.num_rows) == (60, 240)
    steps = sorted(run.picks.by_step)
    assert (len(steps), steps[0], steps[-1]) == (NUM_UPDATES_SHOWN, 1, NUM_STEPS)
    assert set(run.evaluations) == {"before", "after"}
    assert (run.num_bad, run.bad_samples[0]["reason"]) == (1, "moov atom not found")


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("metrics.jsonl", "metrics.jsonl is missing: there are no curves."),
        ("rollouts.jsonl", "rollouts.jsonl is missing: there are no completions to look at."),
        ("config.json", "config.json is missing: settings are not shown."),
    ],
)
def test_a_missing_file_is_noted(tmp_path: Path, name: str, note: str) -> None:
    run = write_run(tmp_path)
    (run / name).unlink()
    assert read_run(run).notes == [note]


def test_a_folder_without_any_file_of_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match=r"holds none of config.json, metrics.jsonl, .*is this the folder of a run\?"):
        read_run(tmp_path)


def test_a_last_line_cut_short_is_noted_and_the_rows_before_it_stay(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        text = (run / name).read_text()
        (run / name).write_bytes(text.encode()[:-30] + "é".encode()[:1])
    found = read_run(run)
    assert found.notes == [
        f"{name} ends in a line cut short: the run is writing it, or was killed there."
        for name in ("metrics.jsonl", "rollouts.jsonl")
    ]
    assert len(found.series["reward"][0]) == NUM_STEPS - 1
    assert found.picks.num_rows == 239
    assert found.last_step == NUM_STEPS  # of the rollouts


def test_broken_lines_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = (run / "rollouts.jsonl").read_text().splitlines()
    lines[4], lines[9] = "{", json.dumps({"step": 1})
    (run / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    metrics[2] = "[]"
    (run / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    found = read_run(run)
    assert found.notes == [
        "metrics.jsonl: line 3 is not a row that can be read, and left out.",
        "rollouts.jsonl: 2 lines, the first is 5, are not a row that can be read, and left out.",
    ]
    assert found.picks.num_rows == 238


def test_a_config_or_evaluation_that_is_none_is_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "config.json").write_text("{")
    (run / "summary.json").write_text("[]")
    (run / "evaluation" / "after.json").write_text('{"summary": {}, "answers": [{"sample_id": "1"}]}')
    first, second, third = read_run(run).notes
    assert first.startswith("config.json cannot be read (")
    assert second == "summary.json is not a JSON object."
    assert third == "evaluation/after.json is not what `fastr1 eval --output` writes."


def test_a_run_of_epochs_estimates_its_updates_from_how_far_it_is(tmp_path: Path) -> None:
    config = json.loads((write_run(tmp_path) / "config.json").read_text())
    config["optim"] |= {"max_steps": -1, "num_train_epochs": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_lines(tmp_path / "metrics.jsonl", [metrics_row(step, epoch=step / 40) for step in (1, 2, 10)])
    write_lines(tmp_path / "rollouts.jsonl", rollouts(10))
    (tmp_path / "final").rmdir()
    run = read_run(tmp_path)
    assert (run.last_step, run.total_steps, run.is_finished) == (10, 80, False)
    write_lines(tmp_path / "metrics.jsonl", [metrics_row(step) for step in (1, 2, 10)])
    assert read_run(tmp_path).total_steps is None


def test_sheets_are_found_by_any_path_of_the_video_and_held_out_ones_by_sample(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    sheet = run.sheet_of("videos/v1.mp4")
    assert sheet is not None
    assert (sheet.file, sheet.columns, sheet.num_lines, sheet.frame_px) == (tmp_path / "frames/t1.jpg", 4, 2, (96, 64))
    assert run.sheet_of("v1.mp4") is sheet
    assert run.sheet_of("videos/other.mp4") is None
    held_out = run.sheet_of("", "h2")
    assert held_out is not None
    assert held_out.file.name == "h2.jpg"
    assert run.sheet_of("", "s1") is None  # a training clip: samples of two files may share a number


def test_several_indices_without_absolute_paths_are_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    row = sheet_row("videos/n/late.mp4", "s9", "training", "t0")
    del row["path"]
    write_lines(tmp_path / "frames" / "index-1.jsonl", [row])
    assert read_run(tmp_path).sheet_of("videos/n/late.mp4") is not None


def test_a_sheet_outside_the_run_folder_is_never_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (run / "frames" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    rows = [
        {**sheet_row("videos/v0.mp4", "s0", "training", "x"), "sheet": name}
        for name in ("../secret.jpg", "frames/link.jpg")
    ]
    write_lines(run / "frames" / "index.jsonl", rows)
    found = read_run(run)
    assert found.sheet_of("videos/v0.mp4") is None
    assert [note.split("'")[1] for note in found.notes] == ["../secret.jpg", "frames/link.jpg"]


def test_a_cold_start_misses_no_rollouts(tmp_path: Path) -> None:
    write_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "task": "sft"}))
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert read_run(tmp_path).notes == []
