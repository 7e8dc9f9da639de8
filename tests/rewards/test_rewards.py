"""Rewards: recorded values of the original, tables of examples, errors that name function, sample and completion."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shared_data import shared_path

from fastr1.config import ConfigError, RewardConfig
from fastr1.rewards import RewardError, build_scorer
from fastr1.rewards.answers import extract_answer_letter
from fastr1.rewards.multiple_choice_accuracy import multiple_choice_accuracy
from fastr1.rewards.think_format import think_format
from fastr1.rewards.tinyllava_video_r1 import accuracy_reward, format_reward, tinyllava_video_r1
from fastr1.schema import Sample

CODE = RewardConfig(mode="code")
PAPER = RewardConfig(mode="paper")
SOLUTION = "<answer>C</answer>"
F1 = 0.5 + 0.5 / 1200  # format reward of one character of thought


def sample(line: int = 1, letter: str = "C") -> Sample:
    problem = "Which?\nOptions:\nA. u\nB. v\nC. w\nD. x\nE. y"
    return Sample(str(line), problem, "ABCDE", letter, Path("/videos/a.mp4"), f"rows.jsonl:{line}")


# completion → accuracy, format, reward by the code, reward by the paper; the truth is C
TABLE = [
    ("<think> x </think> <answer> C </answer>", 1, F1, 1 + F1, 1 + F1),
    ("  \n<think> x </think> <answer> C </answer>\n ", 1, F1, 1 + F1, 1 + F1),
    ("<think> x </think><answer>C. pick up</answer>", 1, F1, 1 + F1, 1 + F1),
    ("<think> x </think>\n\n<answer>C</answer>", 1, F1, 1 + F1, 1 + F1),
    ("<think> x </think> <answer>\nC\n</answer>", 0, F1, -F1, -F1),
    (f"<think> {'y' * 1200} </think> <answer> C </answer>", 1, 1.0, 2.0, 2.0),
    (f"<think> {'y' * 5000} </think> <answer> C </answer>", 1, 1.0, 2.0, 2.0),
    (f"<think> {'y' * 600} </think> <answer> B </answer>", 0, 0.75, -0.75, -0.75),
    (f"<think> {'é' * 600} </think> <answer> C </answer>", 1, 0.75, 1.75, 1.75),  # characters, not bytes
    (f"<think>{' ' * 600}</think> <answer> C </answer>", 1, 0.5, 1.5, 1.5),  # blanks are stripped
    (f"<think> {'y' * 432} </think> <answer> C </answer>", 1, 0.68, 1.68, 1.68),
    (f"<think> {'y' * 100} </think> <answer> A </answer>", 0, 0.5 + 0.5 / 12, -0.5 - 0.5 / 12, -0.5 - 0.5 / 12),
    ("<think></think><answer>C</answer>", 1, 0.5, 1.5, 1.5),
    ("<think></think><answer>B</answer>", 0, 0.5, -0.5, -0.5),
    ("<think> a\nb </think> <answer> C </answer>", 1, 0.5 + 1.5 / 1200, 1.5 + 1.5 / 1200, 1.5 + 1.5 / 1200),
    ("C", 1, 0, 1, -2),
    ("<answer>C</answer>", 1, 0, 1, -2),
    ("Cats are in the room.", 1, 0, 1, -2),
    ("<think> x </think> <answer> C </answer> I am sure.", 1, 0, 1, -2),
    ("Sure! <think> x </think> <answer> C </answer>", 1, 0, 1, -2),
    ("<think> x </think> so <answer> C </answer>", 1, 0, 1, -2),
    ("<think> a <think> b </think> <answer> C </answer>", 1, 0, 1, -2),
    ("<answer> C </answer> <think> x </think>", 1, 0, 1, -2),
    ("<think> x </think> <answer> B </answer> <answer> C </answer>", 0, 0, -2, -2),
    ("<think> x </think> <answer> C", 0, 0, -2, -2),
    ("<think> x </think> <answer> </answer>", 0, F1, -F1, -F1),
    ("<think> x </think> <answer> (C) </answer>", 0, F1, -F1, -F1),
    ("<think> x </think> <answer> c </answer>", 0, F1, -F1, -F1),
    ("<think> x </think> <answer> Option C </answer>", 0, F1, -F1, -F1),
    ("garbage", 0, 0, -2, -2),
    ("", 0, 0, -2, -2),
]


@pytest.mark.parametrize(("completion", "accuracy", "quality", "by_code", "by_paper"), TABLE)
def test_tinyllava_table(completion: str, accuracy: float, quality: float, by_code: float, by_paper: float) -> None:
    assert accuracy_reward(completion, SOLUTION) == accuracy
    assert format_reward(completion, CODE) == pytest.approx(quality, abs=1e-12)
    assert tinyllava_video_r1(completion, SOLUTION, CODE) == pytest.approx(by_code, abs=1e-12)
    assert tinyllava_video_r1(completion, SOLUTION, PAPER) == pytest.approx(by_paper, abs=1e-12)
    assert think_format(completion) == (quality > 0)


def test_code_mode_matches_recorded_rewards() -> None:
    rows = json.loads(shared_path("fixtures/tinyllava/rewards.json").read_text())
    assert len(rows) > 20
    scored = build_scorer(CODE).score(
        [row["completion"] for row in rows], [sample(i, row["solution"][len("<answer>")]) for i, row in enumerate(rows)]
    )
    for name, column in (
        ("accuracy_reward", "accuracy"),
        ("format_reward", "format"),
        ("tinyllava_video_r1", "combined"),
    ):
        assert scored.parts[name] == pytest.approx([row[column] for row in rows], abs=1e-6), name
    assert scored.rewards == scored.parts["tinyllava_video_r1"]


def test_code_mode_matches_recorded_group() -> None:
    grpo = json.loads(shared_path("fixtures/tinyllava/group_expected.json").read_text())["grpo"]["grpo"]
    tensors = load_file(shared_path("fixtures/tinyllava/group_expected.safetensors"))
    samples = [sample(1, grpo["record"]["solution"][len("<answer>")])] * len(grpo["completions"])
    scored = build_scorer(CODE).score(grpo["completions"], samples)
    assert scored.rewards == pytest.approx(tensors["grpo.rewards"].tolist(), abs=1e-6)
    per_function = torch.tensor([scored.parts["accuracy_reward"], scored.parts["format_reward"]]).T
    torch.testing.assert_close(per_function, tensors["grpo.rewards_per_func"], rtol=0, atol=1e-6)


def test_constants_are_configurable() -> None:
    config = RewardConfig(base=0.2, length_bonus=0.4, correct=3.0, max_think_chars=10, bad_format=-7.0)
    completion = "<think>12345</think><answer>{}</answer>"
    assert tinyllava_video_r1(completion.format("C"), SOLUTION, config) == pytest.approx(3.4)
    assert tinyllava_video_r1(completion.format("B"), SOLUTION, config) == pytest.approx(-0.4)
    assert tinyllava_video_r1("C", SOLUTION, config) == 3.0
    assert tinyllava_video_r1("B", SOLUTION, config) == -7.0
    # rewards of exactly zero count as badly formed, in either mode
    free = RewardConfig(base=0.0, bad_format=-7.0)
    assert tinyllava_video_r1("<think></think><answer>B</answer>", SOLUTION, free) == -7.0


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("<answer>C</answer>", "C"),
        ("<think> A </think> <answer> c. dog </answer>", "C"),
        ("<answer>\n B \n</answer>", "B"),
        ("<answer>(D)</answer>", "D"),
        ("<answer>it is (e)</answer>", "E"),
        ("<answer>(E) not (B)</answer>", "B"),  # option order, not text order
        ("<answer>Option C</answer>", None),
        ("<answer>F</answer>", None),
        ("<answer></answer>", None),
        ("<answer> </answer> <answer>C</answer>", None),
        ("<answer>C", None),
        ("C", None),
        ("", None),
        ("<answer>B</answer><answer>C</answer>", "B"),
        ("<answer>(\nB)</answer> or <answer>C</answer>", "C"),
    ],
)
def test_extract_answer_letter(completion: str, letter: str | None) -> None:
    assert extract_answer_letter(completion) == letter


def test_extract_answer_letter_honours_the_options() -> None:
    assert extract_answer_letter("<answer>F</answer>", "ABCDEF") == "F"
    assert extract_answer_letter("<answer>Every one: (B)</answer>", "ABCD") == "B"


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(["<answer>", "</answer>", " ", "\n", "C", "(b)", "x", "\t"]), max_size=9))
def test_answer_line_equals_the_pattern(pieces: list[str]) -> None:
    """The linear scan finds what the evaluation pattern of the original finds."""
    text = "".join(pieces)
    match = re.search(r"<answer>\s*(.*?)\s*</answer>", text)
    expected = extract_answer_letter(f"<answer>{match[1]}</answer>") if match else None
    assert extract_answer_letter(text) == expected


def test_degenerate_completions_cost_little() -> None:
    started = time.perf_counter()
    for text in (
        "<answer>" + " " * 200_000,
        "<answer>" * 2_000,
        "<think>" + " " * 200_000 + "</think>" + "\n" * 200_000,
    ):
        extract_answer_letter(text)
        tinyllava_video_r1(text, SOLUTION, CODE)
    assert time.perf_counter() - started < 5.0


def test_multiple_choice_accuracy_reads_like_the_evaluation() -> None:
    for completion, expected in (("<answer>(c)</answer>", 1.0), ("<answer>B</answer>", 0.0), ("C", 0.0), ("", 0.0)):
        assert multiple_choice_accuracy(completion, "C", "ABCDE") == expected
    two = Sample("1", "Q\nOptions:\nA. x\nB. y", "AB", "B", Path("a.mp4"), "rows.jsonl:1")
    scorer = build_scorer(RewardConfig(functions=("multiple_choice_accuracy",)))
    # "E" is no option here, so the reading goes on to "(B)"
    assert scorer.score(["<answer>Either (B)</answer>", "<answer>A</answer>"], [two, two]).rewards == [1.0, 0.0]


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module `user_rewards` to which a test adds functions."""
    module = ModuleType("user_rewards")
    monkeypatch.setitem(sys.modules, "user_rewards", module)
    return module


