"""Kernels of rows and attention as they are compiled for cards: what gpu_compile_matrix.py goes through.

Each case is (name, kernel, dtypes of its arguments, constants, options). Tiles are those that the backend takes.
"""

from __future__ import annotations

import triton

from ropewalk.backends.gpu import (
    attention_kernel,
    experts_kernel,
    feed_forward_kernel,
    heads_kernel,
    merge_kernel,
    move_kernel,
    rows_kernel,
)
from ropewalk.backends.gpu.attention_tiles import CHUNK, STATES_AT_ONCE, tiles
from ropewalk.backends.gpu.chunk_kernel import ALL, OLDER, RECENT
from ropewalk.backends.gpu.heads import TILE_HEADS
from ropewalk.backends.gpu.layout import PageLayout
from ropewalk.backends.gpu.move import ROWS as MOVED_ROWS
from ropewalk.backends.gpu.move import WARPS as MOVE_WARPS
from ropewalk.backends.protocol import PAGE_TOKENS
from ropewalk.config.cache_format import CODE_BITS, CacheFormat

CODED = tuple(CODE_BITS)
POINTERS = {
    **dict.fromkeys(("pages_ptr", "recent_ptr", "positions_ptr", "blocks_ptr", "spans_ptr", "ids_ptr"), "*i64"),
    **dict.fromkeys(("source_ptr", "target_ptr", "rotations_ptr"), "*i64"),
    **{"order_ptr": "*i32", "experts_ptr": "*i32", "values_ptr": "*fp16", "table_ptr": "*bf16"},
}
SCALARS = {
    **dict.fromkeys(("width", "instance", "most_rows", "older_states"), "i32"),
    **dict.fromkeys(("source_start", "target_start", "num_rows"), "i32"),
    **dict.fromkeys(("eps", "weight", "qk_scale"), "fp32"),
}


def signature(kernel, constants: dict) -> dict[str, str]:
    """Dtypes of the arguments that are no constants: float32 pointers unless their name says otherwise."""
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: SCALARS.get(name) or POINTERS.get(name, "*fp32") for name in names}


def case(name: str, kernel, constants: dict, **options) -> tuple:
    """One line of CASES."""
    return name, kernel, signature(kernel, constants), constants, {"enable_fp_fusion": False, **options}


def attention(
    head_dim: int,
    form: str,
    major: int = 8,
    fp16: bool = True,
    window: int = 0,
    group: int = 4,
    cache_type: str = "fp16",
    part: int = ALL.value,
    softcap: float = 0.0,
) -> tuple:
    """Attention over pages with 8 key/value heads. form: "long", "short" or "chunks"; major: whose tiles.

    part: of the keys of a format with a recent window, of 256 positions.
    """
    layout = PageLayout(8, head_dim, CacheFormat.parse(cache_type))
    chosen = tiles(layout, fp16, major, part != ALL.value, softcap > 0)
    tile = chosen.long if form == "long" else chosen.short
    constants = {
        "Q_STRIDE": (group + 2) * 8 * head_dim,
        "PART": part,
        "WINDOW": window,
        "WITHIN": 256 if part else 0,
        "SOFTCAP": softcap,
        "G": group,
        "ROWS": tile.rows,
        "CHUNK": CHUNK,
        "BLOCK": chosen.block,
        "FP16_DOT": fp16,
        **layout.constants,
    }
    if form != "chunks":
        constants["OUT_STRIDE"] = group * 8 * head_dim
        if part == ALL.value:
            constants["states_ptr"] = None
    kernel = attention_kernel.attend_chunks if form == "chunks" else attention_kernel.attend_whole
    details = ("" if cache_type == "fp16" else f" {cache_type}") + {0: "", 1: " older", 2: " recent"}[part]
    details += (
        (f" window {window}" if window else "")
        + (" cap" if softcap else "")
        + ("" if fp16 else " exact")
        + (" sm_90" if major == 9 else "")
    )
    name = f"attention D{head_dim} {form}{details}"
    return case(name, kernel, constants, num_warps=tile.num_warps, num_stages=chosen.num_stages)


