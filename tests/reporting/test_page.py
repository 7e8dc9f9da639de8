"""What the page of a run says, and that it stays one small file."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    GROUP,
    HOSTILE,
    JPEG,
    PROMPTS,
    QUESTION,
    answer,
    metrics_row,
    rollout_row,
    rollouts,
    sheet_row,
    write_config,
    write_evaluation,
    write_lines,
    write_run,
)

from fastr1 import cli
from fastr1.reporting import browser, page
from fastr1.reporting.browser import split_completion
from fastr1.reporting.charts import MAX_LINES
from fastr1.reporting.held_out import MAX_KINDS
from fastr1.reporting.page import (
    MAX_BYTES,
    MAX_NOTES,
    MAX_OTHER_CHARTS,
    build_page,
    facts,
    headline,
    training_seconds,
    write_page,
)
from fastr1.reporting.read_run import MAX_CHARS, read_run
from fastr1.reporting.settings import beside_defaults


def text_of(content: str) -> str:
    """What is read: without tags, styles and scripts, white space as one blank."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", content, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def embedded(content: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', content, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def groups(content: str) -> list[str]:
    listed = content.partition('<section id="rollouts"')[2].partition("</section>")[0]
    return listed.split('<details class="item group"')[1:]


def test_headline_has_the_number_with_its_conditions(tmp_path: Path) -> None:
    run = write_run(tmp_path, seed=5)
    conditions = {"device": "cpu", "cores": 2, "torch": "2.13", "date": "2026-11-27", "commit": "abc"}
    (run / "summary.json").write_text(json.dumps({"title": "Mine", "conditions": conditions}))
    text = text_of(build_page(read_run(run)))
    assert "Accuracy 50.0 % → 50.0 % of 4 held-out questions, before and after" in text
    assert "Mine" in text
    assert "seed 5 updates 20 of 20 training time 80 s hardware CPU, 2 cores torch 2.13" in text
    assert "model models/toy" in text


def test_metrics_beyond_the_charts_of_a_page_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for number, summary in ((MAX_OTHER_CHARTS, "40 further metrics"), (MAX_OTHER_CHARTS + 102, "40 of 142 further")):
        others = {f"metric_{i:03}": 1.0 for i in range(number - 1)}  # and my_own_number
        write_lines(run / "metrics.jsonl", [metrics_row(1, **others)])
        text = text_of(build_page(read_run(run)))
        assert summary in text
        left_out = "102 are left out to keep the page small, metrics.jsonl has them: metric_040, metric_041, "
        assert (left_out in text) == (number > MAX_OTHER_CHARTS)
    assert "metric_139, …" in text
    assert "metric_140" not in text


def test_hardware_is_what_the_training_wrote_down(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for content, expected in (
        ({"device": "cpu", "cores": 3, "torch": "2.13", "processes": 1}, "CPU, 3 cores"),
        ({"device": "NVIDIA H100", "cores": 16, "torch": "2.13", "processes": 4}, "4 × NVIDIA H100"),
    ):
        (run / "hardware.json").write_text(json.dumps(content))
        found = dict(facts(read_run(run)))
        assert (found["hardware"], found["torch"]) == (expected, "2.13")


def test_a_page_needs_no_torch() -> None:
    code = "import sys, fastr1.reporting.compare, fastr1.reporting.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_headline_takes_the_best_source_there_is(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    run.evaluations = {}
    found = headline(run)
    assert found == {
        "before": 0.5,
        "after": 0.5,
        "of": "held-out questions",
        "when": "update 10 and 20, during training",
    }
    run.summary = {
        "before": {"accuracy": 0.25, "num_questions": 8.0},
        "after": {"accuracy": 0.75, "num_questions": 8.0},
    }
    assert headline(run) == {"before": 0.25, "after": 0.75, "of": "8 held-out questions", "when": "before and after"}
    run.summary, run.series = {}, {}
    assert headline(run) is None
    assert ("hardware", "not recorded") in facts(run)
    assert "Accuracy not measured" in text_of(build_page(run))


def test_training_time_counts_the_updates_behind_every_row(tmp_path: Path) -> None:
    write_config(tmp_path)
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": 5, "time/step_seconds": 2.0}, {"step": 7, "time/step_seconds": 4.0}]
    )
    assert training_seconds(read_run(tmp_path)) == 5 * 2 + 2 * 4


def test_settings_that_differ_from_defaults_stand_apart(tmp_path: Path) -> None:
    write_config(tmp_path, seed=7)
    changed, same = beside_defaults(read_run_config(tmp_path))
    assert {name: (value, default) for name, value, default in changed} == {
        "model.path": ("models/toy", '""'),
        "data.train_file": ("t.jsonl", '""'),
        "data.video_root": ("videos", '""'),
        "grpo.num_generations": ("4", "8"),
        "grpo.beta": ("0.0", "0.01"),
        "optim.max_steps": ("20", "-1"),
        "run.seed": ("7", "42"),
        "run.output_dir": (str(tmp_path), "runs/grpo"),
    }
    assert ("optim.learning_rate", "1e-06") in same
    assert beside_defaults({"grpo": {"gone": 1}})[0] == [("grpo.gone", "1", "not a setting now")]
    assert beside_defaults({}) == ([], [])


def read_run_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_group_shows_frames_question_completions_rewards_and_marks(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [rollout_row(1, 0, i, is_truncated=i == 1) for i in range(GROUP)]
    rows += [rollout_row(1, 1, i, valid=False) for i in range(GROUP)]
    write_lines(run / "rollouts.jsonl", rows)
    content = build_page(read_run(run))
    first, second = groups(content)
    assert first.count('class="completion') == GROUP
    assert 'data-sheet="t0.jpg"' in first
    assert re.findall(r"<li><span>(.*?)</span>", first) == ["0.0 s", "0.5 s", "1.0 s", "1.5 s", "2.0 s", "2.5 s"]
    assert "grid-template:repeat(2,1fr)/repeat(4,1fr)" in first
    text = text_of(first)
    assert "Which way does it go?" in text
    assert "B. right. ✓" in text
    assert "A. left. ✓" not in text
    assert "1 reward 1 advantage +1.5 accuracy_reward 1 thinking thought 1 0 0 answer B" in text
    assert "2 reward 0 advantage -0.5 accuracy_reward 0 truncated thinking thought 1 0 1 answer A" in text
    assert 'class="completion up"' in first
    assert first.count('class="completion down"') == GROUP - 1
    assert "invalid" not in text
    assert text_of(second).count("invalid") == 1 + GROUP
    assert "no signal" in text_of(second)
    sheets = embedded(content, "sheets")
    assert set(sheets) == {"t0.jpg", "t1.jpg", "h0.jpg", "h1.jpg", "h2.jpg", "h3.jpg"}
    assert base64.b64decode(sheets["t0.jpg"]) == JPEG


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> a </think> <answer> B </answer>", [("think", "a"), ("answer", "B")]),
        ("x <answer>B</answer> y", [("outside", "x"), ("answer", "B"), ("outside", "y")]),
        ("<think>never ends", [("think", "never ends")]),
        ("<think></think><answer>B", [("think", ""), ("answer", "B")]),
        ("no tags", [("outside", "no tags")]),
        ("</think> B", [("outside", "</think> B")]),
        ("<think>a</think><think>b</think>", [("think", "a"), ("think", "b")]),
        ("  ", []),
    ],
)
def test_thinking_and_answer_are_told_apart_whatever_the_form(text: str, expected: list[tuple[str, str]]) -> None:
    assert split_completion(text) == expected


