"""Trackers: what they are given, when they are missing, and that a resumed run goes on in theirs.

Stand-ins take the place of the packages, with the signatures of wandb 0.31.0 and trackio 0.43.0, which the last tests
compare with and use where they are installed.
"""

from __future__ import annotations

import inspect
import io
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fastr1.config import ConfigError
from fastr1.reporting.run_log import RunLogger
from fastr1.reporting.trackers import check_trackers

NAMES = ("wandb", "trackio")


class Picture:
    def __init__(self, data_or_path: str) -> None:
        self.path = data_or_path


class Table:
    def __init__(self, columns: list[str] | None = None, data: list[list[Any]] | None = None) -> None:
        self.columns, self.data = columns, data


class Run:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.metrics = options, []  # type: ignore[var-annotated]
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[int | None] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert not self.finished
        rest = {name: value for name, value in data.items() if name != "update"}
        self.logged.append((data.get("update", step), rest))

    def finish(self, exit_code: int | None = None) -> None:
        self.finished.append(exit_code)


def stand_in(name: str, **changes: Any) -> ModuleType:
    module = ModuleType(name)
    module.runs = []  # type: ignore[attr-defined]

    def init(**options: Any) -> Run:
        module.runs.append(Run(options))  # type: ignore[attr-defined]
        return module.runs[-1]  # type: ignore[attr-defined,no-any-return]

    content = {"init": init, "Table": Table, "Image": Picture, "Error": KeyError, "login": lambda prompt: True}
    module.__dict__.update({**content, "setup": lambda: SimpleNamespace(settings=SimpleNamespace(mode="online"))})
    module.__dict__.update(changes)
    return module


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    modules = {name: stand_in(name) for name in NAMES}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    return modules


def make_logger(folder: Path, start_step: int = 0, report_to: tuple[str, ...] = NAMES, **options: Any) -> RunLogger:
    options = {"is_main": True, "progress": io.StringIO(), "settings": {"optim": {"rate": 2}}, **options}
    return RunLogger(folder, report_to, 10, start_step=start_step, **options)


def row(video: str, completion: str, **parts: float) -> dict[str, Any]:
    rest = {"sample_id": "7", "question": "Q?", "solution": "<answer>A</answer>", "reward": 1.5, "advantage": -0.5}
    return {**rest, "video": video, "completion": completion, "rewards": parts, "rank": 0, "valid": True}


def write_index(folder: Path) -> Path:
    (folder / "frames").mkdir(parents=True)
    sheet = folder / "frames" / "x.jpg"
    Image.new("RGB", (8, 8)).save(sheet)
    line = {"path": "videos/1.mp4", "video": "1.mp4", "sheet": "frames/x.jpg"}
    (folder / "frames/index.jsonl").write_text(json.dumps(line) + "\n")
    return sheet


def test_every_row_of_metrics_and_its_completions_with_one_picture_per_clip(
    tmp_path: Path, both: dict[str, Any]
) -> None:
    sheet = write_index(tmp_path)
    logger = make_logger(tmp_path)
    logger.log_rollouts(1, [row("videos/1.mp4", "none logged")])  # run.logging_steps=2: no row of metrics
    logger.log(2, {"reward": 0.5, "kl": math.inf})
    rows = [row("videos/1.mp4", "a", format=1.0), row("videos/1.mp4", "b", accuracy=0.5), row("videos/2.mp4", "c")]
    logger.log_rollouts(2, rows)
    logger.log(3, {"reward": 0.75})
    logger.log_rollouts(3, [])  # of supervised fine-tuning
    logger.close()
    for name, module in both.items():
        (run,) = module.runs
        assert [(step, list(data)) for step, data in run.logged] == [
            (2, ["reward", "kl"]),
            (2, ["rollouts"]),
            (3, ["reward"]),
        ], name
        assert run.logged[0][1] == {"reward": 0.5, "kl": math.inf}
        table = run.logged[1][1]["rollouts"]
        columns = ["sample_id", "question", "completion", "solution", "reward", "advantage"]
        assert table.columns == [*columns, "rewards/format", "rewards/accuracy", "frames"]
        fixed = ("<answer>A</answer>", 1.5, -0.5)
        assert [cells[:-1] for cells in table.data] == [
            ["7", "Q?", "a", *fixed, 1.0, None],
            ["7", "Q?", "b", *fixed, None, 0.5],
            ["7", "Q?", "c", *fixed, None, None],
        ]
        first, second, third = (cells[-1] for cells in table.data)
        assert first is second
        assert (first.path, third) == (str(sheet), None)
    assert both["wandb"].runs[0].metrics == [("update", None), ("*", "update")]


