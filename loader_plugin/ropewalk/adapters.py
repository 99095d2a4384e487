"""The adapters of a loaded model: any number at once, a weighted set of them for each request.

Weights of the model are never touched. The matrices of a set are laid out when it is first asked for, and kept for the
sets used last, so changing between them costs nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.backends.protocol import Backend
from ropewalk.config import ModelConfig
from ropewalk.errors import RequestError
from ropewalk.gptq import DenseLinear
from ropewalk.layers import UNCHANGED
from ropewalk.lora import EMBEDDING_MODULE, Adapter, LowRank
from ropewalk.low_rank import (
    EmbeddingChange,
    HeadChange,
    LayerChange,
    PackedLowRank,
    Weighted,
    pack_embedding_change,
    pack_low_rank,
)
from ropewalk.tensor_table import FAMILY_TABLES, HEAD, layer_prefix, sizes

Request = Sequence[tuple[str, float] | str]
AdapterKey = tuple[tuple[int, float], ...]

KEPT_SETS = 8  # packed sets kept for reuse: each takes the memory of its matrices once more
GROUPS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True, slots=True, eq=False)
class ModelChange:
    """What a weighted set of adapters changes; `key` tells sets apart. layers: by index of the weights."""

    key: AdapterKey
    layers: tuple[LayerChange, ...]
    embeddings: EmbeddingChange | None
    head: HeadChange | None

    def of_layer(self, weights_index: int) -> LayerChange:
        """The change of a layer's weights. Layers lent by a second model come after the model's own: adapters were not
        made for them."""
        return self.layers[weights_index] if weights_index < len(self.layers) else UNCHANGED


class AdapterSets:
    """Loaded adapters by name, and their packed combinations."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._loaded: dict[str, tuple[int, Adapter]] = {}
        self._num_loads = 0
        self._packed: OrderedDict[AdapterKey, ModelChange] = OrderedDict()
        self._unchanged = ModelChange((), (UNCHANGED,) * config.num_layers, None, None)

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order of loading."""
        return tuple(self._loaded)

    def check_new_name(self, name: Any) -> None:
        """Raises RequestError for a name that is none or that is taken."""
        if not isinstance(name, str) or not name:
            raise RequestError(f"the name of an adapter must be a string that is not empty, got {name!r}")
        if name in self._loaded:
            raise RequestError(f"an adapter named {name!r} is loaded already: unload it first, or choose another name")

    def add(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter under a name that `check_new_name` accepts."""
        self._num_loads += 1
        self._loaded[name] = (self._num_loads, adapter)

    def remove(self, name: Any) -> None:
        """Forget an adapter and the sets that it is in.

        Raises:
            RequestError: there is none of that name.
        """
        number, _ = self._known(name)
        del self._loaded[name]
        self._packed = OrderedDict((key, change) for key, change in self._packed.items() if number not in dict(key))

    def key(self, request: Request | None) -> AdapterKey:
        """The set in the order of loading, so that equal sets give equal bits; weights of 0 leave an adapter out.

        Raises:
            RequestError: not a list of names or (name, weight), an unknown name, one twice, a weight that is no number.
        """
        if request is None:
            return ()
        if isinstance(request, (str, Mapping)) or not isinstance(request, Sequence):
            raise RequestError(
                f'adapters must be a list such as [("storm", 1.0), ("poet", 0.5)] or None, got {request!r:.80}'
            )
        weights: dict[int, float] = {}
        for item in request:
            name, weight = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, 1.0)
            number, _ = self._known(name)
            if number in weights:
                raise RequestError(f"adapters: {name!r} is named twice: give it once, with one weight")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise RequestError(f"adapters: the weight of {name!r} must be a finite number, got {weight!r:.80}")
            weights[number] = float(weight)
        return tuple(sorted((number, weight) for number, weight in weights.items() if weight != 0.0))

    def change(self, key: AdapterKey) -> ModelChange:
        """The set of that key, laid out for the backend."""
        if not key:
            return self._unchanged
        if key not in self._packed:
            self._packed[key] = self._pack(key)
            if len(self._packed) > KEPT_SETS:
                self._packed.popitem(last=False)
        self._packed.move_to_end(key)
        return self._packed[key]

    def _known(self, name: Any) -> tuple[int, Adapter]:
        if not isinstance(name, str) or name not in self._loaded:
            loaded = ", ".join(map(repr, self._loaded)) or "none"
            raise RequestError(f"adapters: no adapter {name!r:.80} is loaded (loaded: {loaded})")
        return self._loaded[name]

    def _pack(self, key: AdapterKey) -> ModelChange:
        by_number = dict(self._loaded.values())
        chosen = [(by_number[number], weight) for number, weight in key]
        size, table = sizes(self._config), FAMILY_TABLES[self._config.family]
        entries = {entry.field: entry for entry in table.linears}

        def group(prefix: str, fields: Sequence[str]) -> PackedLowRank | None:
            linears = [_low_ranks(chosen, prefix + entries[field].name) for field in fields]
            return pack_low_rank(self._backend, linears, [size[entries[field].outputs] for field in fields])

        layers = [
            LayerChange(**{name: group(layer_prefix(index), fields) for name, fields in GROUPS.items()})
            for index in range(self._config.num_layers)
        ]
        embeddings = [(adapter.embeddings, weight) for adapter, weight in chosen if adapter.embeddings is not None]
        packed = pack_embedding_change(self._backend, embeddings, _tables(chosen, EMBEDDING_MODULE))
        return ModelChange(key, tuple(layers), packed, self._pack_head(chosen))

    def _pack_head(self, chosen: Sequence[tuple[Adapter, float]]) -> HeadChange | None:
        low_rank = pack_low_rank(self._backend, [_low_ranks(chosen, HEAD)], [self._config.vocab_size])
        tables = _tables(chosen, HEAD)
        if low_rank is None and not tables:
            return None
        packed = tuple((self._backend.pack([DenseLinear(HEAD, table, None)]), weight) for table, weight in tables)
        return HeadChange(1.0 - sum(weight for _, weight in tables), packed, low_rank)


def _low_ranks(chosen: Sequence[tuple[Adapter, float]], module: str) -> list[Weighted]:
    found: list[tuple[LowRank | None, float]] = [(adapter.linears.get(module), weight) for adapter, weight in chosen]
    return [(low_rank, weight) for low_rank, weight in found if low_rank is not None]


def _tables(chosen: Sequence[tuple[Adapter, float]], module: str) -> list[tuple[torch.Tensor, float]]:
    return [(adapter.whole[module], weight) for adapter, weight in chosen if module in adapter.whole]
