"""Stopping and failing of several processes: the parent with scripts that stand in for training, and the whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import is_running, listen, processes_of, until
from trainer_toys import ROOT, child_environment, make_config, write_world

from fastr1.config import load_config, save_config
from fastr1.reporting.run_log import read_rows
from fastr1.training.checkpoint import find_last_checkpoint
from fastr1.training.stop import RESUME

PARENT = """
import logging, sys
from pathlib import Path
from fastr1.training import launch
logging.basicConfig(format="%(message)s")
launch.SCRIPT = Path(sys.argv[1])
launch.DEAD_RANK_SECONDS, launch.SAME_CTRL_C_SECONDS = -4.5, 0.5
sys.exit(launch.run_processes(2, sys.argv[2:]))
"""
# What a rank does: BEGIN of the test, then a loop that ends when asked to.
RANK = """
import logging, os, signal, sys, time
from pathlib import Path
logging.basicConfig(format="%(message)s")
from fastr1.training import stop as module
module.DEAD_RANK_SECONDS = module.SAME_CTRL_C_SECONDS = 0.2
from fastr1.training.stop import StopRequest, process_id
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
stop = StopRequest(exits_at_once=True)
with stop.watching():
    stop.exits_at_once = False
    (folder / f"{rank}.tmp").write_text(process_id())
    (folder / f"{rank}.tmp").rename(folder / str(rank))
    while not all((folder / r).exists() for r in "01"):
        time.sleep(0.01)
    stop.watch_peers((r, (folder / str(r)).read_text()) for r in (0, 1))
    BODY
    (folder / f"saved {rank}").touch()
"""
WAIT = "while not stop: time.sleep(0.02)"
# A run whose task is done at once, and a signal while its interpreter cleans up.
DONE = """
import atexit, os, signal, sys, types
from pathlib import Path
from fastr1.cli import run_config
from fastr1.config import load_config
from fastr1.training import launch
numbers = signal.SIGINT, signal.SIGTERM
atexit.register(lambda: print(*[os.kill(os.getpid(), n) or signal.getsignal(n).name for n in numbers]))
if sys.argv[1] == "parent":
    launch.SCRIPT = Path(os.devnull)
    sys.exit(launch.run_processes(2, []))
