"""What does speculation save from the second epoch on? The rollouts of a demo's prompts, with a history and without.

    make demo && python bench/speculation.py --run runs/demo     # appends a row per case to bench/results

Policies are those of the run: the cold start and what GRPO made of it. In the first epoch one of them draws
completions of the prompts, in the second one of them draws others (as in training, their keys are new): every update
without speculation and with it in turn, the tokens of both compared, and their times added up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

from fastr1.config import DataConfig
from fastr1.data.questions import load_questions
from fastr1.models import Processor, VideoLanguageModel, load_model, load_processor
from fastr1.rollout import RolloutEngine, SamplingParams
from fastr1.rollout.speculation import SpeculativeEngine
from fastr1.schema import Rollout
from fastr1.video import load_pixels

RESULTS = harness.RESULTS / "speculation.jsonl"
NUM_PROMPTS, GROUP, LENGTH = (8, 1), 8, 64  # of an update: the demo's, and one prompt alone
CASES = (("cold start", "cold start"), ("cold start", "after GRPO"), ("after GRPO", "after GRPO"))  # history, policy
DATA = DataConfig(num_frames=8)

Update = tuple[list[Tensor], list[Tensor]]  # prompts and videos


def load_updates(run: Path, processor: Processor, number: int, num_prompts: int) -> list[Update]:
    """Prompts and pixels of the first updates."""
    samples = load_questions(run / "data" / "train.jsonl", run / "data", limit=number * num_prompts).samples
    ids = [processor.prompt_ids(sample.problem, instruction=DATA.instruction) for sample in samples]
    device = harness.device()
    pixels = [load_pixels(sample.video_path, DATA, processor.preprocess_frames, device) for sample in samples]
    starts = range(0, len(samples), num_prompts)
    return [([x.to(device) for x in ids[i : i + num_prompts]], pixels[i : i + num_prompts]) for i in starts]


def roll_out(engine: RolloutEngine, update: Update, number: int) -> tuple[Rollout, float]:
    """Completions of an update, and milliseconds."""
    model, (prompts, videos) = engine.model, update
    with torch.no_grad():
        tokens = model.visual_tokens([model.encode(video) for video in videos])
    keys = list(range(number * len(prompts), (number + 1) * len(prompts)))
    harness.synchronise()
    start = time.perf_counter()
    rollout = engine.sample(prompts, tokens, num_generations=GROUP, prompt_keys=keys)
    harness.synchronise()
    return rollout, 1e3 * (time.perf_counter() - start)


def measure(
    past: VideoLanguageModel,
    policy: VideoLanguageModel,
    processor: Processor,
    updates: Sequence[Update],
    num_speculative_tokens: int,
) -> dict[str, Any]:
    """Means over the updates of the second epoch."""
    params = SamplingParams(LENGTH)
    plain = RolloutEngine(policy, processor, params)
    first, guessing = (SpeculativeEngine(model, processor, params, num_speculative_tokens) for model in (past, policy))
    for number, update in enumerate(updates):
        roll_out(first, update, number)
    for engine in (plain, guessing):  # arenas and threads are there
        roll_out(engine, updates[0], 0)
    guessing.history = first.history
    sums: dict[str, float] = {}
    for number, update in enumerate(updates, len(updates)):
        (want, plain_ms), (got, ms) = (roll_out(engine, update, number) for engine in (plain, guessing))
        lengths = want.completion_mask.sum(dim=1)
        decoded = int(lengths.sum()) - len(lengths)
        alike = (got.completion_ids.shape == want.completion_ids.shape) and int(
            (got.completion_ids == want.completion_ids).all(dim=1).sum()
        )
        found = {
            "plain_ms": plain_ms,
            "speculative_ms": ms,
            "plain_steps": want.metrics["decode_steps"],
            "speculative_steps": got.metrics["decode_steps"],
            "tokens": float(lengths.sum()),
            "decoded": float(decoded),
            "rows": decoded / (1 - got.metrics["wasted_rows"]),
            "forwards": decoded / got.metrics["mean_acceptance_length"],
            "guessed": float(guessing.costs.guessed_tokens),
            "right": float(guessing.costs.right_tokens),
            "same_completions": float(alike),
            "completions": float(len(lengths)),
        }
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
    means = {name: value / len(updates) for name, value in sums.items()}
    means["mean_acceptance_length"] = means["decoded"] / means["forwards"]
    means["draft_acceptance_rate"] = means["right"] / max(means["guessed"], 1.0)
    means["time_over_plain"] = means["speculative_ms"] / means["plain_ms"]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished `make demo`")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    given = parser.parse_args()
    torch.manual_seed(harness.SEED)
    folders = {name: given.run / part / "final" for name, part in (("cold start", "coldstart"), ("after GRPO", "grpo"))}
    models = {name: load_model(path, device=harness.device(), dtype="float32") for name, path in folders.items()}
    processor = load_processor(folders["cold start"])
    for num_prompts, (past, policy) in itertools.product(NUM_PROMPTS, CASES):
        updates = load_updates(given.run, processor, given.updates, num_prompts)
        found = measure(models[past].eval(), models[policy].eval(), processor, updates, given.num_speculative_tokens)
        row = {
            **harness.machine_info(),
            "op": "speculation",
            "history": past,
            "policy": policy,
            "updates": len(updates),
        }
        row |= {"num_prompts": num_prompts, "num_generations": GROUP, **found}
        row["num_speculative_tokens"] = given.num_speculative_tokens
        print(json.dumps(row))
        if not given.no_rows:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
