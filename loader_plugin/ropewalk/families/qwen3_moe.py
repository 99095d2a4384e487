"""Qwen3 with experts (30B-A3B and its like): Qwen3's attention, and a mixture in all layers or most."""

from __future__ import annotations

from dataclasses import replace

from ropewalk.base.json import Section
from ropewalk.families.family import Family, Flag, Windows
from ropewalk.families.mixture import DENSE, EXPERTS, ROUTER, SPARSE, qwen_kinds, qwen_mixture, sparse_layer
from ropewalk.families.recorder import Mixture
from ropewalk.families.tables import HEAD_NORMS, LLAMA_KIND, LLAMA_NORMS, OUTPUT, LayerKind, queries_keys_values


def _mixture(config: Section) -> Mixture:
    return qwen_mixture(config, num_experts=128, top_k=8, inner=768)


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    max_position_embeddings=32768,
    num_kv_heads=4,
    flags=(Flag("qkv_bias", "attention_bias", False), Flag("o_bias", "attention_bias", False), Flag("qk_norm")),
    windows=Windows.ALL,
    window_key="use_sliding_window",
    mixture=_mixture,
    kinds={
        SPARSE: LayerKind(
            norms=LLAMA_NORMS + HEAD_NORMS,
            linears=queries_keys_values() + OUTPUT + ROUTER,
            experts=EXPERTS,
            adds=("self_attn.o_proj",),
            layer=sparse_layer,
        ),
        DENSE: replace(LLAMA_KIND, norms=LLAMA_NORMS + HEAD_NORMS),
    },
    kinds_of=qwen_kinds,
)