def test_the_run_of_a_tracker_is_named_after_the_folder_and_shows_the_settings(
    tmp_path: Path, both: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_logger(tmp_path / "one").close()
    wandb, trackio = (both[name].runs[0].options for name in NAMES)
    assert (wandb["project"], wandb["name"], wandb["dir"]) == ("fastr1", "one", str(tmp_path / "one"))
    assert trackio["project"] == "fastr1"
    assert trackio["name"].startswith("one-")
    assert wandb["config"] == trackio["config"] == {"optim": {"rate": 2}}
    for name, value in (("WANDB_PROJECT", "mine"), ("WANDB_NAME", "n"), ("TRACKIO_PROJECT", "yours")):
        monkeypatch.setenv(name, value)
    make_logger(tmp_path / "two").close()
    wandb, trackio = (both[name].runs[1].options for name in NAMES)
    assert (wandb["project"], wandb["name"], trackio["project"]) == ("mine", "n", "yours")


def test_a_resumed_run_goes_on_in_the_same_run_and_a_new_one_in_another(tmp_path: Path, both: dict[str, Any]) -> None:
    for start_step in (0, 4, 0):
        make_logger(tmp_path, start_step).close()
    for name, key in (("wandb", "id"), ("trackio", "name")):
        first, resumed, anew = (run.options for run in both[name].runs)
        assert first[key] == resumed[key] != anew[key]
        assert {options["resume"] for options in (first, resumed, anew)} == {"allow"}
    make_logger(tmp_path, 4, ("trackio",)).close()  # without the other, which keeps its id
    make_logger(tmp_path, 4).close()
    assert both["wandb"].runs[3].options["id"] == both["wandb"].runs[2].options["id"]


def test_closing_ends_the_run_and_says_whether_it_failed(tmp_path: Path, both: dict[str, Any]) -> None:
    for has_failed in (False, True):
        make_logger(tmp_path).close(has_failed=has_failed)
    assert [run.finished for run in both["wandb"].runs] == [[0], [1]]
    assert [len(run.finished) for run in both["trackio"].runs] == [1, 1]


def test_only_what_is_named_is_imported_and_only_the_first_process_reports(
    tmp_path: Path, both: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    make_logger(tmp_path, report_to=("jsonl", "trackio")).close()
    check_trackers(("jsonl", "tensorboard", "trackio"))
    assert len(both["trackio"].runs) == 1
    make_logger(tmp_path, report_to=NAMES, is_main=False).log(1, {"reward": 1.0})
    assert len(both["trackio"].runs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tracker_is_refused_with_what_to_install(
    name: str, both: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers((name,))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"run\.report_to names '{name}'.*pip install {name}, or leave it out"):
        check_trackers(("jsonl", name))
    # the folder `wandb` that a run leaves in the current directory can be imported too
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(ConfigError, match=f"'{name}', which is not installed: pip install {name}"):
        check_trackers((name,))


def test_a_missing_tensorboard_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(("tensorboard",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(("jsonl",))
    with pytest.raises(ConfigError, match="'tensorboard', which is not installed: pip install tensorboard, or leave"):
        check_trackers(("jsonl", "tensorboard"))


def test_wandb_without_a_key_is_refused_unless_it_is_offline(
    both: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prompt: bool) -> bool:
        assert prompt is False  # nobody may be there to answer
        raise KeyError("no such user")

    for login, reason in ((lambda prompt: False, "which has no key here"), (refuse, "no such user")):
        both["wandb"].login = login
        with pytest.raises(ConfigError, match=f"{reason}.*: wandb login, or set WANDB_MODE=offline"):
            check_trackers(("wandb",))
        monkeypatch.setenv("RANK", "1")  # which reports nothing
        check_trackers(("wandb",))
        monkeypatch.delenv("RANK")
    both["wandb"].setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    check_trackers(("wandb",))


# With the packages themselves


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("TRACKIO_DIR", str(tmp_path / "store"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


SCRIPT = """
import io, os, signal, sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
from test_trackers import make_logger, row
logger = make_logger(Path({run!r}), {start}, ({name!r},))
logger.log({start} + 1, {{"reward": 0.625, "kl": float("nan")}})
logger.log_rollouts({start} + 1, [row("videos/1.mp4", "a", format=1.0), row("videos/2.mp4", "b")])
if {is_killed}:
    time.sleep(3)
    os.kill(os.getpid(), signal.SIGKILL)
logger.close()
"""


def report(run: Path, name: str, start: int = 0, is_killed: bool = False) -> None:
    """In a process of its own, as both keep state in theirs."""
    fields = {"folder": str(Path(__file__).parent), "run": str(run), "name": name}
    code = SCRIPT.format(**fields, start=start, is_killed=is_killed)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert result.returncode == (-signal.SIGKILL if is_killed else 0), result.stderr


def trackio_rows(store: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """Run, step and content of what the database of the project holds."""
    with sqlite3.connect(store / "fastr1.db") as database:
        found = database.execute("select run_id, step, metrics from metrics order by id").fetchall()
    return [(run, step, json.loads(metrics)) for run, step, metrics in found]


@pytest.mark.parametrize("is_killed", [False, True])
def test_trackio_holds_numbers_and_completions_with_their_frames(environment: Path, is_killed: bool) -> None:
    pytest.importorskip("trackio")
    sheet = write_index(environment / "run")
    report(environment / "run", "trackio", is_killed=is_killed)
    report(environment / "run", "trackio", start=1)
    rows = trackio_rows(environment / "store")
    assert len({run for run, _, _ in rows}) == 1
    assert [(step, list(content)) for _, step, content in rows] == [
        (1, ["reward", "kl"]),
        (1, ["rollouts"]),
        (2, ["reward", "kl"]),
        (2, ["rollouts"]),
    ]
    assert rows[0][2]["reward"] == 0.625
    first, second = rows[1][2]["rollouts"]["_value"]
    assert (first["completion"], first["rewards/format"], second["frames"]) == ("a", 1.0, None)
    copy = environment / "store" / "media" / first["frames"]["file_path"]
    assert copy.read_bytes() == sheet.read_bytes()


def test_wandb_holds_numbers_and_completions_with_their_frames(environment: Path) -> None:
    pytest.importorskip("wandb")
    sheet = write_index(environment / "run")
    for start in (0, 1):
        report(environment / "run", "wandb", start=start)
    files = sorted((environment / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1  # its id
    for file in files:
        assert b"0.625" in file.read_bytes()
        (table,) = file.parent.glob("files/media/table/*.json")
        stored = json.loads(table.read_text())
        assert stored["columns"][-1] == "frames"
        assert [cells[2] for cells in stored["data"]] == ["a", "b"]
        assert stored["data"][1][-1] is None
    staged = [file.read_bytes() for file in (environment / "data").rglob("*") if file.is_file()]
    assert staged.count(sheet.read_bytes()) == 2  # to be sent with the table of each
    tables = [json.loads(content) for content in staged if content.startswith(b"{") and b'"image-file"' in content]
    assert tables


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_ins_take_what_the_package_takes(name: str) -> None:
    package = pytest.importorskip(name)
    run = package.Run
    used = {
        package.init: {"project", "name", "resume", "config"} | {"wandb": {"id", "dir"}, "trackio": {"embed"}}[name],
        package.Table.__init__: {"columns", "data"},
        run.log: {"step"},
        run.finish: {"exit_code"} if name == "wandb" else set(),
    }
    for function, names in used.items():
        assert names <= set(inspect.signature(function).parameters), function
    if name == "wandb":
        assert {"step_metric"} <= set(inspect.signature(run.define_metric).parameters)
        assert {"prompt"} <= set(inspect.signature(package.login).parameters)
        assert package.Error is not None
        assert package.setup().settings.mode
