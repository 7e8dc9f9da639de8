"""Completions sampled on the trainer's own weights, every prompt embedded, prefilled and stored once.

    prefill → draw → (schedule → run → finish) until every completion has ended

All prompts of an update decode together. A step forwards the last token of every row (`token_step`); completions that
have ended leave, and the rows of the others close up. A draw is argmax(logits / temperature + noise), the noise a hash
of (seed, prompt key, completion, position, token): a completion does not depend on the others, their order, on how many
decode together or on the number of ranks, beyond the rounding of logits.

On a GPU the host looks only every few steps at who has ended, and a step is a CUDA graph for each number of rows
(`graphs`); nothing else waits. The oracle is `eager`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch

from fastr1.models import Processor, VideoLanguageModel
from fastr1.models.decoder_stack import describe_decoder, refuse_hooks
from fastr1.models.packed_attention import choose_packed_backend
from fastr1.models.packed_forward import forward_packed
from fastr1.models.packed_layout import PackedLayout
from fastr1.rollout.costs import RolloutCosts
from fastr1.rollout.graphs import StepGraphs, bucket_of
from fastr1.rollout.kv import KeyValueArenas, PrefixWriter, Room
from fastr1.rollout.memory import RolloutPlan, free_bytes
from fastr1.rollout.noise import completion_keys
from fastr1.rollout.params import SamplingParams, check_logps, check_request, find_stop
from fastr1.rollout.rows import DecodingRows
from fastr1.rollout.token_step import TokenStep
from fastr1.schema import Rollout

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 16384  # prompts forwarded at a time hold no more, or are one
STEPS_PER_LOOK = 16
KEPT_SHARE = 0.85  # on a CPU rows close up when no more than this share of them is open


@dataclass
class Completion:
    """A completion that decodes or has."""

    prompt: int
    row: int  # of the rollout
    ended_by: Literal["end token", "stop string", "length"] | None = None
    num_checked: int = 0  # tokens that were looked through for stop strings


class RolloutEngine:
    """Rollouts of one model. Arenas and graphs are kept from one to the next while they are large enough."""

    def __init__(
        self,
        model: VideoLanguageModel,
        processor: Processor,
        params: SamplingParams,
        *,
        keeps_arenas: bool = True,
        graphs: StepGraphs | None = None,  # None: those of CUDA on a GPU, no graphs elsewhere
        steps_per_look: int | None = None,  # between two looks at who has ended; None: 16 on a GPU, else 1
        rows_per_completion: int = 1,  # at most, in a step
    ) -> None:
        self.rows_per_completion = rows_per_completion
        self.model, self.processor, self.params, self.keeps_arenas = model, processor, params, keeps_arenas
        on_gpu = model.device.type == "cuda"
        self.graphs = graphs or (StepGraphs() if on_gpu else None)
        self.steps_per_look = steps_per_look or (STEPS_PER_LOOK if on_gpu else 1)
        self.costs = RolloutCosts()
        self.stack = describe_decoder(model.decoder)
        self.completions: list[Completion] = []
        self.active: list[Completion] = []  # by row
        self.num_rows = 0  # that a step computes; those behind the active ones are padding
        self.num_steps = 0
        self._is_warm = False  # a step has been run
        self._replays = False  # steps of this rollout are graphs
        self._arenas: KeyValueArenas | None = None
        self._rows: DecodingRows | None = None
        self.token_step: TokenStep | None = None

    @torch.no_grad()
    def sample(
        self,
        prompt_ids: Sequence[torch.Tensor],  # B × (L_i,) int64 on the device of the model
        visual_tokens: Sequence[torch.Tensor],  # B × (Q, D), of `model.visual_tokens`
        *,
        num_generations: int = 1,
        seed: int = 0,
        prompt_keys: Sequence[int] | None = None,  # B ids that make draws independent of batching; default 0…B−1
    ) -> Rollout:
        """G completions for each prompt, rows in prompt-major order; as `eager.sample_eagerly`."""
        check_request(self.model, len(prompt_ids), num_generations, prompt_keys)
        embeds = [self.model.embed_prompt(ids, tokens) for ids, tokens in zip(prompt_ids, visual_tokens, strict=True)]
        positions, first_positions = zip(
            *map(self.model.prompt_positions, prompt_ids, [len(rows) for rows in embeds]), strict=True
        )
        keys = completion_keys(seed, range(len(embeds)) if prompt_keys is None else prompt_keys, num_generations)
        self.costs = RolloutCosts()
        self._start(embeds, first_positions, keys.to(self.model.device), num_generations)
        assert self.token_step is not None
        with torch.inference_mode():
            with self.costs.prefill(embeds, len(keys)):
                self.token_step.draw(self._prefill(embeds, positions).repeat_interleave(num_generations, dim=0))
                self._finish()
            with self.costs.decode():
                while any(completion.ended_by is None for completion in self.active):
                    self.step()
        rollout = self._collect()
        self.token_step.finish()
        if not self.keeps_arenas:
            self.release()
        return rollout

    def release(self) -> None:
        """Free arenas and graphs; the next rollout makes them again."""
        self._arenas = self._rows = self.token_step = None
        if self.graphs:
            self.graphs.clear()

    def step(self) -> None:
        """One more token for every completion that has not ended."""
        self._schedule()
        self._run()
        self.costs.add_step(self.num_rows, self._suffix_tokens())
        self._finish()

    def _start(
        self, embeds: list[torch.Tensor], first_positions: Sequence[int], keys: torch.Tensor, num_generations: int
    ) -> None:
        """Completions without a token, and room for them."""
        self.stack = describe_decoder(self.model.decoder)  # anew: a projection may have been wrapped since
        refuse_hooks(self.model.decoder)
        lengths = [len(rows) for rows in embeds]
        room = Room(len(embeds), max(lengths), len(keys), self.params.max_completion_length)
        if self._arenas is None or not self._arenas.holds(room, embeds[0].dtype, embeds[0].device):
            with self.costs.warm_up():
                self._make_arenas(room, embeds[0].dtype, embeds[0].device)
        assert self._arenas is not None
        assert self._rows is not None
        num_positions = max(self._arenas.room.prompt_length, *first_positions) + self._arenas.room.completion_length
        if self.token_step is None or len(self.token_step.cos) < num_positions:
            end_ids = torch.tensor(self.processor.end_token_ids, device=keys.device)
            allowed = self._allowed_ids()
            self.token_step = TokenStep(
                self.stack, self.model, self._rows, self._arenas, num_positions, end_ids, allowed
            )
        self._rows.start(keys, lengths, first_positions, num_generations)
        known = self.token_step.addresses
        self.token_step.refresh(self.stack, self.params, num_generations * self.rows_per_completion)
        if self.graphs and (self.token_step.addresses != known or not self.stack.is_plain):
            self.graphs.clear()  # what they read has moved, or may compute something else now
        # ZeRO stage 3 gathers weights to other places every time: graphs of them would be captured to be used once.
        is_partitioned = any(hasattr(parameter, "ds_id") for parameter in self.stack.parameters())
        self._replays = self.graphs is not None and not is_partitioned
        self.completions = [Completion(row // num_generations, row) for row in range(len(keys))]
        self.active = list(self.completions)
        self.num_rows, self.num_steps = len(self.active), 0
        if not self._is_warm:
            with self.costs.warm_up():
                self._warm_up(partial(self.token_step, self.num_rows))
            self._is_warm = True

    def _make_arenas(self, room: Room, dtype: torch.dtype, device: torch.device) -> None:
        """New arenas, once it is certain that they fit; large enough for what the last ones held too, if that fits."""
        last = None if self._arenas is None else self._arenas.room
        self.release()  # before there are others
        free = free_bytes(device)
        if last is not None:
            logger.info("rollout: %s need more memory than was kept for %s; it is made anew", room, last)
            room = room | last if self._plan(room | last, dtype).fits(free) else room
        self._plan(room, dtype).check_fits(free)
        self._arenas = KeyValueArenas(self.model.layout, room, dtype, device)
        self._rows = DecodingRows(
            room.num_completions, room.num_prompts, room.completion_length, device, self.rows_per_completion
        )

    def _plan(self, room: Room, dtype: torch.dtype) -> RolloutPlan:
        num_generations = -(-room.num_completions // room.num_prompts)
        sizes = (room.num_prompts, room.prompt_length, num_generations, room.completion_length)
        return RolloutPlan(self.model.layout, dtype, *sizes, self.rows_per_completion, self.stack.copied_bytes)

    def _allowed_ids(self) -> torch.Tensor | None:
        """(V,) bool, False for ids that stand for a video; None: there are none."""
        if not self.model.media_token_ids:
            return None
        allowed = torch.ones(self.model.layout.vocab_size, dtype=torch.bool, device=self.model.device)
        allowed[list(self.model.media_token_ids)] = False
        return allowed

    def _prefill(self, embeds: list[torch.Tensor], positions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Forward every prompt once, its keys and values into the arena; logits (B, V) of the first tokens."""
        assert self._arenas is not None
        backend = choose_packed_backend(self.model.packed_attn_implementation, embeds[0].device, embeds[0].dtype)
        last: list[torch.Tensor] = []
        for prompts in _batches([len(rows) for rows in embeds], PREFILL_TOKENS):
            lengths = [len(rows) for rows in embeds[prompts]]
            hidden = forward_packed(
                self.model.decoder,
                torch.cat(embeds[prompts])[None],
                PackedLayout(lengths, [[]] * len(lengths)),
                position_ids=torch.cat(list(positions[prompts]), dim=-1).unsqueeze(-2),
                cache=PrefixWriter(self._arenas, lengths, prompts.start),
                backend=backend,
            )
            ends = torch.tensor([end - 1 for end in accumulate(lengths)], device=hidden.device)
            last.append(hidden[0, ends])
        return self.model.project(torch.cat(last))

    def _schedule(self) -> None:
        """Close up when enough completions have ended."""
        kept = [row for row, completion in enumerate(self.active) if completion.ended_by is None]
        assert self._arenas is not None
        assert self._rows is not None
        if self._replays:
            num_rows = bucket_of(len(kept), self._rows.size)
            if num_rows >= self.num_rows and self.num_steps > 0:
                return
        else:
            num_rows = len(kept)
            if num_rows > KEPT_SHARE * self.num_rows:
                return
        self.num_rows = num_rows
        if len(kept) == len(self.active):
            return
        self.active = [self.active[row] for row in kept]
        sizes = [0] * (self.completions[-1].prompt + 1)
        for completion in self.active:
            sizes[completion.prompt] += 1
        self._arenas.keep(self._rows.keep(kept, sizes), self.num_steps)

    def _run(self) -> None:
        assert self.token_step is not None
        if self._replays:
            assert self.graphs is not None
            key = self.token_step.key(self.num_rows)
            if key not in self.graphs:
                step = partial(self.token_step, self.num_rows)
                with self.costs.warm_up():
                    self._warm_up(step)
                    self.graphs.capture(key, step)
            self.graphs.replay(key)
        else:
            self.token_step(self.num_rows)
        self.num_steps += 1

    def _suffix_tokens(self) -> int:
        """How many tokens of completions the last step has read."""
        return self.num_rows * self.num_steps

    def _warm_up(self, step: Callable[[], None]) -> None:
        """Run a step on padding alone, without a trace in the rows; padding writes nothing into the arenas."""
        assert self._rows is not None
        copies = self._rows.snapshot()
        self._rows.clear(0)
        self._rows.cu_rows.zero_()
        step()
        self._rows.restore(copies)

    def _finish(self) -> None:
        """Note who has ended, where it is time to look."""
        assert self._rows is not None
        is_last = self.num_steps + 1 == self.params.max_completion_length
        if self.num_steps % self.steps_per_look and not is_last:
            return
        self._find_stop_strings()
        flags = self._rows.has_ended[: len(self.active)].tolist()
        for completion, has_ended in zip(self.active, flags, strict=True):
            if completion.ended_by is None and (has_ended or is_last):
                completion.ended_by = "end token" if has_ended else "length"

    def _find_stop_strings(self) -> None:
        """Note who has said one, and cut behind it."""
        if not self.params.stop_strings:
            return
        assert self._rows is not None
        lengths, ids = self._rows.lengths.tolist(), self._rows.completion_ids.cpu()
        for row, completion in enumerate(self.active):
            if completion.ended_by is not None:
                continue
            num_drawn, said = lengths[completion.row], ids[completion.row, : lengths[completion.row]]
            length = find_stop(self.processor.raw_text, said, completion.num_checked, self.params.stop_strings)
            completion.num_checked = num_drawn
            if length is not None:
                completion.ended_by = "stop string"
                self._rows.has_ended[row] = True
                self._rows.lengths[completion.row] = length

    def _collect(self) -> Rollout:
        assert self._rows is not None
        n = len(self.completions)
        lengths = self._rows.lengths[:n]
        longest = int(lengths.max())
        mask = torch.arange(longest, device=lengths.device)[None] < lengths[:, None]
        ids = self._rows.completion_ids[:n, :longest].masked_fill(~mask, self.processor.pad_token_id)
        logps, full_logps = (x[:n, :longest].masked_fill(~mask, 0.0) for x in (self._rows.logps, self._rows.full_logps))
        check_logps(logps)
        is_truncated = torch.tensor([c.ended_by == "length" for c in self.completions], device=lengths.device)
        on_host = zip(ids.cpu(), lengths.tolist(), strict=True)
        texts = [self.processor.decode(row[:length]) for row, length in on_host]
        metrics = self.costs.metrics(self.model, int(lengths.sum()), self.graphs)
        return Rollout(ids, mask, logps, full_logps, is_truncated, texts, metrics)


def _batches(lengths: Sequence[int], max_tokens: int) -> list[slice]:
    """Neighbours that hold no more than so many tokens together, at least one each."""
    batches: list[slice] = []
    total = 0
    for i, length in enumerate(lengths):
        if not batches or total + length > max_tokens:
            batches.append(slice(i, i))
            total = 0
        batches[-1] = slice(batches[-1].start, i + 1)
        total += length
    return batches
