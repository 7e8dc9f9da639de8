"""The Triton kernels. Importing this room needs triton; the public doors do so only where a kernel runs."""
