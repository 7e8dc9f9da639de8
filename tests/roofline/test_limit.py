"""Times of a step against its limit, and the probe of the machine."""

from __future__ import annotations

import time

import pytest
import torch

from fastr1.models import DecoderLayout
from fastr1.reporting.timing import PhaseTimer
from fastr1.roofline import GroupWork, Machine, ModelShape, StepLimit, StepWork, VisualFlops, machine, probe_machine

TOY = ModelShape(
    layout=DecoderLayout(2, 16, 32, 4, 2, 4, 50, True),
    dtype_bytes=4,
    num_trainable=4000,
    trains_decoder=True,
    num_visual=100,
    visual=lambda shape: VisualFlops(1000.0 * shape[0], 500.0),
)
MACHINE = Machine("toy", 1e6, 1e6)
WORK = StepWork([GroupWork(8, (3, 5), (2, 3, 4, 4)), GroupWork(8, (2, 2), (2, 3, 4, 4), trained_lengths=())], True)


def timed(**seconds: float) -> dict[str, float]:
    return {f"time/{name}_seconds": taken for name, taken in seconds.items()}


def test_a_step_at_its_limit_is_one_everywhere() -> None:
    limit = StepLimit(TOY, MACHINE)
    floor = limit.floor_seconds(WORK)
    assert floor.pop("old_policy") == 0
    assert all(taken > 0 for taken in floor.values())
    rollout = floor.pop("prefill") + floor.pop("decode")
    total = sum(floor.values()) + rollout
    seconds = timed(**floor, rollout=rollout, evaluation=100.0, checkpoint=100.0, step=total + 200)
    metrics = limit.metrics(WORK, seconds)
    shares = {name: value for name, value in metrics.items() if name.startswith("roofline/")}
    assert set(shares) == {f"roofline/{name}" for name in ("rollout", "step", *floor)}
    assert list(shares.values()) == pytest.approx([1.0] * len(shares))


def test_twice_the_time_halves_every_share() -> None:
    limit = StepLimit(TOY, MACHINE)
    fast, slow = (limit.metrics(WORK, timed(vision=s, rollout=s, train=s, reward=s)) for s in (1.0, 2.0))
    assert fast.keys() == slow.keys()
    assert [slow[name] for name in fast] == pytest.approx([value / 2 for value in fast.values()])
    assert fast["train_tokens_per_second"] == 8 + 8
    unshared = StepLimit(TOY, MACHINE).metrics(StepWork(WORK.groups, True, shares_prefix=False), timed(train=1.0))
    assert unshared["train_tokens_per_second"] == 2 * 8 + 8


def test_utilisation_counts_products_once() -> None:
    limit = StepLimit(TOY, MACHINE)
    body, head, pairs = 2 * (16 * 12 * 4 + 3 * 16 * 32), 50 * 16, 8**2 / 2 + 2 * 8 + 2 + 4 * 8 + 8
    assert (TOY.num_body, TOY.num_head) == (body, head)
    forward = 2 * body * (8 + 2 + 4) + 2 * head * 8 + 4 * 2 * 16 * pairs
    train = 3 * forward + 500
    for is_checkpointed in (False, True):
        work = StepWork(WORK.groups, True, is_checkpointed=is_checkpointed)
        assert limit.metrics(work, timed(train=2.0))["mfu/train"] == pytest.approx(train / 2e6)
    prefill = 2 * (2 * body * 8 + 4 * 2 * 16 * 32 + 2 * head)
    decode = 2 * (body + head) * (2 + 4 + 1 + 1) + 4 * 2 * 16 * ((8 * 2 + 3) + (8 * 4 + 10) + (8 + 1) * 2)
    step = limit.metrics(WORK, timed(train=1.0, reward=1.0))["mfu/step"]
    assert step == pytest.approx((2 * 2000 + prefill + decode + forward + train) / 2e6)


def test_phases_that_were_not_timed_are_not_reported() -> None:
    metrics = StepLimit(TOY, MACHINE).metrics(StepWork(WORK.groups, False), timed(reference=1.0, train=1.0))
    assert "roofline/reference" not in metrics  # nothing to do in it
    assert set(metrics) == {
        "roofline/train",
        "roofline/step",
        "mfu/step",
        "mfu/train",
        "train_tokens_per_second",
    }
    assert StepLimit(TOY, MACHINE).metrics(WORK, {}) == {}


def test_the_clock_of_the_trainer_is_read() -> None:
    timer = PhaseTimer("cpu")
    with timer.phase("train"):
        time.sleep(0.01)
    metrics = StepLimit(TOY, MACHINE).metrics(WORK, timer.pop_seconds())
    assert 0 < metrics["roofline/train"] < StepLimit(TOY, MACHINE).floor_seconds(WORK)["train"] / 0.01


def test_probe_takes_two_seconds_and_is_made_once() -> None:
    machine._probe.cache_clear()
    start = time.process_time()
    found = probe_machine("cpu", torch.float32)
    taken = time.process_time() - start
    assert taken < 6 * torch.get_num_threads()  # of a busy machine, in time of its own
    assert probe_machine(torch.device("cpu"), torch.float32) is found
    assert found.name == f"CPU with {torch.get_num_threads()} threads"
    assert 1e8 < found.gemm_flops_per_second < 1e14
    assert 1e7 < found.bytes_per_second < 1e13


def test_rates_of_the_probe_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock in which every product takes 2 s per 512³ of it, and every copy 4 s."""
    now = 0.0

    def mm(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal now
        now += 2.0 * (left.shape[0] / 512) ** 3

    monkeypatch.setattr(machine, "_now", lambda device: now)
    monkeypatch.setattr(torch, "mm", mm)
    assert machine._gemm_rate(torch.device("cpu"), torch.float32) == 512**3

    def tick() -> None:
        nonlocal now
        now += 4.0

    assert machine._best_seconds(tick, torch.device("cpu")) == 4.0
    monkeypatch.setattr(machine, "_best_seconds", lambda call, device: 4.0)
    assert machine._copy_rate(torch.device("cpu")) == 2 * (128 << 20) / 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_probe_of_a_gpu() -> None:
    found = probe_machine("cuda", torch.bfloat16)
    assert found.name == torch.cuda.get_device_name()
    assert found.gemm_flops_per_second > 2e13
    assert found.bytes_per_second > 1e11
