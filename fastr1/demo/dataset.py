"""Write the demo data: real H.264 clips of demo scenes, and questions about them in the NextQA format.

    OUT/videos/train/0000.mp4 …   OUT/train.jsonl   OUT/test.jsonl   OUT/coldstart.json

One question per clip, so that training and held-out clips are disjoint; question kinds, answers and letters balanced.
"""

from __future__ import annotations

import json
import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from tqdm import tqdm

from fastr1.config import INSTRUCTION
from fastr1.demo.scenes import KINDS, LETTERS, Scene, ask, render, sample_scene, worked_answer

NUM_COLD_START = 16
ENCODING = 4  # clips at a time, at most, beside the one that is drawn


def write_demo_dataset(
    output_dir: str | Path, *, num_train: int = 1200, num_test: int = 150, seed: int = 0
) -> dict[str, int]:
    """Write clips and annotation files below `output_dir`; the same seed writes the same pixels and text.

    The cold-start file holds 16 further clips with a worked answer each. Returns the number of rows per file.
    """
    root = Path(output_dir)
    counts = {}
    for split, size, stream in (("train", num_train, 1), ("test", num_test, 2)):
        rows = [row for row, _ in _write_split(root, split, size, np.random.default_rng([seed, stream]))]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{split}.jsonl").write_text(lines)
        counts[f"{split}.jsonl"] = len(rows)
    pairs = _write_split(root, "coldstart", NUM_COLD_START, np.random.default_rng([seed, 3]))
    entries = [_cold_start_entry(row, scene) for row, scene in pairs]
    (root / "coldstart.json").write_text(json.dumps(entries, indent=1) + "\n")
    return {**counts, "coldstart.json": len(entries)}


def _write_split(root: Path, split: str, size: int, rng: np.random.Generator) -> list[tuple[dict[str, Any], Scene]]:
    folder = root / "videos" / split
    folder.mkdir(parents=True, exist_ok=True)
    pairs, encoding = [], deque[Future[None]]()
    # Letters are dealt from a shuffled deck: tied to the turn, they would give the answer away unseen.
    letters = rng.permutation(list(LETTERS) * math.ceil(size / len(LETTERS)))
    with ThreadPoolExecutor(1) as pool:
        for i in tqdm(range(size), desc=f"writing {split} clips", disable=None):
            turn, kind = divmod(i, len(KINDS))
            scene = sample_scene(rng, KINDS[kind], answer_index=turn)
            question = ask(scene, rng, letter=str(letters[i]))
            name = f"{i:04d}.mp4"
            fps = int(rng.choice([8, 10, 12, 15]))
            encoding.append(pool.submit(write_clip, folder / name, render(scene, int(rng.integers(20, 45)), rng), fps))
            if len(encoding) > ENCODING:
                encoding.popleft().result()
            row = {
                "problem_id": i + 1,
                "problem": question.problem,
                "data_type": "video",
                "problem_type": [scene.kind],
                "solution": f"<answer>{question.letter}</answer>",
                "video_filename": f"./videos/{split}/{name}",
            }
            pairs.append((row, scene))
        for clip in encoding:
            clip.result()
    order = rng.permutation(size)
    return [pairs[i] for i in order]


def _cold_start_entry(row: dict[str, Any], scene: Scene) -> dict[str, Any]:
    letter = row["solution"].removeprefix("<answer>")[0]
    return {
        "id": f"coldstart-{row['problem_id']}",
        "conversations": [
            {"from": "human", "value": f"<image>\n{row['problem']} {INSTRUCTION}"},
            {"from": "gpt", "value": worked_answer(scene, letter)},
        ],
        "video": row["video_filename"],
    }


def write_clip(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encode (F, H, W, 3) uint8 RGB as H.264 with B-frames, the codec of nearly every video file."""
    # mbtree: its analysis varies from run to run, and with it the pixels
    options = {"crf": "18", "preset": "veryfast", "g": "12", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same bytes on every machine
        stream.codec_context.time_base = Fraction(1, fps)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
