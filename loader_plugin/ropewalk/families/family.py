"""What an architecture is: how its config.json is read, the names and sizes of its tensors, and its layer.

All families here share Llama's decoder (families/decoder.py) and its tensor names. Each family is one file of this
folder, and nothing outside the folder refers to a family by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ropewalk.families.decoder import decoder_layer
from ropewalk.families.recorder import LayerFunction

EMBEDDINGS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class NormEntry:
    """A norm's weight: its field in LayerWeights, its name within the layer, and the name of its size."""

    field: str
    name: str
    size: str


@dataclass(frozen=True, slots=True)
class LinearEntry:
    """A linear layer: its field in LayerWeights, its module name within the decoder layer, the names of its sizes, and
    the ModelConfig flag that says whether it has a bias."""

    field: str
    name: str
    inputs: str
    outputs: str
    bias: str


class Windows(Enum):
    """Which layers of a family use sliding-window attention."""

    NONE = "none"
    ALL = "every layer, if `sliding_window` is set"
    SOME = "those that `layer_types` or `max_window_layers` name, with `use_sliding_window`"


LLAMA_LINEARS = (
    LinearEntry("q", "self_attn.q_proj", "hidden", "queries", "qkv_bias"),
    LinearEntry("k", "self_attn.k_proj", "hidden", "keys", "qkv_bias"),
    LinearEntry("v", "self_attn.v_proj", "hidden", "keys", "qkv_bias"),
    LinearEntry("o", "self_attn.o_proj", "queries", "hidden", "o_bias"),
    LinearEntry("gate", "mlp.gate_proj", "hidden", "inner", "mlp_bias"),
    LinearEntry("up", "mlp.up_proj", "hidden", "inner", "mlp_bias"),
    LinearEntry("down", "mlp.down_proj", "inner", "hidden", "mlp_bias"),
)
LLAMA_NORMS = (
    NormEntry("attn_norm", "input_layernorm", "hidden"),
    NormEntry("mlp_norm", "post_attention_layernorm", "hidden"),
)
HEAD_NORMS = (NormEntry("q_norm", "self_attn.q_norm", "head"), NormEntry("k_norm", "self_attn.k_norm", "head"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture. Defaults for absent keys are those of transformers 5.23 (its `configuration_*.py`).

    name, architectures: `model_type` and the class names in config.json.
    num_kv_heads: None: as many as query heads. head_dim: None: hidden_size / num_attention_heads.
    heads_divide_hidden: hidden_size must be a multiple of the heads even where head_dim is given.
    qkv_bias: q, k and v always have biases. reads_attention_bias, reads_mlp_bias: `attention_bias` and `mlp_bias` of
        config.json are honoured.
    extended_in_the_wild: fine-tunes may declare a longer context by other means than a scaling object
        (rope/decision.py).
    layer: the decoder layer, written against a recorder.
    """

    name: str
    architectures: tuple[str, ...]
    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    heads_divide_hidden: bool = False
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    windows: Windows = Windows.NONE
    extended_in_the_wild: bool = False
    norms: tuple[NormEntry, ...] = LLAMA_NORMS
    linears: tuple[LinearEntry, ...] = LLAMA_LINEARS
    layer: LayerFunction = decoder_layer


def layer_prefix(index: int) -> str:
    """The beginning of the names of layer `index`."""
    return f"model.layers.{index}."
