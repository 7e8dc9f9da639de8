"""The demo from command to summary, its two trainings and its evaluations replaced by what they would leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import listen, until
from trainer_toys import child_environment

from fastr1 import cli
from fastr1.config import load_config, save_config
from fastr1.demo import pipeline
from fastr1.evaluation.multiple_choice import CONTROLS
from fastr1.reporting.run_log import read_rows
from fastr1.schema import Clip, DataError, Sample

LAUNCH = pipeline.launch
ROOT = Path(__file__).resolve().parents[2]
RATES = {None: 0.71, "shuffled_frames": 0.41, "repeated_frame": 0.29, "blank_video": 0.19}


class Stages:
    """Records what the pipeline asks for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[int] = []
        self.trainings: list[tuple[str, dict[str, str]]] = []
        self.evaluations: list[tuple[str, str | None]] = []
        self.recordings: list[tuple[str, str | None, Any]] = []
        self.sizes: list[dict[str, int]] = []
        monkeypatch.setattr(pipeline, "write_demo_dataset", self.write)
        monkeypatch.setattr(pipeline, "launch", self.launch)
        monkeypatch.setattr(pipeline, "evaluate_checkpoint", self.evaluate)

    def write(self, folder: Path, *, seed: int, **sizes: int) -> None:
        self.seeds.append(seed)
        self.sizes.append(sizes)

    def launch(self, name: str, overrides: list[str]) -> None:
        settings = dict(override.split("=", 1) for override in overrides)
        self.trainings.append((name, settings))
        rows = [{"step": step, "reward": step / 10, "completion_length": 20.0} for step in (1, 2, 3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(settings["run.output_dir"]) / "metrics.jsonl").write_text(lines)

    def evaluate(self, *, model_path: Path, control: str | None, output: Path, **others: Any) -> dict[str, float]:
        run = model_path.parent.name
        self.evaluations.append((run, control))
        if "recording" in others:
            self.recordings.append((run, control, others["recording"]))
        accuracy = RATES[control] if run == "grpo" else 0.5
        rates = {"accuracy": accuracy, "strict_accuracy": accuracy / 2, "format_rate": 0.98}
        rates |= {"completion_length": 27.0, "num_questions": 150.0}
        rates |= {"accuracy/first": accuracy / 2, "accuracy/order": accuracy}
        output.parent.mkdir(exist_ok=True)
        is_right = run == "grpo" and control is None
        answer = {"sample_id": "1", "question": "Which?", "completion": f"{run} {control}", "solution": "A"}
        answer |= {"is_correct": is_right, "is_well_formed": True}
        output.write_text(json.dumps({"summary": rates, "answers": [answer]}))
        return rates


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def test_controls_are_measured_on_the_trained_model_and_told(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = pipeline.run_demo(tmp_path)
    assert set(pipeline.SHOWN_INSTEAD) == set(CONTROLS)
    assert stages.evaluations == [("coldstart", None), ("grpo", None), *(("grpo", c) for c in pipeline.SHOWN_INSTEAD)]
    assert {control: rates["accuracy"] for control, rates in summary["controls"].items()} == {
        control: rate for control, rate in RATES.items() if control
    }
    heading, total, *kinds = capsys.readouterr().out.partition("held-out questions")[2].splitlines()
    columns = ["cold start", "after GRPO", "shuffled frames", "repeated frame", "blank video"]
    assert sorted(columns, key=heading.index) == columns
    assert " ".join(total.split()) == "accuracy 50.0 % 71.0 % 41.0 % 29.0 % 19.0 %"
    assert kinds[0].split()[:3] == ["strict_accuracy", "25.0", "%"]
    assert kinds[1].split()[:3] == ["accuracy/first", "25.0", "%"]


def test_the_demo_ends_by_naming_the_page_of_its_run(
    tmp_path: Path, stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run_demo(tmp_path)
    page = tmp_path / "grpo" / "report.html"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f": {page}")
    text = page.read_text()
    assert "50.0 %" in text
    assert "1 fixed, 0 broken of 1" in text
    kept = {file.stem: json.loads(file.read_text())["answers"][0] for file in (tmp_path / "grpo/evaluation").iterdir()}
    said = {name: answer["completion"] for name, answer in kept.items()}
    assert said == {"before": "coldstart None", "after": "grpo None", **{c: f"grpo {c}" for c in CONTROLS}}


def test_all_held_out_clips_are_on_the_page_and_each_once(tmp_path: Path, stages: Stages) -> None:
    """Evaluations during training ask fewer questions than those before and after it."""
    pipeline.run_demo(tmp_path)
    ((run, control, recording),) = stages.recordings
    assert (run, control) == ("grpo", None)
    clip = Clip(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), tuple(range(8)), (0.0,) * 8, 1.0, 8.0, "pyav")
    with recording(0, 1) as note_clip:
        note_clip(Sample("1", "", "?", "A", tmp_path / "data" / "videos" / "1.mp4", "x"), clip)
    (row,) = read_rows(tmp_path / "grpo" / "frames" / "index.jsonl", key="sheet", kind=str)
    assert (row["video"], row["path"]) == ("videos/1.mp4", str(tmp_path / "data" / "videos" / "1.mp4"))


def test_summary_holds_conditions_and_seconds_of_every_phase(tmp_path: Path, stages: Stages) -> None:
    summary = pipeline.run_demo(tmp_path, seed=4)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert json.loads((tmp_path / "grpo" / "summary.json").read_text()) == summary
    phases = ["data", "cold_start", "evaluate_before", "grpo", "evaluate_after"]
    assert list(summary["seconds"]) == [*phases, *(f"evaluate_{control}" for control in pipeline.SHOWN_INSTEAD)]
    conditions = summary["conditions"]
    assert set(conditions) == {"commit", "dirty", "date", "device", "cores", "threads", "torch"}
    assert conditions["cores"] >= 1
    assert conditions["date"].endswith("+00:00")
    assert (summary["seed"], summary["updates"], summary["num_questions"], summary["chance"]) == (4, 3, 150, 0.2)


def test_seed_of_the_command_line_reaches_data_and_both_trainings(tmp_path: Path, stages: Stages) -> None:
    assert cli.main(["demo", "--output-dir", str(tmp_path), "--seed", "3"]) == 0
    assert stages.seeds == [3]
    assert [(name, settings["run.seed"]) for name, settings in stages.trainings] == [
        ("demo_coldstart", "3"),
        ("grpo", "3"),
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 3


def test_quick_demo_goes_through_every_phase_with_less(tmp_path: Path, stages: Stages) -> None:
    assert cli.main(["demo", "--output-dir", str(tmp_path), "--quick"]) == 0
    assert stages.sizes == [pipeline.QUICK_DATA]
    assert [settings["optim.max_steps"] for _, settings in stages.trainings] == ["2", "2"]
    assert len(stages.evaluations) == 2 + len(CONTROLS)
    assert "quick" in json.loads((tmp_path / "summary.json").read_text())["title"]
    assert cli.main(["demo", "--output-dir", str(tmp_path)]) == 0
    assert stages.sizes[1] == {}
    assert not any("optim.max_steps" in settings for _, settings in stages.trainings[2:])


@pytest.mark.parametrize(("arguments", "expected"), [([], "--seed 0"), (["SEED=2"], "--seed 2")])
def test_make_demo_passes_its_seed(arguments: list[str], expected: str) -> None:
    command = ["make", "--dry-run", "demo", *arguments]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in printed.splitlines() if "fastr1 demo" in line)
    assert line.endswith(expected)


def test_a_second_demo_replaces_the_first(tmp_path: Path, stages: Stages) -> None:
    pipeline.run_demo(tmp_path)
    (tmp_path / "grpo" / "checkpoints").mkdir()
    pipeline.run_demo(tmp_path, seed=1)
    assert not (tmp_path / "grpo" / "checkpoints").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 1


@pytest.mark.parametrize("name", ["coldstart", "grpo"])
def test_a_run_that_no_demo_made_is_never_deleted(tmp_path: Path, stages: Stages, name: str) -> None:
    pipeline.run_demo(tmp_path)
    (tmp_path / name / pipeline.MARK).unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=rf"{name} holds a run that no demo made.*--output-dir"):
        pipeline.run_demo(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_of_a_demo_that_was_gone_on_with_is_never_deleted(
    tmp_path: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "grpo"
    changes = [f"run.output_dir={run}"]
    pipeline.run_demo(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_to_its_end", lambda command, environment: None)
        with pytest.raises(DataError, match="grpo was stopped before its end; start the demo again"):
            LAUNCH(pipeline.GRPO_CONFIG, changes)
        (run / "final").mkdir()
        LAUNCH(pipeline.GRPO_CONFIG, changes)
    save_config(load_config(pipeline.GRPO_CONFIG, changes), run / "config.json")  # as the training does
    pipeline.run_demo(tmp_path)
    for resumed in ([], ["run.resume_from_checkpoint=last"]):  # of the second demo nothing was begun
        save_config(load_config(pipeline.GRPO_CONFIG, [*changes, *resumed]), run / "config.json")
        with pytest.raises(DataError, match="grpo holds a run that no demo made, or that was gone on with by hand"):
            pipeline.run_demo(tmp_path)


# A launcher that ends at once, and what it started, which needs a moment for a checkpoint.
LAUNCHER = """
(trap 'sleep 1; touch saved; exit 0' TERM; touch begun; while :; do sleep 0.1; done) &
wait
"""


# One process forks a demo for every folder. In a folder "SIGTERM, early" the signal comes while the launcher is being
# started.
DEMOS = """
import os, signal, subprocess, sys, threading, time
from fastr1.cli import report_errors
from fastr1.demo.child import run_to_its_end as run

class Interrupted(subprocess.Popen):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        while not os.path.exists("begun"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[early])

assert threading.active_count() == 1
children = {}
for folder in sys.argv[1:]:
    if (child := os.fork()) == 0:
        os.chdir(folder)
        early = folder.removesuffix(", early")
        if early != folder:
            subprocess.Popen = Interrupted
        open("pid", "w").write(str(os.getpid()))
        try:
            code = report_errors(lambda: run(["sh", "../launcher"], {}))
        except SystemExit as end:
            code = end.code
        os._exit(code)
    children[child] = folder
while children:
    child, status = os.wait()
    folder = children.pop(child)
    ended = f"{os.waitstatus_to_exitcode(status)} {os.path.exists(folder + '/saved')}"
    open(folder + "/ended", "w").write(ended)
"""


def test_a_signal_to_the_demo_alone_ends_its_training_first(tmp_path: Path) -> None:
    codes = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}
    codes |= {f"{name}, early": code for name, code in codes.items()}
    (tmp_path / "launcher").write_text(LAUNCHER)
    for name in codes:
        (tmp_path / name).mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", DEMOS, *codes], cwd=tmp_path, env=child_environment(), preexec_fn=listen
    )
    for name in ("SIGTERM", "SIGHUP", "SIGINT"):
        until(lambda name=name: (tmp_path / name / "begun").exists())
        os.kill(int((tmp_path / name / "pid").read_text()), signal.Signals[name])
    assert parent.wait(60) == 0
    for name, code in codes.items():
        assert (tmp_path / name / "ended").read_text() == f"{code} True", name  # its training had saved by then


# The demo as process 1 of a container: what its launcher leaves behind becomes its own, and is never waited for.
FIRST_PROCESS = """
import ctypes, os, signal, sys, threading, time
from fastr1.cli import report_errors
from fastr1.demo.child import run_to_its_end
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
def interrupt():
    while not os.path.exists("begun"):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
sys.exit(report_errors(lambda: run_to_its_end(["sh", "launcher"], {})))
"""


def test_a_process_that_nobody_waits_for_does_not_hold_up_the_end(tmp_path: Path) -> None:
    (tmp_path / "launcher").write_text(LAUNCHER)
    command = [sys.executable, "-c", FIRST_PROCESS]
    options: dict[str, Any] = {"capture_output": True, "text": True, "preexec_fn": listen, "timeout": 30}
    done = subprocess.run(command, cwd=tmp_path, env=child_environment(), **options)
    assert (done.returncode, (tmp_path / "saved").exists()) == (130, True)
    assert "the same command begins it anew" in done.stderr


def test_an_empty_folder_is_used(tmp_path: Path, stages: Stages) -> None:
    (tmp_path / "grpo").mkdir()
    pipeline.run_demo(tmp_path)
    assert (tmp_path / "grpo" / pipeline.MARK).exists()
