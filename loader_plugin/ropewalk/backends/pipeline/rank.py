"""A rank after rank 0: it holds some layers, its part of all pages, and does what messages say, in their order.

    receive -> do my part -> pass it on          commands are passed on first, so that all ranks work at them at once

There are no threads here: messages come in the order in which rank 0 sent them, and each rank does them in that order,
so a page is taken before a step writes to it everywhere. While a rank computes one step, the next can wait in its
connection: this is how several steps keep all ranks busy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ropewalk.backends.pipeline.loaded import LoadedLayers, Report
from ropewalk.backends.pipeline.messages import Changes, End, Load, Loaded, LowRank, Move, Read, Step, Write
from ropewalk.backends.pipeline.shares import Shares
from ropewalk.backends.pipeline.wire import Arrived, Wire
from ropewalk.backends.protocol import LowRankPart, PackedLowRank, Page, PagePool, RowChange, RowSpan
from ropewalk.base.errors import RankError, RopewalkError
from ropewalk.config.cache_format import CacheFormat

NO_LIMIT_BYTES = 1 << 50  # rank 0 counts the bytes of all pages


class Rank:
    """load: reads the layers that a `Load` message gives to this rank."""

    def __init__(self, wire: Wire, load: Callable[[Load], LoadedLayers]) -> None:
        self._wire, self._load = wire, load
        self._rank = wire.rank
        self._shares: Shares
        self._loaded: LoadedLayers
        self._pools: dict[int, PagePool] = {}
        self._pages: dict[int, tuple[PagePool, Page | None]] = {}  # None: no instance of its runs here
        self._low_ranks: dict[int, PackedLowRank] = {}

    def run(self) -> None:
        """Until an `End` comes.

        Raises:
            RankError: a message cannot be understood. LostError: a connection is lost. Anything that goes wrong in a
                command: what this rank holds is then no longer what rank 0 believes.
        """
        with torch.inference_mode():
            while True:
                arrived = self._wire.receive()
                if isinstance(arrived.message, End):
                    self._wire.pass_on_(arrived)
                    return
                self._do(arrived)

    def _do(self, arrived: Arrived) -> None:
        match arrived.message:
            case Step() as step:
                self._compute_(step)
                self._wire.pass_on_(arrived)
            case Changes(changes):
                self._pass_on_(arrived)
                for change in changes:
                    self._change_(*change)
            case LowRank() as low_rank:
                self._pass_on_(arrived)
                if low_rank.to == self._rank:
                    self._low_ranks[low_rank.name] = self._loaded.backend.pack_low_rank(_parts(low_rank))
            case Move() as move:
                self._pass_on_(arrived)
                self._move_(move)
            case Read(number, page, values):
                self._wire.send_(Read(number, page, torch.cat([values, *(part.cpu() for part in self._memory(page))])))
            case Write(page, values):
                self._write_(page, values)
            case Load() as load:
                self._pass_on_(arrived)
                self._load_(load)
            case other:
                raise RankError(f"a {type(other).__name__} is no command for a rank")

    @property
    def _is_last(self) -> bool:
        return self._wire.after == 0

    def _pass_on_(self, arrived: Arrived) -> None:
        """What is no answer ends at the last rank."""
        if not self._is_last:
            self._wire.pass_on_(arrived)

    def _load_(self, load: Load) -> None:
        """Read my layers, then add my report to those of the ranks before, which read theirs meanwhile."""
        self._shares = Shares(tuple(load.firsts))
        try:
            self._loaded = self._load(load)
            report = self._loaded.report
        except RopewalkError as error:
            report = Report.of_error(load.names[self._rank], error)
        before = self._wire.receive().message if self._rank > 1 else Loaded([])
        if not isinstance(before, Loaded):
            raise RankError(f"a {type(before).__name__} came while layers were loaded")
        self._wire.send_(Loaded([*before.reports, report.to_json()]))

    def _change_(self, kind: str, name: int, *rest: int | str) -> None:
        if kind == "pool":
            num_kv_heads, head_dim, text = rest
            cache_format = CacheFormat.parse(text)
            self._pools[name] = self._loaded.backend.new_pool(num_kv_heads, head_dim, cache_format, NO_LIMIT_BYTES)
        elif kind == "take":
            pool, count = self._pools[rest[0]], self._shares.counts(rest[1])[self._rank]
            self._pages[name] = pool, pool.take(count, bool(rest[2])) if count else None
        elif kind == "copy":
            pool, source = self._pages[rest[0]]
            self._pages[name] = pool, None if source is None else pool.copy(source)
        else:
            del {"drop": self._pages, "forget": self._low_ranks, "unpool": self._pools}[kind][name]

    def _compute_(self, step: Step) -> None:
        """The layer instances of this rank, on the x of the message, in place."""
        first = self._shares.firsts[self._rank]
        ranks = [self._shares.rank_of(instance) for _, instance in step.uses.tolist()]
        mine = [place for place, rank in enumerate(ranks) if rank == self._rank]
        if not mine:
            return
        backend = self._loaded.backend
        x, cos, sin = (tensor.to(backend.device) for tensor in (step.x, step.cos, step.sin))
        open_step = backend.begin_step(x, cos, sin, self._spans(step))
        for place in mine:
            index, instance = step.uses[place].tolist()
            changes = [
                RowChange(low, high, {linear: self._low_ranks[name] for linear, name in change.items()})
                for at, low, high, change in step.changes
                if at == place
            ]
            layer, weight = self._loaded.layers[index], step.weights[place].item()
            backend.run_layer_(open_step, layer, instance - first, weight, changes)
        backend.end_step_(open_step)
        if x is not step.x:
            step.x.copy_(x)

    def _spans(self, step: Step) -> list[RowSpan]:
        pages = [None if name < 0 else self._pages[name][1] for name in step.pages.tolist()]
        spans, at = [], 0
        for num_rows, start, num_pages, num_recent in step.spans.tolist():
            middle, end = at + num_pages, at + num_pages + num_recent
            spans.append(RowSpan(num_rows, start, tuple(pages[at:middle]), tuple(pages[middle:end])))
            at = end
        return spans

    def _move_(self, move: Move) -> None:
        counts = self._shares.counts(len(move.rotations))
        if not counts[self._rank]:
            return
        backend, first = self._loaded.backend, self._shares.firsts[self._rank]
        rotations = [None if table < 0 else table for table in move.rotations[first : first + counts[self._rank]]]
        source, target = ([self._pages[name][1] for name in names] for names in (move.source, move.target))
        tables = move.cos.to(backend.device), move.sin.to(backend.device)
        backend.move_rows_(source, move.source_start, target, move.target_start, move.num_rows, *tables, rotations)

    def _memory(self, name: int) -> list[torch.Tensor]:
        """My part of a page."""
        pool, page = self._pages[name]
        return [] if page is None else pool.parts_of(page)

    def _write_(self, name: int, values: torch.Tensor) -> None:
        for part in self._memory(name):
            part.copy_(values[: len(part)])
            values = values[len(part) :]
        if not self._is_last:
            self._wire.send_(Write(name, values))


def _parts(message: LowRank) -> list[LowRankPart]:
    """The parts as `Backend.pack_low_rank` takes them."""
    parts, row, place = [], 0, 0
    for rank, width in zip(message.ranks, message.widths, strict=True):
        a, b = message.a[row : row + rank], message.b[place : place + rank * width].view(width, rank)
        parts.append(LowRankPart(a.clone(), b.clone()))  # backends may keep what they are given, and a view all of it
        row, place = row + rank, place + rank * width
    return parts


def flat_parts(parts: Sequence[LowRankPart]) -> tuple[list[int], list[int], torch.Tensor, torch.Tensor]:
    """(ranks, widths, a, b) of a `LowRank` message, from which `_parts` makes the parts again."""
    ranks, widths = [part.a.shape[0] for part in parts], [part.b.shape[0] for part in parts]
    a = torch.cat([part.a for part in parts]).contiguous()
    b = torch.cat([part.b.reshape(-1) for part in parts])
    return ranks, widths, a, b
