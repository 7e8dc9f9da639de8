"""The run folder, the phase timer and the memory figure."""

from __future__ import annotations

import errno
import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import rollout_row

from fastr1.config import ConfigError
from fastr1.reporting.run_log import RunLogError, RunLogger, read_rows


def make_logger(folder: Path, start_step: int = 0, total_steps: int = 100, **options: Any) -> RunLogger:
    options = {"report_to": ("jsonl",), "is_main": True, "progress": io.StringIO(), **options}
    return RunLogger(folder, total_steps=total_steps, start_step=start_step, **options)


def run(folder: Path, first: int, last: int, start_step: int = 0) -> None:
    logger = make_logger(folder, start_step)
    for step in range(first, last + 1):
        logger.log(step, {"reward": step / 10})
        logger.log_rollouts(step, [{"completion": f"{step}-{g}"} for g in range(2)])
    logger.close()


def test_rows_are_what_was_logged_and_readable_before_close(tmp_path: Path) -> None:
    logger = make_logger(tmp_path)
    logger.log(1, {"reward": 0.5, "tokens": 7})
    logger.log(1, {"eval/accuracy": 0.25})
    logger.log_rollouts(1, [{"question": "Wer läuft?", "advantage": -1.0}])
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": 0.5, "tokens": 7.0},
        {"step": 1, "eval/accuracy": 0.25},
    ]
    assert read_rows(tmp_path / "rollouts.jsonl") == [{"step": 1, "question": "Wer läuft?", "advantage": -1.0}]
    logger.close()


def test_numbers_that_are_not_finite_become_null_and_the_file_stays_json(tmp_path: Path) -> None:
    logger = make_logger(tmp_path)
    logger.log(1, {"kl": math.nan, "ratio": math.inf, "loss": torch.tensor(0.5)})  # type: ignore[dict-item]
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert row == {"step": 1, "kl": None, "ratio": None, "loss": 0.5}


def test_resume_leaves_the_files_of_an_uninterrupted_run(tmp_path: Path) -> None:
    run(tmp_path / "straight", 1, 6)
    run(tmp_path / "resumed", 1, 5)  # stopped at 5, last checkpoint at 3
    run(tmp_path / "resumed", 4, 6, start_step=3)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "resumed" / name).read_text() == (tmp_path / "straight" / name).read_text()


def test_resume_drops_a_row_cut_short_by_a_kill(tmp_path: Path) -> None:
    run(tmp_path, 1, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    run(tmp_path, 3, 3, start_step=2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_rows_that_a_resume_should_find_but_does_not_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, 1, 3)
    run(tmp_path, 4, 4, start_step=3)
    assert not caplog.records
    run(tmp_path, 7, 7, start_step=6)
    assert "metrics.jsonl has no rows of updates 5 to 6" in caplog.text
    (tmp_path / "metrics.jsonl").unlink()
    run(tmp_path, 8, 8, start_step=7)
    assert "metrics.jsonl has no rows of updates 1 to 7" in caplog.text


def test_start_at_zero_begins_the_files_anew(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)  # a row of step 0, measured before the first update, is dropped like the rest
    run(tmp_path, 1, 2)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"reward": 1}', '{"step": "1"}', ""])
def test_a_damaged_line_is_reported_not_skipped(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(RunLogError, match=r"metrics\.jsonl:2 "):
        read_rows(path)
    with pytest.raises(RunLogError, match=r"metrics\.jsonl:2 "):
        make_logger(tmp_path, start_step=1)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="none"):
        read_rows(tmp_path / "none")


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    logger = make_logger(tmp_path / "run", is_main=False, report_to=("jsonl", "tensorboard"), progress=stream)
    logger.log(1, {"reward": 1.0})
    logger.log_rollouts(1, [{"completion": "x"}])
    logger.close()
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


def test_report_to_chooses_the_writers(tmp_path: Path) -> None:
    logger = make_logger(tmp_path, report_to=())
    logger.log(1, {"reward": 1.0})
    logger.log_rollouts(1, [{"completion": "x"}])
    logger.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="mlflow"):
        make_logger(tmp_path, report_to=("mlflow",))


