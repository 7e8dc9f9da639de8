"""Run folders as a training leaves them, written without one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from fastr1.config import DataConfig, GRPOConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, save_config

# of 1 × 1 pixels, white
JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQEASABIAAD/2wBDAP//////////////////////////////////////////////////////////////////////////////"
    "////////wgALCAABAAEBAREA/8QAFBABAAAAAAAAAAAAAAAAAAAAAP/aAAgBAQABPxA="
)
HOSTILE = "<script>window.hacked = 1</script></script><img src=x onerror='window.hacked = 1'>"
QUESTION = "Which way does it go?\nOptions:\nA. left.\nB. right."
NUM_STEPS, GROUP, PROMPTS = 20, 4, 3
KINDS = ("direction", "colour")


def write_config(folder: Path, **run: Any) -> None:
    config = TrainConfig(
        model=ModelConfig(path="models/toy"),
        data=DataConfig(train_file="t.jsonl", video_root="videos"),
        grpo=GRPOConfig(num_generations=GROUP, beta=0.0),
        optim=OptimConfig(max_steps=NUM_STEPS),
        run=RunConfig(output_dir=str(folder), **run),
    )
    save_config(config, folder / "config.json")


def metrics_row(step: int, **others: float) -> dict[str, Any]:
    return {
        "step": step,
        "reward": step / 20,
        "rewards/accuracy_reward": step / 25,
        "rewards/format_reward": 0.5,
        "completion_length": 20.0 + step,
        "entropy": 1 / step,
        "clip_low": 0.0,
        "clip_high": 0.01,
        "groups_without_signal": 1.0,
        "reward_std": 0.2,
        "tokens_per_second": 100.0,
        "roofline/step": 0.5,
        "time/rollout_seconds": 2.0,
        "time/train_seconds": 1.0,
        "time/step_seconds": 4.0,
        "peak_memory_bytes": 2.0**30,
        "my_own_number": 7.0,
        **others,
    }


def rollout_row(step: int, prompt: int, place: int, **others: Any) -> dict[str, Any]:
    """Of prompt 0 the first completion alone is right, of 1 all are, of 2 none."""
    is_right = (prompt == 0 and place == 0) or prompt == 1
    answer = "B" if is_right else "A"
    return {
        "step": step,
        "rank": 0,
        "sample_id": f"s{prompt}",
        "video": f"videos/v{prompt}.mp4",
        "question": QUESTION,
        "solution": "<answer>B</answer>",
        "completion": f"<think>thought {step} {prompt} {place}</think> <answer>{answer}</answer>",
        "reward": 1.0 if is_right else 0.0,
        "rewards": {"accuracy_reward": 1.0 if is_right else 0.0},
        "advantage": (1.5 if is_right else -0.5) if prompt == 0 else 0.0,
        "is_truncated": False,
        "valid": True,
        **others,
    }


def rollouts(num_steps: int = NUM_STEPS) -> list[dict[str, Any]]:
    return [
        rollout_row(step, prompt, place)
        for step in range(1, num_steps + 1)
        for prompt in range(PROMPTS)
        for place in range(GROUP)
    ]


def answer(sample: int, is_right: bool, **others: Any) -> dict[str, Any]:
    letter = "B" if is_right else "A"
    return {
        "sample_id": f"h{sample}",
        "problem_type": KINDS[sample % 2],
        "question": QUESTION,
        "completion": f"<think>held out {sample}</think><answer>{letter}</answer>",
        "solution": "<answer>B</answer>",
        "letter": letter,
        "is_correct": is_right,
        "is_well_formed": True,
        "completion_length": 12,
        **others,
    }


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_evaluation(folder: Path, name: str, answers: list[dict[str, Any]]) -> None:
    right = sum(row["is_correct"] for row in answers) / len(answers)
    summary = {"accuracy": right, "num_questions": float(len(answers))}
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / f"{name}.json").write_text(json.dumps({"summary": summary, "answers": answers}))


def sheet_row(video: str, sample_id: str, when: str, name: str) -> dict[str, Any]:
    return {
        "video": video.removeprefix("videos/"),
        "path": video,
        "sample_id": sample_id,
        "when": when,
        "sheet": f"frames/{name}.jpg",
        "num_frames": 6,
        "columns": 4,
        "frame_px": [96, 64],
        "timestamps_seconds": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5],
        "frame_indices": [0, 5, 10, 15, 20, 25],
        "bytes": len(JPEG),
    }


def write_sheets(folder: Path, num_held_out: int) -> None:
    rows = [sheet_row(f"videos/v{i}.mp4", f"s{i}", "training", f"t{i}") for i in range(PROMPTS)]
    rows += [sheet_row(f"videos/h{i}.mp4", f"h{i}", "evaluation", f"h{i}") for i in range(num_held_out)]
    write_lines(folder / "frames" / "index.jsonl", rows)
    for row in rows:
        (folder / row["sheet"]).write_bytes(JPEG)


def write_run(folder: Path, *, seed: int = 3) -> Path:
    """A finished run with everything: 20 updates of 3 prompts × 4 completions, evaluations of 4 questions of which one
    is fixed, one broken, one right and one wrong, contact sheets, a bad sample."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, seed=seed)
    evaluated = {"eval/accuracy": 0.5, "eval/strict_accuracy": 0.25}
    evaluated |= {"eval/accuracy/colour": 0.75, "eval/strict_accuracy/colour": 0.5}
    rows = [metrics_row(step, **(evaluated if step % 10 == 0 else {})) for step in range(1, NUM_STEPS + 1)]
    write_lines(folder / "metrics.jsonl", rows)
    write_lines(folder / "rollouts.jsonl", rollouts())
    for name, right in (("before", (0, 1, 1, 0)), ("after", (1, 0, 1, 0))):
        write_evaluation(folder, name, [answer(i, bool(is_right)) for i, is_right in enumerate(right)])
    write_sheets(folder, 4)
    bad = {"step": 4, "when": "training", "file": "t.jsonl", "line": 9, "reason": "moov atom not found"}
    write_lines(folder / "bad_samples.jsonl", [bad])
    (folder / "final").mkdir(exist_ok=True)
    return folder
