"""Distance to the physical limit: what a machine can do (`machine`), what a step costs (`model`, `work`), and how far
apart they are (`limit`).

model = describe_model(policy, read_config(path))
limit = StepLimit(model, probe_machine(policy.device, policy.dtype))
metrics = limit.metrics(work, timer.pop_seconds())
"""

from fastr1.roofline.limit import StepLimit
from fastr1.roofline.machine import Machine, probe_machine
from fastr1.roofline.model import ModelShape, VisualFlops, describe_model
from fastr1.roofline.work import Cost, GroupWork, StepWork, step_costs

__all__ = [
    "Cost",
    "GroupWork",
    "Machine",
    "ModelShape",
    "StepLimit",
    "StepWork",
    "VisualFlops",
    "describe_model",
    "probe_machine",
    "step_costs",
]
