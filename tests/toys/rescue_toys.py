"""Errors on one of two ranks, and what each rank made of them."""

from __future__ import annotations

import json
import math
import resource
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import trainer_toys
from trainer_toys import make_config

from fastr1.rollout import engine
from fastr1.training.grpo import run_grpo

SETTINGS = {
    "optim__max_steps": 4,
    "optim__per_device_train_batch_size": 2,
    "reward__functions": ("trainer_toys:hooked_reward",),
    "run__save_total_limit": 1,
}


def fail_on_one_rank(rank: int, folder: Path) -> None:
    """Runs in folders named like the scenarios, trained on `folder/world`. Type and text of the error that each raised
    on this rank go to `folder/told-RANK.json`."""
    told: dict[str, list[str]] = {}

    def attempt(name: str, **changes: Any) -> None:
        trainer_toys.hooked_reward.update = 0
        try:
            run_grpo(make_config(folder / "world", folder / name, **{**SETTINGS, **changes}))
            told[name] = ["", ""]
        except ValueError as error:
            told[name] = [type(error).__name__, str(error)]
        trainer_toys.BEFORE_SCORING.clear()

    attempt("whole")
    if rank == 1:
        trainer_toys.BEFORE_SCORING.append(lambda update: 1 / (update - 3))
    attempt("reward")
    attempt("reward resumed", run__output_dir=str(folder / "reward"), run__resume_from_checkpoint="last")
    checked, draws = engine.check_logps, count(1)
    if rank == 1:  # its weights have turned to NaN in the third update
        engine.check_logps = lambda logps: checked(logps * math.nan if next(draws) == 3 else logps)
    attempt("rollout")
    engine.check_logps = checked
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:  # its files cannot be written in the third update
        sizes = {3: 20_000}
        trainer_toys.BEFORE_SCORING.append(
            lambda update: resource.setrlimit(resource.RLIMIT_FSIZE, (sizes.get(update, soft), hard))
        )
    attempt("disk", run__save_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    broken = folder / f"broken {rank}"
    shutil.copytree(folder / "world", broken)
    (broken / "5.mp4").write_bytes(b"not a video")  # which the second rank looks at
    questions = {"data__eval_file": str(broken / "questions.jsonl"), "data__eval_video_root": str(broken)}
    attempt("evaluation", run__eval_steps=2, **questions)
    # meanwhile: what is broken before a run is found before it
    trainer_toys.BEFORE_SCORING.append(
        lambda update: [path.write_bytes(b"not a video") for path in broken.glob("*.mp4")]
    )
    attempt("no answer", run__eval_steps=2, data__policy="skip", data__max_bad_fraction=1.0, **questions)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
