"""The engine against a plain PyTorch training loop, for every ZeRO stage, in one and in two processes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op
from distributed_toys import (
    NUM_UPDATES,
    OPTIM,
    ToyModel,
    cosine_factor,
    full_parameters,
    make_batches,
    make_engine,
    run_on_two_ranks,
    token_loss,
    train,
    train_plain,
)

from fastr1.config import ConfigError, OptimConfig
from fastr1.training.distributed import (
    DistributedError,
    DistributedModel,
    NonFiniteGradientError,
    build_deepspeed_config,
)
from fastr1.training.launched import launched_world_size

STAGES = (0, 1, 2, 3)
FROZEN = ("vision_tower.weight", "vision_tower.bias")


Parameters = dict[str, torch.Tensor]


def assert_same_parameters(actual: Parameters, expected: Parameters, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name].float(), expected[name], rtol=0, atol=tolerance, msg=name)


def train_with_engine(
    stage: int, splits: Any, *, optim: OptimConfig = OPTIM, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[Parameters, list[float]]:
    engine = make_engine(stage, optim=optim, dtype=dtype)
    norms = train(engine, splits, **kwargs)
    parameters = full_parameters(engine)
    engine.close()
    return parameters, norms


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "splits",
    [((4,),) * 3, ((2, 2),) * 3, ((1, 1, 1, 1),) * 3, ((3, 1), (4,), (1, 1, 2))],
    ids=["1x4", "2x2", "4x1", "varying"],
)
def test_engine_matches_plain_loop_however_the_batch_is_split(stage: int, splits: Any) -> None:
    expected, expected_norms = train_plain(OPTIM, ((4,),) * 3)
    parameters, norms = train_with_engine(stage, splits)
    assert min(norms) > 2 * OPTIM.max_grad_norm  # clipping was active
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_same_parameters(parameters, expected, 1e-6)
    for name in FROZEN:
        assert torch.equal(parameters[name], ToyModel().get_parameter(name))


@pytest.mark.parametrize("stage", STAGES)
def test_engine_trains_with_a_module_unused_in_some_micro_batches(stage: int) -> None:
    splits = ((3, 1), (1, 3), (2, 1, 1))
    expected, expected_norms = train_plain(OPTIM, splits, last_without_frames=True)
    parameters, norms = train_with_engine(stage, splits, last_without_frames=True)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_same_parameters(parameters, expected, 1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e6], ids=["off", "inactive"])
def test_norm_is_reported_without_clipping(stage: int, max_grad_norm: float) -> None:
    optim = dataclasses.replace(OPTIM, max_grad_norm=max_grad_norm)
    expected, expected_norms = train_plain(optim, ((4,),) * 2)
    parameters, norms = train_with_engine(stage, ((2, 2),) * 2, optim=optim)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert_same_parameters(parameters, expected, 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_follows_the_float32_run_with_float32_accumulation(stage: int) -> None:
    expected, expected_norms = train_plain(OPTIM, ((4,),) * 3)
    parameters, norms = train_with_engine(stage, ((1, 1, 1, 1),) * 3, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.bfloat16}
    assert norms == pytest.approx(expected_norms, rel=2e-2)
    # One bfloat16 rounding step of the largest parameter, 1.3, plus its effect on three updates.
    assert_same_parameters(parameters, expected, 1e-2)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_gradients_are_summed_in_float32(stage: int) -> None:
    # Each small gradient is at most half a bfloat16 rounding step of the large one; together they are 12.5 % of it.
    ids, labels, frames = make_batches(0, (4,))[0]
    engine = make_engine(stage, dtype=torch.bfloat16)
    engine.backward(token_loss(engine(ids, frames), labels))
    alone = engine.step()  # the first learning rate is 0, so the next gradients are taken at the same parameters
    for weight in [1.0] + [2**-9] * 64:
        engine.backward(token_loss(engine(ids, frames), labels) * weight)
    together = engine.step()
    engine.close()
    assert together / alone == pytest.approx(1.125, rel=1e-3)


def test_bfloat16_keeps_updates_smaller_than_one_rounding_step() -> None:
    # Neighbouring bfloat16 numbers in [0.25, 0.5) are 2e-3 apart: each update of 1e-4 alone would round to nothing.
    optim = OptimConfig(learning_rate=1e-4, lr_scheduler_type="constant", warmup_ratio=0.0, max_grad_norm=0.0)
    engine = make_engine(1, optim=optim, dtype=torch.bfloat16)
    before = full_parameters(engine)["embed_tokens.weight"].float()
    ids, labels, frames = make_batches(0, (4,))[0]
    for _ in range(15):
        engine.backward(token_loss(engine(ids, frames), labels))
        engine.step()
    after = full_parameters(engine)["embed_tokens.weight"].float()
    engine.close()
    coarse = (before.abs() >= 0.25) & (before.abs() < 0.5)
    num_moved = int((after != before)[coarse].sum())
    assert num_moved > int(coarse.sum()) // 2


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, torch.float32), (1, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)],
)
def test_parameters_stay_at_their_address(stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    engine = make_engine(stage, dtype=dtype)
    addresses = {name: parameter.data_ptr() for name, parameter in engine.module.named_parameters()}
    train(engine, ((2, 2), (4,)))
    engine.save(tmp_path, "here")
    engine.load(tmp_path, "here")
    assert {name: parameter.data_ptr() for name, parameter in engine.module.named_parameters()} == addresses
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_gathered_parameters_serve_rollouts_between_updates(stage: int) -> None:
    expected, _ = train_plain(OPTIM, ((4,),) * 2)
    ids, _, frames = make_batches(0, (4,))[0]
    oracle = ToyModel()
    engine = make_engine(stage)
    num_hooks = len(engine.module.block._forward_pre_hooks)
    for update in range(2):
        with engine.gathered_parameters() as module, torch.no_grad():
            first = module(ids, frames)
            with engine.gathered_parameters() as again:
                second = again(ids, frames)
            third = module(ids, frames)
            assert module.block.weight.shape == (8, 8)
        assert len(engine.module.block._forward_pre_hooks) == num_hooks
        if update == 0:
            assert torch.equal(first, oracle(ids, frames))
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        for batch_ids, labels, batch_frames in make_batches(update, (2, 2)):
            engine.backward(token_loss(engine(batch_ids, batch_frames), labels))
        engine.step()
    if stage == 3:
        assert engine.module.block.weight.numel() == 0  # partitioned again
    assert_same_parameters(full_parameters(engine), expected, 1e-6)
    engine.close()


@pytest.mark.parametrize("stage", STAGES)
def test_consolidated_state_dict_loads_into_a_fresh_model(stage: int) -> None:
    engine = make_engine(stage)
    train(engine, ((4,),) * 2)
    parameters = full_parameters(engine)
    state = engine.consolidated_state_dict()
    with engine.gathered_parameters():
        inside = engine.consolidated_state_dict()
    engine.close()
    assert state is not None
    assert inside is not None
    assert state["lm_head.weight"] is state["embed_tokens.weight"]
    fresh = ToyModel()
    fresh.load_state_dict(state, strict=True)
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, parameters[name])
        assert torch.equal(inside[name], parameters[name])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_learning_rate_follows_the_schedule(name: str) -> None:
    optim = dataclasses.replace(OPTIM, lr_scheduler_type=name)
    engine = make_engine(1, optim=optim)
    rates = []
    for _ in range(NUM_UPDATES):
        rates.append(engine.learning_rate / optim.learning_rate)
        train(engine, ((4,),))
    engine.close()
    decay = {
        "cosine": [cosine_factor(update, 2, 6) for update in range(2, 6)],
        "linear": [1.0, 0.75, 0.5, 0.25],
        "constant": [1.0] * 4,
    }[name]
    assert rates == pytest.approx([0.0, 0.5, *decay])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_is_an_error_and_changes_nothing(stage: int, value: float) -> None:
    engine = make_engine(stage)
    ids, labels, frames = make_batches(0, (4,))[0]
    train(engine, ((4,),) * 2)  # past the first update, whose learning rate is 0
    before = full_parameters(engine)
    engine.backward(token_loss(engine(ids, frames), labels) * value)
    with pytest.raises(NonFiniteGradientError, match="not applied"):
        engine.step()
    after = full_parameters(engine)
    engine.close()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_step_without_backward_is_an_error() -> None:
    engine = make_engine(1)
    with pytest.raises(DistributedError, match="0 micro-steps"):
        engine.step()
    train(engine, ((4,),))
    with pytest.raises(DistributedError, match="0 micro-steps"):
        engine.step()
    engine.close()


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        ({"gradient_clipping": 1.0}, torch.float32, "optim.max_grad_norm"),
        ({"optimizer": {"type": "AdamW"}}, torch.float32, "optim.learning_rate"),
        ({"bf16": {"enabled": True}}, torch.bfloat16, "model.dtype"),
        ({"zero_optimization": {"stage": 4}}, torch.float32, "stage is 4"),
        ({"zero_optimization": {"stage": 0}}, torch.bfloat16, "choose stage 1"),
        ({"zero_optimization": {"compute_grad_norm": False}}, torch.float32, "compute_grad_norm"),
        ({}, torch.float16, "torch.float16"),
    ],
)
def test_impossible_configurations_are_refused(config: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    with pytest.raises((ConfigError, DistributedError), match=message):
        build_deepspeed_config(config, OPTIM, dtype)


def test_auto_entries_are_dropped_and_other_entries_kept() -> None:
    user = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
        "communication_data_type": "bf16",
    }
    config = build_deepspeed_config(user, OPTIM, torch.bfloat16)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["bf16"] == {"enabled": True}
    assert config["communication_data_type"] == "bf16"
    assert config["gradient_clipping"] == OPTIM.max_grad_norm


def test_default_is_zero_stage_1() -> None:
    assert build_deepspeed_config({}, OPTIM, torch.bfloat16)["zero_optimization"] == {"stage": 1}


def test_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(DistributedError, match=r"model\.freeze"):
        DistributedModel(ToyModel().requires_grad_(False), OPTIM, {}, dtype=torch.float32, num_steps=1)


TWO_RANK_SPLITS = ((2, 2), (1, 1, 1, 1), (3, 1))
UNEVEN_SPLITS = ((1, 1, 2), (2, 1, 1), (3, 1))  # the second rank takes fewer micro-steps


def _train_every_stage(rank: int, folder: Path) -> None:
    results: dict[str, Any] = {}
    for stage in STAGES:
        engine = make_engine(stage)
        norms = train(engine, TWO_RANK_SPLITS)
        state = engine.consolidated_state_dict()
        assert (state is None) == (rank == 1)
        results[f"float32-{stage}"] = (full_parameters(engine), norms)
        if stage == 1:
            counts = torch.tensor([1.0, 10.0 * rank])
            results["sum"] = engine.sum_across_ranks(counts)
            results["sum_argument_unchanged"] = torch.equal(counts, torch.tensor([1.0, 10.0 * rank]))
            results["gathered"] = engine.gather_objects({"rank": rank})
        engine.close()
        if stage < 2:
            engine = make_engine(stage)
            norms = train(engine, UNEVEN_SPLITS)
            results[f"uneven-{stage}"] = (full_parameters(engine), norms)
            engine.close()
    for stage in (1, 2, 3):
        engine = make_engine(stage, dtype=torch.bfloat16)
        norms = train(engine, TWO_RANK_SPLITS)
        results[f"bfloat16-{stage}"] = (full_parameters(engine), norms)
        engine.close()
    torch.save(results, folder / f"results-{rank}.pt")


@pytest.fixture(scope="module")
def two_rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_on_two_ranks(_train_every_stage, folder)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    "run",
    [*(f"float32-{s}" for s in STAGES), *(f"uneven-{s}" for s in (0, 1)), *(f"bfloat16-{s}" for s in (1, 2, 3))],
)
def test_two_processes_match_the_plain_loop(two_rank_results: list[dict[str, Any]], run: str) -> None:
    expected, expected_norms = train_plain(OPTIM, ((4,),) * 3)
    exact = not run.startswith("bfloat16")
    for results in two_rank_results:
        parameters, norms = results[run]
        assert norms == pytest.approx(expected_norms, rel=1e-5 if exact else 2e-2)
        assert_same_parameters(parameters, expected, 1e-6 if exact else 1e-2)


def test_collectives_across_two_processes(two_rank_results: list[dict[str, Any]]) -> None:
    for results in two_rank_results:
        assert results["sum"].tolist() == [2.0, 10.0]
        assert results["sum_argument_unchanged"]
        assert results["gathered"] == [{"rank": 0}, {"rank": 1}]


LAUNCHED = """
import json, sys
sys.path[:0] = [{root!r}, {toys!r}]
from distributed_toys import make_engine, train
engine = make_engine(2)
norms = train(engine, ((2, 2), (2, 2)))
if engine.rank == 0:
    json.dump([engine.world_size, norms], open({output!r}, "w"))
