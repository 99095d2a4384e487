"""The kernels of linears as they are launched for models of 1 to 13 billion parameters: what the compile matrix builds.

CASES: (name, jit function, signature, constants, options of the compiler). A type "i32:16" is an integer that is a
multiple of 16, as Triton specialises it; pointers are aligned to 16 bytes. A name that ends with a target is what is
launched there instead of the one without.
"""

from __future__ import annotations

from typing import Any

from ropewalk.backends.gpu import tiles
from ropewalk.backends.gpu.activations_kernel import BLOCK, prepare_kernel
from ropewalk.backends.gpu.codes import BLOCK_ROWS
from ropewalk.backends.gpu.dense_kernel import dense_linear
from ropewalk.backends.gpu.experts_kernel import expert_linear, sum_expert_parts
from ropewalk.backends.gpu.linear_kernel import gptq_linear, sum_parts
from ropewalk.backends.gpu.low_rank_kernel import add_product

Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]


def quantised(bits: int, group: int, num_rows: int, exact: bool = False, generation: int = 8) -> Case:
    """gptq_linear for so many rows."""
    group_of_block = min(group, BLOCK_ROWS[bits])
    tile = tiles.linear_tile(num_rows, 4096, bits, group_of_block, exact, generation)
    split = num_rows <= tiles.SPLIT_ROWS
    pointers = dict(x_ptr="*fp32" if exact else "*fp16", row_scale_ptr="*fp32", words_ptr="*i32")
    pointers |= dict(high_ptr="*i16" if bits == 3 else "*i32", scales_ptr="*fp16", zeros_ptr="*u8")
    pointers |= dict(bias_ptr="*fp32", y_ptr="*fp32")
    sizes = dict(T="i32", N="i32:16", x_stride="i32:16", y_stride="i32:16", num_columns="i32:16")
    constants = dict(BITS=bits, GROUP=group_of_block, EXACT=exact, SCALED=not exact, HAS_BIAS=False)
    constants |= dict(ASSEMBLY=True, BT=tile.rows, BN=tile.columns, SPLITS=4, SPLIT_GRID=split)
    form = f"decode {tile.rows}" if num_rows <= 16 else f"batch {tile.rows}" if split else "prefill"
    card = " sm_90" if generation == tiles.HOPPER else ""
    name = f"linear {'exact ' if exact else ''}w{bits}g{group} {form}{card}"
    signature = pointers | sizes | dict(num_blocks="i32", group_shift="i32")
    return name, gptq_linear, signature, constants, _options(tile)


def experts(bits: int, group: int, num_rows: int, exact: bool = False) -> Case:
    """expert_linear for one pair of a program, or so many rows of an expert."""
    name, _, signature, constants, options = quantised(bits, group, num_rows, exact)
    sizes = dict(num_pairs="i32", N="i32:16", x_stride="i32:16", y_stride="i32:16", num_columns="i32:16")
    tables = dict(slots_ptr="*i32", experts_ptr="*i32", tiles_ptr="*i32", pairs_ptr="*i32")
    pointers = {key: kind for key, kind in signature.items() if key.endswith("_ptr")}
    signature = pointers | tables | sizes | dict(num_blocks="i32", group_shift="i32", pieces="i32")
    grouped = num_rows > 1
    constants = constants | dict(TIMES=1 if grouped else 8, GROUPED=grouped, SPLIT_GRID=not grouped)
    form = f"grouped {constants['BT']}" if grouped else f"decode {constants['BT']}"
    name = f"linear of experts {'exact ' if exact else ''}w{bits}g{group} {form}"
    return name, expert_linear, signature, constants, options


