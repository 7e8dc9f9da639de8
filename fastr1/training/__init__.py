"""Updating a model: GRPO and supervised fine-tuning, the loop around both, DeepSpeed, checkpoints, export."""

import logging

# DeepSpeed warns while it is imported where there is no GPU; the first line of a run names its device.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