engine.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["python", "deepspeed", "deepspeed --num_gpus 2"])
def test_commands_that_start_a_run(tmp_path: Path, command: str) -> None:
    toys = Path(__file__).resolve().parents[1] / "toys"
    output = tmp_path / "norms.json"
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(root=str(toys.parents[1]), toys=str(toys), output=str(output)))
    binary, *options = command.split()
    if binary == "deepspeed":
        options += ["--master_port", "29617"]
    subprocess.run([str(Path(sys.executable).parent / binary), *options, str(script)], check=True, timeout=300)
    world_size, norms = json.loads(output.read_text())
    assert world_size == (2 if "2" in command else 1)
    assert norms == pytest.approx(train_plain(OPTIM, ((4,),) * 2)[1], rel=1e-5)


@pytest.mark.parametrize(
    ("variables", "size"),
    [({}, 1), ({"WORLD_SIZE": "2"}, 1), ({"WORLD_SIZE": ""}, 1), ({"RANK": "0", "WORLD_SIZE": "2"}, 2)],
)
def test_world_size_needs_both_variables_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], size: int
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_world_size() == size


def test_deepspeed_tries_no_compiler_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It turns standard error off meanwhile, and what this program says then is lost."""
    if get_accelerator().device_name() != "cpu":
        pytest.skip("on a GPU it looks for no such operation")
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("compilers were tried"))
    make_engine(0).close()
    assert build_shm_op() is None