def test_weighted_sum_keeps_every_part(user_module: ModuleType) -> None:
    def brevity(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
        completions.sort()  # a careless function must not disturb the others
        return [float(len(one.origin)) + len(solution) for one, solution in zip(samples, solutions, strict=True)]

    user_module.brevity = brevity  # type: ignore[attr-defined]
    config = RewardConfig(
        functions=("user_rewards:brevity", "tinyllava_video_r1", "think_format"), weights=(0.5, 2.0, 0.0)
    )
    completions = ["garbage", "<think> x </think> <answer> C </answer>"]
    scored = build_scorer(config).score(completions, [sample(7), sample(10)])
    assert completions[0] == "garbage"
    assert scored.parts == {
        "user_rewards:brevity": [30.0, 31.0],
        "accuracy_reward": [0.0, 1.0],
        "format_reward": [0.0, F1],
        "tinyllava_video_r1": [-2.0, 1 + F1],
        "think_format": [0.0, 1.0],
    }
    assert scored.rewards == pytest.approx([15.0 - 4.0, 15.5 + 2 * (1 + F1)])


@pytest.mark.parametrize("values", [(1, 0.5), [True, 0.5], np.array([1.0, 0.5], np.float32), torch.tensor([1.0, 0.5])])
def test_any_list_of_real_numbers_is_accepted(user_module: ModuleType, values: Any) -> None:
    user_module.f = lambda completions, solutions, samples: values  # type: ignore[attr-defined]
    scored = build_scorer(RewardConfig(functions=("user_rewards:f",))).score(["a", "b"], [sample(), sample()])
    assert scored.rewards == [1.0, 0.5]
    assert all(type(value) is float for value in scored.rewards)


@pytest.mark.parametrize(
    ("values", "reason", "line"),
    [
        ([0.0, float("nan")], "returned nan, expected a finite number", 2),
        ([0.0, float("-inf")], "returned -inf, expected a finite number", 2),
        ([0.0, None], "returned None, expected a finite number", 2),
        ([0.0, "1"], "returned '1', expected a finite number", 2),
        ([0.0, 1j], "returned 1j, expected a finite number", 2),
        (torch.zeros(2, 1), "returned [0.0], expected a finite number", 1),
        ([0.0], "returned 1 values for 2 completions", 1),
        ([0.0, 0.0, 0.0], "returned 3 values for 2 completions", 1),
        (None, "returned NoneType, expected a list of floats", 1),
        (1.0, "returned float, expected a list of floats", 1),
        ({"a": 1.0, "b": 2.0}, "(part 'a') returned float, expected a list of floats", 1),
        ({"a": [1.0, 2.0], "b": [0.0, float("nan")]}, "(part 'b') returned nan, expected a finite number", 2),
        ({"reward": [1.0]}, "(part 'reward') returned 1 values for 2 completions", 1),
        ({}, "returned an empty dict", 1),
        ("12", "returned str, expected a list of floats", 1),
    ],
)
def test_bad_values_are_named(user_module: ModuleType, values: Any, reason: str, line: int) -> None:
    user_module.f = lambda completions, solutions, samples: values  # type: ignore[attr-defined]
    scorer = build_scorer(RewardConfig(functions=("user_rewards:f",)))
    with pytest.raises(RewardError) as caught:
        scorer.score(["first text", "second text" + "!" * 500], [sample(1), sample(2)])
    message = str(caught.value)
    assert "reward function 'user_rewards:f'" in message
    assert reason in message
    assert f"for rows.jsonl:{line} on completion '{('first', 'second')[line - 1]} text" in message
    assert len(message) < 300


def test_a_raising_function_is_named_with_its_row_and_cause(user_module: ModuleType) -> None:
    def fragile(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
        return [1.0 / (text != "bad") for text in completions]

    user_module.fragile = fragile  # type: ignore[attr-defined]
    scorer = build_scorer(RewardConfig(functions=("user_rewards:fragile",)))
    with pytest.raises(RewardError) as caught:
        scorer.score(["good", "bad", "good"], [sample(1), sample(2), sample(3)])
    assert re.search(r"'user_rewards:fragile' raised ZeroDivisionError.*rows\.jsonl:2.*'bad'", str(caught.value))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    frames = caught.value.__cause__.__traceback__
    assert frames is not None
    assert frames.tb_next is not None
    assert frames.tb_next.tb_frame.f_code is fragile.__code__


def test_scoring_nothing_gives_empty_columns() -> None:
    scored = build_scorer(RewardConfig()).score([], [])
    assert scored.rewards == []
    assert scored.parts == {"accuracy_reward": [], "format_reward": [], "tinyllava_video_r1": []}


def test_one_sample_per_completion_is_required() -> None:
    with pytest.raises(RewardError, match="2 completions came with 1 samples"):
        build_scorer(RewardConfig()).score(["a", "b"], [sample()])


def test_what_a_module_imports_in_vain_is_not_taken_for_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_with_needs.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = "No module named 'no_such_package_here'; 'rewards_with_needs' imports it: install it"
    with pytest.raises(RewardError, match=expected):
        build_scorer(RewardConfig(functions=("rewards_with_needs:f",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"functions": ("tinyllava_video_r",)}, "did you mean 'tinyllava_video_r1'?"),
        ({"functions": ("length",)}, "unknown reward function 'length'; built in are tinyllava_video_r1"),
        ({"functions": ()}, "reward.functions is []; it must be a list of at least one"),
        ({"functions": ("think_format", "think_format")}, "names a function twice"),
        ({"weights": (1.0, 2.0)}, "reward.weights has 2 numbers for 1 reward.functions"),
        ({"weights": (float("nan"),)}, "reward.weights is [nan]; it must be finite"),
        ({"mode": "papr"}, "reward.mode is 'papr'; choose from code, paper"),
        ({"base": float("inf")}, "reward.base is inf"),
        ({"max_think_chars": 0}, "reward.max_think_chars is 0"),
        (
            {"functions": ("no_such_module_here:f",)},
            "start in the folder of 'no_such_module_here' or put that on PYTHONPATH",
        ),
        ({"functions": (":length",)}, "unknown reward function ':length'"),
        ({"functions": (".rewards:length",)}, "unknown reward function '.rewards:length'"),
        ({"functions": ("user_rewards:lenght",)}, "has no function 'lenght' (did you mean 'length'?)"),
        ({"functions": ("user_rewards:CONSTANT",)}, "has no function 'CONSTANT'"),
        ({"functions": ("user_rewards:two",)}, "must accept (completions, solutions, samples)"),
    ],
)
def test_bad_configuration_is_refused_at_build(user_module: ModuleType, changes: dict[str, Any], message: str) -> None:
    def length(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
        return [0.0 for _ in completions]

    def two(completions: list[str], solutions: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    vars(user_module).update(length=length, two=two, CONSTANT=3)
    with pytest.raises((RewardError, ConfigError)) as caught:
        build_scorer(RewardConfig(**changes))
    assert message in str(caught.value)
