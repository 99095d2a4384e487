"""Cohere's Command R7B and Command A: Cohere with windows in most layers; the others have no RoPE at all."""

from __future__ import annotations

from ropewalk.families.cohere import ATTENTION_BIAS, LINEARS, cohere_layer, cohere_scales
from ropewalk.families.family import ONE_KIND, Family, Key, Windows
from ropewalk.families.tables import LayerKind, norm

COHERE2 = Family(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    max_position_embeddings=8192,
    bos_token_id=5,
    eos_token_id=255001,
    tied=True,
    flags=ATTENTION_BIAS,
    scales=cohere_scales,
    eps=Key("layer_norm_eps", 1e-5),
    centred=True,
    windows=Windows.MOST,
    full_every=4,
    full_key="sliding_window_pattern",
    full_layers_rotate=False,
    kinds={
        ONE_KIND: LayerKind(norms=norm("attn_norm", "input_layernorm", "hidden"), linears=LINEARS, layer=cohere_layer)
    },
)
