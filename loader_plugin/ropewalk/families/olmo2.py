"""OLMo 2: norms after attention and MLP, none before them, and norms over all queries and all keys of a row at once.

x <- x + w * RMSNorm(Attention(x))
x <- x + w * RMSNorm(MLP(x))
"""

from __future__ import annotations

from ropewalk.families.decoder import attention, gated_mlp
from ropewalk.families.family import ONE_KIND, Family, Flag, Key
from ropewalk.families.program import View
from ropewalk.families.recorder import LayerShape, Recorder
from ropewalk.families.tables import LLAMA_LINEARS, LayerKind, norm

NORMS = (
    norm("attn_post_norm", "post_attention_layernorm", "hidden")
    + norm("mlp_post_norm", "post_feedforward_layernorm", "hidden")
    + norm("q_norm", "self_attn.q_norm", "queries")
    + norm("k_norm", "self_attn.k_norm", "keys")
)


def olmo2_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    y = attention(ops, ops.residual, shape, _norm_of_all_heads)
    ops.add_residual_(ops.rms_norm(y, "attn_post_norm"))
    ops.add_residual_(ops.rms_norm(gated_mlp(ops, ops.residual, shape), "mlp_post_norm"))


def _norm_of_all_heads(ops: Recorder, x: View, weight: str) -> View:
    """x: [T, H, D] -> the same, a row normalised as a whole. weight: [H * D]."""
    return ops.regroup(ops.rms_norm(ops.regroup(x, 1), weight), x.heads)  # [T, H, D]


OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    max_position_embeddings=2048,
    eos_token_id=50279,
    eps=Key("rms_norm_eps", 1e-5),
    flags=(Flag("qkv_bias", "attention_bias", False), Flag("o_bias", "attention_bias", False), Flag("qk_norm")),
    kinds={
        ONE_KIND: LayerKind(
            norms=NORMS,
            linears=LLAMA_LINEARS,
            adds=("post_attention_layernorm", "post_feedforward_layernorm"),
            layer=olmo2_layer,
        )
    },
)
