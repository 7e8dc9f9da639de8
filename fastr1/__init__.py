"""fastr1: a GRPO trainer for small video language models."""

__version__ = "0.1.0"
