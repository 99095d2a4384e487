"""Several backends for one model: each runs the layer instances of its place, in the order in which they run.

    x on the home device -> place 0: instances 0..n -> place 1: the next ones -> ... -> home, the last place

The home place holds what is outside of the layers: embeddings, final norm and head. The residual stream moves once for
each change of place; positions, tables and pages are where the instances of a place run.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from ropewalk.backends.protocol import (
    BackendStep,
    CompiledLayer,
    LayerChange,
    LowRankPart,
    OnePlace,
    PackedLinear,
    PackedLowRank,
    Page,
    PagePool,
    RowChange,
    RowSpan,
)
from ropewalk.backends.shared import AtHome, OneProcess, check_move
from ropewalk.base.errors import ConfigError
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A backend, and how many layer instances it runs."""

    backend: OnePlace
    num_instances: int


@dataclass(frozen=True, slots=True, eq=False)
class SplitLayer:
    """A layer as compiled for each of the places (by number) that run it."""

    compiled: Mapping[int, CompiledLayer]


class SplitBackend(AtHome, OneProcess):
    """The protocol of `backends/protocol.py` over several backends.

    places: at least one, in the order in which their instances run. weights_indices: which layer each instance runs;
    a layer is packed in every place that runs it.
    """

    def __init__(self, places: Sequence[Place], weights_indices: Sequence[int]) -> None:
        self.places = tuple(places)
        self.firsts = tuple(accumulate((place.num_instances for place in places[:-1]), initial=0))
        self._home = places[-1].backend
        self._weights_indices = tuple(weights_indices)

    @property
    def name(self) -> str:
        """Of all backends, such as "gpu+cpu"."""
        return "+".join(dict.fromkeys(place.backend.name for place in self.places))

    @property
    def compute(self) -> str:
        """Of all backends, such as "fp16+int8"."""
        return "+".join(dict.fromkeys(place.backend.compute for place in self.places))

    @property
    def arithmetic(self) -> str:
        """Of all places, with the layer instances of each, such as "20 of gpu fp16 8.9, 12 of cpu int8 avx2"."""
        return ", ".join(f"{place.num_instances} of {place.backend.arithmetic}" for place in self.places)

    @property
    def device(self) -> torch.device:
        """Of the last place."""
        return self._home.device

    @property
    def shares(self) -> tuple[tuple[torch.device, float], ...]:
        """The part of a page that lies on each device."""
        total = sum(place.num_instances for place in self.places)
        devices = dict.fromkeys(place.backend.device for place in self.places)
        return tuple(
            (device, sum(p.num_instances for p in self.places if p.backend.device == device) / total)
            for device in devices
        )

    @property
    def load_options(self) -> dict[str, Any]:
        """Of the first place."""
        return self.places[0].backend.load_options

    def computing(self, compute: str) -> None:
        """Weights on a card are laid out for one arithmetic."""
        return None

    def places_of(self, weights_index: int) -> tuple[OnePlace, ...]:
        """The backends of the places that run this layer."""
        return tuple(self.places[number].backend for number in self._numbers_of(weights_index))

    def joined(self, weights_index: int, copies: Sequence[CompiledLayer], program: Program) -> SplitLayer:
        """The copies by the numbers of their places."""
        return SplitLayer(dict(zip(self._numbers_of(weights_index), copies, strict=True)))

    def _numbers_of(self, weights_index: int) -> tuple[int, ...]:
        """The places that run this layer; one that runs nowhere is kept in the last."""
        pairs = enumerate(self._weights_indices)
        found = sorted({self.place_of(instance) for instance, index in pairs if index == weights_index})
        return tuple(found) or (len(self.places) - 1,)

    def place_of(self, instance: int) -> int:
        """The place that runs a layer instance."""
        return max(place for place, first in enumerate(self.firsts) if first <= instance)

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> SplitLowRank:
        """Kept as given until a place needs it."""
        return SplitLowRank(self.places, parts)

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: SplitLowRank) -> None:
        """On the last place."""
        self._home.add_low_rank_(y, x, change.at(len(self.places) - 1))

    def linear(self, x: torch.Tensor, weight: PackedLinear, change: SplitLowRank | None = None) -> torch.Tensor:
        """On the last place."""
        return self._home.linear(x, weight, None if change is None else change.at(len(self.places) - 1))

    def new_pool(self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int) -> SplitPool:
        """Pages with a part in each place."""
        pools = [place.backend.new_pool(num_kv_heads, head_dim, cache_format, num_bytes) for place in self.places]
        return SplitPool(self, pools, num_bytes)

    def move_rows_(
        self,
        source: Sequence[SplitPage],
        source_start: int,
        target: Sequence[SplitPage],
        target_start: int,
        num_rows: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotations: Sequence[int | None],
    ) -> None:
        """In every place that has a part of the pages."""
        check_move(source, source_start, target, target_start, num_rows, cos, sin, rotations)
        for number, place in enumerate(self.places):
            parts = [[page.parts[number] for page in pages] for pages in (source, target)]
            if None in (*parts[0], *parts[1]):
                continue  # an order with fewer instances runs nothing here
            end = self.firsts[number + 1] if number + 1 < len(self.firsts) else len(rotations)
            turned = rotations[self.firsts[number] : end]
            device = place.backend.device
            tables = cos.to(device), sin.to(device)
            place.backend.move_rows_(parts[0], source_start, parts[1], target_start, num_rows, *tables, turned)

    def begin_step(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> SplitStep:
        """x: [T, C] on the device of the last place, where it is again after the last instance."""
        return SplitStep(self, x, cos, sin, spans)

    def run_layer_(
        self, step: SplitStep, layer: SplitLayer, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        """In the place of the instance, to which the rows move first."""
        place = self.place_of(instance)
        moved = [replace(change, change=_at(place, change.change)) for change in changes]
        local = instance - self.firsts[place]
        self.places[place].backend.run_layer_(step.at(place), layer.compiled[place], local, weight, moved)

    def end_step_(self, step: SplitStep) -> None:
        """The last place ends its part, and the rows are where they were given."""
        step.end_()

    def check_instances(self, layers: Sequence[SplitLayer]) -> None:
        """layers: what each instance of an order runs.

        Raises:
            ConfigError: an instance runs in a place for which its layer was not loaded.
        """
        for instance, layer in enumerate(layers):
            place = self.place_of(instance)
            if place not in layer.compiled:
                raise ConfigError(
                    f"layer_order: instance {instance} would run on {self._described(place)}, and its layer was loaded "
                    f"for {', '.join(self._described(other) for other in layer.compiled)}: load the model with this "
                    "layer_order, or without gpu_layers and gpu_split"
                )

    def _described(self, place: int) -> str:
        backend = self.places[place].backend
        return f"{backend.name} on {backend.device}"


class SplitLowRank:
    """A low-rank change, packed for a place when that place first needs it."""

    def __init__(self, places: Sequence[Place], parts: Sequence[LowRankPart]) -> None:
        self._places, self._parts = places, tuple(parts)
        self._packed: dict[int, PackedLowRank] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Memory in all places that have needed it, and of the matrices as given."""
        given = sum(4 * (part.a.numel() + part.b.numel()) for part in self._parts)
        return given + sum(packed.num_bytes for packed in self._packed.values())

    def at(self, place: int) -> PackedLowRank:
        """As the backend of that place holds it."""
        with self._lock:
            if place not in self._packed:
                self._packed[place] = self._places[place].backend.pack_low_rank(self._parts)
            return self._packed[place]


class SplitPool:
    """Pages in parts: each place has the keys and values of its own instances."""

    def __init__(self, backend: SplitBackend, pools: Sequence[PagePool], num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._backend, self._pools = backend, tuple(pools)

    @property
    def used_bytes(self) -> int:
        """Memory of the pages in use, in all places."""
        return sum(pool.used_bytes for pool in self._pools)

    @property
    def layout(self) -> str:
        """What the bytes of the parts mean, and which instances they have."""
        parts = zip(self._backend.firsts, self._pools, strict=True)
        return "split-1 " + " | ".join(f"from {first}: {pool.layout}" for first, pool in parts)

    def page_bytes(self, num_instances: int, recent: bool = False) -> int:
        """Memory of a page, in all places."""
        pairs = zip(self._pools, self._counts(num_instances), strict=True)
        return sum(pool.page_bytes(count, recent) for pool, count in pairs)

    def take(self, num_instances: int, recent: bool = False) -> SplitPage:
        """A part from the pool of each place."""
        size = self.page_bytes(num_instances, recent)
        if self.used_bytes + size > self.num_bytes:
            raise MemoryError(f"a page of {size} bytes: {self.used_bytes} of {self.num_bytes} are in use")
        pairs = zip(self._pools, self._counts(num_instances), strict=True)
        return SplitPage(tuple(pool.take(count, recent) if count else None for pool, count in pairs), num_instances)

    def copy(self, page: SplitPage) -> SplitPage:
        """Each part from its own pool."""
        pairs = zip(self._pools, page.parts, strict=True)
        return SplitPage(tuple(None if part is None else pool.copy(part) for pool, part in pairs), page.num_instances)

    def parts_of(self, page: SplitPage) -> list[torch.Tensor]:
        """The memory of the part in each place, on the device of that place."""
        pairs = zip(self._pools, page.parts, strict=True)
        return [memory for pool, part in pairs if part is not None for memory in pool.parts_of(part)]

    def written_(self, page: SplitPage, parts: list[torch.Tensor]) -> None:
        """They are the memory itself."""

    def _counts(self, num_instances: int) -> list[int]:
        """Instances in each place: an order may be shorter than the one that the places were chosen for, or longer."""
        ends = (*(min(first, num_instances) for first in self._backend.firsts), num_instances)
        return [end - first for first, end in pairwise(ends)]


@dataclass(frozen=True, slots=True, eq=False)
class SplitPage:
    """A part for each place; None where no instance runs there."""

    parts: tuple[Page | None, ...]
    num_instances: int


class SplitStep:
    """The rows of a step, now in one place and now in another."""

    def __init__(
        self, backend: SplitBackend, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]
    ) -> None:
        self._backend = backend
        self._home, self._cos, self._sin, self._spans = x, cos, sin, spans
        self._x, self._place = x, -1
        self._step: BackendStep = None

    def at(self, place: int) -> BackendStep:
        """The rows in that place, moved there if they are not."""
        if place != self._place:
            self._move_(place)
        return self._step

    def end_(self) -> None:
        """The caller reads the tensor that it gave."""
        if self._place >= 0:
            self._backend.places[self._place].backend.end_step_(self._step)
        if self._x is not self._home:
            self._home.copy_(self._x)

    def _move_(self, place: int) -> None:
        if self._place >= 0:
            self._backend.places[self._place].backend.end_step_(self._step)
        backend = self._backend.places[place].backend
        if self._x.device != backend.device:
            self._x = self._x.to(backend.device)
        spans = [
            replace(span, pages=_parts(span.pages, place), recent=_parts(span.recent, place)) for span in self._spans
        ]
        cos, sin = self._cos.to(backend.device), self._sin.to(backend.device)
        self._step, self._place = backend.begin_step(self._x, cos, sin, spans), place


def _parts(pages: Sequence[SplitPage | None], place: int) -> tuple[Page | None, ...]:
    """The parts of some pages in a place; None for a page that is not there."""
    return tuple(None if page is None else page.parts[place] for page in pages)


def _at(place: int, change: LayerChange) -> LayerChange:
    """A layer's change as packed for a place."""
    return {name: packed.at(place) for name, packed in change.items()}
