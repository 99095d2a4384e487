"""StableLM 2: LayerNorm, a quarter of each head rotated, and in some models attention and MLP side by side.

x <- x + w * Attention(LayerNorm(x)),  x <- x + w * MLP(LayerNorm(x))
x <- x + w * (Attention(LayerNorm(x)) + MLP(LayerNorm(x)))              with use_parallel_residual, one norm
"""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.json import Section
from ropewalk.families.decoder import attention, gated_mlp
from ropewalk.families.family import Family, Flag, Key, Names
from ropewalk.families.recorder import LayerShape, Recorder
from ropewalk.families.tables import LLAMA_LINEARS, LayerKind, norm

ATTN_NORM = norm("attn_norm", "input_layernorm", "hidden", bias=True)
MLP_NORM = norm("mlp_norm", "post_attention_layernorm", "hidden", bias=True)
HEAD_NORMS = norm("q_norm", "self_attn.q_layernorm.norms.{head}", "head", flag="qk_norm", by_head="heads") + norm(
    "k_norm", "self_attn.k_layernorm.norms.{head}", "head", flag="qk_norm", by_head="key heads"
)


def serial_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream: the MLP sees what attention has added."""
    x = ops.residual  # [T, 1, C]
    normed = ops.layer_norm(x, "attn_norm", "attn_norm_bias")
    ops.add_residual_(attention(ops, normed, shape, Recorder.layer_norm))
    ops.add_residual_(gated_mlp(ops, ops.layer_norm(x, "mlp_norm", "mlp_norm_bias"), shape))


def parallel_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream: attention and MLP read the same norm."""
    normed = ops.layer_norm(ops.residual, "attn_norm", "attn_norm_bias")  # [T, 1, C]
    attended, inner = attention(ops, normed, shape, Recorder.layer_norm), gated_mlp(ops, normed, shape)
    ops.add_residual_(attended)
    ops.add_residual_(inner)


def _kinds(config: Section, num_layers: int) -> Sequence[str]:
    return ("parallel" if config.boolean("use_parallel_residual", False) else "serial",) * num_layers


STABLELM = Family(
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    max_position_embeddings=4096,
    num_kv_heads=32,
    bos_token_id=0,
    eos_token_id=0,
    flags=(Flag("qkv_bias", "use_qkv_bias", False), Flag("qk_norm", "qk_layernorm", False)),
    eps=Key("layer_norm_eps", 1e-5),
    centred=True,
    partial_rotary=Key("partial_rotary_factor", 0.25),
    names=Names(final_norm=norm("norm", "model.norm", "hidden", bias=True)),
    kinds={
        "serial": LayerKind(norms=ATTN_NORM + MLP_NORM + HEAD_NORMS, linears=LLAMA_LINEARS, layer=serial_layer),
        "parallel": LayerKind(norms=ATTN_NORM + HEAD_NORMS, linears=LLAMA_LINEARS, layer=parallel_layer),
    },
    kinds_of=_kinds,
)
