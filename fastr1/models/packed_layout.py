from __future__ import annotations
from itertools import chain
import torch

class PackedLayout:
    def __init__(self, prompt_lengths, completion_lengths):
        self.prompt_lengths = tuple(prompt_lengths)
        self.completion_lengths = tuple(tuple(g) for g in completion_lengths)

    @property
    def num_prompt_tokens(self): return sum(self.prompt_lengths)
    @property
    def num_tokens(self): return self.num_prompt_tokens + sum(chain(*self.completion_lengths))

    def positions(self, device):
        parts = [torch.arange(p) for p in self.prompt_lengths]
        parts += [torch.arange(p, p + c) for p, g in zip(self.prompt_lengths, self.completion_lengths) for c in g]
        return torch.cat(parts)[None].to(device)

    def rows(self, device):
        out, at, end = [], self.num_prompt_tokens, 0
        for p, g in zip(self.prompt_lengths, self.completion_lengths):
            end += p
            for c in g:
                out += [end - 1, *range(at, at + c)]
                at += c
        return torch.tensor(out, device=device)

    def mask(self, device):
        seg, grp = [], []
        n = 0
        for i, p in enumerate(self.prompt_lengths):
            seg += [n] * p; grp += [i] * p; n += 1
        for i, g in enumerate(self.completion_lengths):
            for c in g:
                seg += [n] * c; grp += [i] * c; n += 1
        seg, grp = torch.tensor(seg), torch.tensor(grp)
        L = len(seg); P = self.num_prompt_tokens
        same = (seg[:, None] == seg[None]) & torch.ones(L, L, dtype=torch.bool).tril()
        cross = (grp[:, None] == grp[None]) & (torch.arange(L)[:, None] >= P) & (torch.arange(L)[None] < P)
        return (same | cross)[None, None].to(device)
