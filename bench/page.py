#!/usr/bin/env python3
"""How long the page of a long run takes, in which memory, and how large it is.

    python bench/page.py            # 10,000 updates of 64 completions; appends a row to bench/results/page.jsonl

The run is generated: 8 questions an update of 5,000, completions of some 900 characters, contact sheets of noise as
large as those of 16 frames. The report runs in a process of its own, whose peak memory is taken.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "page.jsonl"
NUM_UPDATES, GROUPS, GROUP_SIZE, NUM_QUESTIONS = 10_000, 8, 8, 5_000
KINDS = ("causal", "temporal", "descriptive")


def write_long_run(folder: Path, num_updates: int = NUM_UPDATES) -> None:
    """A run folder with everything that grows with the run."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{''.join(rng.choices('aeioulnrst', k=5))} " for _ in range(400)]
    texts = ["".join(rng.choices(words, k=150)) for _ in range(500)]
    config = {"task": "grpo", "grpo": {"num_generations": GROUP_SIZE}, "optim": {"max_steps": num_updates}}
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"metric_{i}" for i in range(45)]
    with open(folder / "metrics.jsonl", "w") as metrics, open(folder / "rollouts.jsonl", "w") as rollouts:
        for step in range(1, num_updates + 1):
            row = {"reward": rng.random(), "time/step_seconds": 4.0, **{name: rng.random() for name in names}}
            metrics.write(json.dumps({"step": step, **row}) + "\n")
            for place in range(GROUPS):
                question = (step * GROUPS + place) % NUM_QUESTIONS
                for _ in range(GROUP_SIZE):
                    rollouts.write(json.dumps(_rollout(rng, step, question, texts)) + "\n")
    _write_held_out(folder, rng, texts)
    _write_sheets(folder)


# The peak is read by the process itself: what the system tells its parent counts the parent's memory before `exec`.
_REPORT = """
import pathlib, re, sys
from fastr1.cli import main
code = main(["report", sys.argv[1]])
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text()).group(1), file=sys.stderr)
sys.exit(code)
"""


def measure(folder: Path) -> dict[str, Any]:
    """Seconds, peak memory and size of `fastr1 report` on a run folder. Linux."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", _REPORT, str(folder)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mib": round(int(done.stderr.splitlines()[-1]) / 1024),
        "page_bytes": (folder / "report.html").stat().st_size,
        "rollouts_bytes": (folder / "rollouts.jsonl").stat().st_size,
    }


def _rollout(rng: random.Random, step: int, question: int, texts: list[str]) -> dict[str, Any]:
    is_right = rng.random() < 0.5
    return {
        "step": step,
        "rank": 0,
        "sample_id": str(question),
        "video": f"videos/{question}.mp4",
        "question": f"What happens in clip {question}?\nOptions:\nA. one.\nB. two.\nC. three.\nD. four.\nE. five.",
        "solution": "<answer>B</answer>",
        "completion": f"<think>{rng.choice(texts)}</think>\n<answer>{'B' if is_right else 'A'}</answer>",
        "reward": is_right + rng.random() / 2,
        "rewards": {"accuracy_reward": float(is_right), "format_reward": 0.5},
        "advantage": rng.gauss(0, 1),
        "is_truncated": False,
        "valid": True,
    }


def _write_held_out(folder: Path, rng: random.Random, texts: list[str], number: int = 3_000) -> None:
    (folder / "evaluation").mkdir(exist_ok=True)
    for name in ("before", "after"):
        answers = [
            {
                "sample_id": f"h{i}",
                "problem_type": KINDS[i % len(KINDS)],
                "question": f"What happens in held-out clip {i}?\nOptions:\nA. one.\nB. two.",
                "completion": f"<think>{rng.choice(texts)}</think><answer>A</answer>",
                "solution": "<answer>A</answer>",
                "letter": "A",
                "is_correct": rng.random() < 0.5,
                "is_well_formed": True,
            }
            for i in range(number)
        ]
        content = {"summary": {"accuracy": 0.5, "num_questions": number}, "answers": answers}
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(content))


def _write_sheets(folder: Path) -> None:
    (folder / "frames").mkdir(exist_ok=True)
    noise = np.random.default_rng(0)
    with open(folder / "frames" / "index.jsonl", "w") as index:
        for question in range(NUM_QUESTIONS):
            name = f"frames/{question}.jpg"
            row = {"video": f"{question}.mp4", "path": f"videos/{question}.mp4", "sample_id": str(question)}
            row |= {"when": "training", "sheet": name, "columns": 4, "frame_px": [128, 72]}
            index.write(json.dumps({**row, "timestamps_seconds": [i / 2 for i in range(16)]}) + "\n")
            if question % 50 == 0:  # as many different pictures as matter
                buffer = io.BytesIO()
                smooth = Image.fromarray(noise.integers(0, 255, (72, 128, 3), dtype=np.uint8))
                smooth.resize((512, 288), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=70)
            (folder / name).write_bytes(buffer.getvalue())


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Measures once and appends the row."""
    folder = Path(tempfile.mkdtemp(prefix="fastr1-page-"))
    try:
        write_long_run(folder)
        found = measure(folder)
    finally:
        shutil.rmtree(folder)
    row = {
        "bench": "page",
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "updates": NUM_UPDATES,
        "completions_per_update": GROUPS * GROUP_SIZE,
        **found,
    }
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
