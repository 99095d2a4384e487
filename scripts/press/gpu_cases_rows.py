"""Kernels of rows and attention as they are compiled for cards: what gpu_compile_matrix.py goes through.

Each case is (name, kernel, dtypes of its arguments, constants, options). Tiles are those that the backend takes.
"""

from __future__ import annotations

from ropewalk.backends.gpu import attention_kernel, rows_kernel
from ropewalk.backends.gpu.attention import CHUNK, STATES_AT_ONCE, padded, tiles
from ropewalk.backends.protocol import PAGE_TOKENS

POINTERS = {
    **dict.fromkeys(("pages_ptr", "positions_ptr", "blocks_ptr", "spans_ptr", "ids_ptr"), "*i64"),
    **{"order_ptr": "*i32", "values_ptr": "*fp16", "table_ptr": "*bf16"},
}
SCALARS = {
    **dict.fromkeys(("width", "instance", "most_rows"), "i32"),
    **dict.fromkeys(("eps", "weight", "qk_scale"), "fp32"),
}


def signature(kernel, constants: dict) -> dict[str, str]:
    """Dtypes of the arguments that are no constants: float32 pointers unless their name says otherwise."""
    names = [name for name in kernel.arg_names if name not in constants]
    return {name: SCALARS.get(name) or POINTERS.get(name, "*fp32") for name in names}


def case(name: str, kernel, constants: dict, **options) -> tuple:
    """One line of CASES."""
    return name, kernel, signature(kernel, constants), constants, {"enable_fp_fusion": False, **options}


def attention(head_dim: int, form: str, major: int = 8, fp16: bool = True, window: int = 0, group: int = 4) -> tuple:
    """Attention over float16 pages with 8 key/value heads. form: "long", "short" or "chunks"; major: whose tiles."""
    chosen = tiles(head_dim, fp16, major)
    tile = chosen.long if form == "long" else chosen.short
    constants = {
        "Q_STRIDE": (group + 2) * 8 * head_dim,
        "WINDOW": window,
        "HKV": 8,
        "G": group,
        "D": head_dim,
        "DP": padded(head_dim),
        "ROWS": tile.rows,
        "CHUNK": CHUNK,
        "PAGE": PAGE_TOKENS,
        "BLOCK": chosen.block,
        "FP16_PAGES": True,
        "FP16_DOT": fp16,
    }
    if form != "chunks":
        constants["OUT_STRIDE"] = group * 8 * head_dim
    kernel = attention_kernel.attend_chunks if form == "chunks" else attention_kernel.attend_whole
    details = (f" window {window}" if window else "") + ("" if fp16 else " exact") + (" sm_90" if major == 9 else "")
    name = f"attention D{head_dim} {form}{details}"
    return case(name, kernel, constants, num_warps=tile.num_warps, num_stages=chosen.num_stages)


def merging(head_dim: int, at_once: int) -> tuple:
    """The merge of the states of chunks, for 32 heads."""
    sizes = {"HEADS": 32, "D": head_dim, "DP": padded(head_dim), "CHUNK": CHUNK, "AT_ONCE": at_once}
    name = f"merge chunks D{head_dim} {at_once} at once"
    return case(name, attention_kernel.merge_chunks, {"OUT_STRIDE": 32 * head_dim, "WINDOW": 0, **sizes}, num_warps=1)


def activations(name: str, kernel, **constants) -> tuple:
    """A producer of activations with act-order."""
    made = {"HAS_ORDER": True, "SCALED": True, "WRITES_FLOAT32": False, **constants}
    return case(name, kernel, made, num_warps=8)


CASES = [
    *(attention(head_dim, form, 8) for head_dim in (64, 80, 128, 192, 256) for form in ("long", "chunks")),
    *(attention(head_dim, form, 9) for head_dim in (64, 80, 128, 256) for form in ("long", "chunks")),
    *(attention(128, form, major, window=4096) for form in ("long", "chunks") for major in (8, 9)),
    *(attention(128, "short", major) for major in (8, 9)),
    *(attention(128, form, 8, fp16=False) for form in ("long", "chunks")),
    *(merging(128, at_once) for at_once in STATES_AT_ONCE),
    case(
        "norm 128",
        rows_kernel.rms_norm,
        {"X_STRIDE": 6144, "OUT_STRIDE": 4096, "SIZE": 128, "B": 128},
        num_warps=1,
    ),
    activations("norm 4096", rows_kernel.norm_activations, X_STRIDE=4096, SIZE=4096, WIDTH=4096, B=4096, BW=4096),
    activations("norm 13824", rows_kernel.norm_activations, X_STRIDE=13824, SIZE=13824, WIDTH=13824, B=16384, BW=16384),
    activations("gate 11008", rows_kernel.silu_activations, X_STRIDE=22016, SIZE=11008, WIDTH=11008, B=4096),
    case("residual", rows_kernel.add_residual, {"Y_STRIDE": 4096, "SIZE": 4096, "B": 1024}, num_warps=4),
    case("embed", rows_kernel.embed, {"SIZE": 4096, "B": 1024}, num_warps=4),
    case(
        "rotate and append D128",
        rows_kernel.rotate_append,
        {
            **{"Q_STRIDE": 6144, "K_STRIDE": 6144, "V_STRIDE": 6144, "HQ": 32, "HKV": 8, "D": 128, "DP": 128},
            **{"HALF": 64, "HB": 64, "PAGE": PAGE_TOKENS, "FP16_PAGES": True, "TILE": 8},
        },
        num_warps=4,
    ),
]
