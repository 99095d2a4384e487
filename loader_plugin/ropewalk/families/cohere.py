"""Cohere's Command R: attention and MLP read one LayerNorm side by side, and rotated features are pairs of neighbours.

x <- x + w * (Attention(LayerNorm(x)) + MLP(LayerNorm(x)))
"""

from __future__ import annotations

from ropewalk.base.json import Section
from ropewalk.families.decoder import attention, gated_mlp
from ropewalk.families.family import ONE_KIND, Family, Flag, Key, Scales, Sizes
from ropewalk.families.recorder import LayerShape, Recorder
from ropewalk.families.tables import DOWN, GATE_AND_UP, OUTPUT, LayerKind, Rows, norm, queries_keys_values

LEAST, MOST = 1e-6, 1e6  # far beyond what is in use (0.0625 to 1)
LINEARS = queries_keys_values(Rows.PAIRS) + OUTPUT + GATE_AND_UP + DOWN
ATTENTION_BIAS = (Flag("qkv_bias", "attention_bias", False), Flag("o_bias", "attention_bias", False))
HEAD_NORMS = norm("q_norm", "self_attn.q_norm", "heads", "head", flag="qk_norm", rows=Rows.PAIRS) + norm(
    "k_norm", "self_attn.k_norm", "key heads", "head", flag="qk_norm", rows=Rows.PAIRS
)


def cohere_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    normed = ops.layer_norm(ops.residual, "attn_norm")  # [T, 1, C]
    attended, inner = attention(ops, normed, shape, Recorder.layer_norm), gated_mlp(ops, normed, shape)
    ops.add_residual_(attended)
    ops.add_residual_(inner)


def cohere_scales(config: Section, sizes: Sizes) -> Scales:
    """1 / sqrt(D), and `logit_scale`."""
    logits = config.optional_number("logit_scale", LEAST, MOST, 0.0625)
    return Scales(attention=sizes.head_dim**-0.5, logits=logits)


COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    max_position_embeddings=8192,
    bos_token_id=5,
    eos_token_id=255001,
    tied=True,
    flags=(*ATTENTION_BIAS, Flag("qk_norm", "use_qk_norm", False)),
    scales=cohere_scales,
    eps=Key("layer_norm_eps", 1e-5),
    centred=True,
    theta=Key("rope_theta", 500000.0),
    kinds={
        ONE_KIND: LayerKind(
            norms=norm("attn_norm", "input_layernorm", "hidden") + HEAD_NORMS, linears=LINEARS, layer=cohere_layer
        )
    },
)
