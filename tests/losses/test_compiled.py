"""`torch.compile(fullgraph=True)` takes all five functions, and torch's own checks take their operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ON_GPU, TORCH, Backend
from counters import WaitCounter
from kernel_accuracy import rand
from loss_cases import CASES, CU_SEQLENS, LOGITS, MASK, TOKEN_IDS, B, D, T, V, by_some, pack, parametrize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastr1_kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_logps,
    selective_log_softmax,
    torch_rows,
)

REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
SOURCE = {"rewards": REWARDS, "num_generations": 2, "mask": MASK}
HIDDEN, WEIGHT = rand(B, T, D, seed=3), rand(V, D, seed=4)
Call = Callable[..., tuple[Tensor, ...]]


def loss_call(arguments: dict[str, Any], **more: Any) -> Call:
    """Everything that a loss returns, as a function of (logits, ids) or of (hidden, weight, ids)."""

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        output = (linear_grpo_loss if len(inputs) == 3 else grpo_loss)(*inputs, **arguments, **more)
        metrics = [x for name in sorted(output.metrics) for x in output.metrics[name]]
        entropy = [] if output.entropy is None else [output.entropy]
        return output.loss, output.logps, *entropy, output.advantages, *metrics

    return call


def run(call: Call, inputs: tuple[Tensor, ...], has_grad: bool = True) -> list[Tensor]:
    """Outputs and gradients; the upstream gradient is not 1."""
    leaves = [x.clone().requires_grad_(has_grad) if x.is_floating_point() else x for x in inputs]
    outputs = call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(3 * x.sum() for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad]) if has_grad else ()  # type: ignore[arg-type]
    return [x.detach() for x in (*outputs, *gradients)]


def compiled(call: Call, **options: Any) -> Call:
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


def assert_same(backend: Backend, call: Call, *inputs: Tensor, has_grad: bool = True) -> None:
    inputs = tuple(backend.put(x) for x in inputs)
    expected = run(call, inputs, has_grad)
    got = run(compiled(call), inputs, has_grad)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, **backend.tolerances)


def placed(backend: Backend, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: backend.put(v) for k, v in (SOURCE | arguments).items()}


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@parametrize({name: CASES[name] for name in ("dapo", "entropy_bonus", "every_mask")})
def test_losses(backend: Backend, arguments: dict[str, Any], linear: bool) -> None:
    inputs = (HIDDEN, WEIGHT) if linear else (LOGITS,)
    assert_same(backend, loss_call(placed(backend, arguments), return_entropy=True), *inputs, TOKEN_IDS)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@by_some
def test_packed_losses(arguments: dict[str, Any], linear: bool) -> None:
    packed = {k: pack(v) for k, v in placed(TORCH, arguments).items()} | {"cu_seqlens": TORCH.put(CU_SEQLENS)}
    inputs = (HIDDEN, WEIGHT) if linear else (LOGITS,)
    assert_same(TORCH, loss_call(packed), *(pack(x) for x in inputs), pack(TOKEN_IDS))


HEADS: dict[str, dict[str, Any]] = {
    "everything": {"lora_a": rand(2, D), "lora_b": rand(V, 2), "bias": rand(V), "softcap": 3.0, "logit_scale": 0.7},
    "a temperature each": {"temperature": rand(B, T).abs() + 0.5},
    "a kept set": {"top_k": 5, "top_p": 0.8, "chunk_size": 7},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_heads(head: dict[str, Any]) -> None:
    head = {k: TORCH.put(v) for k, v in head.items()}
    call = loss_call(placed(TORCH, CASES["grpo"]), **head)
    assert_same(TORCH, call, HIDDEN, WEIGHT, TOKEN_IDS)
    logps = lambda h, w, i: linear_logps(h, w, i, return_entropy=True, **head)  # noqa: E731
    assert_same(TORCH, logps, HIDDEN, WEIGHT, TOKEN_IDS)


def test_float16_gradients_of_small_weights() -> None:
    # A weight of 1e-9 is 0 in float16: what is kept is the gradient over a unit.
    inputs = tuple(x.to(TORCH.device, torch.float16) for x in (HIDDEN, WEIGHT))
    call = loss_call(placed(TORCH, CASES["dapo"] | {"normalizer": 1e9}))
    scaled = lambda *x: call(*x)[0] * 1e9  # noqa: E731
    expected = run(loss_call(placed(TORCH, CASES["dapo"] | {"normalizer": 1.0})), (*inputs, TOKEN_IDS.to(TORCH.device)))
    for use in (scaled, compiled(scaled)):
        _, *gradients = run(use, (*inputs, TOKEN_IDS.to(TORCH.device)))
        for got, gold in zip(gradients, expected[-2:], strict=True):
            torch.testing.assert_close(got, gold, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_log_probabilities(backend: Backend, with_entropy: bool, has_grad: bool) -> None:
    options = {"temperature": 0.8, "return_entropy": with_entropy}
    assert_same(backend, lambda x, i: selective_log_softmax(x, i, **options), LOGITS, TOKEN_IDS, has_grad=has_grad)
    inputs = (HIDDEN, WEIGHT, TOKEN_IDS)
    assert_same(backend, lambda h, w, i: linear_logps(h, w, i, **options), *inputs, has_grad=has_grad)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_losses_without_gradient(linear: bool) -> None:
    inputs = (HIDDEN, WEIGHT) if linear else (LOGITS,)
    call = loss_call(placed(TORCH, CASES["grpo"]))
    assert_same(TORCH, call, *inputs, TOKEN_IDS, has_grad=False)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(backend: Backend, scale: str) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, float("nan"), 0.25, 0.25])
    groups = torch.tensor([3, 3, 8, 8, 3, 8], device=backend.device)
    for how in ({"num_generations": 2}, {"group_ids": groups}):
        call = lambda r, how=how: group_advantages(r, scale_rewards=scale, **how)  # noqa: E731
        assert_same(backend, call, rewards, has_grad=False)


def test_inplace_has_no_effect_inside() -> None:
    arguments = placed(TORCH, CASES["grpo"])
    logits, ids = TORCH.put(LOGITS), TORCH.put(TOKEN_IDS)
    before = logits.clone()
    call = lambda x: grpo_loss(x * 1.0, ids, inplace=True, **arguments).loss  # noqa: E731
    got = run(compiled(call), (logits,))
    assert torch.equal(logits, before)
    for a, b in zip(got, run(call, (logits,)), strict=True):
        TORCH.assert_close(a, b)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_no_graph_per_length(linear: bool) -> None:
    weight = TORCH.put(rand(V, D)).requires_grad_()

    def loss(rows: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
        if linear:
            return linear_grpo_loss(rows, weight, ids, advantages=advantages, loss_type="bnpo").loss
        return grpo_loss(rows, ids, advantages=advantages, loss_type="bnpo").loss

    call = compiled(loss, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for b, t in ((4, 9), (6, 5), (3, 12), (8, 7)):
            rows = TORCH.put(rand(b, t, D if linear else V)).requires_grad_()
            ids, advantages = torch.zeros(b, t, dtype=torch.long, device=TORCH.device), TORCH.put(rand(b))
            call(rows, ids, advantages).backward()
            (expected,) = torch.autograd.grad(loss(rows, ids, advantages), rows)
            TORCH.assert_close(rows.grad, expected)  # type: ignore[arg-type]


def test_wrong_shapes_are_refused_inside() -> None:
    call = compiled(lambda x: grpo_loss(x, x.new_zeros(B, T - 1).long(), rewards=x[:, 0, 0], num_generations=2).loss)
    with pytest.raises(Exception, match=r"token_ids has shape"):
        call(TORCH.put(LOGITS))


def test_inplace_with_dynamic_lengths() -> None:
    call = compiled(
        lambda x, i, a: grpo_loss(x * 1, i, advantages=a, loss_type="bnpo", inplace=True).loss, dynamic=True
    )
    assert call(LOGITS, TOKEN_IDS, REWARDS).isfinite()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_a_number_of_tokens_that_changes(linear: bool) -> None:
    """More calls than torch compiles again for one function."""
    torch._dynamo.reset()
    inputs = (HIDDEN, WEIGHT) if linear else (LOGITS,)
    function = linear_grpo_loss if linear else grpo_loss
    loss = lambda n: function(*inputs, TOKEN_IDS, advantages=REWARDS, loss_type="dapo", normalizer=n).loss  # noqa: E731
    call = compiled(loss)
    for n in range(3, 15):
        torch.testing.assert_close(call(n), loss(n))


def test_metrics_carry_no_graph(backend: Backend) -> None:
    call = compiled(lambda h, w, i: linear_grpo_loss(h, w, i, **placed(backend, CASES["grpo"])).metrics)
    metrics = call(backend.put(HIDDEN).clone().requires_grad_(), backend.put(WEIGHT), backend.put(TOKEN_IDS))
    assert not any(x.requires_grad for pair in metrics.values() for x in pair)


@pytest.mark.slow
def test_inductor() -> None:
    """The default TORCH, which writes code of its own for what lies between the operators."""
    arguments = placed(TORCH, CASES["gspo"])
    call = loss_call(arguments)
    inputs = (TORCH.put(LOGITS), TORCH.put(TOKEN_IDS))
    torch._dynamo.reset()
    for got, expected in zip(run(torch.compile(call, fullgraph=True), inputs), run(call, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Recorder(TorchDispatchMode):
    """The calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastr1":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_operators_pass_the_checks_of_torch(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the operators that eager code goes without
    arguments = placed(backend, CASES["temperature"] | {"ref_logps": rand(B, T), "old_logps": rand(B, T)})
    ids = backend.put(TOKEN_IDS)
    with Recorder() as recorder:
        for inputs in ((LOGITS,), (HIDDEN, WEIGHT)):
            run(loss_call(arguments), (*(backend.put(x) for x in inputs), ids))
        run(loss_call(arguments | {"importance_sampling_level": "sequence"}), (backend.put(LOGITS), ids))
        run(lambda h, w: linear_logps(h, w, ids), (backend.put(HIDDEN), backend.put(WEIGHT)))
        group_advantages(backend.put(REWARDS), 2)
    names = {func.__name__.split(".")[0] for func, _, _ in recorder.calls}
    expected = {"score_rows", "row_gradients", "linear_logps", "linear_logps_backward", "linear_grpo_loss"}
    assert names == expected | ({"grpo_rows", "scale_rows_", "group_advantages"} if backend.has_kernels else set())
    seen = set()
    for func, args, kwargs in recorder.calls:
        if func in seen:
            continue
        seen.add(func)
        own = [
            x.detach().clone().requires_grad_(x.is_floating_point() and i < 3 and not func.__name__.startswith("scale"))
            if isinstance(x, Tensor)
            else x
            for i, x in enumerate(args)
        ]
        is_backward = func.__name__.split(".")[0] in ("row_gradients", "linear_logps_backward", "group_advantages")
        own = [x.detach() if isinstance(x, Tensor) and is_backward else x for x in own]
        # Backward scales an output in place, which is right as long as nobody sees it: that check returns it.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        checks += () if func.__name__.startswith("grpo_rows") else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(func, tuple(own), kwargs, test_utils=checks)


