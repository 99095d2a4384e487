"""Qwen3: Llama with a norm per head on queries and keys, and an explicit head size."""

from __future__ import annotations

from dataclasses import replace

from ropewalk.families.family import ONE_KIND, Family, Flag, Windows
from ropewalk.families.tables import HEAD_NORMS, LLAMA_KIND, LLAMA_NORMS

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    max_position_embeddings=32768,
    num_kv_heads=32,
    head_dim=128,
    flags=(Flag("qkv_bias", "attention_bias", False), Flag("o_bias", "attention_bias", False), Flag("qk_norm")),
    windows=Windows.SOME,
    kinds={ONE_KIND: replace(LLAMA_KIND, norms=LLAMA_NORMS + HEAD_NORMS)},
)
