"""The visual tokens of an update's videos: rollout, old policy and the policy's first step read the same tensors.

Further steps of the optimizer make theirs again, where a part they come from is trained.

The policy's passes see leaves that collect gradients over micro-batches; `backward` sends what was collected through
connector (and tower, where it is trained), once per step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastr1.training.distributed import DistributedModel


class VisualTokens:
    """Visual tokens of B videos of this rank.

    Args:
        videos: B × features of `encode`, or pixels where the tower is trained.

    Attributes: tokens, B × (Q, D), leaves that require a gradient where a part they come from is trained; is_trained.
    """

    def __init__(self, distributed: DistributedModel, videos: Sequence[torch.Tensor]) -> None:
        self._distributed, self.videos = distributed, list(videos)
        self._made: list[torch.Tensor] = []  # with their graph, and beside each the leaf that stands for it
        self._leaves: list[torch.Tensor] = []
        self.tokens = self._make(self.videos)
        self.is_trained = self._made[0].requires_grad

    @property
    def detached(self) -> list[torch.Tensor]:
        """The tokens for passes without gradient."""
        return [tokens.detach() for tokens in self.tokens]

    def backward(self) -> None:
        """One backward pass with the gradients that the tokens have collected. All ranks call it, once
        per step of the optimizer."""
        if self.is_trained:
            grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
            self._distributed.backward_from(self._made, grads)
        self._made, self._leaves = [], []

    def remake(self, places: range) -> None:
        """Make those at `places` again after a step of the optimizer, where that changed them. All ranks call it."""
        if self.is_trained:
            fresh = dict(zip(places, self._make([self.videos[place] for place in places]), strict=True))
            self.tokens = [fresh.get(place, tokens.detach()) for place, tokens in enumerate(self.tokens)]

    def refill(self, more: VisualTokens, chosen: Sequence[int]) -> None:
        """Keep the chosen ones of these and others. What is dropped still takes part in the one backward pass, with
        gradients of zero: which are dropped differs between ranks."""
        self.tokens, self.videos = (
            [both[place] for place in chosen] for both in ([*self.tokens, *more.tokens], [*self.videos, *more.videos])
        )
        self._made += more._made
        self._leaves += more._leaves

    def _make(self, videos: list[torch.Tensor]) -> list[torch.Tensor]:
        made = self._distributed(lambda model: list(model.visual_tokens(videos)))
        leaves = [tokens.detach().requires_grad_(tokens.requires_grad) for tokens in made]
        self._made += made
        self._leaves += leaves
        return leaves
