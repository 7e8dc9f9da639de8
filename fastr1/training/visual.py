"""The visual tokens of an update's videos, made once: rollout, old policy and policy read the same tensors.

The policy's passes see leaves that collect gradients over micro-batches; `backward` sends what was collected through
connector (and tower, where it is trained) once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastr1.models import VideoLanguageModel
from fastr1.training.distributed import DistributedModel


class VisualTokens:
    """Visual tokens of B videos of this rank.

    Args:
        videos: B × features of `encode`, or pixels where the tower is trained.

    Attributes: tokens, B × (Q, D), leaves that require a gradient where a part they come from is trained.
    """

    def __init__(self, distributed: DistributedModel, videos: Sequence[torch.Tensor]) -> None:
        self._distributed, self._videos = distributed, videos
        self.tokens: list[torch.Tensor] = []
        self._make(range(len(videos)))
        self.is_trained = self._made[0].requires_grad

    @property
    def detached(self) -> list[torch.Tensor]:
        """The tokens for passes without gradient."""
        return [tokens.detach() for tokens in self.tokens]

    def backward(self) -> None:
        """One backward pass with the gradients that the tokens have collected. All ranks call it, once."""
        if not self.is_trained:
            return
        leaves = [self.tokens[place] for place in self._places]
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        self._distributed.backward_from(self._made, grads)
        self._made = []

    def remake(self, places: range) -> None:
        """Make those at `places` again after a step of the optimizer, where that changed them. All ranks call it."""
        if self.is_trained:
            self._make(places)

    def _make(self, places: range) -> None:
        def see(model: VideoLanguageModel) -> list[torch.Tensor]:
            return list(model.visual_tokens([self._videos[place] for place in places]))

        self._made: list[torch.Tensor] = self._distributed(see)
        self._places = places
        leaves = [made.detach().requires_grad_(made.requires_grad) for made in self._made]
        fresh = dict(zip(places, leaves, strict=True))
        self.tokens = [fresh[i] if i in fresh else self.tokens[i].detach() for i in range(len(self._videos))]
