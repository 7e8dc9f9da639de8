"""Train a base model for the demo from nothing, as the parts of the paper's base were trained: tower, text, together.

    python -m fastr1.demo.pretrain --output-dir fastr1/demo/base_model

The shipped weights were made in more steps than this one command; docs/design.md tells which.

1. Tower and connector learn, from single frames, which cell each colour is in (a linear head that is thrown away).
2. The decoder learns, from text alone, to look up the letter of an option, five times per sample.
3. Together: captions with every shape's cell at every moment, questions answered by a sentence, and look-ups.
4. Then questions with options, answered by that sentence and the letter in whatever two tags the instruction names.
Dense supervision is what makes this work at all; answers alone teach such a model nothing. The tags `think` and
`answer` occur only in text to repeat: answering in them is left to the cold start and to GRPO.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fastr1.config import INSTRUCTION
from fastr1.demo.base import IMAGE_SIZE, TAGS, build_model, build_tokenizer
from fastr1.demo.digest import write_digest
from fastr1.demo.scenes import (
    COLOURS,
    COUNTS,
    DIRECTIONS,
    FLASH,
    GRID,
    KINDS,
    LETTERS,
    NUM_MOMENTS,
    MultipleChoice,
    Scene,
    ask,
    cell_of,
    describe,
    render,
    sample_scene,
    worked_answer,
)
from fastr1.models import VideoLanguageModel
from fastr1.models.tinyllava.prompts import SYSTEM, build_caption_text, build_prompt, tokenize_with_image
from fastr1.models.tinyllava.tokenizer import save_tokenizer
from fastr1.video import preprocess_frames

TASKS = {"caption": 0.2, "sentence": 0.65, "lookup": 0.15}
ANSWER_TASKS = {"sentence": 0.35, "answer": 0.35, "options": 0.2, "markup": 0.1}
SHOWN_COLOURS = (*COLOURS, FLASH)
NUM_CELLS = GRID * GRID
IGNORE_INDEX = -100  # label of a position without loss


@dataclass(frozen=True)
class Example:
    """One supervised sequence; `scene` indexes the pool of rendered scenes, None for text."""

    input_ids: list[int]
    labels: list[int]
    scene: int | None


class ScenePool:
    """Rendered scenes, drawn once and reused: frames (N, 8, 3, S, S) uint8 after the resize."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.scenes: list[Scene] = []
        self.frames = torch.empty(size, NUM_MOMENTS, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        for i in tqdm(range(size), desc="drawing scenes", mininterval=5):
            scene = sample_scene(rng, KINDS[i % len(KINDS)])
            frames = torch.from_numpy(render(scene, NUM_MOMENTS, rng)).permute(0, 3, 1, 2)
            self.scenes.append(scene)
            self.frames[i] = (
                ((preprocess_frames(frames, height=IMAGE_SIZE, width=IMAGE_SIZE) + 1) * 127.5).round().to(torch.uint8)
            )

    def pixels(self, index: int | torch.Tensor) -> torch.Tensor:
        """Pixel values in [−1, 1], (8, 3, S, S) or (n, 8, 3, S, S)."""
        return self.frames[index].float() / 127.5 - 1


def pretrain(
    output: Path,
    *,
    seed: int = 0,
    vision_steps: int = 500,
    text_steps: int = 420,
    joint_steps: int = 1700,
    answer_steps: int = 520,
) -> None:
    """Run the stages; write the model in bfloat16, and the digest of its sources, to `output`.

    The seed fixes data and initial weights.
    """
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer(seed)
    model = build_model(tokenizer, seed)
    pool = ScenePool(6000, rng)
    train_vision(model, pool, rng, vision_steps)
    train_lookup(model, tokenizer, rng, text_steps)
    train_together(model, tokenizer, pool, rng, joint_steps, TASKS)
    train_together(model, tokenizer, pool, rng, answer_steps, ANSWER_TASKS)
    output.mkdir(parents=True, exist_ok=True)
    model.save(output, dtype=torch.bfloat16)
    save_tokenizer(tokenizer, output)
    write_digest(output)


def train_vision(model: VideoLanguageModel, pool: ScenePool, rng: np.random.Generator, steps: int) -> None:
    """Stage 1. Frames are shuffled over clips: frames of one clip are too alike to learn from."""
    frames = pool.frames.flatten(0, 1)
    targets = torch.cat([_cells(scene) for scene in pool.scenes])
    (tokens,) = model.visual_tokens([pool.pixels(0)])
    per_frame = tokens.numel() // NUM_MOMENTS
    head = nn.Linear(per_frame, len(SHOWN_COLOURS) * (NUM_CELLS + 1))

    def compute() -> torch.Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(frames), 32 * NUM_MOMENTS))
        pixels = frames[chosen].float() / 127.5 - 1
        pixels = pixels + 0.03 * torch.randn_like(pixels)
        tokens = torch.stack([*model.visual_tokens(model.encode(pixels).split(NUM_MOMENTS))])
        logits = head(tokens.reshape(-1, per_frame)).reshape(-1, NUM_CELLS + 1).float()
        target = targets[chosen].reshape(-1)
        loss = F.cross_entropy(logits, target, reduction="none")
        is_shown = target < NUM_CELLS
        return loss[is_shown].mean() + loss[~is_shown].mean()

    trained = [*model.vision_tower.parameters(), *model.connector.parameters(), *head.parameters()]
    _optimise("tower and connector", [(trained, 2.5e-3)], steps, compute)


