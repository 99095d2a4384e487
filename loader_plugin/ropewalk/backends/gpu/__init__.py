"""The backend on graphics cards: Triton kernels that also run in Triton's interpreter on a CPU."""
