"""What can be chosen about a loss: the table of losses and the options, checked with the standard library alone.

A loss is one row of `LOSSES`. The kernels, the reference, the argument checks and the tests read its columns; none of
them names a loss. To add one: a row here, its objective in `reference.policy_term` and `gpu.policy.policy_term` if that
is new, an example in the tests.

This module imports neither torch nor triton, so that a configuration can be checked before they load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

SCALES = ("group", "batch", "none")  # of rewards
SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "icepop")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A row of `LOSSES`. Formulas: the README of this package."""

    objective: str  # of one token: clipped | capped | sigmoid | ratio
    reduction: str  # what is added up: "tokens", or "sequence_means", the masked mean of each sequence
    denominator: str  # what divides the sum: tokens | sequences | sequences_times_length
    kl: str | None = None  # the KL rule; None: the option kl_estimator
    clip_metrics: tuple[str, ...] = ("clip_low", "clip_high")
    is_on_policy: bool = False  # the ratio is 1: log-probabilities of an older policy are refused
    needs: Mapping[str, str] = field(default_factory=dict)  # option that must be set → why, and what to give
    ignores: tuple[str, ...] = ()  # options without effect: refused where they differ from their default
    source: str  # arXiv identifier, or the project

    @property
    def counts(self) -> str:
        """What `normalizer` counts in everything that adds up to an update: loss "tokens" or "sequences"."""
        return "tokens" if self.denominator == "tokens" else "sequences"


_UPDATE_TOKENS = (
    "divides by the number of loss tokens of the whole update: give normalizer "
    "(mask.sum() where this call is the whole update), or use loss_type='bnpo' for the tokens of this call"
)

LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "grpo": Loss(
            objective="clipped", reduction="sequence_means", denominator="sequences", source="arXiv 2402.03300"
        ),
        "bnpo": Loss(objective="clipped", reduction="tokens", denominator="tokens", source="TRL"),
        "dr_grpo": Loss(
            objective="clipped",
            reduction="tokens",
            denominator="sequences_times_length",
            needs={"max_completion_length": "divides by max_completion_length: give the length limit"},
            source="arXiv 2503.20783",
        ),
        "dapo": Loss(
            objective="clipped",
            reduction="tokens",
            denominator="tokens",
            needs={"normalizer": _UPDATE_TOKENS},
            source="arXiv 2503.14476",
        ),
        "cispo": Loss(
            objective="capped",
            reduction="tokens",
            denominator="tokens",
            clip_metrics=("clip_high",),
            needs={
                "normalizer": "divides by the loss tokens of the whole update: give normalizer",
                "epsilon_high": "cuts the ratio at epsilon_high: give the largest ratio, 5.0 say",
            },
            ignores=("delta",),
            source="arXiv 2506.13585",
        ),
        "sapo": Loss(
            objective="sigmoid",
            reduction="sequence_means",
            denominator="sequences",
            clip_metrics=(),
            ignores=("epsilon_high", "delta"),
            source="arXiv 2511.20347",
        ),
        "luspo": Loss(
            objective="clipped",
            reduction="tokens",
            denominator="sequences",
            needs={"importance_sampling_level": "needs 'sequence'"},
            source="TRL",
        ),
        # The released code, not the paper: no clip, and k3 bounded by 100 on output where others bound its input.
        "tinyllava_video_r1": Loss(
            objective="ratio",
            reduction="sequence_means",
            denominator="sequences",
            kl="k3_output",
            clip_metrics=(),
            is_on_policy=True,
            ignores=("epsilon_high", "delta", "importance_sampling_level", "kl_estimator"),
            source="code of arXiv 2504.09641",
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Everything that chooses the objective, as keywords of `grpo_loss` and `linear_grpo_loss`, or all at once there as
    `options`. What differs from call to call (tensors, groups, `normalizer`) is not here."""

    loss_type: str = "dapo"  # a key of LOSSES
    beta: float = 0.0  # weight of the KL term
    epsilon: float = 0.2  # the ratio is clipped below 1 - epsilon ...
    epsilon_high: float | None = None  # ... and above 1 + epsilon_high; None: epsilon. cispo: the largest ratio itself
    delta: float | None = None  # upper bound of the ratio where the advantage is negative
    sapo_temperature_pos: float = 1.0  # sapo, where the advantage is positive
    sapo_temperature_neg: float = 1.05  # sapo, elsewhere
    importance_sampling_level: str = "token"  # token | sequence
    kl_estimator: str = "k3"  # k1 | k2 | k3
    entropy_coef: float = 0.0  # weight of the entropy bonus
    max_completion_length: int | None = None  # read by dr_grpo only
    log_ratio_clamp: float | None = 20.0  # bound of |log ratio| before exp; None: bounded by overflow only
    sampler_correction: str = "token_truncate"  # one of SAMPLER_CORRECTIONS
    sampler_cap: float = 3.0  # largest trainer/sampler ratio: larger ones are cut to it or masked
    sampler_floor: float = 0.5  # icepop also masks smaller ones
    off_policy_threshold: float | None = None  # sequences with A < 0 that drifted further from their sampler are masked
    top_entropy_quantile: float = 1.0  # share of the call's loss tokens, those of highest entropy, that keep the loss
    scale_rewards: str = "group"  # divide by the deviation of the group | batch | none
    advantage_eps: float = 1e-4
    leave_one_out: bool = False  # baseline: mean of the other completions of the group
    temperature: float = 1.0  # logits are divided by it

    @property
    def loss(self) -> Loss:
        """The row of the table."""
        return LOSSES[self.loss_type]

    @property
    def reads_entropy(self) -> bool:
        return self.entropy_coef != 0 or self.top_entropy_quantile < 1

    def check(self) -> None:
        """Raise ValueError, with the value received and the remedy, for what no call could use.

        Needs nothing but the standard library. What depends on the call is checked by the call: that `normalizer`,
        `ref_logps` and the like are given where the loss reads them.
        """
        check_choice("loss_type", self.loss_type, tuple(LOSSES))
        check_choice("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        check_choice("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        check_choice("sampler_correction", self.sampler_correction, SAMPLER_CORRECTIONS)
        check_number("beta", self.beta, at_least=0)
        check_number("epsilon", self.epsilon, at_least=0)
        check_number("entropy_coef", self.entropy_coef)
        check_number("sampler_cap", self.sampler_cap, above=0)
        check_number("sampler_floor", self.sampler_floor, at_least=0)
        check_number("sapo_temperature_pos", self.sapo_temperature_pos, above=0)
        check_number("sapo_temperature_neg", self.sapo_temperature_neg, above=0)
        check_number("temperature", self.temperature, above=0)
        check_number("top_entropy_quantile", self.top_entropy_quantile, above=0)
        share = self.top_entropy_quantile
        if share > 1:
            raise ValueError(f"top_entropy_quantile={share}: give the share of tokens to keep, at most 1")
        if self.log_ratio_clamp is not None:
            check_number("log_ratio_clamp", self.log_ratio_clamp, above=0)
        if self.off_policy_threshold is not None:
            check_number("off_policy_threshold", self.off_policy_threshold, at_least=0)
        if self.epsilon_high is not None:
            check_number("epsilon_high", self.epsilon_high, at_least=0)
            dead = self.loss.objective == "capped" and self.epsilon_high == 0
            require(not dead, "epsilon_high=0: the largest ratio is 0, nothing would train; give 5.0 say")
        if self.max_completion_length is not None:
            check_count("max_completion_length", self.max_completion_length)
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        check_number("advantage_eps", self.advantage_eps, at_least=0)
        self._check_against_the_loss()

    def _check_against_the_loss(self) -> None:
        """Refuse what the chosen loss would ignore, ask for what it needs."""
        for name, default in OPTION_DEFAULTS.items():
            received = getattr(self, name)
            if name in self.loss.ignores and received != default:
                message = f"{name}={received!r} has no effect on loss_type={self.loss_type!r}"
                raise ValueError(f"{message}: leave it out, or use 'grpo'")
            self.check_need(name, received, is_missing=received == default)
        if self.delta is not None:
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            check_number("delta", self.delta, above=1 + high)

    def check_need(self, name: str, received: object, is_missing: bool) -> None:
        """Refuse a missing value that the loss needs: of an option, or of an argument that belongs to the call."""
        if is_missing and name in self.loss.needs:
            raise ValueError(f"{name}={received!r}: loss_type={self.loss_type!r} {self.loss.needs[name]}")


OPTION_DEFAULTS: Mapping[str, Any] = MappingProxyType({f.name: f.default for f in fields(LossOptions)})


_SCHEMA_TYPES = {"str": "str", "float": "float", "float | None": "float?", "int | None": "int?", "bool": "bool"}

# The fields as keyword arguments of an operator of torch, and their values for it.
OPTIONS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[str(f.type)]} {f.name}" for f in fields(LossOptions))


def option_values(options: LossOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in OPTION_DEFAULTS}


def choose_options(options: LossOptions | None, keywords: LossOptions) -> LossOptions:
    """The options given at once, or those of single keywords; an error where both say something."""
    if options is None:
        return keywords
    if not isinstance(options, LossOptions):
        raise ValueError(f"options is a {type(options).__name__}: give LossOptions")
    both = [
        f"{name}={getattr(keywords, name)!r}"
        for name, default in OPTION_DEFAULTS.items()
        if getattr(keywords, name) != default
    ]
    if both:
        raise ValueError(
            f"options and {', '.join(both)}: put it into the options (dataclasses.replace), not beside them"
        )
    return options


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not supported: use one of {', '.join(choices)}")


def check_number(name: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf) -> None:
    """Refuse what is not a finite Python number greater than `above` and not below `at_least`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Comparisons alone: inside torch.compile a float may be a symbol.
    ok = is_number and -math.inf < value < math.inf and value > above and value >= at_least  # type: ignore[operator]
    if not ok:
        bound = f" > {above}" if above > -math.inf else f" >= {at_least}" if at_least > -math.inf else ""
        raise ValueError(f"{name}={value!r}: give a finite number{bound}")


def check_count(name: str, value: object, *, at_least: int = 1) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    if not ok:
        raise ValueError(f"{name}={value!r}: give an integer >= {at_least}")
