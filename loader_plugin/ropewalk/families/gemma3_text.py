"""Gemma 3, its text models: Gemma 2 with a norm per head instead of soft caps, and two RoPEs: layers with a window turn
by a theta of their own, which is never scaled."""

from __future__ import annotations

from ropewalk.base.json import Section
from ropewalk.families.family import ONE_KIND, Family, Flag, Key, Scales, Sizes, Windows
from ropewalk.families.gemma import ATTENTION_BIAS, NAMES
from ropewalk.families.gemma2 import ADDS, NORMS, gemma_scales, sandwich_layer
from ropewalk.families.program import Activation
from ropewalk.families.tables import LLAMA_LINEARS, LayerKind, norm

HEAD_NORMS = norm("q_norm", "self_attn.q_norm", "head", offset=1.0) + norm(
    "k_norm", "self_attn.k_norm", "head", offset=1.0
)


def _scales(config: Section, sizes: Sizes) -> Scales:
    return gemma_scales(config, sizes, attention_cap=None, logits_cap=None)


GEMMA3 = Family(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    max_position_embeddings=131072,
    num_kv_heads=4,
    head_dim=256,
    bos_token_id=2,
    eos_token_id=1,
    tied=True,
    flags=(*ATTENTION_BIAS, Flag("qk_norm")),
    scales=_scales,
    activations=("hidden_activation",),
    activation=Activation.GELU_TANH,
    windows=Windows.MOST,
    full_every=6,
    full_key="sliding_window_pattern",
    theta=Key("rope_theta", 1000000.0),
    sliding_theta=Key("rope_local_base_freq", 10000.0),
    names=NAMES,
    kinds={ONE_KIND: LayerKind(norms=NORMS + HEAD_NORMS, linears=LLAMA_LINEARS, adds=ADDS, layer=sandwich_layer)},
)
