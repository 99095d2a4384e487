"""How bytes come from a file: by how many threads, and into which memory.

From the system's cache of files one thread reads at half the speed of memory or less, and on many machines memory that
is new to a process takes longer to get than to fill. So a large tensor is read by several threads, and one that is
packed and dropped leaves its memory to the next, where a backend brings such memory along.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

PIECE_BYTES = 4 << 20  # that one thread reads at a time
SMALL_BYTES = 1 << 20  # below it, malloc itself hands out again what was freed

Take = Callable[[int], torch.Tensor]  # so many bytes: [n] uint8, not initialised


class FileReader:
    """Threads that read, and where the memory for it comes from.

    take: memory for tensors of a megabyte or more; None: new memory for each.
    """

    def __init__(self, threads: int = 1, take: Take | None = None) -> None:
        self._take = take
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ropewalk-read") if threads > 1 else None

    def take(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the CPU, not initialised."""
        if self._take is None or num_bytes < SMALL_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8)
        return self._take(num_bytes)

    def read_pieces(self, num_bytes: int, read: Callable[[int, int], None]) -> None:
        """Call read(first, end) for pieces that make up `num_bytes`, by all threads; the first error is raised."""
        if self._pool is None or num_bytes < 2 * PIECE_BYTES:
            read(0, num_bytes)
            return
        pieces = [(first, min(first + PIECE_BYTES, num_bytes)) for first in range(0, num_bytes, PIECE_BYTES)]
        running = [self._pool.submit(read, *piece) for piece in pieces]
        errors = [error for future in running if (error := future.exception()) is not None]  # none writes after this
        if errors:
            raise errors[0]