def test_a_metric_may_not_take_the_name_of_the_row_number(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="step"):
        make_logger(tmp_path).log(1, {"step": 2.0})


def test_tensorboard_has_every_number_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = make_logger(tmp_path, report_to=("tensorboard",))
    logger.log(1, {f"rewards/{i}": i / 8 for i in range(400)})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # what a killed run would leave
    assert [events.Scalars(f"rewards/{i}")[0].value for i in range(400)] == [i / 8 for i in range(400)]
    logger.close()


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, first, last in ((0, 1, 4), (2, 3, 5)):  # the second run resumes at 2
        logger = make_logger(tmp_path, start_step, report_to=("tensorboard",))
        for step in range(first, last + 1):
            logger.log(step, {"rewards/accuracy": step + start_step / 10})
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, round(event.value, 3)) for event in events.Scalars("rewards/accuracy")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2), (5, 5.2)]


def test_tensorboard_has_the_first_group_of_an_update_with_numbers_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = {"completion": "<b>\n\n# one | two\n", "question": "Which?\nA. this"}
    rows = [{**rollout_row(2, prompt, place), **said} for prompt in range(2) for place in range(2)]
    logger = make_logger(tmp_path, report_to=("tensorboard",))
    logger.log_rollouts(1, rows)  # run.logging_steps=2: no row of metrics
    logger.log(2, {"reward": 0.5})
    logger.log_rollouts(2, rows)
    logger.log_rollouts(2, [])  # of supervised fine-tuning
    logger.close()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("completions/text_summary")
    assert event.step == 2
    # Lines that are indented are shown as they are.
    completion = "\n\n    <b>\n    \n    # one | two\n"
    assert event.tensor_proto.string_val[0].decode() == (
        f"Question\n\n    Which?\n    A. this\n\nSolution\n\n    {rows[0]['solution']}"
        f"\n\nReward {rows[0]['reward']:g}, advantage +{rows[0]['advantage']:g}{completion}"
        f"\n\nReward {rows[1]['reward']:g}, advantage {rows[1]['advantage']:g}{completion}"
    )


def test_plain_progress_is_a_few_lines_with_the_rest_of_the_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    logger = make_logger(tmp_path, progress=stream)
    for step in range(1, 101):
        logger.log(step, {"reward": 0.5, "loss": 0.25})
    logger.log(100, {"eval/accuracy": 0.75})
    logger.close()
    lines = stream.getvalue().splitlines()
    assert 15 <= len(lines) <= 25
    assert "\r" not in stream.getvalue()
    assert lines[0].startswith("step 1/100  reward 0.500  loss 0.250")
    assert lines[-2].startswith("step 100/100")
    assert lines[-2].endswith(" 0:00 left")
    assert lines[-1] == "step 100/100  eval/accuracy 0.750"


def test_plain_progress_appears_when_only_some_steps_are_logged(tmp_path: Path) -> None:
    stream = io.StringIO()
    logger = make_logger(tmp_path, progress=stream)
    for step in range(7, 101, 7):
        logger.log(step, {"reward": 0.5})
    logger.close()
    assert len(stream.getvalue().splitlines()) == 14  # every one: each is more than a twentieth on


class Full(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_progress_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    logger = make_logger(tmp_path, progress=Full())
    logger.log(1, {"reward": 0.5})
    logger.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal_counts_from_the_resumed_step(tmp_path: Path) -> None:
    stream = Terminal()
    logger = make_logger(tmp_path, start_step=40, progress=stream)
    logger.log(41, {"reward": 0.5})
    time.sleep(0.15)  # the bar redraws at most every 0.1 s
    logger.log(50, {"reward": 0.625})
    logger.log(50, {"eval/accuracy": 0.5})  # a second row of a step does not count as an update
    logger.close()
    assert "50/100" in stream.getvalue()
    assert "reward=0.625" in stream.getvalue()
    assert "51/100" not in stream.getvalue()