def test_a_completion_of_another_form_is_also_shown_as_it_was_written(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    texts = [
        "<think>a</think><answer>B</answer>",
        "<think>a</think> <think>B </answer>",
        "B",
        "<think>a<answer>B</answer>",
    ]
    write_lines(run / "rollouts.jsonl", [rollout_row(1, 0, i, completion=text) for i, text in enumerate(texts)])
    (group,) = groups(build_page(read_run(run)))
    assert [html.unescape(text) for text in re.findall(r'<div class="piece raw">(.*?)</div>', group)] == texts[1:]


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_evaluation(run, "after", [answer(i, i != 1, is_well_formed=i != 3) for i in range(4)])
    content = build_page(read_run(run))
    pairs = re.findall(
        r'<details class="item pair" [^>]*data-outcome="(\w+)" data-kind="(\w*)".*?</details>', content, flags=re.DOTALL
    )
    assert pairs == [("fixed", "direction"), ("fixed", "colour"), ("broken", "colour"), ("right", "direction")]
    text = text_of(content)
    assert "2 fixed, 1 broken of 4; a split as uneven comes by chance with p = 1 (sign test)" in text
    assert "A → B (right: B)" in text
    assert "after right: B not well formed thinking held out 3" in text
    rates = text_of(content[content.index('<table id="rates">') : content.index("</table>")])
    assert rates.startswith("before after accuracy 50.0 % 15–85 75.0 % 30–95 accuracy, colour 50.0 %")
    assert "strict accuracy 50.0 % 15–85 50.0 % 15–85" in rates


def test_bad_samples_are_listed_with_their_reasons(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [{"step": i, "when": "training", "file": "t.jsonl", "line": i, "reason": f"broken {i}"} for i in range(250)]
    write_lines(run / "bad_samples.jsonl", rows)
    text = text_of(build_page(read_run(run)))
    assert "250 left out; the first 200." in text
    assert "199 training t.jsonl 199 broken 199" in text
    assert "broken 200" not in text


def test_runs_without_sheets_or_with_lost_ones_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "frames" / "t1.jpg").unlink()
    text = text_of(build_page(read_run(run)))
    assert "1 contact sheets are named in frames/ but cannot be read, e.g. t1.jpg." in text
    assert "no contact sheet of this clip" in text
    (run / "frames" / "index.jsonl").unlink()
    content = build_page(read_run(run))
    assert "The run folder has no contact sheets (frames/): frames are not shown." in text_of(content)
    assert "<img" not in content


def test_a_run_in_progress_says_how_far_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert "finished, 20" in text_of(build_page(read_run(run)))
    (run / "final").rmdir()
    write_lines(run / "metrics.jsonl", [metrics_row(step) for step in range(1, 8)])
    write_lines(run / "rollouts.jsonl", rollouts(7))
    assert "in progress or stopped: update 7 of 20; last row written 20" in text_of(build_page(read_run(run)))
    (run / "metrics.jsonl").write_text("")
    (run / "rollouts.jsonl").write_text("")
    text = text_of(build_page(read_run(run)))
    assert "There are no numbers yet: wait for the first update." in text
    assert "no completions: rollouts.jsonl has no rows yet" in text


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_no_text_of_a_run_becomes_markup_or_script(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    plain = sorted({tag for tag, _ in Elements(build_page(read_run(run))).found})
    texts = {"completion": HOSTILE, "question": HOSTILE, "solution": HOSTILE, "sample_id": HOSTILE, "video": HOSTILE}
    rows = [rollout_row(1, 0, i, **texts, rewards={HOSTILE: 1.0}) for i in range(GROUP)]
    write_lines(run / "rollouts.jsonl", rows)
    write_lines(run / "metrics.jsonl", [metrics_row(1, **{f"rewards/{HOSTILE}": 1.0, f"eval/accuracy/{HOSTILE}": 1.0})])
    write_evaluation(run, "before", [answer(0, True, completion=HOSTILE, problem_type=HOSTILE, letter=HOSTILE)])
    write_evaluation(run, "after", [answer(0, True, completion=HOSTILE, problem_type=HOSTILE)])
    write_lines(
        run / "bad_samples.jsonl", [{"step": 1, "when": HOSTILE, "file": HOSTILE, "line": 1, "reason": HOSTILE}]
    )
    row = sheet_row(HOSTILE, HOSTILE, "training", "t0")
    hostile_name = "frames/<!--<script>&.jpg"
    (run / hostile_name).write_bytes(JPEG)
    write_lines(run / "frames" / "index.jsonl", [{**row, "sheet": hostile_name}])
    conditions = {"device": HOSTILE, "torch": HOSTILE}
    summary = {"title": HOSTILE, "conditions": conditions, "accuracy": {HOSTILE: 0.5}}
    (run / "summary.json").write_text(json.dumps(summary))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, HOSTILE: HOSTILE}))
    content = build_page(read_run(run), version=HOSTILE)
    elements = Elements(content).found
    assert {tag for tag, _ in elements} <= set(plain)
    assert sum(tag == "script" for tag, _ in elements) == 4
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "<script>window" not in content
    assert embedded(content, "sheets") == {"<!--<script>&.jpg": base64.b64encode(JPEG).decode()}
    assert text_of(content).count(HOSTILE) > 20


