"""A random model of some 130,000 parameters, six tiny videos with questions, and configurations to train on them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from fastr1.config import DataConfig, GRPOConfig, ModelConfig, OptimConfig, RewardConfig, RunConfig, TrainConfig
from fastr1.models import save_model
from fastr1.models.tinyllava import TinyLlavaProcessor, TinyLlavaVideo
from fastr1.models.tinyllava import build_model as build_from_config
from fastr1.models.tinyllava.prompts import build_prompt
from fastr1.reporting.run_log import read_rows
from fastr1.schema import Sample

COLOURS = ("red", "green", "blue")
INSTRUCTION = "Think, then answer."
NUM_SAMPLES = 6
TOYS = Path(__file__).resolve().parent
ROOT = TOYS.parents[1]


def vowel_reward(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
    """Share of vowels: varies among the completions of a random model, which never gets a format right."""
    return [sum(c in "aeiou" for c in text.lower()) / max(len(text), 1) for text in completions]


def slow_reward(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
    """The same after as many seconds as the environment says: an update that takes long."""
    time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
    return vowel_reward(completions, solutions, samples)


BEFORE_SCORING: list[Callable[[int], None]] = []  # called with the number of the update, from 1


def hooked_reward(completions: list[str], solutions: list[str], samples: list[Sample]) -> list[float]:
    """The same after calling the hooks, with which a test fails an update, or asks for a stop in it."""
    if len(completions) > 1:  # not one by one, as after an error
        hooked_reward.update += 1
    for hook in BEFORE_SCORING:
        hook(hooked_reward.update)
    return vowel_reward(completions, solutions, samples)


hooked_reward.update = 0


def build_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer of 400 entries, trained on the prompts below."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(
        [build_prompt(problem(i), instruction=INSTRUCTION) for i in range(NUM_SAMPLES)] * 2, trainer
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=bpe.get_vocab(), merges=merges)
    tokenizer.model_max_length = 512
    return tokenizer


def toy_config(tokenizer: PreTrainedTokenizerBase, **text: Any) -> dict[str, Any]:
    """What config.json of the toy model holds; `text` replaces settings of its decoder."""
    eos = tokenizer.eos_token_id
    return {
        "model_type": "tinyllava",
        "connector_type": "groupresampler",
        "group": 2,
        "num_queries": 4,
        "num_resampler_layers": 1,
        "tokenizer_model_max_length": 512,
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "vocab_size": len(tokenizer),
            "bos_token_id": eos,
            "eos_token_id": eos,
            **text,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    }


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0, eos_scale: float = 6.0) -> TinyLlavaVideo:
    """Random weights; large enough that greedy choices are clear and small enough that a step takes milliseconds."""
    torch.manual_seed(seed)
    model = build_from_config(toy_config(tokenizer)).eval()
    with torch.no_grad():
        # An end-of-sequence logit of a larger spread: some completions end early, some never.
        model.language_model.lm_head.weight[tokenizer.eos_token_id] *= eos_scale
    return model


def problem(index: int) -> str:
    """A question whose length depends on the index, so that prompts are ragged."""
    colour = COLOURS[index % 3]
    return f"Which colour{' is seen' * (index % 4)}? It is not {colour}.\nOptions:\nA. red.\nB. green.\nC. blue."


def write_video(path: Path, index: int, num_frames: int = 6) -> None:
    """A bright square on a dark ground, 64 × 48 pixels, H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            image = np.full((48, 64, 3), 20, np.uint8)
            image[8:40, 4 * number : 4 * number + 24, index % 3] = 230
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_world(folder: Path, seed: int = 0) -> Path:
    """`folder` with base/ (the model), videos, questions.jsonl and coldstart.json."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    save_model(folder / "base", model, TinyLlavaProcessor(tokenizer, model.config))
    questions, conversations = [], []
    for index in range(NUM_SAMPLES):
        name, letter = f"{index}.mp4", "ABC"[index % 3]
        write_video(folder / name, index)
        questions.append(
            {
                "problem_id": index,
                "problem": problem(index),
                "solution": f"<answer>{letter}</answer>",
                "video_filename": name,
                "problem_type": ("what", "where")[index % 2],
            }
        )
        answer = f"<think> {'It is ' * (index % 3)}{COLOURS[index % 3]}. </think> <answer> {letter} </answer>"
        turns = [{"from": "human", "value": f"<image>\n{problem(index)}"}, {"from": "gpt", "value": answer}]
        conversations.append({"id": str(index), "video": name, "conversations": turns})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "coldstart.json").write_text(json.dumps(conversations))
    return folder


def make_config(world: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    """A run of two updates of four prompts, of GRPO with three completions each; changes as section__field=value."""
    config = TrainConfig(
        model=ModelConfig(path=str(world / "base"), dtype="float32"),
        data=DataConfig(
            train_file=str(world / "questions.jsonl"),
            video_root=str(world),
            num_frames=4,
            instruction=INSTRUCTION,
            backend="pyav",
            num_decode_threads=1,
        ),
        reward=RewardConfig(functions=("trainer_toys:vowel_reward",)),
        grpo=GRPOConfig(num_generations=3, max_completion_length=5, loss_type="dapo", beta=0.0),
        optim=OptimConfig(
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            adam_epsilon=1e-3,  # keeps Adam from blowing up the rounding of gradients near zero
            max_steps=2,
            per_device_train_batch_size=4,
        ),
        run=RunConfig(output_dir=str(output_dir), report_to=("jsonl",), roofline=False),
    )
    if changes.get("task") == "sft":
        data = dataclasses.replace(config.data, instruction=DataConfig.instruction)
        config = dataclasses.replace(config, data=data, reward=RewardConfig(), grpo=GRPOConfig())
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            sections.setdefault(section, {})[key] = value
    top = {name: value for name, value in changes.items() if "__" not in name}
    nested = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **nested, **top)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of an exported model."""
    return load_file(folder / "model.safetensors")


def metrics_of(output_dir: Path) -> list[dict[str, Any]]:
    """The metric rows without those that depend on the machine."""
    machine = ("time/", "rollout/", "tokens_per_second", "peak_memory_bytes")
    return [
        {k: v for k, v in row.items() if not k.startswith(machine)} for row in read_rows(output_dir / "metrics.jsonl")
    ]


def child_environment() -> dict[str, str]:
    """Environment in which a child process finds the checkout and `trainer_toys`."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(TOYS)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
