"""Speculation from history: several tokens of a completion in one step, where earlier completions foretell them.

    draft → run → verify

A step forwards the last token of every completion, and behind it the tokens that a drafter guesses (`drafts`), each a
row of its own: all of them write their keys and values first, then each attends to what is before it. So the draw
behind a row is the one that a plain step would make, if the guesses before it are right. A draw is a function of what
was said before and of (seed, prompt key, completion, position, token): guesses are right where they are what is drawn,
and the draw behind the last right one is kept too. Tokens and lengths are those without speculation, but for the
rounding of logits. Keys and values of wrong guesses are written over before anything attends to them.

What a run has drawn of a prompt is kept for its next rollout, by the prompt's text: keys of draws name places in the
stream of samples, another in every epoch. It is not part of a checkpoint, since no draw depends on it: a resumed run
begins to guess anew. So do processes each for itself, from what they have drawn themselves.

A completion that has ended has no rows any more: nothing closes up. The host looks at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastr1.models import Processor, VideoLanguageModel
from fastr1.rollout.drafts import Drafter, History
from fastr1.rollout.engine import Completion, RolloutEngine
from fastr1.rollout.graphs import StepGraphs, bucket_of
from fastr1.rollout.params import SamplingParams
from fastr1.schema import Rollout


class SpeculativeEngine(RolloutEngine):
    """Rollouts of one model, up to `num_speculative_tokens` guessed ahead of every completion in a step."""

    def __init__(
        self,
        model: VideoLanguageModel,
        processor: Processor,
        params: SamplingParams,
        num_speculative_tokens: int,
        *,
        keeps_arenas: bool = True,
        graphs: StepGraphs | None = None,  # as of `RolloutEngine`
    ) -> None:
        if num_speculative_tokens < 1:
            raise ValueError(f"num_speculative_tokens is {num_speculative_tokens}; give 1 or more, or a RolloutEngine")
        super().__init__(
            model,
            processor,
            params,
            keeps_arenas=keeps_arenas,
            graphs=graphs,
            steps_per_look=1,
            rows_per_completion=1 + num_speculative_tokens,
        )
        self.num_speculative_tokens = num_speculative_tokens
        self.history = History()
        self.drafters: list[Drafter] = []  # by prompt
        self.drafts: list[list[int]] = []  # by open completion, in the rows of this step
        self._drawn: list[list[int]] = []  # by completion
        self._streams: list[tuple[int, int]] = []  # by completion: key of its noise, position of its first token

    def sample(
        self, prompt_ids: Sequence[torch.Tensor], visual_tokens: Sequence[torch.Tensor], **options: Any
    ) -> Rollout:
        """As of `RolloutEngine`."""
        names = [ids.cpu().numpy().tobytes() for ids in prompt_ids]
        group = options.get("num_generations", 1)
        ends = self.processor.end_token_ids
        length = self.params.max_completion_length
        self.drafters = [Drafter(self.history.recall(name), group, length, ends) for name in names]
        rollout = super().sample(prompt_ids, visual_tokens, **options)
        lengths = rollout.completion_mask.sum(dim=1).tolist()
        texts = [ids[:length] for ids, length in zip(rollout.completion_ids.tolist(), lengths, strict=True)]
        for prompt, name in enumerate(names):
            self.history.remember(name, texts[prompt * group : (prompt + 1) * group])
        return rollout

    def _start(
        self, embeds: list[torch.Tensor], first_positions: Sequence[int], keys: torch.Tensor, num_generations: int
    ) -> None:
        super()._start(embeds, first_positions, keys, num_generations)
        firsts = [first for first in first_positions for _ in range(num_generations)]
        self._streams = list(zip(keys.tolist(), firsts, strict=True))
        self._drawn = [[] for _ in self.completions]
        self.drafts = [[] for _ in self.completions]  # the first draw is of the prompts' own logits

    def _schedule(self) -> None:
        """Rows of every completion that has not ended: its last token, and guesses."""
        assert self._rows is not None
        self.active = [completion for completion in self.active if completion.ended_by is None]
        self.drafts = fitted(
            [self._draft(completion) for completion in self.active], self._rows.size - len(self.active)
        )
        rows, sizes = [], [0] * (self.completions[-1].prompt + 1)
        for completion, draft in zip(self.active, self.drafts, strict=True):
            drawn, (key, first) = self._drawn[completion.row], self._streams[completion.row]
            for place, token in enumerate([drawn[-1], *draft], len(drawn)):
                rows.append((token, key, place, first, completion.row))
            sizes[completion.prompt] += 1 + len(draft)
        self.num_rows = bucket_of(len(rows), self._rows.size) if self._replays else len(rows)
        self._rows.lay_out(rows, sizes, self.num_rows)

    def _draft(self, completion: Completion) -> list[int]:
        drawn = self._drawn[completion.row]
        # The draw behind the last guess is kept too.
        room = self.params.max_completion_length - len(drawn) - 1
        drafter = self.drafters[completion.prompt]
        return drafter.draft(completion.row % drafter.num_generations, min(self.num_speculative_tokens, room))

    def _suffix_tokens(self) -> int:
        first = [len(self._drawn[completion.row]) for completion in self.active]
        return sum(sum(range(n, n + 1 + len(draft))) for n, draft in zip(first, self.drafts, strict=True))

    def _finish(self) -> None:
        """Keep what was guessed right and the draw behind it, and note who has ended."""
        assert self._rows is not None
        draws = iter(self._rows.tokens[: len(self.active) + sum(map(len, self.drafts))].tolist())
        for completion, draft in zip(self.active, self.drafts, strict=True):
            tokens = [next(draws) for _ in range(1 + len(draft))]
            num_right = count_equal(draft, tokens)
            if self.num_steps:
                self.costs.add_guess(len(draft), num_right)
            said = tokens[: num_right + 1]
            self._drawn[completion.row] += said
            drafter = self.drafters[completion.prompt]
            drafter.extend(completion.row % drafter.num_generations, said)
        # The step has counted every row as a token.
        rows = [completion.row for completion in self.active]
        lengths = torch.tensor([len(self._drawn[row]) for row in rows], device=self._rows.device)
        self._rows.lengths[rows] = lengths
        self._find_stop_strings()
        for completion in self.active:
            drawn = self._drawn[completion.row]
            if completion.ended_by is None and drawn[-1] in self.processor.end_token_ids:
                completion.ended_by = "end token"
            elif completion.ended_by is None and len(drawn) == self.params.max_completion_length:
                completion.ended_by = "length"


def count_equal(guessed: Sequence[int], drawn: Sequence[int]) -> int:
    """How many tokens agree from the first on."""
    pairs = zip(guessed, drawn, strict=False)
    return next((i for i, (guess, token) in enumerate(pairs) if guess != token), len(guessed))


def fitted(drafts: list[list[int]], room: int) -> list[list[int]]:
    """Drafts of so many tokens together at most, all cut at the same length."""
    while sum(map(len, drafts)) > room:
        longest = max(map(len, drafts))
        drafts = [draft[: longest - 1] for draft in drafts]
    return drafts
