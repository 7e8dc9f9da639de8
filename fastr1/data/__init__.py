"""Annotation files → samples, the policy for bad rows, and the order of samples. Nothing here opens a video."""
