"""Guesses at what a completion says next, from earlier completions of the same prompt and from those of its own group.

A completion stands on a node of the suffix tree of these texts: the longest end of what it has said that one of them
has said too. Of the tree only the nodes exist that completions stand on, each as the list of its occurrences; a child
is what is left of the list behind the next token. So the tree takes the memory of the texts and of one index of their
tokens, it grows with the group token by token, and a rollout has nothing to build but the index.

A guess follows the tree downwards, at every node to the token that followed most often, as long as it is likely enough.
Everything is a function of the texts: nothing is drawn.

Sources: suffix trees of a problem's earlier rollouts, arXiv 2511.13841; of all outputs, arXiv 2411.04975.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Hashable, Sequence

MAX_TOKENS = 2**24  # remembered of all prompts together, 4 bytes each
KEPT = 16  # last completions of a prompt that are remembered
MOST_PLACES = 256  # last places behind a token that are looked at where a new end is searched for
LEAST = 0.5  # likelihood of a guess, all its tokens together, that is still made
START = -1  # before the first token of every text


class History:
    """The last completions of every prompt; those least recently asked for are forgotten first."""

    def __init__(self, max_tokens: int = MAX_TOKENS, kept: int = KEPT) -> None:
        self.max_tokens, self.kept = max_tokens, kept
        self.num_tokens = 0
        self._texts: OrderedDict[Hashable, list[array[int]]] = OrderedDict()

    def recall(self, prompt: Hashable) -> list[array[int]]:
        """Earlier completions of a prompt, oldest first."""
        if prompt not in self._texts:
            return []
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    def remember(self, prompt: Hashable, completions: Sequence[Sequence[int]]) -> None:
        earlier = self._texts.pop(prompt, [])
        texts = [*earlier, *(array("i", ids) for ids in completions)][-self.kept :]
        self._texts[prompt] = texts
        self.num_tokens += sum(map(len, texts)) - sum(map(len, earlier))
        while self.num_tokens > self.max_tokens:
            _, oldest = self._texts.popitem(last=False)
            self.num_tokens -= sum(map(len, oldest))


class Drafter:
    """Guesses for the completions of one prompt while they grow, numbered from 0."""

    def __init__(self, earlier: Sequence[Sequence[int]], num_generations: int, end_ids: Collection[int]) -> None:
        self.num_generations, self._end_ids = num_generations, frozenset(end_ids)
        self._texts = [[START, *ids] for ids in earlier] + [[START] for _ in range(num_generations)]
        self._first = len(earlier)
        # Behind every token, the places of what follows: (text, place).
        self._behind: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, text in enumerate(self._texts):
            for place, token in enumerate(text, 1):
                self._behind[token].append((number, place))
        everywhere = self._behind[START]
        self._nodes = [[o for o in everywhere if o[0] != self._first + g] for g in range(num_generations)]
        self._read = [1] * num_generations  # tokens of each growing text on the way to its node

    def extend(self, completion: int, tokens: Sequence[int]) -> None:
        """Tokens that a completion has said."""
        number = self._first + completion
        text = self._texts[number]
        for token in tokens:
            text.append(token)
            self._behind[token].append((number, len(text)))

    def draft(self, completion: int, most: int) -> list[int]:
        """Up to so many tokens that it may say next, none of which ends it."""
        texts, node, likelihood = self._texts, self._node(completion), 1.0
        drafted: list[int] = []
        while len(drafted) < most:
            counts: dict[int, int] = {}
            for number, place in node:
                if place < len(texts[number]):
                    token = texts[number][place]
                    counts[token] = counts.get(token, 0) + 1
            if not counts:
                break
            token = max(counts, key=counts.__getitem__)  # of equal ones that of the oldest text
            likelihood *= counts[token] / (sum(counts.values()) + 0.5)
            if likelihood < LEAST or token in self._end_ids:
                break
            drafted.append(token)
            node = self._child(node, token)
        return drafted

    def _child(self, node: list[tuple[int, int]], token: int) -> list[tuple[int, int]]:
        texts = self._texts
        return [(n, place + 1) for n, place in node if place < len(texts[n]) and texts[n][place] == token]

    def _node(self, completion: int) -> list[tuple[int, int]]:
        """Where a completion stands: the occurrences of its longest end."""
        node, text = self._nodes[completion], self._texts[self._first + completion]
        for token in text[self._read[completion] :]:
            node = self._child(node, token)
        self._read[completion] = len(text)
        self._nodes[completion] = node or self._longest(self._first + completion)
        return self._nodes[completion]

    def _longest(self, number: int) -> list[tuple[int, int]]:
        """Places behind the longest end of a text that is found elsewhere."""
        text = self._texts[number]
        found: list[tuple[int, int]] = []
        longest = 1
        for n, place in self._behind[text[-1]][-MOST_PLACES:]:
            if n == number and place == len(text):
                continue
            other, length = self._texts[n], 1
            while length < min(place, len(text)) and other[place - 1 - length] == text[-1 - length]:
                length += 1
            if length > longest:
                found, longest = [], length
            if length == longest:
                found.append((n, place))
        return found
