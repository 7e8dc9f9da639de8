"""The whole job at toy size: data → cold start → evaluation → GRPO → evaluation → summary, curves and a table.

Training runs through the same command a user types, `deepspeed fastr1/train.py --config …`.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastr1.config import Control, load_config
from fastr1.demo.dataset import write_demo_dataset
from fastr1.demo.scenes import LETTERS
from fastr1.evaluation.multiple_choice import evaluate_checkpoint
from fastr1.reporting.curves import write_report
from fastr1.reporting.run_log import METRICS_FILE, read_rows

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
COLD_START_CONFIG = REPOSITORY / "configs" / "demo_coldstart.json"
GRPO_CONFIG = REPOSITORY / "configs" / "grpo.json"


def run_demo(output_dir: str | Path, *, seed: int = 0, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run every phase below `output_dir` and return what is written to its summary.json.

    Args:
        seed: of the data, the cold start and the rollouts.
        overrides: further `a.b=c` settings of the GRPO run.
    """
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    for earlier in (root / "coldstart", root / "grpo"):
        if earlier.exists():
            print(f"removing {earlier} of an earlier demo", flush=True)
            shutil.rmtree(earlier)
    seconds: dict[str, float] = {}

    def timed(phase: str, action: Any, *args: Any, **kwargs: Any) -> Any:
        print(f"== {phase}", flush=True)
        start = time.perf_counter()
        result = action(*args, **kwargs)
        seconds[phase] = round(time.perf_counter() - start, 1)
        return result

    data = root / "data"
    paths = [f"data.video_root={data}", f"run.seed={seed}"]
    timed("data", write_demo_dataset, data, seed=seed)
    sft = [*paths, f"data.train_file={data / 'coldstart.json'}", f"run.output_dir={root / 'coldstart'}"]
    sft += [f"model.path={REPOSITORY / 'fastr1' / 'demo' / 'base_model'}"]
    timed("cold_start", launch, COLD_START_CONFIG, sft)
    before = timed("evaluate_before", _evaluate, root, root / "coldstart" / "final")
    grpo = [
        *paths,
        f"data.train_file={data / 'train.jsonl'}",
        f"data.eval_file={data / 'test.jsonl'}",
        f"model.path={root / 'coldstart' / 'final'}",
        f"run.output_dir={root / 'grpo'}",
        *overrides,
    ]
    timed("grpo", launch, GRPO_CONFIG, grpo)
    after = timed("evaluate_after", _evaluate, root, root / "grpo" / "final")
    blank = timed("evaluate_blank_video", _evaluate, root, root / "grpo" / "final", control="blank_video")

    summary = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "accuracy_blank_video": blank["accuracy"],
        "chance": 1 / len(LETTERS),
        "format_rate_before": before["format_rate"],
        "format_rate_after": after["format_rate"],
        "steps": read_rows(root / "grpo" / METRICS_FILE)[-1]["step"],
        "seed": seed,
        "num_questions": int(after["num_questions"]),
        "before": before,
        "after": after,
        "seconds": seconds,
        "title": "GRPO on the demo clips",
        "accuracy": {"cold start": before["accuracy"], "blank video": blank["accuracy"]},
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (root / "grpo" / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    curves = write_report(root / "grpo", root / "curves.png")
    print(format_table(summary))
    print(f"curves: {curves}   summary: {root / 'summary.json'}   model: {root / 'grpo' / 'final'}")
    return summary


def launch(config: Path, overrides: Sequence[str]) -> None:
    """`deepspeed fastr1/train.py --config CONFIG --set …` on one process, as typed by hand."""
    load_config(config, overrides)  # a mistake shows here, before the launcher starts
    script = REPOSITORY / "fastr1" / "train.py"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1", "--master_port", str(_free_port())]
    command = [*launcher, str(script), "--config", str(config)]
    for override in overrides:
        command += ["--set", override]
    subprocess.run(command, check=True)


def _free_port() -> int:
    """A port for the launcher, so that two demos can run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _evaluate(root: Path, model: Path, *, control: Control | None = None) -> dict[str, float]:
    config = load_config(GRPO_CONFIG)
    name = f"{model.parent.name}{f'_{control}' if control else ''}.json"
    return evaluate_checkpoint(
        model_path=model,
        data_file=root / "data" / "test.jsonl",
        video_root=root / "data",
        num_frames=config.data.num_frames,
        batch_size=config.run.per_device_eval_batch_size,
        max_completion_length=config.grpo.max_completion_length,
        control=control,
        output=root / "evaluation" / name,
    )


def format_table(summary: dict[str, Any]) -> str:
    """The result as text: accuracy and format before and after, per kind of question, and seconds per phase."""
    before, after = summary["before"], summary["after"]
    lines = ["", f"{'held-out questions':<28}{'cold start':>12}{'after GRPO':>12}"]
    names = ["accuracy", *(key for key in after if key.startswith("accuracy/")), "format_rate", "completion_length"]
    for name in names:
        scale, unit = (1, " tokens") if name == "completion_length" else (100, " %")
        lines.append(f"{name:<28}{before[name] * scale:>10.1f}{unit[:2]}{after[name] * scale:>10.1f}{unit[:2]}")
    lines.append(f"{'accuracy, blank video':<28}{'':>12}{summary['accuracy_blank_video'] * 100:>10.1f} %")
    lines.append(f"{'chance':<28}{'':>12}{summary['chance'] * 100:>10.1f} %")
    spent = ", ".join(f"{phase} {value:.0f}" for phase, value in summary["seconds"].items())
    lines.append(f"{summary['steps']} updates; seconds: {spent} (total {sum(summary['seconds'].values()):.0f})")
    return "\n".join(lines)
