"""GPT-NeoX and Pythia: names of its own, queries, keys and values fused head by head, attention and MLP side by side.

x <- x + w * (Attention(LayerNorm_1(x)) + MLP(LayerNorm_2(x)))
x <- x + w * Attention(LayerNorm_1(x)),  x <- x + w * MLP(LayerNorm_2(x))        without use_parallel_residual
"""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.json import Section
from ropewalk.families.decoder import attention, plain_mlp
from ropewalk.families.family import Family, Flag, Key, Names
from ropewalk.families.program import Activation
from ropewalk.families.recorder import LayerShape, Recorder
from ropewalk.families.tables import LayerKind, LinearEntry, Rows, norm

LINEARS = (
    LinearEntry(
        "qkv", "attention.query_key_value", "hidden", "queries, keys and values", "qkv_bias", rows=Rows.BY_HEAD
    ),
    LinearEntry("o", "attention.dense", "queries", "hidden", "o_bias"),
    LinearEntry("up", "mlp.dense_h_to_4h", "hidden", "inner", "mlp_bias"),
    LinearEntry("down", "mlp.dense_4h_to_h", "inner", "hidden", "mlp_bias"),
)
NORMS = norm("attn_norm", "input_layernorm", "hidden", bias=True) + norm(
    "mlp_norm", "post_attention_layernorm", "hidden", bias=True
)
ADDS = ("attention.dense", "mlp.dense_4h_to_h")


def parallel_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream: attention and MLP both see it as it was."""
    x = ops.residual  # [T, 1, C]
    attended = attention(ops, ops.layer_norm(x, "attn_norm", "attn_norm_bias"), shape)
    inner = plain_mlp(ops, ops.layer_norm(x, "mlp_norm", "mlp_norm_bias"), shape)
    ops.add_residual_(attended)
    ops.add_residual_(inner)


def serial_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream: the MLP sees what attention has added."""
    x = ops.residual  # [T, 1, C]
    ops.add_residual_(attention(ops, ops.layer_norm(x, "attn_norm", "attn_norm_bias"), shape))
    ops.add_residual_(plain_mlp(ops, ops.layer_norm(x, "mlp_norm", "mlp_norm_bias"), shape))


def _kinds(config: Section, num_layers: int) -> Sequence[str]:
    return ("parallel" if config.boolean("use_parallel_residual", True) else "serial",) * num_layers


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=2,
    flags=(Flag("qkv_bias", "attention_bias"), Flag("o_bias", "attention_bias"), Flag("mlp_bias")),
    eps=Key("layer_norm_eps", 1e-5),
    centred=True,
    activation=Activation.GELU,
    theta=Key("rotary_emb_base", 10000.0),
    partial_rotary=Key("rotary_pct", 0.25),
    fixed_heads=True,
    names=Names(
        embeddings="gpt_neox.embed_in",
        layers="gpt_neox.layers.",
        head="embed_out",
        final_norm=norm("norm", "gpt_neox.final_layer_norm", "hidden", bias=True),
    ),
    kinds={
        "parallel": LayerKind(norms=NORMS, linears=LINEARS, adds=ADDS, layer=parallel_layer),
        "serial": LayerKind(norms=NORMS, linears=LINEARS, adds=ADDS, layer=serial_layer),
    },
    kinds_of=_kinds,
)