sys.modules["fastr1.training.grpo"] = types.SimpleNamespace(run_grpo=lambda config, stop: None)
run_config(load_config(sys.argv[2]))
"""


class Run:
    """Two processes under `run_processes`, all listening."""

    def __init__(self, folder: Path, body: str) -> None:
        self.folder = folder
        script = folder / "rank.py"
        script.write_text(RANK.replace("BODY", body))
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(script), str(folder)],
            env=child_environment(),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listen,
        )
        until(lambda: self.parent.poll() is not None or all((folder / rank).exists() for rank in "01"), 20)
        assert self.parent.poll() is None, self.parent.communicate()
        self.ranks = [int((folder / rank).read_text().partition(":")[0]) for rank in "01"]
        time.sleep(0.1)

    def end(self) -> tuple[int, list[str]]:
        """Exit code, and the lines on standard error."""
        _, errors = self.parent.communicate(timeout=60)
        until(lambda: not any(map(is_running, self.ranks)), 30)
        return self.parent.returncode, errors.splitlines()

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("saved *"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_one_signal_to_the_parent_reaches_all(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path, WAIT)
    run.parent.send_signal(number)
    assert run.end() == (0, ["SIGTERM received: finishing this update, then saving"])
    assert run.saved == ["saved 0", "saved 1"]


def test_a_signal_is_heard_while_the_main_thread_is_inside_another_library(tmp_path: Path) -> None:
    """A lock held for ever stands for a collective operation that waits."""
    run = Run(tmp_path, "import _thread; lock = _thread.allocate_lock(); lock.acquire(); lock.acquire(timeout=0.6)")
    run.parent.send_signal(signal.SIGTERM)
    assert run.end() == (0, ["SIGTERM received: finishing this update, then saving"])


@pytest.mark.parametrize("who", ["rank", "parent"])
def test_a_signal_after_all_is_done_changes_nothing(who: str) -> None:
    command = [sys.executable, "-c", DONE, who, str(ROOT / "configs" / "grpo.json")]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, preexec_fn=listen)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SIG_IGN SIG_IGN\n", "")


def test_second_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "time.sleep(60)")
    run.parent.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.parent.send_signal(signal.SIGINT)  # the same, passed on by something
    time.sleep(0.6)
    assert run.parent.poll() is None
    run.parent.send_signal(signal.SIGINT)
    code, lines = run.end()
    assert (code, run.saved) == (130, [])
    assert lines[-1] == f"stopped at once, in the middle of an update; if a checkpoint was written, {RESUME}"


def test_death_of_the_parent_is_a_request_to_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, WAIT)
    run.parent.kill()
    assert run.end() == (-9, ["the launcher has died: finishing this update, then saving"])
    until(lambda: run.saved == ["saved 0", "saved 1"], 10)


@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_a_rank_ends_the_others(tmp_path: Path, rank: int) -> None:
    run = Run(tmp_path, "time.sleep(60)")
    os.kill(run.ranks[rank], signal.SIGKILL)
    code, lines = run.end()
    assert (code, run.saved) == (1, [])
    told = f"rank {rank} was ended by SIGKILL, as the system does when memory runs out"
    assert lines[-1] == f"{told}; if a checkpoint was written, {RESUME}"


def test_ranks_notice_the_death_of_another_without_the_parent(tmp_path: Path) -> None:
    run = Run(tmp_path, "stop.kept = 'update 7 is saved'; time.sleep(60)")
    os.kill(run.parent.pid, signal.SIGSTOP)
    os.kill(run.ranks[0], signal.SIGKILL)
    until(lambda: not is_running(run.ranks[1]), 10)
    os.kill(run.parent.pid, signal.SIGCONT)
    code, lines = run.end()
    assert (code, lines[0]) == (1, "rank 0 has died and this one cannot go on; update 7 is saved")


def test_error_of_a_rank_is_the_exit_code(tmp_path: Path) -> None:
    run = Run(tmp_path, "time.sleep(0.3); sys.exit(2 * rank)")
    assert run.end() == (2, [])


def test_nothing_is_kept_before_the_first_update(tmp_path: Path) -> None:
    run = Run(tmp_path, "stop.exits_at_once = True; time.sleep(60)")
    run.parent.send_signal(signal.SIGINT)
    line = "SIGTERM received: stopped before the first update; start again with the same command"
    assert run.end() == (0, [line])


def test_a_rank_that_was_stopped_alone_while_loading_stops_the_others(tmp_path: Path) -> None:
    """As by a daemon that frees memory; the others would wait for it as long as the process group's timeout."""
    run = Run(tmp_path, "stop.exits_at_once = True; stop.watch_peers([]); time.sleep(60)")
    os.kill(run.ranks[1], signal.SIGTERM)
    line = "SIGTERM received: stopped before the first update; start again with the same command"
    assert run.end() == (0, [line])


