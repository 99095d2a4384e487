"""The GPU backend: Triton kernels, from one source for NVIDIA and AMD cards and for Triton's interpreter.

Only `device` can be imported without Triton. docs/gpu.md says what runs and what has been shown.
"""
