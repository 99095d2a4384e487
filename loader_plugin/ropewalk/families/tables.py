"""The tensors of a decoder layer as data: norms and linears, and the function that uses them. Llama's are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from ropewalk.families.decoder import decoder_layer
from ropewalk.families.recorder import LayerFunction


class Rows(Enum):
    """How output features are ordered in the file, where that is not as a layer function wants them."""

    PAIRS = "features i and i + 1 of the rotated part of a head turn together"  # ours: i and i + R/2
    BY_HEAD = "query, key and value of the first head, then of the second"  # ours: all queries, all keys, all values


@dataclass(frozen=True, slots=True)
class NormEntry:
    """A tensor of a norm: its name in the layer function, its name within the layer, and the names of its sizes.

    flag: the layer has it only where this flag is set. offset: what is added to the numbers in the file.
    by_head: the name stands for a tensor [head] for each of so many heads, with their number in place of {head}.
    rows: how its last size is ordered.
    """

    field: str
    name: str
    shape: tuple[str, ...]
    flag: str | None = None
    offset: float = 0.0
    by_head: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class LinearEntry:
    """A linear layer: its field in LayerWeights, its module name within the decoder layer, and the names of its sizes.

    bias: the flag that says whether it has one (None: never). group: linears over the same input that are packed
    together under this name, by which the layer function knows them (None: by itself, under the name of the field).
    """

    field: str
    name: str
    inputs: str
    outputs: str
    bias: str | None = None
    group: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class ExpertsEntry:
    """The experts of a layer: their field in LayerWeights, and the modules of their linears, {expert} for the number.

    Gate and up map "hidden" to "expert inner", down maps back; there are "experts" of them.
    """

    field: str
    gate: str
    up: str
    down: str

    @property
    def linears(self) -> tuple[LinearEntry, ...]:
        """Gate, up and down."""
        return (
            LinearEntry("gate", self.gate, "hidden", "expert inner"),
            LinearEntry("up", self.up, "hidden", "expert inner"),
            LinearEntry("down", self.down, "expert inner", "hidden"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers of a family that hold the same tensors and compute the same.

    adds: the modules that give what is added to the residual stream, linears or norms.
    layer: the decoder layer, written against a recorder.
    """

    norms: tuple[NormEntry, ...]
    linears: tuple[LinearEntry, ...]
    experts: ExpertsEntry | None = None
    adds: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    layer: LayerFunction = decoder_layer

    def with_flags(self, flags: frozenset[str]) -> LayerKind:
        """The same without the norms that a model with these flags lacks."""
        return replace(self, norms=tuple(entry for entry in self.norms if entry.flag is None or entry.flag in flags))

    @property
    def groups(self) -> Mapping[str, tuple[LinearEntry, ...]]:
        """The linears that are packed together, by the name that the layer function gives them."""
        groups: dict[str, tuple[LinearEntry, ...]] = {}
        for entry in self.linears:
            name = entry.group or entry.field
            groups[name] = (*groups.get(name, ()), entry)
        return groups


def norm(field: str, module: str, *shape: str, bias: bool = False, **others: Any) -> tuple[NormEntry, ...]:
    """The entries of one norm: its weight and, with `bias`, its bias under the name `field`_bias."""
    weight = NormEntry(field, f"{module}.weight", shape, **others)
    return (weight, NormEntry(f"{field}_bias", f"{module}.bias", shape, **others)) if bias else (weight,)


def queries_keys_values(rows: Rows | None = None) -> tuple[LinearEntry, ...]:
    """Three linears. rows: the order of queries and keys."""
    return (
        LinearEntry("q", "self_attn.q_proj", "hidden", "queries", "qkv_bias", "qkv", rows),
        LinearEntry("k", "self_attn.k_proj", "hidden", "keys", "qkv_bias", "qkv", rows),
        LinearEntry("v", "self_attn.v_proj", "hidden", "keys", "qkv_bias", "qkv"),
    )


OUTPUT = (LinearEntry("o", "self_attn.o_proj", "queries", "hidden", "o_bias"),)
GATE_AND_UP = (
    LinearEntry("gate", "mlp.gate_proj", "hidden", "inner", "mlp_bias", "gate_up"),
    LinearEntry("up", "mlp.up_proj", "hidden", "inner", "mlp_bias", "gate_up"),
)
FUSED_GATE_AND_UP = (LinearEntry("gate_up", "mlp.gate_up_proj", "hidden", "gate and up", "mlp_bias"),)
DOWN = (LinearEntry("down", "mlp.down_proj", "inner", "hidden", "mlp_bias"),)

LLAMA_LINEARS = queries_keys_values() + OUTPUT + GATE_AND_UP + DOWN
LLAMA_NORMS = norm("attn_norm", "input_layernorm", "hidden") + norm("mlp_norm", "post_attention_layernorm", "hidden")
HEAD_NORMS = norm("q_norm", "self_attn.q_norm", "head", flag="qk_norm") + norm(
    "k_norm", "self_attn.k_norm", "head", flag="qk_norm"
)
LLAMA_KIND = LayerKind(norms=LLAMA_NORMS, linears=LLAMA_LINEARS)