def test_children_keep_their_signals_to_themselves(tmp_path: Path) -> None:
    """As those of a pool that is being closed."""
    fork = "pid = os.fork()\n    if not pid: time.sleep(60)\n    time.sleep(0.1); os.kill(pid, signal.SIGTERM)"
    report = f"(folder / f'code {{rank}}').write_text(str(os.waitpid(pid, 0)[1])); time.sleep(0.7)\n    {WAIT}"
    run = Run(tmp_path, f"{fork}\n    {report}")
    until(lambda: (tmp_path / "code 0").exists())
    time.sleep(0.5)
    assert (tmp_path / "code 0").read_text() == str(int(signal.SIGTERM))
    assert run.parent.poll() is None
    run.parent.send_signal(signal.SIGTERM)
    assert run.end()[0] == 0


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    code = (
        "import os, signal; from fastr1.training.stop import StopRequest\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); stop = StopRequest()\n"
        "with stop.watching(): os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(stop.reason)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


IMPATIENT = """
import os, signal, subprocess, sys, time
name, folder = sys.argv[1:3]
env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
rank = subprocess.Popen([sys.executable, f"{folder}/rank.py", folder], env=env)
def stop(number, frame):
    rank.terminate()
    time.sleep(1)
    rank.kill()
signal.signal(signal.SIGTERM, stop)
rank.wait()
"""


def test_a_launcher_that_would_not_wait_is_ended_first(tmp_path: Path) -> None:
    body = "module.LAUNCHER_SECONDS = 0.2; wait()\n    time.sleep(1.2)"
    (tmp_path / "rank.py").write_text(
        RANK.replace("BODY", body)
        .replace("with stop", "def wait():\n    while not stop: time.sleep(0.02)\nwith stop")
        .replace('for r in "01"', 'for r in "0"')
        .replace("in (0, 1)", "in (0,)")
    )
    (tmp_path / "launcher.py").write_text(IMPATIENT)
    command = [sys.executable, str(tmp_path / "launcher.py"), "deepspeed.launcher.launch", str(tmp_path)]
    launcher = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, preexec_fn=listen)
    until(lambda: (tmp_path / "0").exists(), 20)
    time.sleep(0.1)
    launcher.terminate()
    until(lambda: (tmp_path / "saved 0").exists(), 20)
    assert launcher.wait() == -signal.SIGKILL


# The whole run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


class Training:
    """A run of two processes whose updates take `seconds`, after its first row of metrics."""

    def __init__(self, world: Path, folder: Path, launcher: list[str], seconds: float, **changes: object) -> None:
        self.output = folder / "run"
        settings = {"optim__max_steps": 100_000, "optim__per_device_train_batch_size": 2, **changes}
        config = make_config(world, self.output, reward__functions=("trainer_toys:slow_reward",), **settings)
        save_config(config, folder / "config.json")
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.launcher = subprocess.Popen(
                [*launcher, "--config", str(folder / "config.json")],
                env={**child_environment(), "TOY_SECONDS": str(seconds)},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=listen,
            )
        self.folder = folder
        metrics = self.output / "metrics.jsonl"
        until(lambda: self.launcher.poll() is not None or (metrics.exists() and metrics.stat().st_size))
        assert self.launcher.poll() is None, self.log.read_text()
        time.sleep(seconds / 2)  # into the middle of an update

    def processes(self) -> dict[int, str]:
        return processes_of(self.folder / "config.json")

    def assert_saved_and_gone(self, seconds: float) -> None:
        until(lambda: self.launcher.poll() is not None and not self.processes(), seconds)
        last = read_rows(self.output / "metrics.jsonl")[-1]["step"]
        checkpoint = find_last_checkpoint(self.output)
        assert checkpoint.name == f"step-{last:06d}", self.log.read_text()
        assert json.loads((checkpoint / "manifest.json").read_text())["step"] == last
        lines = [line for line in self.log.read_text().splitlines() if RESUME in line]
        assert lines == [f"stopped after update {last} of 100000: {RESUME}"]


FASTR1 = [sys.executable, "-m", "fastr1.cli", "train", "--num-processes", "2"]
DEEPSPEED = [
    str(Path(sys.executable).parent / "deepspeed"),
    *("--num_gpus", "2", "--master_port", "29621"),
    str(ROOT / "fastr1" / "train.py"),
]


