"""What a rollout keeps in memory, counted before it is allocated."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastr1.models.family import DecoderLayout
from fastr1.rollout.rows import rows_of_step

_GIB = 2**30
# Where the number of prompts comes from.
_PROMPTS = (
    "optim.per_device_train_batch_size × grpo.steps_per_generation, which is optim.gradient_accumulation_steps unless "
    "set; in an evaluation run.per_device_eval_batch_size or --batch-size"
)


class RolloutMemoryError(ValueError):
    """A rollout cannot fit. The message says what to lower, and to what."""


@dataclass(frozen=True)
class RolloutPlan:
    """Keys and values of B prompts of up to P tokens and of G completions each of up to T tokens, a step's logits, and
    copies of weights.

    Bytes: 2 · layers · Hkv · d · e · (B·P + B·G·T) + 8 · R·V, logits of R rows in float32 and once more in the draw,
    and on a CPU the projections that are copied side by side.
    """

    layout: DecoderLayout
    dtype: torch.dtype
    num_prompts: int
    prompt_length: int
    num_generations: int
    completion_length: int
    rows_per_completion: int = 1  # at most, in a step
    copied_bytes: int = 0  # of weights, `DecoderStack.copied_bytes`

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layout.kv_bytes(self.dtype.itemsize)

    @property
    def prefix_bytes(self) -> int:
        return self.token_bytes * self.num_prompts * self.prompt_length

    @property
    def suffix_bytes(self) -> int:
        return self.token_bytes * self.num_prompts * self.num_generations * self.completion_length

    @property
    def logits_bytes(self) -> int:
        num_rows = rows_of_step(self.num_prompts * self.num_generations, self.rows_per_completion)
        return 8 * num_rows * self.layout.vocab_size

    @property
    def total_bytes(self) -> int:
        return self.prefix_bytes + self.suffix_bytes + self.logits_bytes + self.copied_bytes

    def fits(self, free_bytes: int | None) -> bool:
        """None: the system does not say what is free."""
        return free_bytes is None or self.total_bytes <= free_bytes

    def check_fits(self, free_bytes: int | None) -> None:
        """Raises RolloutMemoryError where more is needed than is free."""
        if free_bytes is None or self.fits(free_bytes):
            return
        parts = [(self.prefix_bytes, "the prompts"), (self.suffix_bytes, "the completions")]
        if self.copied_bytes:
            parts.append((self.copied_bytes, "copies of weights"))
        held = ", ".join(f"{size / _GIB:.2f} GiB for {what}" for size, what in parts)
        raise RolloutMemoryError(
            f"a rollout of {self.num_prompts} prompts of up to {self.prompt_length} tokens, with "
            f"{self.num_generations} completions each of up to {self.completion_length}, needs "
            f"{self.total_bytes / _GIB:.2f} GiB beside the model ({held}), and {free_bytes / _GIB:.2f} GiB "
            f"are free: {self._remedy(free_bytes)}"
        )

    def _remedy(self, free_bytes: int) -> str:
        ways = []
        for setting, field, least in (
            ("rollout.num_speculative_tokens", "rows_per_completion", 1),
            ("the number of prompts", "num_prompts", 1),
            ("grpo.max_completion_length", "completion_length", 1),
            ("grpo.num_generations", "num_generations", 2),
        ):
            number = self._largest(field, free_bytes)
            if number >= least:
                way = f"{setting} to {number - (field == 'rows_per_completion')} or less"
                ways.append(f"{way} ({_PROMPTS})" if field == "num_prompts" else way)
        if not ways:
            return "one prompt alone does not fit; use fewer frames or a GPU with more memory"
        return f"lower {', or '.join(ways)}"

    def _largest(self, field: str, free_bytes: int) -> int:
        """The largest value of a field, up to its own, that fits; 0: none does."""

        def needed(value: int) -> int:
            changes: dict[str, Any] = {field: value}
            return replace(self, **changes).total_bytes

        return bisect_right(range(1, getattr(self, field) + 1), free_bytes, key=needed)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
