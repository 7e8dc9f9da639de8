"""Liger's layers compute what the plain ones do, in every decoder they are known for, and are refused elsewhere.

On a CPU their kernels run in Triton's interpreter, which is chosen when triton is imported: the last test runs this
file once more in a process of its own.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import INTERPRETED
from torch import nn
from trainer_toys import build_model, build_tokenizer, make_config, write_world
from transformers import (
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    Qwen2Config,
    Qwen2Model,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.models.qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel
from transformers.models.qwen3_vl import Qwen3VLTextConfig, Qwen3VLTextModel
from twin_toys import Forward, packed_logits, padded_logits

from fastr1.config import ConfigError
from fastr1.models import liger
from fastr1.models.liger import apply_liger, resolve_liger, use_liger_layers
from fastr1.training.policy import load_policy

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 24,  # no power of two
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 31,
    "rms_norm_eps": 0.05,  # large enough that another one shows
}
SECTIONS = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 2, 1]}
DECODERS: dict[str, Any] = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**{**SIZES, "head_dim": 4})),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SIZES)),
    "qwen2_5_vl": lambda: Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(**{**SIZES, "hidden_size": 48}, rope_parameters=SECTIONS)
    ),
    "qwen3_vl": lambda: Qwen3VLTextModel(Qwen3VLTextConfig(**SIZES, rope_parameters=SECTIONS)),
}
COUNTED = ("LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerRopeFunction")


class Scalar(float):
    """A number as a compiled kernel gets it."""

    def to(self, dtype: Any) -> Scalar:
        return self


@pytest.fixture(autouse=True)
def _interpreter_of_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two things that Liger's kernels ask for and Triton's interpreter lacks: `.to(tl.float32)` of a scalar argument,
    and a body of CUDA's rsqrt."""
    if not INTERPRETED:
        return
    language = importlib.import_module("triton.language")
    monkeypatch.setattr(importlib.import_module("liger_kernel.ops.rms_norm"), "rsqrt", lambda x: language.math.rsqrt(x))
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter, "_implicit_cvt", lambda value: Scalar(value) if isinstance(value, float) else convert(value)
    )


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    decoder = DECODERS[name]()
    with torch.no_grad():
        for parameter in decoder.parameters():  # norms of ones and biases of zeros would hide much
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    return decoder.to(dtype)


def outputs(decoder: nn.Module, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hidden states and every gradient of two rows of seven tokens, whose positions differ and have a gap."""
    generator = torch.Generator().manual_seed(1)
    embeds, weights = (torch.randn(2, 7, decoder.config.hidden_size, generator=generator) for _ in range(2))
    embeds = embeds.to(device, dtype).requires_grad_()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 9, 10, 11, 12]], device=device)
    if "VL" in type(decoder).__name__:
        positions = torch.stack([positions, positions * 2, positions + 5])  # of time, height and width
    hidden = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    (hidden * weights.to(device, dtype)).sum().backward()
    grads = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), "embeds": embeds.grad, **grads}


def count_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of Liger's functions runs forward."""
    import liger_kernel.ops

    calls = dict.fromkeys(COUNTED, 0)
    for name in COUNTED:
        plain = getattr(liger_kernel.ops, name)

        class Counted:
            @staticmethod
            def apply(*args: Any, name: str = name, plain: Any = plain) -> Any:
                calls[name] += 1
                return plain.apply(*args)

        monkeypatch.setattr(liger_kernel.ops, name, Counted)
    return calls


@pytest.mark.parametrize("name", DECODERS)
def test_values_and_all_gradients_are_those_of_the_plain_layers(
    name: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = build(name).to(kernel_device), build(name).to(kernel_device)
    use_liger_layers(ours)
    calls = count_calls(monkeypatch)
    expected, found = (outputs(decoder, kernel_device, torch.float32) for decoder in (plain, ours))
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in plain.modules())
    assert norms == (9 if name.startswith("qwen3") else 5)
    assert list(calls.values()) == [norms, 2, 2]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6 * max(scale, 1), msg=lambda m, k=key: k + m)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DECODERS)
def test_bf16_is_as_near_to_fp32_as_the_plain_layers(name: str) -> None:
    truth = outputs(build(name).cuda(), "cuda", torch.float32)
    plain, ours = (build(name, torch.bfloat16).cuda() for _ in range(2))
    use_liger_layers(ours)
    yardstick, found = (outputs(decoder, "cuda", torch.bfloat16) for decoder in (plain, ours))
    for key, value in truth.items():
        error, allowed = ((result[key].float() - value).norm() for result in (found, yardstick))
        assert error <= 1.5 * allowed + 1e-3 * value.norm(), key


def test_gradients_of_others_are_left_alone(kernel_device: str) -> None:
    """The gradient that arrives at a norm also belongs to a sum behind it."""
    decoder = build("llama").to(kernel_device)
    use_liger_layers(decoder)
    x = torch.randn(3, 24, device=kernel_device, requires_grad=True)
    kept = torch.ones(3, 24, device=kernel_device)
    y = decoder.norm(x)
    y.backward(kept)
    assert torch.equal(kept, torch.ones_like(kept))


def test_a_cache_and_checkpointing_go_with_it(kernel_device: str) -> None:
    plain, ours = build("qwen3").to(kernel_device), build("qwen3").to(kernel_device)
    use_liger_layers(ours)
    embeds = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2)).to(kernel_device)
    with torch.no_grad():
        whole = plain(inputs_embeds=embeds).last_hidden_state
        first = ours(inputs_embeds=embeds[:, :4], use_cache=True)
        rest = ours(inputs_embeds=embeds[:, 4:], past_key_values=first.past_key_values).last_hidden_state
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)
    expected = outputs(plain, kernel_device, torch.float32)
    ours.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = outputs(ours, kernel_device, torch.float32)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6 * max(value.abs().max().item(), 1))


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_and_their_names_stay(name: str) -> None:
    decoder = build(name)
    before = dict(decoder.named_parameters())
    classes = [type(module) for module in decoder.modules()]
    use_liger_layers(decoder)
    after = dict(decoder.named_parameters())
    assert list(after) == list(before) == list(decoder.state_dict())
    assert all(after[key] is before[key] for key in before)
    assert [type(module) for module in decoder.modules()] == classes


