"""The backend on graphics cards: the operations of backends/protocol.py as Triton kernels."""
