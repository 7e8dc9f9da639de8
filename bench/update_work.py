"""The work of one update, drawn once for all providers: a model, its reference, prompts, videos, forced completions.

Lengths are the quantiles of a log-normal distribution with the case's mean and longest, so every run has the same ones;
their order is drawn. Gradients are judged by a forward of transformers over padded rows, one prompt at a time, with the
loss written out here.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import harness
import torch
from shapes import UpdateCase
from torch import Tensor

from fastr1.config import PACKAGE
from fastr1.models import VideoLanguageModel, load_model
from fastr1.models.family import build_model
from fastr1.models.tinyllava.prompts import IMAGE_TOKEN_INDEX
from fastr1.schema import Batch, Rollout, Sample, Scored

DEMO_MODEL = PACKAGE / "demo" / "base_model"


@dataclass
class Work:
    """B prompts with G completions each; everything on the device."""

    case: UpdateCase
    model: VideoLanguageModel  # in training mode
    reference: VideoLanguageModel | None
    videos: list[Tensor]  # B × pixels (F, 3, S, S)
    batch: Batch
    ref_logps: Tensor | None = None  # (B·G·T,)
    phases_ms: dict[str, float] = field(default_factory=dict)  # of the last call of a provider

    @property
    def normalizer(self) -> float:
        return float(sum(self.batch.lengths))

    def rows_of(self, prompt: int) -> slice:
        return slice(prompt * self.case.num_generations, (prompt + 1) * self.case.num_generations)


def completion_lengths(number: int, mean: float, longest: int) -> list[int]:
    """Quantiles of a log-normal distribution, so spread that their mean is `mean` and the longest is `longest`."""
    if mean == longest:
        return [longest] * number
    scores = [NormalDist().inv_cdf((i + 0.5) / number) for i in range(number)]

    def lengths_for(sigma: float) -> list[float]:
        return [longest * math.exp(sigma * (z - scores[-1])) for z in scores]

    low, high = 0.0, 10.0
    for _ in range(60):  # the wider, the smaller the mean below a given longest
        sigma = (low + high) / 2
        low, high = (sigma, high) if sum(lengths_for(sigma)) > mean * number else (low, sigma)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(harness.SEED)).tolist()
    lengths = [max(1, round(length)) for length in lengths_for(low)]
    return [lengths[i] for i in order]


def draw_work(case: UpdateCase, model: VideoLanguageModel, videos: list[Tensor] | None = None) -> Work:
    """`videos` are drawn where none are given."""
    device, config = model.device, model.config  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(harness.SEED)
    B, G = case.num_prompts, case.num_generations
    lengths = completion_lengths(B * G, case.mean_length, case.max_length)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    vocabulary = config.text.vocab_size

    def ids(*shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=generator)

    text_length = case.prompt_length - config.num_queries + 1
    prompts = [ids(text_length) for _ in range(B)]
    for prompt in prompts:
        prompt[text_length // 4] = IMAGE_TOKEN_INDEX
    side = config.vision.image_size
    if videos is None:
        videos = [torch.randn(case.num_frames, 3, side, side, generator=generator).to(device) for _ in range(B)]
    rollout = Rollout(
        ids(*mask.shape).masked_fill(~mask, 0).to(device),
        mask.to(device),
        torch.zeros(mask.shape, device=device),
        torch.zeros(B * G, dtype=torch.bool, device=device),
        [""] * (B * G),
    )
    batch = Batch(
        samples=[Sample(str(i), "", "AB", "A", Path("none"), "bench") for i in range(B)],
        prompt_ids=[prompt.to(device) for prompt in prompts],
        prompt_lengths=[case.prompt_length] * B,
        is_valid=[True] * B,
        rollout=rollout,
        lengths=lengths,
        scored=Scored([0.0] * (B * G), {}),
        advantages=torch.linspace(-1.6, 1.6, G).repeat(B).to(device),
        is_counted=[True] * (B * G),
        has_signal=[True] * (B * G),
    )
    return Work(case, model.train(), None, videos, batch)


def make_model(case: UpdateCase) -> VideoLanguageModel:
    """The demo's trained base model, or random weights of the full size; the tower is frozen."""
    if case.model == "demo":
        model = load_model(DEMO_MODEL, dtype=case.torch_dtype, device=harness.device())
    else:
        torch.manual_seed(harness.SEED)
        default = torch.get_default_dtype()
        torch.set_default_dtype(case.torch_dtype)
        try:
            with harness.device():
                model = build_model(full_size(case))
        finally:
            torch.set_default_dtype(default)
    model.freeze(["vision_tower"])
    return model


def full_size(case: UpdateCase) -> dict[str, Any]:
    """config.json of TinyLLaVA-Video: Qwen2.5-3B, SigLIP-so400m/14-384 and the connector between them."""
    text = {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "max_position_embeddings": 32_768,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151_936,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    }
    demo = json.loads((DEMO_MODEL / "config.json").read_text())
    return {
        **{name: demo[name] for name in ("connector_type", "model_type", "num_resampler_layers", "pad_token")},
        **{name: demo[name] for name in ("vision_feature_layer", "vision_feature_select_strategy")},
        "group": case.num_groups,
        "num_queries": case.num_queries,
        "hidden_size": text["hidden_size"],
        "text_config": text,
        "tokenizer_model_max_length": case.prompt_length + case.max_length,
        "vision_config": vision,
        "vision_hidden_size": vision["hidden_size"],
        "vocab_size": text["vocab_size"],
    }


def copy_model(model: VideoLanguageModel) -> VideoLanguageModel:
    """A frozen one with other values of the same kind, as the reference is after some updates of the policy."""
    other = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator(model.device).manual_seed(harness.SEED)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter += 0.02 * parameter.std() * noise if parameter.numel() > 1 else 0
    return other.eval()
