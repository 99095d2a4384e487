"""The packed experts of the CPU backend: all of them in memory, or those that were used last.

A model whose experts do not fit in memory keeps as many packed as may be held; an expert that a step needs and that is
not there is read from the files and packed, and those that were not used for longest make room for it. So what is in
use runs at the speed of memory, and what is cold at that of the disk.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from ropewalk import native
from ropewalk.backends.protocol import ExpertRoom
from ropewalk.base.errors import ShapeError
from ropewalk.gptq.linear import Expert
from ropewalk.native.core import _core

Pack = Callable[..., native.Linear]  # as `CpuBackend.pack`
READERS = 4  # experts that are read while another is packed; each takes its memory once more meanwhile


class ExpertMemory:
    """The packed experts of all layers of a model, in the order of their last use. room: None: all are held.

    A step calls `bring_` in the thread that computes, which no other does at the same time.
    """

    def __init__(self, room: ExpertRoom | None = None) -> None:
        self.room = room
        self.used_bytes = 0
        self._held: OrderedDict[tuple[CpuExperts, int], None] = OrderedDict()  # what was not used for longest first
        self._readers = None if room is None else ThreadPoolExecutor(READERS, "ropewalk-experts")

    def add_(self, layer: CpuExperts, number: int) -> None:
        """Count an expert that was packed."""
        self._held[layer, number] = None
        self.used_bytes += layer.sizes[number]

    def bytes_of(self, layer: CpuExperts) -> int:
        """Memory of the experts of one layer."""
        return sum(owner.sizes[number] for owner, number in self._held if owner is layer)

    def bring_(self, layer: CpuExperts, numbers: Sequence[int]) -> None:
        """Have these experts of a layer packed, at the cost of others where there is no room."""
        wanted = {(layer, number) for number in numbers}
        missing = [number for number in numbers if (layer, number) not in self._held]
        for key in wanted & self._held.keys():
            self._held.move_to_end(key)
        layer.read_ahead(missing)
        for number, expert in self._read(layer, missing):
            self._make_room_(max(layer.sizes.values()), wanted)
            layer.pack_(number, expert)
        self._make_room_(0, wanted)  # a step before this one may have needed more than there is room for

    def _read(self, layer: CpuExperts, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """These experts one by one; the next few are read in other threads meanwhile."""
        assert self._readers is not None
        rest = iter(numbers)
        coming: deque[tuple[int, Future[Expert]]] = deque()
        try:
            for number in islice(rest, READERS):
                coming.append((number, self._readers.submit(layer.read, number)))
            while coming:
                number, expert = coming.popleft()
                found = expert.result()
                for later in islice(rest, 1):
                    coming.append((later, self._readers.submit(layer.read, later)))
                yield number, found
        finally:  # one could not be read or packed
            for _, expert in coming:
                expert.cancel()

    def _make_room_(self, num_bytes: int, wanted: Set[tuple[CpuExperts, int]]) -> None:
        """Drop what was not used for longest, but for what the step that runs wants."""
        assert self.room is not None
        while self._held and self.used_bytes + num_bytes > self.room.num_bytes:
            layer, number = oldest = next(iter(self._held))
            if oldest in wanted:
                break
            del self._held[oldest]
            self.used_bytes -= layer.sizes[number]
            layer.core.drop(number)


class CpuExperts:
    """The experts of a layer. experts: read anew each time that one is asked for."""

    def __init__(self, pack: Pack, experts: Sequence[Expert], memory: ExpertMemory) -> None:
        if not len(experts):
            raise ShapeError("pack_experts: at least one expert is needed, none was given")
        self._pack, self._memory = pack, memory
        self._experts: Sequence[Expert] = experts
        first = experts[0]
        gate_up, down = pack([first.gate, first.up]), pack([first.down])
        fetch = None if memory.room is None else _fetch_through(weakref.ref(self))
        self.core = _core.Experts(len(experts), gate_up.in_features, down.in_features, fetch)
        self.sizes: dict[int, int] = {}  # bytes of each expert that was ever packed
        self._put_(0, gate_up, down)
        at_once = len(experts) if memory.room is None else int(len(experts) * memory.room.part)
        for number in range(1, at_once):
            self.pack_(number, self.read(number))
        if memory.room is None:
            self._experts = ()  # and with them the files

    @property
    def num_bytes(self) -> int:
        """Memory of those that are held."""
        return self._memory.bytes_of(self)

    def read(self, number: int) -> Expert:
        """An expert as it is stored. May be called in any thread."""
        return self._experts[number]

    def pack_(self, number: int, expert: Expert) -> None:
        """Put an expert in its place."""
        self._put_(number, self._pack([expert.gate, expert.up]), self._pack([expert.down]))

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Ask for experts that are in files, so that reading one overlaps with packing another."""
        ask = getattr(self._experts, "read_ahead", None)
        if ask is not None and numbers:
            ask(numbers)

    def bring_(self, numbers: Sequence[int]) -> None:
        """See `ExpertMemory`."""
        self._memory.bring_(self, numbers)

    def _put_(self, number: int, gate_up: native.Linear, down: native.Linear) -> None:
        self.core.put(number, gate_up.core, down.core)
        self.sizes[number] = gate_up.num_bytes + down.num_bytes
        self._memory.add_(self, number)


def _fetch_through(layer: weakref.ref[CpuExperts]) -> Callable[[Sequence[int]], None]:
    """What the core calls. Not the method itself: the core's objects would keep each other alive."""

    def fetch(numbers: Sequence[int]) -> None:
        found = layer()
        assert found is not None, "a layer runs without its experts"
        found.bring_(numbers)

    return fetch