def test_two_processes_end_with_a_checkpoint_on_one_sigterm(world: Path, tmp_path: Path) -> None:
    run = Training(world, tmp_path, FASTR1, 0.6)
    run.launcher.send_signal(signal.SIGTERM)
    run.assert_saved_and_gone(60)
    assert run.launcher.returncode == 0, run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_two_processes_whose_updates_take_long(world: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = Training(world, tmp_path, FASTR1, 40)
    run.launcher.send_signal(number)
    run.assert_saved_and_gone(70)
    assert run.launcher.returncode == -9 * (number == signal.SIGKILL), run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 40])  # the launcher kills after 30
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("whom", ["command", "launcher", "all"])
def test_deepspeed_launcher(world: Path, tmp_path: Path, whom: str, number: signal.Signals, seconds: float) -> None:
    """SIGINT to all is a Ctrl-C."""
    if (whom == "all") == (number != signal.SIGINT):
        pytest.skip("not what anybody does")
    run = Training(world, tmp_path, DEEPSPEED, seconds)
    launcher = next(pid for pid, command in run.processes().items() if "deepspeed.launcher.launch" in command)
    if whom == "all":
        os.killpg(run.launcher.pid, number)
    else:
        os.kill(run.launcher.pid if whom == "command" else launcher, number)
    run.assert_saved_and_gone(seconds + 30)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [FASTR1, DEEPSPEED], ids=["fastr1", "deepspeed"])
def test_sigkill_costs_what_save_minutes_says(world: Path, tmp_path: Path, launcher: list[str]) -> None:
    run = Training(world, tmp_path, launcher, 0.5, run__save_minutes=2 / 60)
    time.sleep(8)
    for pid in run.processes():
        os.kill(pid, signal.SIGKILL)
    run.launcher.wait()
    last = read_rows(run.output / "metrics.jsonl")[-1]["step"]
    step = int(find_last_checkpoint(run.output).name.removeprefix("step-"))
    assert 0 < step <= last <= step + 6
    config = load_config(tmp_path / "config.json", ["run.resume_from_checkpoint=last", f"optim.max_steps={last + 1}"])
    save_config(config, tmp_path / "config.json")
    subprocess.run([*launcher, "--config", str(tmp_path / "config.json")], env=child_environment(), check=True)
    assert [row["step"] for row in read_rows(run.output / "metrics.jsonl")] == list(range(1, last + 2))


@pytest.mark.slow
def test_deepspeed_command_that_dies_before_its_launcher_starts_the_ranks(world: Path, tmp_path: Path) -> None:
    save_config(make_config(world, tmp_path / "run", optim__max_steps=100_000), tmp_path / "config.json")
    command = [*DEEPSPEED, "--config", str(tmp_path / "config.json")]
    child = subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until(lambda: sum("launcher.launch" in line for line in processes_of(tmp_path / "config.json").values()))
    child.kill()
    child.wait()
    until(lambda: not processes_of(tmp_path / "config.json"), 60)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_any_moment_of_the_run(world: Path, tmp_path: Path, num_processes: int) -> None:
    """Loading, training, evaluating, exporting: exit code 0, and what the last line says is so."""
    evaluation = {"run__eval_steps": 1, "data__eval_file": str(world / "questions.jsonl")}
    batch = {"optim__per_device_train_batch_size": 4 // num_processes}
    for number in range(30):
        output = tmp_path / str(number)
        save_config(make_config(world, output, optim__max_steps=6, **evaluation, **batch), tmp_path / "config.json")
        command = [*FASTR1[:-1], str(num_processes), "--config", str(tmp_path / "config.json")]
        child = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True, preexec_fn=listen)
        time.sleep(0.3 + 0.3 * number)
        child.send_signal((signal.SIGINT, signal.SIGTERM)[number % 2])
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
        last = [line for line in errors.splitlines() if "update" in line or "model written" in line][-1]
        if (output / "final").exists():
            assert last == f"model written to {output / 'final'}"
        elif "stopped before the first update" in last:
            assert not (output / "checkpoints").exists()
        else:
            step = int(find_last_checkpoint(output).name.removeprefix("step-"))
            assert last == f"stopped after update {step} of 6: {RESUME}"
