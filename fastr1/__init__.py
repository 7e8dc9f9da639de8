"""fastr1: a fast GRPO trainer for small video language models."""

__version__ = "0.1.0"
