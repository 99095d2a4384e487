"""Llama 1, 2 and 3.x, and the many models of its architecture."""

from __future__ import annotations

from ropewalk.families.family import Family, Flag

LLAMA = Family(
    name="llama",
    # LLaMAForCausalLM: the spelling of the conversions of March 2023.
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    heads_divide_hidden=True,
    flags=(
        Flag("qkv_bias", "attention_bias", False),
        Flag("o_bias", "attention_bias", False),
        Flag("mlp_bias", "mlp_bias", False),
    ),
    extended_in_the_wild=True,
)
