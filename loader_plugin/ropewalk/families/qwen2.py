"""Qwen2 and 2.5: Llama with biases on queries, keys and values, and windows in some layers."""

from __future__ import annotations

from ropewalk.families.family import Family, Flag, Windows

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    max_position_embeddings=32768,
    num_kv_heads=32,
    flags=(Flag("qkv_bias"),),
    windows=Windows.SOME,
)
