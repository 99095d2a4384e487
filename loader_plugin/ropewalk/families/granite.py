"""Granite 3: Llama with a factor of its own at each of four places."""

from __future__ import annotations

from ropewalk.base.json import Section
from ropewalk.families.family import Family, Flag, Scales, Sizes

LEAST, MOST = 1e-6, 1e6  # far beyond what is in use (12 for embeddings, 16 for logits)


def _scales(config: Section, sizes: Sizes) -> Scales:
    def multiplier(key: str) -> float:
        return config.optional_number(key, LEAST, MOST, 1.0)

    return Scales(
        attention=multiplier("attention_multiplier"),
        embeddings=multiplier("embedding_multiplier"),
        residual=multiplier("residual_multiplier"),
        logits=1.0 / multiplier("logits_scaling"),
    )


GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    flags=(
        Flag("qkv_bias", "attention_bias", False),
        Flag("o_bias", "attention_bias", False),
        Flag("mlp_bias", "mlp_bias", False),
    ),
    scales=_scales,
)