@pytest.mark.parametrize("name", DECODERS)
def test_other_models_keep_their_layers(name: str) -> None:
    other = build(name)
    expected = outputs(other, "cpu", torch.float32)
    other.zero_grad()
    changed = build(name)
    use_liger_layers(changed)
    assert not any("forward" in vars(module) for module in other.modules())
    for key, value in outputs(other, "cpu", torch.float32).items():
        assert torch.equal(value, expected[key]), key


def test_a_copy_computes_with_its_own_weights(kernel_device: str) -> None:
    decoder = build("qwen2").to(kernel_device)
    use_liger_layers(decoder)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    torch.testing.assert_close(
        outputs(twin, kernel_device, torch.float32)["hidden"],
        outputs(build("qwen2").to(kernel_device), kernel_device, torch.float32)["hidden"],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (lambda: GemmaModel(GemmaConfig(**SIZES)), r"GemmaModel has Gemma\w+, Gemma\w+, Gemma\w+, not known here"),
        (lambda: Qwen2Model(Qwen2Config(**SIZES, hidden_act="gelu")), "an MLP gated by GELUActivation, not by SiLU"),
        (lambda: Qwen2MoeModel(Qwen2MoeConfig(**SIZES, num_experts=2)), r"Qwen2MoeSparseMoeBlock, .*not known here"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential has no layer that is known here"),
    ],
    ids=["offset", "gelu", "experts", "other"],
)
def test_what_is_not_known_is_refused_by_name_and_left_as_it_is(
    decoder: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = decoder()
    with pytest.raises(ConfigError, match=f"model.use_liger_kernel is True, but .*{reason}"):
        use_liger_layers(model)
    monkeypatch.setattr(liger, "resolve_liger", lambda setting, device: True)  # as if it could run here
    with pytest.raises(ConfigError, match=reason):
        apply_liger(model, True)
    with caplog.at_level(logging.WARNING):
        apply_liger(model, None)
    assert "keeps its own layers" in caplog.text
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_layer_of_a_known_name_that_is_not_of_transformers_is_refused() -> None:
    """Also where the layers behind it are of transformers."""
    decoder = build("qwen2")
    decoder.layers[0].mlp.__class__ = type("Qwen2MLP", (type(decoder.layers[0].mlp),), {"__module__": __name__})
    with pytest.raises(ConfigError, match="Qwen2Model has Qwen2MLP, not known here"):
        use_liger_layers(decoder)


def test_an_attention_that_rotates_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = build("qwen2")
    monkeypatch.setattr(type(decoder.layers[0].self_attn), "forward", lambda self, *args, **kwargs: None)
    with pytest.raises(ConfigError, match="Qwen2Attention without apply_rotary_pos_emb, as another version"):
        use_liger_layers(decoder)


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.device("cuda", 0)
    assert [resolve_liger(None, device) for device in (CPU, gpu)] == [False, True]
    assert [resolve_liger(False, device) for device in (CPU, gpu)] == [False, False]
    assert resolve_liger(True, gpu) is True
    with pytest.raises(ConfigError, match=r"use_liger_kernel is True, which needs a GPU, .* runs on cpu; use null"):
        resolve_liger(True, CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve_liger(None, gpu) is False
    with pytest.raises(ConfigError, match="liger-kernel is not installed; install it"):
        resolve_liger(True, gpu)


@pytest.mark.parametrize(("setting", "is_used"), [(True, True), (None, False), (False, False)])
def test_the_model_to_train_has_what_the_configuration_says(
    setting: bool | None, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    world = write_world(tmp_path)
    model = load_policy(make_config(world, tmp_path / "run", model__use_liger_kernel=setting))
    changed = {name for name, module in model.named_modules() if "forward" in vars(module)}
    layers = [f"language_model.model.layers.{i}" for i in range(2)]
    parts = ("input_layernorm", "post_attention_layernorm", "mlp", "self_attn")
    expected = {f"{layer}.{part}" for layer in layers for part in parts} | {"language_model.model.norm"}
    assert changed == (expected if is_used else set())


@pytest.mark.parametrize("forward", [packed_logits, padded_logits])
def test_a_whole_model_gives_the_same_logits_and_gradients(forward: Forward, kernel_device: str) -> None:
    results = []
    for is_used in (False, True):
        model = build_model(build_tokenizer()).to(kernel_device)
        if is_used:
            use_liger_layers(model.decoder)
        completions = torch.randint(3, 250, (4, 5), generator=torch.Generator().manual_seed(0)).to(kernel_device)
        mask = torch.arange(5)[None] < torch.tensor([5, 1, 3, 5])[:, None]
        mask = mask.to(kernel_device)
        prompts = [
            torch.tensor([5, -200, 6], device=kernel_device),
            torch.tensor([7, 8, 9, -200], device=kernel_device),
        ]
        videos = [torch.full((4, 3, 28, 28), value, device=kernel_device) for value in (0.2, 0.4)]
        logits = forward(model, prompts, videos, completions, mask)
        (logits.log_softmax(-1)[..., 3] * mask).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"logits": logits.detach()[mask], **grads})
    expected, found = results
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5 * max(value.abs().max().item(), 1))


def test_interpreted_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) == 10, "a fixture that was renamed would leave its tests out without a word"
