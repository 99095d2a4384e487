"""A low-rank change, packed by the ranks that need it, when they first do."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from ropewalk.backends.pipeline.chain import Chain
from ropewalk.backends.pipeline.messages import LowRank
from ropewalk.backends.pipeline.rank import flat_parts
from ropewalk.backends.protocol import Backend, LowRankPart, PackedLowRank


class PipelineLowRank:
    """parts: as for `Backend.pack_low_rank`; kept, since any rank may come to need them. home: of rank 0."""

    def __init__(self, chain: Chain, home: Backend, parts: Sequence[LowRankPart]) -> None:
        self._chain, self._home, self._parts = chain, home, tuple(parts)
        self._lock = threading.Lock()
        self._here: PackedLowRank | None = None
        self._names: dict[int, int] = {}  # by which ranks know it

    @property
    def num_bytes(self) -> int:
        """Memory on rank 0."""
        given = sum(4 * (part.a.numel() + part.b.numel()) for part in self._parts)
        return given + (0 if self._here is None else self._here.num_bytes)

    def here(self) -> PackedLowRank:
        """As the backend of rank 0 holds it."""
        with self._lock:
            if self._here is None:
                self._here = self._home.pack_low_rank(self._parts)
            return self._here

    def name_on(self, rank: int) -> int:
        """The name by which a rank knows it, to which it is sent if it does not."""
        with self._lock:
            if rank not in self._names:
                name = self._chain.new_number()
                self._chain.send_(LowRank(rank, name, *flat_parts(self._parts)))
                self._names[rank] = name
                weakref.finalize(self, self._chain.change_, "forget", name).atexit = False
            return self._names[rank]
