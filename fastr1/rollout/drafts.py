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
START, NOTHING = -1, -2  # before the first token of every text, and behind the last


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

    def __init__(
        self, earlier: Sequence[Sequence[int]], num_generations: int, max_length: int, end_ids: Collection[int]
    ) -> None:
        self.num_generations, self._end_ids = num_generations, frozenset(end_ids)
        # One text behind the other, those that grow with room for their last tokens. An occurrence is the place behind.
        self._tokens = [token for ids in earlier for token in (START, *ids, NOTHING)]
        first, room = len(self._tokens), [START, *[NOTHING] * (max_length + 1)]
        self._tokens += room * num_generations
        self._nexts = [first + g * len(room) + 1 for g in range(num_generations)]  # where a text goes on
        self._behind: defaultdict[int, list[int]] = defaultdict(list)  # every token
        for place, token in enumerate(self._tokens[:first], 1):
            self._behind[token].append(place)
        self._behind[START] += self._nexts
        self._nodes = [[place for place in self._behind[START] if place != own] for own in self._nexts]
        self._read = list(self._nexts)  # as far as the way to its node goes

    def extend(self, completion: int, tokens: Sequence[int]) -> None:
        """Tokens that a completion has said."""
        for token in tokens:
            self._tokens[self._nexts[completion]] = token
            self._nexts[completion] += 1
            self._behind[token].append(self._nexts[completion])

    def draft(self, completion: int, most: int) -> list[int]:
        """Up to so many tokens that it may say next, none of which ends it."""
        node, likelihood = self._node(completion), 1.0
        drafted: list[int] = []
        while len(drafted) < most:
            following = [token for token in map(self._tokens.__getitem__, node) if token != NOTHING]
            if not following:
                break
            token = max(dict.fromkeys(following), key=following.count)  # of equal ones the first
            likelihood *= following.count(token) / (len(following) + 0.5)
            if likelihood < LEAST or token in self._end_ids:
                break
            drafted.append(token)
            node = self._child(node, token)
        return drafted

    def _child(self, node: list[int], token: int) -> list[int]:
        tokens = self._tokens
        return [place + 1 for place in node if tokens[place] == token]

    def _node(self, completion: int) -> list[int]:
        """Where a completion stands: the occurrences of its longest end."""
        node, end = self._nodes[completion], self._nexts[completion]
        for token in self._tokens[self._read[completion] : end]:
            node = self._child(node, token)
        self._read[completion] = end
        self._nodes[completion] = node or self._longest(end)
        return self._nodes[completion]

    def _longest(self, end: int) -> list[int]:
        """Places behind the longest end of a text that is found elsewhere."""
        tokens = self._tokens
        found: list[int] = []
        longest = 1
        for place in self._behind[tokens[end - 1]][-MOST_PLACES:]:
            if place == end:
                continue
            length = 1
            while tokens[end - length] != START and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > longest:
                found, longest = [], length
            if length == longest:
                found.append(place)
        return found
