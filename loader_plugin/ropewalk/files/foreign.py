"""Weight layouts that are not read, and fused projections, recognised by the names of their tensors.

They are refused by name, with what runs them; otherwise the error would be a long list of missing tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

from ropewalk.base.errors import UnsupportedError
from ropewalk.config import foreign as formats
from ropewalk.config.foreign import ForeignFormat
from ropewalk.files.safetensors import printable

MLX = ForeignFormat((), "MLX weights", "mlx-lm on a Mac")

# (pattern of a tensor name, format), the first that matches counts
FOREIGN = (
    (r".*_proj\.(B|s|workspace)", formats.MARLIN),
    (r".*\.(q_weight|q_scale|q_scale_max|q_groups|q_group_map|q_invperm)", formats.EXL2),
    (r".*\.(trellis|suh|svh)", formats.EXL3),
    (r".*\.weight\.(absmax|nested_absmax|quant_map|quant_state\..*)", formats.BITSANDBYTES),
    (r".*\.(SCB|weight_format)", formats.BITSANDBYTES),
    (r".*\.(weight_scale_2|weight_global_scale|input_global_scale|.*_blocks|.*_scales)", formats.FP4),
    (r".*\.weight_scale(_inv)?|.*\.input_scale", formats.FP8),
    (r".*\.(W_q|W_q_packed)", formats.HQQ),
    (r".*\.codebooks", formats.AQLM),
    (r".*\.(Qidxs|Qidxs_\d)", formats.QUIP),
    (r".*_proj\.(lookup_table|oweight)", formats.SQUEEZE),
    (r".*\.biases", MLX),
)
# (pattern, what it is, what to do)
OTHER_NAMES = (
    (
        r".*\.(qkv_proj|W_pack|query_key_value|c_attn|Wqkv|gate_up_proj)\.(weight|qweight)",
        "fused projections",
        "save q_proj, k_proj, v_proj, gate_proj and up_proj separately: checkpoints of the supported families do",
    ),
    (
        r".*\.attention\.w[qkvo]\.weight|layers\.\d+\.feed_forward\.w[123]\.weight",
        "the original (consolidated) Llama names",
        "convert the checkpoint with transformers first",
    ),
)


def refuse_foreign_layouts(
    names: Iterable[str], folder: object, own_parts: tuple[str, ...] = (), own_modules: Set[str] = frozenset()
) -> None:
    """Raise UnsupportedError if a tensor name belongs to a layout that is not read.

    own_parts: the last parts of names that the declared container has (containers/), which speak for no other.
    own_modules: what the model's linears are called, without the path to them.
    """
    for name in names:
        found = None if name.rpartition(".")[2] in own_parts else foreign_format_of(name)
        if found is not None:
            raise _refusal(name, folder, found.title, found.advice)
        if name.rpartition(".")[0].rpartition(".")[2] in own_modules:
            continue
        for pattern, what, advice in OTHER_NAMES:
            if re.fullmatch(pattern, name):
                raise _refusal(name, folder, what, advice)


def foreign_format_of(tensor: str) -> ForeignFormat | None:
    """The format that has tensors of this name, if it is none of ours."""
    return next((found for pattern, found in FOREIGN if re.fullmatch(pattern, tensor)), None)


def _refusal(name: str, folder: object, what: str, advice: str) -> UnsupportedError:
    return UnsupportedError(
        f"{folder}: tensor {printable(name)} belongs to the layout of {what}, which is not supported; accepted are "
        f"GPTQ, AWQ (gemm), compressed-tensors (pack-quantized) and float16, bfloat16 or float32 weights: {advice}"
    )
