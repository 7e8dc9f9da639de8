"""A whole step of TRL's GRPOTrainer on the text decoder of a case's model.

It generates, scores, computes gradients and steps as always. Only which tokens the prompts are, and what its generation
gives back, are the case's, so that its gradients can be compared.
"""

from __future__ import annotations

import tempfile
from typing import Any

from harness import UnavailableError
from providers import load
from update_work import DEMO_MODEL, Work, rewards_of

from fastr1.models import load_processor


def make_trainer(work: Work) -> Any:
    """TRL's trainer with its own optimizer, of a learning rate of 0."""
    if work.videos:
        raise UnavailableError("has no video in its GRPOTrainer")
    trl, datasets = load("trl"), load("datasets")
    case, batch = work.case, work.batch
    group = case.num_generations
    prompts = [ids.tolist() for ids in batch.prompt_ids]
    completions = [ids[:n].tolist() for ids, n in zip(batch.rollout.completion_ids, batch.lengths, strict=True)]

    class Trainer(trl.GRPOTrainer):  # type: ignore[misc,name-defined]
        def _tokenize_prompts(self, numbers: list[str]) -> Any:
            return [prompts[int(number)] for number in numbers], None, {}

        def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
            _, logps = super()._generate_single_turn(*arguments, **keywords)
            return completions, logps

    folder = tempfile.TemporaryDirectory(prefix="step-bench-")
    config = trl.GRPOConfig(
        output_dir=folder.name,
        per_device_train_batch_size=len(completions),
        num_generations=group,
        max_completion_length=max(batch.lengths),
        generation_kwargs={"min_new_tokens": max(batch.lengths)},
        beta=case.beta,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=0.0,
        max_steps=1000,
        use_cpu=work.model.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=case.checkpointing,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    rewards = rewards_of(case).tolist()
    data = datasets.Dataset.from_list([{"prompt": str(i)} for i in range(case.num_prompts)])
    trainer = Trainer(
        model=work.model.language_model,
        reward_funcs=lambda prompts, **_: rewards,
        args=config,
        train_dataset=data,
        processing_class=load_processor(DEMO_MODEL).tokenizer,  # type: ignore[attr-defined]
    )
    trainer.create_optimizer_and_scheduler(config.max_steps)
    trainer.folder = folder  # removed with it
    return trainer


def update_trl(work: Work, trainer: Any) -> float:
    rows = [{"prompt": str(i)} for i in range(work.case.num_prompts) for _ in range(work.case.num_generations)]
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.model, rows, None)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1e9)
    trainer.optimizer.step()
    return float(loss)