def test_torch_rows_do_not_wait_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rows, "may_read", lambda rows: False)
    mask, ids = MASK.flatten().view(torch.uint8), TOKEN_IDS.flatten().masked_fill(~MASK.flatten(), -100)
    dirty = LOGITS.masked_fill(~MASK[..., None], float("nan"))
    out = torch.empty_like(dirty)
    with WaitCounter() as counter:
        logps, entropy, state = torch_rows.score(dirty, ids, mask, 0.7, True)
        d_logps = logps.cos().masked_fill(~MASK.flatten(), float("nan"))
        torch_rows.gradient(dirty, ids, mask, d_logps, logps.sin(), entropy, state, 0.7, out)
    assert counter.seen == []
    monkeypatch.undo()
    again = torch.empty_like(out)
    expected = torch_rows.score(dirty, ids, mask, 0.7, True)
    torch_rows.gradient(dirty, ids, mask, d_logps, logps.sin(), entropy, state, 0.7, again)
    torch.testing.assert_close((logps, entropy), expected[:2], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(out, again, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "name", ["grpo_loss", "linear_grpo_loss", "selective_log_softmax", "linear_logps", "advantages"]
)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_a_cuda_graph_captures(name: str, device: str) -> None:
    """Forward and backward are captured once and replayed on other numbers."""
    put = lambda x: x.to(device, torch.float32) if x.is_floating_point() else x.to(device)  # noqa: E731
    static = {"logits": put(LOGITS), "hidden": put(HIDDEN), "weight": put(WEIGHT), "rewards": put(REWARDS)}
    ids, mask, given = put(TOKEN_IDS), put(MASK), {k: put(v) for k, v in (("old_logps", rand(B, T)),)}
    loss = {"mask": mask, "num_generations": 2, "loss_type": "bnpo", "check_values": False, **given}
    calls: dict[str, Callable[[], Tensor]] = {
        "grpo_loss": lambda: grpo_loss(static["logits"], ids, rewards=static["rewards"], **loss).loss,
        "linear_grpo_loss": lambda: (
            linear_grpo_loss(static["hidden"], static["weight"], ids, rewards=static["rewards"], **loss).loss
        ),
        "selective_log_softmax": lambda: selective_log_softmax(static["logits"], ids, check_values=False).sum(),
        "linear_logps": lambda: linear_logps(static["hidden"], static["weight"], ids, check_values=False).sum(),
        "advantages": lambda: group_advantages(static["rewards"], 2, check_values=False).square().sum(),
    }
    wanted = {"grpo_loss": ("logits",), "selective_log_softmax": ("logits",), "advantages": ()}.get(
        name, ("hidden", "weight")
    )
    for key in wanted:
        static[key].requires_grad_()

    def step() -> list[Tensor]:
        value = calls[name]()
        return [value, *(torch.autograd.grad(value, [static[key] for key in wanted]) if wanted else ())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in static.values():
            x.mul_(0.5)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
