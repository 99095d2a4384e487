"""A step: new tokens of several sequences go through the model together.

    spans -> checked -> pages -> chunks of rows -> layers -> each span's logits

What a row gives depends on its own sequence alone, so a span has the result that it would have by itself. Spans with
the same adapters are put side by side, so that what adapters change is computed once for all their rows; results come
in the order of the spans. A step is computed in chunks of `max_input_len` rows, which may begin and end inside a span:
scratch memory depends on the chunk and never on the context. The residual stream is float32. RoPE methods whose
frequencies depend on the length take them for the length that a whole span reaches, so chunks never change a result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ropewalk.adapters.low_rank import UNCHANGED, embed_changed, head_changed
from ropewalk.adapters.request import Request
from ropewalk.adapters.sets import AdapterKey, ModelChange
from ropewalk.backends.protocol import BackendStep, Page, RowChange, RowSpan
from ropewalk.base.errors import CacheFullError, RequestError
from ropewalk.base.unthreaded import copy_
from ropewalk.model.cache import KvCache, Origin
from ropewalk.model.token_ids import TokenIds, checked_token_ids

if TYPE_CHECKING:
    from ropewalk.model.model import Model

# Where there are several processes, a long step is cut into so many chunks for each, so that the last one need not wait
# long for the first rows; but not into smaller ones, for which reading the weights would take longer than computing.
CHUNKS_EACH, LEAST_ROWS = 2, 32
LOGITS_ROWS = 256  # rows of the head computed at once: 131 MB for a vocabulary of 128,256
LOGITS_MODES = ("last", "all", "none")

Progress = Callable[[int, int], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Tokens that a step appends to the cache of one sequence.

    token_ids: [T] integers, appended at position `cache.length`.
    logits: "last" -> [1, V], "all" -> [T, V], "none" -> None; float32, on the device of the backend.
    adapters: loaded adapters with their weights and, if they are not for every layer, their layer instances:
        [("storm", 1.0), ("poet", 0.5, "10-11")] or the text "storm+poet:0.5@10-11" (see adapters/request.py).
    seq_len: the length that later calls will reach, if one sequence is passed in several calls: RoPE methods that
        depend on the length then use it from the start (default: the length that this call reaches). A cache that
        outgrows the length its keys are rotated for gets the frequencies of a somewhat longer one
        (`Rope.grown_length`), and its keys are brought along (`rope_growth` of `load_model`).
    """

    token_ids: TokenIds
    cache: KvCache
    logits: str = "last"
    adapters: Request | None = None
    seq_len: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """A span that can be computed. seq_len: the length that the frequencies are for. out: rows for the logits."""

    index: int  # in the order given
    ids: list[int]
    cache: KvCache
    change: ModelChange
    origin: Origin
    seq_len: int
    out: torch.Tensor | None

    @property
    def first_row(self) -> int:
        """The first of its rows whose logits are wanted."""
        return len(self.ids) - (0 if self.out is None else self.out.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows first..end of a span, at rows row..row + (end - first) of the chunk."""

    span: Checked
    first: int
    end: int
    row: int

    @property
    def last_row(self) -> int:
        """The row of the chunk after its last."""
        return self.row + self.end - self.first


def run_step(
    model: Model,
    spans: Sequence[Span],
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
    named: bool = True,
) -> list[torch.Tensor | None] | None:
    """The logits of each span; None once cancelled. named: refusals name the span, counted from 0.

    Raises:
        RequestError: as `Model.step`. Nothing has been written.
    """
    return run_checked(model, check_spans(model, spans, named), progress, cancelled, named)


def run_checked(
    model: Model, checked: Sequence[Checked], progress: Progress | None, cancelled: Cancelled | None, named: bool
) -> list[torch.Tensor | None] | None:
    """As `run_step`, for spans that can be computed."""
    running = RunningStep(model, checked, progress, cancelled)
    running.begin_(named)
    return running.finish_()


class RunningStep:
    """A step on its way: other steps may begin between `begin_` and `finish_`, for other caches.

    Where layers run in other processes, several chunks are under way at a time, in their order; a cache counts the
    positions of a chunk as soon as that is on its way, since whatever comes after it finds it done.
    """

    def __init__(
        self, model: Model, checked: Sequence[Checked], progress: Progress | None, cancelled: Cancelled | None
    ) -> None:
        self._model, self._checked = model, checked
        self._progress, self._cancelled = progress, cancelled
        self._rows = _side_by_side(checked)
        self._total, self._done = sum(len(span.ids) for span in checked), 0
        self._chunks = _chunks(self._rows, _rows_at_once(model, self._total))
        self._under_way: deque[tuple[list[Piece], torch.Tensor, BackendStep]] = deque()
        self._is_stopped = False

    def begin_(self, named: bool) -> None:
        """Take pages, and send the first chunks on their way. named: refusals name the span.

        Raises:
            CacheFullError: there are not so many pages. Nothing was written.
        """
        try:
            _reserve_(self._model, self._checked, named)
            self._model.follow_length_(self._checked)
            self._send_()
        except BaseException:
            self._settle_()
            raise

    def finish_(self) -> list[torch.Tensor | None] | None:
        """Compute the rest; the logits of each span, or None if it was cancelled.

        Raises:
            RankError: another process that computes is lost.
        """
        try:
            while self._under_way:
                pieces, x, step = self._under_way.popleft()
                self._model.backend.await_step_(step)
                _write_logits_(self._model, x, pieces)
                self._send_()
        finally:
            self._settle_()
        return None if self._is_stopped else [span.out for span in self._checked]

    def _send_(self) -> None:
        """Chunks, until as many are under way as keep all busy."""
        while len(self._under_way) < self._model.backend.steps_under_way and not self._is_stopped:
            pieces = next(self._chunks, None)
            if pieces is None:
                return
            self._send_chunk_(pieces)

    def _send_chunk_(self, pieces: list[Piece]) -> None:
        model, num_rows = self._model, pieces[-1].last_row
        for piece in pieces:
            model.store.slide_(piece.span.cache, piece.span.cache.length + piece.end - piece.first)
        steps = _Steps(self._done, num_rows, self._total, len(model.instances), self._progress, self._cancelled)
        found = _run_layers(model, pieces, steps)
        if found is None:
            self._is_stopped = True
            return
        for piece in pieces:
            span = piece.span
            span.cache.record_(span.ids[piece.first : piece.end], span.origin, span.seq_len)
        self._under_way.append((pieces, *found))
        self._done += num_rows

    def _settle_(self) -> None:
        for span in self._rows:
            self._model.store.settle_(span.cache)


def _rows_at_once(model: Model, total: int) -> int:
    """The rows of a chunk: fewer than could be, where several chunks keep several processes busy."""
    processes = model.backend.steps_under_way
    if processes == 1:
        return model.store.chunk_rows
    return min(model.store.chunk_rows, max(LEAST_ROWS, -(-total // (CHUNKS_EACH * processes))))


def check_spans(model: Model, spans: Sequence[Span], named: bool) -> list[Checked]:
    """Everything that a step needs to know of its spans, decided before anything is written."""
    if not isinstance(spans, (list, tuple)):
        raise RequestError(f"spans must be a list of ropewalk.Span, got {type(spans).__name__}")
    checked: list[Checked] = []
    seen: dict[int, int] = {}
    for index, span in enumerate(spans):
        try:
            if not isinstance(span, Span):
                raise RequestError(f"a step takes ropewalk.Span, got {type(span).__name__}")
            if id(span.cache) in seen:
                raise RequestError(
                    f"its cache is that of span {seen[id(span.cache)]} too; every span of a step needs its own"
                )
            checked.append(_checked(model, index, span))
            seen[id(span.cache)] = index
        except RequestError as error:
            if not named:
                raise
            raise type(error)(f"span {index}: {error}") from error
    return checked


def _checked(model: Model, index: int, span: Span) -> Checked:
    cache, logits, seq_len = span.cache, span.logits, span.seq_len
    model.check_owner(cache)
    if logits not in LOGITS_MODES:
        raise RequestError(f"logits must be one of {', '.join(map(repr, LOGITS_MODES))}, got {logits!r}")
    ids = checked_token_ids(span.token_ids, model.config.vocab_size)
    needed = cache.length + len(ids)
    if needed > cache.capacity:
        raise RequestError(
            f"{len(ids)} tokens do not fit: the cache holds {cache.length} of at most {cache.capacity} positions, "
            f"{needed} are needed; truncate the cache, shorten the input, or load the model with a max_seq_len of "
            f"at least {needed}"
        )
    change = model.adapter_change(span.adapters)
    end = model.reach_of(cache.reach, max(needed, checked_seq_len(seq_len) or 0))
    origin = Origin(model.frequencies(end), change.key)
    return Checked(index, ids, cache, change, origin, end, _new_logits(model, len(ids), logits))


def checked_seq_len(seq_len: Any) -> int | None:
    """Raises:
    RequestError: not a positive integer or None.
    """
    if seq_len is not None and (not isinstance(seq_len, int) or isinstance(seq_len, bool) or seq_len < 1):
        raise RequestError(f"seq_len must be a positive integer or None, got {seq_len!r}")
    return seq_len


def _reserve_(model: Model, spans: Sequence[Checked], named: bool) -> None:
    """Give the caches all pages that the step will write."""
    wanted = [(span.cache, span.cache.length + len(span.ids)) for span in spans]
    try:
        model.store.reserve_(wanted)
    except CacheFullError as error:
        if not named:
            raise
        ends = (end for end in range(1, len(wanted)) if model.store.missing_bytes(wanted[:end]))
        raise CacheFullError(f"span {next(ends, len(wanted)) - 1}: {error}") from error


def _side_by_side(spans: Sequence[Checked]) -> list[Checked]:
    """The spans, those with the same adapters together, in the order of their first."""
    places: dict[AdapterKey, int] = {}
    for span in spans:
        places.setdefault(span.change.key, len(places))
    return sorted(spans, key=lambda span: places[span.change.key])


def _new_logits(model: Model, num_tokens: int, logits: str) -> torch.Tensor | None:
    rows = {"last": 1, "all": num_tokens, "none": 0}[logits]
    if not rows:
        return None
    try:
        return torch.empty(rows, model.config.vocab_size, device=model.backend.device)
    except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as a RuntimeError
        raise RequestError(
            f'logits="all" of {rows} tokens takes {4 * rows * model.config.vocab_size} bytes, which could not be '
            f"allocated; give fewer tokens at a time"
        ) from error


def _chunks(spans: Sequence[Checked], most_rows: int) -> Iterator[list[Piece]]:
    """The rows of all spans one after the other, cut after every `most_rows`."""
    pieces: list[Piece] = []
    row = 0
    for span in spans:
        first = 0
        while first < len(span.ids):
            end = min(len(span.ids), first + most_rows - row)
            pieces.append(Piece(span, first, end, row))
            row, first = row + end - first, end
            if row == most_rows:
                yield pieces
                pieces, row = [], 0
    if pieces:
        yield pieces


def _run_layers(model: Model, pieces: Sequence[Piece], steps: _Steps) -> tuple[torch.Tensor, BackendStep] | None:
    """The residual stream of a chunk, [T, C] float32, which is after all layers once the step has been awaited; None
    once cancelled."""
    groups = _groups(pieces)
    x = _embedded(model, groups)  # [T, C]
    step = _begin(model, x, pieces)
    changed = [(change, rows) for change, rows in groups if change.key]
    for done, instance in enumerate(model.instances):
        if steps.is_cancelled():
            return None
        changes = [
            RowChange(rows[0].row, rows[-1].last_row, change.instances[done])
            for change, rows in changed
            if change.instances[done] is not UNCHANGED
        ]
        layer = model.weights.layers[instance.weights_index].compiled
        model.backend.run_layer_(step, layer, instance.cache_index, instance.residual_weight, changes)
        steps.report(done + 1)
    model.backend.end_step_(step)
    return x, step


def _groups(pieces: Sequence[Piece]) -> list[tuple[ModelChange, list[Piece]]]:
    """Neighbouring pieces with the same adapters."""
    grouped = groupby(pieces, key=lambda piece: piece.span.change.key)
    listed = (list(group) for _, group in grouped)
    return [(group[0].span.change, group) for group in listed]


def _embedded(model: Model, groups: Sequence[tuple[ModelChange, list[Piece]]]) -> torch.Tensor:
    parts = []
    for change, pieces in groups:
        ids = [token_id for piece in pieces for token_id in piece.span.ids[piece.first : piece.end]]
        token_ids = torch.tensor(ids, device=model.backend.device)
        parts.append(embed_changed(model.backend, model.weights.embeddings, token_ids, change.embeddings))
    x = parts[0] if len(parts) == 1 else torch.cat(parts)  # [T, C]
    scale = model.config.scales.embeddings
    return x if scale == 1.0 else x.mul_(scale)


def _begin(model: Model, x: torch.Tensor, pieces: Sequence[Piece]) -> BackendStep:
    spans, tables = [], []
    for _, group in groupby(pieces, key=lambda piece: piece.span.origin.frequencies):
        alike, positions = list(group), []
        for piece in alike:
            cache, num_rows = piece.span.cache, piece.end - piece.first
            positions.append(np.arange(cache.length, cache.length + num_rows))
            spans.append(RowSpan(num_rows, cache.length, tuple(held.page for held in cache.pages), _recent(cache)))
        found = model.rope.all_tables_at(np.concatenate(positions), alike[0].span.seq_len)
        tables.append(found)  # [tables, rows, R/2] each
    cos, sin = (torch.from_numpy(np.concatenate(parts, axis=1)).to(x.device) for parts in zip(*tables, strict=True))
    return model.backend.begin_step(x, cos, sin, spans)


def _recent(cache: KvCache) -> tuple[Page | None, ...]:
    """The pages in float16 in the places of all pages, if the format has any."""
    held = cache.recent
    return tuple(held[index].page if index in held else None for index in range(len(cache.pages))) if held else ()


def _write_logits_(model: Model, x: torch.Tensor, pieces: Sequence[Piece]) -> None:
    """Logits of the rows of a chunk that are asked for, written to the spans' `out`. x: [T, C].

    Rows whose adapters leave the head as it is go through it together: it is read once for all of them.
    """
    for head, group in groupby(pieces, key=lambda piece: piece.span.change.head):
        wanted = [
            (piece.span.out, row - piece.span.first_row, piece.row + row - piece.first)
            for piece in group
            for row in range(max(piece.first, piece.span.first_row), piece.end)
        ]  # (where to, its row there, row of the chunk)
        for first in range(0, len(wanted), LOGITS_ROWS):
            block = wanted[first : first + LOGITS_ROWS]
            normed = _normed(model, x[[row for *_, row in block]])  # [rows, C]
            logits = _scaled(model, head_changed(model.backend, normed, model.weights.head, head))  # [rows, V]
            for (out, low, _), row_logits in zip(block, logits, strict=True):
                copy_(out[low], row_logits)


def _normed(model: Model, x: torch.Tensor) -> torch.Tensor:
    """The final norm. x: [rows, C] -> [rows, C]."""
    norm, eps = model.weights.final_norm, model.config.norm_eps
    if model.config.table.centred:
        return model.backend.layer_norm(x, norm["norm"], norm.get("norm_bias"), eps)
    return model.backend.rms_norm(x, norm["norm"], eps)


def _scaled(model: Model, logits: torch.Tensor) -> torch.Tensor:
    """As the family scales and caps its logits. logits: [rows, V], changed."""
    scale, cap = model.config.scales.logits, model.config.scales.logits_cap
    if scale != 1.0:
        logits.mul_(scale)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The place of a chunk within its step, for the two callbacks."""

    first: int
    chunk_tokens: int
    total_tokens: int
    num_instances: int
    progress: Progress | None
    cancelled: Cancelled | None

    def is_cancelled(self) -> bool:
        return self.cancelled is not None and self.cancelled()

    def report(self, instances_done: int) -> None:
        if self.progress is not None:
            self.progress(self.first + self.chunk_tokens * instances_done // self.num_instances, self.total_tokens)
