"""The whole job at toy size: data → cold start → evaluation → GRPO → evaluation → summary, curves, a page and a table.

Training runs through the same command a user types, `deepspeed fastr1/train.py --config …`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastr1.config import PACKAGE, Control, RunConfig, load_config, save_config, shipped_configs
from fastr1.demo.child import run_to_its_end
from fastr1.demo.dataset import write_demo_dataset
from fastr1.demo.scenes import LETTERS
from fastr1.evaluation.checkpoint import evaluate_checkpoint
from fastr1.reporting.curves import SUMMARY_FILE, write_report
from fastr1.reporting.frames import recording
from fastr1.reporting.hardware import describe_hardware
from fastr1.reporting.page import write_page
from fastr1.reporting.read_run import EVALUATION_DIR
from fastr1.reporting.run_log import METRICS_FILE, read_rows
from fastr1.schema import DataError

COLD_START_CONFIG, GRPO_CONFIG = "demo_coldstart", "grpo"
SHOWN_INSTEAD: tuple[Control, ...] = ("shuffled_frames", "repeated_frame", "blank_video")  # from most to least seen
MARK = ".demo"  # lies in every run folder that a demo made, and holds the configuration of its run
QUICK_DATA = {"num_train": 16, "num_test": 10}
QUICK_RUN = ["optim.max_steps=2", "run.logging_steps=1"]


def run_demo(output_dir: str | Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run every phase below `output_dir` and return what is written to its summary.json.

    Args:
        seed: of the data, the cold start and the rollouts.
        quick: few clips and two updates per training, to see that every phase works; the accuracies mean nothing.

    Raises: DataError where a run that no demo made is in the way; nothing is deleted then.
    """
    root = Path(output_dir)
    sizes, shortened = (QUICK_DATA, QUICK_RUN) if quick else ({}, [])
    data, cold_start, grpo = root / "data", root / "coldstart", root / "grpo"
    _make_run_folders(cold_start, grpo)
    conditions = _conditions()
    seconds: dict[str, float] = {}

    def timed(phase: str, action: Any, *args: Any, **kwargs: Any) -> Any:
        print(f"== {phase}", flush=True)
        start = time.perf_counter()
        result = action(*args, **kwargs)
        seconds[phase] = round(time.perf_counter() - start, 1)
        return result

    shared = [f"data.video_root={data}", f"run.seed={seed}"]
    timed("data", write_demo_dataset, data, seed=seed, **sizes)
    first = [f"data.train_file={data / 'coldstart.json'}", f"run.output_dir={cold_start}"]
    timed("cold_start", launch, COLD_START_CONFIG, [*shared, *first, *shortened])
    before = timed("evaluate_before", _evaluate, root, cold_start / "final")
    then = [f"data.train_file={data / 'train.jsonl'}", f"data.eval_file={data / 'test.jsonl'}"]
    then += [f"model.path={cold_start / 'final'}", f"run.output_dir={grpo}"]
    timed("grpo", launch, GRPO_CONFIG, [*shared, *then, *shortened])
    frames = partial(recording, grpo, RunConfig.report_frames, data)
    after = timed("evaluate_after", _evaluate, root, grpo / "final", recording=frames)
    controls = {
        control: timed(f"evaluate_{control}", _evaluate, root, grpo / "final", control=control)
        for control in SHOWN_INSTEAD
    }
    summary = {
        "seed": seed,
        "num_questions": int(after["num_questions"]),
        "chance": 1 / len(LETTERS),
        "updates": read_rows(grpo / METRICS_FILE)[-1]["step"],
        "before": before,
        "after": after,
        "controls": controls,
        "seconds": seconds,
        "conditions": conditions,
        "title": f"GRPO on the demo clips, seed {seed}{' (quick: no result)' if quick else ''}",
        "accuracy": {"cold start": before["accuracy"], "blank video": controls["blank_video"]["accuracy"]},
    }
    for folder in (root, grpo):
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    _keep_evaluations(root / EVALUATION_DIR, grpo / EVALUATION_DIR)
    curves = write_report(grpo, root / "curves.png")
    page = write_page(grpo)
    print(format_table(summary))
    print(f"curves: {curves}   summary: {root / SUMMARY_FILE}   model: {grpo / 'final'}")
    print(f"what the model saw, said and was rewarded for: {page}")
    return summary


