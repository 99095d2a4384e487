"""Decoder layers in the hands of a backend: their weights by name, and the recorded program that uses them.

A `PackedLayer` is weights; a `LayerInstance` (config/instances.py) is one use of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ropewalk.backends.protocol import Backend, CompiledLayer, OnePlace, PackedExperts, PackedLinear
from ropewalk.config.model import ModelConfig
from ropewalk.families import FAMILIES
from ropewalk.families.program import Program
from ropewalk.families.recorder import LayerShape, record
from ropewalk.weights.read import LayerWeights, Linear


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayer:
    """Weights of one decoder layer in the layout of a backend, by the names of the program. norms: float32."""

    norms: Mapping[str, torch.Tensor]
    linears: Mapping[str, PackedLinear]
    experts: Mapping[str, PackedExperts]
    compiled: CompiledLayer

    @property
    def num_bytes(self) -> int:
        """Memory of the packed weights and norms."""
        norms = sum(norm.numel() * 4 for norm in self.norms.values())
        return norms + sum(packed.num_bytes for packed in (*self.linears.values(), *self.experts.values()))


@dataclass(frozen=True, slots=True, eq=False)
class CopiedLayer:
    """One decoder layer packed for several places (see `backends/split.py`)."""

    copies: tuple[PackedLayer, ...]
    compiled: CompiledLayer

    @property
    def num_bytes(self) -> int:
        """Memory of all copies."""
        return sum(copy.num_bytes for copy in self.copies)


@dataclass(frozen=True, slots=True, eq=False)
class ElsewhereLayer:
    """One decoder layer that other processes have read (see `backends/pipeline/`)."""

    compiled: CompiledLayer

    @property
    def num_bytes(self) -> int:
        """Memory here."""
        return 0


def elsewhere(backend: Backend, config: ModelConfig, index: int, first: int = 0) -> ElsewhereLayer:
    """Decoder layer `index`, none of whose places are here. first: as for `pack_for_places`."""
    program = layer_program(config.family, layer_shape(config, index))
    return ElsewhereLayer(backend.joined(first + index, (), program))


def pack_for_places(
    backend: Backend, config: ModelConfig, index: int, weights: LayerWeights, first: int = 0
) -> PackedLayer | CopiedLayer:
    """Hand the weights of decoder layer `index` to the backends of the places that run it.

    first: the place of the model's first layer in `ModelWeights.layers`.
    """
    places = backend.places_of(first + index)
    copies = tuple(pack_layer(place, config, index, weights) for place in places)
    program = layer_program(config.family, layer_shape(config, index))
    compiled = backend.joined(first + index, [copy.compiled for copy in copies], program)
    return replace(copies[0], compiled=compiled) if len(copies) == 1 else CopiedLayer(copies, compiled)


def pack_layer(backend: OnePlace, config: ModelConfig, index: int, weights: LayerWeights) -> PackedLayer:
    """Hand the weights of decoder layer `index` to the backend."""
    norms = {name: norm.to(backend.device) for name, norm in weights.norms.items()}
    groups = config.layer_table(index).groups
    linears = {
        name: backend.pack(_Parts(weights.linears, [entry.field for entry in entries]))
        for name, entries in groups.items()
    }
    program = layer_program(config.family, layer_shape(config, index))
    experts = {name: backend.pack_experts(parts) for name, parts in weights.experts.items()}
    compiled = backend.compile_layer(program, {**norms, **linears, **experts}, config.norm_eps)
    return PackedLayer(norms, linears, experts, compiled)


class _Parts(Sequence[Linear]):
    """Linears that are packed together, each read when it is asked for."""

    def __init__(self, linears: Mapping[str, Linear], fields: Sequence[str]) -> None:
        self._linears = linears
        self._fields = fields

    def __len__(self) -> int:
        return len(self._fields)

    def __getitem__(self, number: int) -> Linear:
        return self._linears[self._fields[number]]


def recompiled(
    backend: OnePlace, config: ModelConfig, layers: Sequence[PackedLayer | CopiedLayer]
) -> tuple[PackedLayer | CopiedLayer, ...]:
    """The same packed weights in layers of a backend from `Backend.computing`: nothing is read, packed or copied.

    layers: those of `ModelWeights.layers`; a second model's come after the first's and have its shapes.
    """
    made = []
    for index, layer in enumerate(layers):
        assert isinstance(layer, PackedLayer), "only backends of one place compute in another way"
        program = layer_program(config.family, layer_shape(config, index % config.num_layers))
        weights = {**layer.norms, **layer.linears, **layer.experts}
        compiled = backend.compile_layer(program, weights, config.norm_eps)
        made.append(PackedLayer(layer.norms, layer.linears, layer.experts, compiled))
    return tuple(made)


def layer_shape(config: ModelConfig, index: int) -> LayerShape:
    """What the layer function of the family needs to know about decoder layer `index`."""
    return LayerShape(
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qk_norm="qk_norm" in config.flags,
        window=config.sliding_windows[index],
        kind=config.layer_kinds[index],
        rotation=config.rotations[index],
        attention_scale=config.scales.attention,
        attention_cap=config.scales.attention_cap,
        residual_scale=config.scales.residual,
        activation=config.activation,
        mixture=config.mixture,
    )


@lru_cache(maxsize=64)
def layer_program(family: str, shape: LayerShape) -> Program:
    """The recorded layer function of a family: one program for all layers of one shape."""
    return record(FAMILIES[family].kinds[shape.kind].layer, shape)
