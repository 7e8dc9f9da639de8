"""What the losses refuse: every message has the value received."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_accuracy import rand
from loss_cases import ADVANTAGES, LOGITS, MASK, OLD, TOKEN_IDS, B, D, T, V, loss_of

from fastr1_kernels import GRPOOutput, grpo_loss, linear_grpo_loss

NAN, INF = float("nan"), float("inf")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": "ppo"}, "loss_type='ppo' is not supported.*grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, tiny"),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type='cispo' divides by.*give normalizer"),
    ({"loss_type": "cispo", "normalizer": 9}, "epsilon_high=None"),
    ({"loss_type": "cispo", "normalizer": 9, "epsilon_high": 5.0, "delta": 9.0}, "delta=9.0 has no effect"),
    ({"loss_type": "sapo", "epsilon_high": 0.3}, "epsilon_high=0.3 has no effect"),
    ({"loss_type": "sapo", "sapo_temperature_neg": 0}, "sapo_temperature_neg=0"),
    ({"loss_type": "luspo"}, "importance_sampling_level='token': loss_type='luspo' needs 'sequence'"),
    ({"off_policy_threshold": 0.1}, "off_policy_threshold has no effect on-policy"),
    ({"off_policy_threshold": -0.1, "old_logps": OLD}, "off_policy_threshold=-0.1"),
    ({"top_entropy_quantile": 0.0}, "top_entropy_quantile=0.0"),
    ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5"),
    ({"sampler_floor": -1}, "sampler_floor=-1"),
    ({"loss_type": "dapo"}, "give normalizer"),
    ({"loss_type": "dr_grpo"}, "max_completion_length=None"),
    ({"importance_sampling_level": "batch"}, "importance_sampling_level='batch'"),
    ({"kl_estimator": "k4"}, "kl_estimator='k4'"),
    ({"sampler_correction": "tis"}, "sampler_correction='tis' is not supported.*token_mask.*icepop"),
    ({"beta": 0.1}, "beta=0.1 needs ref_logps"),
    ({"beta": -0.1}, "beta=-0.1"),
    ({"beta": NAN}, "beta=nan"),
    ({"epsilon": "0.2"}, "epsilon='0.2'"),
    ({"epsilon_high": -1}, "epsilon_high=-1"),
    ({"delta": 1.2}, "delta=1.2: give a finite number > 1.2"),
    ({"temperature": 0}, "temperature=0"),
    ({"log_ratio_clamp": 0}, "log_ratio_clamp=0"),
    ({"normalizer": -1}, "normalizer=-1"),
    ({"normalizer": 0}, "normalizer=0, but this call has loss tokens"),
    ({"normalizer": torch.ones(2)}, r"normalizer has shape \(2,\)"),
    ({"normalizer": torch.tensor(-3.0)}, r"normalizer=-3\.0: give a finite number >= 0"),
    ({"normalizer": torch.tensor(NAN)}, "normalizer=nan"),
    ({"mask": MASK * 2}, "mask contains 2: give bool or 0/1 integers"),
    ({"mask": -MASK.int()}, "mask contains -1: give bool"),
    ({"max_completion_length": 1.5}, "max_completion_length=1.5"),
    ({"advantages": None}, "exactly one of rewards and advantages"),
    ({"rewards": torch.zeros(B), "num_generations": 2}, "exactly one of rewards and advantages"),
    ({"num_generations": 2}, "num_generations describes rewards"),
    ({"advantages": torch.zeros(B + 1)}, r"advantages has shape \(5,\)"),
    ({"advantages": [0.0] * B}, "advantages is a list"),
    ({"advantages": None, "rewards": torch.zeros(2 * B), "num_generations": 2}, r"rewards has shape \(8,\)"),
    ({"advantages": None, "rewards": torch.tensor([1.0, INF, 0, 0]), "num_generations": 2}, "reward 1 is inf"),
    (
        {
            "advantages": None,
            "rewards": torch.zeros(8),
            "num_generations": 2,
            "sequence_index": torch.tensor([0, 1, 2, 8]),
        },
        "leaves the 8 rewards",
    ),
    ({"scale_rewards": "std"}, "scale_rewards='std'"),
    ({"mask": MASK.double()}, "mask has dtype torch.float64"),
    ({"mask": 2 * MASK.long()}, "mask contains 2: give bool or 0/1 integers"),
    ({"mask": -MASK.to(torch.int8)}, "mask contains -1"),
    ({"mask": MASK[:, :-1]}, r"mask has shape \(4, 4\): expected \(4, 5\)"),
    ({"old_logps": OLD[:, :-1]}, r"old_logps has shape \(4, 4\)"),
    ({"old_logps": TOKEN_IDS}, "old_logps has dtype torch.int64"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is for packed"),
    ({"loss_type": "tinyllava_video_r1", "old_logps": OLD}, "old_logps has no effect"),
    ({"loss_type": "tinyllava_video_r1", "delta": 2.0}, "delta=2.0 has no effect"),
    ({"loss_type": "tinyllava_video_r1", "epsilon_high": 0.3}, "epsilon_high=0.3 has no effect"),
    ({"loss_type": "tinyllava_video_r1", "kl_estimator": "k1"}, "kl_estimator='k1' has no effect"),
    ({"loss_type": "tinyllava_video_r1", "importance_sampling_level": "sequence"}, "'sequence' has no effect"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(LOGITS, {"loss_type": "grpo"} | arguments)


@pytest.mark.parametrize("bounds", [[0, 5, 7], [1, 5, 20], [0, 9, 5, 20], [], None])
def test_wrong_boundaries_are_refused(bounds: list[int] | None) -> None:
    logits, ids = LOGITS.flatten(0, 1), TOKEN_IDS.flatten()
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens"):
        grpo_loss(logits, ids, cu_seqlens=cu_seqlens, advantages=torch.zeros(3), loss_type="grpo")


@pytest.mark.parametrize("token", [-1, V])
def test_id_outside_the_vocabulary_is_refused_unless_masked(token: int) -> None:
    ids = TOKEN_IDS.clone()
    ids[1, 4] = token  # masked
    arguments: dict[str, Any] = {"mask": MASK, "advantages": ADVANTAGES, "loss_type": "grpo"}
    grpo_loss(LOGITS, ids, **arguments)
    ids[0, 0] = token
    calls: list[Callable[[], GRPOOutput]] = [
        lambda: grpo_loss(LOGITS, ids, **arguments),
        lambda: linear_grpo_loss(rand(B, T, D), rand(V, D), ids, **arguments),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of {V}"):
            call()


def test_as_many_sequences_as_rows_leave_the_meaning_of_advantages_open() -> None:
    logits, ids = LOGITS[0, :3], TOKEN_IDS[0, :3]
    given: dict[str, Any] = {"advantages": torch.tensor([1.0, 2.0, 3.0]), "loss_type": "grpo"}
    with pytest.raises(ValueError, match="one per sequence or one per row"):
        grpo_loss(logits, ids, cu_seqlens=torch.tensor([0, 2, 2, 3]), **given)
    output = grpo_loss(logits, ids, cu_seqlens=torch.tensor([0, 1, 2, 3]), **given)  # both mean the same
    assert output.loss.item() == pytest.approx(-2.0)


def test_integer_masks_of_zeros_and_ones_are_masks() -> None:
    arguments: dict[str, Any] = {"loss_type": "grpo"}
    expected = loss_of(LOGITS, arguments).loss
    for dtype in (torch.uint8, torch.int64):
        assert torch.equal(loss_of(LOGITS, arguments, mask=MASK.to(dtype)).loss, expected)


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="epsilonn"):
        loss_of(LOGITS, {"epsilonn": 0.2})
