"""Qwen3: Llama with a norm per head on queries and keys, and an explicit head size."""

from __future__ import annotations

from ropewalk.families.family import HEAD_NORMS, LLAMA_NORMS, Family, Windows

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    max_position_embeddings=32768,
    num_kv_heads=32,
    head_dim=128,
    reads_attention_bias=True,
    qk_norm=True,
    windows=Windows.SOME,
    norms=LLAMA_NORMS + HEAD_NORMS,
)