def merging(head_dim: int, at_once: int, within: int = 0) -> tuple:
    """The merge of the states of chunks, for 32 heads. within: of a recent window, over values in 4 bits."""
    constants = {
        **{"OUT_STRIDE": 32 * head_dim, "WINDOW": 0, "WITHIN": within, "HEADS": 32, "D": head_dim},
        **{"DP": triton.next_power_of_2(head_dim), "CHUNK": CHUNK, "PAGE": PAGE_TOKENS, "AT_ONCE": at_once},
        **{"IS_WHOLE": at_once == 1, "H": head_dim if within else 1, "ROOT": head_dim**-0.5},
    }
    name = f"merge chunks D{head_dim} {at_once} at once{' recent' if within else ''}"
    return case(name, merge_kernel.merge_chunks, constants, num_warps=1)


def appending(cache_type: str) -> tuple:
    """Rotation and writing to pages, of 32 query heads and 8 of keys and values."""
    layout = PageLayout(8, 128, CacheFormat.parse(cache_type))
    recent = bool(layout.cache_format.recent)
    constants = {
        **{"Q_STRIDE": 6144, "K_STRIDE": 6144, "V_STRIDE": 6144, "HQ": 32, "HALF": 64, "HB": 64, "HAS_RECENT": recent},
        **({} if recent else {"recent_ptr": None}),
        **layout.turns,
        **layout.constants,
    }
    name = f"rotate and append D128{'' if cache_type == 'fp16' else f' {cache_type}'}"
    return case(name, heads_kernel.rotate_append, constants | {"TILE": TILE_HEADS}, num_warps=4)


def moving(cache_type: str) -> tuple:
    """Rows moved to other positions."""
    layout = PageLayout(8, 128, CacheFormat.parse(cache_type))
    constants = {"HALF": 64, "ROWS": MOVED_ROWS, **layout.turns, **layout.constants}
    return case(f"move rows D128 {cache_type}", move_kernel.move_rows, constants, num_warps=MOVE_WARPS)


def activations(name: str, kernel, **constants) -> tuple:
    """A producer of activations with act-order."""
    made = {"HAS_ORDER": True, "SCALED": True, "WRITES_FLOAT32": False, **constants}
    if kernel is rows_kernel.norm_activations:
        made = {"CENTRED": False, "HAS_BIAS": False, **made}
    return case(name, kernel, made, num_warps=8)


def inner(name: str, number: int, by_expert: bool = False) -> tuple:
    """A gate, or, of the experts of rows, gates in their orders."""
    size = 768 if by_expert else 11008
    made = {"X_STRIDE": 2 * size, "SIZE": size, "WIDTH": size, "B": min(4096, triton.next_power_of_2(size))}
    kernel = feed_forward_kernel.inner_activations
    constants = {"ACTIVATION": number, "GATED": True, "BY_EXPERT": by_expert, **made}
    return activations(f"gate {name} {size}{' by expert' if by_expert else ''}", kernel, **constants)


