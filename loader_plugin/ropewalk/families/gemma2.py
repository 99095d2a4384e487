"""Gemma 2: Gemma with windows in every other layer, soft caps, and norms on both sides of attention and MLP.

x <- x + w * Norm(Attention(Norm(x)))
x <- x + w * Norm(MLP(Norm(x)))
"""

from __future__ import annotations

import math

from ropewalk.base.json import Section
from ropewalk.families.decoder import attention, gated_mlp
from ropewalk.families.family import ONE_KIND, Family, Scales, Sizes, Windows
from ropewalk.families.gemma import ATTENTION_BIAS, NAMES
from ropewalk.families.program import Activation
from ropewalk.families.recorder import LayerShape, Recorder
from ropewalk.families.tables import LLAMA_LINEARS, LayerKind, norm

LEAST, MOST = 1e-6, 1e6  # far beyond the head sizes and hidden sizes that are in use

NORMS = (
    norm("attn_norm", "input_layernorm", "hidden", offset=1.0)
    + norm("attn_post_norm", "post_attention_layernorm", "hidden", offset=1.0)
    + norm("mlp_norm", "pre_feedforward_layernorm", "hidden", offset=1.0)
    + norm("mlp_post_norm", "post_feedforward_layernorm", "hidden", offset=1.0)
)
ADDS = ("post_attention_layernorm", "post_feedforward_layernorm")


def sandwich_layer(ops: Recorder, shape: LayerShape) -> None:
    """Add one layer to the residual stream: what is added is normalised, too."""
    x = ops.residual  # [T, 1, C]
    y = attention(ops, ops.rms_norm(x, "attn_norm"), shape)
    ops.add_residual_(ops.rms_norm(y, "attn_post_norm"), shape.residual_scale)
    y = gated_mlp(ops, ops.rms_norm(x, "mlp_norm"), shape)
    ops.add_residual_(ops.rms_norm(y, "mlp_post_norm"), shape.residual_scale)


def soft_cap(config: Section, key: str, absent: float | None) -> float | None:
    """A cap, which null turns off."""
    return config.optional_number(key, LEAST, MOST, None if key in config.values else absent)


def gemma_scales(config: Section, sizes: Sizes, attention_cap: float | None, logits_cap: float | None) -> Scales:
    """query_pre_attn_scalar ** -0.5, which need not follow from the head size. The caps: where the key is absent."""
    scalar = config.optional_number("query_pre_attn_scalar", LEAST, MOST, 256.0)
    return Scales(
        attention=scalar**-0.5,
        embeddings=math.sqrt(sizes.hidden),
        attention_cap=soft_cap(config, "attn_logit_softcapping", attention_cap),
        logits_cap=soft_cap(config, "final_logit_softcapping", logits_cap),
    )


def _scales(config: Section, sizes: Sizes) -> Scales:
    return gemma_scales(config, sizes, attention_cap=50.0, logits_cap=30.0)


GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    max_position_embeddings=8192,
    num_kv_heads=4,
    head_dim=256,
    bos_token_id=2,
    eos_token_id=1,
    tied=True,
    flags=ATTENTION_BIAS,
    scales=_scales,
    activations=("hidden_activation",),
    activation=Activation.GELU_TANH,
    windows=Windows.MOST,
    full_every=2,
    names=NAMES,
    kinds={ONE_KIND: LayerKind(norms=NORMS, linears=LLAMA_LINEARS, adds=ADDS, layer=sandwich_layer)},
)
