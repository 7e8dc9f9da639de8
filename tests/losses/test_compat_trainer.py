"""TRL's own GRPO trainer, patched and not: equal losses over five updates of a tiny random model on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastr1_kernels.compat.trl import patch_trl

NUM_UPDATES = 5


def tiny_model_and_tokenizer(folder: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", *"abcdefghijklmnop"]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    fast = tokenizers.Tokenizer(vocabulary)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = transformers.Qwen2Config(vocab_size=len(words), num_key_value_heads=1, **sizes, **special)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return transformers.Qwen2ForCausalLM.from_pretrained(folder), tokenizer


def train(trl: Any, folder: Path, loss_type: str) -> list[dict[str, float]]:
    datasets = pytest.importorskip("datasets")
    model, tokenizer = tiny_model_and_tokenizer(folder / "model")
    prompts = datasets.Dataset.from_dict({"prompt": ["a b c", "d e", "f g h i", "j k"] * 4})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion))) for completion in completions]

    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        num_iterations=2,  # the second pass over a batch is off-policy: ratios differ from 1
        max_completion_length=6,
        max_steps=NUM_UPDATES,
        learning_rate=1e-2,
        temperature=0.9,
        beta=0.05,
        loss_type=loss_type,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "kl")
    return [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_patched_trainer_has_the_same_losses(tmp_path: Path, loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: it is in the extra `bench`")
    pytest.importorskip("accelerate")
    from fastr1_kernels.compat import trl as compat

    calls = []
    scored = compat.chunked_log_probs

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments))
        return scored(*arguments)

    monkeypatch.setattr(compat, "chunked_log_probs", counted)
    plain = train(trl, tmp_path / "plain", loss_type)
    assert not calls
    undo = patch_trl()
    try:
        patched = train(trl, tmp_path / "patched", loss_type)
    finally:
        undo()
    assert len(plain) == len(patched) == NUM_UPDATES
    assert len(calls) >= NUM_UPDATES  # the patch was what ran
    assert len({row["loss"] for row in plain}) > 1
    for row, expected in zip(patched, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=2e-5)
