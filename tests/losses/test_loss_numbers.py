"""Numbers that only a kernel gets wrong: NaN under a GPU's min and max, infinite references, float16, many rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from loss_cases import ADVANTAGES, LOGITS, MASK, OLD, REF, SAMPLER, TOKEN_IDS, by_some, loss_on
from torch import Tensor

from fastr1_kernels import grpo_loss, reference, selective_log_softmax

INF, NAN = float("inf"), float("nan")


def test_rows_of_nothing_but_minus_infinity_are_nan(backend: Backend) -> None:
    logits = torch.zeros(2, 20, device=backend.device)
    logits[1] = -INF
    ids = torch.zeros(2, dtype=torch.long, device=backend.device)
    for wanted in (slice(0, 1), slice(0, 2)):
        leaf = logits.clone().requires_grad_()
        scores = selective_log_softmax(leaf, ids, return_entropy=True)
        outputs = scores[wanted]
        gradient = torch.autograd.grad(outputs, leaf, [torch.ones_like(x) for x in outputs])
        for x in (*outputs, *gradient):
            assert x[0].isfinite().all()
            assert x[1].isnan().all()


def test_entropy_left_out_changes_nothing_else(kernels: Backend) -> None:
    from fastr1_kernels.gpu.rows import score_rows

    logits, ids = kernels.put(LOGITS), kernels.put(TOKEN_IDS)
    results = []
    for compute_entropy in (True, False):
        leaf = logits.clone().requires_grad_()
        logps, entropy = score_rows(leaf, ids, compute_entropy=compute_entropy)
        assert entropy.eq(0).all() != compute_entropy
        assert entropy.requires_grad == compute_entropy
        results.append([logps, *torch.autograd.grad(logps.sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    expected = reference.selective_log_softmax(LOGITS, TOKEN_IDS)[0].flatten()
    torch.testing.assert_close(results[0][0].detach().double().cpu(), expected, rtol=1e-5, atol=1e-5)
