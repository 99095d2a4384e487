"""Gemma (1): Llama with wide gated GELU, norms that multiply by 1 + weight, and scaled embeddings."""

from __future__ import annotations

import math

from ropewalk.base.json import Section
from ropewalk.families.family import ONE_KIND, Family, Flag, Names, Scales, Sizes
from ropewalk.families.program import Activation
from ropewalk.families.tables import LLAMA_LINEARS, LayerKind, norm

ATTENTION_BIAS = (Flag("qkv_bias", "attention_bias", False), Flag("o_bias", "attention_bias", False))
NAMES = Names(final_norm=norm("norm", "model.norm", "hidden", offset=1.0))


def _scales(config: Section, sizes: Sizes) -> Scales:
    return Scales(attention=sizes.head_dim**-0.5, embeddings=math.sqrt(sizes.hidden))


GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    max_position_embeddings=8192,
    num_kv_heads=16,
    head_dim=256,
    bos_token_id=2,
    eos_token_id=1,
    tied=True,
    flags=ATTENTION_BIAS,
    scales=_scales,
    activations=("hidden_activation", "hidden_act"),
    activation=Activation.GELU_TANH,
    renamed={"gelu": Activation.GELU_TANH},  # the first files say gelu and mean this one
    names=NAMES,
    kinds={
        ONE_KIND: LayerKind(
            norms=norm("attn_norm", "input_layernorm", "hidden", offset=1.0)
            + norm("mlp_norm", "post_attention_layernorm", "hidden", offset=1.0),
            linears=LLAMA_LINEARS,
        )
    },
)
