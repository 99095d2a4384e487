"""StarCoder2: LayerNorm and biases everywhere, and an MLP without a gate."""

from __future__ import annotations

from ropewalk.families.decoder import attention, plain_mlp
from ropewalk.families.family import ONE_KIND, Family, Flag, Key, Names, Windows
from ropewalk.families.program import Activation
from ropewalk.families.recorder import LayerShape, Recorder
from ropewalk.families.tables import OUTPUT, LayerKind, LinearEntry, norm, queries_keys_values

MLP = (
    LinearEntry("up", "mlp.c_fc", "hidden", "inner", "mlp_bias"),
    LinearEntry("down", "mlp.c_proj", "inner", "hidden", "mlp_bias"),
)


def starcoder2_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream."""
    x = ops.residual  # [T, 1, C]
    ops.add_residual_(attention(ops, ops.layer_norm(x, "attn_norm", "attn_norm_bias"), shape))
    ops.add_residual_(plain_mlp(ops, ops.layer_norm(x, "mlp_norm", "mlp_norm_bias"), shape))


STARCODER2 = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    max_position_embeddings=4096,
    num_kv_heads=2,
    bos_token_id=50256,
    eos_token_id=50256,
    tied=True,
    flags=(Flag("qkv_bias", "use_bias"), Flag("o_bias", "use_bias"), Flag("mlp_bias", "use_bias")),
    eps=Key("norm_epsilon", 1e-5),
    centred=True,
    activation=Activation.GELU_TANH,
    windows=Windows.ALL,
    window=None,
    names=Names(final_norm=norm("norm", "model.norm", "hidden", bias=True)),
    kinds={
        ONE_KIND: LayerKind(
            norms=norm("attn_norm", "input_layernorm", "hidden", bias=True)
            + norm("mlp_norm", "post_attention_layernorm", "hidden", bias=True),
            linears=queries_keys_values() + OUTPUT + MLP,
            adds=("self_attn.o_proj", "mlp.c_proj"),
            layer=starcoder2_layer,
        )
    },
)
