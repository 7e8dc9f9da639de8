"""`sample_tokens` against its reference, transformers' warpers and the softmax, in torch and in the kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import Backend
from counters import WaitCounter
from torch import Tensor

from fastr1_kernels import gumbel_noise, reference_sampling, sample_tokens, torch_sampling

INF, NAN = float("inf"), float("nan")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "greedy": {"temperature": 0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8, "temperature": 1.4},
    "min_p": {"min_p": 0.05},
    "all_three": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def logits_of(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def streams(rows: int, device: str = "cpu", seed: int = 1) -> dict[str, Tensor]:
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(seed))
    return {"keys": keys.to(device), "positions": torch.arange(rows, device=device)}


def assert_as_reference(backend: Backend, logits: Tensor, **options: Any) -> None:
    """The token of the reference, which has the noise of the specification, and its log-probabilities in float64."""
    x, where = logits.to(backend.device), streams(len(logits), backend.device)
    on_device = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()}
    got = sample_tokens(x, **where, **on_device)
    noise = gumbel_noise(*streams(len(logits)).values(), logits.shape[1])
    token, *logps = reference_sampling.sample_tokens(logits.double(), noise.double(), **options)
    assert torch.equal(got.token_ids.cpu(), token)
    for mine, gold in zip(got[1:], logps, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.cpu().double(), gold, rtol=3e-6, atol=1e-5)


@by_options
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sample_tokens_matches_reference(backend: Backend, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_as_reference(backend, logits_of(3, 700).to(dtype), **options)


# One column; less than, one more than and a multiple of a chunk; of a block; one more than SMALL.
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (2, 1), (2, 65), (1, 512), (2, 513), (2, 4097)])
def test_sample_tokens_matches_reference_for_odd_shapes(backend: Backend, rows: int, vocabulary: int) -> None:
    assert_as_reference(backend, logits_of(rows, vocabulary))
    assert_as_reference(backend, logits_of(rows, vocabulary), top_k=50, top_p=0.7)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 3000.0])
def test_bounds_on_the_noise_miss_no_token(scale: float, rows: int) -> None:
    # From a flat softmax, where any column may win, to one where the noise decides nothing.
    assert torch_sampling.SMALL < 9_000
    for seed in range(4):
        logits, where = logits_of(rows, 9_000 + seed, scale, seed), streams(rows, seed=seed)
        noise = gumbel_noise(*where.values(), logits.shape[1])
        assert torch.equal(sample_tokens(logits, **where).token_ids, (logits + noise).argmax(1))


def test_rows_may_have_any_strides(backend: Backend) -> None:
    wide = logits_of(6, 140)
    for view in (wide[::3], wide[:2, 1:-2], wide[:2, ::2], logits_of(90, 2).T, wide[:1].expand(2, 140)):
        for options in ({}, {"top_k": 5}):
            x, where = view.to(backend.device), streams(len(view), backend.device)
            strided = torch.as_strided(wide.to(backend.device), view.shape, view.stride(), view.storage_offset())
            x = strided if view.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr() else x
            got, expected = sample_tokens(x, **where, **options), sample_tokens(x.contiguous(), **where, **options)
            assert torch.equal(got.token_ids, expected.token_ids)
            torch.testing.assert_close(got[1:], expected[1:])


# What is drawn from


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@by_options
def test_kept_columns_are_those_of_transformers_warpers(
    backend: Backend, options: dict[str, Any], temperature: float
) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    options = options | {"temperature": temperature}
    logits = logits_of(3, 400, scale=2.0, seed=5)
    scores = logits / temperature
    if options.get("top_k"):
        scores = warpers.TopKLogitsWarper(options["top_k"])(None, scores)
    if options.get("top_p"):
        scores = warpers.TopPLogitsWarper(options["top_p"])(None, scores)
    if options.get("min_p"):
        scores = warpers.MinPLogitsWarper(options["min_p"])(None, scores)
    arguments = [options.get(name, off) for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]
    assert torch.equal(reference_sampling.kept_columns(logits, temperature, *arguments), scores > -INF)
    # A column more or less would change the sum that the token's log-probability is divided by.
    got = sample_tokens(logits.to(backend.device), **streams(3, backend.device), **options)
    token = got.token_ids.cpu()[:, None]
    torch.testing.assert_close(got.logps.cpu(), scores.log_softmax(1).gather(1, token)[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        got.full_logps.cpu(), (logits / temperature).log_softmax(1).gather(1, token)[:, 0], rtol=0, atol=3e-6
    )


def test_equal_logits_are_kept_together(backend: Backend) -> None:
    row = torch.tensor([1.0, 2.0, 0.0, 2.0, 1.0, 3.0, 1.0, -1.0], device=backend.device)
    p = row.softmax(0)
    nucleus = p[row >= 2].sum()
    kept = {2: {"top_k": 2}, 1: {"top_k": 4}, 0: {"top_p": float(nucleus + p[0] / 2)}, -1: {"min_p": math.exp(-2.01)}}
    least = {2: 2.0, 1: 1.0, 0: 1.0, -1: 1.0}
    for case, options in kept.items():
        got = sample_tokens(row.expand(3, 8), **streams(3, backend.device), **options)
        left = row.masked_fill(row < least[case], -INF)
        torch.testing.assert_close(got.logps, left.log_softmax(0)[got.token_ids])


def chi_square(counts: Tensor, p: Tensor) -> float:
    """In standard deviations above its mean."""
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0
    assert expected[p > 0].min() > 5
    degrees = int((p > 0).sum()) - 1
    statistic = ((counts - expected) ** 2 / expected)[p > 0].sum().item()
    return (statistic - degrees) / math.sqrt(2 * max(degrees, 1))


def counts_of(logits: Tensor, num_draws: int, **options: Any) -> Tensor:
    device = logits.device
    number = torch.arange(num_draws, device=device)
    keys, positions = 100 * (number // 50), number % 50
    drawn = sample_tokens(logits.expand(num_draws, -1), keys, positions, **options)
    return torch.bincount(drawn.token_ids, minlength=len(logits)).float().cpu()


@pytest.mark.parametrize("small", [False, True], ids=["by_bounds", "dense"])
@by_options
def test_draws_follow_the_softmax_of_the_kept_columns(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], small: bool
) -> None:
    """Keys and positions count up, as a generator of poor streams would give them."""
    if options.get("temperature") == 0:
        return
    monkeypatch.setattr(torch_sampling, "SMALL", 10**9 if small else 0)
    logits = logits_of(1, 14, scale=0.7, seed=3)[0]
    options = options | {"min_p": options.get("min_p", 0) * 6, "top_k": min(options.get("top_k", 0), 9)}
    truncation = {k: v for k, v in options.items() if k != "temperature"}
    kept = reference_sampling.kept_columns(logits[None], options.get("temperature", 1.0), **truncation)[0]
    p = (logits / options.get("temperature", 1.0)).masked_fill(~kept, -INF).softmax(0)
    assert abs(chi_square(counts_of(logits, 20_000, **options), p)) < 4.5


def test_draws_of_the_kernel_follow_the_softmax(kernels: Backend) -> None:
    logits = torch.tensor([0.0, 1.0, -0.3, 0.4], device=kernels.device)
    allowed = torch.tensor([True, True, True, False], device=kernels.device)
    p = logits.cpu().masked_fill(~allowed.cpu(), -INF).div(0.8).softmax(0)
    assert abs(chi_square(counts_of(logits, 400, temperature=0.8, allowed=allowed), p)) < 4


# Columns that are not allowed


@by_options
def test_not_allowed_columns_are_never_drawn_but_scored(backend: Backend, options: dict[str, Any]) -> None:
    logits = logits_of(4, 200)
    logits[:, 13] = 40.0  # not allowed, and would win every draw
    allowed = torch.rand(200, generator=torch.Generator().manual_seed(2)) < 0.8
    allowed[13] = False
    assert_as_reference(backend, logits, allowed=allowed, **options)
    got = sample_tokens(
        logits.to(backend.device), **streams(4, backend.device), allowed=allowed.to(backend.device), **options
    )
    assert allowed[got.token_ids.cpu()].all()
    assert (got.full_logps < got.logps - 15).all()


@by_options
def test_one_allowed_column_is_certain(backend: Backend, options: dict[str, Any]) -> None:
    logits, allowed = logits_of(3, 90).to(backend.device), torch.arange(90, device=backend.device) == 57
    got = sample_tokens(logits, **streams(3, backend.device), allowed=allowed, **options)
    assert got.token_ids.tolist() == [57] * 3
    assert got.logps.tolist() == [0.0] * 3


# Greedy


def test_greedy_takes_the_lowest_of_equal_logits_and_scores_at_temperature_one(backend: Backend) -> None:
    logits = torch.zeros(2, 600)
    logits[0, [590, 31, 300]], logits[1, 5] = 2.0, 1.0
    got = sample_tokens(logits.to(backend.device), **streams(2, backend.device), temperature=0, top_k=1)
    assert got.token_ids.tolist() == [31, 5]
    expected = logits.log_softmax(1)[[0, 1], [31, 5]]
    torch.testing.assert_close(got.logps.cpu(), expected)
    torch.testing.assert_close(got.full_logps.cpu(), expected)


# What a draw depends on


@by_options
def test_draws_do_not_depend_on_the_other_rows(backend: Backend, options: dict[str, Any]) -> None:
    logits, where = logits_of(6, 130).to(backend.device), streams(6, backend.device)
    together = sample_tokens(logits, **where, **options)
    for pick in ([3], [5, 0], [4, 3, 2, 1]):
        some = sample_tokens(logits[pick], where["keys"][pick], where["positions"][pick], **options)
        assert torch.equal(some.token_ids, together.token_ids[pick])
        torch.testing.assert_close(some[1:], tuple(x[pick] for x in together[1:]))


def test_draws_do_not_depend_on_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, where = logits_of(9, 5_000, 1.0), streams(9)
    expected = sample_tokens(logits, **where, top_p=0.9)
    for elements in (1, 12_000, 10**7):
        monkeypatch.setattr(torch_sampling, "BLOCK_ELEMENTS", elements)
        assert torch.equal(sample_tokens(logits, **where, top_p=0.9).token_ids, expected.token_ids)


@pytest.mark.parametrize("options", [{}, {"top_k": 30, "min_p": 0.01}])
def test_split_rows_give_the_same_token(
    kernels: Backend, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    from fastr1_kernels.gpu import sampling

    logits, where = logits_of(2, 3_000).to(kernels.device), streams(2, kernels.device)
    logits[0, 1500:] = -INF  # a part without a distribution
    logits[1, :2900] = -INF
    allowed = torch.arange(3_000, device=kernels.device) % 7 != 0
    drawn = []
    for splits in (1, 2, 6):
        config = {"BLOCK": 512, "num_warps": 1, "WIDTH": 1, "splits": splits, "part": -(-6 // splits) * 512}
        monkeypatch.setattr(sampling, "launch_config", lambda *_, config=config: config)
        drawn.append(sample_tokens(logits, **where, allowed=allowed, **options))
    assert all(torch.equal(x.token_ids, drawn[0].token_ids) for x in drawn)
    for other in drawn[1:]:
        torch.testing.assert_close(other[1:], drawn[0][1:])


def test_position_is_added_to_the_key(backend: Backend) -> None:
    logits = torch.zeros(1, 300, device=backend.device)
    token = {}
    for key, position in ((40, 2), (2, 40), (42, 0), (42, 1)):
        where = (torch.tensor([x], device=backend.device) for x in (key, position))
        token[key, position] = sample_tokens(logits, *where).token_ids.item()
    assert token[40, 2] == token[2, 40] == token[42, 0] != token[42, 1]


def test_inputs_are_unchanged(backend: Backend) -> None:
    logits, where = logits_of(2, 100).to(backend.device), streams(2, backend.device)
    allowed = torch.arange(100, device=backend.device) > 4
    copies = [x.clone() for x in (logits, *where.values(), allowed)]
    sample_tokens(logits, **where, temperature=0.5, top_k=9, top_p=0.9, min_p=0.1, allowed=allowed)
    assert all(torch.equal(a, b) for a, b in zip((logits, *where.values(), allowed), copies, strict=True))


# Rows without a distribution


def bad_rows() -> Tensor:
    rows = logits_of(5, 70)
    rows[0, 9], rows[1, 9], rows[2], rows[3, 2] = NAN, INF, -INF, NAN  # column 2 is not allowed
    return rows


@by_options
def test_row_without_distribution_has_nan_logps_and_an_allowed_token(backend: Backend, options: dict[str, Any]) -> None:
    rows, where = bad_rows().to(backend.device), streams(5, backend.device)
    allowed = torch.arange(70, device=backend.device) >= 4
    got = sample_tokens(rows, **where, allowed=allowed, check_values=False, **options)
    assert got.logps.isnan().tolist() == got.full_logps.isnan().tolist() == [True] * 4 + [False]
    assert (got.token_ids >= 4).all()
    assert (got.token_ids < 70).all()
    none = sample_tokens(rows, **where, allowed=allowed & False, check_values=False, **options)
    assert none.token_ids.tolist() == [0] * 5
    assert none.logps.isnan().all()


MESSAGES = ["logit 9 of row 0 is nan", "logit 9 of row 0 is inf", "row 0 of the logits is -inf in all 66 allowed"]


@pytest.mark.parametrize(("row", "message"), enumerate([*MESSAGES, "logit 2 of row 0 is nan"]))
def test_row_without_distribution_is_an_error(backend: Backend, row: int, message: str) -> None:
    rows, allowed = bad_rows().to(backend.device), torch.arange(70, device=backend.device) >= 4
    with pytest.raises(ValueError, match=message):
        sample_tokens(rows[row : row + 1], **streams(1, backend.device), allowed=allowed)


def test_logits_of_minus_infinity_are_never_drawn(backend: Backend) -> None:
    logits = torch.full((8, 300), -INF)
    logits[:, [7, 250]] = 0.0
    got = sample_tokens(logits.to(backend.device), **streams(8, backend.device))
    assert set(got.token_ids.tolist()) == {7, 250}
    torch.testing.assert_close(got.logps.cpu(), torch.full((8,), math.log(0.5)))


ROW = logits_of(2, 9)
REFUSED = {
    "logits is torch.int64": {"logits": ROW.long()},
    r"logits has shape \(2, 9, 1\)": {"logits": ROW[..., None]},
    r"logits has shape \(2, 0\)": {"logits": ROW[:, :0]},
    r"keys has shape \(3,\)": {"keys": torch.zeros(3, dtype=torch.int64)},
    "positions has dtype torch.int32": {"positions": torch.zeros(2, dtype=torch.int32)},
    "temperature=-1": {"temperature": -1},
    "top_k=-1: give an integer >= 0": {"top_k": -1},
    "top_p=0": {"top_p": 0},
    "top_p=1.5": {"top_p": 1.5},
    "min_p=-0.1": {"min_p": -0.1},
    "min_p=2": {"min_p": 2},
    "allowed has dtype torch.int64": {"allowed": torch.ones(9, dtype=torch.int64)},
    r"allowed has shape \(8,\)": {"allowed": torch.ones(8, dtype=torch.bool)},
}


@pytest.mark.parametrize(("message", "wrong"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_arguments_are_refused(message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(**({"logits": ROW, **streams(2)} | wrong))


# Waits


@by_options
def test_kernels_do_not_wait(kernels: Backend, options: dict[str, Any]) -> None:
    logits, where = logits_of(2, 64).to(kernels.device), streams(2, kernels.device)
    allowed = torch.arange(64, device=kernels.device) > 3
    with WaitCounter() as counter:
        sample_tokens(logits, **where, allowed=allowed, check_values=False, **options)
    assert counter.seen == []


@by_options
def test_reference_does_not_wait(options: dict[str, Any]) -> None:
    # float64 logits on a GPU take it.
    logits, allowed = logits_of(2, 64).double(), torch.arange(64) > 3
    with WaitCounter() as counter:
        noise = gumbel_noise(*streams(2).values(), 64)
        reference_sampling.sample_tokens(logits, noise, allowed=allowed, **options)
    assert counter.seen == []
