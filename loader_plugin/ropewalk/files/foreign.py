"""Weight layouts that are not GPTQ, and fused projections, recognised by the names of their tensors.

They are refused by name, with advice; otherwise the error would be a long list of missing tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ropewalk.base.errors import UnsupportedError
from ropewalk.files.safetensors import printable

REQUANTISE = "get the plain GPTQ version of this model, or quantise the original with GPTQModel"

# (pattern of a tensor name, layout, what to do)
FOREIGN = (
    (r".*_proj\.(B|s|workspace)", "Marlin", REQUANTISE),
    (r".*\.(q_weight|q_scale|q_scale_max|q_groups|q_group_map|q_invperm)", "EXL2 (exllamav2)", REQUANTISE),
    (r".*\.(trellis|suh|svh)", "EXL3 (exllamav3)", REQUANTISE),
    (r".*\.weight_(packed|g_idx|zero_point)", "compressed-tensors", REQUANTISE),
    (r".*\.weight\.(absmax|nested_absmax|quant_map|quant_state\..*)", "bitsandbytes", REQUANTISE),
    (r".*\.(SCB|weight_format)", "bitsandbytes 8-bit", REQUANTISE),
    (r".*\.weight_scale(_inv)?", "FP8", "use the unquantised (bf16) version of this model, or " + REQUANTISE),
    (r".*\.(W_q|W_q_packed)", "HQQ", REQUANTISE),
    (r".*\.codebooks", "AQLM", REQUANTISE),
    (r".*\.(Qidxs|Qidxs_\d)", "QuIP#", REQUANTISE),
    (r".*_proj\.(lookup_table|oweight)", "SqueezeLLM or OWQ", REQUANTISE),
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


def refuse_foreign_layouts(names: Iterable[str], folder: object) -> None:
    """Raises UnsupportedError if a tensor name belongs to a layout that is not GPTQ."""
    for name in names:
        for pattern, layout, advice in FOREIGN:
            if re.fullmatch(pattern, name):
                raise UnsupportedError(
                    f"{folder}: tensor {printable(name)} belongs to the layout of {layout}, which is not supported; "
                    f"accepted are GPTQ and float16, bfloat16 or float32 weights: {advice}"
                )


def is_awq_shape(shape: tuple[int, ...], in_features: int, out_features: int) -> bool:
    """True for a qweight packed along its columns, [K, N/8]: AWQ's GEMM layout under GPTQ's names (always 4 bits)."""
    return shape == (in_features, out_features // 8)


def awq_error(name: str, folder: object) -> UnsupportedError:
    """The error for such a tensor."""
    return UnsupportedError(
        f"{folder}: {name}.qweight is packed along its columns, as AWQ does; AWQ is not supported: {REQUANTISE}"
    )
