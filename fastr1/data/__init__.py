"""Annotation readers, prompt templates, the tokenizer and the resumable prompt sampler. Nothing here opens a video."""
