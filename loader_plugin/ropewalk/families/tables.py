"""What a model family needs, as data: the names and sizes of its tensors.

All four families are Llama's decoder under the same names; qwen3 adds a norm per head to queries and keys. Biases
depend on the configuration, not on the family alone (ModelConfig.qkv_bias and the like).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ropewalk.config.model import ModelConfig

EMBEDDINGS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class NormEntry:
    """A norm's weight: the field of LayerWeights, the name within the layer, the name of its size."""

    field: str
    name: str
    size: str


@dataclass(frozen=True, slots=True)
class LinearEntry:
    """A linear: the field of LayerWeights, the module within the layer, its sizes, and the ModelConfig flag that
    says whether it has a bias."""

    field: str
    name: str
    inputs: str
    outputs: str
    bias: str


@dataclass(frozen=True, slots=True)
class FamilyTable:
    """The tensors of one decoder layer."""

    norms: tuple[NormEntry, ...]
    linears: tuple[LinearEntry, ...]


_LINEARS = (
    LinearEntry("q", "self_attn.q_proj", "hidden", "queries", "qkv_bias"),
    LinearEntry("k", "self_attn.k_proj", "hidden", "keys", "qkv_bias"),
    LinearEntry("v", "self_attn.v_proj", "hidden", "keys", "qkv_bias"),
    LinearEntry("o", "self_attn.o_proj", "queries", "hidden", "o_bias"),
    LinearEntry("gate", "mlp.gate_proj", "hidden", "inner", "mlp_bias"),
    LinearEntry("up", "mlp.up_proj", "hidden", "inner", "mlp_bias"),
    LinearEntry("down", "mlp.down_proj", "inner", "hidden", "mlp_bias"),
)
_NORMS = (
    NormEntry("attn_norm", "input_layernorm", "hidden"),
    NormEntry("mlp_norm", "post_attention_layernorm", "hidden"),
)
_HEAD_NORMS = (NormEntry("q_norm", "self_attn.q_norm", "head"), NormEntry("k_norm", "self_attn.k_norm", "head"))

FAMILY_TABLES: Mapping[str, FamilyTable] = MappingProxyType(
    {
        "llama": FamilyTable(_NORMS, _LINEARS),
        "mistral": FamilyTable(_NORMS, _LINEARS),
        "qwen2": FamilyTable(_NORMS, _LINEARS),
        "qwen3": FamilyTable(_NORMS + _HEAD_NORMS, _LINEARS),
    }
)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes by the names that the tables use."""
    return {
        "hidden": config.hidden_size,
        "inner": config.intermediate_size,
        "queries": config.num_heads * config.head_dim,
        "keys": config.num_kv_heads * config.head_dim,
        "head": config.head_dim,
        "vocab": config.vocab_size,
    }


def layer_prefix(index: int) -> str:
    """The beginning of the names of layer `index`."""
    return f"model.layers.{index}."
