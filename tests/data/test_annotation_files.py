"""Annotation readers: the published files unchanged, every kind of bad row, both policies, the decode ledger."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from shared_data import shared_path

from fastr1.config import ConfigError
from fastr1.data.bad_samples import BadSampleFile
from fastr1.data.conversations import load_conversations
from fastr1.data.ledger import BadRow, BadSampleLedger, LoadedSamples, tokenize_samples
from fastr1.data.questions import load_questions, option_letters
from fastr1.schema import BadSample, DataError, Sample, SftSample

PROBLEM = "What is shown?\nOptions:\nA. owl.\nB. sheep.\nC. dog."


def grpo_row(**changes: Any) -> dict[str, Any]:
    row = {
        "problem_id": 7,
        "problem": PROBLEM,
        "data_type": "video",
        "problem_type": ["reasoning"],
        "solution": "<answer>C</answer>",
        "video_filename": "./clips/a.mp4",
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


def sft_row(**changes: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\n  Which one?  "},
        {"from": "gpt", "value": "<think> x </think> <answer> C </answer>"},
    ]
    row = {"id": "12", "conversations": turns, "video": "./clips/a.mp4"}
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A video root with one usable file and one empty one."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"not decoded here")
    (tmp_path / "clips" / "empty.mp4").write_bytes(b"")
    return tmp_path


def write_jsonl(root: Path, *rows: dict[str, Any] | bytes) -> Path:
    file = root / "rows.jsonl"
    file.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return file


def write_json(root: Path, value: Any) -> Path:
    file = root / "rows.json"
    file.write_text(json.dumps(value))
    return file


def test_published_grpo_file_loads_unchanged() -> None:
    file = shared_path("data/nextqa_0-30s.jsonl")
    loaded = load_questions(file, "/videos", check_files=False)
    assert (len(loaded.samples), loaded.bad_rows, loaded.num_rows) == (5496, [], 5496)
    answers = Counter(sample.letter for sample in loaded.samples)
    assert answers == {"A": 1100, "B": 1062, "C": 1088, "D": 1101, "E": 1145}
    assert {sample.options for sample in loaded.samples} == {"ABCDE"}
    raw = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample.problem for sample in loaded.samples] == [row["problem"] for row in raw]
    assert len({sample.video_path for sample in loaded.samples}) == 1296
    assert loaded.samples[0] == Sample(
        sample_id="1",
        problem=raw[0]["problem"],
        options="ABCDE",
        letter="C",
        video_path=Path("/videos/NextQA/NExTVideo/1001/6337115012.mp4"),
        origin="nextqa_0-30s.jsonl:1",
        problem_type="reasoning",
    )


def test_published_sft_file_loads_unchanged() -> None:
    loaded = load_conversations(shared_path("data/nextqa-coldstart-16.json"), "/videos", check_files=False)
    assert len(loaded.samples) == 16
    first = loaded.samples[0]
    assert (first.sample_id, first.origin) == ("8968804598", "nextqa-coldstart-16.json[0]")
    assert first.video_path == Path("/videos/NextQA/NExTVideo/1006/8968804598.mp4")
    assert first.question.startswith("Why is the blue sweater guy looking at the shirtless men?\nOptions:\nA. sharing")
    assert first.answer.startswith("<think> Let's see.")
    assert all("<image>" not in sample.question for sample in loaded.samples)


def test_good_rows_and_optional_fields(root: Path) -> None:
    file = write_jsonl(
        root,
        grpo_row(),
        b"   ",
        grpo_row(problem_id="q8", data_type=..., problem_type=..., note="ignored", problem=f"<image>\n{PROBLEM} "),
        grpo_row(problem_type="counting", problem="Pick.\n(A) x\n(B) y", solution="<answer> B </answer>"),
    )
    samples = load_questions(file, root).samples
    assert [(sample.sample_id, sample.origin, sample.problem_type) for sample in samples] == [
        ("7", "rows.jsonl:1", "reasoning"),
        ("q8", "rows.jsonl:3", ""),
        ("7", "rows.jsonl:4", "counting"),
    ]
    assert samples[1].problem == f"\n{PROBLEM} "
    assert samples[0].video_path == root / "clips" / "a.mp4"


BAD_GRPO_ROWS = [
    (b'{"problem_id": 1,', "not valid JSON"),
    (b'{"problem": "\xff"}', "not valid JSON"),
    (b"[1, 2]", "the row is list"),
    (grpo_row(problem=...), "field 'problem' is missing"),
    (grpo_row(problem=""), "field 'problem' is empty"),
    (grpo_row(problem=" \n"), "field 'problem' is empty"),
    (grpo_row(problem=["What?"]), "field 'problem' is list"),
    (grpo_row(problem_id=...), "field 'problem_id' is missing"),
    (grpo_row(problem_id=True), "field 'problem_id' is bool"),
    (grpo_row(problem_id=1.5), "field 'problem_id' is float"),
    (grpo_row(problem_type=3), "field 'problem_type' is int"),
    (grpo_row(data_type="image"), "data_type is 'image'"),
    (grpo_row(solution=...), "field 'solution' is missing"),
    (grpo_row(problem=f"Which {chr(0xD83D)}?\nA. x.\nB. y."), "half of a surrogate pair"),
    (grpo_row(video_filename="a" * 300 + ".mp4"), "cannot be looked at"),
    (grpo_row(solution="C"), "solution 'C' is not one of the options ABC"),
    (grpo_row(solution="<answer>E</answer>"), "is not one of the options ABC"),
    (grpo_row(solution="<answer>c</answer>"), "is not one of the options ABC"),
    (grpo_row(problem="What is shown?"), "offers 0 options"),
    (grpo_row(problem="A. question\nOptions:\nB. only"), "offers 1 options"),
    (grpo_row(problem="Options:\nA. x\nC. y"), "lettered 'AC'"),
    (grpo_row(problem="Options:\nA. x\nA. y\nB. z"), "lettered 'AAB'"),
    (grpo_row(problem="What <image> is\nOptions:\nA. x\nB. y\nC. z"), "holds <image> inside"),
    (grpo_row(problem=f"<image><image>\n{PROBLEM}"), "holds <image> inside"),
    (grpo_row(problem="<image>\n"), "empty apart from <image>"),
    (grpo_row(video_filename=...), "field 'video_filename' is missing"),
    (grpo_row(video_filename=None), "field 'video_filename' is missing"),
    (grpo_row(video_filename="./clips/none.mp4"), "none.mp4 does not exist"),
    (grpo_row(video_filename="./clips"), "does not exist"),
    (grpo_row(video_filename="./clips/empty.mp4"), "is empty (0 bytes)"),
    (grpo_row(video_filename="../a.mp4"), "does not lie below the video root"),
    (grpo_row(video_filename="/clips/a.mp4"), "does not lie below the video root"),
]

BAD_SFT_ROWS = [
    ("text", "the row is str"),
    (sft_row(id=...), "field 'id' is missing"),
    (sft_row(video=5), "field 'video' is int"),
    (sft_row(video="clips/none.mp4"), "none.mp4 does not exist"),
    (sft_row(conversations=...), "field 'conversations' is missing"),
    (sft_row(conversations="hi"), "field 'conversations' is str"),
    (sft_row(conversations=["hi", "ho"]), "the turns are from ['hi', 'ho']"),
    (sft_row(conversations=sft_row()["conversations"] * 2), "give exactly one 'human' turn"),
    (sft_row(conversations=sft_row()["conversations"][::-1]), "the turns are from ['gpt', 'human']"),
    (sft_row(conversations=[{"from": "human"}, {"from": "gpt", "value": "x"}]), "field 'value' is missing"),
    (sft_row(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]), "field 'value' is empty"),
    (
        sft_row(conversations=[{"from": "human", "value": "a <image> b"}, {"from": "gpt", "value": "x"}]),
        "the human turn holds <image> inside",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_GRPO_ROWS)
def test_bad_grpo_row_stops_or_is_dropped(root: Path, row: Any, reason: str) -> None:
    file = write_jsonl(root, grpo_row(), row)
    with pytest.raises(DataError) as caught:
        load_questions(file, root)
    message = str(caught.value)
    assert message.startswith(f"{file}:2: ")
    assert reason in message
    assert "; " in message
    assert 'data.policy to "skip"' in message
    loaded = load_questions(file, root, policy="skip", max_bad_fraction=0.5)
    assert [sample.origin for sample in loaded.samples] == ["rows.jsonl:1"]
    assert [bad.origin for bad in loaded.bad_rows] == ["rows.jsonl:2"]
    assert loaded.num_rows == 2


@pytest.mark.parametrize(("row", "reason"), BAD_SFT_ROWS)
def test_bad_sft_row_stops_or_is_dropped(root: Path, row: Any, reason: str) -> None:
    file = write_json(root, [sft_row(), row])
    with pytest.raises(DataError) as caught:
        load_conversations(file, root)
    assert str(caught.value).startswith(f"{file}[1]: ")
    assert reason in str(caught.value)
    loaded = load_conversations(file, root, policy="skip", max_bad_fraction=0.5)
    assert [bad.origin for bad in loaded.bad_rows] == ["rows.json[1]"]
    assert loaded.samples == [
        SftSample("12", "Which one?", "<think> x </think> <answer> C </answer>", root / "clips/a.mp4", "rows.json[0]")
    ]


def test_solution_written_over_several_lines_is_the_same_solution(root: Path) -> None:
    file = write_jsonl(root, grpo_row(solution="<answer>\nC\n</answer>"))
    assert load_questions(file, root).samples[0].solution == "<answer>C</answer>"


def test_error_policy_names_the_first_bad_row(root: Path) -> None:
    file = write_jsonl(root, grpo_row(), grpo_row(solution="B"), grpo_row(problem=""))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: solution 'B'"):
        load_questions(file, root)


def test_skip_policy_is_bounded(root: Path) -> None:
    rows = [grpo_row()] * 16 + [grpo_row(solution="B")] * 4
    file = write_jsonl(root, *rows)
    assert len(load_questions(file, root, policy="skip", max_bad_fraction=0.2).samples) == 16
    with pytest.raises(DataError) as caught:
        load_questions(file, root, policy="skip", max_bad_fraction=0.19)
    message = str(caught.value)
    assert "4 of 20 rows" in message
    assert all(f"rows.jsonl:{line}: solution 'B'" in message for line in (17, 18, 19))
    assert "and 1 more" in message
    only_bad = write_jsonl(root, grpo_row(solution="B"))
    with pytest.raises(DataError, match="1 of 1 rows"):
        load_questions(only_bad, root, policy="skip", max_bad_fraction=1.0)


def test_unusable_files_and_settings_are_named(root: Path) -> None:
    empty = write_jsonl(root, b"", b"  ")
    with pytest.raises(DataError, match="holds no rows"):
        load_questions(empty, root)
    with pytest.raises(DataError, match="holds no rows"):
        load_conversations(write_json(root, []), root)
    with pytest.raises(DataError, match="expected a JSON list"):
        load_conversations(write_json(root, {"id": 1}), root, policy="skip")
    with pytest.raises(DataError, match=r"not valid JSON \(.*a JSONL file of questions belongs to the task grpo"):
        load_conversations(write_jsonl(root, sft_row(), sft_row()), root, policy="skip")
    for indent in (None, 2):  # the whole list in one line, or its first bracket
        (root / "list.json").write_text(json.dumps([{"id": 1}], indent=indent))
        with pytest.raises(DataError, match=r"list\.json:1: .*a list of conversations belongs to the task sft"):
            load_questions(root / "list.json", root)
    good = write_jsonl(root, grpo_row())
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        load_questions(root / "none.jsonl", root)
    with pytest.raises(DataError, match=f"annotation file {root} is a folder; correct data.train_file"):
        load_questions(root, root)
    with pytest.raises(DataError, match=r"is not a folder; correct data\.video_root or data\.eval_video_root"):
        load_questions(good, root / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.policy is 'ignore'"):
        load_questions(good, root, policy="ignore")
    with pytest.raises(ConfigError, match=r"data\.max_bad_fraction is 5"):
        load_questions(good, root, max_bad_fraction=5)


def test_check_files_off_accepts_absent_videos(root: Path) -> None:
    file = write_jsonl(root, grpo_row(video_filename="./clips/none.mp4"))
    assert load_questions(file, root / "nowhere", check_files=False).samples[0].video_path.name == "none.mp4"


def loaded_with(root: Path, num_good: int, num_bad: int) -> LoadedSamples[Sample]:
    file = write_jsonl(root, *[grpo_row()] * num_good, *[grpo_row(solution="B")] * num_bad)
    return load_questions(file, root, policy="skip", max_bad_fraction=1.0)


def test_limit_reads_the_first_rows_and_makes_up_for_no_bad_one(root: Path) -> None:
    file = write_jsonl(root, grpo_row(), b"", grpo_row(solution="B"), grpo_row(), grpo_row(problem=""))
    loaded = load_questions(file, root, policy="skip", max_bad_fraction=0.5, limit=3)
    assert [sample.origin for sample in loaded.samples] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert [bad.origin for bad in loaded.bad_rows] == ["rows.jsonl:3"]


def test_text_that_does_not_fit_is_a_bad_row(root: Path) -> None:
    file = write_jsonl(root, grpo_row(), grpo_row(problem=f"Long. {PROBLEM}"), grpo_row(), grpo_row(solution="B"))
    loaded = load_questions(file, root, policy="skip", max_bad_fraction=0.5)

    def tokenize(sample: Sample) -> int:
        if sample.problem.startswith("Long"):
            raise DataError(f"{sample.origin}: the prompt has 9 tokens; shorten it")
        return len(sample.problem)

    fitting, tokens = tokenize_samples(loaded, tokenize, policy="skip", max_bad_fraction=0.5)
    assert [sample.origin for sample in fitting.samples] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert tokens == [len(PROBLEM)] * 2
    assert [bad.line for bad in fitting.bad_rows] == [2, 4]  # in file order
    assert fitting.num_rows == 4
    expected = rf'{file}:2: the prompt has 9 tokens; shorten it, or set data\.policy to "skip"'
    with pytest.raises(DataError, match=expected):
        tokenize_samples(loaded, tokenize, policy="error", max_bad_fraction=0.5)
    with pytest.raises(DataError, match="2 of 4 rows cannot be used"):
        tokenize_samples(loaded, tokenize, policy="skip", max_bad_fraction=0.25)


def test_ledger_raises_at_once_under_the_error_policy(root: Path) -> None:
    ledger = BadSampleLedger(loaded_with(root, 1000, 0))
    with pytest.raises(DataError, match=rf"{root}/rows\.jsonl:3: no frames; repair"):
        ledger.record([BadRow("rows.jsonl:3", "no frames")], step=1, when="training")
    assert ledger.num_bad == 0


def test_ledger_counts_distinct_samples_and_dropped_rows_against_the_bound(root: Path) -> None:
    ledger = BadSampleLedger(loaded_with(root, 97, 3), policy="skip", max_bad_fraction=0.05)
    assert (ledger.num_bad, ledger.num_rows) == (3, 100)
    again = [BadRow("rows.jsonl:3", "no frames"), BadRow("rows.jsonl:9", "cut short")]
    new = ledger.record([again[0], *again], step=4, when="training")
    file = str(root / "rows.jsonl")
    assert new == [
        BadSample(4, "training", file, 3, "no frames"),
        BadSample(4, "training", file, 9, "cut short"),
    ]
    assert ledger.record(again, step=5, when="training") == []
    assert ledger.num_bad == 5
    ledger.check_bound()
    ledger.record([BadRow("rows.jsonl:11", "no frames")], step=6, when="training")
    with pytest.raises(DataError, match=r"6 of 100 rows.*rows\.jsonl:98: solution 'B'.*rows\.jsonl:99.*and 3 more"):
        ledger.check_bound()


def test_ledger_goes_on_from_its_state_and_reads_the_file_again(root: Path) -> None:
    loaded = loaded_with(root, 8, 2)
    ledger = BadSampleLedger(loaded, policy="skip", max_bad_fraction=0.5)
    ledger.record([BadRow("rows.jsonl:3", "no frames")], step=4, when="training")
    ledger.record([BadRow("rows.jsonl:5", "no frames")], step=6, when="training")
    resumed = BadSampleLedger(loaded, policy="skip", max_bad_fraction=0.5)
    resumed.load_state_dict(json.loads(json.dumps(ledger.state_dict(5))))
    assert resumed.rows == ledger.rows[:3]
    assert [row.line for row in resumed.rows] == [9, 10, 3]


def test_line_of_a_bad_entry_of_a_list(root: Path) -> None:
    loaded = load_conversations(write_json(root, [sft_row(), "text"]), root, policy="skip", max_bad_fraction=0.5)
    ledger = BadSampleLedger(loaded, policy="skip", max_bad_fraction=0.5)
    assert [(row.step, row.when, row.line) for row in ledger.rows] == [(0, "reading", 1)]
    ledger.record([BadRow("rows.json[0]", "no frames")], step=1, when="training")
    with pytest.raises(DataError, match=r"rows\.json\[1\]: the row is str.*rows\.json\[0\]: no frames"):
        ledger.check_bound()


def test_file_of_bad_samples_is_there_only_with_rows(tmp_path: Path) -> None:
    rows = [BadSample(0, "reading", "a.jsonl", 3, "kaputt é"), BadSample(2, "training", "a.jsonl", 5, "two\nlines")]
    file = BadSampleFile(tmp_path / "run")
    file.rewrite([])
    file.append([])
    assert not file.path.exists()
    file.rewrite(rows[:1])
    file.append(rows[1:])
    assert [BadSample(**json.loads(line)) for line in file.path.read_text().splitlines()] == rows
    BadSampleFile(tmp_path / "run", is_main=False).rewrite([])
    BadSampleFile(tmp_path / "run", is_main=False).append(rows)
    assert len(file.path.read_text().splitlines()) == 2
    file.rewrite([])
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("problem", "letters"),
    [
        (PROBLEM, "ABC"),
        ("A. B. Smith did what?\nOptions:\nA. x\nB. y", "AB"),
        ("Q\n(A) x\n(B) y\nC) z\nD: w", "ABCD"),
        ("Q\nOptions:\nA.\nB.", "AB"),
        ("Apples or pears?\nBoth.", ""),
        ("U.S.A. or\nE.U.?", ""),
    ],
)
def test_option_letters(problem: str, letters: str) -> None:
    assert option_letters(problem) == letters


def test_a_file_of_bad_rows_alone_is_not_sent_to_the_bound(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, grpo_row(solution="C"), grpo_row(solution="D"))
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used \(.*\); repair the rows$"):
        load_questions(path, tmp_path, policy="skip", max_bad_fraction=1.0, check_files=False)


def test_the_documented_files_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
    questions, conversations = re.findall(r"^```json\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "1.mp4").write_bytes(b"video")
    (tmp_path / "questions.jsonl").write_text(questions)
    (tmp_path / "coldstart.json").write_text(conversations)
    (question,) = load_questions(tmp_path / "questions.jsonl", tmp_path).samples
    assert (question.options, question.letter, question.problem_type) == ("AB", "B", "direction")
    (turn,) = load_conversations(tmp_path / "coldstart.json", tmp_path).samples
    assert turn.question == question.problem
    assert turn.video_path == question.video_path
    assert turn.answer.endswith("<answer> B </answer>")