def _cells(scene: Scene) -> torch.Tensor:
    """(8, colours) int64: the grid cell of each colour at each moment, `NUM_CELLS` where it is not shown."""
    cells = torch.full((NUM_MOMENTS, len(SHOWN_COLOURS)), NUM_CELLS)
    for shape in reversed(scene.shapes):
        for i, colour in enumerate(shape.colours):
            if colour is not None:
                cell = cell_of(shape.centres[i])
                cells[i, SHOWN_COLOURS.index(colour)] = "abcd".index(cell[0]) * GRID + int(cell[1]) - 1
    return cells


def train_lookup(
    model: VideoLanguageModel, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, steps: int
) -> None:
    """Stage 2. The letter directly follows the word: with a word between them the look-up was not learned."""
    words = [list(COLOURS), list(DIRECTIONS), list(COUNTS)]

    def example() -> Example:
        options = [str(word) for word in rng.permutation(words[rng.integers(len(words))])[: len(LETTERS)]]
        lines = list(zip(LETTERS, options, strict=True))
        question = "\nOptions:\n" + "\n".join(f"{letter}. {option}." for letter, option in lines)
        answer = "".join(f" {lines[i][1]} {lines[i][0]}." for i in rng.permutation(len(lines)))
        return _example(question, answer, None, tokenizer)

    def compute() -> torch.Tensor:
        return compute_loss(model, [example() for _ in range(64)], None)

    _optimise("look-ups", [(list(model.language_model.parameters()), 1.5e-3)], steps, compute)


