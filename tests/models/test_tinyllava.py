"""The model against data computed by the original implementation, and its own fast path against the plain one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from shared_data import shared_path
from torch.testing import assert_close
from twin_toys import packed_logits, padded_logits

from fastr1.models import ModelFileError, load_model
from fastr1.models.tinyllava.connector import chunk_sizes, sinusoidal_table


@pytest.fixture(scope="module")
def model():
    return load_model(shared_path("fixtures/tinyllava/group"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def expected():
    return load_file(shared_path("fixtures/tinyllava/group_expected.safetensors"))


@pytest.fixture(scope="module")
def expected_json():
    return json.loads(shared_path("fixtures/tinyllava/group_expected.json").read_text())


def test_vision_tower_matches_original(model, expected):
    with torch.no_grad():
        features = model.encode(expected["pixel_values"])
    assert_close(features, expected["vision_features"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("num_frames", [16, 8, 7, 5])
def test_connector_matches_original_for_even_and_uneven_chunks(model, expected, num_frames):
    name = "connector_output" if num_frames == 16 else f"connector_output.first_{num_frames}_frames"
    with torch.no_grad():
        (tokens,) = model.visual_tokens([expected["pixel_values"][:num_frames]])
    assert_close(tokens, expected[name][0], atol=1e-5, rtol=0)


def test_position_table_is_exact(expected):
    table = expected["position_table"]
    assert torch.equal(sinusoidal_table(*table.shape), table)


def test_chunk_sizes_of_the_paper():
    assert chunk_sizes(5824, 16) == [364] * 16
    assert chunk_sizes(10920, 16) == [683] * 8 + [682] * 8
    assert chunk_sizes(46592, 16) == [2912] * 16


def test_splice_logits_and_logps_match_original(model, expected):
    ids = torch.cat([expected["prompt_ids"], expected["completion_ids"]])
    with torch.no_grad():
        features = model.encode(expected["pixel_values"])
        embeds = model.embed_prompt(ids, model.visual_tokens([features])[0])
        logits = model.language_model(inputs_embeds=embeds[None]).logits
        completion = expected["completion_ids"][None]
        mask = torch.ones_like(completion, dtype=torch.bool)
        scored = packed_logits(model, [expected["prompt_ids"]], [features], completion, mask)
    assert_close(embeds[None], expected["inputs_embeds"], atol=1e-5, rtol=0)
    assert_close(logits, expected["logits"], atol=4e-5, rtol=0)
    assert_close(scored, expected["logits"][:, -completion.shape[1] - 1 : -1], atol=4e-5, rtol=0)
    logps = scored.log_softmax(-1).gather(-1, completion[..., None])[0, :, 0]
    assert_close(logps, expected["completion_logps"], atol=4e-5, rtol=0)


@pytest.mark.parametrize("forward", [packed_logits, padded_logits])
def test_grpo_loss_and_gradients_match_original(expected, expected_json, forward):
    from fastr1_kernels import grpo_loss

    model = load_model(shared_path("fixtures/tinyllava/group"), device="cpu", dtype="float32")
    model.freeze(["vision_tower"])
    mask = expected["grpo.completion_mask"].bool()
    features = model.encode(expected["pixel_values"])
    logits = forward(model, [expected["grpo.prompt_ids"]], [features], expected["grpo.completion_ids"], mask)
    out = grpo_loss(
        logits,
        expected["grpo.completion_ids"],
        mask=mask,
        advantages=expected["grpo.advantages"],
        ref_logps=expected["grpo.ref_logps"],
        loss_type="tinyllava_video_r1",
        beta=0.01,
    )
    out.loss.backward()
    # the loss is a near-cancelling sum (2e-3 from terms of size 1): absolute comparison
    assert_close(out.loss.detach(), expected["grpo.loss"], atol=2e-6, rtol=0)
    assert_close(out.logps[mask], expected["grpo.logps"][mask], atol=4e-5, rtol=0)
    parameters = dict(model.named_parameters())
    for key, value in expected.items():
        if key.startswith("grpo.grad."):
            grad = parameters[key.removeprefix("grpo.grad.")].grad
            assert_close(grad, value, atol=2e-5 * value.abs().max().item(), rtol=0, msg=lambda m, k=key: f"{k}: {m}")
    norms = expected_json["grpo"]["grpo"]["grad_norms"]
    trainable = {name: p.grad for name, p in parameters.items() if p.requires_grad and p.grad is not None}
    assert {n for n in norms if not n.endswith("lm_head.weight")} == set(trainable)
    for name, grad in trainable.items():
        assert grad.norm().item() == pytest.approx(norms[name], rel=1e-4, abs=1e-6), name


def _ragged_batch(model, expected):
    generator = torch.Generator().manual_seed(0)
    features = model.encode(expected["pixel_values"])
    prompts = [expected["prompt_ids"], expected["prompt_ids"][8:], expected["prompt_ids"][:-5]]
    completions = torch.randint(3, 600, (6, 9), generator=generator)
    lengths = torch.tensor([9, 1, 4, 9, 7, 2])
    mask = torch.arange(9)[None] < lengths[:, None]
    return prompts, [features, features.flip(0), features], completions, mask


def test_packed_forward_equals_the_padded_one_in_values_and_gradients(expected):
    """Three ragged prompts, two completions each, one of a single token; fp64 but for the decoder's fp32 norms."""
    grads, outputs = [], []
    for forward in (packed_logits, padded_logits):
        model = load_model(shared_path("fixtures/tinyllava/group"), device="cpu", dtype=torch.float64)
        prompts, features, completions, mask = _ragged_batch(model, expected)
        logits = forward(model, prompts, features, completions, mask)
        weights = torch.randn(
            logits.shape, generator=torch.Generator().manual_seed(1), device="cpu", dtype=torch.float64
        )
        (logits * weights * mask[..., None]).sum().backward()
        outputs.append(logits[mask].detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(outputs[0], outputs[1], atol=1e-9, rtol=1e-9)
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        scale = grads[1][name].abs().max().item()
        assert_close(grads[0][name], grads[1][name], atol=1e-6 * max(scale, 1), rtol=1e-6, msg=lambda m, n=name: n + m)


def test_left_padding_does_not_change_a_prompt(model, expected):
    prompts, features, completions, mask = _ragged_batch(model, expected)
    with torch.no_grad():
        together = padded_logits(model, prompts, features, completions, mask)
        alone = padded_logits(model, prompts[1:2], features[1:2], completions[2:4], mask[2:4])
    assert_close(together[2:4][mask[2:4]], alone[mask[2:4]], atol=2e-5, rtol=0)


def test_unused_tower_layers_do_not_change_the_output(expected):
    model = load_model(shared_path("fixtures/tinyllava/group"), device="cpu", dtype="float32")
    tower = model.vision_tower.vision_model
    with torch.no_grad():
        before = model.encode(expected["pixel_values"])
        for module in (tower.encoder.layers[-1], tower.post_layernorm, tower.head):
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
                assert not parameter.requires_grad
        after = model.encode(expected["pixel_values"])
    assert torch.equal(before, after)


def test_save_and_load_round_trip_is_exact(model, tmp_path):
    model.save(tmp_path)
    again = load_model(tmp_path, device="cpu", dtype="float32")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    original = json.loads(shared_path("fixtures/tinyllava/group/config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == original
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        load_file(shared_path("fixtures/tinyllava/group/model.safetensors"))
    )


def test_truncates_spliced_sequences_to_the_maximum_length(model, expected):
    ids = expected["prompt_ids"].repeat(1)
    long = torch.cat([ids, torch.full((4000,), 5)])
    assert model.embed_prompt(long, expected["connector_output"][0]).shape[0] == 3072


def test_two_placeholders_are_refused(model, expected):
    ids = torch.cat([expected["prompt_ids"], expected["prompt_ids"]])
    with pytest.raises(ValueError, match="2 video placeholders"):
        model.embed_prompt(ids, expected["connector_output"][0])


def _edit_config(model, path, **changes):
    model.save(path)
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'; known are 'tinyllava'"),
        ({"connector_type": "mlp"}, "only 'groupresampler'"),
        ({"num_queries": 32}, "latents has shape"),
        ({"vision_feature_select_strategy": "cls_patch"}, "only 'patch'"),
    ],
)
def test_wrong_config_is_a_clear_error(model, tmp_path, changes, message):
    _edit_config(model, tmp_path, **changes)
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path, device="cpu", dtype="float32")


def test_missing_and_truncated_files_are_clear_errors(model, tmp_path):
    with pytest.raises(ModelFileError, match=r"config\.json: not found"):
        load_model(tmp_path / "nowhere")
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match=r"model\.safetensors: unreadable"):
        load_model(tmp_path, device="cpu", dtype="float32")
    weights.unlink()
    with pytest.raises(ModelFileError, match=r"model\.safetensors: not found"):
        load_model(tmp_path, device="cpu", dtype="float32")
