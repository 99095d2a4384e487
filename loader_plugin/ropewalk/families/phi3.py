"""Phi-3, 3.5 and 4: Llama with one fused linear for q, k and v, another for gate and up, and longrope."""

from __future__ import annotations

from ropewalk.families.family import ONE_KIND, Family, Key, Windows
from ropewalk.families.tables import DOWN, FUSED_GATE_AND_UP, LLAMA_NORMS, OUTPUT, LayerKind, LinearEntry

FUSED_QKV = (LinearEntry("qkv", "self_attn.qkv_proj", "hidden", "queries, keys and values"),)

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=32000,
    eps=Key("rms_norm_eps", 1e-5),
    windows=Windows.ALL,
    window=None,
    partial_rotary=Key("partial_rotary_factor", 1.0),
    rope_types={"yarn": "longrope"},  # as the first files called it
    kinds={ONE_KIND: LayerKind(norms=LLAMA_NORMS, linears=FUSED_QKV + OUTPUT + FUSED_GATE_AND_UP + DOWN)},
)