def _keep_evaluations(source: Path, run: Path) -> None:
    """Copies of the answers in the run folder, where its page looks for them."""
    run.mkdir(exist_ok=True)
    names = {"coldstart": "before", "grpo": "after", **{f"grpo_{control}": control for control in SHOWN_INSTEAD}}
    for name, kept in names.items():
        shutil.copyfile(source / f"{name}.json", run / f"{kept}.json")


def _make_run_folders(*folders: Path) -> None:
    """Empty, marked folders. Those of an earlier demo are removed; any other that holds something is refused."""
    for folder in folders:
        if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
            raise DataError(
                f"{folder} holds a run that no demo made, or that was gone on with by hand, and is not deleted: choose "
                "another --output-dir (with make: OUTPUT=…), or move that folder away"
            )
    for folder in folders:
        if (folder / MARK).exists():
            print(f"removing {folder} of an earlier demo", flush=True)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()


def _is_ours(folder: Path) -> bool:
    """Whether the last run in this folder was a demo's: the mark repeats the configuration of the demo's run."""
    mark, config = folder / MARK, folder / "config.json"
    return mark.exists() and (not config.exists() or config.read_bytes() == mark.read_bytes())


def _conditions() -> dict[str, Any]:
    """What was run, when, and what its seconds depend on; commit and dirty are None outside a git checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **describe_hardware(),
    }


def _git(*arguments: str) -> str | None:
    if not (PACKAGE.parent / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def launch(name: str, overrides: Sequence[str]) -> None:
    """`deepspeed fastr1/train.py --config FILE --set …` on one process, as typed by hand; FILE is that of `name`."""
    config = shipped_configs()[name]
    settings = load_config(config, overrides)  # a mistake shows here, before the launcher starts
    save_config(settings, Path(settings.run.output_dir) / MARK)
    # the `deepspeed` command by its module: the script of that name need not be on the path
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "1"]
    command = [*launcher, "--master_port", str(_free_port()), str(PACKAGE / "train.py"), "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else each process of the launcher warns that it found no GPU
    run_to_its_end(command, environment)
    if not (Path(settings.run.output_dir) / "final").exists():
        raise DataError(f"the training of {settings.run.output_dir} was stopped before its end; start the demo again")


def _free_port() -> int:
    """A port for the launcher, so that two demos can run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _evaluate(root: Path, model: Path, *, control: Control | None = None, **others: Any) -> dict[str, float]:
    config = load_config(shipped_configs()[GRPO_CONFIG])
    name = f"{model.parent.name}{f'_{control}' if control else ''}.json"
    return evaluate_checkpoint(
        model_path=model,
        data_file=root / "data" / "test.jsonl",
        video_root=root / "data",
        batch_size=config.run.per_device_eval_batch_size,
        max_completion_length=config.grpo.max_completion_length,
        control=control,
        output=root / "evaluation" / name,
        **others,
    )


def format_table(summary: dict[str, Any]) -> str:
    """The result as text: before, after, and what was shown instead of the clips; then seconds per phase."""
    columns = {"cold start": summary["before"], "after GRPO": summary["after"]}
    columns |= {control.replace("_", " "): rates for control, rates in summary["controls"].items()}
    lines = ["", f"{'held-out questions':<22}" + "".join(f"{name:>17}" for name in columns)]
    after = summary["after"]
    for name in ("accuracy", "strict_accuracy", *(key for key in after if key.startswith("accuracy/")), "format_rate"):
        lines.append(f"{name:<22}" + "".join(f"{100 * rates[name]:>15.1f} %" for rates in columns.values()))
    lengths = (f"{rates['completion_length']:>10.1f} tokens" for rates in columns.values())
    lines.append(f"{'completion_length':<22}" + "".join(lengths))
    seconds = summary["seconds"]
    spent = ", ".join(f"{phase} {value:.0f}" for phase, value in seconds.items())
    size = f"{summary['num_questions']} questions, seed {summary['seed']}, {summary['updates']} updates"
    lines.append(f"chance {100 * summary['chance']:.0f} %, {size}")
    lines.append(f"seconds: {spent} (total {sum(seconds.values()):.0f})")
    return "\n".join(lines)
