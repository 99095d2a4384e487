"""Mistral: Llama with one sliding window for all layers."""

from __future__ import annotations

from ropewalk.families.family import Family, Windows

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    max_position_embeddings=131072,
    num_kv_heads=8,
    bos_token_id=1,
    eos_token_id=2,
    windows=Windows.ALL,
)
