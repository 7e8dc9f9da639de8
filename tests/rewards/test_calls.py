"""How rewards are called: once, named where they fail, together if async, in workers that may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trainer_toys import child_environment, make_config, metrics_of, write_world

from fastr1.config import RewardConfig
from fastr1.reporting.run_log import read_rows
from fastr1.rewards import RewardError, Scorer, build_scorer
from fastr1.schema import Sample
from fastr1.training.grpo import run_grpo

CODE = '''
import asyncio, json, os, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).parent


def note(**row):
    with open(HERE / "calls.jsonl", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **row}) + "\\n")


def one_by_one(completions, solutions, samples):
    """Fails on what says so, in a loop, and tells of every call."""
    note(completions=completions)
    values = []
    for text, solution in zip(completions, solutions):
        values.append(value_of(text.strip()))
    return values


def value_of(word):
    if word == "sleep": time.sleep(600)
    if word == "child": subprocess.run(["sleep", "654"])
    if word == "crash": os.abort()
    if word == "exit": sys.exit(3)
    if word == "raise": raise KeyError("no such word")
    return float(len(word))


def by_index(completions, solutions, samples):
    return [1 / (len(completions[i]) - 3) for i in range(len(completions))]


def by_sample(completions, solutions, samples):
    return [1 / (sample.letter != "B") for sample in samples]


def as_a_whole(completions, solutions, samples):
    raise OSError("disk full")


def parts(completions, solutions, samples):
    lengths = [len(text) for text in completions]
    return {"reward": [n / 2 for n in lengths], "length": lengths, "short": [n < 5 for n in lengths]}


def sum_of_parts(completions, solutions, samples):
    return {"length": [float(value_of(text)) for text in completions], "one": [1] * len(completions)}


def other_parts(completions, solutions, samples):
    return {completions[0][0]: [1.0]}


loops = []


async def first(completions, solutions, samples):
    return await meet(0, completions)


async def second(completions, solutions, samples):
    return await meet(1, completions)


EVENTS = []


async def meet(mine, completions):
    """Returns only once the other function has begun, too."""
    if not EVENTS:
        EVENTS.extend([asyncio.Event(), asyncio.Event()])
    loops.append(asyncio.get_running_loop())
    EVENTS[mine].set()
    await EVENTS[1 - mine].wait()
    return [float(mine)] * len(completions)


async def bad_async(completions, solutions, samples):
    await asyncio.sleep(0)
    for text in completions:
        value_of(text)


async def blocking_async(completions, solutions, samples):
    time.sleep(1.4)


async def slow_async(completions, solutions, samples):
    await asyncio.sleep(600)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an importable file `called_rewards`, whose functions write calls.jsonl beside it."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "called_rewards.py").write_text(CODE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def calls(folder: Path) -> Path:
    file = folder / "calls.jsonl"
    file.write_text("")
    return file


def sample(line: int, letter: str = "A") -> Sample:
    return Sample(str(line), "Which?\nOptions:\nA. u\nB. v", "AB", letter, Path("a.mp4"), f"rows.jsonl:{line}")


def scorer_of(*names: str, **settings: Any) -> Scorer:
    return build_scorer(RewardConfig(functions=tuple(f"called_rewards:{name}" for name in names), **settings))


def failure(scorer: Scorer, texts: list[str], samples: list[Sample] | None = None) -> str:
    with closing(scorer), pytest.raises(RewardError) as caught:
        scorer.score(texts, samples or [sample(line) for line in range(1, len(texts) + 1)])
    return str(caught.value)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# Failures are named without a second call


@pytest.mark.parametrize(("word", "error"), [("raise", "KeyError('no such word')"), ("exit", "SystemExit(3)")])
def test_raising_function_is_called_once_and_named(calls: Path, word: str, error: str) -> None:
    message = failure(scorer_of("one_by_one"), ["good one", f" {word} ", "good"])
    assert (
        message
        == f"reward function 'called_rewards:one_by_one' raised {error} for rows.jsonl:2 on completion ' {word} '"
    )
    assert [row["completions"] for row in rows_of(calls)] == [["good one", f" {word} ", "good"]]


def test_sample_is_named_where_only_it_is_known(folder: Path) -> None:
    samples = [sample(1), sample(2, "B"), sample(2, "B")]
    message = failure(scorer_of("by_sample"), ["one", "two", "three"], [samples[0], samples[1], samples[1]])
    assert "in a call with 2 completions, the first for rows.jsonl:2 on completion 'two'" in message


@pytest.mark.parametrize(("name", "text"), [("as_a_whole", "OSError('disk full')"), ("by_index", "ZeroDivisionError")])
def test_function_that_does_not_tell_is_not_guessed_at(folder: Path, name: str, text: str) -> None:
    message = failure(scorer_of(name), ["long", "abc"])
    assert text in message
    assert "in a call with 2 completions, the first for rows.jsonl:1 on completion 'long'" in message


# A dict


def test_parts_of_a_dict_are_columns_and_reward_is_what_counts(folder: Path) -> None:
    scored = scorer_of("parts", weights=(2.0,)).score(["four", "eleven now!"], [sample(1), sample(2)])
    assert scored.rewards == [4.0, 11.0]
    name = "called_rewards:parts"
    assert scored.parts == {name: [2.0, 5.5], f"{name}/length": [4.0, 11.0], f"{name}/short": [1.0, 0.0]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reward_is_the_sum_of_the_parts_where_none_is_called_so(folder: Path, num_workers: int) -> None:
    with closing(scorer_of("sum_of_parts", num_workers=num_workers)) as scorer:
        scored = scorer.score(["four", "five!"], [sample(1), sample(2)])
    name = "called_rewards:sum_of_parts"
    assert scored.parts == {name: [5.0, 6.0], f"{name}/length": [4.0, 5.0], f"{name}/one": [1.0, 1.0]}


# async


def test_async_functions_are_awaited_together_in_one_loop(folder: Path) -> None:
    with closing(scorer_of("first", "parts", "second")) as scorer:
        for _ in range(2):
            scored = scorer.score(["a", "b"], [sample(1), sample(2)])
            assert scored.parts["called_rewards:first"] == [0.0, 0.0]
            assert scored.parts["called_rewards:second"] == [1.0, 1.0]
            assert scored.rewards == [1.5, 1.5]
    loops = sys.modules["called_rewards"].loops
    assert len(loops) == 4
    assert len(set(loops)) == 1


@pytest.mark.parametrize(("word", "error"), [("raise", "KeyError('no such word')"), ("exit", "SystemExit(3)")])
def test_raising_async_function_is_named_while_others_go_on(folder: Path, word: str, error: str) -> None:
    message = failure(scorer_of("slow_async", "bad_async"), ["good", word])
    assert f"'called_rewards:bad_async' raised {'' if word == 'raise' else 'RuntimeError'}" in message
    assert error in message
    assert f"for rows.jsonl:2 on completion '{word}'" in message


def test_async_function_past_its_time(folder: Path) -> None:
    message = failure(scorer_of("slow_async", timeout_seconds=0.1), ["one", "two"])
    assert (
        "'called_rewards:slow_async' took more than reward.timeout_seconds = 0.1 in a call with 2 completions"
        in message
    )
    with closing(scorer_of("slow_async", "parts", num_workers=1, timeout_seconds=9, timeout_reward=-3.0)) as scorer:
        scorer._async._timeout_seconds = 0.1  # type: ignore[union-attr]
        scored = scorer.score(["one", "two"], [sample(1), sample(2)])
    assert scored.parts["called_rewards:slow_async"] == [-3.0, -3.0]
    assert scored.parts["called_rewards:slow_async/timed_out"] == [1.0, 1.0]
    assert scored.parts["called_rewards:parts/timed_out"] == [0.0, 0.0]


def test_async_function_that_blocks_the_loop_does_not_hold_up_the_end(folder: Path) -> None:
    scorer = scorer_of("blocking_async", timeout_seconds=0.1)
    with pytest.raises(RewardError, match="took more than"):
        scorer.score(["one"], [sample(1)])
    started = time.monotonic()
    scorer.close()
    assert time.monotonic() - started < 1.3


# Workers


def test_workers_call_once_for_each_completion_and_keep_the_order(calls: Path) -> None:
    texts = [f"word {'!' * i}" for i in range(7)]
    with closing(scorer_of("one_by_one", "parts", num_workers=2, timeout_seconds=60)) as scorer:
        scored = scorer.score(texts, [sample(i) for i in range(7)])
        again = scorer.score(texts[:2], [sample(0), sample(1)])
    assert scored.parts["called_rewards:one_by_one"] == [float(len(text.strip())) for text in texts]
    assert scored.parts["called_rewards:parts/length"] == [float(len(text)) for text in texts]
    assert again.rewards == scored.rewards[:2]
    rows = rows_of(calls)
    assert sorted(row["completions"][0] for row in rows) == sorted([*texts, *texts[:2]])
    assert os.getpid() not in {row["pid"] for row in rows}
    assert len({row["pid"] for row in rows}) <= 2


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "raised KeyError('no such word')"),
        ("exit", "raised SystemExit(3)"),
        ("crash", "ended its process (SIGABRT)"),
        ("sleep", "took more than reward.timeout_seconds = 0.5"),
    ],
)
def test_failing_worker_is_named(calls: Path, word: str, reason: str) -> None:
    message = failure(scorer_of("one_by_one", num_workers=1, timeout_seconds=0.5), ["good", word])
    assert f"reward function 'called_rewards:one_by_one' {reason}" in message
    assert f"for rows.jsonl:2 on completion '{word}'" in message
    assert [row["completions"] for row in rows_of(calls)] == [["good"], [word]]


def test_timeout_reward_kills_the_call_with_its_children_and_goes_on(calls: Path) -> None:
    settings = {"num_workers": 2, "timeout_seconds": 0.5, "timeout_reward": -1.0}
    with closing(scorer_of("one_by_one", **settings)) as scorer:
        started = time.monotonic()
        scored = scorer.score(["sleep", "four", "child", "five!"], [sample(i) for i in range(4)])
        assert time.monotonic() - started < 60
        assert scored.rewards == [-1.0, 4.0, -1.0, 5.0]
        assert scored.parts["called_rewards:one_by_one/timed_out"] == [1.0, 0.0, 1.0, 0.0]
        assert subprocess.run(["pgrep", "-f", "sleep 654"], capture_output=True, check=False).stdout == b""
        assert scorer.score(["six..."], [sample(1)]).rewards == [6.0]


def test_time_of_a_call_does_not_begin_before_its_module_is_imported(folder: Path) -> None:
    code = "import time; time.sleep(1)\ndef length(completions, solutions, samples): return [len(completions[0])]\n"
    (folder / "slow_to_import.py").write_text(code)
    config = RewardConfig(functions=("slow_to_import:length",), num_workers=1, timeout_seconds=0.6)
    with closing(build_scorer(config)) as scorer:
        assert scorer.score(["four"], [sample(1)]).rewards == [4.0]


def test_parts_must_be_the_same_for_all_completions(folder: Path) -> None:
    message = failure(scorer_of("other_parts", num_workers=1), ["abc", "xyz"])
    assert "returned the parts ['a'] for one completion and ['x'] for another" in message


def test_workers_that_nothing_would_run_in_are_refused(folder: Path) -> None:
    with pytest.raises(RewardError, match=r"num_workers is 2, but your reward\.functions are all async.*leave it out"):
        scorer_of("slow_async", num_workers=2)


def test_time_limit_that_nothing_could_keep_is_refused(folder: Path) -> None:
    with pytest.raises(
        RewardError, match=r"timeout_seconds is 2, but .*one_by_one' runs in the training process, where"
    ):
        scorer_of("one_by_one", timeout_seconds=2)


def test_a_worker_does_without_torch() -> None:
    """Seconds and hundreds of megabytes for each of them."""
    code = "import sys, fastr1.rewards.calls; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, check=True)
    assert done.stdout == b"False False\n"


def test_workers_end_with_a_trainer_that_is_killed(folder: Path, calls: Path) -> None:
    code = (
        "from fastr1.config import RewardConfig; from fastr1.rewards import build_scorer; from pathlib import Path\n"
        "from fastr1.schema import Sample\n"
        "config = RewardConfig(functions=('called_rewards:one_by_one',), num_workers=1)\n"
        "build_scorer(config).score(['child'], [Sample('1', 'q', 'AB', 'A', Path('a.mp4'), 'r:1')])"
    )
    environment = child_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{folder}"
    trainer = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_until(lambda: bool(rows_of(calls)))
    worker = rows_of(calls)[0]["pid"]
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)  # as a terminal or a scheduler does to all: the run decides when a call ends
    time.sleep(0.3)
    assert trainer.poll() is None
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    assert subprocess.run(["pgrep", "-f", "sleep 654"], capture_output=True, check=False).stdout == b""


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_run_logs_parts_and_timeouts(folder: Path, tmp_path: Path) -> None:
    functions = ("called_rewards:parts",)
    reward = {"reward__functions": functions, "reward__num_workers": 1, "reward__timeout_seconds": 60.0}
    world = write_world(tmp_path / "world")
    run_grpo(make_config(world, tmp_path / "run", optim__max_steps=1, **reward, reward__timeout_reward=0.0))
    (row,) = metrics_of(tmp_path / "run")
    name = "rewards/called_rewards:parts"
    assert row[name] == pytest.approx(row[f"{name}/length"] / 2)
    assert row[f"{name}/timed_out"] == 0
    rollout = read_rows(tmp_path / "run" / "rollouts.jsonl")[0]
    assert rollout["rewards"]["called_rewards:parts/length"] == len(rollout["completion"])
