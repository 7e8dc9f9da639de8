"""From the summary of a run to committed rows, and from those to the README's table and chart."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADLINE = "<!-- demo:headline -->\nold\n<!-- /demo:headline -->\n"
LOADING = "<!-- loading:table -->\nold\n<!-- /loading:table -->\n"
STEP = "<!-- step:table -->\nold\n<!-- /step:table -->\n"
ROLLOUT = "<!-- rollout:table -->\nold\n<!-- /rollout:table -->\n"
ROLLOUT += "<!-- rollout:speculation -->\nold\n<!-- /rollout:speculation -->\n"
README = f"# Title\n\n<!-- demo:table -->\nold\n<!-- /demo:table -->\n{HEADLINE}{LOADING}{ROLLOUT}{STEP}Kept.\n"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = load_script("record_demo")
renderer = load_script("render_readme")


def rates(accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "format_rate": 1.0,
        "num_questions": 150.0,
        "accuracy/order": accuracy,
        "accuracy/first": accuracy / 2,
    }


def write_run(folder: Path, *, seed: int = 0, after: float = 0.7, **conditions: Any) -> Path:
    summary = {
        "seed": seed,
        "num_questions": 150,
        "chance": 0.2,
        "updates": 4,
        "before": rates(0.5),
        "after": rates(after),
        "controls": {"shuffled_frames": rates(0.4), "repeated_frame": rates(0.3), "blank_video": rates(0.2)},
        "seconds": {"data": 60.0, "grpo": 300.0 + 60 * seed},
        "conditions": {
            "commit": "a" * 40,
            "dirty": False,
            "date": f"2026-11-25T05:0{seed}:00+00:00",
            "device": "cpu",
            "cores": 1,
            "threads": 1,
            "torch": "2.13.0",
            **conditions,
        },
    }
    updates = [{"step": s, "reward": s / 7, "loss": 1.0, "completion_length": 20.0, "kl": None} for s in range(1, 5)]
    updates[1]["eval/accuracy"] = 0.25
    (folder / "grpo").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in updates))
    return folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository with the rows of three seeds and a README made from them."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "README.md").write_text(README)
    for seed, after in enumerate((0.7, 0.8, 0.75)):
        run = write_run(tmp_path_factory.mktemp("runs") / str(seed), seed=seed, after=after)
        recorder.record(run, folder / "bench" / "results")
    write_loading(folder / "bench" / "results" / "loading.jsonl")
    write_steps(folder / "bench" / "results" / "step.jsonl")
    assert renderer.main(["--root", str(folder)]) == 0
    return folder


@pytest.fixture
def root(rendered: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(rendered, tmp_path / "root")


def write_loading(path: Path) -> None:
    """An older run of 480p, and the last of both sizes, where one peer's pixels are wrong."""
    common = {"device": "CPU X", "commit": "c" * 40, "spread": 0.02, "status": "ok"}
    shape = {"num_frames": 16, "seconds": 5, "side": 384}
    runs = [("1", 480, "ours", 90.0), ("2", 480, "ours", 100.4), ("2", 480, "peer", 120.0), ("3", 720, "ours", 1500.0)]
    lines = [
        {**common, "time": time, "provider": name, "median_ms": ms, "shape": {**shape, "height": height}}
        for time, height, name, ms in runs
    ]
    wrong = {**lines[-1], "provider": "peer", "status": "mismatch", "errors": {"pixels": 0.15}}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*lines, wrong]))


