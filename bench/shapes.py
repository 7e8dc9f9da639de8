"""What is measured: heads of video language models, cases of each operation, and the targets, as data.

D and V are those of the language models that the video models are built on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rollout_shapes import ROLLOUT, RolloutCase, rollout_cases, rollout_target_ms
from update_shapes import UPDATE_OPS, UpdateCase, update_cases, update_target_ms

HEADS = {  # name → (D, V)
    "Qwen2.5-0.5B cut to 32,768": (896, 32_768),
    "Qwen2.5-0.5B": (896, 151_936),  # InternVL3-1B, LLaVA-OneVision-0.5B
    "Qwen2-VL-2B": (1536, 151_936),
    "TinyLLaVA-Video-R1": (2048, 151_936),  # Qwen2.5-3B
    "Qwen2.5-VL-7B": (3584, 152_064),
}
VIDEO_SIZES = ((854, 480), (1280, 720), (1920, 1080))
CPU_HEAD, MAIN_HEAD = "Qwen2.5-0.5B cut to 32,768", "TinyLLaVA-Video-R1"


@dataclass(frozen=True, kw_only=True)
class Case:
    op: str
    head: str
    rows: int
    dtype: str
    dead: float = 0.0  # share of rows with mask 0
    cold: bool = False  # other memory is written between the calls, so that the L2 cache holds nothing of the inputs
    frozen: bool = False  # the head's weight needs no gradient

    @property
    def width(self) -> int:
        return HEADS[self.head][0]

    @property
    def vocabulary(self) -> int:
        return HEADS[self.head][1]

    @property
    def label(self) -> str:
        more = [f"{self.dead:.0%} dead"] * bool(self.dead) + ["cold L2"] * self.cold + ["frozen head"] * self.frozen
        return ", ".join([self.op, self.head, f"{self.rows:,} rows", self.dtype, *more])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> dict[str, Any]:
        return {"head": self.head, "rows": self.rows, "D": self.width, "V": self.vocabulary}

    @property
    def results(self) -> str:
        return "kernels.jsonl"


@dataclass(frozen=True, kw_only=True)
class LoadingCase:
    """A clip of `seconds`, read by one thread: `num_frames` of its frames as squares of `side` pixels."""

    width: int
    height: int
    seconds: int = 5
    fps: int = 25
    num_frames: int = 16
    side: int = 384  # of SigLIP-so400m/14-384
    op: str = "load_pixels"
    dtype: str = "float32"
    dead: float = 0.0
    cold: bool = False
    frozen: bool = False

    @property
    def label(self) -> str:
        length = f"{self.seconds} s at {self.fps}/s"
        return f"{self.op}, {self.width}×{self.height}, {length}, {self.num_frames} frames to {self.side}×{self.side}"

    @property
    def shape(self) -> dict[str, Any]:
        names = ("width", "height", "seconds", "fps", "num_frames", "side")
        return {**{name: getattr(self, name) for name in names}, "threads": 1}

    @property
    def results(self) -> str:
        return "loading.jsonl"


AnyCase = Case | LoadingCase | UpdateCase


def cases_of(op: str, full: bool) -> list[Any]:
    """The cases of an operation on the device there is; `full` for all of them on a GPU."""
    if op == ROLLOUT:
        return rollout_cases(full)
    if op in UPDATE_OPS:
        return update_cases(op, full)
    if op == "load_pixels":
        return [LoadingCase(width=width, height=height) for width, height in VIDEO_SIZES]
    if not torch.cuda.is_available():
        case = Case(op=op, head=CPU_HEAD, rows=1024, dtype="float32")
        return [case, Case(op=op, head=CPU_HEAD, rows=1024, dtype="float32", frozen=True)] if op == LINEAR else [case]
    main: dict[str, Any] = {"op": op, "head": MAIN_HEAD, "dtype": "bfloat16"}
    if not full:
        return [Case(rows=2048, **main)] if op != LINEAR else [Case(rows=2048, **main, frozen=f) for f in (False, True)]
    rows = (2048, 8192, 32_768)
    if op == "group_advantages":
        return [Case(rows=n, **main) for n in (64, 512, 8192)]
    if op == LINEAR:
        heads = [head for head in HEADS if head != CPU_HEAD]
        cases = [Case(**{**main, "head": head}, rows=n) for head in heads for n in rows]
        cases += [Case(rows=n, frozen=True, **main) for n in rows]
        return cases + [Case(rows=8192, dead=0.4, frozen=f, **main) for f in (False, True)]
    if op == "linear_logps":
        return [Case(rows=n, **main) for n in rows]
    dead = (0.0, 0.4) if op == "grpo_loss" else (0.0,)
    return [Case(rows=n, cold=cold, dead=d, **main) for n in rows for d in dead for cold in (False, True)]


LINEAR = "linear_grpo_loss"

# Without these, which are marked `slow`, the benches take three minutes on a CPU; `make bench` runs all. They are every
# case but one of loading, rollouts and updates, and providers that are long or ours as it was.
SLOW_PROVIDERS = (
    *("before", "ours, padded, not shared", "ours, prompts not shared", "original's schedule"),
    *("generate, static cache", "PyAV, all frames preprocessed"),
)
SLOW_WITH_FROZEN_HEAD = ("Liger scaled cross-entropy", "TRL ChunkedLogProbFunction")  # which spares them little


def is_slow(case: AnyCase, provider: str) -> bool:
    if torch.cuda.is_available():
        return False
    if isinstance(case, LoadingCase):
        return case.height > VIDEO_SIZES[0][1] or provider in SLOW_PROVIDERS
    if isinstance(case, UpdateCase):
        return case.name != "demo" or provider in SLOW_PROVIDERS
    compiles = case.op == LINEAR and provider == "torch.compile"
    return compiles or (case.frozen and provider in SLOW_WITH_FROZEN_HEAD)


# Milliseconds on one H200 at 8,192 rows of MAIN_HEAD in bfloat16, warm and without dead rows: (op, frozen) → limit.
TARGETS_MS = {
    ("grpo_loss", False): 1.3,
    ("selective_log_softmax", False): 0.65,
    (LINEAR, False): 22.0,
    (LINEAR, True): 14.2,
    ("linear_logps", False): 7.1,
}
FIRST_CALL_TARGET = 1.3  # first call over steady calls, with a warm compilation cache


def target_ms(case: AnyCase, device: str) -> float | None:
    if isinstance(case, RolloutCase):
        return rollout_target_ms(case, device)
    if isinstance(case, UpdateCase):
        return update_target_ms(case, device)
    if isinstance(case, LoadingCase):
        return None
    main = case.rows == 8192 and case.head == MAIN_HEAD and case.dtype == "bfloat16"
    if "H200" not in device or not main or case.dead or case.cold:
        return None
    return TARGETS_MS.get((case.op, case.frozen))
