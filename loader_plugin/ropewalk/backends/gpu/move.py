"""Launches the move of rows of pages. See move_kernel.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ropewalk.backends.gpu.move_kernel import move_rows
from ropewalk.backends.gpu.pages import GpuPage
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.backends.shared import check_move
from ropewalk.base.errors import ShapeError

ROWS = 16  # that a program reads before it writes
WARPS = 8  # of a program: with 4, what decodes and turns rows of 4 bits would spill


def move_rows_(
    source: Sequence[GpuPage],
    source_start: int,
    target: Sequence[GpuPage],
    target_start: int,
    num_rows: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotations: Sequence[int | None],
) -> None:
    """Positions source_start.. of `source` to target_start.. of `target`.

    cos, sin: [tables, num_rows, R/2] float32; rotations: the table that turns the keys of each instance, None for none.
    """
    check_move(source, source_start, target, target_start, num_rows, cos, sin, rotations)
    if num_rows == 0:
        return
    kinds = {(page.layout, page.num_instances) for page in (*source, *target)}
    if len(kinds) > 1:
        raise ShapeError(f"move_rows: the pages differ: {sorted(f'{each} of {count}' for each, count in kinds)}")
    layout, num_instances = kinds.pop()
    half, device = cos.shape[2], source[0].memory.device
    if 2 * half > layout.head_dim:
        raise ShapeError(f"move_rows: tables {list(cos.shape)} do not fit heads of {layout.head_dim}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or not table.is_contiguous() or table.device != device:
            raise ShapeError(f"move_rows: {name} must be contiguous float32 on {device}, got {table.dtype}")
    # What the pages before the first row hold is not looked at: addresses count from a page of their own.
    from_page, to_page = source_start // PAGE_TOKENS, target_start // PAGE_TOKENS
    addresses = [page.address for page in (*source[from_page:], *target[to_page:])]
    tables = [-1 if table is None else table for table in rotations]
    numbers = torch.tensor([*addresses, *tables], dtype=torch.int64).to(device)
    move_rows[(num_instances, layout.num_kv_heads, 2)](
        numbers,
        numbers[len(source) - from_page :],
        numbers[len(addresses) :],
        cos,
        sin,
        source_start % PAGE_TOKENS,
        target_start % PAGE_TOKENS,
        num_rows,
        HALF=half,
        ROWS=ROWS,
        num_warps=WARPS,
        enable_fp_fusion=False,
        **layout.turns,
        **layout.constants,
    )