def train_together(
    model: VideoLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    pool: ScenePool,
    rng: np.random.Generator,
    steps: int,
    shares: dict[str, float],
) -> None:
    """Stages 3 and 4: 40 samples a step in the proportions of `shares`."""
    tasks = [task for task, share in shares.items() for _ in range(round(40 * share))]

    def compute() -> torch.Tensor:
        half = [int(i) for i in rng.integers(0, len(pool.scenes), len(tasks) // 2)]
        chosen = half + half  # each scene serves two samples
        examples = [build_example(t, pool.scenes[i], i, tokenizer, rng) for t, i in zip(tasks, chosen, strict=True)]
        return compute_loss(model, examples, pool)

    vision = [*model.vision_tower.parameters(), *model.connector.parameters()]
    groups = [(vision, 5e-4), (list(model.language_model.parameters()), 1e-3)]
    _optimise("captions and answers", groups, steps, compute)


def build_example(
    task: str, scene: Scene, index: int, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> Example:
    """One sample of a task about one scene."""
    if task == "caption":
        return _example(build_caption_text("").removesuffix("\n"), describe(scene) + "\n", index, tokenizer)
    if task == "sentence":
        asked, fact = scene.facts[rng.integers(len(scene.facts))]
        return _example(build_prompt(asked, instruction=""), f" {fact}", index, tokenizer)
    if task == "markup":
        text = _random_markup(rng)
        return _example(f"{SYSTEM} USER: Repeat: {text} ASSISTANT:", f" {text}", None, tokenizer)
    question = ask(scene, rng)
    if task == "answer":
        tags, instruction = _other_tags(rng)
        answer = f" {worked_answer(scene, question.letter, tags)}"
        return _example(build_prompt(question.problem, instruction=instruction), answer, index, tokenizer)
    if task == "options":
        return _options_example(scene, question, tokenizer, rng)
    if task == "lookup":
        prompt = build_prompt(question.problem, instruction="").replace("<image>\n", "")
        lines = _options(question)
        answer = "".join(f" {lines[i][1]} {lines[i][0]}." for i in rng.permutation(len(lines)))
        return _example(prompt, answer, None, tokenizer)
    raise ValueError(f"unknown task {task!r}; choose from {', '.join({**TASKS, **ANSWER_TASKS})}")


def _options(question: MultipleChoice) -> list[list[str]]:
    """[letter, option] of every line."""
    return [line.removesuffix(".").split(". ") for line in question.problem.splitlines()[2:]]


def _other_tags(rng: np.random.Generator) -> tuple[tuple[str, str], str]:
    """Two tags that are not the paper's, and the paper's instruction with them in place."""
    reasoning, final = (str(tag) for tag in rng.choice(TAGS, size=2, replace=False))
    return (reasoning, final), INSTRUCTION.replace("think>", f"{reasoning}>").replace("answer>", f"{final}>")


def _options_example(
    scene: Scene, question: MultipleChoice, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> Example:
    """Text alone: three worked answers, each as if another option were right; what was seen is given, not learned."""
    (reasoning, final), instruction = _other_tags(rng)
    prompt = build_prompt(question.problem, instruction=instruction).replace("<image>\n", "")
    seen = scene.fact.removesuffix(f"{scene.answer}.")
    ids = tokenize_with_image(prompt, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    lines = _options(question)
    for i in rng.permutation(len(lines))[:3]:
        letter, option = lines[i]
        given = tokenizer(f" <{reasoning}> {seen}{option}").input_ids
        learned = tokenizer(f" {letter}. </{reasoning}> <{final}> {letter} </{final}>").input_ids
        ids += given + learned
        labels += [IGNORE_INDEX] * len(given) + learned
    return Example(ids, labels, None)


def _random_markup(rng: np.random.Generator) -> str:
    """One to three tagged runs of words and letters in no meaningful order: tags a real base model has met before."""
    words = [*COLOURS, *DIRECTIONS, *COUNTS, *LETTERS]
    parts = []
    for tag in rng.choice(["think", "answer", *TAGS[:2]], size=int(rng.integers(1, 4))):
        inside = " ".join(str(word) for word in rng.choice(words, size=int(rng.integers(1, 5))))
        parts.append(f"<{tag}> {inside} </{tag}>")
    return " ".join(parts)


def _example(prompt: str, answer: str, scene: int | None, tokenizer: PreTrainedTokenizerBase) -> Example:
    prompt_ids = tokenize_with_image(prompt, tokenizer)
    answer_ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    return Example(prompt_ids + answer_ids, [IGNORE_INDEX] * len(prompt_ids) + answer_ids, scene)


def compute_loss(model: VideoLanguageModel, examples: list[Example], pool: ScenePool | None) -> torch.Tensor:
    """Cross-entropy where every sample weighs the square root of its number of answer tokens."""
    videos: dict[int, torch.Tensor] = {}
    if pool is not None:
        shown = sorted({example.scene for example in examples if example.scene is not None})
        pixels = pool.pixels(torch.tensor(shown))
        tokens = model.visual_tokens(model.encode(pixels.flatten(0, 1)).split(pixels.shape[1]))
        videos = dict(zip(shown, tokens, strict=True))
    rows = [_embed(model, example, videos) for example in examples]
    rows.sort(key=lambda row: len(row[1]))  # alike lengths together: less padding
    losses, counts = [], []
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        embeds = nn.utils.rnn.pad_sequence([embeds for embeds, _ in half], batch_first=True)
        labels = [labels for _, labels in half]
        targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)[:, 1:]
        hidden = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        chosen = targets != IGNORE_INDEX
        logits = model.project(hidden[chosen])
        losses.append(F.cross_entropy(logits.float(), targets[chosen], reduction="none"))
        counts.append(chosen.sum(1))
    count = torch.cat(counts)
    weight = (count.rsqrt() / count.sqrt().sum()).repeat_interleave(count)
    return (torch.cat(losses) * weight).sum()


def _embed(
    model: VideoLanguageModel, example: Example, videos: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (L, D) and labels (L,) of one sample, visual tokens included."""
    ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
    if example.scene is None:
        return model.decoder.embed_tokens(ids), labels
    embeds = model.embed_prompt(ids, videos[example.scene])
    return embeds, F.pad(labels, (embeds.shape[0] - len(ids), 0), value=IGNORE_INDEX)


def _optimise(
    name: str, groups: list[tuple[list[nn.Parameter], float]], steps: int, compute: Callable[[], torch.Tensor]
) -> None:
    """AdamW with warm-up over 50 steps and a linear end over the last 40 %, gradients clipped to 1."""
    tensors = [([p for p in parameters if p.requires_grad], rate) for parameters, rate in groups]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for parameters, rate in tensors], betas=(0.9, 0.98), weight_decay=0.01
    )
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        scale = min(1.0, (step + 1) / 50) * min(1.0, (steps - step) / (0.4 * steps) + 0.02)
        for group, (_, rate) in zip(optimizer.param_groups, tensors, strict=True):
            group["lr"] = rate * scale
        with _fast_arithmetic(), sdpa_kernel(SDPBackend.MATH):  # bf16 flash attention on a CPU has a slow backward
            loss = compute()
        loss.backward()
        nn.utils.clip_grad_norm_([p for parameters, _ in tensors for p in parameters], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _fast_arithmetic() -> AbstractContextManager[None]:
    """bfloat16 products where the CPU has instructions for them."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def main() -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Train a base model for the demo from nothing.")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "base_model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.output_dir, seed=args.seed)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    main()
