"""Launches attention: over which keys, in which form, and what fits.

Short spans (decode, drafts) have one program for each chunk of 512 keys, so that a long context keeps a whole card
busy; long ones, whose rows are many, walk over the chunks in turn. Both give the same bits.

    one kind of pages     short: a state for each chunk, merged        long: the result
    a recent window       the same, of both kinds of pages             long: one state of each kind, merged
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ropewalk.backends.gpu.attention_kernel import attend_chunks, attend_whole
from ropewalk.backends.gpu.attention_tiles import CHUNK, SCRATCH_BYTES, STATES_AT_ONCE, Tile, Tiles, tiles
from ropewalk.backends.gpu.chunk_kernel import ALL, OLDER, RECENT
from ropewalk.backends.gpu.heads import turn_
from ropewalk.backends.gpu.layout import PageLayout
from ropewalk.backends.gpu.merge_kernel import merge_chunks
from ropewalk.backends.gpu.step import GpuStep, RowBlocks
from ropewalk.backends.gpu.views import check_rows
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.backends.shared import Seen
from ropewalk.base.errors import ShapeError


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Keys of one kind that rows attend to. q: [T, Hq, D] as they are turned; pages: [spans, width] addresses."""

    number: int  # ALL, OLDER or RECENT
    q: torch.Tensor
    pages: torch.Tensor
    layout: PageLayout
    tiles: Tiles


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Attention of the rows of a step in one layer instance, as all its launches have it. fp16: how it multiplies."""

    step: GpuStep
    parts: tuple[Part, ...]
    instance: int
    seen: Seen
    out: torch.Tensor
    fp16: bool

    @property
    def within(self) -> int:
        """Positions of the recent window, 0 without one."""
        return self.step.layout.cache_format.recent

    def run_(self, blocks: RowBlocks, tile_of: str) -> None:
        """For the rows of these blocks. tile_of: "long" or "short", the tiles of a program."""
        chunks = [self._num_chunks(part, blocks) for part in self.parts]
        shape = blocks.num_blocks, blocks.most_rows, self.out.shape[1]
        fit = 4 * sum(chunks) * math.prod(shape) * (self.out.shape[2] + 2) <= SCRATCH_BYTES
        split = tile_of == "short" and sum(chunks) > 1 and fit
        if not split and len(self.parts) == 1:
            self._attend_whole(self.parts[0], blocks, tile_of, self.out, None)
            return
        counts = chunks if split else [1] * len(chunks)
        states = torch.empty(sum(counts), *shape, 2, device=self.out.device)
        accs = torch.empty(sum(counts), *shape, self.out.shape[2], device=self.out.device)
        first = 0
        for part, count in zip(self.parts, counts, strict=True):
            here = slice(first, first + count)
            if split:
                self._attend_chunks(part, blocks, states[here], accs[here])
            else:
                self._attend_whole(part, blocks, tile_of, accs[here], states[here])
            first += count
        self._merge(blocks, states, accs, counts, not split)

    def _attend_whole(
        self, part: Part, blocks: RowBlocks, tile_of: str, out: torch.Tensor, states: torch.Tensor | None
    ) -> None:
        tile = getattr(part.tiles, tile_of)
        attend_whole[self._grid(blocks, tile)](
            part.q,
            out,
            states,
            *self._sources(part, blocks),
            OUT_STRIDE=self.out.stride(0),
            **self._constants(part, tile),
        )

    def _attend_chunks(self, part: Part, blocks: RowBlocks, states: torch.Tensor, accs: torch.Tensor) -> None:
        tile = part.tiles.short
        attend_chunks[(*self._grid(blocks, tile), states.shape[0])](
            part.q, states, accs, *self._sources(part, blocks), **self._constants(part, tile)
        )

    def _merge(
        self, blocks: RowBlocks, states: torch.Tensor, accs: torch.Tensor, counts: Sequence[int], is_whole: bool
    ) -> None:
        _, num_heads, head_dim = self.out.shape
        layout = self.step.layout
        merge_chunks[(blocks.num_blocks, blocks.most_rows, num_heads)](
            states,
            accs,
            self.out,
            self.step.positions,
            blocks.table,
            blocks.most_rows,
            counts[0] * blocks.num_blocks * blocks.most_rows * num_heads,
            OUT_STRIDE=self.out.stride(0),
            WINDOW=self.seen.window or 0,
            WITHIN=self.within,
            HEADS=num_heads,
            D=head_dim,
            DP=layout.columns,
            CHUNK=CHUNK,
            PAGE=PAGE_TOKENS,
            AT_ONCE=1 if is_whole else STATES_AT_ONCE[max(counts) > STATES_AT_ONCE[0]],
            IS_WHOLE=is_whole,
            H=layout.turns["H_VALUES"],
            ROOT=layout.turns["ROOT"],
            num_warps=1,
            enable_fp_fusion=False,
        )

    def _grid(self, blocks: RowBlocks, tile: Tile) -> tuple[int, int]:
        num_kv_heads = self.step.layout.num_kv_heads
        group = self.out.shape[1] // num_kv_heads
        return blocks.num_blocks, num_kv_heads * triton.cdiv(blocks.most_rows * group, tile.rows)

    def _sources(self, part: Part, blocks: RowBlocks) -> tuple[Any, ...]:
        """The arguments that both forms have behind their results."""
        positions, width = self.step.positions, part.pages.shape[1]
        return (
            part.pages,
            positions,
            blocks.table,
            width,
            self.instance,
            blocks.most_rows,
            self.seen.scale * math.log2(math.e),
        )

    def _constants(self, part: Part, tile: Tile) -> dict[str, Any]:
        return {
            "Q_STRIDE": part.q.stride(0),
            "PART": part.number,
            "WINDOW": self.seen.window or 0,
            "WITHIN": self.within,
            "SOFTCAP": self.seen.softcap or 0.0,
            "G": self.out.shape[1] // part.layout.num_kv_heads,
            "ROWS": tile.rows,
            "CHUNK": CHUNK,
            "BLOCK": part.tiles.block,
            "FP16_DOT": self.fp16,
            "num_warps": tile.num_warps,
            "num_stages": part.tiles.num_stages,
            "enable_fp_fusion": False,
            **part.layout.constants,
        }

    def _num_chunks(self, part: Part, blocks: RowBlocks) -> int:
        """How many chunks the rows of any block can see of a part, from the first that its first row sees."""
        seen = [self.seen.window] if self.seen.window is not None else []
        if part.number == RECENT.value:
            seen.append(self.within + PAGE_TOKENS - 1)  # its window begins with a page
        chunks = triton.cdiv(blocks.end, CHUNK)
        return min([chunks, *((size + blocks.most_rows - 2) // CHUNK + 2 for size in seen)])


def attend(step: GpuStep, q: torch.Tensor, instance: int, seen: Seen, out: torch.Tensor, exact: bool = False) -> None:
    """Causal attention of the rows of a step over the pages of their sequences, into `out`.

    q, out: [T, Hq, D] float32 views, heads next to each other. instance: which keys and values of the pages. exact:
    products in float32 whatever the pages are.
    """
    if step.num_rows == 0 == q.shape[0]:
        return
    _check(step, q, instance, seen, out)
    layout, fp16 = step.layout, not (exact or step.layout.has_float32)
    major = _major(q.device)
    turned = q
    if layout.turns_keys:
        turned = torch.empty(q.shape, device=q.device)
        turn_(q, turned)
    sources = [(ALL.value, turned, step.pages, layout)]
    if step.recent is not None:
        sources = [(OLDER.value, turned, step.pages, layout), (RECENT.value, q, step.recent, layout.exact)]
    parts = tuple(
        Part(*source, tiles(source[-1], fp16, major, len(sources) > 1, seen.softcap is not None)) for source in sources
    )
    attention = Attention(step, parts, instance, seen, out, fp16)
    if step.long.num_blocks:
        attention.run_(step.long, "long")
    if step.short.num_blocks:
        attention.run_(step.short, "short")
    if layout.turns_values and step.recent is None:
        turn_(out, out)


def _major(device: torch.device) -> int:
    """Compute capability; the interpreter takes the tiles of most cards."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def _check(step: GpuStep, q: torch.Tensor, instance: int, seen: Seen, out: torch.Tensor) -> None:
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, kv_head_dim = step.layout.num_kv_heads, step.layout.head_dim
    fits = num_rows == step.num_rows and head_dim == kv_head_dim and num_heads % num_kv_heads == 0
    if (
        not fits
        or out.shape != q.shape
        or not 0 <= instance < step.num_instances
        or (seen.window is not None and seen.window < 1)
    ):
        raise ShapeError(
            f"attend: q {list(q.shape)}, out {list(out.shape)}, instance {instance} and window {seen.window} do not "
            f"fit {step.num_rows} rows and pages of {step.num_instances} instances, {num_kv_heads} heads of "
            f"{kv_head_dim}"
        )
    for name, view in (("q", q), ("out", out)):
        check_rows(f"attend: {name}", view)
