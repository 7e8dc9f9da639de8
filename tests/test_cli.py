"""The `fastr1` command and the script that launchers run."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trainer_toys import write_world

from fastr1 import cli, train
from fastr1.config import shipped_configs
from fastr1.evaluation.chat import chat
from fastr1.schema import DataError
from fastr1.training.agreement import PeerError, on_every_rank

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = [
    *("train", "sft", "check-data", "frames", "eval", "chat", "demo-data", "demo", "report", "compare", "doctor"),
]
MINIMAL = {"model": {"path": "m"}, "data": {"train_file": "t.jsonl", "video_root": "v"}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MINIMAL))
    return path


class Recorder:
    """Stands in for a module whose functions record how they were called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, name: str, result: Any = None) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        fake = ModuleType(module)

        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            if isinstance(result, Exception):
                raise result
            return result

        setattr(fake, name, record)
        monkeypatch.setitem(sys.modules, module, fake)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text
    example = text.split("example:\n")[1].strip()
    words = shlex.split(example)
    assert words[:2] == ["fastr1", name]
    cli.build_parser().parse_args(words[1:])


def test_a_file_to_write_is_output_and_a_folder_output_dir() -> None:
    """Everywhere; the shorter --out is what argparse takes for either."""
    (commands,) = (action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    found = {
        name: {
            option: action.metavar for action in parser._actions for option in action.option_strings if "out" in option
        }
        for name, parser in commands.choices.items()
    }
    assert {name: options for name, options in found.items() if options} == {
        "check-data": {"--output-dir": "DIR", "--timeout-seconds": None},
        "frames": {"--output": "FILE"},
        "eval": {"--output": "JSON"},
        "demo-data": {"--output-dir": "DIR"},
        "demo": {"--output-dir": "DIR"},
        "report": {"--output": "HTML"},
        "compare": {"--output": "HTML"},
    }
    assert cli.build_parser().parse_args(["frames", "clip.mp4", "--out", "sheet.png"]).output == "sheet.png"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"    {name}" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["train"],
        ["train", "--config"],
        ["train", "--config", "c.json", "--num-processes", "0"],
        ["eval", "--model", "m"],
        ["eval", "--model", "m", "--data-file", "d", "--video-root", "v", "--num-frames", "0"],
        ["eval", "--model", "m", "--data-file", "d", "--video-root", "v", "--batch-size", "-1"],
        ["chat", "m", "v"],
        ["chat", "m", "v", "q", "--temperature", "-1"],
        ["chat", "m", "v", "q", "--temperature", "nan"],
        ["chat", "m", "v", "q", "--temperature", "hot"],
        ["chat", "m", "v", "q", "--top-p", "0"],
        ["chat", "m", "v", "q", "--top-p", "1.1"],
        ["chat", "m", "v", "q", "--seed", "-1"],
        ["demo-data", "--seed", "-1"],
        ["demo", "--seed", "-1"],
        ["chat", "m", "v", "q", "--dtype", "float16"],
        ["chat", "m", "v", "q", "--backend", "decord"],
        ["chat", "m", "v", "q", "--max-frames", "0"],
        ["eval", "--model", "m", "--data-file", "d", "--video-root", "v", "--num-processes", "0"],
        ["eval", "--model", "m", "--data-file", "d", "--video-root", "v", "--policy", "ignore"],
        ["eval", "--model", "m", "--data-file", "d", "--video-root", "v", "--max-bad-fraction", "2"],
        ["demo-data", "--num-train", "many"],
        ["report"],
        ["frames", "clip.mp4"],
        ["frames", "clip.mp4", "--output", "sheet.png", "--num-frames", "0"],
        ["report", "run", "--port", "x"],
        ["compare"],
        ["check-data", "--config", "c.json", "--dry-run"],
        ["doctor", "--dry-run"],
    ],
)
def test_wrong_command_lines_exit_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "positive" not in capsys.readouterr().err  # the name of a function: what argparse says of a bare ValueError


