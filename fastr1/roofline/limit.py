"""How far a step was from the limit of its machine."""

from __future__ import annotations

from collections.abc import Mapping

from fastr1.reporting.statistics import Metrics
from fastr1.reporting.timing import training_seconds
from fastr1.roofline.machine import Machine
from fastr1.roofline.model import ModelShape
from fastr1.roofline.work import Cost, StepWork, step_costs

# What a phase of the trainer's clock does, where its name is not that of one cost.
_COSTS_OF_PHASE = {"rollout": ("prefill", "decode")}


class StepLimit:
    """The limit of the steps of one model on one machine."""

    def __init__(self, model: ModelShape, machine: Machine) -> None:
        self.model = model
        self.machine = machine

    def floor_seconds(self, work: StepWork) -> dict[str, float]:
        """The least time of each phase of `step_costs`; their sum is that of the step, one phase after another."""
        return {name: cost.floor_seconds(self.machine) for name, cost in step_costs(self.model, work).items()}

    def metrics(self, work: StepWork, seconds: Mapping[str, float]) -> Metrics:
        """How well the time was used that `PhaseTimer.pop_seconds` reports, all as shares of 1 but the rates.

        roofline/<phase>      least time over time, of each phase that was timed and has work
        roofline/step         the same of all phases, over all timed phases but evaluation and checkpoints
        mfu/train, mfu/step   FLOPs that the results need, over time × rate of matrix products; none counts twice for
                              being recomputed, and a prompt that is forwarded once counts once
        bandwidth/rollout     bytes of prefill and decode over time × rate of memory
        train_tokens_per_second   tokens forwarded in training

        A share that is not there was not timed. More than 1 says that the probe was disturbed, or that a small model
        stayed in the caches of a CPU, or that speculation drew several tokens of a completion in one step: decode is
        counted as a step for every token.
        """
        costs = step_costs(self.model, work)
        phases = {name: _timed(seconds, name) for name in (*_COSTS_OF_PHASE, *costs)}
        metrics: Metrics = {}
        for name, taken in phases.items():
            floor = sum(cost.floor_seconds(self.machine) for cost in _costs_of(name, costs))
            if taken and floor:
                metrics[f"roofline/{name}"] = floor / taken
        rate = self.machine.gemm_flops_per_second
        total = training_seconds(seconds)
        if total:
            metrics["roofline/step"] = sum(cost.floor_seconds(self.machine) for cost in costs.values()) / total
            metrics["mfu/step"] = sum(cost.model_flops for cost in costs.values()) / (total * rate)
        if taken := phases["train"]:
            metrics["mfu/train"] = costs["train"].model_flops / (taken * rate)
            metrics["train_tokens_per_second"] = work.num_iterations * _num_forwarded(work) / taken
        if taken := phases["rollout"]:
            moved = sum(float(cost.bytes.sum()) for cost in _costs_of("rollout", costs))
            metrics["bandwidth/rollout"] = moved / (taken * self.machine.bytes_per_second)
        return metrics


def _timed(seconds: Mapping[str, float], phase: str) -> float:
    """0 where the phase was not timed."""
    return seconds.get(f"time/{phase}_seconds", 0.0)


def _costs_of(phase: str, costs: Mapping[str, Cost]) -> list[Cost]:
    return [costs[name] for name in _COSTS_OF_PHASE.get(phase, (phase,))]


def _num_forwarded(work: StepWork) -> int:
    """Prompt tokens once per pass over them, and completion tokens."""
    return sum(
        group.prompt_length * (1 if work.shares_prefix else len(group.completion_lengths))
        + sum(group.completion_lengths)
        for group in work.trained
    )