def test_half_a_pair_of_surrogates_is_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [rollout_row(1, 0, i, completion="\ud800 <b>", question="\udfff") for i in range(GROUP)]
    write_lines(run / "rollouts.jsonl", rows)
    content = write_page(run).read_text(encoding="utf-8")
    assert "? &lt;b&gt;" in content


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    elements = Elements(build_page(read_run(write_run(tmp_path)))).found
    assert not {tag for tag, _ in elements} & {"iframe", "object", "embed", "base"}
    assert [a for tag, a in elements if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    sources = [a[name] for tag, a in elements for name in ("src", "href", "action") if name in a and tag != "link"]
    assert {source for source in sources if source and not source.startswith("#")} == {
        "metrics.jsonl",
        "rollouts.jsonl",
    }
    (policy,) = (a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy


def test_a_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = [rollout_row(1, 0, i, completion="x" * (MAX_CHARS + 123)) for i in range(GROUP)]
    write_lines(run / "rollouts.jsonl", rows)
    content = build_page(read_run(run))
    assert text_of(content).count("… 123 more characters in the files of the run") == GROUP
    assert "x" * (MAX_CHARS + 1) not in content


def test_the_page_stays_small_and_says_what_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    long = "<&>" * (MAX_CHARS // 3)  # 13 bytes of markup for 3 characters
    rows = [
        rollout_row(step, p, i, sample_id=f"{step} {p}", completion=long)
        for step in range(1, 21)
        for p in range(8)
        for i in range(GROUP)
    ]
    write_lines(run / "rollouts.jsonl", rows)
    for name in ("before", "after"):
        write_evaluation(run, name, [answer(i, name == "after", completion=long, sample_id=f"h{i}") for i in range(40)])
    names = [f"n{i}" for i in range(20)]
    sheets = [sheet_row(f"videos/v{p}.mp4", f"h{p}", "evaluation", name) for p, name in enumerate(names)]
    write_lines(run / "frames" / "index.jsonl", sheets)
    for name in names:
        (run / "frames" / f"{name}.jpg").write_bytes(JPEG * 10_000)
    content = build_page(read_run(run))
    assert 4_000_000 < len(content.encode()) <= MAX_BYTES
    text = text_of(content)
    num_left_out = int(re.search(r"(\d+) groups are left out to keep the page small", text)[1])  # type: ignore[index]
    assert num_left_out + len(groups(content)) >= 12 * 8
    assert re.search(r"\d+ held-out questions are left out to keep the page small", text)
    assert "Some contact sheets are left out" in text


def test_the_page_stays_small_where_sizes_are_not_those_expected(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    many = {f"part {i} {'&' * 90}": 1.0 for i in range(120)}
    rows = [rollout_row(step, p, i, rewards=many) for step in range(1, 21) for p in range(8) for i in range(GROUP)]
    write_lines(run / "rollouts.jsonl", rows)
    numbers = {f"{prefix}{i}": 0.5 for prefix in ("rewards/", "eval/accuracy/", "time/", "own ") for i in range(3000)}
    write_lines(run / "metrics.jsonl", [metrics_row(step, **numbers) for step in range(1, 21)])
    evaluated = [answer(i, True, problem_type=f"kind {i}") for i in range(3000)]
    for name in ("before", "after"):
        write_evaluation(run, name, evaluated)
    bad = {"step": 1, "when": "&" * 10**5, "file": "&" * 10**5, "line": 1, "reason": "&" * 10**5}
    write_lines(run / "bad_samples.jsonl", [bad] * 200)
    outside = {**sheet_row("videos/v0.mp4", "s0", "training", "t0"), "sheet": "../x.jpg"}
    write_lines(run / "frames" / "index.jsonl", [outside] * 10_000)
    (run / "summary.json").write_text(json.dumps({"title": "&" * 10**7}))
    (run / "config.json").write_text(json.dumps({"run": {"output_dir": "&" * 10**7}}))
    content = build_page(read_run(run))
    assert len(content.encode()) <= MAX_BYTES
    text = text_of(content)
    assert "further notes" in text
    assert "further lines are left out" in text
    assert max(figure.count("<li>") for figure in content.split("<figure")[1:]) == MAX_LINES
    assert content.partition('id="notes"')[2].partition("</ul>")[0].count("<li>") == MAX_NOTES + 1
    assert content.partition('id="rates"')[2].partition("</table>")[0].count("<tr>") == 2 + 2 * (1 + MAX_KINDS)
    assert re.search(r"\d+ groups are left out to keep the page small", text)


def test_the_shares_of_the_page_leave_room_for_the_rest() -> None:
    assert browser.GROUP_BYTES + browser.PAIR_BYTES + browser.SHEET_BYTES <= MAX_BYTES - 2_000_000


def test_report_command_writes_page_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.png'}\n{run / 'report.html'}\n"
    assert 'href="report.png"' in (run / "report.html").read_text()
    assert cli.main(["report", str(run), "--output", str(tmp_path / "new" / "mine.html")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"mine.html", "mine.png"}
    assert "metrics.jsonl</a>" not in (tmp_path / "new" / "mine.html").read_text()  # which is not there


def test_report_command_names_a_place_where_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "x.html"
    assert cli.main(["report", str(run), "--output", str(target)]) == 2
    png, html_ = capsys.readouterr().err.splitlines()
    assert png.startswith(f"no x.png: {target.with_suffix('.png')} cannot be written (")
    assert html_.startswith(f"error: {target} cannot be written (")
    assert html_.endswith("choose another place with --output")
    assert cli.main(["compare", str(run), "--output", str(target)]) == 2
    assert "choose another place with --output\n" in capsys.readouterr().err


def test_report_command_draws_names_that_look_like_formulas(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a$b_{$ \\frac")
    write_lines(run / "metrics.jsonl", [metrics_row(step, **{r"rewards/$\frac{$": 1.0}) for step in range(1, 4)])
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.png").is_file()


def test_report_command_writes_the_page_where_there_is_nothing_to_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path)
    (run / "metrics.jsonl").unlink()
    assert cli.main(["report", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{run / 'report.html'}\n"
    assert captured.err.startswith(f"no report.png: cannot read {run / 'metrics.jsonl'}")


def test_groups_of_the_page_are_those_of_rankings_and_chosen_updates(tmp_path: Path) -> None:
    content = build_page(read_run(write_run(tmp_path)))
    found = groups(content)
    views = [re.search(r'data-views="([^"]*)"', group)[1].split() for group in found]  # type: ignore[index]
    assert sum("update" in view for view in views) == 12 * PROMPTS
    assert sum("best" in view for view in views) == PROMPTS
    assert sum("surprising" in view for view in views) == 1
    assert QUESTION.splitlines()[0] in found[0]
    assert page.PAGE_FILE == "report.html"
    assert write_page(tmp_path) == tmp_path / "report.html"