def test_table_of_loading_shows_the_last_run_of_every_size(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert "| | 480p | 720p |\n|---|---|---|\n| ours | 100 | 1,500 |\n| peer | 120 | (15%) |\n" in text
    assert "differ by 2%, 2%" in " ".join(text.split())


def write_steps(path: Path) -> None:
    """A run at an older commit, and the last: two cases, one peer that was skipped."""
    shape = {"num_prompts": 8, "prompt_length": 122, "num_generations": 8, "mean_length": 28, "max_length": 64}
    common = {"device": "CPU X", "threads": 2, "dtype": "float32", "spread": 0.05, "shape": {**shape, "num_frames": 8}}
    timed = {"peak_bytes": 2**20 * 100, "time_over_ours": 1.0}
    runs = [
        {"commit": "d" * 40, "op": "train", "provider": "ours", "median_ms": 9.0, **timed},
        {"commit": "e" * 40, "op": "train", "provider": "ours", "median_ms": 400.4, **timed},
        {"commit": "e" * 40, "op": "train", "provider": "peer", "status": "skipped"},
        {"commit": "e" * 40, "op": "update", "provider": "ours", "median_ms": 1500.0, **timed},
        {"commit": "e" * 40, "op": "update", "provider": "peer", "median_ms": 3e3, **timed, "time_over_ours": 2.0},
    ]
    path.write_text("".join(json.dumps({**common, **run}) + "\n" for run in runs))


def test_table_of_updates_shows_the_last_commit_in_ratios(root: Path) -> None:
    text = (root / "README.md").read_text()
    case = "8 prompts of 122 × 8 completions of 28 tokens (longest 64)"
    assert f"| **train: {case}** | | | |\n| ours | 400 ms | 1.00 × | 100 MiB |\n| **whole update" in text
    assert "| peer | 3,000 ms | 2.00 × | 100 MiB |\n<!-- /step:table -->" in text
    assert "differ by 5% to 5%" in " ".join(text.split())


def write_rollouts(path: Path) -> None:
    """An older run of the same commit, and the last: two cases, one peer that was skipped."""
    shape = {"num_prompts": 8, "prompt_length": 122, "num_generations": 8, "mean_length": 28, "max_length": 64}
    shape |= {"name": "demo", "model": "demo", "num_frames": 8}
    equal = {"shape": {**shape, "model": "3B", "mean_length": 64, "num_frames": 0}, "dtype": "bfloat16"}
    common = {"device": "CPU X", "threads": 2, "dtype": "float32", "spread": 0.05, "shape": shape, "commit": "f" * 40}
    common |= {"time": "2", "op": "rollout", "time_over_ours": 1.0, "step_ms": 1.255, "tokens_per_second": 4567.8}
    common |= {"floor_fraction": 0.4, "checked": "tokens and lengths"}
    runs = [
        {"time": "1", "provider": "ours", "median_ms": 9.0},
        {"provider": "ours", "median_ms": 80.4},
        {"provider": "peer", "median_ms": 1e3, "time_over_ours": 12.5, "checked": "number of tokens alone"},
        {"provider": "batch", "status": "skipped", "reason": "takes no videos"},
        {"provider": "ours", "median_ms": 90.0, **equal, "spread": 0.01},
    ]
    path.write_text("".join(json.dumps({**common, **run}) + "\n" for run in runs))


def test_table_of_rollouts_shows_the_last_run_with_its_rates(root: Path) -> None:
    assert renderer.rollout_table(root) == "No results yet."
    write_rollouts(root / "bench" / "results" / "rollout.jsonl")
    text = renderer.rollout_table(root)
    prompts = "8 prompts of 122 × 8 completions of"
    assert text.split("|---|---|---|---|---|---|---|\n")[1].splitlines() == [
        f"| **{prompts} 28 tokens (longest 64), float32** | | | | | | |",
        "| ours | 80 ms | 1.00 × | 1.25 ms | 4,568 | 40% | tokens and lengths |",
        "| peer | 1,000 ms | 12.50 × | 1.25 ms | 4,568 | 40% | number of tokens alone |",
        "| batch | | | | | | takes no videos |",
        f"| **3B, {prompts} 64 tokens, no video, bfloat16** | | | | | | |",
        "| ours | 90 ms | 1.00 × | 1.25 ms | 4,568 | 40% | tokens and lengths |",
    ]
    assert "differ by 1% to 5%; commit ffffffffff." in " ".join(text.split())


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()]


def test_a_row_holds_what_was_measured_and_how(root: Path) -> None:
    row = rows(root, "demo")[1]
    assert (row["seed"], row["cores"], row["torch"], row["commit"], row["dirty"]) == (1, 1, "2.13.0", "a" * 40, False)
    assert row["after"] == {"accuracy": 0.8, "format_rate": 1.0, "kinds": {"order": 0.8, "first": 0.4}}
    assert {name: rates["accuracy"] for name, rates in row["controls"].items()} == {
        "shuffled_frames": 0.4,
        "repeated_frame": 0.3,
        "blank_video": 0.2,
    }
    assert row["seconds"] == {"data": 60.0, "grpo": 360.0}


def test_curves_hold_what_the_chart_shows_and_nothing_else(root: Path) -> None:
    curves = rows(root, "demo_curves")
    assert len(curves) == 12
    assert set(curves[0]) == {"commit", "seed", "date", "step", "reward", "completion_length"}
    assert curves[1]["eval/accuracy"] == 0.25


def test_rows_are_appended_and_a_run_is_recorded_once(root: Path, tmp_path: Path) -> None:
    results = root / "bench" / "results"
    before = (results / "demo.jsonl").read_text()
    with pytest.raises(SystemExit, match="already"):
        recorder.record(write_run(tmp_path / "1", seed=1, after=0.8), results)
    assert (results / "demo.jsonl").read_text() == before
    recorder.record(write_run(tmp_path / "later", date="2026-11-26T00:00:00+00:00"), results)
    assert (results / "demo.jsonl").read_text().startswith(before)
    assert len(rows(root, "demo")) == 4


