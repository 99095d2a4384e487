"""A set of threads with an instruction set, and what they do at most."""

from __future__ import annotations

import os

import numpy as np
import torch

from ropewalk.base.errors import NativeError
from ropewalk.base.limits import MAX_THREADS
from ropewalk.native.core import _core


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best first; "scalar" is always there."""
    return tuple(_core.available_isas())


class Runtime:
    """An instruction set and a set of threads.

    isa: one of `available_isas()`; None for the best. threads: None for the number of processors this process may use.

    Raises:
        NativeError: an instruction set that this machine lacks, or a number of threads below 1 or above 1024.
    """

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        threads = usable_processors() if threads is None else threads
        if not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise NativeError(f"threads must be between 1 and {MAX_THREADS}, got {threads!r:.40}")
        self.core = _core.Runtime(isa or "", threads)

    @property
    def isa(self) -> str:
        """The name of the instruction set in use."""
        return self.core.isa

    @property
    def threads(self) -> int:
        """The number of threads, the calling one included."""
        return self.core.threads

    @property
    def scratch_bytes(self) -> int:
        """Memory held between calls: prepared activations, attention tiles, at most 128 MiB of freed large results.

        It grows with T, never with S.
        """
        return self.core.scratch_bytes

    def limits(self, num_floats: int) -> MachineLimits:
        """To measure this machine by, with so many floats of memory to read: a multiple of 64."""
        return MachineLimits(self, num_floats)


class SpareMemory:
    """Memory in huge pages for large arrays that come and go: what is dropped, up to 128 MiB, serves the next."""

    def __init__(self) -> None:
        self._core = _core.SpareMemory()

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, not initialised. Its memory comes back when the last view of it is dropped."""
        return torch.from_numpy(self._core.take(num_bytes))

    @property
    def num_bytes(self) -> int:
        """Of what came back and waits."""
        return self._core.num_bytes


class MachineLimits:
    """What this machine does at most with the threads and instructions of a runtime; whoever calls takes the time."""

    def __init__(self, runtime: Runtime, num_floats: int) -> None:
        self._runtime = runtime
        memory = _core.AlignedBytes(4 * num_floats).array().view(np.float32)  # [num_floats], in huge pages
        memory[:] = 1.0
        self._memory = memory

    def read(self) -> int:
        """Read all of the memory once; returns its bytes."""
        _core.probe_read(self._runtime.core, self._memory)
        return self._memory.nbytes

    def multiply(self, kind: str, steps: int) -> int:
        """Products on operands that stay in registers, `steps` rounds of 12 vectors on each thread; returns the
        operations, a product and a sum being two. kind: "int8" (codes with activations of 8 bits) or "f32"."""
        return _core.probe_products(self._runtime.core, kind, steps)


def usable_processors() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
