"""The options of the loss as a configuration states them. What they mean and what refuses them: `fastr1_kernels`."""

from __future__ import annotations

from dataclasses import fields

from fastr1.config.fields import GRPOConfig
from fastr1_kernels.options import LossOptions


def loss_options(grpo: GRPOConfig) -> LossOptions:
    """Every field of `LossOptions` from the field of `GRPOConfig` of that name; its default where there is none."""
    given = {field.name for field in fields(GRPOConfig)}
    if grpo.sampler_correction == "none":  # the sampler's log-probabilities are then not given to the loss
        given.remove("sampler_correction")
    return LossOptions(
        **{field.name: getattr(grpo, field.name) for field in fields(LossOptions) if field.name in given}
    )
