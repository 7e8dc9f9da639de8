"""Updating a model: GRPO and supervised fine-tuning, the loop around both, DeepSpeed, checkpoints, export."""