def test_our_errors_are_one_line_and_exit_code_two(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--config", str(config), "--set", "optim.learnig_rate=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --set optim.learnig_rate=1: ")
    assert captured.err.count("\n") == 1
    assert "optim.learning_rate" in captured.err
    assert captured.out == ""


def test_our_errors_keep_their_traceback_when_debugging(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTR1_DEBUG", "1")
    with pytest.raises(cli.ConfigError):
        cli.main(["train", "--config", str(config), "--set", "grpo.beta=-1"])


def test_other_errors_are_not_dressed_up(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, "fastr1.training.grpo", "run_grpo", ValueError("from a library"))
    with pytest.raises(ValueError, match="from a library"):
        cli.main(["train", "--config", str(config)])


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert cli.report_errors(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_errors_from_inside_a_run_are_reported_too(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorder(monkeypatch, "fastr1.training.grpo", "run_grpo", DataError("t.jsonl:3: no such video"))
    assert cli.main(["train", "--config", str(config)]) == 2
    assert capsys.readouterr().err == "error: t.jsonl:3: no such video\n"


def test_of_several_ranks_one_tells_the_error(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    told = []
    for error in (PeerError("rank 0 failed"), on_every_rank(DataError("bad")), DataError("perhaps told by the first")):
        with monkeypatch.context() as patch:
            Recorder(patch, "fastr1.training.grpo", "run_grpo", error)
            assert cli.main(["train", "--config", str(config)]) == 2
        told.append((capsys.readouterr().err, len(waited)))
    assert told == [("", 0), ("error: bad\n", 0), ("error: perhaps told by the first\n", 1)]


def test_several_processes_get_the_same_arguments(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, "fastr1.training.launch", "run_processes", 7)
    settings = ["--set", "run.seed=7", "--set", "data.policy=skip"]
    assert cli.main(["train", "--config", str(config), "--num-processes", "3", *settings]) == 7
    assert recorder.calls == [((3, ["--config", str(config), *settings]), {})]
    assert cli.main(["train", "--config", str(config), "--num-processes", "3", "--set", "run.sed=7"]) == 2
    assert len(recorder.calls) == 1


def test_a_shipped_configuration_is_announced_once_and_passed_on_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(monkeypatch, "fastr1.training.launch", "run_processes", 0)
    assert cli.main(["train", "--config", "grpo", "--num-processes", "2"]) == 0
    file = str(shipped_configs()["grpo"])
    assert recorder.calls == [((2, ["--config", file]), {})]
    assert [message for message in caplog.messages if "shipped" in message] == [
        f"no file grpo here: taking the shipped {file}"
    ]


@pytest.mark.parametrize(
    ("command", "task", "module", "function"),
    [("train", "grpo", "fastr1.training.grpo", "run_grpo"), ("sft", "sft", "fastr1.training.sft", "run_sft")],
)
def test_training_commands_run_their_task_with_the_overrides(
    config: Path, monkeypatch: pytest.MonkeyPatch, command: str, task: str, module: str, function: str
) -> None:
    recorder = Recorder(monkeypatch, module, function)
    settings = ["--set", f"task={task}", "--set", "run.seed=7"]
    assert cli.main([command, "--config", str(config), *settings]) == 0
    assert train.main(["--local_rank=0", "--config", str(config), *settings]) == 0
    assert [(args[0].task, args[0].run.seed) for args, _ in recorder.calls] == [(task, 7), (task, 7)]


@pytest.mark.parametrize(("command", "task", "other"), [("train", "sft", "sft"), ("sft", "grpo", "train")])
def test_a_command_refuses_a_config_of_the_other_task(
    config: Path, capsys: pytest.CaptureFixture[str], command: str, task: str, other: str
) -> None:
    assert cli.main([command, "--config", str(config), "--set", f"task={task}"]) == 2
    assert f"task is '{task}'; run `fastr1 {other}`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_eval_prints_the_summary_and_honours_its_options(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--model", str(world / "base"), "--data-file", str(world / "questions.jsonl"), "--video-root", str(world)]
    options = ["--num-frames", "4", "--limit", "3", "--max-completion-length", "5", "--device", "cpu"]
    answers = []
    for number, more in enumerate(([], ["--control", "blank_video"], ["--instruction", "Be brief."])):
        output = tmp_path / f"{number}.json"
        assert cli.main(["eval", *files, *options, *more, "--output", str(output)]) == 0
        content = json.loads(output.read_text())
        assert json.loads(capsys.readouterr().out) == content["summary"]
        assert content["summary"]["num_questions"] == 3
        assert max(answer["completion_length"] for answer in content["answers"]) <= 5
        answers.append([answer["completion"] for answer in content["answers"]])
    assert answers[1] != answers[0] != answers[2]


@pytest.mark.parametrize("option", ["--seed", "--limit", "--batch-size", "--max-completion-length"])
def test_a_number_that_no_machine_counts_to_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    files = ["--model", str(world / "base"), "--data-file", str(world / "questions.jsonl"), "--video-root", str(world)]
    with pytest.raises(SystemExit):
        cli.main(["eval", *files, "--temperature", "1", option, str(2**63)])
    assert f"argument {option}: '{2**63}' is not a whole number of" in capsys.readouterr().err


def test_eval_refuses_a_bound_that_nothing_is_held_to(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--model", str(world / "base"), "--data-file", str(world / "questions.jsonl"), "--video-root", str(world)]
    options = ["--num-frames", "4", "--limit", "1", "--max-completion-length", "2", "--device", "cpu"]
    assert cli.main(["eval", *files, *options, "--max-bad-fraction", "0.5"]) == 2
    assert "--max-bad-fraction 0.5 has no effect without --policy skip" in capsys.readouterr().err
    assert cli.main(["eval", *files, *options, "--max-bad-fraction", "0.5", "--policy", "skip"]) == 0


def test_chat_prints_the_text(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(world / "base"), str(world / "0.mp4")]
    options = ["--num-frames", "4", "--max-completion-length", "5", "--device", "cpu", "--instruction", ""]
    printed = []
    for question in ("Which?\\nOptions:", "Which?\nOptions:", "Which? Options:"):
        assert cli.main(["chat", *arguments, question, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert cli.main(["chat", *arguments, "Which?\nOptions:", *options, "--temperature", "1"]) == 0
    assert capsys.readouterr().out != printed[0]
    assert (
        printed[0]
        == chat(
            model_path=arguments[0],
            video_path=arguments[1],
            question="Which?\nOptions:",
            num_frames=4,
            max_completion_length=5,
            device="cpu",
            instruction="",
        ).format()
        + "\n"
    )


def test_demo_data_honours_its_options(tmp_path: Path) -> None:
    options = ["--num-train", "4", "--num-test", "2"]
    for folder, seed in (("a", "9"), ("b", "3")):
        assert cli.main(["demo-data", "--output-dir", str(tmp_path / folder), *options, "--seed", seed]) == 0
    rows = [(tmp_path / folder / "train.jsonl").read_text() for folder in "ab"]
    assert rows[0] != rows[1]
    assert [len(row.splitlines()) for row in rows] == [4, 4]
    assert len((tmp_path / "a" / "test.jsonl").read_text().splitlines()) == 2


def test_demo_data_names_a_folder_that_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo-data", "--output-dir", str(tmp_path / "file"), "--num-train", "1", "--num-test", "1"]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_frames_writes_a_sheet_and_prints_its_path(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheets = [tmp_path / "a.png", tmp_path / "b.png"]
    for sheet, options in zip(sheets, ([], ["--num-frames", "3"]), strict=True):
        assert cli.main(["frames", str(world / "0.mp4"), "--output", str(sheet), *options]) == 0
        assert capsys.readouterr().out == f"{sheet}\n"
    assert sheets[0].stat().st_size > sheets[1].stat().st_size > 0
    assert cli.main(["frames", str(world / "none.mp4"), "--output", str(sheets[0])]) == 2
    assert "none.mp4: does not exist" in capsys.readouterr().err


def test_report_command_prints_the_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.png'}\n{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.png").exists()
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def run_script(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in `folder` with nothing of this project installed or on the path."""
    blocker = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(f)]; "
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", blocker + code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


SCRIPT = REPOSITORY / "fastr1" / "train.py"
KERNELS = f"sys.path.append({str(REPOSITORY / 'kernels')!r}); "  # as an installation would
# What `python fastr1/train.py …` does: the folder of the script is first on the path.
RUN = (
    f"import runpy; sys.path[:1] = [{str(SCRIPT.parent)!r}]; sys.argv = ['train.py', *ARGUMENTS]\n"
    f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    "except SystemExit as error: print('code', error.code)\n"
)


def test_script_reports_a_wrong_config_without_importing_torch(tmp_path: Path) -> None:
    arguments = ["--config", str(REPOSITORY / "configs" / "grpo.json"), "--set", "grpo.bta=1", "--local_rank=0"]
    check = "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = run_script(tmp_path, RUN.replace("ARGUMENTS", repr(arguments)) + check)
    assert done.stdout.splitlines() == ["code 2", "False False"], done.stderr
    assert done.stderr == "error: --set grpo.bta=1: unknown key 'grpo.bta'; did you mean 'grpo.beta'?\n"


def test_script_finds_both_packages_and_keeps_its_folder_off_the_path(tmp_path: Path) -> None:
    rooms = [path.stem for path in SCRIPT.parent.iterdir() if path.suffix in ("", ".py") and path.stem != "__init__"]
    assert {"config", "data", "models", "schema"} <= set(rooms)
    check = (
        f"ROOMS = {sorted(set(rooms) - {'__pycache__'})!r}\n"
        "from importlib.util import find_spec as find\n"
        "print(find('fastr1').origin, find('fastr1_kernels').origin, [find(name) for name in ROOMS])"
    )
    done = run_script(tmp_path, RUN.replace("ARGUMENTS", "['--help']") + check)
    lines = done.stdout.splitlines()
    assert "code 0" in lines, done.stderr
    package, kernels = REPOSITORY / "fastr1" / "__init__.py", REPOSITORY / "kernels" / "fastr1_kernels" / "__init__.py"
    found = lines[-1].removeprefix(f"{package} {kernels} ")
    assert found == str([None] * (len(rooms) - ("__pycache__" in rooms)))


def test_importing_the_script_as_a_module_leaves_the_path_alone() -> None:
    done = run_script(REPOSITORY, f"{KERNELS}before = list(sys.path); import fastr1.train; print(before == sys.path)")
    assert done.stdout == "True\n", done.stderr


def test_launcher_rank_reaches_the_environment_unless_set(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, "fastr1.training.grpo", "run_grpo")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    train.main(["--local_rank", "3", "--config", str(config)])
    assert os.environ["LOCAL_RANK"] == "3"
    train.main(["--local_rank", "1", "--config", str(config)])
    assert os.environ["LOCAL_RANK"] == "3"
    monkeypatch.delenv("LOCAL_RANK")
    train.main(["--local_rank", "-1", "--config", str(config)])
    assert "LOCAL_RANK" not in os.environ


def test_help_is_quick(tmp_path: Path) -> None:
    code = "import fastr1.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = run_script(REPOSITORY, KERNELS + code)
    assert done.stdout.splitlines()[-1] == "False"