def test_a_run_of_unknown_commit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="outside a git checkout"):
        recorder.record(write_run(tmp_path / "run", commit=None), tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_table_shows_mean_and_range_over_the_seeds(root: Path) -> None:
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- demo:table -->\n`make demo SEED=…`")
    assert "**50.0 % → 7" in text.partition("<!-- demo:headline -->")[2]
    assert "<!-- /demo:headline -->\n<!-- loading:table -->" in text
    assert text.endswith("<!-- /step:table -->\nKept.\n")
    for line in (
        "| all | 50.0 % | **75.0 %** (70.0–80.0) |",
        "| first | 25.0 % | 37.5 % (35.0–40.0) |",
        "| all, frames in random order | | 40.0 % |",
        "| all, one frame repeated | | 30.0 % |",
        "| all, blank video | | 20.0 % |",
        "| chance | | 20 % |",
    ):
        assert f"\n{line}\n" in text
    caption = " ".join(text.split("\n\n")[1].split())
    assert "mean of 3 seeds (0, 1, 2) and their range; 150 held-out clips, 4 updates; 6.0 to 8.0 minutes" in caption
    assert "(CPU, 1 thread on 1 core, torch 2.13.0); commit aaaaaaa, 2026-11-25." in caption


def test_only_runs_alike_to_the_last_are_shown_and_the_last_of_a_seed(root: Path, tmp_path: Path) -> None:
    results = root / "bench" / "results"
    for day, after in (("26", 0.6), ("27", 0.9)):
        options = {"commit": "b" * 40, "dirty": True, "date": f"2026-11-{day}T00:00:00+00:00"}
        recorder.record(write_run(tmp_path / day, after=after, **options), results)
    table = renderer.demo_table(root)
    assert "| all | 50.0 % | **90.0 %** |" in table
    assert "commit bbbbbbb with local changes, 2026-11-27" in " ".join(table.split())


@pytest.mark.parametrize("condition", [{"threads": 2}, {"cores": 2}, {"device": "H100"}, {"torch": "2.14.0"}])
def test_runs_under_different_conditions_are_not_averaged(
    root: Path, tmp_path: Path, condition: dict[str, Any]
) -> None:
    recorder.record(write_run(tmp_path / "3", seed=3, after=0.6, **condition), root / "bench" / "results")
    assert "| all | 50.0 % | **60.0 %** |" in renderer.demo_table(root)
    assert {row["seed"] for row in renderer._chart_source(root)["curves"]} == {3}


def check(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the check prints; empty where it passes."""
    code = renderer.main(["--check", "--root", str(root)])
    printed = capsys.readouterr().err
    assert code == int(bool(printed))
    return printed


def test_check_passes_on_what_was_generated(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(root, capsys) == ""


def test_check_fails_on_a_number_changed_in_the_readme(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("**75.0 %**", "**76.0 %**"))
    printed = check(root, capsys)
    assert "-| all | 50.0 % | **76.0 %** (70.0–80.0) |" in printed
    assert "+| all | 50.0 % | **75.0 %** (70.0–80.0) |" in printed
    assert "make readme" in printed


@pytest.mark.parametrize(("name", "old", "new"), [("demo", "0.75", "0.76"), ("demo_curves", "0.1429", "0.1430")])
def test_check_fails_on_a_number_changed_in_the_rows(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, old: str, new: str
) -> None:
    path = root / "bench" / "results" / f"{name}.jsonl"
    path.write_text(path.read_text().replace(old, new))
    printed = check(root, capsys)
    assert ("+| all |" in printed) == (name == "demo")
    assert ("docs/demo_curves.png was not drawn from the rows" in printed) == (name == "demo_curves")


def test_check_fails_without_the_chart_or_with_another(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = root / "docs" / "demo_curves.png"
    chart.unlink()
    assert "demo_curves.png" in check(root, capsys)
    shutil.copy(ROOT / "docs" / "demo_curves.png", chart)
    assert "demo_curves.png" in check(root, capsys)


def test_a_readme_without_its_section_is_refused(root: Path) -> None:
    (root / "README.md").write_text("# Title\n")
    with pytest.raises(SystemExit, match="demo:headline"):
        renderer.main(["--root", str(root)])


def test_table_of_speculation_shows_the_last_run(root: Path) -> None:
    common = {"device": "CPU X", "threads": 2, "commit": "e" * 40, "time": "2", "num_speculative_tokens": 8}
    common |= {"history": "a", "policy": "b", "num_prompts": 8, "num_generations": 4, "updates": 3, "completions": 32.0}
    common |= {"same_completions": 32.0, "mean_acceptance_length": 4.26, "draft_acceptance_rate": 0.945}
    common |= {"plain_steps": 34.2, "speculative_steps": 18.7, "plain_ms": 1234.4, "speculative_ms": 999.6}
    runs = [{"time": "1", "plain_ms": 1.0}, {}, {"num_prompts": 1, "same_completions": 31.0}]
    path = root / "bench" / "results" / "speculation.jsonl"
    path.write_text("".join(json.dumps({**common, **run}) + "\n" for run in runs))
    text = renderer.speculation_table(root)
    assert text.split("|---|---|---|---|---|---|\n")[1].splitlines() == [
        "| a → b | 8 × 4 | 4.3 | 94% | 34 → 19 | 1,234 → 1,000 ms |",
        "| a → b | 1 × 4 | 4.3 | 94% | 34 → 19 | 1,234 → 1,000 ms |",
    ]
    assert "means of 3 updates of the second epoch; 189 of 192 completions are" in " ".join(text.split())
