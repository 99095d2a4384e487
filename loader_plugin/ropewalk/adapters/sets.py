"""The adapters of a loaded model: any number at once, and a weighted set of them for each request.

The weights of the model are never touched. The matrices of a set are packed when the set is first used. The most
recently used sets are kept, so switching between them costs nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ropewalk.adapters.lora import Adapter, LowRank
from ropewalk.adapters.low_rank import (
    UNCHANGED,
    EmbeddingChange,
    HeadChange,
    Weighted,
    pack_embedding_change,
    pack_low_rank,
)
from ropewalk.adapters.request import AdapterUse, Request, checked_request
from ropewalk.backends.protocol import Backend, LayerChange
from ropewalk.base.errors import RequestError
from ropewalk.config.instances import LayerInstance
from ropewalk.config.model import ModelConfig
from ropewalk.gptq.linear import DenseLinear

# Identifies a set: (number of the loaded adapter, weight, instances or None) of each use, in a fixed order.
AdapterKey = tuple[tuple[int, float, tuple[int, ...] | None], ...]
Chosen = tuple[tuple[int, float], ...]  # (number of the loaded adapter, weight) of the adapters of one layer

KEPT_SETS = 8  # packed sets kept for reuse; each holds a copy of its matrices


@dataclass(frozen=True, slots=True)
class SavedUse:
    """One use of an adapter as a file names it: `digest` is that of its matrices, `name` only for messages."""

    name: str
    digest: str
    weight: float
    instances: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class ModelChange:
    """What a weighted set of adapters changes. key: identifies the set. instances: by position in the layer order."""

    key: AdapterKey
    instances: tuple[LayerChange, ...]
    embeddings: EmbeddingChange | None
    head: HeadChange | None


class AdapterSets:
    """Loaded adapters by name, and their packed combinations for the current layer order.

    One thread may add or remove adapters while another asks for sets: a lock admits one at a time.
    """

    def __init__(self, config: ModelConfig, backend: Backend, instances: Sequence[LayerInstance]) -> None:
        self._config = config
        self._backend = backend
        self._lock = threading.RLock()  # guards everything below
        self._loaded: dict[str, tuple[int, Adapter]] = {}
        self._num_loads = 0
        self._digests: dict[int, str] = {}  # of adapters that a file was written with or compared to, by number
        self._layers: OrderedDict[Chosen, dict[int, LayerChange]] = OrderedDict()  # by index of the weights
        self.set_instances(instances)

    def set_instances(self, instances: Sequence[LayerInstance]) -> None:
        """Run these layer instances from now on. Packed changes to a layer are kept: they fit it wherever it runs."""
        with self._lock:
            self._instances = tuple(instances)
            self._packed: OrderedDict[AdapterKey, ModelChange] = OrderedDict()
            self._unchanged = ModelChange((), (UNCHANGED,) * len(self._instances), None, None)

    @property
    def names(self) -> tuple[str, ...]:
        """The loaded adapters, in the order in which they were loaded."""
        with self._lock:
            return tuple(self._loaded)

    def check_new_name(self, name: Any) -> None:
        """Raises RequestError for an empty name, one that is not a string, or one that is taken."""
        if not isinstance(name, str) or not name:
            raise RequestError(f"the name of an adapter must be a non-empty string, got {name!r}")
        if name in self._loaded:
            raise RequestError(f"an adapter named {name!r} is loaded already: unload it first, or choose another name")

    def add(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter under a name.

        Raises:
            RequestError: as `check_new_name`, asked again: another thread may have taken the name meanwhile.
        """
        with self._lock:
            self.check_new_name(name)
            self._num_loads += 1
            self._loaded[name] = (self._num_loads, adapter)

    def remove(self, name: Any) -> None:
        """Forget an adapter and the sets that contain it.

        Raises:
            RequestError: no adapter of that name is loaded.
        """
        with self._lock:
            number, _ = self._known(name)
            del self._loaded[name]
            kept = ((key, change) for key, change in self._packed.items() if all(use[0] != number for use in key))
            self._packed = OrderedDict(kept)
            self._layers = OrderedDict(
                (chosen, kept) for chosen, kept in self._layers.items() if number not in dict(chosen)
            )

    def key(self, request: Request | None) -> AdapterKey:
        """The key of a set, sorted so that equal sets give equal bits. Adapters with a weight of 0 are left out.

        Raises:
            RequestError: as `checked_request`; or an adapter is not loaded; or an instance is not in the layer order,
                or runs a layer of a second model.
        """
        uses = []
        with self._lock:
            for use in checked_request(request):
                number, _ = self._known(use.name)
                self._check_instances(use)
                if use.weight != 0.0:
                    uses.append((number, use.weight, use.instances))
        return _sorted_key(uses)

    def saved_uses(self, key: AdapterKey) -> tuple[SavedUse, ...]:
        """The set of that key by the content of its adapters, for a file.

        Raises:
            RequestError: one of its adapters has been unloaded since the key was made.
        """
        with self._lock:
            names = {number: name for name, (number, _) in self._loaded.items()}
            if any(number not in names for number, _, _ in key):
                raise RequestError(
                    "adapters: one of those that keys and values were computed with has been unloaded: load it again "
                    "and read the text anew"
                )
            return tuple(SavedUse(names[number], self._digest(names[number]), *rest) for number, *rest in key)

    def key_of_saved(self, uses: Sequence[SavedUse]) -> AdapterKey:
        """The key of a set that a file names.

        Raises:
            RequestError: an adapter of that content is not loaded; or they are loaded in another order, in which their
                changes would add up to other bits.
        """
        with self._lock:
            numbers = {self._digest(name): number for name, (number, _) in reversed(self._loaded.items())}
            missing = [use.name for use in uses if use.digest not in numbers]
            if missing:
                loaded = ", ".join(map(repr, self._loaded)) or "none"
                raise RequestError(
                    f"the adapter {missing[0]!r:.80} that it was computed with is not loaded (loaded: {loaded}; they "
                    "are compared by content)"
                )
            key = tuple((numbers[use.digest], use.weight, use.instances) for use in uses)
        if key != _sorted_key(key):
            wanted = ", ".join(dict.fromkeys(repr(use.name) for use in uses))
            raise RequestError(f"its adapters were loaded in another order, {wanted}: load them in that order")
        return key

    def _digest(self, name: str) -> str:
        number, adapter = self._loaded[name]
        if number not in self._digests:
            self._digests[number] = adapter.digest()
        return self._digests[number]

    def change(self, key: AdapterKey) -> ModelChange:
        """The set of that key, packed for the backend.

        Raises:
            RequestError: one of its adapters has been unloaded since the key was made.
        """
        with self._lock:
            if not key:
                return self._unchanged
            if key not in self._packed:
                self._packed[key] = self._pack(key)
                if len(self._packed) > KEPT_SETS:
                    self._packed.popitem(last=False)
            self._packed.move_to_end(key)
            return self._packed[key]

    def _known(self, name: str) -> tuple[int, Adapter]:
        if not isinstance(name, str) or name not in self._loaded:
            loaded = ", ".join(map(repr, self._loaded)) or "none"
            raise RequestError(f"adapters: no adapter {name!r:.80} is loaded (loaded: {loaded})")
        return self._loaded[name]

    def _check_instances(self, use: AdapterUse) -> None:
        count = len(self._instances)
        for position in use.instances or ():
            if position >= count:
                raise RequestError(
                    f"adapters: {str(use)!r:.80}: there is no layer instance {position}: the layer order that runs "
                    f"has {count}, counted from 0 to {count - 1}"
                )
            if self._instances[position].weights_index >= self._config.num_layers:
                raise RequestError(
                    f"adapters: {str(use)!r:.80}: the layer instance {position} belongs to the second model, for which "
                    "adapters are not made"
                )

    def _pack(self, key: AdapterKey) -> ModelChange:
        everywhere = tuple((number, weight) for number, weight, instances in key if instances is None)
        changes = []
        for position, instance in enumerate(self._instances):
            # Layers lent by a second model come after the model's own: adapters were not made for them.
            own = instance.weights_index < self._config.num_layers
            chosen = tuple(use[:2] for use in key if own and (use[2] is None or position in use[2]))
            changes.append(self._layer(instance.weights_index, chosen) if chosen else UNCHANGED)
        while len(self._layers) > KEPT_SETS:
            self._layers.popitem(last=False)
        return ModelChange(key, tuple(changes), self._pack_embeddings(everywhere), self._pack_head(everywhere))

    def _layer(self, index: int, chosen: Chosen) -> LayerChange:
        layers = self._layers.setdefault(chosen, {})
        self._layers.move_to_end(chosen)
        if index not in layers:
            layers[index] = self._pack_layer(index, chosen)
        return layers[index]

    def _adapters(self, chosen: Chosen) -> list[tuple[Adapter, float]]:
        by_number = dict(self._loaded.values())
        if any(number not in by_number for number, _ in chosen):
            raise RequestError("adapters: one of the adapters asked for has just been unloaded")
        return [(by_number[number], weight) for number, weight in chosen]

    def _pack_layer(self, index: int, chosen: Chosen) -> LayerChange:
        adapters, size = self._adapters(chosen), self._config.sizes
        prefix = self._config.table.layer_prefix(index)
        change = {}
        for name, entries in self._config.layer_table(index).groups.items():
            linears = [_low_ranks(adapters, prefix + entry.name) for entry in entries]
            packed = pack_low_rank(self._backend, linears, [size[entry.outputs] for entry in entries])
            if packed is not None:
                change[name] = packed
        return change

    def _pack_embeddings(self, chosen: Chosen) -> EmbeddingChange | None:
        adapters = self._adapters(chosen)
        low_ranks = [(adapter.embeddings, weight) for adapter, weight in adapters if adapter.embeddings is not None]
        return pack_embedding_change(self._backend, low_ranks, _tables(adapters, self._config.table.names.embeddings))

    def _pack_head(self, chosen: Chosen) -> HeadChange | None:
        adapters = self._adapters(chosen)
        head = self._config.table.names.head
        low_rank = pack_low_rank(self._backend, [_low_ranks(adapters, head)], [self._config.vocab_size])
        tables = _tables(adapters, head)
        if low_rank is None and not tables:
            return None
        packed = tuple((self._backend.pack([DenseLinear(head, table, None)]), weight) for table, weight in tables)
        return HeadChange(1.0 - sum(weight for _, weight in tables), packed, low_rank)


def _sorted_key(uses: Iterable[tuple[int, float, tuple[int, ...] | None]]) -> AdapterKey:
    return tuple(sorted(uses, key=lambda use: (use[0], use[2] or ())))


def _low_ranks(chosen: Sequence[tuple[Adapter, float]], module: str) -> list[Weighted]:
    found: list[tuple[LowRank | None, float]] = [(adapter.linears.get(module), weight) for adapter, weight in chosen]
    return [(low_rank, weight) for low_rank, weight in found if low_rank is not None]


def _tables(chosen: Sequence[tuple[Adapter, float]], module: str) -> list[tuple[torch.Tensor, float]]:
    return [(adapter.whole[module], weight) for adapter, weight in chosen if module in adapter.whole]
