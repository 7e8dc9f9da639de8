"""The engine samples from the parameters that DeepSpeed owns, as they are when a rollout begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoder_toys import VOCABULARY, TextModel, all_kept, build_text_model, no_videos, params_of, prompts_of
from second_family import SecondProcessor
from torch import nn

from fastr1.config import OptimConfig
from fastr1.models.decoder_stack import UnknownDecoderError
from fastr1.rollout import RolloutEngine
from fastr1.rollout.eager import sample_eagerly
from fastr1.schema import Rollout
from fastr1.training.distributed import DistributedModel

PROCESSOR, PARAMS = SecondProcessor(), params_of(8)
PROMPTS, VIDEOS = prompts_of([6, 11, 3]), no_videos(3)
OPTIM = OptimConfig(learning_rate=2e-2, lr_scheduler_type="constant", warmup_ratio=0.0)
OPTIONS: dict[str, Any] = {"num_generations": 2, "seed": 3}


@contextmanager
def owned(model: TextModel, stage: int, dtype: torch.dtype = torch.float32) -> Iterator[DistributedModel]:
    """The model in the hands of DeepSpeed, every parameter of it partitioned at stage 3."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    distributed = DistributedModel(model, OPTIM, {"zero_optimization": zero}, dtype=dtype, num_steps=4)
    try:
        yield distributed
    finally:
        distributed.close()


def train_once(distributed: DistributedModel) -> None:
    """One step towards random completions."""
    ids = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(8))

    def loss(model: TextModel) -> torch.Tensor:
        logits = model.padded_logits(PROMPTS, VIDEOS, ids, torch.ones_like(ids, dtype=torch.bool))
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    distributed.backward(distributed(loss))
    distributed.step()


def sample(engine: RolloutEngine) -> Rollout:
    return engine.sample(PROMPTS, VIDEOS, **OPTIONS)


def sample_anew(model: TextModel) -> Rollout:
    return sample(RolloutEngine(model, PROCESSOR, PARAMS))


def sample_by_eager(model: TextModel) -> Rollout:
    return sample_eagerly(model, PROCESSOR, PROMPTS, VIDEOS, PARAMS, **OPTIONS)


def assert_same(got: Rollout, want: Rollout, tolerance: float = 1e-4) -> None:
    assert all_kept(got) == all_kept(want)
    torch.testing.assert_close(got.sampler_logps, want.sampler_logps, rtol=0, atol=tolerance)


def addresses(engine: RolloutEngine) -> list[int]:
    return [parameter.data_ptr() for parameter in engine.stack.parameters()]


ZERO = [(0, torch.float32), (1, torch.float32), (2, torch.float32), (1, torch.bfloat16), (2, torch.bfloat16)]


@pytest.mark.parametrize("is_tied", [False, True], ids=["head of its own", "tied"])
@pytest.mark.parametrize(("stage", "dtype"), ZERO)
def test_a_rollout_after_a_step_uses_the_new_values_at_the_old_addresses(
    stage: int, dtype: torch.dtype, is_tied: bool
) -> None:
    model = build_text_model("qwen3", is_tied=is_tied)
    with owned(model, stage, dtype) as distributed:
        engine = RolloutEngine(model, PROCESSOR, PARAMS)
        with distributed.gathered_parameters():
            before = sample(engine)
        places = addresses(engine)
        assert {id(p) for p in engine.stack.parameters()} == {id(p) for p in model.decoder.parameters()}
        for _ in range(2):
            train_once(distributed)
            assert addresses(engine) == places
            with distributed.gathered_parameters():
                after = sample(engine)
            assert all_kept(after) != all_kept(before)
            assert_same(after, sample_anew(model), tolerance=0)
            if dtype == torch.float32:
                copy = build_text_model("qwen3", is_tied=is_tied)
                copy.load_state_dict(distributed.consolidated_state_dict())
                assert_same(after, sample_by_eager(copy))
            before = after


@pytest.mark.parametrize("family", ["qwen2", "qwen2.5-vl"])
def test_gathered_parameters_give_the_completions_of_stage_1(family: str) -> None:
    rollouts: dict[int, list[Rollout]] = {}
    for stage in (1, 3):
        model = build_text_model(family)
        engine = RolloutEngine(model, PROCESSOR, PARAMS)  # before the parameters are partitioned
        with owned(model, stage) as distributed:
            rollouts[stage] = []
            for _ in range(3):
                with distributed.gathered_parameters():
                    rollouts[stage].append(sample(engine))
                train_once(distributed)
            if stage == 3:
                assert model.decoder.layers[0].self_attn.q_proj.weight.numel() == 0
    assert len({str(all_kept(rollout)) for rollout in rollouts[1]}) == 3
    for got, want in zip(rollouts[3], rollouts[1], strict=True):
        assert_same(got, want)


