"""GLM-4 (0414): norms on both sides of attention and MLP, and pairs of neighbours rotated in half of each head."""

from __future__ import annotations

from ropewalk.families.family import ONE_KIND, Family, Flag, Key
from ropewalk.families.gemma2 import sandwich_layer
from ropewalk.families.tables import DOWN, FUSED_GATE_AND_UP, OUTPUT, LayerKind, Rows, norm, queries_keys_values

GLM4 = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    max_position_embeddings=131072,
    num_kv_heads=2,
    head_dim=128,
    eos_token_id=(151329, 151336, 151338),
    flags=(Flag("qkv_bias", "attention_bias"),),
    eps=Key("rms_norm_eps", 1.5625e-07),
    partial_rotary=Key("partial_rotary_factor", 0.5),
    kinds={
        ONE_KIND: LayerKind(
            norms=norm("attn_norm", "input_layernorm", "hidden")
            + norm("attn_post_norm", "post_self_attn_layernorm", "hidden")
            + norm("mlp_norm", "post_attention_layernorm", "hidden")
            + norm("mlp_post_norm", "post_mlp_layernorm", "hidden"),
            linears=queries_keys_values(Rows.PAIRS) + OUTPUT + FUSED_GATE_AND_UP + DOWN,
            adds=("post_self_attn_layernorm", "post_mlp_layernorm"),
            layer=sandwich_layer,
        )
    },
)
