"""Mixtral: Mistral's attention, and a mixture of a few wide experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from ropewalk.base.json import Section
from ropewalk.base.limits import MAX_EXPERTS, MAX_FEATURES
from ropewalk.families.family import Family, Key, Windows
from ropewalk.families.mixture import SPARSE, read_top_k, sparse_layer
from ropewalk.families.recorder import Mixture
from ropewalk.families.tables import LLAMA_NORMS, OUTPUT, ExpertsEntry, LayerKind, LinearEntry, queries_keys_values

EXPERTS = ExpertsEntry(
    "experts",
    gate="block_sparse_moe.experts.{expert}.w1",
    up="block_sparse_moe.experts.{expert}.w3",
    down="block_sparse_moe.experts.{expert}.w2",
)


def _mixture(config: Section) -> Mixture:
    count = config.optional_integer("num_local_experts", 1, MAX_EXPERTS, 8)
    inner = config.integer("intermediate_size", 1, MAX_FEATURES)
    return Mixture(num_experts=count, top_k=read_top_k(config, count, 2), inner=inner, normalised=True)


def _all_sparse(config: Section, num_layers: int) -> Sequence[str]:
    return [SPARSE] * num_layers


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    max_position_embeddings=131072,
    num_kv_heads=8,
    bos_token_id=1,
    eos_token_id=2,
    eps=Key("rms_norm_eps", 1e-5),
    windows=Windows.ALL,
    window=None,
    mixture=_mixture,
    kinds={
        SPARSE: LayerKind(
            norms=LLAMA_NORMS,
            linears=(
                *queries_keys_values(),
                *OUTPUT,
                LinearEntry("router", "block_sparse_moe.gate", "hidden", "experts"),
            ),
            experts=EXPERTS,
            adds=("self_attn.o_proj",),
            layer=sparse_layer,
        )
    },
    kinds_of=_all_sparse,
)
