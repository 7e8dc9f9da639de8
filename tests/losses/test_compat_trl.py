"""`compat.trl` agrees with TRL's functions, and with their definitions where TRL is not installed."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastr1_kernels.compat import trl as ours

V = 23
LOGITS = torch.randn(3, 5, V, generator=torch.Generator().manual_seed(0)) * 2
INDEX = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(1))
TOP = torch.randint(V, (3, 5, 4), generator=torch.Generator().manual_seed(2))
ROWS = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


@pytest.fixture
def utils() -> Any:
    return pytest.importorskip("trl.trainer.utils", reason="trl is not installed: it is in the extra `bench`")


def with_gradient(function: Any, logits: Tensor, *arguments: Any, **more: Any) -> list[Tensor]:
    leaf = logits.clone().requires_grad_()
    result = function(leaf, *arguments, **more)
    return [result, torch.autograd.grad(result.float().square().sum(), leaf)[0]]


@pytest.mark.parametrize("index", [INDEX, TOP], ids=["one", "several"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax_is_its_definition(index: Tensor, temperature: float) -> None:
    def definition(logits: Tensor) -> Tensor:
        columns = index if index.dim() == 3 else index[..., None]
        return (logits / temperature).log_softmax(-1).gather(-1, columns).view(index.shape)

    got = with_gradient(ours.selective_log_softmax, LOGITS, index, temperature)
    torch.testing.assert_close(got, with_gradient(definition, LOGITS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [INDEX, TOP], ids=["one", "several"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax_agrees(utils: Any, index: Tensor, temperature: float, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype)
    expected = with_gradient(utils.selective_log_softmax, logits, index, temperature)
    exact = with_gradient(ours.selective_log_softmax, logits, index, temperature, rounding="torch")
    torch.testing.assert_close(exact[0], expected[0], rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    wide = ours.selective_log_softmax(logits, index, temperature)
    assert wide.dtype == torch.float32
    near = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(wide, expected[0].float(), rtol=near, atol=near)


def test_masked_rows_agree(utils: Any) -> None:
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        got, expected = (getattr(m, name)(LOGITS, INDEX, temperature=0.8, row_mask=ROWS) for m in (ours, utils))
        torch.testing.assert_close(got, expected)


def test_masked_rows_are_zero_whatever_their_ids() -> None:
    expected = torch.where(ROWS.bool(), ours.selective_log_softmax(LOGITS, INDEX), 0.0)
    ids = torch.where(ROWS.bool(), INDEX, -100)
    assert torch.equal(ours.selective_log_softmax(LOGITS, ids, row_mask=ROWS), expected)
    several = torch.where(ROWS.bool()[..., None], TOP, -100)
    masked = ours.selective_log_softmax(LOGITS, several, row_mask=ROWS)
    assert torch.equal(masked, torch.where(ROWS.bool()[..., None], ours.selective_log_softmax(LOGITS, TOP), 0.0))
    logps, entropy = ours.selective_log_softmax_and_entropy(LOGITS, ids, row_mask=ROWS)
    assert torch.equal(logps, expected)
    assert torch.equal(entropy != 0, ROWS.bool())


@pytest.mark.parametrize("chunk_size", [1, 4, 128])
def test_entropy_agrees(utils: Any, chunk_size: int) -> None:
    got, expected = (with_gradient(m.entropy_from_logits, LOGITS, chunk_size) for m in (ours, utils))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_entropy_is_its_definition_and_finite_for_missing_columns() -> None:
    p = LOGITS.softmax(-1)
    torch.testing.assert_close(ours.entropy_from_logits(LOGITS, 2), -(p * p.log()).sum(-1))
    assert ours.entropy_from_logits(LOGITS.masked_fill(LOGITS < -1, -torch.inf)).isfinite().all()


HEAD_CASES = {
    "plain": (1.0, 7, None, 1.0),
    "temperature": (0.7, 32768, None, 1.0),
    "softcap": (1.2, 5, 3.0, 0.5),
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("case", HEAD_CASES.values(), ids=HEAD_CASES.keys())
def test_head_agrees(utils: Any, case: tuple[Any, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(11, 6, generator=generator), torch.randn(V, 6, generator=generator)]
    tensors += [torch.randn(V, generator=generator)] if has_bias else []
    targets = torch.randint(V, (11,), generator=generator)
    results = []
    for function in (ours.ChunkedLogProbFunction.apply, utils._ChunkedLogProbFunction.apply):
        leaves = [x.clone().requires_grad_() for x in tensors]
        bias = leaves[2] if has_bias else None
        logps, entropy, *rest = function(leaves[0], leaves[1], bias, targets, *case, ("log_probs", "entropy"))
        assert rest == [None, None, None]
        results.append([logps, entropy, *torch.autograd.grad((2 * logps + entropy.square()).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_head_signature_is_trl_s(utils: Any) -> None:
    expected = list(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)[1:]
    assert list(inspect.signature(ours.chunked_log_probs).parameters) == expected
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"):
        names = list(inspect.signature(getattr(utils, name)).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters)[: len(names)] == names


def test_what_cannot_be_honoured_is_refused() -> None:
    head = (torch.randn(2, 3), torch.randn(V, 3), None, torch.tensor([1, 2]), 1.0, 8)
    with pytest.raises(ValueError, match="is_top1"):
        ours.chunked_log_probs(*head, outputs=("log_probs", "is_top1"))
    with pytest.raises(ValueError, match="chunk_size=0"):
        ours.chunked_log_probs(*head[:5], 0)
    head[1].ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="ZeRO-3"):
        ours.chunked_log_probs(*head)
    with pytest.raises(ValueError, match="rounding='half'"):
        ours.selective_log_softmax(LOGITS, INDEX, rounding="half")
    with pytest.raises(ValueError, match="token id 23 is outside"):
        ours.selective_log_softmax(LOGITS, TOP + V - TOP, 1.0)
    with pytest.raises(ValueError, match="row_mask has shape"):
        ours.selective_log_softmax(LOGITS, TOP, row_mask=ROWS[:2])
    with pytest.raises(ValueError, match="chunk_size=0"):
        ours.entropy_from_logits(LOGITS, 0)


@pytest.fixture
def fake_trl(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """The parts of TRL that `patch_trl` touches: its functions, and a trainer that has imported one by name."""
    utils, trainer = ModuleType("trl.trainer.utils"), ModuleType("trl.trainer.grpo_trainer")
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"):
        setattr(utils, name, lambda *_: "theirs")

    class Theirs:
        apply = staticmethod(lambda *_: "theirs")

    utils._ChunkedLogProbFunction = Theirs  # type: ignore[attr-defined]
    trainer.selective_log_softmax = utils.selective_log_softmax  # type: ignore[attr-defined]
    trainer.entropy_from_logits = print  # type: ignore[attr-defined]
    for module in (ModuleType("trl"), ModuleType("trl.trainer"), utils, trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return utils, trainer


def test_patch_replaces_what_was_imported_by_name_and_is_undone(fake_trl: tuple[ModuleType, ModuleType]) -> None:
    utils, trainer = fake_trl
    before = dict(vars(utils)), dict(vars(trainer))
    undo = ours.patch_trl()
    assert vars(trainer)["selective_log_softmax"] is vars(utils)["selective_log_softmax"] is ours.selective_log_softmax
    assert vars(trainer)["entropy_from_logits"] is print  # something else of that name
    head = (torch.randn(2, 3), torch.randn(V, 3), None, torch.tensor([1, 2]), 1.0, 8, None, 1.0)
    patched = vars(utils)["_ChunkedLogProbFunction"].apply
    assert patched(*head, ("log_probs", "is_top1")) == patched(*head) == "theirs"  # more than can be computed here
    assert patched(*head, ("log_probs",))[1] is None
    undo()
    undo()
    assert (dict(vars(utils)), dict(vars(trainer))) == before


def test_patch_refuses_another_version(fake_trl: tuple[ModuleType, ModuleType]) -> None:
    del fake_trl[0]._ChunkedLogProbFunction
    with pytest.raises(ValueError, match="has no _ChunkedLogProbFunction: this patch is for TRL"):
        ours.patch_trl()
