"""The work of one update, drawn once for all providers: a model, its reference, prompts, videos, forced completions.

Lengths are the quantiles of a log-normal distribution with the case's mean and longest, so every run has the same ones;
their order is drawn. Gradients are judged by a forward of transformers over padded rows, one prompt at a time, with the
loss written out here.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import harness
import torch
from clips import encode
from shapes import LoadingCase
from torch import Tensor, nn
from update_shapes import UpdateCase

from fastr1.config import PACKAGE, DataConfig
from fastr1.models import VideoLanguageModel, load_model
from fastr1.models.family import build_model
from fastr1.models.tinyllava.prompts import IMAGE_TOKEN_INDEX
from fastr1.schema import Batch, Clip, Rollout, Sample, Scored
from fastr1.video import ClipPrefetcher, load_pixels, preprocess_frames
from fastr1_kernels import group_advantages

DEMO_MODEL = PACKAGE / "demo" / "base_model"
DECODERS = {  # of Qwen2.5
    size: {"hidden_size": D, "intermediate_size": inner, "num_attention_heads": heads, "num_hidden_layers": layers}
    for size, D, inner, heads, layers in (
        ("3B", 2048, 11_008, 16, 36),
        ("1.5B", 1536, 8960, 12, 28),
        ("0.5B", 896, 4864, 14, 24),
    )
}


class ClipFiles:
    """MP4 files, encoded here, that are decoded ahead in threads over and over; removed with this object."""

    def __init__(
        self, case: UpdateCase, side: int, num_threads: int, note: Callable[[Clip], None] | None = None
    ) -> None:
        assert case.video_size is not None
        width, height = case.video_size
        seconds = max(5, case.num_frames // 25 + 1)
        self._clip = encode(LoadingCase(width=width, height=height, seconds=seconds, num_frames=case.num_frames))
        data = DataConfig(num_frames=case.num_frames)
        preprocess = partial(preprocess_frames, height=side, width=side)

        def load(path: Path) -> Tensor:
            return load_pixels(path, data, preprocess, harness.device(), note)

        paths = itertools.repeat(self._clip.path)
        self._loading = ClipPrefetcher(load, paths, num_threads=num_threads, depth=2 * case.num_prompts)
        self._finalizer = weakref.finalize(self, self._loading.close)

    def take(self, number: int) -> list[Tensor]:
        return [pixels for _, pixels in itertools.islice(self._loading, number)]


@dataclass
class Work:
    """B prompts with G completions each; everything on the device."""

    case: UpdateCase
    model: VideoLanguageModel  # in training mode
    reference: VideoLanguageModel | None
    videos: list[Tensor]  # B × pixels (F, 3, S, S); none: the prompts are text alone
    batch: Batch
    optimizer: torch.optim.Optimizer | None = None  # of a learning rate of 0: every call finds the same weights
    clips: ClipFiles | None = None  # where the videos are read from in every update
    phases_ms: dict[str, float] = field(default_factory=dict)  # of the last call of a provider

    @property
    def normalizer(self) -> float:
        return float(sum(self.batch.lengths))

    @cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.trained.items() if p.grad is not None}

    def forget_gradients(self) -> None:
        for p in self.trained.values():
            p.grad = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to that phase."""
        harness.synchronise()
        start = time.perf_counter()
        yield
        harness.synchronise()
        self.phases_ms[name] = self.phases_ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

    def load(self) -> list[Tensor]:
        """The pixels of this update; those of the next one are decoded meanwhile, as in training."""
        if self.clips is None:
            return self.videos
        with self.phase("wait for clips"):
            return self.clips.take(self.case.num_prompts)

    def rows_of(self, prompts: slice) -> slice:
        """Rows of the completions of neighbouring prompts."""
        return slice(prompts.start * self.case.num_generations, prompts.stop * self.case.num_generations)


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

    has_video = case.num_frames > 0
    text_length = case.prompt_length - (config.num_queries - 1) * has_video
    prompts = [ids(text_length) for _ in range(B)]
    if has_video:
        for prompt in prompts:
            prompt[text_length // 4] = IMAGE_TOKEN_INDEX
    side = config.vision.image_size
    if videos is None:
        shape = (case.num_frames, 3, side, side)
        videos = [torch.randn(shape, generator=generator).to(device) for _ in range(B * has_video)]
    rollout = Rollout(
        ids(*mask.shape).masked_fill(~mask, 0).to(device),
        mask.to(device),
        *torch.zeros(2, *mask.shape, device=device),
        torch.zeros(B * G, dtype=torch.bool, device=device),
        [""] * (B * G),
    )
    batch = Batch(
        samples=[Sample(str(i), "", "AB", "A", Path("none"), "bench") for i in range(B)],
        prompt_ids=[prompt.to(device) for prompt in prompts],
        prompt_lengths=[case.prompt_length] * B,
        pixel_shapes=[(case.num_frames, 3, side, side)] * B,
        is_valid=[True] * B,
        rollout=rollout,
        lengths=lengths,
        scored=Scored([0.0] * (B * G), {}),
        advantages=group_advantages(rewards_of(case), G).float().to(device),
        is_counted=[True] * (B * G),
        has_signal=[True] * (B * G),
    )
    return Work(case, model.train(), None, videos, batch)


def rewards_of(case: UpdateCase) -> Tensor:
    """(B·G,), alike in every group."""
    return torch.linspace(0, 2, case.num_generations).repeat(case.num_prompts)


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
    if case.checkpointing:
        model.enable_gradient_checkpointing()
    return model


def full_size(case: UpdateCase) -> dict[str, Any]:
    """config.json of TinyLLaVA-Video: a decoder of Qwen2.5, SigLIP-so400m/14-384 and the connector between them."""
    text = {
        "model_type": "qwen2",
        **DECODERS[case.model],
        "max_position_embeddings": 32_768,
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


@torch.no_grad()
def copy_model(model: VideoLanguageModel) -> VideoLanguageModel:
    """A frozen one, whose values differ a little where the model is trained: as a reference after some updates."""
    other = copy.deepcopy(model)
    generator = torch.Generator(model.device).manual_seed(harness.SEED)
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    for parameter in trained:
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        parameter.add_(noise, alpha=0.02 * float(parameter.float().std(correction=0)))
    return other.requires_grad_(False).eval()
