"""Launches attention: which tiles, which form, and what fits.

Short spans (decode, drafts) have one program for each chunk of 512 keys, so that a long context keeps a whole card
busy; long ones, whose rows are many, walk over the chunks in turn. Both give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from ropewalk.backends.gpu.attention_kernel import attend_chunks, attend_whole, merge_chunks
from ropewalk.backends.gpu.step import GpuStep, RowBlocks
from ropewalk.backends.gpu.views import check_rows
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.base.errors import ShapeError

CHUNK = 512  # keys whose state is computed from nothing: part of the order of summation
SCRATCH_BYTES = 1 << 26  # bound for the states of chunks; where it is exceeded, there are rows enough without them
STATES_AT_ONCE = (4, 16)  # of a head that merge_chunks loads together: contexts up to 2048, and longer ones


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of a program and its warps."""

    rows: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of programs that walk over all chunks of many rows, and of those for short spans; BLOCK of the kernels.

    Results depend on the block alone, so all forms have the same.
    """

    long: Tile
    short: Tile
    block: int
    num_stages: int = 2


# By head size, products in float16: the widest that keep everything in registers (gpu_compile_matrix.py).
TILES = {
    64: Tiles(Tile(128, 8), Tile(16, 4), 64),
    128: Tiles(Tile(128, 8), Tile(16, 4), 64),
    256: Tiles(Tile(64, 8), Tile(16, 4), 32),
}
# Where a head is padded, its masks take registers. These are below 64 rows on all cards, or on 8.x and 12.x alone.
PADDED = {
    128: Tiles(Tile(64, 8), Tile(16, 4), 64),
    256: Tiles(Tile(32, 8), Tile(16, 4), 32),
}
# On 9.x and 10.x products of 64 rows have instructions of their own, which need not round like those of 16 rows: there
# all tiles of a head size are of one kind.
TILES_OF_WARPGROUPS = {
    64: Tiles(Tile(128, 8), Tile(64, 4), 64),
    128: Tiles(Tile(64, 4), Tile(64, 4), 32),
    256: Tiles(Tile(64, 8), Tile(64, 8), 16),
}
WARPGROUPS = (9, 10)  # compute capabilities; 12.x has the instructions of 8.x
FLOAT32 = Tiles(Tile(16, 4), Tile(16, 4), 16, 1)


def tiles(head_dim: int, fp16: bool, major: int) -> Tiles:
    """The tiles for a head size, products in float16 or float32, on a card of that compute capability."""
    size = max(64, padded(head_dim))
    if not fp16:
        return FLOAT32
    if 128 < head_dim < 256:
        return PADDED[size]
    if major in WARPGROUPS:
        return TILES_OF_WARPGROUPS[size]
    return PADDED[size] if 64 < head_dim < 128 else TILES[size]


def padded(head_dim: int) -> int:
    """Columns of a tile that holds a head: a power of two, 16 or more."""
    return max(16, triton.next_power_of_2(head_dim))


def attend(
    step: GpuStep, q: torch.Tensor, instance: int, window: int | None, out: torch.Tensor, exact: bool = False
) -> None:
    """Causal attention of the rows of a step over the pages of their sequences, into `out`.

    q, out: [T, Hq, D] float32 views, heads next to each other. instance: which keys and values of the pages. window:
    how many positions a row sees, its own included; None: all. exact: products in float32 also over float16 pages.
    """
    if step.num_rows == 0 == q.shape[0]:
        return
    _, num_heads, head_dim = q.shape
    num_kv_heads = _check(step, q, instance, window, out)
    fp16_pages = step.page_dtype == torch.float16
    fp16 = fp16_pages and not exact
    chosen = tiles(head_dim, fp16, _major(q.device))
    constants = {
        "Q_STRIDE": q.stride(0),
        "WINDOW": window or 0,
        "HKV": num_kv_heads,
        "G": num_heads // num_kv_heads,
        "D": head_dim,
        "DP": padded(head_dim),
        "CHUNK": CHUNK,
        "PAGE": PAGE_TOKENS,
        "BLOCK": chosen.block,
        "FP16_PAGES": fp16_pages,
        "FP16_DOT": fp16,
        "num_stages": chosen.num_stages,
        "enable_fp_fusion": False,
    }
    if step.long.num_blocks:
        _attend_whole(step, step.long, q, instance, out, chosen.long, constants)
    if step.short.num_blocks:
        chunks = _num_chunks(step.short, window)
        held = 4 * chunks * step.short.num_blocks * step.short.most_rows * num_heads * (head_dim + 2)
        if chunks == 1 or held > SCRATCH_BYTES:
            _attend_whole(step, step.short, q, instance, out, chosen.short, constants)
        else:
            _attend_chunks(step, step.short, q, instance, out, chunks, chosen.short, constants)


def _attend_whole(
    step: GpuStep, blocks: RowBlocks, q: torch.Tensor, instance: int, out: torch.Tensor, tile: Tile, constants: dict
) -> None:
    num_tiles = triton.cdiv(blocks.most_rows * constants["G"], tile.rows)
    attend_whole[(blocks.num_blocks, constants["HKV"] * num_tiles)](
        q,
        out,
        step.pages,
        step.positions,
        blocks.table,
        step.pages.shape[1],
        instance,
        _qk_scale(q.shape[2]),
        OUT_STRIDE=out.stride(0),
        ROWS=tile.rows,
        num_warps=tile.num_warps,
        **constants,
    )


def _attend_chunks(
    step: GpuStep,
    blocks: RowBlocks,
    q: torch.Tensor,
    instance: int,
    out: torch.Tensor,
    chunks: int,
    tile: Tile,
    constants: dict,
) -> None:
    _, num_heads, head_dim = q.shape
    shape = chunks, blocks.num_blocks, blocks.most_rows, num_heads
    states = torch.empty(*shape, 2, device=q.device)
    accs = torch.empty(*shape, head_dim, device=q.device)
    num_tiles = triton.cdiv(blocks.most_rows * constants["G"], tile.rows)
    attend_chunks[(blocks.num_blocks, constants["HKV"] * num_tiles, chunks)](
        q,
        states,
        accs,
        step.pages,
        step.positions,
        blocks.table,
        step.pages.shape[1],
        instance,
        blocks.most_rows,
        _qk_scale(head_dim),
        ROWS=tile.rows,
        num_warps=tile.num_warps,
        **constants,
    )
    merge_chunks[(blocks.num_blocks, blocks.most_rows, num_heads)](
        states,
        accs,
        out,
        step.positions,
        blocks.table,
        blocks.most_rows,
        OUT_STRIDE=out.stride(0),
        WINDOW=constants["WINDOW"],
        HEADS=num_heads,
        D=head_dim,
        DP=constants["DP"],
        CHUNK=CHUNK,
        AT_ONCE=STATES_AT_ONCE[chunks > STATES_AT_ONCE[0]],
        num_warps=1,
        enable_fp_fusion=False,
    )


def _num_chunks(blocks: RowBlocks, window: int | None) -> int:
    """How many chunks the rows of any block can see, from the first that its first row sees."""
    chunks = triton.cdiv(blocks.end, CHUNK)
    return chunks if window is None else min(chunks, (window + blocks.most_rows - 2) // CHUNK + 2)


def _qk_scale(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def _major(device: torch.device) -> int:
    """Compute capability; the interpreter takes the tiles of most cards."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def _check(step: GpuStep, q: torch.Tensor, instance: int, window: int | None, out: torch.Tensor) -> int:
    """The number of key/value heads, if everything fits together."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, kv_head_dim = step.page_shape
    fits = num_rows == step.num_rows and head_dim == kv_head_dim and num_heads % num_kv_heads == 0
    if (
        not fits
        or out.shape != q.shape
        or not 0 <= instance < step.num_instances
        or (window is not None and window < 1)
    ):
        raise ShapeError(
            f"attend: q {list(q.shape)}, out {list(out.shape)}, instance {instance} and window {window} do not fit "
            f"{step.num_rows} rows and pages of {step.num_instances} instances, {num_kv_heads} heads of {kv_head_dim}"
        )
    for name, view in (("q", q), ("out", out)):
        check_rows(f"attend: {name}", view)
    return num_kv_heads
