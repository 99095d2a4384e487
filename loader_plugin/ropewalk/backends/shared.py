"""What backends have in common: what follows from being one place, the count of pages, and what they check."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.backends.protocol import (
    PAGE_TOKENS,
    BackendStep,
    CompiledLayer,
    OnePlace,
    PackedLinear,
    Page,
    ReadElsewhere,
    RowSpan,
)
from ropewalk.base.errors import ShapeError
from ropewalk.families.program import Program
from ropewalk.files.reader import FileReader
from ropewalk.gptq.linear import DenseLinear, GptqLinear
from ropewalk.gptq.rounding import RoundedRows, round_rows


class OneProcess:
    """What `Backend` says of other processes, for a backend that has none."""

    @property
    def bytes_elsewhere(self) -> int:
        """None."""
        return 0

    @property
    def steps_under_way(self) -> int:
        """Results are there when a step ends."""
        return 1

    def await_layers(self) -> ReadElsewhere:
        """There are none."""
        return ReadElsewhere({}, {})

    def await_step_(self, step: BackendStep) -> None:
        """The result is there."""

    def when_failed(self, function: Callable[[], None]) -> None:
        """Nothing can be lost."""

    def close(self) -> None:
        """Nothing is held."""


class AtHome:
    """What is outside of the layers, for a backend of several places: one of them, its home, computes it.

    _home: that of the head, where its weights are packed. Layers are packed by the backends of their places.
    """

    _home: OnePlace

    @property
    def file_reader(self) -> FileReader:
        """Of the home, for what is read in this process."""
        return self._home.file_reader

    def round_rows(self, weight: torch.Tensor, bits: int) -> RoundedRows:
        """At home."""
        return self._home.round_rows(weight, bits)

    def pack(self, parts: Sequence[GptqLinear | DenseLinear]) -> PackedLinear:
        """At home."""
        return self._home.pack(parts)

    def embed(self, table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """At home."""
        return self._home.embed(table, token_ids)

    def add_(self, x: torch.Tensor, y: torch.Tensor, weight: float) -> None:
        """At home."""
        self._home.add_(x, y, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """At home."""
        return self._home.rms_norm(x, weight, eps)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """At home."""
        return self._home.layer_norm(x, weight, bias, eps)


class SinglePlace(OneProcess):
    """What `Backend` says of places, for a backend that is one."""

    @property
    def shares(self: OnePlace) -> tuple[tuple[torch.device, float], ...]:
        """Whole pages on one device."""
        return ((self.device, 1.0),)

    @property
    def load_options(self: OnePlace) -> dict[str, Any]:
        """The same backend on the same device."""
        return {"backend": self.name, "compute": self.compute, "device": self.device}

    @property
    def file_reader(self) -> FileReader:
        """One thread, and new memory for everything."""
        return FileReader()

    def round_rows(self, weight: torch.Tensor, bits: int) -> RoundedRows:
        """In torch."""
        return round_rows(weight, bits)

    def places_of(self: OnePlace, weights_index: int) -> tuple[OnePlace, ...]:
        """Itself."""
        return (self,)

    def joined(self, weights_index: int, copies: Sequence[CompiledLayer], program: Program) -> CompiledLayer:
        """The one copy."""
        (compiled,) = copies
        return compiled

    def check_instances(self, layers: Sequence[CompiledLayer]) -> None:
        """Every layer runs here."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Which keys a query sees, and how their products become scores: see `Attend` in families/program.py."""

    window: int | None
    scale: float
    softcap: float | None


class PageCount:
    """Bytes of the pages in use, of at most `num_bytes`. May be used from any thread."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.used_bytes = 0
        self._lock = threading.RLock()  # a page may be dropped, by the collector, in a thread that holds it

    def take_(self, size: int) -> None:
        """Count a page as used.

        Raises:
            MemoryError: that would be more than the limit.
        """
        with self._lock:
            if self.used_bytes + size > self.num_bytes:
                raise MemoryError(f"a page of {size} bytes: {self.used_bytes} of {self.num_bytes} are in use")
            self.used_bytes += size

    def give_back_(self, size: int) -> None:
        """Count a page as free."""
        with self._lock:
            self.used_bytes -= size


def check_move(
    source: Sequence[Page],
    source_start: int,
    target: Sequence[Page],
    target_start: int,
    num_rows: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotations: Sequence[int | None],
) -> None:
    """Raises:
    ShapeError: rows that are to be moved lie outside their pages, or the tables do not fit them.
    """
    if num_rows < 0 or cos.ndim != 3 or cos.shape != sin.shape or cos.shape[1] != num_rows:
        raise ShapeError(f"move_rows: tables {list(cos.shape)} and {list(sin.shape)} do not fit {num_rows} rows")
    if any(table is not None and not 0 <= table < cos.shape[0] for table in rotations):
        raise ShapeError(f"move_rows: keys are to be turned by tables {list(rotations)} of {cos.shape[0]}")
    counts = {page.num_instances for page in (*source, *target)}
    if counts - {len(rotations)}:
        raise ShapeError(f"move_rows: {len(rotations)} rotations for pages of {sorted(counts)} layer instances")
    for name, pages, start in (("source", source, source_start), ("target", target, target_start)):
        if start < 0 or start + num_rows > PAGE_TOKENS * len(pages):
            raise ShapeError(
                f"move_rows: {name}: positions {start} to {start + num_rows} lie outside its {len(pages)} pages of "
                f"{PAGE_TOKENS}"
            )


def check_step(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> None:
    """Raises:
    ShapeError: rows, tables, spans and pages do not fit each other.
    """
    num_rows = sum(span.num_rows for span in spans)
    if x.ndim != 2 or x.shape[0] != num_rows or cos.ndim != 3 or cos.shape != sin.shape or cos.shape[1] != x.shape[0]:
        raise ShapeError(
            f"begin_step: x {list(x.shape)} and tables {list(cos.shape)}, {list(sin.shape)} do not fit {num_rows} rows"
        )
    for index, span in enumerate(spans):
        if span.start < 0 or span.start + span.num_rows > PAGE_TOKENS * len(span.pages):
            raise ShapeError(
                f"begin_step: span {index}: positions {span.start} to {span.start + span.num_rows} lie outside its "
                f"{len(span.pages)} pages of {PAGE_TOKENS}"
            )