# Adapters


class LowRank(nn.Module):
    """A projection with a term of rank 2 beside it, as PEFT makes them."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return out


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapt(model: TextModel, name: str) -> None:
    """Wrap the projections of this name."""
    for layer in model.decoder.layers:
        part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        setattr(part, name, LowRank(getattr(part, name)))


@pytest.mark.parametrize("when", ["before the engine", "after a rollout"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_an_adapted_projection_is_honoured(name: str, when: str) -> None:
    model = build_text_model("qwen2")
    plain = sample_by_eager(model)
    engine: RolloutEngine | None = None
    if when == "after a rollout":
        engine = RolloutEngine(model, PROCESSOR, PARAMS)
        assert_same(sample(engine), plain)
    adapt(model, name)
    engine = engine or RolloutEngine(model, PROCESSOR, PARAMS)
    adapted = sample(engine)
    assert (adapted.sampler_logps[:, 0] - plain.sampler_logps[:, 0]).abs().max() > 1e-3
    assert_same(adapted, sample_by_eager(model))
    with torch.no_grad():
        model.decoder.layers[1].get_submodule(path_of(name)).lora_B.weight.mul_(-3)
    trained = sample(engine)
    assert (trained.sampler_logps[:, 0] - adapted.sampler_logps[:, 0]).abs().max() > 1e-3
    assert_same(trained, sample_by_eager(model))


def path_of(name: str) -> str:
    return f"self_attn.{name}" if name in PROJECTIONS[:4] else f"mlp.{name}"


def test_adapters_of_peft_are_honoured() -> None:
    peft = pytest.importorskip("peft")
    model = build_text_model("qwen3")
    plain = sample_by_eager(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model.decoder)
    adapted = sample_anew(model)
    assert all_kept(adapted) != all_kept(plain)
    assert_same(adapted, sample_by_eager(model))


Hook = Callable[[nn.Module], Any]
HOOKS: dict[str, Hook] = {
    "output": lambda module: module.register_forward_hook(
        lambda _, inputs, out: out - inputs[0].mean(-1, keepdim=True)
    ),
    "input": lambda module: module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5,)),
    "another forward": lambda module: setattr(module, "forward", lambda x: 2 * nn.Linear.forward(module, x)),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("name", ["v_proj", "o_proj", "gate_proj", "down_proj"])
def test_a_hook_on_a_projection_is_honoured(name: str, hook: Hook) -> None:
    """It is called by the prefill and by training: a step that left it out would sample from another model."""
    model = build_text_model("qwen2")
    engine = RolloutEngine(model, PROCESSOR, PARAMS)
    plain = sample(engine)
    hook(model.decoder.layers[1].get_submodule(path_of(name)))
    hooked = sample(engine)
    assert (hooked.sampler_logps[:, 0] - plain.sampler_logps[:, 0]).abs().max() > 1e-3
    assert_same(hooked, sample_by_eager(model))


def test_a_hook_on_the_embedding_is_honoured() -> None:
    model = build_text_model("llama")
    model.decoder.embed_tokens.register_forward_hook(lambda module, inputs, out: 1.5 * out)
    assert_same(sample_anew(model), sample_by_eager(model))


@pytest.mark.parametrize("path", ["", "layers.1", "layers.0.self_attn", "layers.1.mlp", "layers.0.input_layernorm"])
def test_a_hook_that_a_step_would_leave_out_is_refused(path: str) -> None:
    model = build_text_model("qwen3")
    engine = RolloutEngine(model, PROCESSOR, PARAMS)
    hook = model.decoder.get_submodule(path).register_forward_hook(lambda module, inputs, out: None)
    with pytest.raises(UnknownDecoderError, match=f"forward hook on {path or 'itself'}.*remove the hook"):
        sample(engine)
    hook.remove()
    sample(engine)


def rewrite(model: TextModel) -> None:
    """Other weights, in their place."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))


def replace(model: TextModel) -> None:
    """Other weights, as parameters of their own."""
    state = {name: value + 0.05 * value.flip(0) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [rewrite, replace])
def test_weights_that_others_write_are_used(change: Callable[[TextModel], None]) -> None:
    model = build_text_model("llama")
    engine = RolloutEngine(model, PROCESSOR, PARAMS)
    before = sample(engine)
    change(model)
    after = sample(engine)
    assert all_kept(after) != all_kept(before)
    assert_same(after, sample_by_eager(model))