def dense(dtype: str, num_rows: int, ieee: bool = False) -> Case:
    """dense_linear for so many rows."""
    tile = tiles.dense_tile(num_rows, ieee, 8)
    split = num_rows <= tiles.SPLIT_ROWS
    signature = dict(x_ptr="*fp32", weight_ptr=f"*{dtype}", bias_ptr="*fp32", y_ptr="*fp32", T="i32", N="i32:16")
    signature |= dict(K="i32:16", x_stride="i32:16", y_stride="i32:16", num_blocks="i32")
    constants = dict(IEEE=ieee, EVEN=True, HAS_BIAS=False, BT=tile.rows, BN=tile.columns, BK=tiles.DENSE_FEATURES)
    constants |= dict(SPLITS=2, SPLIT_GRID=split)
    name = f"dense {dtype}{' ieee' if ieee else ''} {tile.rows}"
    return name, dense_linear, signature, constants, _options(tile)


def _options(tile: tiles.Tile) -> dict[str, Any]:
    return dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)


PREPARE: Case = (
    "prepare",
    prepare_kernel,
    dict(x_ptr="*fp32", order_ptr="*i32", experts_ptr="*i32", values_ptr="*fp16", scale_ptr="*fp32")
    | dict(x_stride="i32:16", in_features="i32:16", width="i32:16"),
    dict(TIMES=1, HAS_ORDER=True, BY_EXPERT=False, SCALED=True, BLOCK=BLOCK),
    dict(num_warps=8),
)
SUM: Case = (
    "sum of parts",
    sum_parts,
    dict(parts_ptr="*fp32", row_scale_ptr="*fp32", bias_ptr="*fp32", y_ptr="*fp32", T="i32", N="i32:16")
    | dict(y_stride="i32:16"),
    dict(SCALED=True, HAS_BIAS=False, SPLITS=4, BN=tiles.SUM_COLUMNS),
    dict(num_warps=tiles.SUM_WARPS, enable_fp_fusion=True),
)
LOW_RANK: Case = (
    "low rank",
    add_product,
    dict(h_ptr="*fp32", b_ptr="*fp32", tiles_ptr="*i32", y_ptr="*fp32", T="i32")
    | dict(h_stride="i32:16", b_stride="i32:16", y_stride="i32:16"),
    dict(BT=tiles.LOW_RANK_ROWS, BN=tiles.LOW_RANK_COLUMNS),
    dict(num_warps=tiles.LOW_RANK_WARPS, enable_fp_fusion=True),
)
PREPARE_EXPERTS: Case = (
    "prepare for experts",
    *PREPARE[1:3],
    PREPARE[3] | dict(TIMES=8, BY_EXPERT=True),
    PREPARE[4],
)
SUM_EXPERTS: Case = (
    "sum of parts of experts",
    sum_expert_parts,
    dict(parts_ptr="*fp32", row_scale_ptr="*fp32", bias_ptr="*fp32", y_ptr="*fp32", slots_ptr="*i32")
    | dict(experts_ptr="*i32", num_pairs="i32", N="i32:16", y_stride="i32:16", num_columns="i32:16"),
    dict(TIMES=1, SCALED=True, HAS_BIAS=False, SPLITS=4, BN=tiles.SUM_COLUMNS),
    dict(num_warps=tiles.SUM_WARPS, enable_fp_fusion=True),
)
CASES: list[Case] = [
    *(quantised(4, group, rows) for group in (128, 32) for rows in (1, 16, 32, 64, 512)),
    *(quantised(bits, group, rows) for bits, group in ((2, 64), (3, 128), (8, 128)) for rows in (1, 512)),
    *(quantised(bits, group, 512, generation=tiles.HOPPER) for bits, group in ((4, 128), (8, 128))),
    *(quantised(4, 128, rows, exact=True) for rows in (1, 512)),
    *(dense(dtype, rows) for dtype in ("fp16", "bf16") for rows in (1, 16, 512)),
    *(dense("fp32", rows, ieee=True) for rows in (1, 512)),
    *(experts(bits, 128, rows) for bits in (4, 8) for rows in (1, 16, 64)),
    *(experts(4, 32, rows) for rows in (1, 16, 32)),
    *(experts(4, 128, rows, exact=True) for rows in (1, 64)),
    PREPARE,
    PREPARE_EXPERTS,
    SUM,
    SUM_EXPERTS,
    LOW_RANK,
]