CASES = [
    *(attention(head_dim, form, 8) for head_dim in (64, 80, 128, 192, 256) for form in ("long", "chunks")),
    *(attention(head_dim, form, 9) for head_dim in (64, 80, 128, 256) for form in ("long", "chunks")),
    *(attention(128, form, major, window=4096) for form in ("long", "chunks") for major in (8, 9)),
    *(attention(128, "short", major) for major in (8, 9)),
    *(attention(128, form, 8, fp16=False) for form in ("long", "chunks")),
    *(
        attention(head_dim, form, major, cache_type=cache_type)
        for cache_type in CODED
        for head_dim in (64, 128)
        for form in ("long", "chunks")
        for major in (8, 9)
    ),
    *(attention(head_dim, form, 8, cache_type="q8") for head_dim in (80, 192, 256) for form in ("long", "chunks")),
    *(
        attention(head_dim, form, major, cache_type="q4" if part == OLDER.value else "fp16", part=part)
        for part in (OLDER.value, RECENT.value)
        for head_dim in (64, 128)
        for form in ("long", "chunks")
        for major in (8, 9)
    ),
    attention(128, "long", 8, cache_type="q6", part=OLDER.value),
    *(attention(128, form, 8, fp16=False, cache_type="q4") for form in ("long", "chunks")),
    *(
        attention(256, form, major, window=window, group=2, softcap=50.0)
        for window in (0, 4096)
        for form in ("long", "chunks")
        for major in (8, 9)
    ),
    *(attention(128, form, major, softcap=50.0) for form in ("long", "chunks") for major in (8, 9)),
    *(attention(256, form, 8, fp16=False, softcap=50.0) for form in ("long", "chunks")),
    *(
        attention(256, form, major, group=2, cache_type=cache_type, softcap=50.0)
        for cache_type in CODED
        for form in ("long", "chunks")
        for major in (8, 9)
    ),
    *(merging(128, at_once) for at_once in STATES_AT_ONCE),
    *(merging(128, at_once, within=256) for at_once in (1, *STATES_AT_ONCE)),
    case(
        "norm 128",
        rows_kernel.norm,
        {
            **{"X_STRIDE": 6144, "OUT_STRIDE": 4096, "WEIGHT_STRIDE": 0, "SIZE": 128, "B": 128},
            **{"CENTRED": False, "HAS_BIAS": False},
        },
        num_warps=1,
    ),
    activations("norm 4096", rows_kernel.norm_activations, X_STRIDE=4096, SIZE=4096, WIDTH=4096, B=4096, BW=4096),
    activations("norm 13824", rows_kernel.norm_activations, X_STRIDE=13824, SIZE=13824, WIDTH=13824, B=16384, BW=16384),
    activations(
        "norm centred 6144",
        rows_kernel.norm_activations,
        **{"X_STRIDE": 6144, "SIZE": 6144, "WIDTH": 6144, "B": 8192, "BW": 8192, "CENTRED": True, "HAS_BIAS": True},
    ),
    *(inner(name, number) for name, number in (("silu", 0), ("gelu", 1), ("gelu tanh", 2))),
    inner("silu", 0, by_expert=True),
    case(
        "route 128",
        experts_kernel.route,
        {"X_STRIDE": 128, "OUT_STRIDE": 16, "EXPERTS": 128, "TOP_K": 8, "NORMALISED": True, "B": 128},
        num_warps=1,
    ),
    case(
        "combine",
        experts_kernel.combine,
        {"ROUTES_STRIDE": 16, "OUT_STRIDE": 2048, "TOP_K": 8, "SIZE": 2048, "B": 1024},
        num_warps=4,
    ),
    case(
        "sigmoid",
        feed_forward_kernel.sigmoid_mul,
        {"X_STRIDE": 2048, "GATE_STRIDE": 1, "OUT_STRIDE": 2048, "SIZE": 2048, "B": 1024},
        num_warps=4,
    ),
    case("residual", rows_kernel.add_residual, {"Y_STRIDE": 4096, "SIZE": 4096, "B": 1024}, num_warps=4),
    case("embed", rows_kernel.embed, {"SIZE": 4096, "B": 1024}, num_warps=4),
    *(appending(cache_type) for cache_type in ("fp16", *CODED, "q4+256")),
    *(moving(cache_type) for cache_type in ("fp16", *CODED)),
    case(
        "turn heads D128",
        heads_kernel.turn,
        {
            **{"X_STRIDE": 6144, "OUT_STRIDE": 4096, "HEADS": 32, "D": 128, "DP": 128},
            **{"H": 128, "ROOT": 128**-0.5, "TILE": TILE_HEADS},
        },
        num_warps=4,
    ),
]
