"""The backend of a model whose layer instances run in several processes: the protocol, as rank 0 gives it.

    x at home -> the instances of rank 0, here -> rank 1 -> rank 2 -> ... -> home

Home, rank 0, holds what is outside of the layers (embeddings, final norm, head) and its own share of instances, on a
backend of one place; the other ranks hold theirs (rank.py). Rows, tables and which pages they use travel with x in one
message around the ring, so a step crosses each connection once. Between `end_step_`, which sends it, and
`await_step_`, other steps can be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ropewalk.backends.pipeline.chain import LOADED, Chain
from ropewalk.backends.pipeline.loaded import Report
from ropewalk.backends.pipeline.low_rank import PipelineLowRank
from ropewalk.backends.pipeline.messages import Loaded, Move, Step
from ropewalk.backends.pipeline.pages import PipelinePage, PipelinePool
from ropewalk.backends.pipeline.shares import Shares
from ropewalk.backends.protocol import (
    BackendStep,
    CompiledLayer,
    LayerChange,
    LowRankPart,
    OnePlace,
    PackedLinear,
    Page,
    ReadElsewhere,
    RowChange,
    RowSpan,
)
from ropewalk.backends.shared import AtHome, check_move
from ropewalk.base.errors import ConfigError
from ropewalk.base.unthreaded import copy_
from ropewalk.config.cache_format import CacheFormat
from ropewalk.families.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class PipelineLayer:
    """A layer as the ranks that run it hold it. local: as compiled for rank 0, if it is among `ranks`."""

    weights_index: int
    ranks: tuple[int, ...]
    local: CompiledLayer | None


class PipelineBackend(AtHome):
    """The protocol of `backends/protocol.py` over several processes.

    home: where rank 0 computes. weights_indices: which layer each instance runs; each rank packs those that it runs.
    """

    def __init__(self, home: OnePlace, chain: Chain, shares: Shares, weights_indices: Sequence[int]) -> None:
        self._home, self._chain, self.shares_of_ranks = home, chain, shares
        self._weights_indices = tuple(weights_indices)
        self.reports: tuple[Report, ...] = ()

    @property
    def name(self) -> str:
        """Of the pipeline: its ranks know theirs."""
        return "pipeline"

    @property
    def compute(self) -> str:
        """Of all ranks."""
        return self._home.compute

    @property
    def arithmetic(self) -> str:
        """That of all ranks, which the bits do not depend on otherwise; with the shares of each if they differ."""
        found = [self._home.arithmetic, *(report.arithmetic for report in self.reports)]
        if len(set(found)) == 1:
            return found[0]
        return ", ".join(
            f"from {first}: {each}" for first, each in zip(self.shares_of_ranks.firsts, found, strict=True)
        )

    @property
    def device(self) -> torch.device:
        """Of rank 0."""
        return self._home.device

    @property
    def shares(self) -> tuple[tuple[torch.device, float], ...]:
        """As if all pages lay on rank 0: ranks of one machine share its memory, others are taken to have as much."""
        return ((self._home.device, 1.0),)

    @property
    def load_options(self) -> dict[str, Any]:
        """Of rank 0: another model runs in its process alone."""
        return self._home.load_options

    @property
    def steps_under_way(self) -> int:
        """One for each rank."""
        return self.shares_of_ranks.size

    def computing(self, compute: str) -> None:
        """The other ranks have compiled their layers for one arithmetic."""
        return None

    def when_failed(self, function: Callable[[], None]) -> None:
        """Call this once, in some thread, if a rank is lost."""
        self._chain.when_failed(function)

    def close(self) -> None:
        """End the other ranks."""
        self._chain.close()

    def await_layers(self) -> ReadElsewhere:
        """Until all ranks have read their layers.

        Raises:
            RopewalkError: as a rank says. RankError: one is lost.
        """
        answer = self._chain.answer(LOADED)
        assert isinstance(answer, Loaded)
        self.reports = tuple(Report(**report) for report in answer.reports)
        for report in self.reports:
            report.check()
        return ReadElsewhere(
            {name: bytes.fromhex(text) for report in self.reports for name, text in report.samples.items()},
            {name: bytes.fromhex(text) for report in self.reports for name, text in report.second_samples.items()},
        )

    @property
    def bytes_elsewhere(self) -> int:
        """Of the layers of all other ranks."""
        return sum(report.num_bytes for report in self.reports)

    def places_of(self, weights_index: int) -> tuple[OnePlace, ...]:
        """Rank 0, if it runs this layer; the other ranks read theirs themselves."""
        return (self._home,) if 0 in self._ranks_of(weights_index) else ()

    def joined(self, weights_index: int, copies: Sequence[CompiledLayer], program: Program) -> PipelineLayer:
        """The copy of rank 0, if it has one, and the ranks that have others."""
        return PipelineLayer(weights_index, self._ranks_of(weights_index), copies[0] if copies else None)

    def layers_of(self, rank: int, num_layers: int) -> list[int]:
        """The layers, of so many, that a rank holds."""
        return [index for index in range(num_layers) if rank in self._ranks_of(index)]

    def _ranks_of(self, weights_index: int) -> tuple[int, ...]:
        return self.shares_of_ranks.ranks_of(weights_index, self._weights_indices)

    def check_instances(self, layers: Sequence[PipelineLayer]) -> None:
        """layers: what each instance of an order runs.

        Raises:
            ConfigError: an instance would run on a rank that has not read its layer.
        """
        for instance, layer in enumerate(layers):
            rank = self.shares_of_ranks.rank_of(instance)
            if rank not in layer.ranks:
                raise ConfigError(
                    f"layer_order: instance {instance} would run on rank {rank} of the pipeline, and its layer was "
                    f"read by {' and '.join(f'rank {other}' for other in layer.ranks)}: load the model with this "
                    "layer_order, or without a pipeline"
                )

    def pack_low_rank(self, parts: Sequence[LowRankPart]) -> PipelineLowRank:
        """Kept as given until a rank needs it."""
        return PipelineLowRank(self._chain, self._home, parts)

    def add_low_rank_(self, y: torch.Tensor, x: torch.Tensor, change: PipelineLowRank) -> None:
        """At home."""
        self._home.add_low_rank_(y, x, change.here())

    def linear(self, x: torch.Tensor, weight: PackedLinear, change: PipelineLowRank | None = None) -> torch.Tensor:
        """At home."""
        return self._home.linear(x, weight, None if change is None else change.here())

    def new_pool(self, num_kv_heads: int, head_dim: int, cache_format: CacheFormat, num_bytes: int) -> PipelinePool:
        """Pages with a part on each rank."""
        local = self._home.new_pool(num_kv_heads, head_dim, cache_format, num_bytes)
        # Pages of the CPU have one instance after the other: those of all ranks together are one of a single process.
        firsts = "" if self._home.name == "cpu" else f"pipeline-1 {','.join(map(str, self.shares_of_ranks.firsts))} "
        heads, layout = (num_kv_heads, head_dim), f"{firsts}{local.layout}"
        return PipelinePool(self._chain, self.shares_of_ranks, local, heads, cache_format, num_bytes, layout)

    def move_rows_(
        self,
        source: Sequence[PipelinePage],
        source_start: int,
        target: Sequence[PipelinePage],
        target_start: int,
        num_rows: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        rotations: Sequence[int | None],
    ) -> None:
        """On all ranks; those after rank 0 may be at it when this returns, and what is sent next comes after it."""
        check_move(source, source_start, target, target_start, num_rows, cos, sin, rotations)
        names = [[page.number for page in pages] for pages in (source, target)]
        tables = [-1 if table is None else table for table in rotations]
        contiguous = cos.contiguous(), sin.contiguous()
        self._chain.send_(Move(names[0], source_start, names[1], target_start, num_rows, tables, *contiguous))
        mine = self.shares_of_ranks.counts(len(rotations))[0]
        if mine:
            local = [[page.local for page in pages] for pages in (source, target)]
            self._home.move_rows_(local[0], source_start, local[1], target_start, num_rows, cos, sin, rotations[:mine])

    def begin_step(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]
    ) -> PipelineStep:
        """x: [T, C] on the device of rank 0, where it is again once the step has been awaited."""
        return PipelineStep(x, cos, sin, spans)

    def run_layer_(
        self, step: PipelineStep, layer: PipelineLayer, instance: int, weight: float, changes: Sequence[RowChange]
    ) -> None:
        """Here if it is an instance of rank 0; others are noted for the message."""
        if self.shares_of_ranks.rank_of(instance):
            step.elsewhere.append((layer.weights_index, instance, weight, changes))
            return
        if step.local is None:
            step.local = self._home.begin_step(step.x, step.cos, step.sin, _local_spans(step.spans))
        here = [replace(change, change=_at_home(change.change)) for change in changes]
        self._home.run_layer_(step.local, layer.local, instance, weight, here)

    def end_step_(self, step: PipelineStep) -> None:
        """Rank 0 ends its part, and the rows are on their way through the others."""
        if step.local is not None:
            self._home.end_step_(step.local)
        if step.elsewhere:
            step.number = self._chain.new_number()
            self._chain.send_(self._message(step, step.number))

    def await_step_(self, step: PipelineStep) -> None:
        """Until the rows are back.

        Raises:
            RankError: a rank is lost.
        """
        if step.number is not None:
            answer = self._chain.answer(step.number)
            assert isinstance(answer, Step)
            copy_(step.x, answer.x)

    def _message(self, step: PipelineStep, number: int) -> Step:
        changes = []
        for place, (_, instance, _, rows) in enumerate(step.elsewhere):
            rank = self.shares_of_ranks.rank_of(instance)
            for each in rows:
                names = {linear: packed.name_on(rank) for linear, packed in each.change.items()}
                changes.append([place, each.first, each.end, names])
        sizes = [[span.num_rows, span.start, len(span.pages), len(span.recent)] for span in step.spans]
        pages = [-1 if page is None else page.number for span in step.spans for page in (*span.pages, *span.recent)]
        return Step(
            number,
            changes,
            torch.tensor(sizes, dtype=torch.int64),
            torch.tensor(pages, dtype=torch.int64),
            torch.tensor([use[:2] for use in step.elsewhere], dtype=torch.int64),
            torch.tensor([use[2] for use in step.elsewhere], dtype=torch.float64),
            step.cos,
            step.sin,
            step.x,
        )


class PipelineStep:
    """The rows of a step. local: they are at the instances of rank 0. elsewhere: (layer, instance, weight, changes) of
    all others, in their order. number: of the message, once it has been sent."""

    def __init__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, spans: Sequence[RowSpan]) -> None:
        self.x, self.cos, self.sin, self.spans = x, cos, sin, spans
        self.local: BackendStep | None = None
        self.elsewhere: list[tuple[int, int, float, Sequence[RowChange]]] = []
        self.number: int | None = None


def _local_spans(spans: Sequence[RowSpan]) -> list[RowSpan]:
    return [replace(span, pages=_local(span.pages), recent=_local(span.recent)) for span in spans]


def _local(pages: Sequence[PipelinePage | None]) -> tuple[Page | None, ...]:
    return tuple(None if page is None else page.local for page in pages)


def _at_home(change: LayerChange) -> Mapping[str, Any]:
    """A layer's change as packed for rank 0."""
    return {name: packed.here() for name, packed in change.items()}
